"""Packed rows: no token sees another document, and what fills a row up to its bucket counts nowhere."""

from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import PAD, VOCAB, assert_same, gradients, loads, make_base, make_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from graphlora.training import Recipe, run, train, trainer_setup
from graphlora.training.bucketing import Bucketed, bucket_length, bucket_positions
from graphlora.training.data import IGNORED, AnswerLogits, packing_collator
from graphlora.training.origin import batch_rows
from graphlora.training.packing import (
    BLOCKED_SDPA,
    TOKEN_MASK,
    BlockCollator,
    Blocks,
    blocked_attention,
    blocked_sdpa,
    few_shapes,
    first_fit,
    little_filling,
    one_block,
    packed_attention_mask,
)

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


def adapted(attention: str) -> torch.nn.Module:
    base = make_base()
    base.set_attn_implementation(attention)
    return make_model(base=base)


def two_blocks(lengths) -> Blocks:
    """The second row alone, the others behind each other; filled up by one and by two tokens."""
    assert tuple(lengths) == LENGTHS
    return Blocks([[0, 2], [1]], 13)


def alone(lengths) -> Blocks:
    """A block for each row."""
    return Blocks([[row] for row in range(len(lengths))], max(lengths))


COLLATORS = {
    "packed": packing_collator(),
    "filled": BlockCollator(PAD, one_block),
    "blocks": BlockCollator(PAD, two_blocks),
}
# Attention and collator; other attention than sdpa takes no blocks.
WAYS = [("sdpa", "packed"), ("sdpa", "filled"), ("sdpa", "blocks"), ("eager", "packed"), ("eager", "filled")]
# Where each document's tokens are.
PLACES = {
    "packed": [(0, 7), (7, 19), (19, 23)],
    "filled": [(0, 7), (7, 19), (19, 23)],
    "blocks": [(0, 7), (13, 25), (7, 11)],
}


def forward(model, batch: dict, attention: str, **more):
    with blocked_attention(model.get_base_model(), TOKEN_MASK in batch):
        return model(**inputs_of(batch, attention), **more)


@pytest.mark.parametrize(("attention", "how"), WAYS)
def test_each_document_has_the_logits_that_it_has_alone(attention, how):
    model = adapted(attention).eval()
    rows = documents()
    with torch.no_grad():
        together = forward(model, COLLATORS[how](rows), attention).logits[0]
        for row, (start, end) in zip(rows, PLACES[how], strict=True):
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)
    assert together.shape[0] == {"packed": sum(LENGTHS), "filled": 32, "blocks": 26}[how]


@pytest.mark.parametrize(("attention", "how"), WAYS)
def test_no_token_depends_on_another_document(attention, how):
    """Changing the middle document changes the logits of its own tokens alone."""
    model = adapted(attention).eval()
    rows, others = documents(0), documents(0)
    others[1] = documents(1)[1]
    with torch.no_grad():
        one, other = (forward(model, COLLATORS[how](r), attention).logits[0] for r in (rows, others))
    changed = (one - other).abs().amax(dim=-1) > 1e-6
    first, second, third = PLACES[how]
    assert changed[slice(*second)].all()
    assert not changed[slice(*first)].any()
    assert not changed[slice(*third)].any()


@pytest.mark.parametrize(("attention", "how"), [way for way in WAYS if way[1] != "packed"])
def test_filling_up_changes_no_loss_gradient_or_load(attention, how):
    found = []
    for collate in (COLLATORS["packed"], COLLATORS[how]):
        model = adapted(attention)
        batch = AnswerLogits(collate, bucket_positions)(documents())
        out = forward(model, batch, attention, num_items_in_batch=torch.tensor(11))
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
    assert batch["input_ids"].shape == batch[TOKEN_MASK].shape == (1, 32)
    assert batch["position_ids"][0, length:].tolist() == list(range(32 - length))
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert batch[TOKEN_MASK].sum() == length


def test_blocks_hold_the_rows_as_they_are():
    rows = documents()
    batch = COLLATORS["blocks"](rows)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    for row, (start, end) in zip(rows, PLACES["blocks"], strict=True):
        assert ids[start:end].tolist() == row["input_ids"]
        assert labels[start:end].tolist() == [IGNORED, *row["labels"][1:]]
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
    assert batch[TOKEN_MASK].tolist() == [[True] * 11 + [False] * 2, [True] * 12 + [False]]
    assert (ids[~batch[TOKEN_MASK].view(-1)] == PAD).all()


def test_the_rows_of_a_batch_in_blocks_can_be_named():
    rows = documents()
    found = batch_rows(COLLATORS["blocks"](rows))
    assert found == [rows[0]["input_ids"], rows[2]["input_ids"], rows[1]["input_ids"]]


def test_a_loss_is_computed_by_blocks_outside_of_training_too(tiny_recipe, monkeypatch):
    """Validation by itself, on a batch of two blocks."""
    recipe = Recipe.from_dict(tiny_recipe | {"packing": True, "lora_dropout": 0.0})
    seen = []
    make = run.make_trainer
    monkeypatch.setattr(trainer_setup, "_layout", lambda *_: alone)
    monkeypatch.setattr(
        run, "make_trainer", lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[-1]
    )
    train(recipe)
    trainer = seen[0]
    batch = trainer.data_collator(trainer.train_dataset[:3])
    assert len(batch[TOKEN_MASK]) == 3
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert torch.isfinite(loss)
    assert trainer.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("biased", [False, True])
def test_attention_by_blocks_is_attention_under_the_whole_mask(biased):
    if biased and "position_bias" not in signature(sdpa_attention_forward).parameters:
        pytest.skip("this transformers has no position_bias")
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 15, 8) for heads in (4, 2, 2))
    module = SimpleNamespace(num_key_value_groups=2)
    flags = torch.rand(3, 1, 5, 5) < 0.5
    flags[..., 0] = True
    more = {"position_bias": torch.randn(1, 4, 15, 15)} if biased else {}
    whole = torch.zeros(1, 1, 15, 15, dtype=torch.bool)
    for block in range(3):
        at = slice(5 * block, 5 * block + 5)
        whole[0, 0, at, at] = flags[block, 0]
    expected, _ = sdpa_attention_forward(module, query, key, value, whole, **more)
    found, weights = blocked_sdpa(module, query, key, value, flags, **more)
    assert weights is None
    assert found.shape == (1, 15, 4, 8)
    torch.testing.assert_close(found, expected)
    for mask in (None, whole):  # what is no block mask goes through
        found, _ = blocked_sdpa(module, query, key, value, mask, is_causal=False)
        torch.testing.assert_close(
            found, sdpa_attention_forward(module, query, key, value, mask, is_causal=False)[0]
        )


def test_attention_is_given_back():
    model = adapted("sdpa")
    config = model.get_base_model().config
    with blocked_attention(model.get_base_model(), True), blocked_attention(model.get_base_model(), True):
        assert config._attn_implementation == BLOCKED_SDPA
    assert config._attn_implementation == "sdpa"
    with blocked_attention(adapted("eager").get_base_model(), True):
        pass
    with blocked_attention(model.get_base_model(), False):
        assert config._attn_implementation == "sdpa"


def check(blocks: Blocks, lengths: list[int]) -> None:
    assert sorted(row for block in blocks.rows for row in block) == list(range(len(lengths)))
    assert all(block == sorted(block) for block in blocks.rows)
    assert max(sum(lengths[row] for row in block) for block in blocks.rows) <= blocks.length


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=90))
def test_every_row_lies_in_one_block_that_has_room_for_it(lengths):
    longest, total = max(lengths), sum(lengths)
    for step in (8, 32):
        blocks = little_filling(lengths, step)
        check(blocks, lengths)
        assert blocks.length % step == 0
        assert blocks.length <= max(256, longest + step - 1)
        assert len(blocks.rows) <= len(first_fit(lengths, max(256, -(-longest // step) * step)))
    few = few_shapes(lengths)
    check(few, lengths)
    assert len(few.rows) == 1 or few.length == max(512, bucket_length(longest))
    check(one_block(lengths), lengths)
    assert len(one_block(lengths).rows) == 1
    # First fit never leaves two blocks that are both at most half full.
    capacity = max(512, longest)
    halves = [
        block for block in first_fit(lengths, capacity) if sum(lengths[r] for r in block) <= capacity / 2
    ]
    assert len(halves) <= 1
    assert len(first_fit(lengths, capacity)) >= total / capacity


def test_little_is_filled_up_and_shapes_are_few():
    """Short texts: the shapes of a run, and the share of tokens that count in none of them."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(20, 100, (64,), generator=generator).tolist() for _ in range(200)]
    for layout, share, most in ((few_shapes, 0.1, 4), (lambda rows: little_filling(rows, 32), 0.05, 12)):
        found = [layout(batch) for batch in batches]
        laid = sum(len(blocks.rows) * blocks.length for blocks in found)
        assert laid - sum(map(sum, batches)) < share * laid
        assert len({(len(blocks.rows), blocks.length) for blocks in found}) <= most


@pytest.mark.parametrize("limit", [None, 60])
def test_padded_rows_are_filled_up_to_the_models_window(limit):
    def collate(rows):
        return {
            name: torch.ones(2, 57, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")
        }

    batch = Bucketed(collate, PAD, limit=limit)([])
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
    assert [bucket_positions(count) for count in (0, 1, 16, 17, 100)] == [16, 16, 16, 32, 128]


@pytest.mark.parametrize(
    ("mode", "device", "attention", "layers", "supported", "expected"),
    [
        ("eager", "cuda", "sdpa", None, True, (12, 256)),
        ("eager", "cpu", "sdpa", None, True, (12, 256)),
        ("eager", "cuda2", "sdpa", None, True, None),
        ("compile", "cpu", "sdpa", None, True, (7, 512)),
        ("graph", "cuda", "eager", None, True, (1, 3072)),
        ("compile", "cuda", "sdpa", None, False, (1, 3072)),
        ("eager", "cuda", "sdpa", None, False, None),
        ("eager", "cuda", "flash_attention_2", None, True, None),
        ("eager", "cuda", "sdpa", ["sliding_attention"], True, None),
    ],
)
def test_rows_lie_in_blocks_where_attention_takes_them(mode, device, attention, layers, supported, expected):
    config = SimpleNamespace(_attn_implementation=attention, layer_types=layers)
    config.get_text_config = lambda: config
    base = SimpleNamespace(config=config, _supports_attention_backend=supported)
    arguments = SimpleNamespace(device=torch.device(device.rstrip("2")), n_gpu=2 if device == "cuda2" else 1)
    recipe = Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out", "packing": True})
    layout = trainer_setup._layout(recipe, SimpleNamespace(get_base_model=lambda: base), mode, arguments)
    blocks = None if layout is None else layout([100, 156] * 12)
    assert (None if blocks is None else (len(blocks.rows), blocks.length)) == expected


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
    monkeypatch.setattr(run, "resolve_step_mode", lambda *_: "eager")
    # Layers that are run again in backward get their attention by blocks there, too.
    monkeypatch.setattr(trainer_setup, "_layout", lambda *_: alone)
    results += [train(recipe.changed(packing=True, gradient_checkpointing=True), overwrite=True)]
    assert results[-1].model.config._attn_implementation == "sdpa"
    # As for attention that finds the rows' borders itself.
    monkeypatch.setattr(trainer_setup, "_layout", lambda *_: None)
    results += [train(recipe.changed(packing=True), overwrite=True)]
    modes = [result.metrics["step_mode"] for result in results]
    assert modes == ["eager", "eager", "graph", "graph", "eager", "eager"]
    assert len({int(trainer.tokens_seen) for trainer in seen}) == 1
    assert int(seen[0].tokens_seen) > 0
    for name in ("train_loss", "eval_loss", "eval_acc"):
        values = [result.metrics[name] for result in results]
        assert values == pytest.approx([values[0]] * 6, rel=1e-3), name
