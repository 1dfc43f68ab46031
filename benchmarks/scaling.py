"""A cost model of a training step on many GPUs: compute, memory, communication, waiting. Imports no torch.

Each formula is one function. `docs/scaling.md` says where the constants come from and how the results compare with
measurements; `python -m benchmarks scaling` writes that page's tables and pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Literal

from benchmarks.shapes import Shape

FLOAT32, BFLOAT16 = 4, 2
# NF4 with double quantization: 4 bits, and 8 + 32 / 256 bits per block of 64 weights.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Bytes of a logit at the peak: bfloat16, its float32 copy, the log-softmax, and a gradient of half the time.
LOGIT_BYTES = 12
# Bytes that AdamW reads and writes per parameter: weight, gradient and two moments; weight and moments.
ADAMW_TRAFFIC = 7 * FLOAT32
# Gradients travel in pieces: DDP's, and those of `graphlora.training.sharding`.
BUCKET_BYTES = {"ddp": 25 * 2**20, "fsdp": 64 * 2**20, "hybrid": 64 * 2**20}
Mode = Literal["ddp", "fsdp", "hybrid"]


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them; bytes and FLOPs per second, per direction.

    Attributes:
        name: What it is called.
        flops: Dense bfloat16 FLOPs of a GPU.
        memory: Bytes of a GPU.
        memory_bandwidth: Of a GPU.
        nvlink: Of a GPU, within a node.
        node_network: Of a node, all its network cards together.
        gpus_per_node: GPUs that NVLink connects.
        share: Share of the bandwidths that large collectives reach.
        launch: Seconds that any collective takes.
        hop: Seconds to another GPU of the node.
        network_hop: Seconds to another node.
        reserved: Bytes of the CUDA context, NCCL's buffers and the allocator's gaps.
    """

    name: str = "8 x 400 Gb/s per node"
    flops: float = 989e12
    memory: float = 141e9
    memory_bandwidth: float = 4.8e12
    nvlink: float = 450e9
    node_network: float = 400e9
    gpus_per_node: int = 8
    share: float = 0.8
    launch: float = 10e-6
    hop: float = 1e-6
    network_hop: float = 5e-6
    reserved: float = 5e9

    def nodes(self, gpus: int) -> int:
        """Nodes that so many GPUs take."""
        return -(-gpus // self.gpus_per_node)

    def bandwidth(self, gpus: int) -> float:
        """What a collective among so many GPUs moves per second: NVLink's, or the node's network where that is less."""
        return self.share * (self.nvlink if self.nodes(gpus) == 1 else min(self.nvlink, self.node_network))

    def ring_latency(self, gpus: int) -> float:
        """Seconds until a small piece has passed all GPUs in a ring (all-gather, reduce-scatter)."""
        nodes = self.nodes(gpus)
        outside = nodes if nodes > 1 else 0
        return self.launch + (gpus - 1 - outside) * self.hop + outside * self.network_hop

    def tree_latency(self, gpus: int) -> float:
        """Seconds of an all-reduce of a few bytes, up a tree and down again."""
        inside = math.ceil(math.log2(min(gpus, self.gpus_per_node))) if gpus > 1 else 0
        return self.launch + 2 * (
            inside * self.hop + math.ceil(math.log2(self.nodes(gpus))) * self.network_hop
        )


SLOW = Cluster(name="1 x 400 Gb/s per node", node_network=50e9)
ETHERNET = Cluster(name="1 x 100 Gb/s per node", node_network=12.5e9, network_hop=20e-6)


@dataclass(frozen=True)
class Adapter:
    """Sizes of a GraphLoRA adapter of the default preset.

    Attributes:
        r: Rank.
        num_experts: N.
        top_k: K.
        router_hidden_size: g.
        router_num_layers: Graph layers.
    """

    r: int = 8
    num_experts: int = 8
    top_k: int = 2
    router_hidden_size: int = 64
    router_num_layers: int = 2

    def expert_parameters(self, shape: Shape) -> int:
        """Of one expert in one block: A and B of gate, up and down."""
        return 3 * self.r * (shape.hidden_size + shape.intermediate_size)

    def attention_parameters(self, shape: Shape) -> int:
        """Of plain LoRA on q, k, v and o in one layer."""
        kv = shape.num_kv_heads * shape.head_size
        return self.r * (4 * shape.hidden_size + 2 * (shape.hidden_size + kv))

    def router_parameters(self, shape: Shape) -> int:
        """Of one router: token projection, expert features, graph layers with self terms, output, lambda, sigma."""
        g = self.router_hidden_size
        return g * shape.hidden_size + self.num_experts * g + 2 * self.router_num_layers * g * g + g + 2

    def layer_parameters(self, shape: Shape) -> int:
        """Trained parameters of one layer."""
        experts = self.num_experts * self.expert_parameters(shape)
        return experts + self.attention_parameters(shape) + self.router_parameters(shape)

    def parameters(self, shape: Shape) -> int:
        """Trained parameters of the model."""
        return shape.num_layers * self.layer_parameters(shape)

    def active_parameters(self, shape: Shape) -> int:
        """Trained parameters that a token uses: K experts of each block, and all else."""
        idle = (self.num_experts - self.top_k) * self.expert_parameters(shape)
        return self.parameters(shape) - shape.num_layers * idle

    def load_bytes(self, shape: Shape) -> int:
        """Bytes of the one all-reduce of a training forward: per block N loads, N sums of logits, and a count."""
        return FLOAT32 * shape.num_layers * (2 * self.num_experts + 1)


@dataclass(frozen=True)
class Plan:
    """A training run.

    Attributes:
        shape: The model.
        gpus: Number of GPUs.
        mode: `"ddp"`: the base on every GPU; `"fsdp"`: split over all GPUs; `"hybrid"`: split over the GPUs of a node,
            the same on every node. The adapter is whole on every GPU.
        bits: Of the base's linear layers: 16, or 4.
        tokens: Tokens of a GPU in a micro-batch.
        length: Of a row.
        micro_batches: Per optimizer step.
        checkpointing: Whether activations are computed again.
        mfu: Share of the peak that the GPU's products reach.
        labeled: Share of positions that get logits.
        adapter: The adapter.
        cluster: The machines.
    """

    shape: Shape
    gpus: int = 8
    mode: Mode = "ddp"
    bits: int = 16
    tokens: int = 8192
    length: int = 2048
    micro_batches: int = 1
    checkpointing: bool = True
    mfu: float = 0.4
    labeled: float = 1.0
    adapter: Adapter = field(default_factory=Adapter)
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def shards(self) -> int:
        """GPUs that the base is split over."""
        return {"ddp": 1, "fsdp": self.gpus, "hybrid": min(self.gpus, self.cluster.gpus_per_node)}[self.mode]

    @property
    def layer_bytes(self) -> float:
        """Frozen weights of one layer."""
        return self.shape.layer_matmul() * (BFLOAT16 if self.bits == 16 else NF4)

    @property
    def outer_bytes(self) -> float:
        """Embedding and head, which stay in bfloat16."""
        copies = 1 if self.shape.tied else 2
        return copies * self.shape.hidden_size * self.shape.vocab_size * BFLOAT16

    @property
    def base_bytes(self) -> float:
        """All frozen weights."""
        return self.shape.num_layers * self.layer_bytes + self.outer_bytes


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
