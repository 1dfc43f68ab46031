"""LoRA+: a learning rate of its own for `lora_B` (arXiv 2402.12354)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import TrainingArguments


def loraplus_groups(
    model: nn.Module, decaying: Collection[str], arguments: TrainingArguments, ratio: float
) -> list[dict[str, Any]]:
    """Groups of trained parameters for an optimizer.

    Args:
        model: The adapted model.
        decaying: Names of the parameters under weight decay.
        arguments: Learning rate and weight decay.
        ratio: Learning rate of `lora_B` over that of everything else.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(("lora_B" in name, name in decaying), []).append(parameter)
    rate, decay = arguments.learning_rate, arguments.weight_decay
    return [
        {"params": parameters, "lr": rate * ratio if is_b else rate, "weight_decay": decay if decays else 0.0}
        for (is_b, decays), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]
