"""A recorded output of an adapted model: what it says to two fixed texts, to be computed again elsewhere."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from graphlora.errors import GraphLoraError
from graphlora.evaluation.forward import evaluating
from graphlora.training.manifest import Manifest, base_identity, hash_files

TEXTS = (
    "The paths to the old town lead over three bridges, and the widest of them was built in 1874.",
    "def area(width, height):\n    return width * height\n",
)
NUM_TOP = 5
SAMPLES_PER_WEIGHT = 256
# Largest difference of a recorded logit that another machine may show, in standard deviations of its position's
# logits: float32 sums in another order differ by 1e-5 of it at most, half precision rounds at every layer.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
TOLERANCE_4BIT = 0.2
Verdict = Literal["exact", "within tolerance", "different"]


def make_manifest(
    adapter: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, sharded: bool = False
) -> Manifest:
    """Hashes of a saved adapter, and the output of the model that it was saved from.

    Args:
        adapter: Directory with the saved files.
        model: The adapted model, with the weights that were saved.
        tokenizer: Its tokenizer.
        sharded: Whether this process holds only a part of the weights; then there is no output.

    Raises:
        GraphLoraError: A file cannot be read.
    """
    base: Any = model.get_base_model()
    output, reason = None, "the weights were spread over several processes" if sharded else None
    if not sharded:
        output = record_output(model, tokenizer)
        if output is None:
            reason = "the output was not finite"
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=hash_files(adapter),
        base_config=base_identity(base.config),
        base_weights=None if sharded else sample_hash(base),
        output=output,
        reason=reason,
    )


def record_output(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The logits that the model gives to the fixed texts, in JSON values; `None` where they are not finite.

    Returns:
        `dtype` and `load_in_4bit` of the base, `device`, `threads`, and per text `token_ids`, `logits_sha256` (of all
        logits [tokens, vocabulary] in float32), the `top_ids` and `top_logits` [tokens, 5], and their `std` [tokens].
    """
    base: Any = model.get_base_model()
    texts = []
    for text in TEXTS:
        ids = list(tokenizer(text)["input_ids"])
        logits = _logits(model, ids)
        if not bool(torch.isfinite(logits).all()):
            return None
        top = logits.topk(min(NUM_TOP, logits.shape[-1]), dim=-1)
        texts.append(
            {
                "token_ids": ids,
                "logits_sha256": _digest(logits),
                "top_ids": top.indices.tolist(),
                "top_logits": top.values.tolist(),
                "std": logits.std(dim=-1).tolist(),
            }
        )
    return {
        "dtype": str(base.dtype).removeprefix("torch."),
        "load_in_4bit": bool(getattr(base, "is_loaded_in_4bit", False)),
        "device": _device_name(model),
        "threads": torch.get_num_threads(),
        "texts": texts,
    }


def compare_output(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: dict[str, Any]
) -> tuple[Verdict, str]:
    """Computes a recorded output again.

    Args:
        model: The adapter on its base, in the recorded dtype.
        tokenizer: Its tokenizer.
        output: What `record_output` returned when the adapter was made.

    Returns:
        The verdict, and a sentence about it.

    Raises:
        GraphLoraError: The recorded output is damaged.
    """
    tolerance = (
        TOLERANCE_4BIT if output.get("load_in_4bit") else TOLERANCES.get(str(output.get("dtype")), 0.0)
    )
    exact, largest, tops, positions = True, 0.0, 0, 0
    try:
        for text, recorded in zip(TEXTS, output["texts"], strict=True):
            ids = list(tokenizer(text)["input_ids"])
            if ids != recorded["token_ids"]:
                return "different", "the tokenizer cuts the recorded text into other tokens"
            logits = _logits(model, ids)
            exact &= _digest(logits) == recorded["logits_sha256"]
            was = torch.tensor(recorded["top_logits"], dtype=torch.float32)
            now = logits.gather(-1, torch.tensor(recorded["top_ids"]))
            apart = (now - was).abs() / torch.tensor(recorded["std"], dtype=torch.float32)[:, None]
            # A value that is not a number is no small difference.
            largest = max(largest, float(apart.nan_to_num(nan=float("inf")).max()))
            tops += int((logits.argmax(dim=-1) == torch.tensor(recorded["top_ids"])[:, 0]).sum())
            positions += len(ids)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise GraphLoraError(
            f"the recorded output does not fit this model ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "restore manifest.json from a copy, or use --skip_output"
        ) from error
    if exact:
        return "exact", f"the same bits at all {positions} positions"
    how = f"at most {largest:.2g} of the logits' spread apart (allowed {tolerance:g})"
    verdict: Verdict = "within tolerance" if largest <= tolerance else "different"
    return verdict, f"{how}, {tops} of {positions} best tokens alike"


def sample_hash(base: nn.Module) -> str:
    """Hash over evenly spaced values of every weight of the base model, the adapters' left out.

    It tells another model or another training stage apart at once, but does not notice one changed value between
    the samples; the recorded output may.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(base).items()):
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_WEIGHT)
        values = flat[::step][: SAMPLES_PER_WEIGHT + 1].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(weight.shape)} ".encode() + values.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _base_weights(base: nn.Module) -> dict[str, Tensor]:
    """Weights of the base under the names that they have without adapters."""
    parts = [(name.split("."), weight) for name, weight in base.named_parameters()]
    return {
        ".".join(part for part in names if part != "base_layer"): weight
        for names, weight in parts
        if not any(part.startswith(("lora_", "graphlora_", "modules_to_save")) for part in names)
    }


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] of one text, float32 on the CPU."""
    device = next(model.parameters()).device
    inputs = torch.tensor([ids], device=device)
    with evaluating(model):
        output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)
    return output.logits[0].to("cpu", torch.float32)


def _digest(logits: Tensor) -> str:
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
