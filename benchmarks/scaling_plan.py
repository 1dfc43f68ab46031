"""What the cost model of `benchmarks.scaling` is asked about: the machines, the adapter, the run. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.shapes import Shape

FLOAT32, BFLOAT16 = 4, 2
# NF4 with double quantization: 4 bits, and 8 + 32 / 256 bits per block of 64 weights.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
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
