"""A cost model of a training step on many GPUs: compute, memory, communication, waiting. Imports no torch.

Each formula is one function. `docs/scaling.md` says where the constants come from and how the results compare with
measurements; `python -m benchmarks scaling` writes that page's tables and pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from benchmarks.scaling_plan import BFLOAT16, FLOAT32, NF4, Adapter, Cluster, Plan
from benchmarks.shapes import Shape

# Bytes of a logit at the peak: bfloat16, its float32 copy, the log-softmax, and a gradient of half the time.
LOGIT_BYTES = 12
# Bytes that AdamW reads and writes per parameter: weight, gradient and two moments; weight and moments.
ADAMW_TRAFFIC = 7 * FLOAT32
# Gradients travel in pieces: DDP's, and those of `graphlora.training.sharding`.
BUCKET_BYTES = {"ddp": 25 * 2**20, "fsdp": 64 * 2**20, "hybrid": 64 * 2**20}


def step_flops(plan: Plan) -> float:
    """FLOPs of one GPU in a micro-batch.

    A frozen weight takes part in the forward and in the gradient of its input (4 FLOPs per weight and token), an
    adapter's in its own gradient too (6); with checkpointing the forward is done twice. Causal attention sees half of
    the positions.
    """
    again = 1 if plan.checkpointing else 0
    frozen, adapter = plan.shape.num_matmul(), plan.adapter.active_parameters(plan.shape)
    attention = (6 + 2 * again) * plan.length * plan.shape.hidden_size * plan.shape.num_layers
    return plan.tokens * ((4 + 2 * again) * frozen + (6 + 2 * again) * adapter + attention)


def compute_seconds(plan: Plan) -> float:
    """Of a micro-batch: its products, and unpacking 4-bit weights before each use (read, write, read again)."""
    products = step_flops(plan) / (plan.cluster.flops * plan.mfu)
    if plan.bits == 16:
        return products
    uses = 3 if plan.checkpointing else 2
    linear = plan.shape.num_layers * plan.shape.layer_matmul()
    return products + uses * linear * (NF4 + 2 * BFLOAT16) / plan.cluster.memory_bandwidth


def optimizer_seconds(plan: Plan) -> float:
    """Of AdamW, which memory bounds."""
    return plan.adapter.parameters(plan.shape) * ADAMW_TRAFFIC / plan.cluster.memory_bandwidth


def activation_bytes(shape: Shape, adapter: Adapter) -> float:
    """What a layer keeps for backward per token, in bfloat16 with the fused PyTorch path."""
    kv = shape.num_kv_heads * shape.head_size
    n, r = adapter.num_experts, adapter.r
    low_rank = 6 * n * r + 8 * r
    router = 8 * adapter.router_hidden_size + 32 * n + 16 * adapter.top_k
    rest = low_rank + router + 4 * shape.num_heads + 16
    return 24 * shape.hidden_size + 4 * shape.intermediate_size + 4 * kv + rest


def memory(plan: Plan) -> dict[str, float]:
    """Bytes of one GPU at the peak of a step, by what they hold."""
    shape, adapter = plan.shape, plan.adapter
    trained = adapter.parameters(shape)
    whole = plan.tokens * activation_bytes(shape, adapter)
    inputs = plan.tokens * shape.hidden_size * BFLOAT16
    kept = shape.num_layers * inputs + whole if plan.checkpointing else shape.num_layers * whole
    return {
        "base": plan.base_bytes / plan.shards,
        "gathered": 2 * plan.layer_bytes + plan.outer_bytes if plan.shards > 1 else 0.0,
        "adapter": FLOAT32 * trained,
        "gradients": (2 if plan.mode == "ddp" and plan.gpus > 1 else 1) * FLOAT32 * trained,
        "optimizer": 2 * FLOAT32 * trained,
        "activations": kept,
        "logits": plan.tokens * plan.labeled * shape.vocab_size * LOGIT_BYTES,
        "reserved": plan.cluster.reserved,
    }


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step.

    Attributes:
        what: What they carry.
        kind: `"all_gather"` or `"all_reduce"`.
        count: How many.
        num_bytes: Of all together, whole tensors.
        gpus: That take part.
    """

    what: str
    kind: Literal["all_gather", "all_reduce"]
    count: int
    num_bytes: float
    gpus: int

    def seconds(self, cluster: Cluster) -> float:
        """Of all together: the bytes over the bandwidth, and the latency of each."""
        if self.gpus < 2:
            return 0.0
        factor = (2 if self.kind == "all_reduce" else 1) * (self.gpus - 1) / self.gpus
        in_tree = self.kind == "all_reduce"
        latency = cluster.tree_latency(self.gpus) if in_tree else cluster.ring_latency(self.gpus)
        return factor * self.num_bytes / cluster.bandwidth(self.gpus) + self.count * latency


def collectives(plan: Plan) -> Iterator[Collective]:
    """All of one optimizer step: the base's weights and the loads per micro-batch, the gradients once."""
    shape, adapter, turns = plan.shape, plan.adapter, plan.micro_batches
    trained = FLOAT32 * adapter.parameters(shape)
    if plan.shards > 1:
        layers = 2 * turns * shape.num_layers
        yield Collective("weights of layers", "all_gather", layers, layers * plan.layer_bytes, plan.shards)
        yield Collective("embedding and head", "all_gather", turns, turns * plan.outer_bytes, plan.shards)
    buckets = max(1, math.ceil(trained / BUCKET_BYTES[plan.mode]))
    yield Collective("gradients", "all_reduce", buckets, trained, plan.gpus)
    yield Collective("loads", "all_reduce", turns, turns * adapter.load_bytes(shape), plan.gpus)
    yield Collective("count of labels", "all_gather", 1, 8 * plan.gpus, plan.gpus)


@dataclass(frozen=True)
class Step:
    """An optimizer step; seconds.

    Attributes:
        compute: Of all micro-batches.
        communication: Of all collectives, hidden or not.
        exposed: Communication that computing does not hide.
        loads: Of the all-reduce of the loads, which nothing hides.
        optimizer: AdamW.
        num_collectives: How many.
        num_tokens: Of all GPUs.
    """

    compute: float
    communication: float
    exposed: float
    loads: float
    optimizer: float
    num_collectives: int
    num_tokens: int

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.exposed + self.loads + self.optimizer

    @property
    def efficiency(self) -> float:
        """Share of the time that computes."""
        return self.compute / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.num_tokens / self.seconds


def step(plan: Plan) -> Step:
    """Time of an optimizer step.

    Gathers of layers run while the layer before computes: of them shows what takes longer than computing, and the
    first layer's; embedding and head come before all layers. DDP reduces gradients during the last backward, half of
    the micro-batch's time, but for the last bucket; with a sharded base they are averaged after it.
    """
    found = list(collectives(plan))
    seconds = {item.what: item.seconds(plan.cluster) for item in found}
    once = compute_seconds(plan)
    compute = plan.micro_batches * once
    gathers = seconds.get("weights of layers", 0.0)
    exposed = max(gathers - compute, 0.0) + gathers / (2 * plan.shape.num_layers)
    exposed += seconds.get("embedding and head", 0.0) + seconds["count of labels"]
    gradients = seconds["gradients"]
    if plan.mode == "ddp":
        count = next(item.count for item in found if item.what == "gradients")
        gradients = max(gradients - once / 2, gradients / count)
    exposed += gradients
    return Step(
        compute,
        sum(seconds.values()),
        exposed,
        seconds["loads"],
        optimizer_seconds(plan),
        sum(item.count for item in found if item.gpus > 1),
        plan.gpus * plan.tokens * plan.micro_batches,
    )


def largest_of(gpus: int) -> float:
    """Expected largest of so many standard normal numbers (Blom's approximation)."""
    return 0.0 if gpus < 2 else NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))


def waiting_share(variation: float, gpus: int, micro_batches: int, each: bool) -> float:
    """Time that GPUs wait for the slowest of them, relative to computing.

    Args:
        variation: Standard deviation of a micro-batch's time over its mean, as from rows of unequal length.
        gpus: Number of GPUs.
        micro_batches: Per optimizer step.
        each: Whether they meet in every micro-batch (loads; gathered weights) or once per step (gradients alone).
    """
    return variation * largest_of(gpus) / (1.0 if each else math.sqrt(micro_batches))


def hidden_from(plan: Plan) -> float:
    """Tokens of a GPU in a micro-batch from which computing takes longer than gathering the layers' weights.

    The size of the model cancels out: both grow with it.
    """
    gathered = 2 * plan.layer_bytes * (plan.shards - 1) / plan.shards / plan.cluster.bandwidth(plan.shards)
    per_token = (6 if plan.checkpointing else 4) * plan.shape.layer_matmul()
    return gathered * plan.cluster.flops * plan.mfu / per_token


def with_global_batch(plan: Plan, tokens: int) -> Plan:
    """The plan with so many tokens per optimizer step over all GPUs, in micro-batches of at most its own size.

    Raises:
        ValueError: A GPU would get less than one row.
    """
    own = tokens // plan.gpus
    if own < plan.length:
        raise ValueError(f"{tokens} tokens are {tokens // plan.length} rows, fewer than {plan.gpus} GPUs")
    turns = max(1, math.ceil(own / plan.tokens))
    return replace(plan, micro_batches=turns, tokens=own // turns)


def first_limit(plan: Plan) -> str:
    """What breaks first: memory, where it does not fit, else what costs most of the time besides computing."""
    parts = memory(plan)
    if sum(parts.values()) > plan.cluster.memory:
        largest = max((name for name in parts if name != "reserved"), key=parts.__getitem__)
        return f"memory ({largest})"
    found = step(plan)
    costs = {"interconnect": found.exposed, "all-reduce of loads": found.loads, "optimizer": found.optimizer}
    if found.efficiency > 0.95:
        return "nothing"
    return max(costs, key=costs.__getitem__)
