"""Packed rows: no token sees another document, and what fills a row up to its bucket counts nowhere."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import PAD, VOCAB, assert_same, gradients, loads, make_base, make_model

from graphlora.training import Recipe, run, train, trainer_setup
from graphlora.training.bucketing import (
    TOKEN_MASK,
    Bucketed,
    bucket_length,
    bucket_positions,
    packed_attention_mask,
    packed_length,
)
from graphlora.training.data import IGNORED, AnswerLogits, packing_collator

LENGTHS = (7, 12, 4)


def documents(seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [IGNORED] * (len(row) // 2) + row[len(row) // 2 :]} for row in rows]


def inputs_of(batch: dict, attention: str) -> dict:
    """What the trainer gives the model; it sets use_cache, without which transformers sees no documents."""
    batch = {**batch, "use_cache": False}
    counted = batch.pop(TOKEN_MASK, None)
    if counted is not None:
        dtype = torch.float32 if attention == "eager" else None
        batch["attention_mask"] = packed_attention_mask(batch["position_ids"], counted, dtype)
    return batch


@pytest.fixture(params=["sdpa", "eager"])
def attention(request) -> str:
    return request.param


def adapted(attention: str) -> torch.nn.Module:
    base = make_base()
    base.set_attn_implementation(attention)
    return make_model(base=base)


COLLATORS = {
    "packed": packing_collator(),
    "filled": Bucketed(packing_collator(), PAD, packing=True),
}


@pytest.mark.parametrize("how", COLLATORS)
def test_each_document_has_the_logits_that_it_has_alone(attention, how):
    model = adapted(attention).eval()
    rows = documents()
    batch = inputs_of(COLLATORS[how](rows), attention)
    with torch.no_grad():
        together = model(**batch).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    assert together.shape[0] == (sum(LENGTHS) if how == "packed" else 32)
    torch.testing.assert_close(together[: len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", COLLATORS)
def test_no_token_depends_on_another_document(attention, how):
    """Changing the middle document changes the logits of its own tokens alone."""
    model = adapted(attention).eval()
    rows, others = documents(0), documents(0)
    others[1] = documents(1)[1]
    with torch.no_grad():
        one, other = (model(**inputs_of(COLLATORS[how](r), attention)).logits[0] for r in (rows, others))
    changed = (one - other).abs().amax(dim=-1) > 1e-6
    first, second = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    assert changed[first:second].all()
    assert not changed[:first].any()
    assert not changed[second : sum(LENGTHS)].any()


def test_filling_up_changes_no_loss_gradient_or_load(attention):
    found = []
    for how in COLLATORS.values():
        model = adapted(attention)
        batch = AnswerLogits(how, bucket_positions)(documents())
        out = model(**inputs_of(batch, attention), num_items_in_batch=torch.tensor(11))
        out.loss.backward()
        found.append(
            ({"loss": out.loss.detach(), "aux": out.aux_loss.detach()}, gradients(model), loads(model))
        )
    (losses, grads, counted), (filled_losses, filled_grads, filled_counted) = found
    assert_same(losses, filled_losses, 1e-6)
    assert_same(grads, filled_grads, 1e-5)
    torch.testing.assert_close(counted, filled_counted)
    assert float(counted.sum()) > 0


def test_packed_rows_count_the_labels_that_padded_rows_count():
    """The first token of a document is predicted by nothing: neither by the document before, nor counted."""
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in documents()]
    expected = sum(len(row["labels"]) - 1 for row in rows)
    for collate in COLLATORS.values():
        for batch in (collate(rows), AnswerLogits(collate)(rows)):
            labels = batch.get("shift_labels", batch["labels"][:, 1:])
            assert int((labels != IGNORED).sum()) == expected


def test_a_filled_row_has_a_last_document_without_labels():
    batch = COLLATORS["filled"](documents())
    length = sum(LENGTHS)
    assert batch["input_ids"].shape == (1, 32)
    assert batch["position_ids"][0, length:].tolist() == list(range(32 - length))
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert batch[TOKEN_MASK].sum() == length


@pytest.mark.parametrize("limit", [None, 60])
def test_padded_rows_are_filled_up_to_the_models_window(limit):
    def collate(rows):
        return {
            name: torch.ones(2, 57, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")
        }

    batch = Bucketed(collate, PAD, packing=False, round_up=partial(bucket_length, limit=limit))([])
    width = 64 if limit is None else 60
    assert {value.shape for value in batch.values()} == {(2, width)}
    assert (batch["input_ids"][:, 57:] == PAD).all()
    assert (batch["attention_mask"][:, 57:] == 0).all()
    assert (batch["labels"][:, 57:] == IGNORED).all()


def test_lengths_are_few_and_waste_little():
    buckets = {bucket_length(length) for length in range(1, 4097)}
    assert len(buckets) == 24
    for length in range(1, 4097):
        assert length <= bucket_length(length) <= max(length + 31, 1.25 * length)
        assert bucket_length(length, limit=length) == length
    assert {packed_length(length) for length in range(1, 4097)} == set(range(64, 4097, 64))
    assert all(0 <= packed_length(length) - length < 64 for length in range(1, 4097))
    assert [bucket_positions(count) for count in (0, 1, 16, 17, 100)] == [16, 16, 16, 32, 128]


@pytest.mark.parametrize(
    ("options", "mode", "device", "attention", "layers", "expected"),
    [
        ({"packing": True}, "eager", "cuda", "sdpa", None, [64, 320, 4096]),
        ({"packing": True}, "eager", "cpu", "sdpa", None, None),
        ({"packing": True}, "eager", "cuda", "flash_attention_2", None, None),
        ({"packing": True}, "eager", "cuda", "sdpa", ["sliding_attention"], None),
        ({"packing": False}, "eager", "cuda", "sdpa", None, None),
        ({"packing": True}, "compile", "cpu", "sdpa", None, [32, 320, 4096]),
        ({"packing": False, "max_length": 260}, "graph", "cuda", "sdpa", None, [32, 260, 4090]),
    ],
)
def test_lengths_are_rounded_up_where_it_pays(options, mode, device, attention, layers, expected):
    config = SimpleNamespace(_attn_implementation=attention, layer_types=layers)
    base = SimpleNamespace(
        device=torch.device(device), config=SimpleNamespace(get_text_config=lambda: config)
    )
    recipe = Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out"} | options)
    round_up = trainer_setup._lengths(recipe, SimpleNamespace(get_base_model=lambda: base), mode)
    assert (None if round_up is None else [round_up(n) for n in (20, 258, 4090)]) == expected


def test_padded_packed_and_filled_runs_learn_the_same(tiny_recipe, monkeypatch):
    """The same rows, seen alone or among others, give the same losses and count the same tokens."""
    options = {"method": "graphlora", "num_experts": 4, "router_hidden_size": 16, "lora_dropout": 0.0}
    recipe = Recipe.from_dict(tiny_recipe | options)
    seen = []
    make = run.make_trainer

    def remember(*args, **kwargs):
        seen.append(make(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(run, "make_trainer", remember)
    results = [train(recipe), train(recipe.changed(packing=True), overwrite=True)]
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: "graph")
    results += [train(recipe.changed(packing=packing), overwrite=True) for packing in (False, True)]
    # As on a GPU, whose attention wants few lengths.
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: "eager")
    monkeypatch.setattr(trainer_setup, "_lengths", lambda *_: packed_length)
    results += [train(recipe.changed(packing=True), overwrite=True)]
    assert [result.metrics["step_mode"] for result in results] == [
        "eager",
        "eager",
        "graph",
        "graph",
        "eager",
    ]
    assert len({int(trainer.tokens_seen) for trainer in seen}) == 1
    assert int(seen[0].tokens_seen) > 0
    for name in ("train_loss", "eval_loss", "eval_acc"):
        values = [result.metrics[name] for result in results]
        assert values == pytest.approx([values[0]] * 5, rel=1e-3), name
