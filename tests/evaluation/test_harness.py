"""lm-evaluation-harness and our own scoring answer the same items with the same likelihoods."""

import copy
import json
from functools import partial
from importlib.metadata import version
from importlib.resources import files

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import adapter_config, make_base, wake
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from graphlora.errors import GraphLoraError
from graphlora.evaluation.harness import compared, run_harness
from graphlora.evaluation.harness_tasks import DEFINITIONS, load_harness_tasks
from graphlora.evaluation.multiple_choice import score_examples, summarize
from graphlora.records import provenance

pytest.importorskip("lm_eval")
COLORS = ("blue", "green", "very grey", "deep sea green")


def arc_rows(count=12):
    """Rows with 3 or 4 choices of different lengths, labelled by letters or numbers."""
    rows = []
    for number in range(count):
        texts = [*COLORS[number % 4 :], *COLORS[: number % 4]][: 3 + number % 2]
        labels = list("ABCD" if number % 3 else "1234")[: len(texts)]
        rows.append(
            {
                "id": f"arc-{number}",
                "question": f"is the sky or the {'very ' * (number % 5)}deep sea {number}?",
                "choices": {"text": texts, "label": labels},
                "answerKey": labels[number % len(labels)],
            }
        )
    return rows


def siqa_rows(count=12):
    return [
        {
            "context": f"the grass is {COLORS[number % 4]} {{{{ braces }}}} % {number}.",
            "question": "what is the question?",
            "answerA": "the sky",
            "answerB": f"choose {COLORS[(number + 1) % 4]}",
            "answerC": "2019-01-01",
            "label": str(1 + number % 3),
        }
        for number in range(count)
    ]


OTHER_ROWS = {
    "boolq": ("validation", [{"question": f"is {n}", "answer": n % 3 > 0, "passage": "sea. " * n} for n in range(11)]),
    "piqa": ("validation", [{"goal": f"sky {n}", "sol1": "green", "sol2": "a sea", "label": n % 2} for n in range(5)]),
    "openbookqa": (
        "test",
        [{"question_stem": row.pop("question"), **row} for row in arc_rows(5)],
    ),
    "winogrande": (
        "validation",
        [
            {"sentence": f"the _ is {n} deep sea", "option1": "sky", "option2": "grass", "answer": str(1 + n % 2)}
            for n in range(5)
        ],
    ),
    "hellaswag": (
        "validation",
        [
            {
                "ind": n,
                "activity_label": "Sea",
                "ctx_a": "the [header] sky.",
                "ctx_b": "grass",
                "endings": ["is [title] blue", "is  deep", "a", f"grey {n}"],
                "label": str(n % 4),
            }
            for n in range(5)
        ],
    ),
}  # fmt: skip


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "arc_easy", "test", arc_rows())
    write(folder / "social_iqa", "validation", siqa_rows())
    for name, (split, rows) in OTHER_ROWS.items():
        write(folder / name, split, rows)
    return folder


@pytest.fixture
def adapted(tokenizer):
    """A random model with a GraphLoRA adapter that changes its outputs."""
    torch.set_num_threads(1)
    base = make_base(vocab_size=len(tokenizer), max_position_embeddings=256)
    model = get_peft_model(base, adapter_config())
    wake(model)
    return model.eval()


def both(model, tokenizer, tasks, **options):
    """The harness's result and our own items, per task."""
    found = run_harness(model, tokenizer, tasks, **options)
    own = {
        task.name: score_examples(model, tokenizer, task.examples, progress=False, tokens_per_batch=300)
        for task in tasks
    }
    return {name: (result, own[name]) for name, result in found.items()}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_two_tasks_agree_item_by_item(adapted, tokenizer, data_dir, batch_size):
    tasks = load_harness_tasks(["arc_easy", "siqa"], "test", data_dir=data_dir)
    for task, (found, own) in zip(
        tasks, both(adapted, tokenizer, tasks, batch_size=batch_size).values(), strict=True
    ):
        assert len(found.items) == len(own) == 12
        for theirs, ours in zip(found.items, own, strict=True):
            assert (theirs.id, theirs.gold) == (ours.id, ours.gold)
            assert theirs.scores == pytest.approx(ours.scores, abs=1e-4)
            assert (theirs.prediction, theirs.prediction_norm) == (ours.prediction, ours.prediction_norm)
            assert theirs.tokens == ours.tokens
        summary = summarize(own)
        assert 0 < summary["acc_norm"] < 1, task.name
        for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
            assert found.summary[metric] == pytest.approx(summary[metric], abs=1e-12)
        assert found.summary["n"] == 12
        comparison = compared(found.items, own)
        assert comparison["different"] == []
        assert comparison["largest_gap"] < 1e-4


def test_the_adapter_is_active_unless_switched_off(adapted, tokenizer, data_dir):
    tasks = load_harness_tasks(["arc_easy"], "test", data_dir=data_dir)
    on = run_harness(adapted, tokenizer, tasks)["arc_easy"].items
    with adapted.disable_adapter():
        off, own_off = both(adapted, tokenizer, tasks)["arc_easy"]
    again = run_harness(adapted, tokenizer, tasks)["arc_easy"].items
    assert on == again
    assert compared(on, off.items)["largest_gap"] > 0.1
    assert compared(off.items, own_off)["largest_gap"] < 1e-4


def test_every_definition_of_the_harness_reads_our_rows(adapted, tokenizer, data_dir, tmp_path):
    names = [*OTHER_ROWS, "boolq_no_passage"]
    tasks = load_harness_tasks(names, "test", data_dir=data_dir)
    for name, (found, own) in both(adapted, tokenizer, tasks).items():
        assert [item.gold for item in found.items] == [item.gold for item in own]
        assert compared(found.items, own)["different"] == [], name
        assert compared(found.items, own)["largest_gap"] < 1e-4
        assert found.summary["acc"] == summarize(own)["acc"]
        if name == "winogrande":
            assert "acc_norm" not in found.summary
        else:
            assert found.summary["acc_norm"] == summarize(own)["acc_norm"]
    assert {*OTHER_ROWS, "arc_easy", "social_iqa", "arc_challenge"} == set(DEFINITIONS)


def test_own_data_and_the_quiz_get_a_definition(adapted, tokenizer, tmp_path):
    path = tmp_path / "facts.jsonl"
    rows = [
        {"question": f"day {n}?", "choices": ["2001-01-01", "2002-02-02"], "answer": n % 2} for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = load_harness_tasks([str(path)], "all", limit=4, seed=1)
    quiz = load_harness_tasks(["quiz"], "test", limit=15)
    for (found, own), count in zip(
        (both(adapted, tokenizer, facts) | both(adapted, tokenizer, quiz)).values(), (4, 15), strict=True
    ):
        assert len(own) == count
        assert compared(found.items, own)["different"] == []
        expected = summarize(own)
        assert found.summary["acc_norm"] == expected["acc_norm"]
        assert found.summary.get("kinds") == expected.get("kinds")
        assert compared(found.items, own)["largest_gap"] < 1e-4
    assert set(found.summary["kinds"]) <= {"seen", "unseen"}


def test_scores_are_in_float32_under_a_bfloat16_model(adapted, tokenizer, data_dir):
    model = adapted.to(torch.bfloat16)
    tasks = load_harness_tasks(["arc_easy"], "test", data_dir=data_dir)
    found = run_harness(model, tokenizer, tasks)["arc_easy"]
    scores = torch.tensor([score for item in found.items for score in item.scores])
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_tokenizer_that_begins_texts_with_a_token_agrees(adapted, tokenizer, data_dir):
    begins = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), bos_token="<s>", eos_token="</s>"
    )
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)]
    )
    assert begins("sky").input_ids == [begins.bos_token_id, *tokenizer("sky").input_ids]
    tasks = load_harness_tasks(["arc_easy"], "test", data_dir=data_dir)
    found, own = both(adapted, begins, tasks)["arc_easy"]
    assert compared(found.items, own)["largest_gap"] < 1e-4
    assert compared(found.items, score_examples(adapted, tokenizer, tasks[0].examples))["largest_gap"] > 0.01


def test_a_prompt_beyond_the_window_is_cut_only_on_demand(tokenizer, data_dir):
    model = make_base(vocab_size=len(tokenizer), max_position_embeddings=40)
    tasks = load_harness_tasks(["social_iqa"], "test", data_dir=data_dir)
    with pytest.raises(GraphLoraError, match="window is 40"):
        run_harness(model, tokenizer, tasks)
    found = run_harness(model, tokenizer, tasks, truncate=True)["social_iqa"]
    own = score_examples(model, tokenizer, tasks[0].examples, truncate=True, progress=False)
    assert found.summary["truncated"] == sum(item.truncated for item in own) > 0
    assert compared(found.items, own)["largest_gap"] < 1e-4


def test_the_model_is_left_as_it_was(adapted, tokenizer, data_dir):
    adapted.train()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    run_harness(adapted, tokenizer, load_harness_tasks(["arc_easy"], "test", data_dir=data_dir, limit=3))
    assert adapted.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
)
def test_other_adapters_of_peft_and_replaced_heads_work(tokenizer, data_dir):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(make_base(vocab_size=len(tokenizer), tie_word_embeddings=True), config)
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if "modules_to_save" in n).mul_(3)
    tasks = load_harness_tasks(["arc_easy"], "test", data_dir=data_dir)
    own_before = score_examples(model, tokenizer, tasks[0].examples, progress=False)
    found, own = both(model, tokenizer, tasks)["arc_easy"]
    assert compared(own, own_before)["largest_gap"] < 1e-4
    assert compared(found.items, own)["largest_gap"] < 1e-4


def test_a_difference_is_found(adapted, tokenizer, data_dir):
    tasks = load_harness_tasks(["arc_easy"], "test", data_dir=data_dir)
    found, own = both(adapted, tokenizer, tasks)["arc_easy"]
    with adapted.disable_adapter():
        other = score_examples(adapted, tokenizer, tasks[0].examples, progress=False)
    different = compared(found.items, other)["different"]
    expected = sum(a.prediction != b.prediction for a, b in zip(own, other, strict=True))
    assert sum(entry["metric"] == "acc" for entry in different) == expected > 0
    with pytest.raises(GraphLoraError, match="same items"):
        compared(found.items, own[1:])


@pytest.fixture
def few_tasks(monkeypatch, tmp_path):
    """The harness's list of tasks, cut to SciQ and a group of it, so that it is read at once; with SciQ's data."""
    import lm_eval.tasks

    group = {"group": "mine", "task": ["sciq"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "mine.yaml").write_text(json.dumps(group))
    places = [str(files("lm_eval") / "tasks" / "sciq"), str(tmp_path / "groups")]
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=places)

    def manager(include_defaults=True):
        return few() if include_defaults else lm_eval.tasks.manager.TaskManager(include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    row = {"support": "the sky is blue.", "correct_answer": "blue"}
    row |= {f"distractor{place}": COLORS[place] for place in (1, 2, 3)}
    for split in ("train", "validation", "test"):
        rows = [row | {"question": f"sky {number}?"} for number in range(6)]
        write(tmp_path / "allenai" / "sciq", split, rows)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("few_tasks")
def test_a_task_of_the_harness_has_its_own_data_and_metrics(adapted, tokenizer):
    (task,) = load_harness_tasks(["sciq"], "test")
    assert task.examples is None
    found = run_harness(adapted, tokenizer, [task], limit=4)
    assert set(found) == {"sciq"}
    assert found["sciq"].items is None
    assert found["sciq"].summary["n"] == 4
    metrics = {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(found["sciq"].summary) == metrics | {"n", "task_version"}


@pytest.mark.usefixtures("few_tasks")
def test_a_group_of_the_harness_comes_with_its_tasks(adapted, tokenizer):
    found = run_harness(adapted, tokenizer, load_harness_tasks(["mine"], "test"))
    assert list(found) == ["mine", "sciq"]
    assert found["mine"].summary["acc"] == found["sciq"].summary["acc"]
    assert found["mine"].summary["n"] == found["sciq"].summary["n"] == 6


@pytest.mark.usefixtures("few_tasks")
def test_an_unknown_task_is_refused_with_names_that_are_near():
    with pytest.raises(
        GraphLoraError, match=r"unknown task 'sciqq', to graphlora and .* did you mean sciq\?"
    ):
        load_harness_tasks(["sciqq"], "test")


def test_mistakes_are_refused(adapted, tokenizer, data_dir, tmp_path, monkeypatch):
    with pytest.raises(GraphLoraError, match="no test file"):
        load_harness_tasks(["arc_challenge"], "test", data_dir=data_dir)
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(GraphLoraError, match=r"text\.jsonl has no choices"):
        load_harness_tasks([str(text)], "all")
    mixed = [row | ({"question": 3} if number else {}) for number, row in enumerate(arc_rows(3))]
    write(tmp_path / "arc_easy", "test", mixed)
    with pytest.raises(GraphLoraError, match="rows of arc_easy have columns of mixed types"):
        load_harness_tasks(["arc_easy"], "test", data_dir=tmp_path)
    tasks = load_harness_tasks(["arc_easy"], "test", data_dir=data_dir, limit=2)
    with pytest.raises(GraphLoraError, match="batch_size is 0"):
        run_harness(adapted, tokenizer, tasks, batch_size=0)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(GraphLoraError, match=r"not installed; pip install 'graphlora\[harness\]'"):
        load_harness_tasks(["arc_easy"], "test", data_dir=data_dir)


def test_provenance_names_the_harness():
    assert provenance()["versions"]["lm_eval"] == version("lm_eval")
