"""One test per row of docs/masks.md: where the flags of the tokens that count come from."""

import inspect

import pytest
import torch
from peft import get_peft_model
from tiny_llama import (
    adapter_config,
    assert_same,
    aux_by_hand,
    gradients,
    load_by_hand,
    loads,
    make_base,
    make_batch,
    make_model,
    wake,
)
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from graphlora.tuner.masks import every_token, share_of_batch, token_masks, warn_once

LENGTHS = [6, 3]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def additive(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def causal(mask):
    """4-D boolean mask `[batch, 1, queries, keys]` of a 2-D padding mask; padding attends to nothing."""
    real = mask.bool()
    size = mask.shape[1]
    return (torch.ones(size, size).tril().bool() & real[:, None, None, :]) & real[:, None, :, None]


def counted(model, keep, **inputs):
    """Asserts that exactly the tokens of `keep` count in loss and loads."""
    history = loads(model)
    out = model(**inputs)
    expected = aux_by_hand(model, out.router_logits, keep, history)
    torch.testing.assert_close(out.aux_loss, expected, **CLOSE)
    decay = model.peft_config["default"].load_decay
    fresh = torch.stack([load_by_hand(logits, keep, 2) for logits in out.router_logits])
    torch.testing.assert_close(loads(model), (decay * history + (1 - decay) * fresh).detach(), **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_2d_mask(side):
    batch = make_batch(LENGTHS, 8, side)
    counted(make_model(), batch["attention_mask"].flatten(), **batch)


def test_2d_mask_given_by_position():
    batch = make_batch(LENGTHS, 8)
    model = make_model()
    by_name = make_model()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    assert torch.equal(model.base_model(batch["input_ids"], batch["attention_mask"]).aux_loss, by_name)


def test_positional_arguments_are_read_by_the_models_own_names():
    """GPT-2's second positional argument is the cache, not the mask; where the mask stands differs by version."""
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    batch = make_batch(LENGTHS, 8)
    names = list(inspect.signature(GPT2LMHeadModel.forward).parameters)[1:]
    given = names[: names.index("attention_mask") + 1]
    assert given[:2] == ["input_ids", "past_key_values"]
    arguments = [batch.get(name) for name in given]

    def aux(*args, **kwargs):
        torch.manual_seed(0)
        model = get_peft_model(GPT2LMHeadModel(config), adapter_config()).train()
        return model.base_model(*args, **kwargs).aux_loss

    by_name = aux(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.isclose(aux(*arguments), by_name, rtol=1e-6)
    assert not torch.isclose(aux(arguments[0]), by_name, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float", "int"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_4d_mask(kind, side):
    batch = make_batch(LENGTHS, 8, side)
    keep = batch.pop("attention_mask")
    mask = {"bool": causal(keep), "float": additive(causal(keep)), "int": causal(keep).long()}[kind]
    if kind != "int":  # attention itself takes no integer masks
        with torch.no_grad():
            make_model()(**batch, attention_mask=mask)
    flags = token_masks({**batch, "attention_mask": mask}, False)["decoder"]
    assert flags.tolist() == keep.flatten().bool().tolist()


def test_4d_mask_through_the_model():
    batch = make_batch(LENGTHS, 8)
    keep = batch["attention_mask"]
    counted(make_model(), keep.flatten(), **{**batch, "attention_mask": additive(causal(keep))})


def test_4d_mask_of_one_row_for_the_whole_batch():
    batch = make_batch([8, 8])
    one = causal(torch.ones(1, 8))
    counted(make_model(), torch.ones(16), **{**batch, "attention_mask": one})


def test_dict_of_masks_for_models_that_mix_attention_kinds():
    batch = make_batch(LENGTHS, 8)
    keep = batch["attention_mask"]
    full = causal(keep)
    sliding = full & torch.ones(8, 8).triu(-2).bool()
    masks = {"sliding_attention": None, "full_attention": additive(full), "other": additive(sliding)}
    flags = token_masks({"input_ids": batch["input_ids"], "attention_mask": masks}, False)["decoder"]
    assert flags.tolist() == keep.flatten().bool().tolist()
    assert (
        token_masks({"input_ids": batch["input_ids"], "attention_mask": {"a": None}}, False)["decoder"]
        is None
    )


def test_no_mask_counts_all_tokens():
    batch = make_batch([5, 5])
    counted(make_model(), torch.ones(10), input_ids=batch["input_ids"])


def test_a_mask_of_every_token_counts_all_tokens():
    batch = make_batch([8, 8])
    mask = every_token(batch["input_ids"])
    counted(make_model(), torch.ones(16), **{**batch, "attention_mask": mask})
    assert token_masks({**batch, "attention_mask": mask}, False)["decoder"] is None


def test_packed_sequences_equal_padded_ones():
    """Every token of a packed row counts; position_ids keep the documents apart."""
    batch = make_batch(LENGTHS)
    rows = [
        {"input_ids": ids[mask.bool()].tolist()}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    packed = dict(DataCollatorWithFlattening()(rows))
    assert "attention_mask" not in packed and packed["input_ids"].shape == (1, 9)
    results = []
    for inputs in (batch, packed):
        model = make_model()
        out = model(**inputs, use_cache=False)  # transformers tells documents apart only without a cache
        out.loss.backward()
        results.append({"loss": out.loss.detach(), "loads": loads(model), **gradients(model)})
    assert_same(*results, 5e-6)


def test_inputs_embeds():
    batch = make_batch(LENGTHS, 8)
    model = make_model()
    keep = batch["attention_mask"]
    embeds = model.get_base_model().get_input_embeddings()(batch["input_ids"])
    counted(model, keep.flatten(), inputs_embeds=embeds, attention_mask=keep)


def test_with_a_cache_the_last_flags_are_the_new_tokens():
    batch = make_batch(LENGTHS, 8, "left")
    model = make_model().eval()
    with torch.no_grad():
        cache = model(
            input_ids=batch["input_ids"][:, :5], attention_mask=batch["attention_mask"][:, :5], use_cache=True
        ).past_key_values
    keep = batch["attention_mask"][:, 5:].clone()
    keep[0, 0] = 0
    mask = torch.cat([batch["attention_mask"][:, :5], keep], dim=1)
    counted(
        model.train(),
        keep.flatten(),
        input_ids=batch["input_ids"][:, 5:],
        attention_mask=mask,
        past_key_values=cache,
        position_ids=(mask.cumsum(1) - 1)[:, 5:].clamp_min(0),
    )


def make_t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model = get_peft_model(T5ForConditionalGeneration(config), adapter_config(task_type="SEQ_2_SEQ_LM"))
    wake(model)
    return model.train()


def t5_flags(**inputs):
    source, target = make_batch(LENGTHS, 8), make_batch([2, 4], 5, seed=1)
    inputs = {name: target[value] if isinstance(value, str) else value for name, value in inputs.items()}
    flags = token_masks(
        {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], **inputs}, True
    )
    assert flags["encoder"].tolist() == source["attention_mask"].flatten().bool().tolist()
    return flags["decoder"], target


def test_t5_decoder_from_labels_through_the_model():
    """Padding labels further changes nothing; the encoder's flags come from attention_mask."""

    def run(source_width, target_width):
        source, target = make_batch(LENGTHS, source_width), make_batch([2, 4], target_width, seed=1)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        model = make_t5()
        out = model(input_ids=source["input_ids"], attention_mask=source["attention_mask"], labels=labels)
        out.loss.backward()
        return {"loss": out.loss.detach(), "loads": loads(model), **gradients(model)}

    assert_same(run(6, 4), run(9, 7), 5e-6)


def test_t5_decoder_from_labels():
    labels = torch.tensor([[5, 6, -100, -100], [5, 6, 7, 8]])
    flags, _ = t5_flags(labels=labels)
    assert flags.view(2, 4).tolist() == [[True, True, False, False], [True] * 4]


def test_t5_decoder_from_its_own_mask():
    flags, target = t5_flags(decoder_input_ids="input_ids", decoder_attention_mask="attention_mask")
    assert flags.tolist() == target["attention_mask"].flatten().bool().tolist()


def test_t5_decoder_without_either_counts_all():
    assert t5_flags(decoder_input_ids="input_ids")[0] is None
    assert t5_flags(decoder_input_ids="input_ids", labels="labels")[0] is None


@pytest.mark.parametrize("mask", [torch.ones(2, 8, 8), object()], ids=["3-D", "object"])
def test_an_unknown_mask_counts_all_and_warns_once(mask, recwarn):
    warn_once.cache_clear()
    ids = make_batch([8, 8])["input_ids"]
    for _ in range(3):
        assert token_masks({"input_ids": ids, "attention_mask": mask}, False)["decoder"] is None
    assert [str(w.message).count("attention_mask") for w in recwarn] == [1]


def test_a_mask_of_another_length_counts_all_and_warns_once():
    warn_once.cache_clear()
    model, batch = make_model(), make_batch(LENGTHS, 8)
    flags = torch.ones(7).bool()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphlora.tuner.model.token_masks", lambda *_: {"encoder": flags, "decoder": flags})
        with pytest.warns(UserWarning, match="another number of tokens"):
            out = model(**batch)
        model(**batch)
    history = torch.zeros_like(loads(model))
    torch.testing.assert_close(
        out.aux_loss, aux_by_hand(model, out.router_logits, torch.ones(16), history), **CLOSE
    )


def test_share_counts_labels_as_the_trainer_does():
    base = make_base()
    labels = torch.tensor([[5, 6, -100], [7, -100, 8]])
    inputs = {"labels": labels, "num_items_in_batch": 8}
    assert share_of_batch(base, inputs, False) == 2 / 8
    assert share_of_batch(base, {**inputs, "shift_labels": labels[:, :1]}, False) == 2 / 8
    assert share_of_batch(base, inputs, True) == 4 / 8
    assert share_of_batch(base, {"labels": labels}, False) == 1.0
    assert share_of_batch(torch.nn.Linear(1, 1), inputs, False) == 4 / 8
