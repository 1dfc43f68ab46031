"""Scores equal the straightforward computation, whatever the batch, the padding, the cache and the wrapper."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from graphlora import GraphLoraConfig
from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import encode_pair
from graphlora.evaluation.forward import Forward
from graphlora.evaluation.multiple_choice import ItemResult, score_examples, summarize, write_items
from graphlora.tasks import TextExample

# PEFT still asks for a name that transformers has renamed.


def plainly(model, tokenizer, context, continuation):
    """Log-likelihood of one continuation: one row, no padding, no cache, all logits."""
    context_ids, rest = encode_pair(tokenizer, context, continuation)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([context_ids + rest]), use_cache=False).logits
    logits = logits[0, -len(context_ids + rest) :]
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return sum(log_probs[len(context_ids) - 1 + place, token].item() for place, token in enumerate(rest))


def expected(model, tokenizer, examples):
    return [
        [plainly(model, tokenizer, item.context(place), choice) for place, choice in enumerate(item.choices)]
        for item in examples
    ]


def close(results, scores):
    for result, row in zip(results, scores, strict=True):
        assert result.scores == pytest.approx(row, abs=1e-4, rel=1e-5)


def tiny(tokenizer, kind):
    torch.manual_seed(1)
    size = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **size))
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **size))
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **size))
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=128,
            **size,
        )
    )


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_cloze_scores_equal_the_straightforward_ones_in_any_batch(
    model, tokenizer, examples, tokens_per_batch
):
    results = score_examples(model, tokenizer, examples, tokens_per_batch=tokens_per_batch, progress=False)
    assert [result.id for result in results] == [item.id for item in examples]
    close(results, expected(model, tokenizer, examples))


@pytest.mark.parametrize("scoring", ["cloze", "letter"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_order_batch_size_and_padding_side_change_nothing(
    model, tokenizer, examples, scoring, side, monkeypatch
):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    one = score_examples(model, tokenizer, examples, scoring, tokens_per_batch=1, progress=False)
    turned = score_examples(model, tokenizer, examples[::-1], scoring, tokens_per_batch=9999, progress=False)[
        ::-1
    ]
    for first, second in zip(one, turned, strict=True):
        assert first.scores == pytest.approx(second.scores, abs=1e-5)
        assert first.prediction == second.prediction


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mamba", "gemma3"])
def test_other_architectures(tokenizer, examples, kind):
    other = tiny(tokenizer, kind)
    results = score_examples(other, tokenizer, examples, progress=False)
    close(results, expected(other, tokenizer, examples))


def test_a_shared_context_is_read_once(model, tokenizer, examples, monkeypatch):
    widths = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def spy(self, input_ids=None, **arguments):
        widths.append((tuple(input_ids.shape), arguments.get("logits_to_keep")))
        return forward(self, input_ids=input_ids, **arguments)

    four = examples[2]
    context, _ = encode_pair(tokenizer, four.prompt, four.choices[0])
    rest = [len(encode_pair(tokenizer, four.prompt, choice)[1]) - 1 for choice in four.choices]
    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    score_examples(model, tokenizer, [four], progress=False)
    assert widths == [((1, len(context)), 1), ((sum(part > 0 for part in rest), max(rest)), None)]


def test_letter_scores_are_the_logits_of_the_labels_last_tokens(model, tokenizer, examples):
    results = score_examples(model, tokenizer, examples, "letter", progress=False)
    for result, item in zip(results, examples, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer.encode(item.letter_prompt)])).logits[0, -1]
        wanted = [logits[tokenizer.encode(label)[-1]].item() for label in item.labels]
        assert result.scores == pytest.approx(wanted, abs=1e-5)
        assert result.prediction == wanted.index(max(wanted))
        assert result.prediction_norm is None


@pytest.mark.parametrize("wrapper", ["lora", "graphlora", "prompt tuning"])
def test_peft_models(model, tokenizer, examples, wrapper):
    torch.manual_seed(2)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    if wrapper == "lora":
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
    elif wrapper == "graphlora":
        config = GraphLoraConfig(task_type="CAUSAL_LM", num_experts=4, top_k=2, r=2)
    else:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = get_peft_model(copy, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = expected(wrapped, tokenizer, examples)
    results = score_examples(wrapped, tokenizer, examples, progress=False)
    close(results, wanted)
    base = score_examples(model, tokenizer, examples, progress=False)
    assert results[0].scores != pytest.approx(base[0].scores, abs=1e-3)


def test_ties_go_to_the_first_choice(model, tokenizer, examples):
    (same,) = score_examples(model, tokenizer, [examples[3]], progress=False)
    assert same.scores[0] == pytest.approx(same.scores[1], abs=1e-6)
    assert summarize([replace(same, scores=(1.0, 1.0))])["acc"] == 0.0
    assert (same.prediction, same.prediction_norm) == (0, 0)


def test_acc_norm_divides_by_characters_without_the_space_before_the_choice(model, tokenizer, examples):
    for result, item in zip(
        score_examples(model, tokenizer, examples, progress=False), examples, strict=True
    ):
        per_character = [
            score / len(choice[1:]) for score, choice in zip(result.scores, item.choices, strict=True)
        ]
        assert result.prediction_norm == per_character.index(max(per_character))


def test_pairs_are_encoded_whole_and_spaces_move_to_the_continuation(tokenizer):
    context, rest = encode_pair(tokenizer, "the sky ", "is blue")
    assert tokenizer.decode(context) == "the sky"
    assert tokenizer.decode(rest) == " is blue"
    assert context + rest == tokenizer.encode("the sky is blue")
    assert encode_pair(tokenizer, "", " blue") == ([tokenizer.bos_token_id], tokenizer.encode(" blue"))


def test_an_end_token_that_the_tokenizer_adds_is_left_out_and_a_start_token_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    adding = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    context, rest = encode_pair(adding, "the sky", " is blue")
    assert context == [0, *tokenizer.encode("the sky")]
    assert rest == tokenizer.encode(" is blue")
    assert encode_pair(adding, "<s>the sky", " is blue") == (context, rest)


def test_an_item_beyond_the_window_is_refused_or_cut_on_the_left(model, tokenizer, examples):
    long = replace(examples[0], id="much", prompt="very deep sea " * 60 + "\nAnswer:")
    with pytest.raises(
        GraphLoraError, match=r"item 'much' has \d+ tokens and the model's window is 128; shorten it"
    ):
        score_examples(model, tokenizer, [examples[0], long], progress=False)
    short, cut = score_examples(model, tokenizer, [examples[0], long], truncate=True, progress=False)
    assert (short.truncated, cut.truncated) == (False, True)
    assert summarize([short, cut])["truncated"] == 1
    context, rest = encode_pair(tokenizer, long.prompt, long.choices[0])
    ids = torch.tensor([(context + rest)[-129:]])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=ids[:, :-1]).logits[0, -len(rest) :], dim=-1)
    assert cut.scores[0] == pytest.approx(
        log_probs.gather(-1, ids[0, -len(rest) :, None]).sum().item(), abs=1e-4
    )


def test_letter_prompts_beyond_the_window_are_cut_too(model, tokenizer, examples):
    long = replace(examples[0], letter_prompt="very deep sea " * 60 + "\nAnswer:")
    (cut,) = score_examples(model, tokenizer, [long], "letter", truncate=True, progress=False)
    assert cut.truncated
    assert cut.tokens == 128


def test_labels_that_end_in_the_same_token_are_refused(model, tokenizer, examples):
    item = replace(examples[0], labels=(" 1", " 11"))
    with pytest.raises(GraphLoraError, match="ends several of the labels"):
        score_examples(model, tokenizer, [item], "letter", progress=False)


def test_wrong_calls_get_one_line(model, tokenizer, examples):
    with pytest.raises(GraphLoraError, match="unknown scoring 'guess'; choose one of cloze, letter"):
        score_examples(model, tokenizer, examples, "guess")
    with pytest.raises(GraphLoraError, match="no examples"):
        score_examples(model, tokenizer, [])
    with pytest.raises(GraphLoraError, match="item 't' has no choices"):
        score_examples(model, tokenizer, [TextExample(id="t", prompt="p", completion="c")])
    with pytest.raises(GraphLoraError, match="choice '' has no tokens"):
        score_examples(model, tokenizer, [replace(examples[0], choices=("", " a"))], progress=False)
    size = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 340}
    with pytest.raises(GraphLoraError, match="T5ForConditionalGeneration is an encoder-decoder"):
        score_examples(T5ForConditionalGeneration(T5Config(**size)), tokenizer, examples)


def test_the_modules_modes_are_restored_also_after_an_error(model, tokenizer, examples, monkeypatch):
    model.train()
    model.model.layers[0].eval()
    score_examples(model, tokenizer, examples[:1], progress=False)
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (
        True,
        False,
        True,
    )

    def fail(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(Forward, "score", fail)
    with pytest.raises(KeyboardInterrupt):
        score_examples(model, tokenizer, examples[:1], progress=False)
    assert model.training
    model.eval()


def test_summary_counts_domains_kinds_and_standard_errors():
    def item(right, right_norm, **rest):
        return ItemResult("x", 0, (0.0, 0.0), 0 if right else 1, 0 if right_norm else 1, 5, **rest)

    results = [
        item(True, True, domain="a", kind="seen"),
        item(True, False, domain="a", kind="unseen"),
        item(False, False, domain="b"),
        item(False, True),
        item(True, True),
    ]
    summary = summarize(results)
    assert (summary["n"], summary["acc"], summary["acc_norm"]) == (5, 0.6, 0.6)
    assert summary["acc_stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert {name: part["acc"] for name, part in summary["domains"].items()} == {"a": 1.0, "b": 0.0}
    assert summary["domains"]["b"]["acc_stderr"] is None
    assert {name: part["n"] for name, part in summary["kinds"].items()} == {"seen": 1, "unseen": 1}
    letter = summarize([replace(result, prediction_norm=None) for result in results])
    assert "acc_norm" not in letter
    with pytest.raises(GraphLoraError, match="no results"):
        summarize([])


def test_items_are_written_as_json_lines(model, tokenizer, examples, tmp_path):
    results = score_examples(model, tokenizer, examples, progress=False)
    lines = write_items(results, tmp_path / "items.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == len(examples)
    assert (first["id"], first["gold"], first["domain"]) == ("short", 0, "air")
    assert first["scores"] == list(results[0].scores)


def test_progress_is_shown_on_request(model, tokenizer, examples, capsys):
    score_examples(model, tokenizer, examples, progress=True)
    assert "scoring (cloze): 100%" in capsys.readouterr().err
