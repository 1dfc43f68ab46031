"""Mixtures: shares, size, order, repeats."""

import json
from collections import Counter

import pytest

from graphlora.errors import GraphLoraError
from graphlora.tasks import Mixture, load_mixture


@pytest.fixture
def sources(tmp_path):
    paths = []
    for name, size in (("a", 30), ("b", 100)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": f"{name}{n}", "completion": "c"}) + "\n" for n in range(size))
        )
        paths.append(str(path))
    return paths


def test_without_a_limit_nothing_repeats_and_the_first_source_to_run_out_sets_the_size(sources):
    a, b = sources
    items = load_mixture({a: 1, b: 2}, "all")
    assert Counter(item.domain for item in items) == {a: 30, b: 60}
    assert len({item.id for item in items}) == 90
    assert all(item.id.startswith(f"{item.domain}/") for item in items)


def test_a_limit_sets_the_size_and_small_sources_repeat_in_whole_passes(sources):
    a, b = sources
    items = load_mixture({a: 3, b: 1}, "all", limit=101)
    assert Counter(item.domain for item in items) == {a: 76, b: 25}
    repeats = Counter(item.id for item in items if item.domain == a)
    assert set(repeats.values()) == {2, 3}


def test_the_seed_decides_choice_and_order(sources):
    weights = dict.fromkeys(sources, 1)
    first, again, other = (load_mixture(weights, "all", limit=20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    domains = [item.domain for item in first]
    assert domains != sorted(domains)


@pytest.mark.parametrize("weight", [0, -1, "2", True, float("nan"), float("inf")])
def test_a_weight_must_be_a_number_above_zero(weight):
    with pytest.raises(GraphLoraError, match="gives 'quiz' the weight"):
        Mixture({"quiz": weight})


def test_an_empty_mixture_and_a_limit_below_one_are_refused():
    with pytest.raises(GraphLoraError, match="mixture is empty"):
        Mixture({})
    with pytest.raises(GraphLoraError, match="limit is 0"):
        load_mixture({"quiz": 1}, "train", limit=0)


def test_an_unknown_task_is_named_before_anything_is_loaded(tmp_path):
    with pytest.raises(GraphLoraError, match="unknown task 'nope'; choose one of"):
        load_mixture({str(tmp_path / "missing.jsonl"): 2, "nope": 1}, "train")
