"""The model card of an adapter: what it is, said in the README.md that PEFT writes beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

if TYPE_CHECKING:
    from graphlora.tuner.config import GraphLoraConfig

_BEGIN, _END = "<!-- graphlora -->", "<!-- /graphlora -->"
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


def model_card_section(config: GraphLoraConfig) -> str:
    """The section itself, Markdown."""
    edges = f"{len(config.edges)} given edges" if config.edges is not None else f"{config.edge_init} edges"
    router = (
        f"a graph network ({config.router_num_layers} {config.router_conv} layers of width "
        f"{config.router_hidden_size}, {edges}, density {config.edge_density})"
        if config.router_type == "graph"
        else "a linear layer"
    )
    attention = ", ".join(sorted(config.attention_target_modules or [])) or "none"
    targets = config.target_modules
    blocks = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    return f"""{_BEGIN}
# GraphLoRA adapter

LoRA experts that collaborate over a graph ([arXiv 2412.16216](https://arxiv.org/abs/2412.16216)), made with
[graphlora](https://pypi.org/project/graphlora/). Each adapted FFN block has {config.num_experts} LoRA experts of rank
{config.r}; a router, {router}, picks {config.top_k} of them for every token.

| | |
|---|---|
| base model | {config.base_model_name_or_path} |
| preset | {config.preset} |
| FFN blocks | {blocks} |
| attention projections with plain LoRA | {attention} |
| experts, selected per token, rank, alpha | {config.num_experts}, {config.top_k}, {config.r}, {config.lora_alpha:g} |
| granularity | {config.expert_granularity} |
| Poisson and normal loss coefficients | {config.router_poisson_loss_coef:g}, {config.router_normal_loss_coef:g} |

```python
import graphlora  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_NAME_OF_THIS_ADAPTER")
```

The adapter cannot be merged into the base weights: which experts apply depends on the token.
{_END}
"""
