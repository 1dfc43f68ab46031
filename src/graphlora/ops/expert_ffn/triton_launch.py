"""Launches of the expert FFN's kernels, as `torch.library` operations: one node each for `torch.compile`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphlora.ops.backend import interprets_triton
from graphlora.ops.expert_ffn import triton_kernels, triton_reduce
from graphlora.ops.expert_ffn.triton_plan import PlanShape, make_plan
from graphlora.ops.expert_ffn.triton_prepare import empty_prepared, prepare
from graphlora.ops.operations import launches_kernels
from graphlora.ops.sizes import ceil_div, next_power_of_2

# Offsets are 32-bit up to here.
_INT32 = 2**31 - 1
# Rows per program of the kernels that add partial sums.
_LOW_ROWS, _TABLE_ROWS = 32, 64
# Most registers of the weight gradients with dropout; of 168 it spills 36, but of more fewer programs fit.
_DROPOUT_REGISTERS = 168
_library = torch.library.Library("graphlora", "FRAGMENT")


class Tiles(NamedTuple):
    """Tile sizes of one kernel.

    Attributes:
        tokens: tokens per tile.
        columns: columns of f per step.
        splits: programs that share the columns of f (token-major kernels).
        warps: warps per program.
        stages: depth of software pipelining.
        registers: most registers per thread, so that more programs fit; None leaves it to the compiler.
    """

    tokens: int
    columns: int
    splits: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        options = {"num_warps": self.warps, "STAGES": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


class TilePlan(NamedTuple):
    """Tile sizes of the three kernels; forward and token gradients share the tokens of a tile."""

    forward: Tiles
    token_gradient: Tiles
    weight_gradient: Tiles
    chunk: int


def tile_plan(tokens: int, f: int, r: int, dtype: torch.dtype) -> TilePlan:
    """Tile sizes: measured best on an H200 in bfloat16 at r <= 16 (`python -m benchmarks.tune_expert_ffn`).

    Larger ranks and float32 take sizes that compile for sm_90 with few spilled registers.
    """
    chunk = max(256, next_power_of_2(tokens) // 8)
    if r > 16 or dtype == torch.float32:
        return TilePlan(Tiles(64, 32, 16, 4, 3), Tiles(64, 32, 16, 4, 3), Tiles(32, 64, 1, 4, 2), chunk)
    return TilePlan(Tiles(64, 64, 16, 4, 3), Tiles(64, 32, 16, 4, 4), Tiles(32, 32, 1, 2, 4, 168), chunk)


_library.define(
    "expert_mix_prepare(Tensor first, Tensor? second, Tensor gate_B, Tensor up_B, Tensor down_A, Tensor down_B, "
    "Tensor top_k_weights, Tensor top_k_index, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "expert_mix_forward(Tensor gate, Tensor up, Tensor low_gate, Tensor low_up, Tensor gate_B, Tensor up_B, "
    "Tensor down_A, Tensor top_k_weights, Tensor top_k_index, Tensor? seed, Tensor plan, float dropout, float scaling, "
    "str act) -> (Tensor, Tensor)"
)
_library.define(
    "expert_mix_backward(Tensor d_mixed, Tensor d_low_down, Tensor gate, Tensor up, Tensor low_gate, Tensor low_up, "
    "Tensor gate_B, Tensor up_B, Tensor down_A, Tensor top_k_weights, Tensor top_k_index, Tensor? seed, Tensor plan, "
    "float dropout, float scaling, str act, ScalarType low_dtype, bool joined) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Sizes(NamedTuple):
    """Sizes of one call, and the constants that all kernels share."""

    tokens: int
    f: int
    num_experts: int
    r: int
    top_k: int
    tiles: TilePlan
    plan: PlanShape
    constants: dict[str, Any]


def _sizes(up: Tensor, down_A: Tensor, top_k_index: Tensor, dropout: float, act: str) -> _Sizes:
    tokens, f = up.shape
    num_experts, r, _ = down_A.shape
    top_k = top_k_index.shape[1]
    tiles = tile_plan(tokens, f, r, up.dtype)
    # The interpreter's products know no bfloat16.
    precise = up.dtype == torch.float32 or interprets_triton()
    constants = {
        "K": top_k, "N": num_experts, "r": r, "R": max(16, next_power_of_2(r)),
        # Rows of gate and up may be 2 f apart.
        "WIDE": 2 * tokens * f > _INT32, "ACT": act, "FAST": not precise, "PRECISE": precise,
        "DROPOUT": dropout > 0, "THRESHOLD": int(dropout * 2**32), "INVERSE": 1 / (1 - dropout),
    }  # fmt: skip
    plan = _plan_shape(tokens, down_A, top_k_index, up.dtype)
    return _Sizes(tokens, f, num_experts, r, top_k, tiles, plan, constants)


def _token_major(sizes: _Sizes, tiles: Tiles) -> tuple[dict[str, Any], int, int]:
    """Constants, number of splits and column blocks per split of a token-major kernel."""
    columns = ceil_div(sizes.f, tiles.columns)
    blocks = ceil_div(columns, min(tiles.splits, columns))
    constants = sizes.constants | {
        "KP": next_power_of_2(sizes.top_k), "BT": sizes.tiles.forward.tokens, "BF": tiles.columns,
        "UNIFORM": sizes.plan.uniform, "EVEN": sizes.f % (tiles.columns * blocks) == 0,
        **tiles.options(),
    }  # fmt: skip
    return constants, ceil_div(columns, blocks), blocks


def _seed_or_any(seed: Tensor | None, other: Tensor) -> Tensor:
    return other if seed is None else seed


@launches_kernels
def mix_forward(
    gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, gate_B: Tensor, up_B: Tensor, down_A: Tensor,
    top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None, plan: Tensor, dropout: float, scaling: float,
    act: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(up, down_A, top_k_index, dropout, act)
    tokens, f, r, top_k = sizes.tokens, sizes.f, sizes.r, sizes.top_k
    gate, up, low_gate, low_up = (_rows(t) for t in (gate, up, low_gate, low_up))
    mixed = torch.empty(tokens, f, dtype=up.dtype, device=up.device)
    low_down = torch.empty(tokens, sizes.num_experts * r, dtype=up.dtype, device=up.device)
    if tokens == 0:
        return mixed, low_down
    top_k_weights, top_k_index = top_k_weights.contiguous(), top_k_index.contiguous()
    order, sorted_weights, start, end, count, experts = sizes.plan.parts(plan)
    constants, splits, blocks = _token_major(sizes, sizes.tiles.forward)
    partial_low = torch.empty(splits, tokens, top_k, r, dtype=torch.float32, device=up.device)
    triton_kernels.forward_kernel[(sizes.plan.tiles, splits)](
        gate, up, low_gate, low_up, gate_B, up_B, down_A, top_k_weights, top_k_index, _seed_or_any(seed, order),
        order, sorted_weights, start, end, experts, count, mixed, partial_low,
        tokens, f, gate.stride(0), up.stride(0), low_gate.stride(0), low_up.stride(0), blocks, scaling, **constants,
    )  # fmt: skip
    columns = sizes.num_experts * r
    block = _low_block(columns)
    triton_reduce.reduce_low_kernel[(ceil_div(tokens, _LOW_ROWS), ceil_div(columns, block))](
        partial_low, top_k_weights, top_k_index, low_down, tokens, columns, splits, scaling,
        K=top_k, r=r, BT=_LOW_ROWS, BC=block,
    )  # fmt: skip
    return mixed, low_down


def _low_block(columns: int) -> int:
    return min(128, next_power_of_2(columns))


@launches_kernels
def mix_backward(
    d_mixed: Tensor, d_low_down: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor,
    gate_B: Tensor, up_B: Tensor, down_A: Tensor, top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None,
    plan: Tensor, dropout: float, scaling: float, act: str, low_dtype: torch.dtype, joined: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    sizes = _sizes(up, down_A, top_k_index, dropout, act)
    tokens, f, r, top_k = sizes.tokens, sizes.f, sizes.r, sizes.top_k
    inputs = [_rows(t) for t in (gate, up, d_mixed, low_gate, low_up, d_low_down)]
    strides = [t.stride(0) for t in inputs]
    # Of gate and up: beside each other in the rows of one matrix, or one matrix behind the other.
    d_base = torch.empty(*((tokens, 2, f) if joined else (2, tokens, f)), dtype=up.dtype, device=up.device)
    d_gate, d_up = d_base.unbind(1 if joined else 0)
    d_low = torch.empty(tokens, 2 * sizes.num_experts * r, dtype=low_dtype, device=up.device)
    d_tables = [torch.empty(t.shape, dtype=torch.float32, device=up.device) for t in (gate_B, up_B, down_A)]
    d_weights = torch.empty(tokens, top_k, dtype=torch.float32, device=up.device)
    if tokens == 0:
        return d_base, d_low, *(t.zero_() for t in d_tables), d_weights
    top_k_weights, top_k_index = top_k_weights.contiguous(), top_k_index.contiguous()
    tables = (gate_B, up_B, down_A, top_k_weights, top_k_index)
    order, sorted_weights, start, end, count, experts = sizes.plan.parts(plan)
    seed = _seed_or_any(seed, order)
    constants, splits, blocks = _token_major(sizes, sizes.tiles.token_gradient)
    partial_low = torch.empty(splits, tokens, top_k, 2 * r, dtype=torch.float32, device=up.device)
    partial_weight = torch.empty(splits, tokens, top_k, dtype=torch.float32, device=up.device)
    triton_kernels.token_gradient_kernel[(sizes.plan.tiles, splits)](
        *inputs, *tables, seed, order, sorted_weights, start, end, experts, count,
        d_gate, d_up, partial_low, partial_weight,
        tokens, f, *strides, d_gate.stride(0), blocks, scaling, **constants,
    )  # fmt: skip
    partial = _weight_gradients(sizes, inputs, tables, seed, plan, scaling)
    columns = sizes.num_experts * r
    block = _low_block(columns)
    low_grid = ceil_div(tokens, _LOW_ROWS), ceil_div(columns, block)
    table_blocks = ceil_div(f, _TABLE_ROWS)
    triton_reduce.reduce_backward_kernel[(low_grid[0] * low_grid[1] + table_blocks * sizes.num_experts,)](
        partial_low, partial_weight, top_k_weights, top_k_index, d_low, d_weights,
        *partial[:4], *d_tables, tokens, columns, splits, scaling, f, len(partial[0]), *low_grid, table_blocks,
        K=top_k, N=sizes.num_experts, r=r, R=sizes.constants["R"], SLOTS=partial[0].shape[1],
        BT=_LOW_ROWS, BC=block, BF=_TABLE_ROWS,
    )  # fmt: skip
    return d_base, d_low, *d_tables, d_weights


def _weight_gradients(
    sizes: _Sizes, inputs: list[Tensor], tables: tuple[Tensor, ...], seed: Tensor, plan: Tensor, scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Each chunk's share of the gradients of the three tables, and the chunks: their starts, ends and experts."""
    shape, slots = sizes.plan, sizes.top_k
    if not shape.uniform:
        # Sorted by expert, one (token, choice) pair per row.
        shape, slots = PlanShape(sizes.tokens * sizes.top_k, sizes.num_experts, 1, shape.tile, shape.chunk), 1
        plan = make_plan(tables[4].view(-1, 1), tables[3].view(-1, 1), shape)
    order, sorted_weights, start, end, _, experts = shape.parts(plan)
    start, end, experts = start[shape.tiles :], end[shape.tiles :], experts[shape.tiles * sizes.num_experts :]
    tiles = sizes.tiles.weight_gradient
    if sizes.constants["DROPOUT"] and tiles.registers is not None:
        tiles = tiles._replace(registers=_DROPOUT_REGISTERS)
    blocks = ceil_div(sizes.f, tiles.columns)
    partial = torch.empty(shape.chunks, slots, 3, sizes.f, sizes.r, dtype=torch.float32, device=plan.device)
    triton_kernels.weight_gradient_kernel[(blocks, shape.chunks)](
        *inputs, *tables, seed, order, sorted_weights, start, end, experts, partial,
        sizes.f, *(t.stride(0) for t in inputs), scaling,
        **sizes.constants, SLOTS=slots, BT=tiles.tokens, BF=tiles.columns, EVEN=sizes.f % tiles.columns == 0,
        **tiles.options(),
    )  # fmt: skip
    return partial, start, end, experts


def _rows(t: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _plan_shape(tokens: int, down_A: Tensor, top_k_index: Tensor, dtype: torch.dtype) -> PlanShape:
    num_experts, r, f = down_A.shape
    tiles = tile_plan(tokens, f, r, dtype)
    return PlanShape(tokens, num_experts, top_k_index.shape[1], tiles.forward.tokens, tiles.chunk)


@launches_kernels
def mix_prepare(
    first: Tensor, second: Tensor | None, gate_B: Tensor, up_B: Tensor, down_A: Tensor, down_B: Tensor,
    top_k_weights: Tensor, top_k_index: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights, index = top_k_weights.contiguous(), top_k_index.contiguous()
    shape = _plan_shape(len(index), down_A, index, dtype)
    return tuple(prepare(first, second, gate_B, up_B, down_A, down_B, weights, index, shape, dtype))


def _prepare_fake(
    first: Tensor, second: Tensor | None, gate_B: Tensor, up_B: Tensor, down_A: Tensor, down_B: Tensor,
    top_k_weights: Tensor, top_k_index: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = _plan_shape(len(top_k_index), down_A, top_k_index, dtype)
    return tuple(empty_prepared(first, second, gate_B, up_B, down_A, down_B, shape, dtype))


def _forward_fake(gate: Tensor, up: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    down_A = others[4]
    return up.new_empty(up.shape), up.new_empty(len(up), down_A.shape[0] * down_A.shape[1])


def _backward_fake(
    d_mixed: Tensor, d_low_down: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor,
    gate_B: Tensor, up_B: Tensor, down_A: Tensor, top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None,
    plan: Tensor, dropout: float, scaling: float, act: str, low_dtype: torch.dtype, joined: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    tables = (t.new_empty(t.shape, dtype=torch.float32) for t in (gate_B, up_B, down_A))
    d_low = up.new_empty(len(up), 2 * down_A.shape[0] * down_A.shape[1], dtype=low_dtype)
    d_weights = up.new_empty(top_k_index.shape, dtype=torch.float32)
    tokens, f = up.shape
    return up.new_empty((tokens, 2, f) if joined else (2, tokens, f)), d_low, *tables, d_weights


for _device in ("CUDA", "CPU"):
    _library.impl("expert_mix_prepare", mix_prepare, _device)
    _library.impl("expert_mix_forward", mix_forward, _device)
    _library.impl("expert_mix_backward", mix_backward, _device)
torch.library.register_fake("graphlora::expert_mix_prepare", _prepare_fake)
torch.library.register_fake("graphlora::expert_mix_forward", _forward_fake)
torch.library.register_fake("graphlora::expert_mix_backward", _backward_fake)
