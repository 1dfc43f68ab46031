"""The best validation is the first best one that counts; what makes validations comparable survives a checkpoint."""

import math

import pytest

from graphlora.training.compared import COMPARED_FILE, Compared, best_validation, read_compared

HISTORY = [
    {"step": 1, "loss": 0.1},
    {"step": 2, "eval_acc": 0.5, "eval_loss": 3.0},
    {"step": 4, "eval_acc": 0.7, "eval_loss": 2.0},
    {"step": 6, "eval_acc": 0.7, "eval_loss": math.nan},
    {"step": 8, "eval_loss": 2.5},
]


@pytest.mark.parametrize(
    ("metric", "greater", "since", "best"),
    [
        ("acc", True, 0, (4, 0.7)),
        ("eval_acc", True, 5, (6, 0.7)),
        ("acc", False, 0, (2, 0.5)),
        ("loss", False, 0, (4, 2.0)),
        ("loss", False, 5, (8, 2.5)),
        ("acc", True, 7, None),
        ("acc_norm", True, 0, None),
    ],
)
def test_the_first_best_one_counts(metric, greater, since, best):
    assert best_validation(HISTORY, metric, greater, None, since) == best


def test_only_checkpoints_that_are_there_count(tmp_path):
    assert best_validation(HISTORY, "acc", True, tmp_path, 0) is None
    (tmp_path / "checkpoint-2").mkdir()
    assert best_validation(HISTORY, "acc", True, tmp_path, 0) == (2, 0.5)


def test_it_is_read_as_it_was_written(tmp_path):
    compared = Compared("a", None, "acc", 3)
    compared.write(tmp_path)
    assert read_compared(tmp_path) == compared


@pytest.mark.parametrize("text", [None, "{", "[]", '{"more": 1}'])
def test_older_checkpoints_do_not_say_it(tmp_path, text):
    if text is not None:
        (tmp_path / COMPARED_FILE).write_text(text)
    assert read_compared(tmp_path) is None
