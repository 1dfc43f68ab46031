"""One evaluation as a record, and what it cost."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from graphlora.errors import GraphLoraError
from graphlora.evaluation.efficiency import count_parameters, measure, peak_resident
from graphlora.evaluation.run import evaluate
from graphlora.records import RunRecord

# PEFT still asks for a name that transformers has renamed.


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "question": f"sky {number}?",
            "choices": ["blue", "green"],
            "answer": number % 2,
            "domain": "ab"[number % 2],
        }
        for number in range(12)
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_evaluation_writes_its_record_and_its_items(model, tokenizer, data, tmp_path):
    output, items = tmp_path / "out" / "run.json", tmp_path / "out" / "items.jsonl"
    record = evaluate(
        model, tokenizer, data, "all", limit=10, seed=3, output=output, items=items, progress=False
    )
    assert RunRecord.read(output) == record
    assert len(items.read_text().splitlines()) == record.metrics["n"] == 10
    assert set(record.metrics["domains"]) == {"a", "b"}
    assert record.config == {
        "model": "LlamaForCausalLM",
        "task": data,
        "split": "all",
        "scoring": "cloze",
        "limit": 10,
        "seed": 3,
        "truncate": False,
    }
    assert (record.kind, record.device, record.dtype, record.seed) == ("evaluation", "cpu", "float32", 3)
    assert record.metrics["efficiency"]["tokens_per_second"] > 0
    assert record.metrics["efficiency"]["total_parameters"] == sum(
        weight.numel() for weight in model.parameters()
    )
    assert record.wall_time > 0


def test_the_same_call_gives_the_same_result_and_hashes(model, tokenizer, data):
    first, second, other = (
        evaluate(model, tokenizer, data, "all", limit=8, seed=seed, scoring="letter", progress=False)
        for seed in (0, 0, 1)
    )
    assert (first.config_hash, first.data_hash) == (second.config_hash, second.data_hash)
    assert {**first.metrics, "efficiency": 0} == {**second.metrics, "efficiency": 0}
    assert (first.config_hash, first.data_hash) != (other.config_hash, other.data_hash)
    assert "acc_norm" not in first.metrics


def test_free_text_cannot_be_scored(model, tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(GraphLoraError, match=r"text\.jsonl has no choices"):
        evaluate(model, tokenizer, str(path), "all", progress=False)


def test_parameters_of_a_loaded_adapter_count_as_trained():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    plain[1].requires_grad_(False)
    assert (count_parameters(plain).trained, count_parameters(plain).total) == (20, 36)
    wrapped = get_peft_model(plain, LoraConfig(target_modules=["0"], r=2))
    assert count_parameters(wrapped).trained == 16
    wrapped.requires_grad_(False)
    assert (count_parameters(wrapped).trained, count_parameters(wrapped).total) == (16, 52)


def test_cost_measures_time_speed_and_memory():
    with measure(torch.device("cpu")) as cost:
        cost.samples, cost.tokens = 4, 100
        torch.ones(200, 200) @ torch.ones(200, 200)
    summary = cost.summary()
    assert cost.wall_time > 0
    assert summary["tokens_per_second"] == pytest.approx(25 * summary["samples_per_second"], rel=1e-3)
    assert 10**7 < cost.peak_memory <= peak_resident() < 10**12
