"""Memory while millions of rows pass through the data path of a training.

    python -m reliability.streaming --rows 5000000

Writes a synthetic file, trains a tiny model on its first rows, and then takes every other batch of one pass from the
trainer's own loader: read, parsed, told from the held-out rows, shuffled, dealt, tokenized and collated, but not
trained on. The resident memory is looked at all along. With `--ranks 16` it is the first of 16 processes: it reads all
rows, as each of them does, and tokenizes its share.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from reliability.record import write_record

BATCH = 64
STEPS = 5
LOOK_EVERY = 20_000
WORDS = ("red", "blue", "green", "stone", "river", "cloud", "night", "field", "glass", "wind")
PROMISE = (
    "Training data of any size is streamed in bounded memory, each row once per pass, shuffled within a buffer and "
    "shared among processes."
)


def main() -> None:
    """Run at full size and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m reliability.streaming", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rows", "--count", type=int, default=5_000_000, help="rows of the synthetic file")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes of the run; this one is the first of them"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graphlora-stream-") as folder:
        values = measure(Path(folder), options.rows, options.ranks, show=True)
    read = f"{values['rows_read']:,} rows ({values['file_bytes'] / 1e9:.2f} GB) read"
    share = "" if options.ranks == 1 else f" (the share of one of {options.ranks} processes)"
    grown = f"memory grew by {values['growth_bytes'] / 1e6:.0f} MB above the start of training"
    figure = f"{read}, {values['rows_tokenized']:,} of them tokenized{share}: {grown}"
    test = "tests/reliability/test_streaming.py::test_memory_does_not_grow_with_the_data"
    sys.stdout.write(f"{write_record('streaming', PROMISE, test, figure, values)}\n{figure}\n")


def measure(folder: Path, rows: int, ranks: int = 1, show: bool = False) -> dict[str, Any]:
    """Stream a file of so many rows.

    Args:
        folder: Place for the file and the run.
        rows: Rows of the file, a hundredth of which is held out.
        ranks: Processes of the run; this one acts as the first and tokenizes its share of the rows.
        show: Show progress.

    Returns:
        Rows and bytes read, rows tokenized, rows seen more or less than once among those tokenized, seconds, and
        memory in bytes: when training had begun, and its largest growth from there.
    """
    from graphlora.tasks.stream_sources import open_source
    from graphlora.training.streaming import Deal

    path = write_numbers(folder / "numbers.jsonl", rows, show)
    trainer = started_training(folder, path)
    loader = trainer.stream
    loader.deal = loader.dataset.deal = Deal(0, ranks, BATCH)
    loader.dataset.place = loader.place
    loader.dataset.collate = counted(loader.dataset.collate, tokens := [0, 0])
    held_out = sum(1 for _ in open_source(str(path), "validation").one_pass())
    wanted = rows - held_out
    began = loader.place.row
    loader._num_batches = (wanted - began) // (BATCH * ranks)
    process = psutil.Process()
    start = peak = process.memory_info().rss
    started = time.perf_counter()
    bar = tqdm(total=wanted, initial=began, unit=" rows", disable=not show, file=sys.stderr)
    looked = began
    for _ in loader:
        if loader.place.row - looked >= LOOK_EVERY:
            bar.update(loader.place.row - looked)
            looked = loader.place.row
            peak = max(peak, process.memory_info().rss)
    bar.close()
    peak = max(peak, process.memory_info().rss)
    return {
        "rows": rows,
        "rows_held_out": held_out,
        "rows_trained_on": began,
        "rows_read": loader.place.row,
        "rows_tokenized": tokens[0],
        "tokens": tokens[1],
        "passes": loader.place.block.passes,
        "file_bytes": path.stat().st_size,
        "ranks": ranks,
        "shuffle_buffer_size": loader.stream.examples.block_size,
        "seconds": round(time.perf_counter() - started, 1),
        "start_bytes": start,
        "growth_bytes": peak - start,
    }


def write_numbers(path: Path, rows: int, show: bool = False) -> Path:
    """A file of so many different rows, about 160 bytes each."""
    needed = rows * 200
    if shutil.disk_usage(path.parent).free < 2 * needed:
        sys.exit(
            f"{path.parent} has less than {2 * needed / 1e9:.1f} GB free; make room, or give fewer --rows"
        )
    with path.open("w", encoding="utf-8") as file:
        for number in tqdm(range(rows), unit=" rows", disable=not show, desc="writing", file=sys.stderr):
            words = " ".join(WORDS[int(digit)] for digit in f"{number:07d}")
            row = {
                "prompt": f"Say the number {number} in words of colors and things.",
                "completion": f" {words}",
            }
            file.write(json.dumps(row) + "\n")
    return path


def counted(collate: Callable[[Any], Any], total: list[int]) -> Callable[[Any], Any]:
    """A collator that counts rows and tokens."""

    def count(rows: list[dict[str, list[int]]]) -> Any:
        total[0] += len(rows)
        total[1] += sum(len(row["input_ids"]) for row in rows)
        return collate(rows)

    return count


def started_training(folder: Path, path: Path) -> Any:
    """Train a tiny model for a few steps on the file; the trainer, whose loader is where it stopped."""
    import torch

    from graphlora.training import Recipe, train
    from graphlora.training.workbench import Workbench

    trainers: list[Any] = []

    class Bench(Workbench):
        quiet = True
        takes_signals = False

        def callbacks(self, trainer: Any) -> list[Any]:
            trainers.append(trainer)
            return []

    torch.set_num_threads(1)
    recipe = Recipe.from_dict(
        {
            "model": str(tiny_model(folder / "model")),
            "task": str(path),
            "output_dir": str(folder / "run"),
            "streaming": True,
            "method": "graphlora",
            "num_experts": 4,
            "r": 2,
            "router_hidden_size": 16,
            "dtype": "float32",
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "eval_strategy": "no",
            "save_steps": STEPS,
            "training_args": {"use_cpu": True, "disable_tqdm": True},
        }
    )
    train(recipe, workbench=Bench())
    return trainers[0]


def tiny_model(folder: Path) -> Path:
    """A random Llama of two layers with a byte-pair tokenizer trained on the file's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = " ".join((*WORDS, "Say the number in words of colors and things."))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet
    )
    inner.train_from_iterator([text] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
