"""The user's own data: shapes, splits, and the one line that each mistake gets."""

import csv
import json

import pytest
from datasets.exceptions import DatasetNotFoundError

from graphlora.errors import GraphLoraError
from graphlora.tasks import Example, TextExample, custom, load_examples

CHOICES = {"question": "Sky?", "choices": ["blue", "green"], "answer": "blue"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one(tmp_path, row):
    (item,) = load_examples(jsonl(tmp_path / "a.jsonl", [row]), "all")
    return item


def test_prompt_and_completion(tmp_path):
    item = one(tmp_path, {"prompt": "Say hi.", "completion": " hi", "domain": "talk", "id": 7})
    assert item == TextExample(id="7", prompt="Say hi.", completion=" hi", domain="talk")


def test_messages(tmp_path):
    assert one(tmp_path, {"messages": CHAT}) == TextExample(id="0", messages=tuple(CHAT))


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        (CHOICES, 0),
        ({**CHOICES, "answer": "B"}, 1),
        ({**CHOICES, "answer": 1}, 1),
        ({**CHOICES, "answer": "1"}, 1),
        ({**CHOICES, "choices": ["1", "0"], "answer": "1"}, 0),
        ({**CHOICES, "choices": ["1", "0"], "answer": 1}, 1),
        ({**CHOICES, "choices": {"text": ["blue", "green"], "label": ["1", "2"]}, "answer": "1"}, 0),
        ({**CHOICES, "choices": {"text": ["blue", "green"], "label": [1, 2]}, "answer": 2}, 1),
        ({"question": "Sky?", "choices": ["blue", "green"], "answerKey": "A"}, 0),
        ({"question": "Sky?", "A": "blue", "B": "green", "answer": "B"}, 1),
        ({"question": "Sky?", "A": "blue", "B": "green", "C": "", "answer": "green"}, 1),
        ({"question": "Sky?", "choice1": "blue", "choice2": "green", "label": 1}, 1),
    ],
)
def test_multiple_choice_answers_as_label_index_or_text(tmp_path, row, gold):
    item = one(tmp_path, row)
    assert isinstance(item, Example)
    assert item.gold == gold
    assert item.prompt == "Question: Sky?\nAnswer:"
    assert len(item.choices) == 2
    assert item.labels == (" A", " B")


def test_csv_with_columns_and_with_a_json_list(tmp_path):
    path = tmp_path / "a.csv"
    for header, row in (
        (["question", "A", "B", "answer"], ["Sky?", "blue", "green", "B"]),
        (["question", "choices", "answer"], ["Sky?", '["blue", "green"]', "green"]),
        (["question", "choices", "answer"], ["Sky?", '["blue", "green"]', "1"]),
    ):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, row])
        (item,) = load_examples(str(path), "all")
        assert (item.choices, item.gold) == ((" blue", " green"), 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "x", "label": 1},
            "columns found: text, label; expected prompt and completion; or messages; or",
        ),
        ({**CHOICES, "answer": "red"}, r"a\.jsonl:2: answer 'red' is not among the choices blue \| green"),
        ({**CHOICES, "answer": 2}, "answer 2 is not among the choices"),
        ({**CHOICES, "answer": -1}, "answer -1 is not among the choices"),
        ({**CHOICES, "answer": None}, "answer None must be a label, an index or a text"),
        ({**CHOICES, "answer": True}, "answer True must be"),
        (
            {**CHOICES, "choices": ["B", "A"], "answer": "A"},
            "fits several of the choices B | A; give its index",
        ),
        ({**CHOICES, "choices": "blue"}, "choices is 'blue'; expected a list"),
        ({**CHOICES, "choices": ["blue", 3]}, "must all be texts"),
        ({**CHOICES, "choices": ["blue"]}, "has 1 choice"),
        ({**CHOICES, "choices": {"text": ["a", "b"], "label": ["A"]}}, "2 texts and 1 labels"),
        ({**CHOICES, "question": 5}, "question is 5; expected text"),
        ({"question": "Sky?", "choices": ["a", "b"]}, "columns found: question, choices"),
        ({"prompt": "x", "completion": ""}, "completion is empty"),
        ({"prompt": None, "completion": "y"}, "prompt is None; expected text"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "has no role of system, user, assistant"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no turn of the assistant"),
        ({"messages": []}, "messages is \\[\\]; expected a list"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_file_and_line(tmp_path, row, message):
    good = next(
        (r for r in ({"prompt": "p", "completion": "c"}, {"messages": CHAT}, CHOICES) if set(r) == set(row)),
        row,
    )
    path = jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(GraphLoraError, match=message.replace("|", r"\|").replace(r"\\|", r"\|")) as caught:
        load_examples(path, "all")
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)


def test_a_row_of_another_shape_than_the_first_names_the_column(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}, {"messages": CHAT}])
    with pytest.raises(GraphLoraError, match=r"a\.jsonl:2: no column 'prompt'; found messages; expected"):
        load_examples(path, "all")


def test_a_file_without_splits_holds_a_tenth_out_and_equal_rows_stay_together(tmp_path):
    rows = [{"prompt": f"p{number % 80}", "completion": "c", "id": number} for number in range(100)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    train, validation = (load_examples(path, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 100
    assert len({item.prompt for item in validation}) == 8
    assert not {item.prompt for item in train} & {item.prompt for item in validation}
    assert len(load_examples(path, "all")) == 100
    longer = jsonl(tmp_path / "b.jsonl", [*rows, {"prompt": "new", "completion": "c"}])
    moved = {item.prompt for item in load_examples(longer, "validation")} ^ {
        item.prompt for item in validation
    }
    assert len(moved) <= 2
    with pytest.raises(
        GraphLoraError, match=r"no rows for split 'test'; found train \(100 rows\); add a file"
    ):
        load_examples(path, "test")


def test_a_split_column_chooses(tmp_path):
    names = ["train", "train", "dev", "test"]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": name, "completion": "c", "split": name} for name in names])
    counts = {split: len(load_examples(path, split)) for split in ("train", "validation", "test", "all")}
    assert counts == {"train": 2, "validation": 1, "test": 1, "all": 4}
    bad = jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c", "split": "later"}])
    with pytest.raises(GraphLoraError, match=r"b\.jsonl:1: split 'later' is unknown"):
        load_examples(bad, "train")


def test_a_folder_of_split_files(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"prompt": f"p{number}", "completion": "c"} for number in range(20)])
    jsonl(tmp_path / "test.jsonl", [{"prompt": "t", "completion": "c"}])
    counts = {
        split: len(load_examples(str(tmp_path), split)) for split in ("train", "validation", "test", "all")
    }
    assert counts == {"train": 18, "validation": 2, "test": 1, "all": 21}
    jsonl(tmp_path / "validation.jsonl", [{"prompt": "v", "completion": "c"}])
    assert len(load_examples(str(tmp_path), "train")) == 20
    assert [item.prompt for item in load_examples(str(tmp_path), "validation")] == ["v"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraphLoraError, match="has no train, validation or test file"):
        load_examples(str(tmp_path / "empty"), "train")


def test_a_hub_data_set_with_and_without_validation(monkeypatch):
    asked = []

    def load_dataset(hub_id, config, split, revision):
        asked.append((hub_id, config, split))
        return [{"prompt": f"{split}{number}", "completion": "c"} for number in range(10)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda hub_id, config: ["train", "test"])
    assert len(load_examples("hub:ann/facts:large", "validation")) == 1
    assert len(load_examples("hub:ann/facts:large", "train")) == 9
    assert asked == [("ann/facts", "large", "train")] * 2
    assert load_examples("hub:ann/facts", "test")[0].prompt == "test0"
    assert asked[-1] == ("ann/facts", None, "test")


def test_a_hub_data_set_that_cannot_be_reached_gets_one_line(monkeypatch):
    def fail(hub_id, config):
        raise DatasetNotFoundError("Dataset 'ann/none' doesn't exist\nmore")

    monkeypatch.setattr("datasets.get_dataset_split_names", fail)
    with pytest.raises(
        GraphLoraError, match="cannot load ann/none from the hub: Dataset 'ann/none' doesn't exist; "
    ):
        load_examples("hub:ann/none", "train")


def test_unknown_split_and_missing_file(tmp_path):
    with pytest.raises(
        GraphLoraError, match="unknown split 'eval'; choose one of train, validation, test, all"
    ):
        custom.load_custom("a.jsonl", "eval")
    with pytest.raises(GraphLoraError, match="no data file at"):
        load_examples(str(tmp_path / "none.jsonl"), "train")
