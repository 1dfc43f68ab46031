"""Streamed training: rows dealt to ranks and workers without loss, and runs that go on where they stopped."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord
from graphlora.tasks import stream_sources
from graphlora.tasks.stream import ExampleStream
from graphlora.tasks.stream_sources import FileSource, open_source
from graphlora.training import Recipe, train
from graphlora.training.arguments import training_arguments
from graphlora.training.data import Encoding, padding_collator
from graphlora.training.resolving import located
from graphlora.training.run_data import wants_streaming
from graphlora.training.stream_setup import stream_loader
from graphlora.training.streaming import PLACE_FILE, Deal, StreamLoader, TokenStream, read_place, write_place

ROWS = 203


def text_rows(count):
    return [{"prompt": f"What color is the sky {n}?", "completion": f" blue {n}"} for n in range(count)]


@pytest.fixture(scope="module")
def numbers_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(ROWS)))
    return path


@pytest.fixture(scope="module")
def stream(numbers_file, tiny_model) -> TokenStream:
    return make_stream(numbers_file, tiny_model, epoch_rows=ROWS)


def make_stream(path, model, **options) -> TokenStream:
    how = Encoding(max_length=128, truncation=options.pop("truncation", "refuse"))
    source = FileSource("numbers", (path,), "train", holds_out=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return TokenStream(ExampleStream([source], [1.0], 32, 0, **options), tokenizer, how, "print")


def keys(rows):
    return [tuple(row["input_ids"]) for row in rows]


def dealt(stream, count, place=None, workers=0, **deal):
    """Batches of each rank, as keys of their rows, and the loaders."""
    loaders = [
        StreamLoader(stream, Deal(rank=rank, **deal), keys, place, num_batches=count, num_workers=workers)
        for rank in range(deal.get("ranks", 1))
    ]
    return [list(loader) for loader in loaders], loaders


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_row_is_dealt_once_whatever_the_number_of_ranks(stream, ranks, micro_batches):
    deal = {"ranks": ranks, "micro_batches": micro_batches, "batch_size": 4, "total_rows": ROWS}
    steps = Deal(**deal).num_steps(0)
    batches, loaders = dealt(stream, steps * micro_batches, **deal)
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert all(batch for of_rank in batches for batch in of_rank)
    counts = Counter(key for of_rank in batches for batch in of_rank for key in batch)
    assert len(counts) == ROWS
    assert set(counts.values()) == {1}
    assert {loader.place.row for loader in loaders} == {ROWS}


def test_ranks_share_the_batches_that_one_rank_gets(stream):
    (alone,), _ = dealt(stream, 20, batch_size=8)
    together, _ = dealt(stream, 20, ranks=2, batch_size=4)
    assert alone == [first + second for first, second in zip(*together, strict=True)]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(stream, workers):
    plain, (first,) = dealt(stream, 20, batch_size=4)
    others, (second,) = dealt(stream, 20, batch_size=4, workers=workers)
    assert plain == others
    assert first.place == second.place


@pytest.mark.parametrize(("before", "after"), [(1, 3), (4, 1), (2, 2)])
def test_another_number_of_ranks_goes_on_after_the_last_row(stream, before, after, tmp_path):
    first, loaders = dealt(stream, 7, ranks=before, batch_size=4)
    assert {loader.place.row for loader in loaders} == {7 * 4 * before}
    write_place(tmp_path, loaders[0])
    place = read_place(tmp_path, stream, pytest.fail)
    deal = {"ranks": after, "batch_size": 4, "total_rows": ROWS}
    second, _ = dealt(stream, Deal(**deal).num_steps(place.row), place, **deal)
    seen = Counter(key for of_rank in (*first, *second) for batch in of_rank for key in batch)
    assert len(seen) == ROWS
    assert set(seen.values()) == {1}


def test_a_last_step_with_fewer_rows_than_slots_is_filled_up():
    deal = Deal(ranks=2, batch_size=4, micro_batches=2, total_rows=17)
    assert [deal.sizes(at) for at in (0, 16)] == [[[4, 4], [4, 4]], [[1, 1], [1, 1]]]
    assert deal.sizes(10) == [[1, 2], [2, 2]]
    assert deal.num_steps(0) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_in_the_middle_is_named_with_its_line(tiny_model, tmp_path, workers):
    path = tmp_path / "a.jsonl"
    rows = text_rows(100)
    rows[70] = {"prompt": "no completion"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = StreamLoader(make_stream(path, tiny_model), Deal(batch_size=4), keys, num_workers=workers)
    taken = []
    with pytest.raises(GraphLoraError) as caught:
        taken.extend(loader)
    assert str(caught.value).startswith(f"{path}:71: no column 'completion'; found prompt;")
    assert "\n" not in str(caught.value)
    assert len(taken) == 16


def test_a_row_that_is_too_long_is_named_or_dropped(tiny_model, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = text_rows(20)
    rows[12] |= {"prompt": "sky " * 200, "id": "long"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        GraphLoraError, match=r"row 'long \(.*a\.jsonl:13\)' has \d+ tokens, more than max_length 128"
    ):
        dealt(make_stream(path, tiny_model), 5, batch_size=4)
    kept = make_stream(path, tiny_model, keeps=lambda example: len(example.prompt) < 300)
    assert kept.examples.count() == 19


def test_packing_and_padding_make_batches_of_streamed_rows(stream):
    loader = StreamLoader(stream, Deal(batch_size=3), padding_collator(stream.tokenizer), num_batches=2)
    first, second = loader
    assert first["input_ids"].shape[0] == second["labels"].shape[0] == 3


def test_batches_are_copied_to_the_device(stream):
    collate = padding_collator(stream.tokenizer)
    loader = StreamLoader(stream, Deal(batch_size=3), collate, num_batches=2, device=torch.device("meta"))
    devices = [{tensor.device.type for tensor in batch.values()} for batch in loader]
    assert devices == [{"meta"}, {"meta"}]


@pytest.mark.parametrize("non_blocking", [True, False])
def test_a_run_copies_its_stream_as_it_is_told(stream, tiny_recipe, non_blocking):
    options = {"use_cpu": True, "accelerator_config": {"non_blocking": non_blocking}}
    recipe = Recipe.from_dict(tiny_recipe | {"eval_strategy": "no", "training_args": options})
    arguments = training_arguments(recipe, torch.float32)
    loader = stream_loader(stream, recipe, arguments, padding_collator(stream.tokenizer), None)
    assert (loader._device, loader._non_blocking) == (torch.device("cpu"), non_blocking)


def test_a_checkpoint_of_other_data_is_told_or_refused(stream, tiny_model, numbers_file, tmp_path):
    _, (loader,) = dealt(stream, 2, batch_size=4)
    write_place(tmp_path, loader)
    path = tmp_path / PLACE_FILE
    values = json.loads(path.read_text())
    told = []
    path.write_text(json.dumps(values | {"fingerprint": "other"}))
    assert read_place(tmp_path, stream, told.append).row == 8
    assert told == [
        f"the data is not what it was at {tmp_path.name}; going on after row 8 of the files as they are"
    ]
    values["block"]["places"] = [[0], [0]]
    path.write_text(json.dumps(values))
    with pytest.raises(GraphLoraError, match="is of a run with 2 sources of data; give the same"):
        read_place(tmp_path, stream, told.append)
    path.unlink()
    with pytest.raises(GraphLoraError, match="does not say where the run was in its data"):
        read_place(tmp_path, stream, told.append)


def test_large_local_data_is_streamed_by_itself(tmp_path, tiny_recipe):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)
    for task, streamed in ((str(path), True), ({str(path): 1, "quiz": 1}, True), ("quiz", False)):
        assert wants_streaming(Recipe.from_dict(tiny_recipe | {"task": task})) is streamed
    assert wants_streaming(Recipe.from_dict(tiny_recipe | {"task": str(path), "train_limit": 5})) is False
    pattern = Recipe.from_dict(tiny_recipe | {"task": "data/part-*.jsonl"})
    assert wants_streaming(pattern)
    assert located(pattern).task == str(Path("data/part-*.jsonl").absolute())
    assert wants_streaming(Recipe.from_dict(tiny_recipe | {"task": str(path), "streaming": False})) is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_limit": 5}, "train_limit is 5, which needs all rows at once; use max_steps"),
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch, .*; use steps"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length, which needs all rows at once"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is 0; give a number above 0"),
    ],
)
def test_options_that_need_all_rows_are_refused(tiny_recipe, options, message):
    with pytest.raises(GraphLoraError, match=message):
        Recipe.from_dict(tiny_recipe | {"streaming": True} | options)


@pytest.fixture
def streamed_recipe(tiny_recipe, numbers_file) -> dict:
    return tiny_recipe | {
        "task": str(numbers_file),
        "streaming": True,
        "shuffle_buffer_size": 32,
        "gradient_accumulation_steps": 2,
        "packing": True,
        "method": "graphlora",
        "num_experts": 4,
        "top_k": 2,
        "router_hidden_size": 16,
        "max_steps": 12,
        "eval_steps": 4,
    }


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from graphlora.training import Recipe, train
from graphlora.training.trainer import AdapterTrainer
step = AdapterTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
AdapterTrainer.training_step = training_step
train(Recipe.from_yaml(sys.argv[1]))
"""


def test_a_killed_run_goes_on_in_the_middle_of_an_epoch_as_if_it_had_not_been(streamed_recipe, tmp_path):
    whole = train(Recipe.from_dict(streamed_recipe | {"output_dir": str(tmp_path / "whole")}))
    (tmp_path / "recipe.yaml").write_text(Recipe.from_dict(streamed_recipe).to_yaml())
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "recipe.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    out = Path(streamed_recipe["output_dir"])
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = train(Recipe.from_dict(streamed_recipe), resume=True)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert first.keys() == second.keys()
    losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert resumed.metrics["rows_taken"] == 12 * 2 * 4


def test_a_resumed_run_enters_the_file_at_its_place(streamed_recipe, monkeypatch):
    train(Recipe.from_dict(streamed_recipe | {"max_steps": 20, "eval_steps": 20}))
    read = Counter()
    original = stream_sources.rows_from

    def rows_from(path, offset=0, line=1):
        for row in original(path, offset, line):
            read[offset] += 1
            yield row

    monkeypatch.setattr(stream_sources, "rows_from", rows_from)
    train(Recipe.from_dict(streamed_recipe | {"max_steps": 21, "eval_steps": 20}), resume=True)
    entered = max(read)
    assert entered > Path(streamed_recipe["task"]).stat().st_size / 2
    assert read[entered] <= 2 * 32


def test_epochs_end_after_the_last_row_and_a_finished_run_stays_finished(streamed_recipe):
    recipe = Recipe.from_dict(
        streamed_recipe
        | {"max_steps": -1, "num_train_epochs": 1.5, "eval_strategy": "no", "save_steps": 1000}
    )
    result = train(recipe)
    rows = open_source(str(recipe.task), "train")
    wanted = int(1.5 * sum(1 for _ in rows.one_pass()))
    assert result.metrics["rows_taken"] == wanted
    assert result.record.metrics["rows"] == wanted
    assert result.metrics["epochs"] == pytest.approx(1.5, abs=0.01)
    assert result.metrics["steps"] == -(-wanted // 8)
    again = train(recipe, resume=True)
    assert again.metrics["steps"] == result.metrics["steps"]


def test_a_bad_row_met_while_training_says_how_to_go_on(streamed_recipe, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) + "\n" for row in text_rows(ROWS)]
    path.write_text("".join([*lines[:150], "{broken\n", *lines[150:]]))
    options = streamed_recipe | {"task": str(path), "eval_strategy": "no", "save_steps": 2, "max_steps": 30}
    message = (
        r"a\.jsonl:151: broken JSON .*; mend the row and go on from .*checkpoint-\d+ with: graphlora train"
    )
    with pytest.raises(GraphLoraError, match=message):
        train(Recipe.from_dict(options))
    path.write_text("".join(lines))
    assert train(Recipe.from_dict(options), resume=True).metrics["steps"] == 30


def test_a_missing_validation_row_is_explained(streamed_recipe, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(3)))
    with pytest.raises(GraphLoraError, match="has no validation rows; add some, or set eval_strategy to no"):
        train(Recipe.from_dict(streamed_recipe | {"task": str(path)}))


LAUNCH = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.mark.slow
def test_two_processes_stream_and_one_goes_on(streamed_recipe, tmp_path):
    options = streamed_recipe | {"max_steps": -1, "num_train_epochs": 1, "save_steps": 4}
    options["training_args"] = options["training_args"] | {"dataloader_num_workers": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_dict(options).to_yaml())
    words = ["2", "-m", "graphlora.cli", "train", "--config", str(path)]
    done = subprocess.run(
        [*LAUNCH, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    out = Path(options["output_dir"])
    record = RunRecord.read(out / "record.json").metrics
    assert record["steps"] == -(-record["rows"] // 16)
    last = max((out / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    place = json.loads((last / PLACE_FILE).read_text())["row"]
    for name in ("record.json", "adapter_model.safetensors"):
        (out / name).unlink()
    alone = train(Recipe.from_dict(options | {"gradient_accumulation_steps": 4}), resume=True)
    left = record["rows"] - place
    assert alone.metrics["rows_taken"] == record["rows"]
    assert alone.metrics["steps"] == int(last.name.split("-")[1]) + -(-left // 16)
