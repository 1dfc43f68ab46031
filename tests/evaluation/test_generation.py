"""Generation behind a static cache gives the answers of the default cache, and keeps its cache where it fits."""

import torch
from tiny_llama import make_batch, make_model
from transformers import GenerationConfig

from graphlora.evaluation.generation import CACHE_STEP, StaticGenerator


def test_answers_are_those_of_the_default_cache_call_after_call():
    model = make_model().eval()
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    generate = StaticGenerator(model)
    for seed in range(2):
        batch = make_batch([5, 5], seed=seed)
        ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
        found = generate(input_ids=ids, generation_config=settings, attention_mask=mask)
        expected = model.generate(input_ids=ids, generation_config=settings, attention_mask=mask)
        assert torch.equal(found, expected)


def test_a_cache_is_kept_while_it_has_the_size():
    generate = StaticGenerator(make_model())
    cache = generate._emptied(2, 7)
    assert cache.layers[0].max_cache_len == CACHE_STEP
    assert generate._emptied(2, CACHE_STEP) is cache
    longer = generate._emptied(2, CACHE_STEP + 1)
    assert longer.layers[0].max_cache_len == 2 * CACHE_STEP
    assert generate._emptied(3, CACHE_STEP + 1) is not longer
