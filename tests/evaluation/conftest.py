"""Tiny random models and a small tokenizer, built on the spot."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graphlora.tasks import Example
from graphlora.tasks.example import continuations, letters, listed

WORDS = "Question: Answer: Please choose the correct answer to question. sky grass sea is blue green grey very deep"


@pytest.fixture(scope="session")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator([WORDS + " A B C D"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def choose(name, question, texts, gold=0, **rest):
    return Example(
        id=name,
        prompt=f"Question: {question}\nAnswer:",
        choices=continuations(texts),
        gold=gold,
        letter_prompt=listed(question, texts),
        labels=letters(len(texts)),
        **rest,
    )


@pytest.fixture
def examples():
    """Items of different lengths, with 2 to 4 choices, and one with a context per choice."""
    return [
        choose("short", "sky?", ["blue", "green"], 0, domain="air", kind="seen"),
        choose(
            "long",
            "is the very very deep sea blue or grey or green?",
            ["very blue", "grey", "green grass"],
            1,
        ),
        choose("four", "what is grass?", ["green", "deep deep sea", "a", "the question"], 2, domain="land"),
        choose("same", "twins?", ["blue", "blue"], 1, domain="land", kind="unseen"),
        Example(
            id="gap",
            prompt="the sky is",
            prompts=("the sky is blue and it", "the sky is green grass and it"),
            choices=(" is deep.", " is deep."),
            gold=1,
            letter_prompt="Which?\n(A) blue (B) green grass\nAnswer:",
            labels=(" A", " B"),
            domain="air",
            kind="seen",
        ),
        choose("spaces", "trailing ", ["answer to", "sea"], 0),
    ]
