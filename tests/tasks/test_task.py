"""Every public task on small files in the hub's schemas: prompts, gold positions, splits, leaks."""

import gzip
import json

import pytest
from datasets import Dataset

from graphlora.errors import GraphLoraError
from graphlora.tasks import TASKS, load_examples
from graphlora.tasks.task import holdout, subset

ARC = {
    "id": "q1",
    "question": "What melts?",
    "choices": {"text": ["Ice", "Rock", "Air"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
BOOLQ = {"question": "is ice cold", "answer": True, "passage": "Ice is frozen water."}
BOOK = {
    "id": "b1",
    "question_stem": "Ice is",
    "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
    "answerKey": " B",
}
SIQA = {
    "context": "Ann fell.",
    "question": "How is Ann?",
    "answerA": "sad",
    "answerB": "glad",
    "answerC": "green",
    "label": "1",
}
PIQA = {"goal": "Cut paper", "sol1": "use scissors", "sol2": "use soup", "label": 0}
WINO = {
    "sentence": "The cup fits the box as _ is small.",
    "option1": "the cup",
    "option2": "the box",
    "answer": "1",
}
SWAG = {
    "ind": 7,
    "activity_label": "Roofing",
    "ctx_a": "A man sits. [header] Then",
    "ctx_b": "he",
    "endings": ["stands up [title] Next", "sleeps."],
    "label": "1",
}


def write(folder, task, split, rows):
    (folder / task).mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / task / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def only(tmp_path, task, row, source="test"):
    write(tmp_path, task.replace("_no_passage", ""), source, [row] * (5 if task.startswith("boolq") else 1))
    return load_examples(task, "test", data_dir=tmp_path)[0]


def test_arc_maps_gold_by_position_of_its_label(tmp_path):
    for task in ("arc_easy", "arc_challenge"):
        item = only(tmp_path, task, ARC)
        assert item.prompt == "Question: What melts?\nAnswer:"
        assert item.choices == (" Ice", " Rock", " Air")
        assert (item.id, item.gold, item.labels) == ("q1", 1, (" A", " B", " C"))
        assert item.letter_prompt == (
            "Please choose the correct answer to the question: What melts? (A) Ice (B) Rock (C) Air\nAnswer:"
        )


def test_boolq_with_and_without_its_passage(tmp_path):
    item = only(tmp_path, "boolq", BOOLQ, "validation")
    assert item.prompt == "Ice is frozen water.\nQuestion: is ice cold?\nAnswer:"
    assert (item.choices, item.gold, item.labels) == ((" no", " yes"), 1, (" false", " true"))
    bare = only(tmp_path, "boolq_no_passage", BOOLQ, "validation")
    assert bare.prompt == "Question: is ice cold?\nAnswer:"
    question = "Please answer the following question with true or false: is ice cold?\nAnswer:"
    assert bare.letter_prompt == question
    assert item.letter_prompt == "Ice is frozen water.\n" + question


def test_openbookqa_prompt_is_the_stem(tmp_path):
    item = only(tmp_path, "openbookqa", BOOK)
    assert (item.prompt, item.choices, item.gold) == ("Ice is", (" hot", " cold"), 1)


def test_social_iqa(tmp_path):
    item = only(tmp_path, "social_iqa", SIQA, "validation")
    assert item.prompt == "Q: Ann fell. How is Ann?\nA:"
    assert (item.choices, item.gold) == ((" sad", " glad", " green"), 0)
    assert item.letter_prompt == (
        "Please choose the correct answer to the question.\n"
        "Question: Ann fell. How is Ann?\n(A) sad (B) glad (C) green\nAnswer:"
    )
    assert load_examples("siqa", "test", data_dir=tmp_path) == [item]


def test_piqa(tmp_path):
    item = only(tmp_path, "piqa", PIQA, "validation")
    assert (item.prompt, item.choices, item.gold) == (
        "Question: Cut paper\nAnswer:",
        (" use scissors", " use soup"),
        0,
    )


def test_winogrande_has_a_context_per_choice_and_one_continuation(tmp_path):
    item = only(tmp_path, "winogrande", WINO, "validation")
    assert item.prompts == ("The cup fits the box as the cup", "The cup fits the box as the box")
    assert [item.context(position) for position in (0, 1)] == list(item.prompts)
    assert (item.choices, item.gold) == ((" is small.", " is small."), 0)
    assert "_" in item.letter_prompt


def test_hellaswag_text_is_cleaned(tmp_path):
    item = only(tmp_path, "hellaswag", SWAG, "validation")
    assert item.prompt == "Roofing: A man sits. Then He"
    assert (item.choices, item.gold) == ((" stands up.  Next".replace("  ", " "), " sleeps."), 1)


def test_boolq_validation_is_a_fifth_of_the_published_validation_split(tmp_path):
    write(tmp_path, "boolq", "validation", [{**BOOLQ, "question": f"q{row}"} for row in range(50)])
    parts = [load_examples("boolq", split, data_dir=tmp_path) for split in ("validation", "test")]
    assert [len(part) for part in parts] == [10, 40]
    assert {item.id for part in parts for item in part} == {f"boolq-{row}" for row in range(50)}
    assert parts[0] == load_examples("boolq", "validation", data_dir=tmp_path, seed=3)


@pytest.mark.parametrize(
    ("task", "row", "column"), [("social_iqa", SIQA, "question"), ("piqa", PIQA, "goal")]
)
def test_validation_is_held_out_of_train_where_no_labelled_test_is_public(tmp_path, task, row, column):
    write(tmp_path, task, "train", [{**row, column: f"q{number}"} for number in range(100)])
    write(tmp_path, task, "validation", [{**row, column: "q3"}, {**row, column: "other"}])
    train, validation, test = (
        load_examples(task, split, data_dir=tmp_path) for split in ("train", "validation", "test")
    )
    assert len(test) == 2
    assert len(validation) == 10
    prompts = [{item.prompt for item in part} for part in (train, validation, test)]
    assert not prompts[0] & (prompts[1] | prompts[2])
    assert len(train) in (89, 90)


def test_a_train_row_that_repeats_a_test_row_is_dropped_whatever_the_order_of_its_choices(tmp_path):
    turned = {
        **ARC,
        "id": "t",
        "choices": {"text": ["Rock", "Air", "Ice"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    other = {**ARC, "id": "o", "choices": {"text": ["Wood", "Air"], "label": ["A", "B"]}, "answerKey": "A"}
    write(tmp_path, "arc_easy", "train", [turned, other])
    write(tmp_path, "arc_easy", "test", [ARC])
    assert [item.id for item in load_examples("arc_easy", "train", data_dir=tmp_path)] == ["o"]


def test_hellaswag_train_that_is_not_there_is_said_clearly(tmp_path):
    write(tmp_path, "hellaswag", "validation", [SWAG])
    for split in ("train", "validation"):
        with pytest.raises(
            GraphLoraError, match=f"takes {split} from the published train split, and .*hellaswag"
        ):
            load_examples("hellaswag", split, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "arc_easy",
            {**ARC, "answerKey": "D"},
            r"test\.jsonl\.gz:1: answer 'D' is not among the choices 1, 2, 3",
        ),
        (
            "arc_easy",
            {"id": "x", "question": "?"},
            r"test\.jsonl\.gz:1: .*needs column 'choices'; found id, question",
        ),
        ("arc_easy", {**ARC, "choices": None}, r"test\.jsonl\.gz:1: does not fit the schema"),
        ("arc_easy", {**ARC, "choices": {"text": ["a"], "label": ["2"]}}, "has 1 choice"),
    ],
)
def test_a_row_that_does_not_fit_names_file_and_line(tmp_path, task, row, message):
    write(tmp_path, task, "test", [row])
    with pytest.raises(GraphLoraError, match=message):
        load_examples(task, "test", data_dir=tmp_path)


def test_a_social_iqa_label_out_of_range_is_refused(tmp_path):
    write(tmp_path, "social_iqa", "validation", [{**SIQA, "label": "0"}])
    with pytest.raises(
        GraphLoraError, match=r"validation\.jsonl\.gz:1: .*answer -1 is not among its 3 choices"
    ):
        load_examples("social_iqa", "test", data_dir=tmp_path)


def test_unknown_task_split_and_limit():
    with pytest.raises(
        GraphLoraError, match="unknown task 'arc_hard'; choose one of arc_challenge, arc_easy"
    ):
        load_examples("arc_hard", "test")
    with pytest.raises(GraphLoraError, match="no split 'dev'; choose one of train, validation, test"):
        load_examples("arc_easy", "dev")
    with pytest.raises(GraphLoraError, match="limit is 0"):
        load_examples("quiz", "test", limit=0)


def test_the_quiz_stays_there_when_a_data_dir_without_it_is_given(tmp_path):
    assert load_examples("quiz", "test", data_dir=tmp_path) == load_examples("quiz", "test")


def test_every_task_of_the_hub_is_pinned():
    for task in TASKS.values():
        assert task.embedded or (task.hub_id and task.revision and len(task.revision) == 40), task.name


def test_limits_are_seeded_nested_and_keep_the_order():
    items = list(range(100))
    small, large = subset(items, 10, 0), subset(items, 30, 0)
    assert set(small) < set(large)
    assert large == sorted(large)
    assert small != subset(items, 10, 1)
    assert subset(items, 500, 0) == items


def test_holdout_is_the_choice_of_datasets():
    data = Dataset.from_dict({"row": list(range(57))}).train_test_split(test_size=0.2, seed=42)
    assert holdout(57, 0.2, 42) == sorted(data["test"]["row"])
