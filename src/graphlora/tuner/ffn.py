"""Finds the projections of a model's FFN blocks, from one table of naming patterns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graphlora.errors import GraphLoraError
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.lora_linear import plain_matrix


@dataclass(frozen=True)
class FfnPattern:
    """Names of an FFN block's parts.

    Attributes:
        up_proj, down_proj, gate_proj: names of the projections; gate_proj is None for a plain block.
        gate_up_proj: name of one projection that gives gate and up side by side, in place of the two.
        hidden_dropout: name of the dropout between activation and down projection, if there is one.
        output_dropout: name of the dropout (module or probability) after the down projection, if there is one.
        families: models that have it, for the error message.
    """

    down_proj: str
    up_proj: str | None = None
    gate_proj: str | None = None
    gate_up_proj: str | None = None
    hidden_dropout: str | None = None
    output_dropout: str | None = None
    families: str = ""

    def projections(self) -> tuple[str, ...]:
        """Names of the projections that must be there."""
        names = (self.gate_up_proj, self.gate_proj, self.up_proj, self.down_proj)
        return tuple(name for name in names if name is not None)


PATTERNS: tuple[FfnPattern, ...] = (
    FfnPattern(
        gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj",
        families="Llama, Qwen2/2.5/3, Mistral, Gemma 2/3, OLMo2, Granite, SmolLM3, StableLM",
    ),
    FfnPattern(gate_up_proj="gate_up_proj", down_proj="down_proj", families="Phi-3/4, GLM-4"),
    FfnPattern(gate_proj="w1", up_proj="w3", down_proj="w2", families="InternLM2"),
    FfnPattern(gate_proj="wi_0", up_proj="wi_1", down_proj="wo", hidden_dropout="dropout", families="T5 1.1, Flan-T5"),
    FfnPattern(up_proj="wi", down_proj="wo", hidden_dropout="dropout", families="T5"),
    FfnPattern(up_proj="fc1", down_proj="fc2", families="Phi-2, OPT"),
    FfnPattern(up_proj="dense_h_to_4h", down_proj="dense_4h_to_h", families="GPT-NeoX/Pythia, Falcon"),
    FfnPattern(up_proj="c_fc", down_proj="c_proj", output_dropout="dropout", families="GPT-2"),
    FfnPattern(up_proj="c_fc", down_proj="c_proj", output_dropout="residual_dropout", families="StarCoder2"),
    FfnPattern(up_proj="fc_in", down_proj="fc_out", output_dropout="dropout", families="GPT-J"),
)  # fmt: skip
_ACT_NAMES = ("act_fn", "activation_fn", "act", "activation", "hidden_act")
_ATTENTION_MARKS = ("attn", "attention")
# An adapter on a child leaves the child's name as it is and wraps it, so a pattern still fits a wrapped block.


class InlineFfn(nn.Module):
    """FFN parts that a decoder layer calls one by one (OPT), gathered into a block that stands in the first's place."""

    def __init__(self, fc1: nn.Module, activation_fn: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = fc1, activation_fn, fc2

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The whole block; the layer's own later calls pass its result through."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class PassThrough(nn.Identity):
    """Stands where a part of an `InlineFfn` was."""


def gather_inline_ffns(model: nn.Module) -> None:
    """Gathers the FFN parts of layers that hold them directly; `restore_inline_ffns` undoes it."""
    for layer in list(model.modules()):
        children = dict(layer.named_children())
        names = set(children)
        if not {"fc1", "fc2", "activation_fn"} <= names or isinstance(layer, InlineFfn):
            continue
        if any(_is_attention(name) for name in names) and not isinstance(layer.fc2, PassThrough):
            layer.fc1 = InlineFfn(children["fc1"], children["activation_fn"], children["fc2"])
            layer.activation_fn, layer.fc2 = PassThrough(), PassThrough()


def restore_inline_ffns(model: nn.Module) -> None:
    """Puts the parts of every `InlineFfn` back where they were."""
    for layer in list(model.modules()):
        inline = getattr(layer, "fc1", None)
        if isinstance(inline, InlineFfn) and isinstance(layer.fc2, PassThrough):
            layer.fc1, layer.activation_fn, layer.fc2 = inline.fc1, inline.activation_fn, inline.fc2


@dataclass(frozen=True)
class FfnParts:
    """One FFN block taken apart; the block keeps its modules, this only points at them.

    Attributes:
        block: the module that holds the parts.
        pattern: the names.
        act: the activation with its backward.
        hidden_size: d.
        intermediate_size: f.
    """

    block: nn.Module
    pattern: FfnPattern
    act: DifferentiableAct
    hidden_size: int
    intermediate_size: int

    @property
    def gated(self) -> bool:
        """Whether the block has a gate projection."""
        return self.pattern.up_proj is None or self.pattern.gate_proj is not None

    def project_in(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """`(gate, up)` of tokens `[tokens, d]`; gate is None for a plain block."""
        pattern = self.pattern
        if pattern.gate_up_proj is not None:
            gate, up = self._call(pattern.gate_up_proj, x).chunk(2, dim=-1)
            return gate.contiguous(), up.contiguous()
        assert pattern.up_proj is not None
        gate = None if pattern.gate_proj is None else self._call(pattern.gate_proj, x)
        return gate, self._call(pattern.up_proj, x)

    def plain_weights(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Weights of gate and up, each `[f, d]`, where they are plain matrices without bias in the dtype of x."""
        pattern = self.pattern
        if pattern.gate_up_proj is not None:
            both = _plain_weight(getattr(self.block, pattern.gate_up_proj), x)
            return None if both is None else both.chunk(2)  # pyright: ignore[reportReturnType] - two of them
        if pattern.gate_proj is None or pattern.up_proj is None:
            return None
        gate = _plain_weight(getattr(self.block, pattern.gate_proj), x)
        up = _plain_weight(getattr(self.block, pattern.up_proj), x)
        return None if gate is None or up is None else (gate, up)

    def plain_down(self, hidden: Tensor) -> Tensor | None:
        """Weight of the down projection, `[d, f]`, where it is a plain matrix without bias in the dtype of `hidden`."""
        return _plain_weight(getattr(self.block, self.pattern.down_proj), hidden)

    def project_out(self, hidden: Tensor) -> Tensor:
        """Down projection, bias included."""
        return self._call(self.pattern.down_proj, hidden)

    def _call(self, name: str, x: Tensor) -> Tensor:
        module = getattr(self.block, name)
        weight = getattr(module, "weight", None)
        # T5 keeps its down projection in float32 beside half-precision layers. Autocast picks the dtype itself.
        if isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
        return module(x)

    def hidden_dropout(self) -> float:
        """Probability of the base model's dropout before the down projection."""
        return _dropout_probability(self.block, self.pattern.hidden_dropout)

    def output_dropout(self) -> float:
        """Probability of the base model's dropout after the down projection."""
        return _dropout_probability(self.block, self.pattern.output_dropout)


def _plain_weight(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The layer's weight where calling it on x is a product with that and nothing else."""
    matrix = plain_matrix(layer, x)
    return None if matrix is None or matrix[1] is not None else matrix[0]


def _dropout_probability(block: nn.Module, name: str | None) -> float:
    value = getattr(block, name, 0.0) if name else 0.0
    return float(getattr(value, "p", value))


def match_pattern(block: nn.Module, ffn_modules: dict[str, str] | None = None) -> FfnPattern | None:
    """The pattern whose projections the block has as children; None where it is no FFN block.

    Args:
        block: any module.
        ffn_modules: the user's own names, tried first.
    """
    children = {name for name, _ in block.named_children()}
    if any(_is_attention(name) for name in children):
        return None
    candidates = list(PATTERNS)
    if ffn_modules:
        names = {k: v for k, v in ffn_modules.items() if k != "act_fn"}
        candidates.insert(0, FfnPattern(**names))
    for pattern in candidates:
        if not set(pattern.projections()) <= children:
            continue
        dropouts = [name for name in (pattern.hidden_dropout, pattern.output_dropout) if name]
        if all(hasattr(block, name) for name in dropouts):
            return pattern
    return None


def take_apart(block: nn.Module, name: str, ffn_modules: dict[str, str] | None = None) -> FfnParts:
    """Finds the parts of an FFN block and checks that they compute what the block computes.

    Args:
        block: the FFN block, not adapted.
        name: its name, for messages.
        ffn_modules: the user's own names of the parts.

    Raises:
        GraphLoraError: where no pattern fits, or the block computes something else.
    """
    pattern = _pattern_of(block, name, ffn_modules)
    if len([p for p in inspect.signature(block.forward).parameters.values() if p.default is p.empty]) != 1:
        raise GraphLoraError(
            f"{name} ({type(block).__name__}) takes more than the hidden states; it is not supported."
        )
    act_names = ((ffn_modules or {}).get("act_fn"), *_ACT_NAMES)
    act = next((getattr(block, n) for n in act_names if n and callable(getattr(block, n, None))), None)
    if act is None:
        raise GraphLoraError(
            f"{name} ({type(block).__name__}) has no activation named {', '.join(_ACT_NAMES)}; "
            "name it in the config: ffn_modules={..., 'act_fn': 'NAME'}."
        )
    in_features, wide = features(getattr(block, pattern.projections()[0]))
    intermediate_size = wide // 2 if pattern.gate_up_proj else wide
    return FfnParts(block, pattern, DifferentiableAct(act), in_features, intermediate_size)


def projection_names(
    block: nn.Module, name: str, ffn_modules: dict[str, str] | None = None
) -> tuple[str, ...]:
    """Names of the projections of an FFN block, adapted or not.

    Args:
        block: the FFN block, or the layer that stands in its place.
        name: its name, for messages.
        ffn_modules: the user's own names of the parts.

    Raises:
        GraphLoraError: where no pattern fits.
    """
    block = getattr(block, "base_layer", block)
    return _pattern_of(block, name, ffn_modules).projections()


def _pattern_of(block: nn.Module, name: str, ffn_modules: dict[str, str] | None) -> FfnPattern:
    pattern = match_pattern(block, ffn_modules)
    if pattern is None:
        children = ", ".join(child for child, _ in block.named_children()) or "none"
        raise GraphLoraError(
            f"{name} ({type(block).__name__}) is not a known FFN block; its children are: {children}. "
            f"{_what_was_looked_for()}"
        )
    return pattern


@torch.no_grad()
def check_parts(parts: FfnParts, name: str) -> None:
    """Runs two tokens through the block and through its parts; refuses a block that computes something else.

    Skipped where the weights are not there yet (meta device) or are quantized.
    """
    block = parts.block
    tensors = [*block.parameters(), *block.buffers()]
    if not tensors or any(t.is_meta or t.numel() == 0 for t in tensors) or hasattr(block, "_hf_hook"):
        return
    weight = next((t for t in tensors if t.dtype.is_floating_point), tensors[0])
    if not weight.dtype.is_floating_point or weight.element_size() < 2:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, parts.hidden_size, generator=generator).to(weight.device, weight.dtype)
    training = block.training
    block.eval()
    expected = block(x)
    block.train(training)
    gate, up = parts.project_in(x)
    hidden = parts.act(up) if gate is None else parts.act(gate) * up
    difference = float((parts.project_out(hidden).to(expected.dtype) - expected).abs().max())
    if not difference <= 0.05 * float(expected.abs().max()) + 1e-6:
        raise GraphLoraError(
            f"{name} ({type(block).__name__}) has the names of an FFN block but computes something else "
            f"(difference {difference:.3g}); this architecture is not supported."
        )


def features(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear layer, quantized or not, or of transformers' Conv1D."""
    layer: Any = module
    if hasattr(layer, "base_layer"):
        return features(layer.base_layer)
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return int(layer.in_features), int(layer.out_features)
    if hasattr(layer, "infeatures") and hasattr(layer, "outfeatures"):
        return int(layer.infeatures), int(layer.outfeatures)
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    raise GraphLoraError(f"{type(module).__name__} is not a linear layer that can be adapted.")


def is_linear(module: nn.Module) -> bool:
    """Whether `features` understands the module."""
    names = {"in_features", "out_features"}, {"infeatures", "outfeatures"}
    return isinstance(module, Conv1D) or any(all(hasattr(module, n) for n in pair) for pair in names)


def find_ffn_blocks(model: nn.Module, ffn_modules: dict[str, str] | None = None) -> Iterator[str]:
    """Names of the FFN blocks of the model's language model, in order."""
    roots = text_model_names(model)
    for name, module in model.named_modules():
        if _is_under(name, roots) and match_pattern(module, ffn_modules) is not None:
            yield name


def find_attention_projections(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers inside the attention modules of the model's language model."""
    roots = text_model_names(model)
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0].rpartition(".")[2]
        if _is_under(name, roots) and _is_attention(parent) and is_linear(module):
            yield name


def text_model_names(model: nn.Module) -> list[str]:
    """Names of the submodules that hold the language model: inside a vision-language model, not its vision tower."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if get_text_config else None
    if text_config is None or text_config is config:
        return [""]
    names: list[str] = []
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if name and own is not None and type(own) is type(text_config) and not _is_under(name, names):
            names.append(name)
    return names or [""]


def no_ffn_found(model: nn.Module) -> GraphLoraError:
    """The error for a model in which no block matches, with the names it does have."""
    leaves = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)})
    return GraphLoraError(
        f"No FFN block was found in {type(model).__name__}; its linear layers are named: "
        f"{', '.join(leaves) or 'none'}. {_what_was_looked_for()}"
    )


def _what_was_looked_for() -> str:
    rows = "; ".join(f"{' + '.join(p.projections())} ({p.families})" for p in PATTERNS)
    return (
        f"Looked for: {rows}. Name the parts in the config, e.g. target_modules=['mlp'], "
        "ffn_modules={'gate_proj': 'w1', 'up_proj': 'w3', 'down_proj': 'w2', 'act_fn': 'act'}."
    )


def _is_attention(name: str) -> bool:
    return any(mark in name.lower() for mark in _ATTENTION_MARKS) and "norm" not in name.lower()


def _is_under(name: str, roots: list[str]) -> bool:
    return any(root == "" or name == root or name.startswith(root + ".") for root in roots)
