"""`GraphLoraConfig`: everything that defines an adapter, checked before anything is built from it."""

from __future__ import annotations

import copy
import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

from graphlora.adapter_table import check_folder, check_top_k, read_config
from graphlora.errors import GraphLoraError
from graphlora.ops.backend import BACKENDS
from graphlora.tuner.config_checks import check_names, check_size, check_types
from graphlora.tuner.presets import PRESETS
from graphlora.tuner.register import PEFT_NAME, graphlora_peft_type
from graphlora.untrusted import local_path

BALANCE_FORMS = ("switch", "switch_all_layers", "mola", "ld_mole", "loramoe", "loramoe_paper", "dynmole")
# An untrusted adapter_config.json must not be able to ask for terabytes.
MAX_EXPERTS, MAX_RANK, MAX_ROUTER_WIDTH, MAX_ROUTER_LAYERS = 1024, 4096, 16384, 16

# Default of the fields that take their value from the preset.
FROM_PRESET: Any = None

_CHOICES: dict[str, tuple[str, ...]] = {
    "expert_granularity": ("ffn", "linear"),
    "router_type": ("graph", "linear"),
    "router_scope": ("block", "projection"),
    "router_gate": ("top_k", "dense", "top_p", "sparsegen"),
    "router_init": ("kaiming", "normal"),
    "router_conv": ("gcn", "sage", "gat"),
    "expert_features": ("embedding", "projected"),
    "router_self_term": ("none", "residual", "weight"),
    "divergence": ("kl", "abs_log_ratio"),
    "poisson_rate_form": ("smooth", "clamp", "fixed"),
    "normal_scale_form": ("bounded", "free", "fixed"),
    "normal_target": ("per_layer", "all_layers"),
    "load_window": ("cumulative", "ema", "batch"),
    "router_aux_loss_form": BALANCE_FORMS,
    "backend": BACKENDS,
}
_TARGETED = {
    "target_modules": ("FFN blocks", "mlp"),
    "attention_target_modules": ("attention projections", "q_proj"),
}
_EDGE_INITS = ("random", "similarity", "ring", "complete", "none", "learned")


@dataclass
class GraphLoraConfig(PeftConfig):
    """Configuration of a GraphLoRA adapter.

    Fields whose default is None take their value from `preset`; a value given explicitly wins over the preset. After
    construction every such field holds its resolved value, which is what is saved.

    Args:
        preset: `"graphlora"` (the method with its known flaws mended), `"paper"` (the equations as printed),
            `"released"` (the authors' code), or another method: `"mixlora"`, `"loramoe"`, `"ming_moe"`, `"mola"`,
            `"hydralora"`, `"dynmole"`, `"ld_mole"`.
        num_experts: N, LoRA experts per FFN block.
        top_k: K, experts that adapt each token.
        r: rank of each expert and of the attention LoRA.
        lora_alpha: the low-rank branch is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the low-rank branches' inputs, one mask per projection, shared by the experts.
        target_modules: names (suffixes) or one regular expression of the FFN blocks; None finds them.
        attention_target_modules: names or one regular expression of linear layers with plain LoRA of the same rank;
            None finds the attention projections (FFN blocks alone in the preset `"paper"`), `[]` adapts none.
        ffn_modules: names inside the FFN block where its layout is not known, e.g.
            `{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "act_fn": "act"}`.
        exclude_modules: names or one regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt; None adapts all.
        layers_pattern: name of the list of layers, where it cannot be told from the module names.
        modules_to_save: other modules to train and save whole, e.g. a classification head.
        num_experts_by_layer: N by depth: the counts are spread evenly over the layers, low to high, e.g. `[2, 4, 6, 8]`
            gives the lowest quarter of the layers two experts. From a preset it holds unless `num_experts` is given.
        num_experts_pattern: other N for blocks whose name matches a key (a suffix or a regular expression).
        rank_pattern: other r, likewise.
        alpha_pattern: other lora_alpha, likewise.
        expert_granularity: `"ffn"`: an expert is the whole block with its own deltas (eqs. 1, 2, 5); `"linear"`:
            experts are mixed at each projection (eq. 3 as printed).
        attention_experts: adapt the attention projections with routers and experts too, instead of plain LoRA; only
            with `router_scope="projection"`.
        shared_lora_A: all experts of a projection share one A (HydraLoRA); only with `router_scope="projection"`.
        norm_topk_prob: renormalize the selected probabilities to sum to 1; `"ffn"` granularity requires it.
        router_type: `"graph"` (section 4.1) or `"linear"` (the ablation without a graph).
        router_scope: one router for each FFN `"block"`, or for each `"projection"` of it, which then sees that
            projection's input; the latter only with a linear router and `"linear"` granularity.
        router_gate: how logits select experts: `"top_k"`; `"dense"` (all, LoRAMoE and HydraLoRA); `"top_p"` (as many as
            have mass p, DynMoLE); `"sparsegen"` (LD-MoLE). All but the first only with a linear router and `"linear"`
            granularity.
        router_top_p: p of the `"top_p"` gate, which selects at least `top_k` experts.
        router_entropy_index: q of the Tsallis entropy, in the `"top_p"` gate and in its loss.
        router_entropy_threshold: the entropy over which the `"top_p"` gate selects all experts.
        router_bias: give the linear router a bias per expert.
        router_init: weights of the linear router: `"kaiming"` uniform or `"normal"` with standard deviation 0.02.
        router_num_layers: L, graph convolution layers.
        router_hidden_size: g, width of the graph router, and of the `"sparsegen"` gate's predictor.
        router_conv: `"gcn"`, `"sage"` or `"gat"`.
        router_input_gain: Glorot gain of the token projection P_x.
        router_self_term: a node's own features beside the aggregate: `"none"`, `"residual"` (to the initial features)
            or `"weight"` (a weight matrix of its own).
        router_self_term_weight: a, share of the initial features in the residual form.
        router_input_norm: RMS-normalize the token before P_x.
        router_logit_centering: subtract a running mean per expert from the logits.
        router_init_spread: standard deviation of the centered logits at initialization.
        expert_features: `"embedding"` (trained) or `"projected"` (frozen features with a trained projection).
        edge_density: beta, share of the expert pairs that are joined.
        edge_init: `"random"`, `"similarity"`, `"ring"`, `"complete"`, `"none"` or `"learned"`.
        edges: explicit expert pairs; replaces `edge_init`.
        graph_seed: seed of the random graphs.
        shared_graph: one random graph for all blocks instead of one per block.
        divergence: `"kl"` (the paper) or `"abs_log_ratio"` (the released code), for both losses.
        poisson_rate_form: lambda as `1 + sigmoid(x)` (`"smooth"`), clamped to [1, 2] (`"clamp"`) or `"fixed"` at 1.5.
        normal_scale_form: sigma trained above N/4 (`"bounded"`), trained freely (`"free"`) or `"fixed"` at N/2.
        normal_target: normal target normalized `"per_layer"` or over `"all_layers"` at once (the released code).
        load_window: which loads the normal loss sees: `"cumulative"`, `"ema"` or `"batch"`.
        load_decay: decay per training forward of the `"ema"` window, and of the loads that are reported.
        norm_load_weights: count renormalized routing weights in the loads; otherwise the probabilities themselves.
        router_poisson_loss_coef: weight of the Poisson distinction loss.
        router_normal_loss_coef: weight of the normal balance loss.
        router_aux_loss_coef: weight of the load balance loss of `router_aux_loss_form` (MixLoRA: 0.01).
        router_aux_loss_form: `"switch"` (`N sum F P` by router), `"switch_all_layers"` (over all layers at once), or
            that of `"mola"`, `"ld_mole"`, `"loramoe"`, `"loramoe_paper"` or `"dynmole"` (formulas: docs/methods.md).
        router_entropy_loss_coef: weight of the mean Tsallis entropy of the routing (DynMoLE).
        router_sparsity_loss_coef: weight of LD-MoLE's sparsity loss, which favors at most `top_k` experts; only with
            `router_gate="sparsegen"`.
        edge_density_loss_coef: weight of the penalty that holds learned edges near `edge_density`.
        backend: compute path: `"auto"`, `"eager"` (the expert loop), `"torch"` or `"triton"`.
        recompute_gate_up: run the frozen gate and up projections again in backward instead of saving what they give:
            less memory, more time, the same results.

    Raises:
        GraphLoraError: for a value that cannot work, naming it and the remedy.
    """

    preset: str = "graphlora"
    num_experts: int = FROM_PRESET
    top_k: int = FROM_PRESET
    r: int = FROM_PRESET
    lora_alpha: float = FROM_PRESET
    lora_dropout: float = FROM_PRESET
    target_modules: list[str] | set[str] | str | None = None
    attention_target_modules: list[str] | set[str] | str | None = None
    ffn_modules: dict[str, str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    num_experts_by_layer: list[int] | None = FROM_PRESET
    num_experts_pattern: dict[str, int] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    expert_granularity: Literal["ffn", "linear"] = FROM_PRESET
    attention_experts: bool = FROM_PRESET
    shared_lora_A: bool = FROM_PRESET
    norm_topk_prob: bool = True
    router_type: Literal["graph", "linear"] = FROM_PRESET
    router_scope: Literal["block", "projection"] = FROM_PRESET
    router_gate: Literal["top_k", "dense", "top_p", "sparsegen"] = FROM_PRESET
    router_top_p: float = 0.75
    router_entropy_index: float = 1.1
    router_entropy_threshold: float = 0.9
    router_bias: bool = FROM_PRESET
    router_init: Literal["kaiming", "normal"] = FROM_PRESET
    router_num_layers: int = 2
    router_hidden_size: int = FROM_PRESET
    router_conv: Literal["gcn", "sage", "gat"] = "gcn"
    router_input_gain: float = FROM_PRESET
    router_self_term: Literal["none", "residual", "weight"] = FROM_PRESET
    router_self_term_weight: float = 0.5
    router_input_norm: bool = FROM_PRESET
    router_logit_centering: bool = FROM_PRESET
    router_init_spread: float = 2.0
    expert_features: Literal["embedding", "projected"] = FROM_PRESET
    edge_density: float = FROM_PRESET
    edge_init: Literal["random", "similarity", "ring", "complete", "none", "learned"] = FROM_PRESET
    edges: list[list[int]] | None = None
    graph_seed: int = 0
    shared_graph: bool = False
    divergence: Literal["kl", "abs_log_ratio"] = FROM_PRESET
    poisson_rate_form: Literal["smooth", "clamp", "fixed"] = FROM_PRESET
    normal_scale_form: Literal["bounded", "free", "fixed"] = FROM_PRESET
    normal_target: Literal["per_layer", "all_layers"] = FROM_PRESET
    load_window: Literal["cumulative", "ema", "batch"] = FROM_PRESET
    load_decay: float = 0.9
    norm_load_weights: bool = FROM_PRESET
    router_poisson_loss_coef: float = FROM_PRESET
    router_normal_loss_coef: float = FROM_PRESET
    router_aux_loss_coef: float = FROM_PRESET
    router_aux_loss_form: str = FROM_PRESET
    router_entropy_loss_coef: float = FROM_PRESET
    router_sparsity_loss_coef: float = FROM_PRESET
    edge_density_loss_coef: float = 1.0
    backend: Literal["auto", "eager", "torch", "triton"] = "auto"
    recompute_gate_up: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            raise GraphLoraError(_not_a_choice("preset", self.preset, tuple(PRESETS)))
        has_own_count = self.num_experts is not None
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None and not (has_own_count and name == "num_experts_by_layer"):
                setattr(self, name, copy.copy(value))
        check_types(self)
        super().__post_init__()
        self.peft_type = graphlora_peft_type()
        for name in ("target_modules", "attention_target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self._check_numbers()
        check_size(self)
        check_names(self)
        self._check_choices()
        self._check_patterns()
        self._check_routing()

    def _check_numbers(self) -> None:
        _check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_int("top_k", self.top_k, 1, MAX_EXPERTS)
        _check_int("r", self.r, 1, MAX_RANK)
        _check_int("router_num_layers", self.router_num_layers, 1, MAX_ROUTER_LAYERS)
        _check_int("router_hidden_size", self.router_hidden_size, 1, MAX_ROUTER_WIDTH)
        _check_int("graph_seed", self.graph_seed, 0, 2**62)
        check_top_k(self.top_k, self.num_experts)
        _check_float("edge_density", self.edge_density, 0.0, 1.0)
        _check_float("lora_dropout", self.lora_dropout, 0.0, 0.999)
        _check_float("load_decay", self.load_decay, 0.0, 0.99999)
        _check_float("router_self_term_weight", self.router_self_term_weight, 0.0, 1.0)
        _check_float("router_top_p", self.router_top_p, 0.0, 1.0)
        _check_float("router_entropy_index", self.router_entropy_index, 1.001, 10.0)
        for name in ("lora_alpha", "router_entropy_threshold", "router_input_gain", "router_init_spread"):
            _check_float(name, getattr(self, name), 1e-9, 1e9)
        for name in (
            "router_poisson_loss_coef",
            "router_normal_loss_coef",
            "router_aux_loss_coef",
            "router_entropy_loss_coef",
            "router_sparsity_loss_coef",
            "edge_density_loss_coef",
        ):
            _check_float(name, getattr(self, name), 0.0, 1e9)

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise GraphLoraError(_not_a_choice(name, getattr(self, name), choices))
        if self.edge_init not in _EDGE_INITS:
            raise GraphLoraError(_not_a_choice("edge_init", self.edge_init, _EDGE_INITS))
        if self.edges is not None:
            from graphlora.graph import adjacency_from_edges

            self.edges = [list(edge) for edge in self.edges]
            adjacency_from_edges(self.num_experts, self.edges)
        if self.expert_granularity == "ffn" and not self.norm_topk_prob:
            raise GraphLoraError(
                "norm_topk_prob=False cannot be used with expert_granularity='ffn', whose weights must sum to 1; "
                "use expert_granularity='linear' or norm_topk_prob=True."
            )

        if self.recompute_gate_up and (self.backend == "eager" or self.expert_granularity == "linear"):
            raise GraphLoraError(
                f"recompute_gate_up=True does nothing with backend={self.backend!r} and "
                f"expert_granularity={self.expert_granularity!r}; use backend='auto' and expert_granularity='ffn', "
                "or gradient checkpointing."
            )

    def _check_patterns(self) -> None:
        for name in _TARGETED:
            if getattr(self, name) == "all-linear":
                what, example = _TARGETED[name]
                raise GraphLoraError(
                    f"{name}='all-linear' does not name {what}; leave it out to find them, "
                    f"or give names such as ['{example}']."
                )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise GraphLoraError(
                "layers_to_transform cannot be combined with target_modules as a regular expression; "
                "put the layer numbers into the expression, or give target_modules as a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise GraphLoraError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the indices of the layers to adapt."
            )
        if self.num_experts_by_layer == []:
            raise GraphLoraError(
                "num_experts_by_layer=[] names no count; give one per group of layers, e.g. [2, 4, 6, 8]."
            )
        for value in self.num_experts_by_layer or ():
            _check_int("num_experts_by_layer", value, self.top_k, MAX_EXPERTS)
        for value in self.num_experts_pattern.values():
            _check_int("num_experts_pattern", value, self.top_k, MAX_EXPERTS)
        for value in self.rank_pattern.values():
            _check_int("rank_pattern", value, 1, MAX_RANK)
        for value in self.alpha_pattern.values():
            _check_float("alpha_pattern", value, 1e-9, 1e9)

    def _check_routing(self) -> None:
        """Combinations of router, gate and granularity."""
        is_linear = self.router_type == "linear" and self.expert_granularity == "linear"
        linear = "router_type='linear' and expert_granularity='linear'"
        per_projection = self.router_scope == "projection"
        needs = (
            ("router_scope", per_projection, is_linear, linear),
            ("router_gate", self.router_gate != "top_k", is_linear, linear),
            ("attention_experts", self.attention_experts, per_projection, "router_scope='projection'"),
            ("shared_lora_A", self.shared_lora_A, per_projection, "router_scope='projection'"),
        )
        for name, is_used, is_possible, remedy in needs:
            if is_used and not is_possible:
                raise GraphLoraError(f"{name}={getattr(self, name)!r} needs {remedy}.")
        if self.router_sparsity_loss_coef and self.router_gate != "sparsegen":
            raise GraphLoraError(
                f"router_sparsity_loss_coef={self.router_sparsity_loss_coef} needs router_gate='sparsegen', "
                "whose sparsity it trains."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """The configuration of a saved adapter; see PEFT's.

        Raises:
            GraphLoraError: a file that is damaged, or weights in the same folder that do not fit the configuration.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = local_path(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        if folder is not None and isinstance(config, cls):
            check_folder(folder, config.to_dict())
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The values in an `adapter_config.json`, read with bounds.

        Raises:
            GraphLoraError: a file that is damaged, too large, or not the configuration of a GraphLoRA adapter.
        """
        del kwargs
        values = read_config(Path(path_json_file))
        if values["peft_type"] != PEFT_NAME:
            raise GraphLoraError(
                f"{path_json_file}: peft_type={values['peft_type']!r} is another method; read it with peft.PeftConfig."
            )
        return values

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types (sets become sorted lists)."""
        values = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json, and says in the model card beside it what the adapter is."""
        super().save_pretrained(save_directory, **kwargs)
        from graphlora.tuner.card import describe_in_model_card

        describe_in_model_card(self, save_directory)


def config_field_names() -> set[str]:
    """Names of all fields, PEFT's included."""
    return {f.name for f in fields(GraphLoraConfig)}


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise GraphLoraError(f"{name}={value!r} must be a whole number from {low} to {high}.")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise GraphLoraError(f"{name}={value!r} must be a number from {low:g} to {high:g}.")


def _not_a_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value)[:80], choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.{hint}"
