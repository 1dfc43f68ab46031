"""Runs of a few optimizer steps under a trainer, with the gradients it hands to the optimizer and its micro-batches."""

import itertools

import torch
from datasets import Dataset
from tiny_llama import VOCAB, gradients, make_batch, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

STEPS, LEARNING_RATE = 2, 0.05


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words `t0` to `t31`; `t0` pads and `t1` ends."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} t1 {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t2", chat_template=template
    )


def make_rows(lengths: list[int]) -> list[dict[str, list[int]]]:
    batch = make_batch(lengths)
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [{"input_ids": ids[mask.bool()].tolist()} for ids, mask in rows]


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step as the optimizer gets them."""

    def __init__(self):
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients(model))


class Spy:
    """A collator that remembers the micro-batches it made."""

    def __init__(self, collator):
        self.collator = collator
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows):
        batch = self.collator(rows)
        self.batches.append({n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()})
        return batch


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-padded batch; a row's first token has no label, like a packed one's."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = (ids != 0).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask.cumsum(1) * mask < 2, -100),
    }


def arguments(folder, **overrides) -> dict:
    """Options common to all trainers: plain SGD with no clipping, so that gradients are what the loss gave."""
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return {**options, **overrides}


COLLATORS = {"padding": pad, "packing": DataCollatorWithFlattening()}


def run_trainer(folder, lengths, accumulation=1, collator="padding", config=None, **options):
    """Gradients by step, micro-batches and the model after training rows of these lengths; 8 rows per step."""
    spy, recorder = Spy(COLLATORS[collator]), Gradients()
    options = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        **options,
    }
    model = make_model(**(config or {}))
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(folder, **options)),
        data_collator=spy,
        train_dataset=make_rows(lengths),
        callbacks=[recorder],
    )
    trainer.train()
    return recorder.steps, spy.batches, model


def run_sft(folder, lengths, accumulation=1, config=None, **options):
    """Gradients by step, micro-batches and the trainer, likewise, under TRL's SFTTrainer."""
    from trl import SFTConfig, SFTTrainer

    recorder = Gradients()
    options = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": False,
        "bf16": False,
        **options,
    }
    trainer = SFTTrainer(
        make_model(**(config or {})),
        SFTConfig(**arguments(folder, **options)),
        train_dataset=Dataset.from_list(make_rows(lengths)),
        processing_class=make_tokenizer(),
        callbacks=[recorder],
    )
    spy = trainer.data_collator = Spy(trainer.data_collator)
    trainer.train()
    return recorder.steps, spy.batches, trainer


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )


def by_hand(
    batches: list[dict[str, Tensor]], per_step: int, weight: str, **config
) -> list[dict[str, Tensor]]:
    """Gradients of each optimizer step, from the loss written out.

    Args:
        batches: the micro-batches in order.
        per_step: micro-batches per optimizer step.
        weight: how a micro-batch's aux_loss is weighted: its share of the `"labels"`, or 1 / `"steps"`.
        **config: of the adapter.
    """
    model = make_model(**config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    found = []
    micro_batches = iter(batches)
    while step := list(itertools.islice(micro_batches, per_step)):
        optimizer.zero_grad()
        counts = [(batch["labels"][:, 1:] != -100).sum() for batch in step]
        for batch, count in zip(step, counts, strict=True):
            inputs = {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask", "position_ids")}
            out = model(**inputs, use_cache=False)
            share = count / sum(counts) if weight == "labels" else 1 / len(step)
            loss = summed_cross_entropy(out.logits, batch["labels"]) / sum(counts) + share * out.aux_loss
            loss.backward()
        found.append(gradients(model))
        optimizer.step()
    return found


def router_part(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """lambda, sigma and router weights: what the auxiliary losses act on first."""
    return {n: g for n, g in grads.items() if "graphlora_router" in n or "graphlora_coordination" in n}
