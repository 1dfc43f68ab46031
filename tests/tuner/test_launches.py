"""How many kernels one block with its router launches, forward and backward."""

from collections import Counter
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

pytest.importorskip("triton")
from graphlora import GraphLoraConfig
from graphlora.ops.backend import interprets_triton
from graphlora.tuner.layer import GraphLoraLayer

pytestmark = pytest.mark.skipif(not interprets_triton(), reason="the interpreter counts its launches")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=1))

    def forward(self, x):
        return self.mlp(x)


@pytest.fixture
def launched(monkeypatch) -> Counter[str]:
    from triton.runtime.interpreter import GridExecutor

    counted: Counter[str] = Counter()
    run = GridExecutor.__call__

    def call(self, *args, **kwargs):
        counted[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    return counted


class Calls(TorchDispatchMode):
    """Names of the operations outside of the raw router and expert operations."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dropout", "kernels", "products"), [(0.0, 13, 9), (0.1, 16, 11)])
def test_one_block(launched, dropout, kernels, products):
    """Six of the products are the frozen block's; four more are inside the router's operations.

    On a GPU cuBLAS adds a kernel where it splits a product.
    """
    torch.manual_seed(0)
    config = GraphLoraConfig(
        r=2, target_modules=["mlp"], attention_target_modules=[], backend="triton", lora_dropout=dropout
    )
    model = get_peft_model(cast(Any, Block().bfloat16().requires_grad_(False)), config).train()
    layer = next(m for m in model.modules() if isinstance(m, GraphLoraLayer))
    inputs = [p for n, p in layer.named_parameters() if p.requires_grad and "coordination" not in n]
    x = torch.randn(20, 16).bfloat16().requires_grad_()
    with Calls() as calls:
        torch.autograd.grad(layer(x), [x, *inputs], torch.ones_like(x))
    assert launched.total() <= kernels, dict(launched)
    assert calls.names["mm"] + calls.names["addmm"] + calls.names["addmm_"] <= products, dict(calls.names)
    assert not calls.names["add"] + calls.names["add_"] + calls.names["sum"], dict(calls.names)
