"""The prediction of `graphlora bench` is close to a real run, and can tell when it is not."""

import time
from dataclasses import replace

import pytest
import torch
from small_llama import ADAPTERS, LLAMA
from transformers import GPT2Config

from graphlora.benchmark import layer
from graphlora.benchmark.layer import Setting, measure_parts, memory_parts
from graphlora.benchmark.memory import measure_memory, measure_saved
from graphlora.benchmark.prediction import measure_whole, predict, put_together
from graphlora.benchmark.random_model import bypassed, random_model, twin, with_layers
from graphlora.benchmark.timing import Stopwatch, interleave
from graphlora.tuner.auxiliary import auxiliary_loss
from graphlora.tuner.compiled_layers import decoder_layers

CPU = torch.device("cpu")
KINDS = {"frozen": None, **ADAPTERS}
# What `graphlora bench` promises.
TOLERANCE = 0.3
TRIES = 4


def setting(**changes) -> Setting:
    return replace(Setting(LLAMA, 2, 64, CPU, torch.float32, iterations=5), **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_memory_is_that_of_a_real_run(kind, checkpointing):
    asked = setting(gradient_checkpointing=checkpointing, iterations=1)
    predicted, measured = predict(asked, KINDS[kind]), measure_whole(asked, KINDS[kind])
    assert predicted.peak == pytest.approx(measured.peak, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_predicted_too(kind):
    torch._dynamo.reset()
    asked = setting(iterations=1, compiler="aot_eager")
    predicted, measured = predict(asked, KINDS[kind]), measure_whole(asked, KINDS[kind])
    assert predicted.peak == pytest.approx(measured.peak, rel=TOLERANCE)


def test_predicted_time_is_that_of_a_real_run():
    gaps = []
    for _ in range(TRIES):  # a busy machine can slow down either half
        asked = setting()
        predicted = predict(asked, ADAPTERS["graphlora"])
        measured = measure_whole(asked, ADAPTERS["graphlora"])
        gaps.append(abs(predicted.step / measured.step - 1))
        if gaps[-1] <= TOLERANCE:
            return
    pytest.fail(f"off by {[f'{gap:.0%}' for gap in gaps]}")


def test_auxiliary_losses_count_once_per_step_not_once_per_layer():
    parts = measure_parts(setting(iterations=1), ADAPTERS["graphlora"])
    assert parts.losses > 0
    more = replace(parts, losses=parts.losses + 7.0)
    assert put_together(setting(), more).step - put_together(setting(), parts).step == pytest.approx(7.0)
    assert measure_parts(setting(iterations=1), ADAPTERS["lora"]).losses == 0


def test_the_losses_of_all_layers_are_timed(monkeypatch):
    blocks = []

    def watched(record, *rest):
        layers = [layer for layer, _ in record.entries]
        blocks.append(len(layers))
        # Each has a state of its own, as in a model.
        for state in ("graphlora_router", "graphlora_coordination"):
            assert len({id(getattr(layer, state)) for layer in layers}) == len(layers)
        return auxiliary_loss(record, *rest)

    monkeypatch.setattr("graphlora.benchmark.layer.auxiliary_loss", watched)
    measure_parts(setting(iterations=1), ADAPTERS["graphlora"])
    assert set(blocks) == {LLAMA.num_hidden_layers}


@pytest.mark.parametrize(("room", "times"), [(2**30, 4), (0, 1)])
def test_a_small_layer_is_timed_several_times_on_end(room, times, monkeypatch):
    monkeypatch.setattr("graphlora.benchmark.layer._REPEATED_BYTES", room)
    asked = []
    alone = layer._layer_alone
    monkeypatch.setattr(layer, "_layer_alone", lambda *args: (asked.append(args[2:]), alone(*args))[1])
    parts = measure_parts(setting(iterations=1), ADAPTERS["graphlora"])
    assert (times,) in asked
    assert parts.activations == memory_parts(setting(), ADAPTERS["graphlora"]).activations


def test_a_wrong_number_of_layers_would_be_noticed():
    parts = measure_parts(setting(iterations=1), ADAPTERS["graphlora"])
    wrong = put_together(setting(config=with_layers(LLAMA, 8)), parts)
    measured = measure_whole(setting(iterations=1), ADAPTERS["graphlora"])
    assert wrong.peak > (1 + TOLERANCE) * measured.peak


def test_counts_are_those_of_the_whole_model():
    predicted = predict(setting(iterations=1), ADAPTERS["lora"])
    model = random_model(LLAMA, CPU, torch.float32)
    assert predicted.weights == 4 * sum(p.numel() for p in model.parameters())
    ranks = {(128, 128): 2, (64, 128): 2, (352, 128): 2, (128, 352): 1}
    assert predicted.trained == 5 * sum(8 * count * sum(size) for size, count in ranks.items())


def test_other_architectures_are_taken_apart_too():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    predicted = predict(setting(config=config, length=16, iterations=1), None)
    assert predicted.weights == 4 * sum(
        p.numel() for p in random_model(config, CPU, torch.float32).parameters()
    )


def test_a_twin_shares_its_weights_and_bypassed_layers_come_back():
    model = random_model(LLAMA, CPU, torch.float32)
    other = twin(model)
    layers = decoder_layers(other)
    assert other.lm_head is not model.lm_head
    assert other.lm_head.weight is model.lm_head.weight
    ids = torch.arange(10)[None]
    before = other(ids).logits
    with bypassed(layers):
        assert not torch.equal(other(ids).logits, before)
    assert torch.equal(other(ids).logits, before)


def test_memory_counts_what_is_held_and_the_most_at_a_time():
    with measure_memory(CPU) as memory:
        kept = torch.zeros(1000)
        torch.zeros(5000)
        kept = kept + 1
    assert memory.kept == 4000
    assert memory.peak == 24000


def test_saved_storages_count_once_and_whole():
    x = torch.randn(10, 10, requires_grad=True)
    weight = torch.randn(10, 10)
    with measure_saved([weight]) as saved:
        y = x @ weight
        z = y[:5].exp() * y.exp()[:5]
    assert saved.num_bytes == 200 + 400
    assert z.requires_grad


@pytest.mark.parametrize(("in_a_row", "timed"), [(2, 1), (4, 3)])
def test_calls_in_a_row_come_before_the_timed_ones(in_a_row, timed):
    calls = []

    def call_of(name):
        def call(watch: Stopwatch) -> None:
            calls.append(name)
            time.sleep(0.02 if calls[-2:] != [name, name] else 0)  # the first of a turn
            watch.lap("half")

        return call

    own = {n: call_of(n) for n in "ab"}
    result = interleave(own, CPU, warmup=1, iterations=2, in_a_row=in_a_row, timed=timed)
    turns = ["".join(calls[i : i + 2 * in_a_row]) for i in range(0, 6 * in_a_row, 2 * in_a_row)]
    assert set(turns) == {"a" * in_a_row + "b" * in_a_row, "b" * in_a_row + "a" * in_a_row}
    for name in "ab":
        assert result.timings[name]["full"].iterations == 2 * timed
        assert result.timings[name]["full"].high < 10


def test_a_failing_candidate_leaves_the_others():
    def good(watch: Stopwatch) -> None:
        watch.lap("half")

    def bad(watch: Stopwatch) -> None:
        raise RuntimeError("no kernel for this")

    result = interleave({"bad": bad, "good": good}, CPU, warmup=1, iterations=4, failures=(RuntimeError,))
    assert result.errors == {"bad": "RuntimeError: no kernel for this"}
    assert result.timings["good"]["half"].iterations == 4
    with pytest.raises(RuntimeError):
        interleave({"bad": bad}, CPU, warmup=0, iterations=1)
