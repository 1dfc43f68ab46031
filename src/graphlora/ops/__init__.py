"""Functions on tensors: no `nn.Module`, no PEFT. Each op has a reference that reads like the paper."""
