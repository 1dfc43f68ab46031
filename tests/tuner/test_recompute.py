"""`recompute_gate_up`: the same outputs and gradients, without the frozen products in memory."""

import weakref

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.layer import GraphLoraLayer


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def trained_step(model, tokens) -> dict[str, torch.Tensor]:
    """Loss and all gradients of one step."""
    torch.manual_seed(5)
    model.train()
    model.zero_grad()
    outputs = model(input_ids=tokens, labels=tokens)
    outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), **grads}


def assert_same(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("around", ["alone", "checkpointing", "autocast"])
def test_gradients_are_the_same(make_adapted, tokens, lora_dropout, around):
    results = []
    for recompute in (False, True):
        model = make_adapted(recompute_gate_up=recompute, lora_dropout=lora_dropout)
        if around == "checkpointing":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around == "autocast"):
            results.append(trained_step(model, tokens))
    assert_same(*results)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # PyTorch's own tracer does it
def test_gradients_are_the_same_when_compiled(make_adapted, tokens):
    torch._dynamo.reset()
    results = []
    for recompute in (False, True):
        layer = next(
            m for m in make_adapted(recompute_gate_up=recompute).modules() if isinstance(m, GraphLoraLayer)
        )
        layer.train()
        x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if recompute else layer
        run(x).square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"x": x.grad, **grads})
    torch._dynamo.reset()
    assert_same(*results, tolerance=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_products_do_not_stay(make_adapted, tokens, recompute, monkeypatch):
    model = make_adapted(recompute_gate_up=recompute).train()
    products = []
    for layer in model.modules():
        if isinstance(layer, GraphLoraLayer):
            for name in ("gate_proj", "up_proj"):
                getattr(layer.base_layer, name).register_forward_hook(
                    lambda module, inputs, output: products.append(weakref.ref(output.untyped_storage()))
                )
    loss = model(input_ids=tokens, labels=tokens).loss
    once = len(products)
    assert once > 0
    assert sum(product() is not None for product in products) == (0 if recompute else once)
    loss.backward()
    assert len(products) == (2 * once if recompute else once)


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes(make_adapted, recompute):
    """Beside the token and what has rank r, a block keeps gate and up: `2 tokens f` numbers, or none of them."""
    layer = next(
        m for m in make_adapted(recompute_gate_up=recompute).modules() if isinstance(m, GraphLoraLayer)
    )
    layer.train()
    frozen = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    x = torch.randn(64, 32, requires_grad=True)
    wide = x.shape[0] * layer.parts.intermediate_size * x.element_size()
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    assert out.requires_grad
    assert sum(size == wide for size in saved.values()) == (0 if recompute else 2)


@pytest.mark.parametrize("changes", [{"backend": "eager"}, {"expert_granularity": "linear"}])
def test_it_is_refused_where_it_would_do_nothing(changes):
    with pytest.raises(GraphLoraError, match=r"recompute_gate_up=True does nothing .*backend='auto'"):
        GraphLoraConfig(recompute_gate_up=True, **changes)
