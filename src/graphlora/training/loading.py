"""Base models, tokenizers and adapters from disk or the hub, with one-line errors for what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graphlora.errors import GraphLoraError
from graphlora.training.adapter_files import WEIGHT_PREFIX, AdapterFiles, is_adapter, read_adapter
from graphlora.training.processes import wants_sharding
from graphlora.tuner.four_bits import keep_differentiable
from graphlora.tuner.register import register
from graphlora.untrusted import check_model_place, local_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODULE_OF_WEIGHT = re.compile(r"^(.*?)\.(?:lora_|graphlora_|modules_to_save)")
T = TypeVar("T")

register()


def pick_device(device: str = "auto") -> torch.device:
    """Device by name; `auto` takes the accelerator that is there, else the CPU.

    Raises:
        GraphLoraError: A device that this machine does not have.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        names = "cpu" if found is None else f"cpu, {found.type}"
        raise GraphLoraError(f"device {device!r} is not available here; use {names} or auto") from error


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Dtype by name; `auto` is bfloat16 where the device computes it in hardware, else float32.

    Raises:
        GraphLoraError: An unknown name.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise GraphLoraError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = bool(
            capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
        )
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def resolve_path(name: str) -> str:
    """Absolute path where `name` is on this disk (so that it is found from anywhere), else `name`."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model, with a padding token.

    Raises:
        GraphLoraError: The model or its tokenizer is not found.
    """
    kwargs = _source(name)
    tokenizer = _from_hub(name, lambda: AutoTokenizer.from_pretrained(**kwargs))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise GraphLoraError(
                f"the tokenizer of {name} has neither a padding nor an end token; add one to it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(name: str) -> PretrainedConfig:
    """Config of a model, without its weights.

    Raises:
        GraphLoraError: The model is not found.
    """
    return _from_hub(name, lambda: AutoConfig.from_pretrained(**_source(name)))


def load_base_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """Causal language model from a directory, a hub id, or a directory with one .gguf file.

    Args:
        name: Directory or hub id.
        dtype: Dtype of the weights; those of a .gguf file are unpacked and cast to it.
        device: Where to put it; the CPU when left out.
        attn_implementation: Attention implementation of transformers.
        load_in_4bit: Keep linear layers in 4 bits (NF4 with double quantization), computing in `dtype`; all else
            stays in `dtype`.

    Raises:
        GraphLoraError: No such model, no causal language model, damaged weights, or 4 bits without bitsandbytes.
    """
    kwargs: dict[str, Any] = {**_source(name), "dtype": dtype}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if load_in_4bit:
        kwargs["quantization_config"] = _four_bits(name, dtype, "gguf_file" in kwargs)
    model: Any = _from_hub(name, lambda: AutoModelForCausalLM.from_pretrained(**kwargs))
    if load_in_4bit:
        keep_differentiable(model)
    if "gguf_file" in kwargs:
        model = model.to(dtype=dtype)
    return model.to(device) if device is not None else model


def load_adapter(
    base: PreTrainedModel, path: str | Path, base_name: str | None = None, trainable: bool = False
) -> PeftModel:
    """The base model with a saved adapter.

    Args:
        base: Base model, wrapped in place.
        path: The adapter's directory.
        base_name: Name of the base model for messages.
        trainable: Whether to go on training it.

    Raises:
        GraphLoraError: A missing or damaged file, or an adapter of another base model.
    """
    files = read_adapter(path)
    name = base_name or getattr(base, "name_or_path", "the base model")
    check_fits(files, base, name)
    try:
        return PeftModel.from_pretrained(base, str(path), is_trainable=trainable)
    except RuntimeError as error:
        detail = re.search(r"size mismatch[^\n]*", str(error))
        if detail is None:
            raise
        raise _other_base(files, name, detail.group(0)) from error


def load_for_use(
    path: str, base_model: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, AdapterFiles | None]:
    """Model to evaluate or talk to, and its tokenizer: an adapter on its base, or a base model alone.

    Args:
        path: An adapter's directory, or a base model.
        base_model: Base model, where it is not the one that the adapter names.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        GraphLoraError: See `load_base_model` and `load_adapter`.
    """
    files = read_adapter(path) if is_adapter(path) else None
    name = base_model or (files.base_model if files is not None else path)
    if name is None:
        raise GraphLoraError(f"the adapter {path} does not name its base model; give --base_model")
    place = pick_device(device)
    tokenizer = load_tokenizer(name)
    model = load_base_model(name, pick_dtype(dtype, place), place)
    if files is not None:
        return load_adapter(model, path, name).eval(), tokenizer, files
    return model.eval(), tokenizer, None


def check_fits(files: AdapterFiles, base: PreTrainedModel, name: str) -> None:
    """Raise `GraphLoraError` where the adapter has weights for modules that the base does not have."""
    modules = {module_name for module_name, _ in base.named_modules()}
    for weight in files.shapes:
        found = MODULE_OF_WEIGHT.match(weight)
        module = found.group(1).removeprefix(WEIGHT_PREFIX) if found else None
        if module is not None and module not in modules:
            raise _other_base(files, name, f"no module {module}")


def _other_base(files: AdapterFiles, name: str, detail: str) -> GraphLoraError:
    return GraphLoraError(
        f"the adapter {files.path} does not fit {name} ({detail}); it was trained on {files.base_model}"
    )


def _source(name: str) -> dict[str, Any]:
    """Arguments for `from_pretrained`: the path, the .gguf file in it where there is one, and no code from the hub."""
    return {**_place(name), "trust_remote_code": False}


def _place(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return {"pretrained_model_name_or_path": str(path)}
        if not files:
            raise GraphLoraError(f"no model in {name}: the folder has no config.json; check the path")
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise GraphLoraError(f"{name} holds several .gguf files ({names}); name one of them")
        return {"pretrained_model_name_or_path": str(path), "gguf_file": files[0].name}
    check_model_place(name)
    return {"pretrained_model_name_or_path": name}


def _four_bits(name: str, dtype: torch.dtype, is_gguf: bool) -> transformers.BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise GraphLoraError(
            "load_in_4bit needs bitsandbytes, which is not installed; pip install 'graphlora[quantization]'"
        )
    if is_gguf:
        raise GraphLoraError(f"load_in_4bit cannot quantize {name}, a .gguf file; give the original model")
    # FSDP shards floats only: there, the packed bytes are kept as values of the dtype of the base.
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if wants_sharding() else torch.uint8,
    )


def _from_hub(name: str, load: Callable[[], T]) -> T:
    from safetensors import SafetensorError

    try:
        return load()
    except SafetensorError as error:
        raise GraphLoraError(f"the weights of {name} are truncated or damaged: {error}") from error
    except ImportError as error:
        raise GraphLoraError(f"{name} needs a package that is missing: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        if isinstance(error, OSError) and "connect" in reason and local_path(name) is None:
            reason = f"{reason.rstrip('.')}; no such directory either; check the name or the network"
        raise GraphLoraError(f"cannot load model {name}: {reason}") from error


def _first_line(error: Exception) -> str:
    """The first line of a message; all of it where that only leads to a list."""
    text = str(error).strip()
    line = text.split("\n")[0].strip()
    return (" ".join(text.split()) if line.endswith(":") else line) or type(error).__name__
