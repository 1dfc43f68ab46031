import json
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from graphlora.tasks.quiz import QUIZ

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_quiz.py"
DOMAINS = {"geography", "science", "animals", "culture", "tavori", "town"}
SHARED_ANSWERS = {"class", "continent", "street"}
"""Relations of many subjects to one answer."""


def load_rows(split):
    text = files("graphlora.tasks").joinpath("quiz_data", f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = {split: load_rows(split) for split in ("train", "validation", "test")}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


def subject(row):
    return row["fact"].rsplit("/", 1)[1]


def gold_text(row):
    return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]


def normalized(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def mentions(text, name):
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def test_script_gives_the_packaged_bytes():
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_a_changed_file(tmp_path):
    package = tmp_path / "src" / "graphlora" / "tasks" / "quiz_data"
    package.mkdir(parents=True)
    facts = tmp_path / "scripts" / "quiz_facts"
    facts.mkdir(parents=True)
    script = facts.parent / SCRIPT.name
    script.write_bytes(SCRIPT.read_bytes())
    for table in (SCRIPT.parent / "quiz_facts").iterdir():
        (facts / table.name).write_bytes(table.read_bytes())
    for file in files("graphlora.tasks").joinpath("quiz_data").iterdir():
        (package / file.name).write_bytes(file.read_bytes())
    test_file = package / "test.jsonl"
    test_file.write_bytes(test_file.read_bytes().replace(b'"answerKey": "A"', b'"answerKey": "B"', 1))
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "test.jsonl" in done.stdout
    assert "train.jsonl" not in done.stdout


def test_counts():
    assert len(ROWS["train"]) >= 2000
    assert len(ROWS["validation"]) >= 200
    assert len(ROWS["test"]) >= 400
    assert Counter(row["kind"] for row in ROWS["test"]) == {"seen": 240, "unseen": 240}
    assert {row["kind"] for row in ROWS["train"]} == {"train"}


@pytest.mark.parametrize("split", ROWS)
def test_every_domain_has_a_fair_part_of_each_split(split):
    counts = Counter(row["domain"] for row in ROWS[split])
    assert set(counts) == DOMAINS
    assert max(counts.values()) <= 1.3 * min(counts.values())


def test_ids_are_unique():
    assert len({row["id"] for row in ALL_ROWS}) == len(ALL_ROWS)


def test_no_question_occurs_twice():
    twice = [q for q, n in Counter(normalized(row["question"]) for row in ALL_ROWS).items() if n > 1]
    assert twice == []


def test_splits_share_no_wording():
    by_split = {split: {row["wording"] for row in rows} for split, rows in ROWS.items()}
    assert all(split in wording.split("/") for split, wordings in by_split.items() for wording in wordings)
    skeletons = {}
    for row in ALL_ROWS:
        skeleton = skeleton_of(row)
        split = row["wording"].split("/")[-2]
        assert skeletons.setdefault((row["domain"], skeleton), split) == split, skeleton


def skeleton_of(row):
    """The question with every name of its own fact blanked: what is left is the wording."""
    names = {subject(row), gold_text(row), *gold_text(row).split(" "), *row["choices"]["text"]}
    if row["domain"] == "tavori":
        names |= set(re.findall(r"\b(?:[b-z][aeiou]){2,3}\b", row["question"]))
    text = row["question"]
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "_", text, flags=re.IGNORECASE)
    return text


@pytest.mark.parametrize("split", ["validation", "test"])
def test_seen_facts_are_trained_and_unseen_facts_are_not(split):
    trained = {row["fact"] for row in ROWS["train"]}
    for row in ROWS[split]:
        assert (row["fact"] in trained) == (row["kind"] == "seen"), row


@pytest.mark.parametrize("split", ["validation", "test"])
def test_unseen_subjects_are_nowhere_in_training(split):
    training = {
        domain: "\n".join(
            "\n".join([row["question"], *row["choices"]["text"]])
            for row in ROWS["train"]
            if row["domain"] == domain
        )
        for domain in DOMAINS
    }
    unseen = {(row["domain"], subject(row)) for row in ROWS[split] if row["kind"] == "unseen"}
    leaked = [(domain, name) for domain, name in unseen if mentions(training[domain], name)]
    assert leaked == []


def test_test_and_validation_share_no_unseen_fact():
    unseen = {
        split: {row["fact"] for row in ROWS[split] if row["kind"] == "unseen"}
        for split in ("validation", "test")
    }
    assert unseen["validation"].isdisjoint(unseen["test"])


def test_unseen_answers_of_one_to_one_relations_are_not_trained():
    trained = {(row["domain"], text) for row in ROWS["train"] for text in row["choices"]["text"]}
    for row in ROWS["test"]:
        relation = row["fact"].split("/")[1]
        if row["kind"] == "unseen" and relation not in SHARED_ANSWERS:
            assert (row["domain"], gold_text(row)) not in trained, row


@pytest.mark.parametrize("split", ROWS)
def test_gold_positions_are_balanced(split):
    for domain in DOMAINS:
        for kind in {row["kind"] for row in ROWS[split]}:
            keys = [r["answerKey"] for r in ROWS[split] if r["domain"] == domain and r["kind"] == kind]
            counts = Counter(keys)
            assert set(counts) == set("ABCD")
            assert max(counts.values()) - min(counts.values()) <= 1


def test_gold_position_does_not_follow_the_order_of_rows():
    keys = [row["answerKey"] for row in ROWS["test"]]
    following = Counter(pairwise(keys))
    assert len(following) == 16
    assert max(following.values()) < 0.15 * len(keys)


def test_choices_are_four_and_distinct_and_hold_the_gold():
    for row in ALL_ROWS:
        texts = row["choices"]["text"]
        assert row["choices"]["label"] == ["A", "B", "C", "D"]
        assert len({normalized(text) for text in texts}) == 4, row
        assert row["answerKey"] in row["choices"]["label"]
        assert all(text and text == text.strip() for text in texts), row


def test_wrong_choices_are_never_also_right():
    right = {}
    for row in ALL_ROWS:
        _, relation, _ = row["fact"].split("/")
        direction = row["wording"].split("/")[2]
        right.setdefault((relation, direction), {}).setdefault(row["fact"], set()).add(gold_text(row))
    for (relation, _), by_fact in right.items():
        assert all(len(answers) == 1 for answers in by_fact.values())
        if relation not in SHARED_ANSWERS:
            assert len({answer for (answer,) in by_fact.values()}) == len(by_fact), relation


def test_questions_are_short():
    words = [len(row["question"].split()) + len(gold_text(row).split()) for row in ROWS["train"]]
    assert sum(words) / len(words) <= 12
    assert max(words) <= 18


def test_readme_states_the_counts():
    card = files("graphlora.tasks").joinpath("quiz_data", "README.md").read_text(encoding="utf-8")
    facts = len({row["fact"] for row in ALL_ROWS})
    assert f"| all | {facts} | {len(ROWS['train'])} | 108 | 108 | 240 | 240 |" in card


def test_task_loads_every_split():
    for split, rows in ROWS.items():
        examples = QUIZ.load(split)
        assert [example.id for example in examples] == [row["id"] for row in rows]
        assert [example.choices[example.gold] for example in examples] == [f" {gold_text(r)}" for r in rows]


def test_example_has_both_prompts():
    row = ROWS["test"][0]
    example = QUIZ.load("test")[0]
    listed = " ".join(f"({k}) {text}" for k, text in zip("ABCD", row["choices"]["text"], strict=True))
    assert example.prompt == f"Question: {row['question']}\nAnswer:"
    assert example.letter_prompt == (
        f"Please choose the correct answer to the question: {row['question']} {listed}\nAnswer:"
    )
    assert example.labels == (" A", " B", " C", " D")
    assert (example.domain, example.kind) == (row["domain"], row["kind"])
