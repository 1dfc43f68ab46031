"""The stream of examples: every row once per pass, in an order of its own, entered at any place."""

import itertools
import json
from collections import Counter

import datasets
import pytest

from graphlora.errors import GraphLoraError
from graphlora.tasks.stream import ExampleStream, StreamPlace
from graphlora.tasks.stream_sources import FileSource, HubSource, data_bytes, files_by_split, open_source


def rows(count, start=0, **more):
    return [{"prompt": f"number {n}", "completion": f" {n}", **more} for n in range(start, start + count)]


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


def source(path, count=100, parts=3):
    size = -(-count // parts)
    files = [
        write(path / f"part-{n}.jsonl", rows(min(size, count - n * size), n * size)) for n in range(parts)
    ]
    return FileSource("numbers", tuple(files), "train", holds_out=False)


def stream(*sources, weights=None, block=16, seed=0, **more):
    return ExampleStream(list(sources), weights or [1.0] * len(sources), block, seed, **more)


def taken(stream, count, place=None):
    found = list(itertools.islice(stream.rows(place or StreamPlace()), count))
    return [int(example.completion) for example, _ in found], [place for _, place in found]


def test_each_pass_has_each_row_once_in_another_order(tmp_path):
    numbers, places = taken(stream(source(tmp_path)), 300)
    passes = [numbers[:100], numbers[100:200], numbers[200:]]
    assert [sorted(part) for part in passes] == [list(range(100))] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert [places[at].block.passes for at in (0, 99, 150, 299)] == [0, 1, 1, 3]


def test_the_seed_decides_the_order(tmp_path):
    data = source(tmp_path)
    first, second, other = (taken(stream(data, seed=seed), 100)[0] for seed in (1, 1, 2))
    assert first == second != other
    assert taken(stream(data, block=1), 100)[0] == list(range(100))


def test_rows_move_within_their_block(tmp_path):
    numbers, _ = taken(stream(source(tmp_path, parts=1), block=16), 96)
    for at in range(0, 96, 16):
        assert sorted(numbers[at : at + 16]) == list(range(at, at + 16))
        assert numbers[at : at + 16] != list(range(at, at + 16))


@pytest.mark.parametrize("kind", ["one", "mixture", "hub"])
def test_every_place_leads_to_the_rows_after_it_through_json(tmp_path, kind):
    sources = [source(tmp_path / "a", 30)]
    if kind == "hub":
        sources = [hub_source(30)]
    if kind == "mixture":
        sources.append(source(tmp_path / "b", 11, parts=2))
    whole = stream(*sources, block=7)
    numbers, places = taken(whole, 90)
    for at in (0, 1, 6, 7, 28, 29, 30, 47, 59, 60):
        place = StreamPlace.from_dict(json.loads(json.dumps(places[at].as_dict())))
        assert place.row == at + 1
        assert taken(stream(*sources, block=7), 20, place)[0] == numbers[at + 1 : at + 21]


def hub_source(count):
    def make():
        yield from rows(count)

    return HubSource(
        "owner/name[train]",
        lambda: datasets.IterableDataset.from_generator(make),
        "train",
        False,
        "owner/name",
    )


def test_rows_of_the_hub_stop_at_what_does_not_fit_with_their_number():
    def make():
        yield from rows(3)
        yield {"prompt": 5, "completion": " 5"}

    data = HubSource(
        "o/n[train]", lambda: datasets.IterableDataset.from_generator(make), "train", False, "o/n"
    )
    with pytest.raises(GraphLoraError, match=r"^o/n\[train\]:4: prompt is 5; expected text"):
        taken(stream(data), 4)


def test_a_mixture_has_the_shares_of_its_weights_at_every_point(tmp_path):
    a, b = (
        source(tmp_path / "a", 50),
        FileSource("b", (write(tmp_path / "b.jsonl", rows(20, 1000)),), "train", holds_out=False),
    )
    numbers, _ = taken(stream(a, b, weights=[3, 1], block=1), 80)
    for end in range(4, 81, 4):
        assert sum(number >= 1000 for number in numbers[:end]) == end // 4
    assert max(Counter(numbers[:66]).values()) == 1
    assert stream(a, b, weights=[3, 1]).count() == 66


def test_an_epoch_of_a_mixture_ends_before_the_next_begins(tmp_path):
    sources = [source(tmp_path / "a", 40, parts=1), source(tmp_path / "b", 25, parts=1)]
    mixed = stream(*sources, block=16)
    numbers, _ = taken(stream(*sources, block=16, epoch_rows=mixed.count()), mixed.count())
    assert mixed.count() == 50
    assert Counter(numbers).most_common(1)[0][1] <= 2
    assert sorted(numbers) == sorted([*range(25), *range(25)])


def test_a_hundredth_of_a_single_file_is_held_out_and_the_rest_is_trained_on(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(2000))
    train, validation = (
        [int(item.completion) for item in open_source(str(path), split).one_pass()]
        for split in ("train", "validation")
    )
    assert sorted(train + validation) == list(range(2000))
    assert 5 <= len(validation) <= 40
    assert stream(open_source(str(path), "train")).count() == len(train)


def test_a_column_split_decides_where_there_is_one(tmp_path):
    values = rows(5, split="train") + rows(3, 5, split="dev") + rows(2, 8, split="test")
    path = write(tmp_path / "a.jsonl", values)
    found = {}
    for name in ("train", "validation"):
        found[name] = [int(item.completion) for item in open_source(str(path), name).one_pass()]
    assert found == {"train": [0, 1, 2, 3, 4], "validation": [5, 6, 7]}


def test_files_of_folders_and_patterns(tmp_path):
    for name in ("train-0.jsonl", "train-1.csv", "validation.jsonl", "test/a.jsonl", "README.md"):
        write(tmp_path / "named" / name, rows(1))
    named = files_by_split(str(tmp_path / "named"))
    assert {split: [file.name for file in files] for split, files in named.items()} == {
        "train": ["train-0.jsonl", "train-1.csv"],
        "validation": ["validation.jsonl"],
        "test": ["a.jsonl"],
    }
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "plain" / name, rows(1))
    assert [f.name for f in files_by_split(str(tmp_path / "plain"))["train"]] == ["a.jsonl", "b.jsonl"]
    assert [f.name for f in files_by_split(str(tmp_path / "plain" / "b*.jsonl"))["train"]] == ["b.jsonl"]
    assert data_bytes([str(tmp_path / "plain"), "quiz"]) == 2 * len(json.dumps(rows(1)[0]) + "\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path / "no-*.jsonl"), "no data at .*no-.*; give a file, a folder, or a pattern"),
        (lambda path: str(write(path / "a.json", rows(1))), r"a\.json cannot be streamed"),
        (lambda path: str(write(path / "d" / "validation.jsonl", rows(1)).parent), "has no train files"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, make, message):
    with pytest.raises(GraphLoraError, match=message):
        open_source(make(tmp_path), "train")


def test_files_without_rows_are_refused_and_do_not_loop(tmp_path):
    empty = FileSource("empty", (write(tmp_path / "e.jsonl", []),), "train", holds_out=False)
    with pytest.raises(GraphLoraError, match="empty has no rows for split 'train'"):
        taken(stream(empty), 1)
    full = FileSource("full", (write(tmp_path / "f.jsonl", rows(3)),), "train", holds_out=False)
    with pytest.raises(GraphLoraError, match="no row of full is left: all are too long"):
        taken(stream(full, keeps=lambda example: False), 1)


def test_a_damaged_place_is_refused():
    with pytest.raises(GraphLoraError, match=r"the place in the stream .* is damaged"):
        StreamPlace.from_dict({"row": 3, "block": {"place": []}})


def test_a_named_task_can_be_mixed_in(tmp_path):
    mixed = stream(open_source("quiz", "train"), source(tmp_path, 30), weights=[1, 2], block=1)
    kinds = Counter(type(example).__name__ for example, _ in itertools.islice(mixed.rows(StreamPlace()), 30))
    assert kinds == {"Example": 10, "TextExample": 20}
