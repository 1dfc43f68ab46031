"""Compiles the expert FFN's kernels for an H100 or H200 without one: `python -m benchmarks.compile_kernels`.

Prints registers, spilled bytes, shared memory and the instructions that the inner loop spends per element of a
`[tokens, f]` tile: what decides the speed of kernels that must not be slower than the memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TABLES = (
    "tile_start",
    "tile_end",
    "tile_experts",
    "tile_count",
    "chunk_start",
    "chunk_end",
    "chunk_experts",
)
_INDICES = ("seed", "token_order", "row_order", "sorted_weights", *_TABLES)
_FLOATS = ("weights", "partial_low", "partial_weight", "partial")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel.

    Attributes:
        name: the kernel.
        registers: per thread.
        spilled: bytes of local memory per thread.
        shared: bytes per program.
        per_element: instructions in the longest loop, per element of its tile.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    per_element: float


def compile_kernel(
    name: str, tokens: int, columns: int, warps: int, stages: int, dtype: str, **changes: Any
) -> Compiled:
    """One kernel of `graphlora.ops.expert_ffn.triton_kernels` with N = 8, K = 2, r = 8 (or `changes`), for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graphlora.ops.expert_ffn import triton_kernels

    kernel = getattr(triton_kernels, name)
    constants: dict[str, Any] = {
        "K": 2, "N": 8, "r": 8, "R": 16, "KP": 2, "SLOTS": 2, "BT": tokens, "BF": columns, "UNIFORM": True,
        "EVEN": True, "WIDE": False, "ACT": "silu", "FAST": dtype != "fp32", "PRECISE": dtype == "fp32",
        "DROPOUT": False, "THRESHOLD": 0, "INVERSE": 1.0, "STAGES": stages,
    } | changes  # fmt: skip
    signature: dict[str, str] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], fixed[(i,)] = "constexpr", constants[argument]
        elif argument == "scaling":
            signature[argument] = "fp32"
        elif argument in {"T", "f", "blocks"} or argument.endswith("_stride"):
            signature[argument] = "i32"
        else:
            kind = "i64" if argument == "ids" else "i32" if argument in _INDICES else "fp32"
            signature[argument] = "*" + (kind if argument in {"ids", *_INDICES, *_FLOATS} else dtype)
        if argument not in constants and argument not in {"scaling", "blocks", *_TABLES}:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, aligned)
    found = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})
    usage, loop = _disassemble(found.asm["cubin"])
    return Compiled(name, *usage, found.metadata.shared, loop * warps * 32 / (tokens * columns))


def _disassemble(cubin: bytes) -> tuple[tuple[int, int], int]:
    """`(registers, spilled bytes)`, and the number of instructions in the longest loop."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = {
            option: subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        }
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text["-res-usage"])
    assert usage is not None
    lines = [
        (int(at, 16), what)
        for at, what in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", text["-sass"], re.MULTILINE)
    ]
    loops = [0]
    for at, what in lines:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what)
        if jump and int(jump.group(1), 16) < at:
            loops.append(sum(int(jump.group(1), 16) <= other <= at for other, _ in lines))
    return (int(usage.group(1)), int(usage.group(2))), max(loops)


def main() -> None:
    """The tile sizes of `tile_plan` at 8,192 tokens of the Llama3-8B shape."""
    import torch

    from graphlora.ops.expert_ffn.triton_launch import tile_plan

    print(
        f"{'kernel':<24}{'dtype':>6}{'registers':>11}{'spilled':>9}{'shared':>8}{'instructions/element':>22}"
    )
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        plan = tile_plan(8192, 14336, 8, torch_dtype)
        for name, tiles in (
            ("forward_kernel", plan.forward),
            ("token_gradient_kernel", plan.token_gradient),
            ("weight_gradient_kernel", plan.weight_gradient),
        ):
            one = compile_kernel(name, tiles.tokens, tiles.columns, tiles.warps, tiles.stages, dtype)
            print(
                f"{name:<24}{dtype:>6}{one.registers:>11}{one.spilled:>9}{one.shared:>8}{one.per_element:>22.1f}"
            )


if __name__ == "__main__":
    main()
