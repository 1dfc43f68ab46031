"""Model outputs with `aux_loss` and `router_logits`, like those of transformers' MoE models."""

from __future__ import annotations

import sys
from dataclasses import fields, make_dataclass
from functools import cache

from torch import Tensor
from transformers.utils.generic import ModelOutput

AUX_FIELDS = ("aux_loss", "router_logits")


@cache
def output_with_aux(cls: type[ModelOutput]) -> type[ModelOutput]:
    """A subclass of a model's output class that also has `aux_loss` and `router_logits`.

    The fields are real, so that wrappers which take an output apart and build it again (data parallel, mixed precision)
    keep them. The class is put into this module's namespace under its name, so that it can be pickled.
    """
    present = {field.name for field in fields(cls)}  # pyright: ignore[reportArgumentType]  # all subclasses are dataclasses
    missing = [name for name in AUX_FIELDS if name not in present]
    if not missing:
        return cls
    name = f"{cls.__name__}WithAuxLoss"
    new = make_dataclass(name, [(n, Tensor | None, None) for n in missing], bases=(cls,))
    new.__module__ = __name__
    new.__doc__ = f"{cls.__name__} with the weighted auxiliary loss and the router logits of every FFN block."
    setattr(sys.modules[__name__], name, new)
    return new


def with_aux(outputs: ModelOutput, aux_loss: Tensor, router_logits: tuple[Tensor, ...]) -> ModelOutput:
    """The same outputs, with the two fields added."""
    values = {field.name: getattr(outputs, field.name) for field in fields(outputs)}  # pyright: ignore[reportArgumentType]
    values |= {"aux_loss": aux_loss, "router_logits": router_logits or None}
    return output_with_aux(type(outputs))(**values)
