"""The model card of an adapter: what it is, said in the README.md that PEFT writes beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

if TYPE_CHECKING:
    from graphlora.tuner.config import GraphLoraConfig

_BEGIN, _END = "<!-- graphlora -->", "<!-- /graphlora -->"
_UNITS = {"block": "FFN block", "projection": "projection"}
_SELECTIONS = {
    "top_k": "picks {0.top_k} of them",
    "dense": "weighs all of them",
    "top_p": "picks as many as have mass {0.router_top_p:g}",
    "sparsegen": "picks as many as it predicts",
}
_COUNTS = {"top_k": "{0.top_k}", "dense": "all", "top_p": "at least {0.top_k}", "sparsegen": "varying"}
_TEMPLATE_TITLE, _VERSIONS = "# Model Card for Model ID", "### Framework versions"


def describe_in_model_card(config: GraphLoraConfig, directory: str) -> None:
    """Writes the section about GraphLoRA into `README.md`; does nothing where PEFT wrote none.

    PEFT's empty template is replaced, up to the versions at its end. A card that somebody wrote keeps its text and gets
    the section at its end; a section that is there is renewed in its place.
    """
    path = Path(directory) / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    data: Any = card.data
    data.tags = sorted({*(data.tags or []), "graphlora", "lora", "mixture-of-experts"})
    section = model_card_section(config).rstrip("\n")
    before, begin, rest = card.text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        card.text = before + section + after
    elif card.text.lstrip().startswith(_TEMPLATE_TITLE):
        _, heading, versions = card.text.partition(_VERSIONS)
        card.text = f"{section}\n\n{heading}{versions}"
    else:
        card.text = f"{card.text.strip()}\n\n{section}\n"
    card.save(path)


def _introduction(config: GraphLoraConfig) -> str:
    """Title and first sentence."""
    made = "made with\n[graphlora](https://pypi.org/project/graphlora/)."
    if config.router_type == "linear":
        return (
            f"# Mixture of LoRA experts, preset {config.preset}\n\nLoRA experts with a linear router, {made}"
        )
    paper = "[arXiv 2412.16216](https://arxiv.org/abs/2412.16216)"
    return f"# GraphLoRA adapter\n\nLoRA experts that collaborate over a graph ({paper}), {made}"


def model_card_section(config: GraphLoraConfig) -> str:
    """The section itself, Markdown."""
    edges = f"{len(config.edges)} given edges" if config.edges is not None else f"{config.edge_init} edges"
    router = (
        f"a graph network ({config.router_num_layers} {config.router_conv} layers of width "
        f"{config.router_hidden_size}, {edges}, density {config.edge_density})"
        if config.router_type == "graph"
        else "a linear layer"
    )
    by_layer = config.num_experts_by_layer
    num_experts = ", ".join(map(str, by_layer)) + " (low to high)" if by_layer else str(config.num_experts)
    attention = ", ".join(sorted(config.attention_target_modules or [])) or "none"
    kind = "routers and experts" if config.attention_experts else "plain LoRA"
    unit, count = _UNITS[config.router_scope], _COUNTS[config.router_gate].format(config)
    targets = config.target_modules
    blocks = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    return f"""{_BEGIN}
{_introduction(config)}
Each adapted {unit} has {num_experts} LoRA experts of rank
{config.r}; a router, {router}, {_SELECTIONS[config.router_gate].format(config)} for every token.

| | |
|---|---|
| base model | {config.base_model_name_or_path} |
| preset | {config.preset} |
| FFN blocks | {blocks} |
| attention projections with {kind} | {attention} |
| experts, selected per token, rank, alpha | {num_experts}, {count}, {config.r}, {config.lora_alpha:g} |
| granularity | {config.expert_granularity} |
| Poisson and normal loss coefficients | {config.router_poisson_loss_coef:g}, {config.router_normal_loss_coef:g} |
| balance loss | {config.router_aux_loss_form} times {config.router_aux_loss_coef:g} |

```python
import graphlora  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_NAME_OF_THIS_ADAPTER")
```

The adapter cannot be merged into the base weights: which experts apply depends on the token.
{_END}
"""
