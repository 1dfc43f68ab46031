"""`generate()` with the key-value cache, batched and left-padded, equals generation without the cache."""

import pytest
import torch
from tiny_llama import make_batch, make_model

NEW_TOKENS = 8


def generate(model, batch, use_cache):
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = model.generate(
        **prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, -NEW_TOKENS:], torch.stack(out.logits)


@pytest.mark.parametrize("config", [{}, {"expert_granularity": "linear"}, {"backend": "eager"}], ids=str)
@pytest.mark.parametrize("training_mode", [False, True])
def test_cache_changes_nothing(config, training_mode):
    model = make_model(**config).train(training_mode)
    batch = make_batch([7, 3, 5], 9, "left")
    cached, without = (generate(model, batch, use_cache) for use_cache in (True, False))
    assert torch.equal(cached[0], without[0])
    torch.testing.assert_close(cached[1], without[1], rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_rows_alone():
    """So what the router does with padding does not matter."""
    model = make_model().eval()
    batch = make_batch([7, 3, 5], 12, "left")
    together = generate(model, batch, True)
    for row, length in enumerate([7, 3, 5]):
        alone = {name: value[row : row + 1, -length:] for name, value in batch.items()}
        tokens, logits = generate(model, alone, True)
        assert torch.equal(tokens[0], together[0][row])
        torch.testing.assert_close(logits[:, 0], together[1][:, row], rtol=1e-4, atol=1e-5)


def test_other_padding_tokens_change_nothing():
    model = make_model().eval()
    batch = make_batch([7, 3, 5], 12, "left")
    noisy = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 9)}
    one, other = generate(model, batch, True), generate(model, noisy, True)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-6)
