"""Published code of another MoE-LoRA system, run unmodified: MoE-PEFT's MixLoRA.

MoE-PEFT is the training framework of MixLoRA's authors. It has model classes of its own, which take over the weights of
a transformers model. Nothing of it is replaced. Of what it leaves open, the fastest that runs anywhere is chosen:

* its efficient operators, its default, and no gradient checkpointing, which its trainer does with every layer;
* its eager attention, its default and what its trainer recommends; the only other one needs the package flash-attn;
* dropout 0.05, because it refuses 0; float32 adapters, because it has no others;
* the projections of its own MixLoRA template: q, k, v, o as plain LoRA, gate, up and down as experts.

Its metadata ask for transformers before 4.47. Two things make it run with transformers 5: it is installed without
dependencies, and the config says `rope_theta` where it looks for it, besides `rope_parameters`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from benchmarks.candidates.ffn import ALPHA, NUM_EXPERTS, TOP_K
from benchmarks.failures import NotHere

VERSION = "2.0.2"
# It imports `evaluate` with its tasks, of which nothing runs here.
INSTALL = f"pip install --no-deps moe-peft=={VERSION} evaluate"
_ADAPTER = "measured"


class MoePeftModel(nn.Module):
    """MoE-PEFT's model and adapter, called as a model of transformers is.

    MoE-PEFT keeps its modules in plain lists and dicts, where PyTorch finds no parameters: here they are registered.

    Args:
        package: the imported `moe_peft`.
        base: a Llama or Qwen2 of transformers; the model's linear layers, embedding and norms become MoE-PEFT's, the
            head is replaced by the copy of it that MoE-PEFT makes.
        r: rank of all adapters.
        dropout: rate in front of every A, above 0.
        targets: projections that get an adapter.
    """

    def __init__(
        self, package: Any, base: PreTrainedModel, r: int, dropout: float, targets: Sequence[str]
    ) -> None:
        super().__init__()
        config: Any = base.config
        if not hasattr(config, "rope_theta"):
            config.rope_theta = config.rope_parameters["rope_theta"]
        inner = importlib.import_module("moe_peft.models").from_pretrained(
            base, attn_impl="eager", device=base.device
        )
        base.lm_head = inner.lm_head_
        self.package, self.base, self.model = package, base, package.LLMModel(inner)
        adapter = package.adapter_factory(
            "MIXLORA", _ADAPTER, routing_strategy="mixlora", num_experts=NUM_EXPERTS, top_k=TOP_K,
            r=r, lora_alpha=int(ALPHA), lora_dropout=dropout, target_modules=list(targets),
        )  # fmt: skip
        self.model.init_adapter(adapter)
        # What MoE-PEFT's trainer hands to its optimizer.
        self.weights: dict[str, nn.Parameter] = self.model.get_adapter_weight_dict(_ADAPTER)
        self.experts = nn.ParameterList([p for name, p in self.weights.items() if ".experts." in name])
        self.shared = nn.ParameterList([p for name, p in self.weights.items() if ".experts." not in name])

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        """Its loss plus its router loss, as its trainer adds them, and the logits.

        Args:
            input_ids: `[batch, length]`, no padding.
            labels: the same, before the shift by one.
        """
        inputs = self.package.LLMModelInput(
            batch_configs_=[self.package.LLMBatchConfig(_ADAPTER, 0, len(input_ids))],
            batch_tokens_=input_ids,
            batch_labels_=labels,
            batch_masks_=torch.ones_like(input_ids),
            gradient_checkpoint_="none",
            efficient_operator_=True,
        )
        (output,) = self.model(inputs)
        return CausalLMOutput(loss=output.loss + output.aux_loss, logits=output.logits)


def moe_peft_mixlora(base: PreTrainedModel, r: int, dropout: float, targets: Sequence[str]) -> MoePeftModel:
    """MixLoRA by MoE-PEFT on the weights of a model; see `MoePeftModel`.

    Raises:
        NotHere: MoE-PEFT is not installed, or in another version than the one that is compared with.
    """
    for name in ("moe_peft", "evaluate", "datasets"):
        if find_spec(name) is None:
            raise NotHere(f"{name} is not installed: {INSTALL}")
    if (found := version("moe_peft")) != VERSION:
        raise NotHere(f"moe_peft is {found} here: {INSTALL}")
    return MoePeftModel(importlib.import_module("moe_peft"), base, r, dropout, targets)
