"""FSDP2 for adapters: the frozen base is sharded over the processes, the adapter is whole in each of them.

An adapter is small beside its base and trained in float32; its lambda and sigma are scalars, which FSDP2 cannot
shard, and its losses need router state outside of the layer that FSDP2 gathers. So the base alone goes to
`fully_shard`, by accelerate and by its configuration; the adapter is replicated, and its gradients are averaged over
the processes once per optimizer step. Checkpoints are then those of a single process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# Gradients are averaged in pieces of this many values, each copied into one buffer (64 MiB of float32).
_BUCKET_VALUES = 2**24


def shard_base(accelerator: Any, model: nn.Module) -> None:
    """Shard the frozen base of an adapted model in place; afterwards its adapter is the same in all processes.

    Args:
        accelerator: `accelerate.Accelerator` with an FSDP plugin of version 2.
        model: Model wrapped by PEFT; under `cpu_ram_efficient_loading` its weights are on the meta device in all
            processes but the first of each machine.
    """
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # The base stays in its dtype and autocast computes; a policy would also round the loss to half precision.
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    with _without_adapters(model) as adapters:
        fsdp2_prepare_model(accelerator, model)
    for adapter in adapters:
        if any(tensor.is_meta for tensor in _tensors(adapter)):
            adapter.to_empty(device=accelerator.device)
        else:
            adapter.to(accelerator.device)
    for adapter in adapters:
        for tensor in _tensors(adapter):
            dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace the gradients of replicated parameters by their means over all processes.

    Args:
        parameters: The same in every process; those without a gradient are left alone.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))


@contextmanager
def in_lockstep(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[None]:
    """Context in which each process runs as many forwards as it likes of a sharded model.

    A forward gathers weights from all processes, so all of them must run equally many. Those that are done first run
    along on small inputs until the last one is.

    Args:
        model: The sharded model.
        inputs: What they run on then.
    """

    def any_runs(mine: bool) -> bool:
        flag = torch.tensor([int(mine)], device=inputs["input_ids"].device)
        dist.all_reduce(flag)
        return bool(flag)

    def announce(*_: Any) -> None:
        any_runs(True)

    # Before FSDP's own hook, which gathers the first weights.
    handle = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while any_runs(False):
        with torch.no_grad():
            model(**inputs)
    free_gathered(model)


def free_gathered(model: nn.Module) -> None:
    """Let go of weights that a forward without a backward has left gathered.

    All processes must do it together: what one of them frees on its own, by a state dict, it would later gather alone.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Takes the modules that PEFT added out of the model for a while, so that only the base is there."""
    found = [
        (layer, name, layer._modules[name])
        for layer in model.modules()
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for name in dict.fromkeys(layer.adapter_layer_names)
        if layer._modules.get(name) is not None
    ]
    for layer, name, _ in found:
        layer._modules[name] = nn.ModuleDict()
    try:
        yield [module for _, _, module in found if module is not None]
    finally:
        for layer, name, module in found:
            layer._modules[name] = module


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in groups of one dtype and at most `_BUCKET_VALUES` values (or a single tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > _BUCKET_VALUES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
