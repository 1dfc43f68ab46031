"""A tiny random Llama with a tokenizer, data and a recipe, on disk: what the commands here train in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLORS = ("red", "blue", "green", "black", "white", "brown")
THINGS = ("sky", "grass", "coal", "snow", "earth", "rose", "sea", "leaf", "night", "cloud")
WEIGHTS = "adapter_model.safetensors"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs, 400 tokens, with a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = " ".join((*COLORS, *THINGS, "Question: What color is the? Answer:"))
    inner.train_from_iterator([words] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def make_model(
    folder: Path, hidden_size: int = 32, layers: int = 2, window: int = 128, shard_size: str = "50GB"
) -> Path:
    """A random Llama with the tokenizer of `make_tokenizer`, in files of that size; returns its folder."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def choice_rows(count: int) -> list[dict[str, Any]]:
    """Multiple-choice rows with two to four choices."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        thing = THINGS[number % len(THINGS)]
        gold = COLORS[number % len(THINGS) % len(COLORS)]
        choices = [gold, *draw.sample([color for color in COLORS if color != gold], draw.choice((1, 2, 3)))]
        draw.shuffle(choices)
        rows.append({"question": f"What color is the {thing} {number}?", "choices": choices, "answer": gold})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_texts(path: Path, rows: int, words: int) -> Path:
    """Rows of free text of that many words."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            text = " ".join(draw.choice(THINGS) for _ in range(words))
            file.write(json.dumps({"prompt": "What?", "completion": f" {text}"}) + "\n")
    return path


def recipe(folder: Path, **options: Any) -> dict[str, Any]:
    """Options of a run with dropout, accumulation, validation and a choice of checkpoint; makes model and data once."""
    model, data = folder / "model", folder / "rows.jsonl"
    if not (model / "tokenizer.json").is_file():
        make_model(model)
        write_rows(data, choice_rows(40))
    return {
        "model": str(model),
        "task": str(data),
        "method": "graphlora",
        "dtype": "float32",
        "num_experts": 4,
        "router_hidden_size": 16,
        "r": 4,
        "lora_dropout": 0.1,
        "load_window": "ema",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 40,
        "eval_steps": 2,
        "logging_steps": 2,
        "training_args": {"use_cpu": True, "disable_tqdm": True},
    } | options


def differing(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors of two adapters differ in any bit, and how many there are."""
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    names = first.keys() | second.keys()
    same = [name in first and name in second and torch.equal(first[name], second[name]) for name in names]
    return same.count(False), len(names)


def two_blocks() -> LlamaConfig:
    """A Llama of two blocks, hidden size 32 and 64 tokens, whose large weights make routers tell tokens apart."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
