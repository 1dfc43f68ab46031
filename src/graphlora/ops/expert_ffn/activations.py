"""Activations with their backward, for gradients written by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
ActivationBackward = Callable[[Tensor, Tensor], Tensor]

_aten = torch.ops.aten
# One of transformers' classes can compute several functions, so an activation is known by what it does to four numbers.
_PROBE = (-3.0, -0.7, 0.3, 2.0)


# Functions with names, because a model that holds them must be picklable.
def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.silu_backward(grad, x)


def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(grad, x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.gelu_backward(grad, x, approximate="tanh")


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _aten.threshold_backward(grad, x, 0)


_KNOWN: dict[str, tuple[Activation, ActivationBackward]] = {
    "silu": (F.silu, _silu_backward),
    "gelu": (F.gelu, _gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
    "relu": (F.relu, _relu_backward),
}


class DifferentiableAct:
    """An activation together with its backward `(grad, x) -> grad * act'(x)`; called like the activation it wraps.

    Attributes:
        act: the activation, elementwise.
        name: `"silu"`, `"gelu"` (exact), `"gelu_tanh"` or `"relu"`; None for any other function.
    """

    def __init__(self, act: Activation) -> None:
        self.act = act
        self.name = _known_name(act)
        self._known = None if self.name is None else _KNOWN[self.name][1]

    def __call__(self, x: Tensor) -> Tensor:
        """The activation itself, elementwise."""
        return self.act(x)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """`grad * act'(x)`, elementwise; autograd supplies it for an activation that is not known."""
        if self._known is not None:
            return self._known(grad, x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.act(leaf), leaf, grad)[0]


def _known_name(act: Activation) -> str | None:
    """Which of SiLU, GELU, tanh-GELU and ReLU the activation computes; None for any other."""
    probe = torch.tensor(_PROBE)
    with torch.no_grad():
        value = act(probe.clone())
        for name, (function, _) in _KNOWN.items():
            if torch.allclose(value, function(probe), atol=1e-6, rtol=0):
                return name
    return None
