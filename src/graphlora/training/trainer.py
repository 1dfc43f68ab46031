"""The Hugging Face `Trainer` with what adapters need: accuracy, safe checkpoints, an exact order of rows."""

from __future__ import annotations

import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import Scoring
from graphlora.evaluation.multiple_choice import score_examples, summarize
from graphlora.tasks.example import Example
from graphlora.training.callbacks import routing_summary
from graphlora.training.captured import CapturedSteps, drop_gradients
from graphlora.training.checkpoints import (
    CHECKPOINTS,
    STAGING,
    STATE_FILE,
    damage,
    go_on_command,
    replace_directory,
    seal,
    writing,
)
from graphlora.training.full_rows import masks_without_waiting
from graphlora.training.loraplus import loraplus_groups
from graphlora.training.nonfinite import NonFiniteError
from graphlora.training.packing import (
    TOKEN_MASK,
    asks_for_sdpa,
    blocked_attention,
    packed_attention_mask,
)
from graphlora.training.resumed_trainer import ResumedTrainer
from graphlora.training.row_order import EpochOrder, EpochSampler
from graphlora.training.streaming import StreamLoader, write_place
from graphlora.tuner.compiled_layers import NUM_ITEMS, compile_layers, compiler_errors, reason_of
from graphlora.tuner.masks import every_token

DISTRIBUTION_PARAMETER = re.compile(r"poisson|normal_")
ACCURACIES = ("acc", "acc_norm")


class AdapterTrainer(ResumedTrainer):
    """`Trainer` for adapters.

    It validates with the task's accuracy beside the loss, stops at or leaves out a step that is not finite, orders
    rows by seed and epoch, leaves weight decay off lambda and sigma, applies LoRA+, and renames checkpoints into
    place when they are complete.
    """

    def __init__(
        self,
        *args: Any,
        validation: dict[str, list[Example]],
        scoring: Scoring = "cloze",
        loraplus_lr_ratio: float | None = None,
        keep_checkpoints: int | None = None,
        truncate: bool = False,
        records_steps: Literal["no", "yes", "if_possible"] = "no",
        compiles_steps: Literal["no", "yes", "if_possible"] = "no",
        compiler: dict[str, Any] | None = None,
        stream: StreamLoader | None = None,
        blocks: bool = False,
        **kwargs: Any,
    ) -> None:
        """Set up training.

        Args:
            args: Arguments of `Trainer`.
            validation: Multiple-choice items per task, scored at each validation.
            scoring: How they are scored.
            loraplus_lr_ratio: Learning rate of `lora_B` over that of everything else.
            keep_checkpoints: Checkpoints to keep; the newest and the best always stay.
            truncate: Cut the beginnings of validation prompts that do not fit the model's window.
            records_steps: Record forward and backward once per input shape and replay them (`CapturedSteps`);
                `"if_possible"` goes on eagerly where recording fails.
            compiles_steps: Compile decoder layers and loss (`compile_layers`) while training; `"if_possible"` goes on
                uncompiled where that fails.
            compiler: Options of `compile_layers`.
            blocks: Rows come in blocks (`BlockCollator`).
            stream: Batches that are read while training, in place of a loader of `train_dataset`.
            kwargs: Arguments of `GuardedTrainer` and `Trainer`.
        """
        self.stream = stream
        self._blocks = blocks
        self.validation = validation
        self.scoring: Scoring = scoring
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.keep_checkpoints = keep_checkpoints
        self.truncate = truncate
        self.seconds_aside = 0.0
        self.tokens_seen: Tensor | int = 0
        self._staging: Path | None = None
        self._records_steps, self._compiles_steps = records_steps, compiles_steps
        self._compiler = compiler or {}
        self._captured: CapturedSteps | None = None
        self._trained: list[nn.Parameter] | None = None
        self._num_parameters: int | None = None
        super().__init__(*args, **kwargs)

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return Path(str(self.args.output_dir)) / CHECKPOINTS

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch; the guard takes note of its loss."""
        if self._trained is None:
            self._remember_trained(model)
        mask = inputs.get("attention_mask", inputs.get(TOKEN_MASK))
        self.tokens_seen = self.tokens_seen + (inputs["input_ids"].numel() if mask is None else mask.sum())
        self.begin_guarded(num_items_in_batch)
        given = dict(inputs)
        try:
            if self._records_steps == "no":
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._recorded_step(model, inputs, num_items_in_batch)
        except compiler_errors() as error:
            raise GraphLoraError(
                f"the training step cannot be compiled ({reason_of(error)}); set step_mode to eager"
            ) from error
        return self.end_guarded(given, loss)

    def _remember_trained(self, model: nn.Module) -> None:
        """Keeps the parameters that the optimizer was given: looking for them takes longer than a small model's step.

        Sharded ones are left to those who shard them.
        """
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or any(hasattr(parameter, "device_mesh") for parameter in self._trained):
            self._trained = []
            return

        def zero_grad(set_to_none: bool = True) -> None:
            del set_to_none
            drop_gradients(self._trained or ())

        vars(model)["zero_grad"] = zero_grad

    def _recorded_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The step of `Trainer` as it is, on inputs that stay at their addresses."""
        if self._captured is None:
            self._captured = CapturedSteps(
                self.accelerator.unwrap_model(model),
                device=self.args.device,
                must_record=self._records_steps == "yes",
                tell=_tell,
            )

        def step(static: dict[str, Any]) -> Tensor:
            rest = {name: value for name, value in static.items() if name != NUM_ITEMS}
            return Trainer.training_step(self, model, rest, static[NUM_ITEMS])

        # Without a count of labels, Trainer divides by the number of micro-batches, on the host.
        variant = () if num_items_in_batch is not None else (self.current_gradient_accumulation_steps,)
        return self._captured(step, {**inputs, NUM_ITEMS: num_items_in_batch}, variant)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; compiled layers, recorded steps and their memory are let go at the end."""
        base = self._base()
        try:
            with (
                masks_without_waiting(asks_for_sdpa(base)),
                blocked_attention(base, self._blocks),
                self._compiled_layers(),
            ):
                return super().train(*args, **kwargs)
        finally:
            self._captured = self._trained = None
            self.close_guard()
            vars(self.model_wrapped).pop("zero_grad", None)

    @contextmanager
    def _compiled_layers(self) -> Iterator[None]:
        if self._compiles_steps == "no":
            yield
            return
        tell = _tell if self._compiles_steps == "if_possible" else None
        if self.is_world_process_zero():
            _tell("steps are compiled: the first ones of each length of a batch take some seconds")
        with warnings.catch_warnings():
            # Advice that a run in bfloat16 gets as well.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            with compile_layers(self.accelerator.unwrap_model(self.model), tell=tell, **self._compiler):
                yield

    def _base(self) -> Any:
        """The transformers model within."""
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._trained:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; outside of training too, rows in blocks get attention by blocks."""
        with blocked_attention(self._base(), self._blocks):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Inputs on the device; of rows in blocks, and of rows without padding, also their attention mask."""
        prepared: Any = super()._prepare_inputs(inputs)
        counted = prepared.pop(TOKEN_MASK, None)
        model = self._base()
        if counted is not None:
            additive, dtype = model.config._attn_implementation == "eager", model.dtype
            prepared["attention_mask"] = packed_attention_mask(
                prepared["position_ids"], counted, dtype if additive else None
            )
        elif not {"attention_mask", "position_ids"} & prepared.keys() and asks_for_sdpa(model):
            # Without any mask transformers would look for borders of rows, on the device.
            prepared["attention_mask"] = every_token(prepared["input_ids"])
        return prepared

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `Trainer`, which counts the parameters anew at each step: longer than a small model's step."""
        if self._num_parameters is None:
            self._num_parameters = self._base().num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._num_parameters

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training entries carry the routing, and the loss is checked here on accelerators."""
        if "loss" in logs:
            self.settle()
            logs.update(self.skipped())
            logs.update(routing_summary(self.accelerator.unwrap_model(self.model)))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Loss on the validation rows, and accuracy on all validation items."""
        started = time.perf_counter()
        output: Any = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        accuracy = self.accuracy()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in accuracy.items()})
        self.seconds_aside += time.perf_counter() - started
        return output

    def accuracy(self) -> dict[str, float]:
        """Accuracy on the validation items; with several tasks each one's, and their mean."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        found: dict[str, dict[str, float]] = {}
        for task, examples in self.validation.items():
            model = self.accelerator.unwrap_model(self.model)
            share = examples[rank::ranks]
            with self.running_together(model):
                results = (
                    score_examples(
                        model,
                        self.tokenizer,
                        share,
                        self.scoring,
                        progress=rank == 0 and not self.args.disable_tqdm,
                        truncate=self.truncate,
                    )
                    if share
                    else []
                )
            summary = summarize(gather_object(results) if ranks > 1 else results)
            found[task] = {name: summary[name] for name in ACCURACIES if summary.get(name) is not None}
        values = {
            name: sum(part[name] for part in found.values()) / len(found)
            for name in ACCURACIES
            if found and all(name in part for part in found.values())
        }
        if len(found) > 1:
            values |= {f"{task}_{name}": part[name] for task, part in found.items() for name in part}
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Optimizer by `optim`; with LoRA+ the `lora_B` have a learning rate of their own."""
        ratio = self.loraplus_lr_ratio
        if self.optimizer is None and ratio is not None:
            trained: Any = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            decaying = self.get_decay_parameter_names(trained)
            self.optimizer = kind(loraplus_groups(trained, decaying, self.args, ratio), **options)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters under weight decay: not biases, norms, lambda or sigma."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not DISTRIBUTION_PARAMETER.search(name)]

    def get_train_dataloader(self) -> Any:
        """Loader of the training rows; a stream deals its batches to processes and devices itself."""
        return super().get_train_dataloader() if self.stream is None else self.stream

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        by_length = self.args.train_sampling_strategy == "group_by_length"
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = EpochSampler(
            [len(row["input_ids"]) for row in rows], seed, group=step if by_length else None
        )
        self.add_callback(EpochOrder(sampler))
        return sampler

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints if self._staging is None else self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint beside the others and rename it into place when it is whole."""
        started = time.perf_counter()
        self.settle()
        self._check_weights()
        step = self.state.global_step
        final = self.checkpoints / f"checkpoint-{step}"
        kept = "no checkpoint was saved yet"
        if self.last_saved is not None:
            again = go_on_command(self.checkpoints.parent)
            kept = f"the last whole checkpoint is {self.last_saved}; once that is mended, go on with: {again}"
        self._staging = self.checkpoints / STAGING
        try:
            with writing(final, kept):
                super()._save_checkpoint(model, trial)
                if self.state.best_global_step == step:
                    self.state.best_model_checkpoint = str(final)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._finish_checkpoint(self._staging / final.name, final)
                self.accelerator.wait_for_everyone()
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        self.last_saved = final
        self.seconds_aside += time.perf_counter() - started

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        self.state.save_to_json(str(staged / STATE_FILE))
        if self.stream is not None:
            write_place(staged, self.stream)
        if self.compared is not None:
            self.compared.write(staged)
        seal(staged)
        replace_directory(staged, final)
        rotate_checkpoints(
            str(self.checkpoints), self.keep_checkpoints, self.state.best_model_checkpoint, use_mtime=False
        )

    def _load_best_model(self) -> None:
        """Load the best checkpoint; where it was damaged since, the last step's weights stay and a line says so."""
        best = self.state.best_model_checkpoint
        reason = None if best is None else damage(Path(best))
        if reason is None:
            return super()._load_best_model()
        sys.stderr.write(
            f"the best checkpoint {best} is damaged ({reason}); the last step's weights are kept\n"
        )
        self.state.best_global_step = self.state.global_step
        return None

    def _check_weights(self) -> None:
        """Keep weights that are not finite out of checkpoints."""
        trained = [p for p in self.accelerator.unwrap_model(self.model).parameters() if p.requires_grad]
        finite = torch.stack([torch.isfinite(p.detach()).all() for p in trained]).all()
        if not bool(finite):
            raise NonFiniteError(f"weights are not finite after step {self.state.global_step}")


def _tell(line: str) -> None:
    """Writes a line above the progress bar."""
    tqdm.write(line, file=sys.stderr)
