"""Token rows and batches: the answer alone is learned, nothing is cut unasked, packing keeps rows apart."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import encode_pair
from graphlora.tasks import Example, TextExample
from graphlora.training.data import (
    IGNORED,
    Encoding,
    encode,
    encode_all,
    packing_collator,
    padding_collator,
    prompt_template,
)
from graphlora.training.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def item(name="a", prompt="Question: sky?\nAnswer:", gold=0, **rest):
    return Example(name, prompt, (" blue", " black night"), gold, "Which?\nAnswer:", (" A", " B"), **rest)


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_only_the_answer_and_its_end_are_learned(tokenizer):
    row = encode(item(gold=1), tokenizer)
    assert learned(row, tokenizer) == " black night<|end|>"
    assert learned(encode(item(gold=1), tokenizer, append_eos=False), tokenizer) == " black night"
    assert learned(encode(item(), tokenizer, scoring="letter"), tokenizer) == " A<|end|>"
    assert tokenizer.decode(row["input_ids"]) == "Question: sky?\nAnswer: black night<|end|>"


def test_training_reads_the_tokens_that_scoring_reads(tokenizer):
    row = encode(item(), tokenizer, append_eos=False)
    context, answer = encode_pair(tokenizer, item().prompt, " blue")
    assert row == {"input_ids": context + answer, "labels": [IGNORED] * len(context) + answer}


def test_shared_continuations_are_learned_after_the_right_context(tokenizer):
    example = item(gold=1, prompts=("the sky is", "the night is"))
    assert tokenizer.decode(encode(example, tokenizer)["input_ids"]).startswith("the night is black night")


def test_everything_is_learned_where_asked(tokenizer):
    row = encode(item(), tokenizer, train_on="all")
    assert row["labels"] == row["input_ids"]


def test_every_assistant_turn_of_a_chat_is_learned(tokenizer):
    turns = [("user", "sky?"), ("assistant", "blue"), ("user", "coal?"), ("assistant", "black")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    row = encode(TextExample("c", messages=messages), tokenizer)
    assert learned(row, tokenizer) == "blue<|end|>\nblack<|end|>\n"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(list(messages), tokenize=False)


def test_a_chat_that_cannot_be_told_apart_is_refused(tokenizer, monkeypatch):
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(GraphLoraError, match="row 'c': the chat template rewrites earlier turns"):
        encode(TextExample("c", messages=messages), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(GraphLoraError, match="no chat template"):
        encode(TextExample("c", messages=messages), tokenizer)


def test_rows_that_are_too_long_are_refused_by_name(tokenizer):
    examples = [item("short", "Q:"), item("long-1", "sky " * 20), item("long-2", "sky " * 30)]
    with pytest.raises(
        GraphLoraError, match=r"row 'long-1' has \d+ tokens, more than max_length 12 and 1 other"
    ):
        encode_all(examples, tokenizer, Encoding(max_length=12))


def test_truncation_by_option(tokenizer):
    examples = [item("short", "Q:"), item("long", " sky" * 20)]
    cut = encode_all(examples, tokenizer, Encoding(max_length=12, truncation="prompt"))
    assert (cut.num_cut, len(cut.rows[1]["input_ids"])) == (1, 12)
    assert learned(cut.rows[1], tokenizer) == " blue<|end|>"
    assert cut.longest > 12
    dropped = encode_all(examples, tokenizer, Encoding(max_length=12, truncation="drop"))
    assert (dropped.num_dropped, len(dropped.rows)) == (1, 1)
    ended = encode_all(examples, tokenizer, Encoding(max_length=12, truncation="end"))
    assert ended.rows[1]["input_ids"] == encode(examples[1], tokenizer)["input_ids"][:12]
    with pytest.raises(GraphLoraError, match=r"answer of .* tokens, which does not fit"):
        encode_all(examples, tokenizer, Encoding(max_length=2, truncation="prompt"))
    with pytest.raises(GraphLoraError, match="no row is left"):
        encode_all(examples, tokenizer, Encoding(max_length=1, truncation="drop"))


def test_the_form_of_the_prompts_is_found():
    def form(*prompts):
        return prompt_template([item(prompt=prompt) for prompt in prompts], "cloze")

    assert (
        form("Question: Why is it?\nAnswer:", "Question: Where is it?\nAnswer:")
        == "Question: {prompt}\nAnswer:"
    )
    assert form("It is a?", "It was a?") == "{prompt}"
    assert (
        form("Question: Why is it?\nAnswer:", "Question: Why me?\nAnswer:") == "Question: {prompt}\nAnswer:"
    )
    assert form("same", "same") == "{prompt}"
    assert form("alone") == "{prompt}"
    assert (
        prompt_template([TextExample("c", messages=()), TextExample("d", messages=())], "cloze") == "{prompt}"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_attend_within_themselves_only(tokenizer, tiny_model, attention):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention)
    model.config.use_cache = False
    model.train()
    rows = [
        encode(item(prompt=prompt), tokenizer)
        for prompt in ("sky", "the grass, the rose and the sea", "coal?")
    ]
    packed = packing_collator()([dict(row) for row in rows])
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    assert "attention_mask" not in packed
    inputs = {name: packed[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs).logits[0]
    start = 0
    for row in rows:
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(logits[start : start + len(alone)], alone, rtol=1e-5, atol=1e-6)
        start += len(alone)


def test_packed_and_padded_batches_have_the_same_loss(tokenizer, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.use_cache = False
    rows = [encode(item(prompt=prompt), tokenizer) for prompt in ("sky", "the grass, the rose and the sea")]
    packed = model(**packing_collator()([dict(row) for row in rows])).loss
    padded = model(**padding_collator(tokenizer)([dict(row) for row in rows])).loss
    torch.testing.assert_close(packed, padded)


def test_padding_is_on_the_right_and_not_learned(tokenizer):
    rows = [encode(item(prompt=prompt), tokenizer) for prompt in ("sky", "the grass, the rose and the sea")]
    batch = padding_collator(tokenizer)([dict(row) for row in rows])
    short = len(rows[0]["input_ids"])
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (len(rows[1]["input_ids"]) - short)
    assert set(batch["labels"][0, short:].tolist()) == {IGNORED}
