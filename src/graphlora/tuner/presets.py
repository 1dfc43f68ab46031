"""The three presets: every difference between them is one config field, so each difference is one ablation."""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "expert_granularity": "linear",
    "attention_target_modules": [],
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
}

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
        "router_normal_loss_coef": 1.0,
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
}
