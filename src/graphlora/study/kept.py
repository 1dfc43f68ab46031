"""What a worker keeps between runs: base model, tokens and test items are loaded once, adapters come and go."""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from graphlora.errors import GraphLoraError
from graphlora.tasks import Example, load_choices
from graphlora.training.adapting import add_adapter
from graphlora.training.loading import load_base_model
from graphlora.training.recipe import Recipe
from graphlora.training.run_data import RunData
from graphlora.training.trainer import AdapterTrainer
from graphlora.training.workbench import Workbench

# Weights that are looked at to see that the base model is what it was.
PROBES, PROBE_VALUES = 8, 1 << 16


class StepClock(TrainerCallback):
    """Median time of a step over the intervals between log lines, where the host waits for the device anyway."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self._trainer = trainer
        self._marks: list[tuple[int, float]] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the time of a training entry, without validations and checkpoints before it."""
        if logs and "loss" in logs:
            self._marks.append((state.global_step, time.perf_counter() - self._trainer.seconds_aside))

    def median(self) -> float | None:
        """Seconds per step; `None` with fewer than two log lines."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        times = [(end - start) / (last - first) for (first, start), (last, end) in pairs if last > first]
        return statistics.median(times) if times else None


class RememberingTokenizer:
    """A tokenizer that encodes a text once; all else is the tokenizer's own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        """Whatever the tokenizer has."""
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        """Size of the vocabulary."""
        return len(self._tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the tokenizer makes of texts."""
        return self._tokenizer(*args, **kwargs)

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        key = (text, *sorted(kwargs.items()))
        if key not in self._known:
            self._known[key] = tuple(self._tokenizer.encode(text, **kwargs))
        return list(self._known[key])


@dataclass
class _Base:
    key: tuple[Any, ...]
    model: PreTrainedModel
    fingerprint: str


class KeptWorkbench(Workbench):
    """The surroundings of a worker's runs, one after the other."""

    quiet = True
    takes_signals = False

    def __init__(self) -> None:
        self._base: _Base | None = None
        self._tokenizers: dict[str, Any] = {}
        self._data: dict[tuple[Any, ...], RunData] = {}
        self._tests: dict[tuple[Any, ...], list[Example]] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        self.clock: StepClock | None = None

    def tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """Tokenizer of the base model, the same for all runs."""
        if recipe.model not in self._tokenizers:
            self._tokenizers[recipe.model] = RememberingTokenizer(super().tokenizer(recipe))
        return self._tokenizers[recipe.model]

    def base_model(self, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Base model on the device, without an adapter; loaded where the last run's was another one."""
        key = (recipe.model, dtype, device, recipe.attn_implementation, recipe.load_in_4bit)
        if self._base is None or self._base.key != key:
            self.forget_base()
            model = load_base_model(
                recipe.model,
                dtype,
                None if recipe.load_in_4bit else device,
                attn_implementation=recipe.attn_implementation,
                load_in_4bit=recipe.load_in_4bit,
            )
            self._base = _Base(key, model, fingerprint(model))
        return self._base.model

    def data(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
        """Rows and items, encoded once for all runs that take the same."""
        key = (recipe.model, str(recipe.task), recipe.data_dir, _choice_seed(recipe), *_encoding(recipe))
        if recipe.streaming:
            key += (recipe.seed, recipe.shuffle_buffer_size, recipe.max_steps > 0)
        if key not in self._data:
            self._data[key] = super().data(recipe, tokenizer)
        return self._data[key]

    def callbacks(self, trainer: AdapterTrainer) -> list[TrainerCallback | Any]:
        """The clock of the steps."""
        self.clock = StepClock(trainer)
        return [self.clock]

    def test_items(self, spec: str, split: str, data_dir: str | None, limit: int | None) -> list[Example]:
        """Items of one split, the same for all runs.

        Raises:
            GraphLoraError: Data that cannot be loaded, or has no choices.
        """
        key = (spec, split, data_dir, limit)
        if key not in self._tests:
            self._tests[key] = load_choices(spec, split, data_dir=data_dir, limit=limit)
        return self._tests[key]

    def put_back(self, adapted: PeftModel, reusable: bool = True) -> None:
        """Take the adapter off, and see that the base model is what it was.

        Args:
            adapted: The base model with a run's adapter.
            reusable: Whether the next run may have it; a run can leave more behind than an adapter.

        Raises:
            GraphLoraError: The run changed the base model's weights; the next run loads it anew.
        """
        assert self._base is not None
        kept, self._base = self._base, None
        tuner: Any = adapted.base_model
        model = tuner.unload()
        model.__dict__.pop("peft_config", None)
        model.eval()
        if fingerprint(model) != kept.fingerprint:
            raise GraphLoraError(
                "the run changed the weights or modules of its base model; its result does not count"
            )
        self._base = kept if reusable else None
        _collect()

    def forget_base(self) -> None:
        """Let the base model and its memory go."""
        self._base = None
        _collect()

    def matched_rank(self, recipe: Recipe, target: Recipe, base: PreTrainedModel) -> int:
        """Rank of a LoRA that trains as many parameters as another recipe, as near as whole ranks come.

        Args:
            recipe: The LoRA.
            target: The recipe to match.
            base: The base model, without an adapter.
        """
        one, two = (self._num_trained(recipe.changed(r=r, lora_alpha=1), base) for r in (1, 2))
        return max(1, round((self._num_trained(target, base) - one) / (two - one)) + 1)

    def _num_trained(self, recipe: Recipe, base: PreTrainedModel) -> int:
        key = (recipe.model, recipe.method, repr(sorted(recipe.adapter_options().items(), key=str)))
        if key not in self._sizes:
            adapted = add_adapter(base, recipe)
            self._sizes[key] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            self.put_back(adapted)
        return self._sizes[key]


def fingerprint(model: torch.nn.Module) -> str:
    """Hash of the names of all weights and modules, and of the values of some weights, spread over the depth."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__name__}\n".encode())
    weights = list(model.named_parameters())
    step = max(1, (len(weights) - 1) // (PROBES - 1))
    for name, weight in weights[::step]:
        probe = weight.detach().flatten()[:PROBE_VALUES].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(probe.numpy().tobytes())
    return digest.hexdigest()[:16]


def _choice_seed(recipe: Recipe) -> int | None:
    """Seed that the choice of rows depends on; `None` where all rows are taken as they are."""
    if isinstance(recipe.task, str) and recipe.train_limit is None and recipe.eval_limit is None:
        return None
    return recipe.seed if recipe.limit_seed is None else recipe.limit_seed


def _encoding(recipe: Recipe) -> tuple[Any, ...]:
    names = ("scoring", "train_on", "append_eos", "max_length", "truncation", "train_limit", "eval_limit")
    return (*(getattr(recipe, name) for name in names), recipe.eval_strategy == "no")


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
