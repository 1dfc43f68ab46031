"""Layers and loss compiled in place: the same steps, one compilation for all layers, nothing compiled elsewhere."""

from copy import deepcopy
from inspect import signature
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import adapter_state, assert_same, gradients, make_base, make_batch, make_model
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import graphlora
from graphlora import compile_layers
from graphlora.errors import GraphLoraError
from graphlora.tuner.compiled_layers import decoder_layers, last_norms

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:transformers .* checkpoints activations around the decoder layers:UserWarning"
    ),
]
CHECKPOINTS_AROUND_LAYERS = LlamaDecoderLayer.__call__ is not torch.nn.Module.__call__
OPTIONS = {"backend": "aot_eager"}


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def plain_lora(base):
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def graphlora_model(layers):
    return make_model(base=make_base(num_hidden_layers=layers))


def lora_model(layers):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(make_base(num_hidden_layers=layers), config).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [graphlora_model, lora_model])
def test_a_step_is_the_same_and_however_many_layers_are_compiled_once(make, checkpointing):
    found = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        plain, model = make(layers), make(layers)
        if checkpointing:
            for one in (plain, model):
                one.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with compile_layers(model, **OPTIONS):
            for batch in (make_batch([9, 6]), make_batch([9, 4], seed=1)):
                assert_same(step(model, batch), step(plain, batch), 1e-5)
                assert_same(adapter_state(model), adapter_state(plain), 1e-5)
        found.append(num_graphs())
        assert not counters["graph_break"]
    assert found[0] == found[1] > 0
    if checkpointing and CHECKPOINTS_AROUND_LAYERS:
        assert found[0] == 2  # the last norm and the loss


def test_a_shape_is_compiled_once_and_all_shapes_stay():
    """More versions of a layer than the eight that PyTorch keeps by default."""
    model = lora_model(2)
    compile_layers(model, backend="eager")
    seen = []
    for seed, length in enumerate((4, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8)):
        step(model, make_batch([length, 3], seed=seed))
        seen.append(num_graphs())
    each = seen[0]
    assert seen == [each * n for n in (1, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5)]


def test_what_needs_no_gradient_is_not_compiled():
    model = make_model(base=make_base()).train()
    compile_layers(model, **OPTIONS)
    batch = make_batch([7, 5])
    with torch.no_grad():
        model.eval()(**batch)
        model.generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False)
    assert num_graphs() == 0
    step(model.train(), batch)
    assert num_graphs() > 0


def test_undoing_leaves_the_model_as_it_was():
    model = make_model(base=make_base()).train()
    base = model.get_base_model()
    special = base.model.layers[1]
    special.forward = original = special.forward  # as hooks of other libraries do it
    before, cached = [dict(vars(layer)) for layer in base.model.layers], base.config.use_cache
    loss, limit = base.loss_function, torch._dynamo.config.cache_size_limit
    handle = compile_layers(model, **OPTIONS)
    assert base.loss_function is not loss
    handle.undo()
    handle.undo()
    assert [dict(vars(layer)) for layer in base.model.layers] == before
    assert special.forward is original
    assert base.config.use_cache is cached is True
    assert base.loss_function is loss
    assert torch._dynamo.config.cache_size_limit == limit
    step(model, make_batch([5]))
    assert num_graphs() == 0


def test_weights_keep_their_names_and_values_are_saved_as_ever(tmp_path):
    model = make_model(base=make_base()).train()
    names = list(model.state_dict())
    compile_layers(model, **OPTIONS)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_another_number_of_labels_is_not_another_loss():
    model = make_model(base=make_base(num_hidden_layers=2)).train()
    batch = make_batch([8, 8])
    expected = [float(model(**batch, num_items_in_batch=n).loss.detach()) for n in (3, 7, 11)]
    compile_layers(model, **OPTIONS)
    found, graphs = [], []
    for count in (3, 7, 11):
        found.append(float(model(**batch, num_items_in_batch=count).loss.detach()))
        graphs.append(num_graphs())
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(graphs)) == 1


def _broken(graph, inputs):
    raise RuntimeError("no compiler here\nwith details")


def test_a_compiler_that_fails_is_told_and_done_without():
    model = make_model(base=make_base()).train()
    batch, said, plain = make_batch([6, 4]), [], make_model(base=make_base())
    handle = compile_layers(model, tell=said.append, backend=_broken)
    for _ in range(2):
        assert_same(step(model, batch), step(plain, batch), 0)
    assert handle.failed
    assert said == ["torch.compile failed (RuntimeError: no compiler here); going on without"]


def test_a_compiler_that_fails_raises_where_nobody_is_told():
    model = make_model(base=make_base()).train()
    compile_layers(model, backend=_broken)
    with pytest.raises(BackendCompilerFailed, match="no compiler here"):
        step(model, make_batch([6, 4]))


def test_errors_of_the_model_itself_are_not_taken_for_the_compilers():
    model = make_model(base=make_base()).train()
    said = []
    compile_layers(model, tell=said.append, **OPTIONS)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert said == []


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_its_own_weights_and_is_not_compiled(copied, tmp_path):
    model = lora_model(2)
    special = model.get_base_model().model.layers[1]
    special.forward = MethodType(type(special).forward, special)
    compile_layers(model, **OPTIONS)
    batch = make_batch([6, 4])
    if copied == "deepcopy":
        copy = deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        copy = torch.load(tmp_path / "model.pt", weights_only=False)
    layers = copy.get_base_model().model.layers
    for layer in layers:
        with torch.no_grad():
            layer.mlp.down_proj.base_layer.weight.zero_()
            layer.self_attn.o_proj.base_layer.weight.zero_()
    graphs = num_graphs()
    plain = lora_model(2)
    assert_same(step(model, batch), step(plain, batch), 1e-5)
    assert num_graphs() > graphs
    graphs = num_graphs()
    own, others = step(copy, batch), step(plain, batch)
    assert float((own["loss"] - others["loss"]).abs()) > 1e-3
    assert num_graphs() == graphs
    assert copy.get_base_model().loss_function is plain.get_base_model().loss_function
    assert all(layer.forward.__self__ is layer for layer in layers)


def test_what_a_forward_takes_can_still_be_asked():
    model = lora_model(2)
    layer = model.get_base_model().model.layers[0]
    before = signature(layer.forward)
    compile_layers(model, **OPTIONS)
    assert signature(layer.forward) == before


def test_layers_are_not_compiled_twice():
    model = lora_model(2)
    handle = compile_layers(model, **OPTIONS)
    with pytest.raises(GraphLoraError, match="compiled already; undo that first"):
        compile_layers(model, **OPTIONS)
    handle.undo()
    compile_layers(model, **OPTIONS)


def test_a_model_without_layers_is_refused():
    with pytest.raises(GraphLoraError, match="Linear has no list of decoder layers"):
        compile_layers(torch.nn.Linear(2, 2))


def test_the_norm_behind_the_layers_is_compiled_along():
    model = lora_model(2)
    norm = model.get_base_model().model.norm
    assert last_norms(model) == [norm]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16))
    assert last_norms(gpt2) == [gpt2.transformer.ln_f]
    with compile_layers(model, **OPTIONS):
        assert "forward" in vars(norm)
    assert "forward" not in vars(norm)


def test_the_longest_stack_is_the_decoder():
    model = make_model(base=make_base(num_hidden_layers=5))
    assert len(decoder_layers(model)) == 5
    assert decoder_layers(model) is model.get_base_model().model.layers


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"deterministic": True}),
        ({"backend": "inductor"}, {"deterministic": True}),
        ({"options": {"max_autotune": True}}, {"deterministic": True, "max_autotune": True}),
        ({"options": {"deterministic": False}}, {"deterministic": False}),
        ({"mode": "max-autotune"}, None),
        ({"backend": "aot_eager"}, None),
    ],
)
def test_pytorchs_compiler_repeats_its_choices_unless_it_is_told_to_tune(monkeypatch, given, options):
    original, seen = torch.compile, []

    def compile(function, **arguments):
        seen.append(arguments)
        return original(function, **arguments)  # which refuses options that it does not know

    monkeypatch.setattr(torch, "compile", compile)
    compile_layers(lora_model(2), **given)
    assert seen
    assert all(arguments.get("options") == options for arguments in seen)


def test_it_is_public():
    assert graphlora.compile_layers is compile_layers
    assert "compile_layers" in graphlora.__all__


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inductor_on_a_gpu(backend, dtype):
    plain, model = (
        make_model(
            base=make_base(num_hidden_layers=4, initializer_range=0.1).to(dtype),
            backend=backend,
            lora_alpha=2,
        ).cuda()
        for _ in range(2)
    )
    with compile_layers(model):
        for seed in range(3):
            batch = {name: tensor.cuda() for name, tensor in make_batch([9, 6], seed=seed).items()}
            assert_same(step(model, batch), step(plain, batch), 1e-4 if dtype == torch.float32 else 5e-2)
    assert num_graphs() == 4  # the first layer, the others, the last norm, the loss
