"""The presets: GraphLoRA's three, and the other methods; every difference is one config field, so each is one ablation.

docs/methods.md says where each method's values come from.
"""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "r": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "num_experts_by_layer": None,
    "attention_target_modules": [],
    "attention_experts": False,
    "expert_granularity": "linear",
    "shared_lora_A": False,
    "router_type": "graph",
    "router_scope": "block",
    "router_gate": "top_k",
    "router_bias": False,
    "router_init": "kaiming",
    "router_hidden_size": 256,
    "edge_density": 0.1,
    "edge_init": "random",
    "expert_features": "projected",
    "router_input_gain": 1.0,
    "router_self_term": "none",
    "router_input_norm": False,
    "router_logit_centering": False,
    "divergence": "kl",
    "poisson_rate_form": "clamp",
    "normal_scale_form": "free",
    "normal_target": "per_layer",
    "load_window": "cumulative",
    "norm_load_weights": True,
    "router_poisson_loss_coef": 0.005,
    "router_normal_loss_coef": 8.0,
    "router_aux_loss_coef": 0.0,
    "router_aux_loss_form": "switch",
    "router_entropy_loss_coef": 0.0,
    "router_sparsity_loss_coef": 0.0,
}

# A linear router on the token as it comes, and none of GraphLoRA's losses.
_MIXTURE: dict[str, Any] = {
    **_PAPER,
    "router_type": "linear",
    "router_hidden_size": 64,
    "poisson_rate_form": "fixed",
    "normal_scale_form": "fixed",
    "load_window": "ema",
    "router_poisson_loss_coef": 0.0,
    "router_normal_loss_coef": 0.0,
    "lora_dropout": 0.05,
}

# A router and experts at each projection of the FFN.
_PER_PROJECTION: dict[str, Any] = {**_MIXTURE, "router_scope": "projection"}

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's method with what is broken mended (docs/deviations.md has the evidence for each value).
    "graphlora": {
        **_PAPER,
        "expert_granularity": "ffn",
        "attention_target_modules": None,
        "router_hidden_size": 64,
        "expert_features": "embedding",
        "router_self_term": "weight",
        "router_input_norm": True,
        "router_logit_centering": True,
        "poisson_rate_form": "smooth",
        "normal_scale_form": "bounded",
        "load_window": "batch",
    },
    # The equations as printed.
    "paper": _PAPER,
    # The code that the authors released.
    "released": {
        **_PAPER,
        "expert_granularity": "ffn",
        "attention_target_modules": None,
        "router_hidden_size": 128,
        "edge_density": 0.25,
        "edge_init": "similarity",
        "router_input_gain": 100.0,
        "divergence": "abs_log_ratio",
        "normal_target": "all_layers",
        "norm_load_weights": False,
    },
    "mixlora": {
        **_MIXTURE,
        "expert_granularity": "ffn",
        "attention_target_modules": None,
        "router_init": "normal",
        "router_aux_loss_coef": 0.01,
    },
    "loramoe": {
        **_PER_PROJECTION,
        "num_experts": 6,
        "r": 4,
        "lora_alpha": 32.0,
        "router_gate": "dense",
        "router_aux_loss_coef": 0.1,
        "router_aux_loss_form": "loramoe",
    },
    "ming_moe": {**_PER_PROJECTION, "r": 16, "lora_alpha": 32.0, "router_bias": True},
    "mola": {
        **_PER_PROJECTION,
        "num_experts_by_layer": [2, 4, 6, 8],
        "attention_target_modules": None,
        "attention_experts": True,
        "router_aux_loss_form": "mola",
    },
    "hydralora": {
        **_PER_PROJECTION,
        "num_experts": 4,
        "r": 4,
        "lora_alpha": 32.0,
        "shared_lora_A": True,
        "router_gate": "dense",
    },
    "dynmole": {
        **_PER_PROJECTION,
        "num_experts": 6,
        "r": 24,
        "lora_alpha": 48.0,
        "router_gate": "top_p",
        "router_aux_loss_coef": 0.001,
        "router_aux_loss_form": "dynmole",
        "router_entropy_loss_coef": 0.01,
    },
    "ld_mole": {
        **_PER_PROJECTION,
        "lora_dropout": 0.1,
        "attention_target_modules": None,
        "attention_experts": True,
        "router_gate": "sparsegen",
        "router_aux_loss_coef": 1.0,
        "router_aux_loss_form": "ld_mole",
    },
}
