"""`torch.compile`: decoder layers without a graph break, no recompilation per step, the same losses and gradients."""

from types import SimpleNamespace

import pytest
import torch
from tiny_llama import (
    adapter_state,
    assert_same,
    gradients,
    largest_gap,
    make_base,
    make_batch,
    make_model,
)
from tiny_trainers import run_trainer
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # What PyTorch's own tracer does with an autograd.Function, and with a tensor that a graph break hands on.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Inductor's advice, and its way to a memory pool: it records an empty graph.
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="kernels run on CPU tensors in Triton's interpreter, which is off beside a GPU",
)
# Hooks of the whole model run uncompiled, and PEFT's and transformers' own wrappers around it break.
OUTSIDE_OF_LAYERS = (
    "_before_forward",
    "_after_forward",
    "dict_itemiterator",
    "dict_keyiterator",
    "requires_grad_",
)


def compiled(model):
    """The compiled model, and its count of compiled frames."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter), counter


def assert_no_break_in_layers():
    for reason in counters["graph_break"]:
        assert any(name in reason for name in OUTSIDE_OF_LAYERS), reason


def step(model, forward, batch):
    """Loss, gradients, and what the adapter holds afterwards."""
    model.zero_grad()
    loss = forward(**batch).loss
    loss.backward()
    named = {f"gradient of {name}": gradient for name, gradient in gradients(model).items()}
    return {"loss": loss.detach(), **named, **adapter_state(model)}


def assert_same_steps(plain, model, forward, batches, tolerance):
    """Every step from equal weights, or it would be compared what training makes of rounding.

    A change of all weights by half a unit in the last place grows about forty times in four steps of these models. A
    gradient that got lost may be smaller than `tolerance`, so none may be off by 1 % of itself either.
    """
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for batch in batches:
        expected, found = step(plain, plain, batch), step(model, forward, batch)
        assert_same(expected, found, tolerance)
        for name, value in expected.items():
            if value.norm() > 0:
                assert largest_gap({name: value}, {name: found[name]}) < 0.01, name
        optimizer.step()
        model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "torch", "expert_granularity": "linear", "router_type": "linear"},
        {"backend": "torch", "edge_init": "learned", "router_self_term": "weight", "hidden_act": "mish"},
        pytest.param({"backend": "triton"}, marks=INTERPRETED),
    ],
    ids=["default", "linear", "learned edges and an activation without a known backward", "triton"],
)
def test_training_equals_the_uncompiled_model(options):
    batches = [make_batch([6, 9, 4], seed=seed) for seed in range(3)]
    act = options.get("hidden_act", "silu")
    options = {name: value for name, value in options.items() if name != "hidden_act"}
    plain, model = (
        make_model(base=make_base(num_hidden_layers=1, hidden_act=act), **options) for _ in range(2)
    )
    forward, counter = compiled(model)
    assert_same_steps(plain, model, forward, batches, 1e-5)
    assert counter.frame_count == 1
    assert_no_break_in_layers()


@pytest.mark.parametrize(
    ("options", "functions"),
    [
        ({"backend": "torch"}, {"ExpertMix", "_LoraLinear"}),
        ({"backend": "torch", "lora_dropout": 0.1}, {"ExpertMix", "_AddLowRank"}),
        pytest.param(
            {"backend": "triton"},
            {"ExpertMix", "DownProjection", "_GraphRoute", "_LoraLinear", "_Sums"},
            marks=INTERPRETED,
        ),
        pytest.param(
            {"backend": "triton", "lora_dropout": 0.1},
            {"ExpertMix", "DownProjection", "_GraphRoute", "_LoraLinear", "_Sums"},
            marks=INTERPRETED,
        ),
    ],
    ids=["torch", "torch with dropout", "triton", "triton with dropout"],
)
def test_no_result_of_a_function_is_written_to_where_a_compiler_traces(monkeypatch, options, functions):
    """PyTorch 2.11 compiles a function that does into one whose gradient gets lost (its issue 180642)."""
    seen = {}

    def watched(function):
        inner = function.forward

        def forward(*arguments):
            results = inner(*arguments)
            versions = [
                t._version for t in (results if isinstance(results, tuple) else (results,)) if t is not None
            ]
            seen.setdefault(function.__name__, set()).update(versions)
            return results

        return staticmethod(forward)

    model = make_model(base=make_base(num_hidden_layers=1), **options)
    model(**make_batch([6, 9, 4]))  # imports what it needs
    for function in torch.autograd.Function.__subclasses__():
        if function.__module__.startswith("graphlora."):
            monkeypatch.setattr(function, "forward", watched(function))
    # A compiler does not look into an operation, so its results come new.
    opaque = torch.ops.graphlora.sum_of_products.default
    new = SimpleNamespace(default=lambda *arguments: opaque(*arguments).clone())
    monkeypatch.setattr(torch.ops.graphlora, "sum_of_products", new)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model(**make_batch([6, 9, 4])).loss.backward()
    assert seen == {name: {0} for name in functions}


def test_layers_that_are_compiled_one_by_one_share_their_code():
    """What a layer is compiled for must not be its own: names and objects, of which every layer has others."""

    def frames(num_layers):
        torch._dynamo.reset()
        model = make_model(base=make_base(num_hidden_layers=num_layers), backend="torch")
        counter = CompileCounterWithBackend("aot_eager")
        for layer in model.get_base_model().model.layers:
            layer.compile(backend=counter)
        for lengths in ([6, 9, 4], [6, 9, 4], [5, 7, 3]):
            model(**make_batch(lengths), use_cache=False).loss.backward()
        return counter.frame_count

    assert frames(5) == frames(3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"backend": "torch"},
        {"expert_granularity": "linear", "router_conv": "gat"},
        pytest.param({"backend": "triton"}, marks=INTERPRETED),
    ],
    ids=["torch", "linear granularity", "triton"],
)
def test_one_decoder_layer_is_one_graph(training, options):
    model = make_model(**options).train(training)
    inner = model.get_base_model().model
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    position = inner.rotary_emb(x, torch.arange(5)[None])
    model.base_model.recorder.open(model.base_model._layers(), training)
    layer = torch.compile(inner.layers[0], backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        found = layer(x, position_embeddings=position)
        record = model.base_model.recorder.close()
        expected = inner.layers[0](x, position_embeddings=position)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(record.entries) == 1
    assert record.entries[0][1].router_logits.requires_grad == training


def test_checkpointed_layers_are_compiled_too():
    def checkpointed():
        model = make_model(base=make_base(num_hidden_layers=1))
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    batches = [make_batch([6, 9, 4], seed=seed) for seed in range(2)]
    model = checkpointed()
    forward, counter = compiled(model)
    assert_same_steps(checkpointed(), model, forward, batches, 1e-5)
    checkpoints = [
        node for graph in counter.graphs for node in graph.graph.nodes if "checkpoint" in str(node.target)
    ]
    assert len(checkpoints) == 1
    assert_no_break_in_layers()


@torch.no_grad()
def test_evaluation_equals_the_uncompiled_model():
    model = make_model(base=make_base(num_hidden_layers=1)).eval()
    forward, counter = compiled(model)
    for seed in range(2):
        batch = make_batch([6, 9, 4], seed=seed)
        expected, found = model(**batch), forward(**batch)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert_no_break_in_layers()


@torch.no_grad()
def test_generation_with_a_static_cache_compiles_once_per_phase():
    model = make_model(base=make_base(num_hidden_layers=1)).eval()
    inner = model.get_base_model()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = make_batch([5, 5])["input_ids"]
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **options), expected)
    counter = CompileCounterWithBackend("aot_eager")
    inner.forward = torch.compile(inner.forward, backend=counter, dynamic=False)
    found = model.generate(input_ids=ids, cache_implementation="static", **options)
    assert torch.equal(found, expected)
    assert counter.frame_count == 2  # the prompt, then one token at a time
    assert_no_break_in_layers()


def test_trainer_compiles(tmp_path, monkeypatch):
    # transformers would turn TensorFloat32 on, where there is a GPU, for all tests that follow.
    monkeypatch.setattr("transformers.training_args.enable_tf32", lambda on: None)
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    expected, found = ([*run_trainer(tmp_path, [6] * 16, **chosen)[0]] for chosen in ({}, options))
    assert len(expected) == len(found) == 2
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert_no_break_in_layers()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_on_a_gpu(backend, mode):
    batches = [{n: t.cuda() for n, t in make_batch([6, 9, 4], seed=seed).items()} for seed in range(4)]
    # Weights and deltas of this size make of rounding a tenth of what the default ones do.
    sizes = {"backend": backend, "lora_alpha": 2}
    plain, model = (make_model(base=make_base(initializer_range=0.1), **sizes).cuda() for _ in range(2))
    assert_same_steps(plain, model, torch.compile(model, mode=mode), batches, 1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert_no_break_in_layers()


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_generation_on_a_gpu():
    """transformers compiles the decoding of a static cache by itself on CUDA."""
    model = make_model().eval().cuda()
    ids = make_batch([5, 5])["input_ids"].cuda()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, cache_implementation="static", **options), expected)
