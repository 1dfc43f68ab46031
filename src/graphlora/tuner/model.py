"""`GraphLoraModel`: the PEFT tuner that puts routers and LoRA experts on a model's FFN blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from graphlora.errors import GraphLoraError
from graphlora.load import expert_load, normalized_entropy
from graphlora.router import GraphRouter, Routing, begin_updates
from graphlora.tuner import ffn
from graphlora.tuner.auxiliary import auxiliary_loss
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.four_bits import keep_differentiable
from graphlora.tuner.layer import GraphLoraLinear
from graphlora.tuner.masks import named_arguments, num_samples, share_of_batch, token_masks
from graphlora.tuner.outputs import AUX_FIELDS, with_aux
from graphlora.tuner.placing import Placement
from graphlora.tuner.record import Recorder, RoutingRecord, let_checkpointed_layers_record
from graphlora.tuner.tuner_layer import RoutedLayer, TunerLayer, unmergeable

_MISSING = object()


class GraphLoraModel(BaseTuner):
    """Adapts a transformers model with GraphLoRA; made by `peft.get_peft_model(model, GraphLoraConfig(...))`.

    Outputs of the adapted model carry `aux_loss` (the weighted auxiliary losses, always a tensor) and `router_logits`
    (one `[tokens, num_experts]` per FFN block). In training, `loss` already contains `aux_loss`, with the share of a
    micro-batch where the trainer normalizes by `num_items_in_batch`; in evaluation, `loss` is the model's own.
    `aux_loss` is zero where the adapter is disabled, while generating, and where the trainer switched it off by setting
    `output_router_logits` of the text config to False.

    The routing is collected by hooks on the model's forward, because PEFT calls the model itself, not the tuner, where
    no task type is set.
    """

    prefix = "graphlora_"
    tuner_layer_cls = TunerLayer  # pyright: ignore[reportAssignmentType]
    target_module_mapping: dict[str, list[str]] = {}
    # The losses live on the model, so layers injected without it would train without them.
    uses_shared_state = True

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.recorder = Recorder()
        self._saved_config: dict[str, Any] = {}
        self._wanted = self._counts = True
        self._blocks: list[RoutedLayer] | None = None
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        self._announce_aux_loss()

    # --- injection -----------------------------------------------------------------------------------------------

    def _prepare_adapter_config(
        self, peft_config: GraphLoraConfig, model_config: dict[str, Any]
    ) -> GraphLoraConfig:
        del model_config
        _refuse_moe(self.model)
        ffn.gather_inline_ffns(self.model)
        base = _names_without_adapters(self.model)
        if peft_config.target_modules is None:
            found = _names_as_given(list(ffn.find_ffn_blocks(self.model, peft_config.ffn_modules)))
            if not found:
                raise ffn.no_ffn_found(self.model)
            peft_config.target_modules = _shortest_names(found, base)
        if peft_config.attention_target_modules is None:
            found = _names_as_given(list(ffn.find_attention_projections(self.model)))
            peft_config.attention_target_modules = _shortest_names(found, base, segments=2)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: GraphLoraConfig, key: str) -> Any:
        view = SimpleNamespace(
            target_parameters=None,
            exclude_modules=peft_config.exclude_modules,
            modules_to_save=peft_config.modules_to_save,
            layers_to_transform=peft_config.layers_to_transform,
            layers_pattern=peft_config.layers_pattern,
        )
        result: Any = False
        for names in (peft_config.target_modules, peft_config.attention_target_modules):
            if names and not result:
                # A full name is matched by its last part, so that layers_to_transform applies to it too.
                view.target_modules = (
                    {key.rpartition(".")[2]} if not isinstance(names, str) and key in names else names
                )
                result = check_target_module_exists(view, key)
        return result

    def _create_and_replace(
        self,
        peft_config: GraphLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del target, parameter_name
        is_active = adapter_name in self.active_adapters
        Placement(self.model, self.recorder, peft_config, adapter_name, is_active).place(
            parent, target_name, current_key
        )
        self._blocks = None

    def _post_injection_hook(self, model: nn.Module, config: GraphLoraConfig, adapter_name: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._layers():
            raise GraphLoraError(
                f"target_modules={config.target_modules} matches no FFN block of {type(model).__name__}. "
                f"FFN blocks found: {', '.join(ffn.find_ffn_blocks(model)) or 'none'}."
            )
        if not config.inference_mode:
            keep_differentiable(model)
        twins = {
            layer.block_name: t for layer in self._layers(adapter_name) if (t := layer.twins(adapter_name))
        }
        # For inference the graph comes from the adapter's file, which is read after this.
        if twins and not config.inference_mode:
            name, pairs = next(iter(twins.items()))
            warnings.warn(
                f"{len(twins)} of {len(self._layers(adapter_name))} expert graphs hold twins, experts with the same "
                f"neighbors, which the router cannot tell apart; {name}: {_pairs_text(pairs)}. "
                "router_self_term='residual' removes this.",
                stacklevel=2,
            )

    def _layers(self, adapter_name: str | None = None) -> list[RoutedLayer]:
        if self._blocks is None:
            self._blocks = [m for m in self.model.modules() if isinstance(m, RoutedLayer)]
        if adapter_name is None:
            return self._blocks
        return [layer for layer in self._blocks if adapter_name in layer.graphlora_router]

    # --- the auxiliary loss --------------------------------------------------------------------------------------

    def _announce_aux_loss(self) -> None:
        """Trainers look at the text config of the base model for an MoE's auxiliary loss and its coefficient.

        The coefficient is 1 because `aux_loss` comes weighted. `_restore_config` undoes this.
        """
        config = _text_config(self.model)
        if config is None:
            return
        ignored = list(getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"]))
        values = (
            ("text.output_router_logits", True),
            ("text.router_aux_loss_coef", 1.0),
            ("model.keys_to_ignore_at_inference", [*ignored, *AUX_FIELDS]),
        )
        for key, value in values:
            owner, name = self._config_field(key)
            self._saved_config.setdefault(key, owner.__dict__.get(name, _MISSING))
            setattr(owner, name, value)

    def _config_field(self, key: str) -> tuple[Any, str]:
        kind, name = key.split(".")
        return (_text_config(self.model) if kind == "text" else self.model.config), name

    def _restore_config(self) -> None:
        for key, value in self._saved_config.items():
            owner, name = self._config_field(key)
            if value is _MISSING:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, value)
        self._saved_config.clear()

    def begin_step(self) -> None:
        """What must happen once per optimizer step, before its first training forward: the routers' centering moves.

        Every training forward calls this by itself, and only the first call after an optimizer step does anything. A
        forward that is replayed as a CUDA graph runs no Python, so whoever replays it calls this before.
        """
        named = ((layer, layer.active_name(layer.graphlora_router)) for layer in self._layers())
        begin_updates(layer.router(name) for layer, name in named if name is not None)

    def running_state(self) -> list[torch.Tensor]:
        """Tensors that training forwards of the active adapter change by themselves: loads and running means."""
        found = []
        for layer in self._layers():
            name = layer.active_name(layer.graphlora_router)
            if name is not None:
                router = layer.router(name)
                found.append(layer.coordination(name).cumulative_weights)
                if router.centering:
                    found += [router.logit_offset, router.logit_sum, router.logit_count, router.num_updates]
        return found

    @torch.compiler.disable
    def _before_forward(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Opens a record, and keeps the request for router logits from a base model that has no router."""
        kwargs = {k: v for k, v in kwargs.items() if k != "output_router_logits"}
        config = _text_config(module)
        self._wanted = True
        if config is not None:
            self._wanted = config.__dict__.get("output_router_logits", True)
            config.output_router_logits = False
        layers = self._layers()
        enabled = bool(layers) and bool(self.active_adapters) and not layers[0].disable_adapters
        with_gradients = torch.is_grad_enabled()
        self._counts = enabled and (with_gradients or kwargs.get("past_key_values") is None)
        training = self._counts and self.training and with_gradients
        if self._counts or (enabled and self.recorder.watched is not None):
            self.recorder.open(layers, training)
        if training:
            let_checkpointed_layers_record()
            if not _is_capturing():
                self.begin_step()
        return args, kwargs

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Adds the auxiliary loss to the outputs, and to the loss in training."""
        record = self.recorder.close()
        config = _text_config(module)
        if config is not None:
            config.output_router_logits = self._wanted
        if outputs is None:
            return outputs
        if record is None or not self._counts:
            return (
                with_aux(outputs, _zero_beside(outputs), ()) if isinstance(outputs, ModelOutput) else outputs
            )
        name = self.active_adapters[0]
        is_encoder_decoder = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        inputs = named_arguments(module, args, kwargs)
        masks = token_masks(inputs, is_encoder_decoder)
        own = cast(GraphLoraConfig, self.peft_config[name])
        if record.training:
            record.share = share_of_batch(module, inputs, is_encoder_decoder)
        aux_loss = auxiliary_loss(record, masks, name, own, num_samples(inputs))
        if not self._wanted:
            aux_loss = torch.zeros_like(aux_loss)
        return _join(outputs, aux_loss, inputs.get("labels") is not None, record)

    def record_routing(self) -> AbstractContextManager[dict[str, Routing]]:
        """Context in which the routing of every forward is kept, detached: a dict of block name to `Routing`."""
        return self.recorder.watch()

    def routing_stats(self, adapter_name: str | None = None) -> dict[str, dict[str, Any]]:
        """Health of the routing of an adapter, from its saved state; reads the device once per block.

        Args:
            adapter_name: the adapter; by default the active one.

        Returns:
            By block name, low to high: `expert_load` (shares that sum to 1), `entropy` of the loads (0 to 1),
            `dead_experts` (loads under a tenth of the fair share), `poisson_rate`, `normal_scale`, `adjacency`
            (`[N][N]`; None for a linear router) and `twins`.
        """
        name = adapter_name or self.active_adapters[0]
        return {layer.block_name: _block_stats(layer, name) for layer in self._layers(name)}

    # --- PEFT's other verbs --------------------------------------------------------------------------------------

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        del args
        if kwargs.get("adapter_names") is not None:
            raise GraphLoraError(
                "adapter_names= mixes adapters within a batch, which GraphLoRA does not support; "
                "call set_adapter(NAME) and run one adapter at a time."
            )
        return nullcontext()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active.

        Raises:
            GraphLoraError: for several adapters at once.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise GraphLoraError(f"GraphLoRA runs one adapter at a time, got {names}; pass one name.")
        super().set_adapter(names, inference_mode=inference_mode)

    def _check_merge_allowed(self) -> None:
        raise unmergeable()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: adapters with routers of their own have no weighted sum."""
        raise GraphLoraError(
            "GraphLoRA adapters cannot be combined by weights: each has its own router, and routing is not linear. "
            "Train one adapter on a mixture of the tasks instead."
        )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Puts a base module back in unloading. PEFT's own also copies `weight`, which an FFN block does not have."""
        if isinstance(child, GraphLoraLinear):
            # Siblings refer to one another: memory that only a collection of cycles would free.
            child.shared_input.layers.clear()
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise unmergeable()
        model = super()._unload_and_optionally_merge(False, *args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        self._blocks = None
        self._restore_config()
        ffn.restore_inline_ffns(self.model)
        return model


def _block_stats(layer: RoutedLayer, name: str) -> dict[str, Any]:
    coordination, router = layer.coordination(name), layer.router(name)
    shares = expert_load(coordination.cumulative_weights.detach().cpu())
    adjacency = router.expert_adjacency().detach().cpu().tolist() if isinstance(router, GraphRouter) else None
    return {
        "expert_load": shares.tolist(),
        "entropy": float(normalized_entropy(shares)),
        "dead_experts": int((shares < 0.1 / len(shares)).sum()),
        "poisson_rate": coordination.poisson_rate.item(),
        "normal_scale": coordination.normal_scale.item(),
        "adjacency": adjacency,
        "twins": layer.twins(name),
    }


def _join(outputs: Any, aux_loss: Tensor, has_labels: bool, record: RoutingRecord) -> Any:
    """The one place where the auxiliary loss meets the loss; in training, the record's share of it is added."""
    if isinstance(outputs, tuple):
        if not record.training or not has_labels:
            return outputs
        return (outputs[0] + (record.share * aux_loss).to(outputs[0].device, outputs[0].dtype), *outputs[1:])
    if not isinstance(outputs, ModelOutput):
        return outputs
    loss = getattr(outputs, "loss", None)
    if record.training and isinstance(loss, Tensor):
        outputs.loss = loss + (record.share * aux_loss).to(loss.device, loss.dtype)
    return with_aux(outputs, aux_loss, tuple(routing.router_logits for _, routing in record.entries))


def _is_capturing() -> bool:
    """Whether what runs now is recorded into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _zero_beside(outputs: ModelOutput) -> Tensor:
    tensors = (value for value in outputs.values() if isinstance(value, Tensor))
    return torch.zeros((), device=next(tensors).device)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return None if config is None or not hasattr(config, "get_text_config") else config.get_text_config()


def _refuse_moe(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in {"experts", "block_sparse_moe"} and not isinstance(module, TunerLayer):
            raise GraphLoraError(
                f"{type(model).__name__} is already a mixture of experts ({name}): its own router decides which FFN "
                "a token sees, so there is no single FFN for GraphLoRA's experts to share. Use a dense base model."
            )


def _names_without_adapters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if "graphlora_" not in name]


def _names_as_given(names: Iterable[str]) -> list[str]:
    """Names as in the model without adapters."""
    return [name.replace(".base_layer", "") for name in names]


def _shortest_names(found: list[str], all_names: list[str], segments: int = 1) -> set[str]:
    """The last parts of the names where they mean the same modules, else the full names."""
    short = {".".join(name.split(".")[-segments:]) for name in found}
    means = {name for name in all_names if any(name == s or name.endswith("." + s) for s in short)}
    return short if means <= set(found) else set(found)


def _pairs_text(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{i} and {j}" for i, j in pairs[:4])
    return shown + (f" and {len(pairs) - 4} more" if len(pairs) > 4 else "")
