"""The big frozen products and the skinny ones of the adapter: beside each other, or folded into one.

What the FFN's forward and backward multiply, without what lies between: `x` with gate, up and all A; the mixed
activation and its low-rank part with down and all B; and the gradients of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.candidates.ffn import NUM_EXPERTS
from benchmarks.context import Context
from benchmarks.gate import relative_error
from benchmarks.shapes import SHAPES
from graphlora.benchmark.timing import Call, Stopwatch

# Results of the four places where products stand, each in one tensor or in parts.
Products = Callable[[], tuple[tuple[Tensor, ...], ...]]
# Rounding of bfloat16, relative to the norm of the result.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Operands:
    """Random factors; `low` is the summed rank of all experts.

    Attributes:
        x: `[tokens, d]`.
        mixed: the activation and behind it its low-rank part, `[tokens, f + low]`.
        d_in: gradients of gate, up and both low-rank inputs, `[tokens, 2 f + 2 low]`.
        dy: `[tokens, d]`.
        w_in: gate, up and both A, `[2 f + 2 low, d]`.
        w_out: down and B, `[d, f + low]`.
        f: width of the block.
    """

    x: Tensor
    mixed: Tensor
    d_in: Tensor
    dy: Tensor
    w_in: Tensor
    w_out: Tensor
    f: int


def measure(context: Context) -> None:
    """Times the three ways once they agree."""
    p = context.case.params
    shape, low = SHAPES[p["shape"]], NUM_EXPERTS * p["r"]
    d, f, tokens = shape.hidden_size, shape.intermediate_size, p["tokens"]
    generator = torch.Generator(context.device).manual_seed(0)

    def random(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(rows, columns, device=context.device, generator=generator)
        return made.mul_(scale).to(context.dtype)

    o = Operands(
        random(tokens, d), random(tokens, f + low), random(tokens, 2 * (f + low)), random(tokens, d),
        random(2 * (f + low), d, d**-0.5), random(d, f + low, f**-0.5), f,
    )  # fmt: skip
    ways: dict[str, Products] = {"apart": apart(o), "gate_up_in_one": gate_up_in_one(o), "folded": folded(o)}
    truth = ways["apart"]()
    for name, way in ways.items():
        pairs = zip(way(), truth, strict=True)
        errors = [relative_error(torch.cat(value, 1), torch.cat(want, 1)) for value, want in pairs]
        if max(errors) > _TOLERANCE:
            raise AssertionError(f"{name} is wrong by {max(errors):.1e}")
    context.add_timings(context.interleave({name: _timed(way) for name, way in ways.items()}))


def _timed(way: Products) -> Call:
    def call(watch: Stopwatch) -> None:
        way()
        watch.lap("products")

    return call


def apart(o: Operands) -> Products:
    """As the library does it: the frozen weights as the model has them, skinny products beside."""
    f, low = o.f, o.w_out.shape[1] - o.f
    w_gate, w_up, a = (t.contiguous() for t in o.w_in.split((f, f, 2 * low)))
    w_down, b = (t.contiguous() for t in o.w_out.split((f, low), dim=1))
    m, p = (t.contiguous() for t in o.mixed.split((f, low), dim=1))
    d_gate, d_up, d_low = (t.contiguous() for t in o.d_in.split((f, f, 2 * low), dim=1))

    def run() -> tuple[tuple[Tensor, ...], ...]:
        first = o.x @ w_gate.T, o.x @ w_up.T, o.x @ a.T
        y = (m @ w_down.T).addmm_(p, b.T)
        d_mixed = o.dy @ w_down, o.dy @ b
        dx = (d_gate @ w_gate).addmm_(d_up, w_up).addmm_(d_low, a)
        return first, (y,), d_mixed, (dx,)

    return run


def gate_up_in_one(o: Operands) -> Products:
    """Gate and up stacked into one weight, skinny products beside."""
    f, low = o.f, o.w_out.shape[1] - o.f
    w_both, a = (t.contiguous() for t in o.w_in.split((2 * f, 2 * low)))
    w_down, b = (t.contiguous() for t in o.w_out.split((f, low), dim=1))
    m, p = (t.contiguous() for t in o.mixed.split((f, low), dim=1))
    d_both, d_low = (t.contiguous() for t in o.d_in.split((2 * f, 2 * low), dim=1))

    def run() -> tuple[tuple[Tensor, ...], ...]:
        first = o.x @ w_both.T, o.x @ a.T
        y = (m @ w_down.T).addmm_(p, b.T)
        d_mixed = o.dy @ w_down, o.dy @ b
        dx = (d_both @ w_both).addmm_(d_low, a)
        return first, (y,), d_mixed, (dx,)

    return run


def folded(o: Operands) -> Products:
    """All A as further rows of gate and up, all B as further columns of down: four products in all."""

    def run() -> tuple[tuple[Tensor, ...], ...]:
        first = o.x @ o.w_in.T
        y = o.mixed @ o.w_out.T
        d_mixed = o.dy @ o.w_out
        dx = o.d_in @ o.w_in
        return (first,), (y,), (d_mixed,), (dx,)

    return run
