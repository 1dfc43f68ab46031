"""Tries tile sizes of the expert FFN's kernels on this GPU: `python -m benchmarks.tune_expert_ffn OUT.jsonl`.

Prints device microseconds per kernel for each plan. What is best belongs into `tile_plan` of
`graphlora.ops.expert_ffn.triton_launch`.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from typing import Any

SHAPES = {"llama3-8b": (4096, 14336), "qwen2-7b": (3584, 18944)}
# Tokens, columns, splits of f, warps, stages, registers. Forward and token gradients share the tokens of a tile.
TOKEN_MAJOR = [
    (64, (64, 16, 4, 2), (32, 16, 4, 3)),
    (64, (64, 16, 4, 3), (32, 16, 4, 4)),
    (64, (64, 32, 4, 4), (32, 32, 4, 3)),
    (64, (64, 16, 4, 3, 168), (32, 16, 4, 3, 168)),
    (64, (32, 16, 4, 3, 128), (16, 16, 4, 3)),
    (64, (32, 16, 4, 4, 128), (16, 16, 4, 4)),
    (64, (32, 32, 4, 3, 128), (16, 16, 4, 4, 128)),
    (64, (32, 8, 4, 4, 128), (16, 16, 4, 5, 128)),
    (64, (16, 16, 4, 4), (16, 32, 4, 4, 128)),
    (64, (16, 16, 4, 5, 80), (64, 16, 4, 3)),
    (128, (64, 16, 8, 3), (32, 16, 8, 3)),
    (128, (32, 16, 8, 3, 128), (16, 16, 8, 4)),
    (32, (64, 16, 2, 3), (32, 16, 2, 3)),
    (32, (32, 16, 2, 3), (16, 16, 2, 4)),
    (32, (32, 16, 2, 4, 128), (16, 16, 2, 4, 128)),
]
# Tokens, columns, warps, stages, registers.
WEIGHT = [
    (64, 64, 4, 2),
    (64, 64, 4, 5),
    (32, 64, 4, 2),
    (32, 64, 4, 4),
    (32, 64, 4, 6),
    (32, 64, 4, 4, 168),
    (16, 64, 4, 4),
    (16, 64, 4, 6),
    (16, 64, 4, 6, 128),
    (32, 32, 2, 4),
    (64, 32, 2, 4),
    (32, 32, 2, 4, 168),
    (16, 32, 2, 4, 128),
    (128, 64, 8, 3),
    (64, 64, 4, 2, 168),
]


def plans() -> list[Any]:
    """Combinations of the sizes above, each size in at least one plan."""
    from graphlora.ops.expert_ffn.triton_launch import TilePlan, Tiles

    found = []
    for i, (tokens, forward, token) in enumerate(TOKEN_MAJOR):
        w = WEIGHT[i % len(WEIGHT)]
        found.append(
            TilePlan(
                Tiles(tokens, *forward),
                Tiles(tokens, *token),
                Tiles(w[0], w[1], 1, *w[2:]),
                (512, 1024)[i % 2],
            )
        )
    return found


def run(plan: Any, tokens: int, d: int, f: int, r: int, skew: bool, steps: int) -> dict[str, float]:
    """Device microseconds per kernel of one forward and backward with a plan; only compiles with no steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from graphlora.ops.expert_ffn import triton_launch as path

    path.tile_plan = lambda *_: plan
    torch.manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Any:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16) * scale

    gate, up, dm = draw(tokens, f), draw(tokens, f), draw(tokens, f)
    low, d_low = draw(tokens, 16 * r), draw(tokens, 8 * r)
    low_gate, low_up = low.split(8 * r, dim=1)
    tables = draw(8, f, r), draw(8, f, r), draw(8, r, f, scale=f**-0.5)
    down_B = draw(8, d, r)
    scores = torch.rand(tokens, 8, device="cuda")
    if skew:
        scores[: tokens // 2, 0] += 1
    weights, ids = scores.topk(2)
    weights = weights / weights.sum(1, keepdim=True)

    def step() -> None:
        work = torch.ops.graphlora.expert_mix_prepare(
            low, None, *tables, down_B, weights, ids, torch.bfloat16
        )[-1]
        torch.ops.graphlora.expert_mix_forward(
            gate, up, low_gate, low_up, *tables, weights, ids, None, work, 0.0, 2.0, "silu"
        )
        torch.ops.graphlora.expert_mix_backward(
            dm,
            d_low,
            gate,
            up,
            low_gate,
            low_up,
            *tables,
            weights,
            ids,
            None,
            work,
            0.0,
            2.0,
            "silu",
            torch.float32,
            True,
        )

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    if not steps:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / steps for e in found.key_averages() if e.self_device_time_total}


def _compile(job: tuple[Any, int, int, int]) -> None:
    plan, d, f, r = job
    try:
        run(plan, 512, d, f, r, skew=False, steps=0)
    except Exception as error:
        print("does not compile:", plan, repr(error)[:200], flush=True)


def main() -> None:
    """Compile all plans in parallel, then time them one by one; `--once I` only runs plan I, for a profiler."""
    if sys.argv[1] == "--once":
        run(plans()[int(sys.argv[2])], 8192, *SHAPES["llama3-8b"], 8, skew=False, steps=0)
        return
    out = open(sys.argv[1], "a", encoding="utf-8")  # noqa: SIM115 (written row by row)
    cases = [("llama3-8b", 8, False), ("qwen2-7b", 8, False), ("llama3-8b", 16, True)]
    jobs = [
        (plan, *SHAPES[shape], r) for (shape, r, skew), plan in itertools.product(cases, plans()) if not skew
    ]
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        pool.map(_compile, jobs, chunksize=1)
    print("compiled", flush=True)
    for shape, r, skew in cases:
        print(shape, "r", r, "skewed" if skew else "balanced", flush=True)
        for plan in plans():
            try:
                times = run(plan, 8192, *SHAPES[shape], r, skew, steps=6)
            except Exception as error:
                print("  failed", plan, repr(error)[:150], flush=True)
                continue
            row = {"shape": shape, "r": r, "skew": skew, "plan": plan, "microseconds": times}
            out.write(json.dumps(row) + "\n")
            out.flush()
            short = {
                k.split("_kernel")[0][:16]: round(v) for k, v in sorted(times.items(), key=lambda kv: -kv[1])
            }
            names = [tuple(plan.forward), tuple(plan.token_gradient), tuple(plan.weight_gradient), plan.chunk]
            print("  ", names, short, flush=True)


if __name__ == "__main__":
    main()
