"""When an adapted model takes the decode kernels, and that it computes the same function with them."""

import pytest
import torch
from tiny_llama import make_batch, make_model

from graphlora.ops.backend import has_triton, interprets_triton

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not has_triton() or not interprets_triton(),
    reason="Triton's interpreter is off",
)
OPS = ("decode_low_rank", "decode_add_low_rank", "decode_project", "decode_mix", "decode_combine")


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of this project's operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "graphlora":
            self.names.append(func._schema.name.removeprefix("graphlora::"))
        return func(*args, **(kwargs or {}))


def forward(model, tokens: int = 6, grad: bool = False):
    batch = make_batch([tokens])
    with Calls() as calls, torch.set_grad_enabled(grad):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.detach(), calls.names


def test_few_tokens_without_gradients_take_the_kernels():
    model = make_model(backend="triton").eval()
    logits, names = forward(model)
    layers = model.config.num_hidden_layers
    assert {name: names.count(name) for name in OPS} == {
        # q, k and v by one of each, and the output projection.
        "decode_low_rank": 2 * layers,
        "decode_add_low_rank": 2 * layers,
        "decode_project": layers,
        "decode_mix": layers,
        "decode_combine": layers,
    }
    torch.testing.assert_close(logits, forward(make_model(backend="eager").eval())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "tokens", "grad", "training"),
    [
        ({}, 65, False, False),
        ({}, 6, True, False),
        ({}, 6, False, True),
        ({"backend": "torch"}, 6, False, False),
    ],
    ids=["many_tokens", "gradients", "training", "torch"],
)
def test_others_do_not(overrides, tokens, grad, training):
    model = make_model(**{"backend": "triton", **overrides}).train(training)
    _, names = forward(model, tokens, grad)
    assert not set(OPS) & set(names)


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        ({"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 32}}, 2),
        # One factor scales all that is computed together.
        ({"alpha_pattern": {"k_proj": 64}}, 3),
        ({"attention_target_modules": ["q_proj", "v_proj"]}, 1),
        ({"attention_target_modules": ["v_proj", "o_proj"]}, 2),
    ],
    ids=str,
)
def test_projections_of_any_kind_are_decoded(config, calls):
    expected, _ = forward(make_model(backend="eager", **config).eval())
    model = make_model(backend="triton", **config).eval()
    logits, names = forward(model)
    assert names.count("decode_low_rank") == calls * model.config.num_hidden_layers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_projection_that_is_no_plain_matrix_is_decoded_alone():
    expected, _ = forward(make_model(backend="eager").eval())
    model = make_model(backend="triton").eval()
    key = model.get_base_model().model.layers[0].self_attn.k_proj
    key.base_layer.register_forward_hook(lambda *_: None)
    logits, names = forward(model)
    assert names.count("decode_low_rank") == 2 * model.config.num_hidden_layers + 1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"router_type": "linear"},
        {"router_conv": "sage"},
        {"router_input_norm": False, "router_logit_centering": False},
        {"expert_features": "projected", "num_experts": 3, "top_k": 3},
        {"edge_init": "learned", "r": 5},
    ],
    ids=str,
)
def test_every_router_works(config):
    expected, _ = forward(make_model(backend="eager", **config).eval())
    logits, names = forward(make_model(backend="triton", **config).eval())
    assert "decode_mix" in names
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_routing_is_recorded():
    model = make_model(backend="triton").eval()
    records = {}
    for backend in ("eager", "triton"):
        model = make_model(backend=backend).eval()
        with model.base_model.record_routing() as record:
            forward(model)
        records[backend] = record
    assert len(records["triton"]) == 2
    for name, routing in records["eager"].items():
        assert torch.equal(routing.top_k_index, records["triton"][name].top_k_index)
        torch.testing.assert_close(routing.router_logits, records["triton"][name].router_logits)


def test_a_decoder_layer_compiles_whole():
    model = make_model(backend="triton").eval()
    inner = model.get_base_model().model
    x, positions = torch.randn(2, 1, 16), torch.zeros(2, 1, dtype=torch.long)
    embeddings = inner.rotary_emb(x, positions)
    with torch.no_grad():
        expected = inner.layers[0](x, position_embeddings=embeddings)
        compiled = torch.compile(inner.layers[0], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(x, position_embeddings=embeddings), expected, rtol=1e-5, atol=1e-5
        )


def test_fakes_know_the_shapes():
    from graphlora.ops import decode

    def run(mode):
        with mode:
            x, f = torch.ones(3, 520), 130
            low, squares = decode.project(x, torch.ones(8, 520), torch.ones(8, 520), torch.ones(6, 520))
            index = torch.zeros(3, 2, dtype=torch.long)
            gate, B, A = torch.ones(3, f), torch.ones(4, f, 2), torch.ones(4, 2, f)
            mixed, partial = decode.mix(gate, gate, low, B, B, A, torch.ones(3, 2), index, 1.0, "silu")
            out = decode.combine(x, partial.sum(dim=0), index, torch.ones(4, 520, 2), 1.0)
            pair = decode.low_rank(x, [torch.ones(2, 520), torch.ones(3, 520)])
            Bs = [torch.ones(520, 2), torch.ones(70, 3)]
            added = decode.add_low_rank(pair, [x, x[:, :70].contiguous()], Bs, 1.0)
        return [(t.shape, t.dtype, t.stride()) for t in (low, squares, mixed, partial, out, pair, *added)]

    assert run(torch._subclasses.FakeTensorMode()) == run(torch.no_grad())
