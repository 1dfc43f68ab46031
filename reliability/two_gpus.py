"""Two GPUs (NCCL, bfloat16): the curve of one GPU, how speed scales, and large bases. `--tiny` tries it on CPUs.

Run as `torchrun --nproc_per_node 2 -m reliability.two_gpus [--parts ...] [--budget 480] [--out FILE]`; the file is
written after each part. A part that fails is recorded with its error, and the others go on.

- `curve`: a small random Llama, the same rows and the same rows per step on one GPU and on two, DDP and FSDP2, in
  bfloat16; and once more on one GPU with the rows of a step in another order, which shows what rounding alone does.
- `curve_float32`: the same in float32.
- `scaling`: the shape of Llama 3 8B, 8 rows of 1024 tokens per GPU: tokens per second on one GPU, and with DDP and
  FSDP2 on two.
- `large`: 4-bit FSDP2 (if bitsandbytes is there) and a base offloaded to the host, on the small Llama: they train.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "results" / "reliability" / "two_gpus.json"
SMALL = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4}
LLAMA_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0}
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


class Plan:
    """Sizes and place of a run of this script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tiny, self.backend = options.tiny, options.backend
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.small, self.large = (TINY, TINY) if self.tiny else (SMALL, LLAMA_8B)
        self.rows, self.length = (2, 16) if self.tiny else (8, 1024)
        self.checkpointing = False
        self.steps, self.timed = (6, 3) if self.tiny else (40, 12)
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.device = (
            torch.device("cpu") if self.tiny else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        )

    def say(self, text: str) -> None:
        """A line of the first process."""
        if self.rank == 0:
            sys.stderr.write(f"{text}\n")


def main() -> int:
    """Run the parts that fit into the budget; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m reliability.two_gpus", description=__doc__)
    parser.add_argument("--parts", default="curve,curve_float32,scaling,large")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no part is started")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    parser.add_argument("--backend", default="auto", help="of the adapter: auto, torch or triton")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on CPUs (gloo)")
    parser.add_argument("--commit", default=None, help="where there is no git checkout")
    options = parser.parse_args()
    plan, started = Plan(options), time.monotonic()
    if not plan.tiny:
        torch.cuda.set_device(plan.device)
    dist.init_process_group("gloo" if plan.tiny else "cpu:gloo,cuda:nccl")
    values: dict[str, Any] = {"world": plan.world, "backend": options.backend, "tiny": plan.tiny}
    values |= {"torch": torch.__version__, "device": _device_name(plan)}
    known: dict[str, Callable[[Plan, dict[str, Any]], None]]
    known = {"curve": curve, "curve_float32": curve_float32, "scaling": scaling, "large": large}
    for name in options.parts.split(","):
        late = torch.tensor([float(time.monotonic() - started > options.budget)])
        dist.all_reduce(late)
        found = values.setdefault(name, {})
        if bool(late):
            found["skipped"] = f"the budget of {options.budget:.0f} s was spent"
            continue
        begun = time.monotonic()
        try:
            known[name](plan, found)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            plan.say(traceback.format_exc())
        found["seconds"] = round(time.monotonic() - begun, 1)
        plan.say(f"{name}: {json.dumps(found)}")
        if plan.rank == 0:
            _write(options, values)
    dist.barrier()
    dist.destroy_process_group()
    return int(any("error" in value for value in values.values() if isinstance(value, dict)))


def curve(plan: Plan, found: dict[str, Any]) -> None:
    """Losses of the same rows on one GPU (each process by itself) and on both."""
    rows, length = (4, 16) if plan.tiny else (16, 256)
    for method in ("graphlora", "lora"):
        batches = [_tokens(plan, plan.small, rows, length, seed) for seed in range(plan.steps)]
        alone = _train(plan, method, plan.small, batches, "one")
        entry: dict[str, Any] = {"one": alone}
        mine = [batch[plan.rank :: plan.world] for batch in batches]
        for way in ("ddp", "fsdp2"):
            entry[way] = _train(plan, method, plan.small, mine, way)
            entry[f"{way}_difference"] = max(
                abs(a - b) / abs(a) for a, b in zip(alone, entry[way], strict=True)
            )
        for name, same in (("one_again", batches), ("other_order", [batch.flip(0) for batch in batches])):
            again = _train(plan, method, plan.small, same, "one")
            entry[f"{name}_difference"] = max(abs(a - b) / abs(a) for a, b in zip(alone, again, strict=True))
        found[method] = entry


def curve_float32(plan: Plan, found: dict[str, Any]) -> None:
    """The same in float32."""
    chosen, plan.dtype = plan.dtype, torch.float32
    try:
        curve(plan, found)
    finally:
        plan.dtype = chosen


def scaling(plan: Plan, found: dict[str, Any]) -> None:
    """Tokens per second of one GPU (both train at once, each for itself), of DDP and of FSDP2.

    Where one GPU is too small, all recompute their activations.
    """
    batch = _tokens(plan, plan.large, plan.rows, plan.length, plan.rank)
    plan.checkpointing = _is_too_large(plan, batch)
    found["gradient_checkpointing"] = plan.checkpointing
    for way in ("one", "ddp", "fsdp2"):
        times = _train(plan, "graphlora", plan.large, [batch] * (plan.timed + 3), way, timed=True)
        seconds = sorted(times[3:])[len(times[3:]) // 2]
        mine = torch.tensor([seconds], device=plan.device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        per_gpu = plan.rows * plan.length / float(mine)
        found[way] = {"step_seconds": float(mine), "tokens_per_second_per_gpu": per_gpu}
        if plan.device.type == "cuda":
            found[way]["peak_memory"] = torch.cuda.max_memory_allocated()
        if way != "one":
            found[way]["efficiency"] = per_gpu / found["one"]["tokens_per_second_per_gpu"]


def _is_too_large(plan: Plan, batch: torch.Tensor) -> bool:
    """Whether a step without recomputation takes more than nine tenths of a GPU, on either one."""
    too_large = False
    try:
        _train(plan, "graphlora", plan.large, [batch], "one")
        if plan.device.type == "cuda":
            total = torch.cuda.get_device_properties(plan.device).total_memory
            too_large = torch.cuda.max_memory_allocated() > 0.9 * total
    except torch.OutOfMemoryError:
        too_large = True
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    flag = torch.tensor([float(too_large)])
    dist.all_reduce(flag)
    return bool(flag)


def large(plan: Plan, found: dict[str, Any]) -> None:
    """The sharded base in 4 bits, and on the host: a few steps whose loss falls."""
    batches = [_tokens(plan, plan.small, 4, 64 if not plan.tiny else 16, plan.rank)] * 6
    for way in ("fsdp2_4bit", "fsdp2_offload"):
        try:
            losses = _train(plan, "graphlora", plan.small, batches, way)
            found[way] = {"losses": losses, "falls": losses[-1] < losses[0]}
        except Exception as error:
            found[way] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            plan.say(traceback.format_exc())
    if plan.tiny:
        found["fsdp2_offload"]["note"] = "needs pinned memory, which there is not without a GPU"


def _train(
    plan: Plan, method: str, sizes: dict[str, Any], batches: list[torch.Tensor], way: str, timed: bool = False
) -> list[float]:
    """Losses (means over the processes), or seconds, of one optimizer step for each batch.

    The parts of `graphlora train` in its order, without data: sharding, averaging, clipping, AdamW on float32 adapters.
    """
    from graphlora.training.sharding import average_gradients

    model = _model(plan, method, sizes, way)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped: nn.Module = model
    if way == "ddp":
        ids = None if plan.tiny else [plan.device.index]
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=False)
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=plan.device.type == "cuda")
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    results = []
    for batch in batches:
        _wait(plan)
        begun = time.perf_counter()
        ids = batch.to(plan.device)
        autocast = torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.dtype == torch.bfloat16)
        with autocast, _by_itself() if way == "one" else nullcontext():
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if way.startswith("fsdp2"):
            average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait(plan)
        value = loss.detach().float()
        if not timed and way != "one":
            dist.all_reduce(value)
            value /= plan.world
        results.append(time.perf_counter() - begun if timed else float(value))
    del model, wrapped, optimizer, trained
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return results


def _by_itself() -> AbstractContextManager[Any]:
    """Context in which a process sums its expert loads alone."""
    return mock.patch("torch.distributed.is_initialized", return_value=False)


def _model(plan: Plan, method: str, sizes: dict[str, Any], way: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig

    from graphlora import GraphLoraConfig
    from graphlora.benchmark.random_model import random_model, wake

    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False)
    base = random_model(config, plan.device, plan.dtype)
    if way == "fsdp2_4bit":
        base = _four_bits(plan, base)
    options = {"backend": plan.backend} if plan.backend != "auto" else {}
    adapter = (
        GraphLoraConfig(task_type="CAUSAL_LM", r=8, num_experts=8, top_k=2, **options)
        if method == "graphlora"
        else LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    )
    if plan.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    model = get_peft_model(base, adapter)
    wake(model)
    if way.startswith("fsdp2"):
        _shard(plan, model, way)
    return model.train()


def _shard(plan: Plan, model: nn.Module, way: str) -> None:
    """As `graphlora train` under `accelerate launch`, which hands the config over in these variables."""
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from graphlora.training.sharding import shard_base

    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=plan.tiny)
    if plan.tiny:
        state.distributed_type = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_offload=way == "fsdp2_offload",
        state_dict_type="FULL_STATE_DICT",
    )
    shard_base(Accelerator(fsdp_plugin=plugin, cpu=plan.tiny), model)


def _four_bits(plan: Plan, base: nn.Module) -> nn.Module:
    """The model with its linear layers in NF4, their bytes kept as values of its dtype, so that FSDP can shard them."""
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]  # an extra

    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=plan.dtype,
                    quant_type="nf4",
                    quant_storage=plan.dtype,
                )
                weight = child.weight.data.to("cpu")
                new.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", quant_storage=plan.dtype, module=new
                )
                setattr(module, name, new.to(plan.device))
    return base


def _tokens(plan: Plan, sizes: dict[str, Any], rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, sizes["vocab_size"], (rows, length), generator=generator)


def _wait(plan: Plan) -> None:
    if plan.device.type == "cuda":
        torch.cuda.synchronize()


def _device_name(plan: Plan) -> str:
    return "cpu" if plan.tiny else torch.cuda.get_device_name()


def _write(options: argparse.Namespace, values: dict[str, Any]) -> None:
    from reliability.record import write_record

    gaps = [
        f"{dtype} {method}: DDP {entry['ddp_difference']:.1e}, FSDP2 {entry['fsdp2_difference']:.1e}, one GPU with the "
        f"rows in another order {entry['other_order_difference']:.1e}"
        for name, dtype in (("curve", "bfloat16"), ("curve_float32", "float32"))
        for method, entry in values.get(name, {}).items()
        if isinstance(entry, dict)
    ]
    speeds = [
        f"{way} {values['scaling'][way]['efficiency']:.2f}"
        for way in ("ddp", "fsdp2")
        if way in values.get("scaling", {})
    ]
    figure = [f"largest relative difference of a step's loss to one GPU's: {'; '.join(gaps)}"] if gaps else []
    if speeds:
        figure += [f"tokens per second and GPU over those of one GPU (Llama 3 8B shape): {', '.join(speeds)}"]
    fast = ", and almost twice as fast" if speeds else ""
    path = write_record(
        options.out.stem,
        f"On two GPUs an adapter learns what it learns on one, up to rounding{fast}.",
        "torchrun --nproc_per_node 2 -m reliability.two_gpus",
        "; ".join(figure),
        values,
    )
    record = json.loads(path.read_text())
    record["machine"] = f"{values['world']} x {values['device']}"
    if options.commit:
        record["commit"] = options.commit
    path.unlink()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
