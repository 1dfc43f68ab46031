"""Projections with routers of their own: one graph per decoder layer, and nothing read on the host."""

import pytest
import torch
from host_reads import Calls
from peft import get_peft_model
from tiny_llama import assert_same, gradients, make_base, make_batch, wake
from torch.utils.flop_counter import FlopCounterMode

from graphlora import GraphLoraConfig

METHODS = {
    "mixlora": {"router_aux_loss_form": "switch_all_layers"},
    "loramoe": {},
    "ming_moe": {},
    "mola": {"router_aux_loss_coef": 0.001},
    "hydralora": {},
    "dynmole": {},
    "ld_mole": {"router_sparsity_loss_coef": 0.1},
}
PER_PROJECTION = [name for name in METHODS if name != "mixlora"]


def base_model():
    # transformers' own masks ask the device for padding unless a graph is being captured, or attention is "eager".
    return make_base(attn_implementation="eager", use_cache=False, num_hidden_layers=2)


def model_of(preset, **options):
    base = base_model()
    small = {"task_type": "CAUSAL_LM", "r": 2, "router_hidden_size": 8, "lora_dropout": 0.0}
    model = get_peft_model(base, GraphLoraConfig(preset=preset, **small, **METHODS[preset], **options))
    wake(model)
    return model.train()


@pytest.mark.parametrize("preset", PER_PROJECTION)
def test_nothing_is_read_on_the_host(preset):
    base, model = base_model(), model_of(preset)
    batch = {**make_batch([3, 4]), "num_items_in_batch": torch.tensor(5)}
    with Calls() as base_calls:
        base(**batch)
    for _ in range(2):  # the second forward finds an optimizer step behind it
        with Calls() as calls:
            model(**batch).loss.backward()
        assert calls.waits() == base_calls.waits()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("preset", PER_PROJECTION)
def test_the_frozen_product_is_computed_once_whatever_the_number_of_experts(preset):
    """2 T (d f) for the frozen layer, 2 T N d for the router, 2 T r (M d + N f) for M matrices A and N matrices B."""
    model = model_of(preset)
    layer = next(m for m in model.modules() if getattr(m, "block_name", "").endswith("up_proj")).eval()
    tokens, d, f, r = 12, 16, 32, 2
    n, m = (
        len(t) for t in (layer.graphlora_experts["default"].lora_B, layer.graphlora_experts["default"].lora_A)
    )
    assert m == (1 if preset == "hydralora" else n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(tokens, d))
    predictor = 2 * tokens * 8 * d if preset == "ld_mole" else 0
    expected = 2 * tokens * (d * f + n * d + r * (m * d + n * f)) + predictor
    assert counter.get_total_flops() == expected


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("preset", PER_PROJECTION)
def test_one_decoder_layer_is_one_graph(preset):
    model = model_of(preset)
    inner = model.get_base_model().model
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    position = inner.rotary_emb(x, torch.arange(5)[None])
    layers = model.base_model._layers()
    model.base_model.recorder.open(layers, True)
    layer = torch.compile(inner.layers[0], backend="aot_eager", fullgraph=True)
    found = layer(x, position_embeddings=position)
    record = model.base_model.recorder.close()
    assert len(record.entries) == len(layers) / 2
    torch.testing.assert_close(found, inner.layers[0](x, position_embeddings=position), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert any(grad.any() for grad in gradients(model).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on CPU tensors in Triton's interpreter")
@pytest.mark.parametrize("preset", ["mola", "hydralora", "dynmole", "ld_mole"])
def test_the_fused_sums_count_dense_and_varying_selections(preset):
    models = [model_of(preset, backend="torch"), model_of(preset, backend="triton")]
    for model in models:
        model(**make_batch([5, 8, 3])).loss.backward()
    for name, stats in models[0].base_model.routing_stats().items():
        found = models[1].base_model.routing_stats()[name]["expert_load"]
        assert found == pytest.approx(stats["expert_load"], abs=1e-6)
    assert_same(gradients(models[0]), gradients(models[1]), 1e-5)


@pytest.mark.parametrize("preset", METHODS)
def test_checkpointed_layers_give_the_same_gradients(preset):
    plain, checkpointed = model_of(preset), model_of(preset)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.enable_input_require_grads()
    batch = make_batch([5, 8, 3])
    for model in (plain, checkpointed):
        model(**batch).loss.backward()
    found = gradients(checkpointed)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(found[name], grad, msg=name)
