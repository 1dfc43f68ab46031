"""Activations with their backward, for gradients written by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]

_aten = torch.ops.aten
# One of transformers' classes can compute several functions, so an activation is known by what it does to four numbers.
_PROBE = (-3.0, -0.7, 0.3, 2.0)


# Functions with names, because a model that holds them must be picklable. All of them can write where `out` says.
def _silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.silu(x) if out is None else _aten.silu.out(x, out=out)


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        return _aten.silu_backward(grad, x)
    return _aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.gelu(x) if out is None else _aten.gelu.out(x, out=out)


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        return _aten.gelu_backward(grad, x)
    return _aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _gelu_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.gelu(x, approximate="tanh") if out is None else _aten.gelu.out(x, approximate="tanh", out=out)


def _gelu_tanh_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        return _aten.gelu_backward(grad, x, approximate="tanh")
    return _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def _relu(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.relu(x) if out is None else torch.clamp_min(x, 0, out=out)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        return _aten.threshold_backward(grad, x, 0)
    return _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


_KNOWN: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (_silu, _silu_backward),
    "gelu": (_gelu, _gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
    "relu": (_relu, _relu_backward),
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
        self._known = None if self.name is None else _KNOWN[self.name]

    def __call__(self, x: Tensor) -> Tensor:
        """The activation itself, elementwise."""
        return self.act(x)

    def into(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The activation, written to `out` (which may be `x`) where there is one and the activation is known."""
        return self.act(x) if out is None or self._known is None else self._known[0](x, out)

    def backward(self, grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`grad * act'(x)`, elementwise; autograd supplies it for an activation that is not known.

        Written to `out` where there is one and the activation is known; `out` must be neither `grad` nor `x`.
        """
        if self._known is not None:
            return self._known[1](grad, x, out)
        if torch.compiler.is_compiling():
            # Dynamo does not trace autograd within a backward.
            return torch.func.vjp(self.act, x)[1](grad)[0]
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
