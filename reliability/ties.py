"""Equal router logits in half precision: every path and every process chooses the experts of lowest index.

Two processes (gloo) route the same tokens, each beside tokens of its own, through routers whose experts cannot be told
apart (a complete graph, or weights of zero), by the paths `eager` and `torch`, with bases in bfloat16, float16 and
float32, with and without autocast.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from graphlora import GraphLoraConfig
from reliability.record import ROOT, write_record
from reliability.tiny import two_blocks

PROMISE = (
    "Equal router logits choose the same experts, the lowest index first, on every rank, path and dtype."
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("eager", "torch")
SHARED, TOP_K = 6, 2


def choices(dtype: torch.dtype, backend: str, zero: bool, autocast: bool, rank: int) -> dict[str, Any]:
    """Experts of the tokens of two rows that all processes share, `[blocks, tokens, top_k]`, and whether logits tie."""
    torch.manual_seed(0)
    config = two_blocks()
    adapter = GraphLoraConfig(
        task_type="CAUSAL_LM",
        preset="paper",
        edge_init="complete",
        num_experts=8,
        top_k=TOP_K,
        backend=backend,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*expert graphs hold twins")
        model: Any = get_peft_model(LlamaForCausalLM(config).to(dtype), adapter).eval()
    if zero:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "out_proj" in name:
                    parameter.zero_()
    shared = torch.randint(1, 64, (2, SHARED), generator=torch.Generator().manual_seed(1))
    own = torch.randint(1, 64, (rank + 1, SHARED), generator=torch.Generator().manual_seed(10 + rank))
    ids = torch.cat([shared, own])
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with model.base_model.record_routing() as record, torch.no_grad(), cast:
        model(input_ids=ids)
    tokens = 2 * SHARED
    logits = torch.stack([routing.router_logits[:tokens] for routing in record.values()])
    return {
        "chosen": torch.stack([routing.top_k_index[:tokens] for routing in record.values()]),
        "ties": bool((logits == logits[..., :1]).all()),
    }


def run_rank(folder: Path) -> None:
    """All cases in one process of two, which say them to each other."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, cases = dist.get_rank(), 0
    lowest = torch.arange(TOP_K)
    wrong = []
    for dtype in DTYPES:
        for backend in BACKENDS:
            for zero in (False, True):
                for autocast in (False, True):
                    found = choices(dtype, backend, zero, autocast, rank)
                    everywhere = [torch.empty_like(found["chosen"]) for _ in range(dist.get_world_size())]
                    dist.all_gather(everywhere, found["chosen"])
                    cases += found["chosen"].shape[0] * found["chosen"].shape[1]
                    alike = all(torch.equal(one, found["chosen"]) for one in everywhere)
                    if not (alike and found["ties"] and bool((found["chosen"] == lowest).all())):
                        wrong.append(f"{dtype} {backend} zero={zero} autocast={autocast} {found['ties']}")
    torch.save({"decisions": cases, "wrong": wrong}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def run_ranks(folder: Path) -> list[dict[str, Any]]:
    """What two processes found: `decisions`, and the cases that are `wrong`."""
    words = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *words, "-m", "reliability.ties", "--rank", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def main() -> None:
    """Run two processes and record."""
    with tempfile.TemporaryDirectory() as name:
        found = run_ranks(Path(name))
    decisions = sum(part["decisions"] for part in found)
    if wrong := [case for part in found for case in part["wrong"]]:
        raise SystemExit(f"the promise does not hold: {wrong}")
    figure = f"{decisions} tied decisions by 2 ranks, 2 paths and 3 dtypes: all alike, lowest index first"
    test = "tests/reliability/test_ties.py::test_two_processes_break_ties_alike"
    write_record("ties", PROMISE, test, figure, {"decisions": decisions, "wrong": 0})
    print(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reliability.ties", description=__doc__)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    folder = parser.parse_args().rank
    if folder is None:
        main()
    else:
        run_rank(folder)
