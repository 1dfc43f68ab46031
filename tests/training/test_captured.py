"""Recorded steps: same losses, gradients and state as eager ones, whatever the shapes and the accumulation.

On a CPU the steps are run again on the same buffers; on a GPU they are CUDA graphs.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_llama import largest_gap, make_base, make_batch, make_model

from graphlora.errors import GraphLoraError
from graphlora.training import captured
from graphlora.training.captured import CapturedSteps

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["graphlora", "lora"])
def model(request, device):
    if request.param == "lora":
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", lora_dropout=0.1)
        return get_peft_model(make_base(), config).to(device).train()
    # Recording may take another path through the experts, which draws its dropout in another order.
    dropout = 0.1 if device.type == "cpu" else 0.0
    return make_model(lora_dropout=dropout, attention_target_modules=["q_proj", "v_proj"]).to(device)


LENGTHS = [([9, 5], 12), ([12, 3], 12), ([4, 7], 8), ([12, 12], 12), ([8, 2], 8), ([6, 6], 8)]


def batches(device, steps: int, accumulation: int):
    """Optimizer steps of micro-batches of two shapes; all know the number of labels of their step."""
    made = []
    for step in range(steps):
        parts = [
            make_batch(*LENGTHS[(step * accumulation + part) % len(LENGTHS)], seed=step * 10 + part)
            for part in range(accumulation)
        ]
        total = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        made.append(
            [
                {**{k: v.to(device) for k, v in part.items()}, "num_items_in_batch": total.to(device)}
                for part in parts
            ]
        )
    return made


def train(model, made, steps_of=None):
    """Losses, final state, and the gradient norms, of training with or without recorded steps."""

    def step(inputs):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    run = (lambda inputs: step(inputs)) if steps_of is None else (lambda inputs: steps_of(step, inputs))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    losses, norms = [], []
    for parts in made:
        losses += [run(part) for part in parts]
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        model.zero_grad()
    return torch.stack(losses).cpu(), torch.stack(norms).cpu(), model.state_dict()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_recorded_steps_train_like_eager_ones(model, device, accumulation):
    made = batches(device, 10, accumulation)
    losses, norms, state = train(copy.deepcopy(model), made)
    told = []
    steps = CapturedSteps(model, device=device, tell=told.append)
    again_losses, again_norms, again_state = train(model, made, steps)
    assert steps.num_graphs == len(told) == 2
    if device.type == "cpu":
        assert torch.equal(again_losses, losses)
        assert torch.equal(again_norms, norms)
        assert all(torch.equal(again_state[name], value) for name, value in state.items())
        return
    # The eager step on a GPU chooses its attention kernel by looking at the mask, the recorded one cannot; and AdamW
    # makes full steps of gradients that are nothing but rounding.
    torch.testing.assert_close(again_losses[:3], losses[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again_losses, losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again_norms, norms, rtol=1e-2, atol=1e-2)
    trained = {name: value for name, value in state.items() if "lora_" in name}
    assert largest_gap(trained, again_state) < 1e-2


def test_recording_leaves_no_trace(model, device):
    """Recording in the middle of an accumulated step keeps its gradients, the loads and the random state."""
    (first, second), *_ = batches(device, 1, 2)
    states = []
    for early in (False, True):
        one = copy.deepcopy(model)
        steps = CapturedSteps(one, device=device)

        def step(inputs, one=one):
            loss = one(**inputs).loss
            loss.backward()
            return loss.detach()

        other_shape = {k: v[:1] if v.dim() else v for k, v in second.items()}
        if early:
            steps(step, other_shape)
            one.zero_grad()
            one.load_state_dict(model.state_dict())
        torch.manual_seed(2)
        steps(step, first)
        steps(step, other_shape)
        states.append(
            [p.grad.clone() for p in one.parameters() if p.grad is not None]
            + [b.clone() for b in one.buffers()]
            + [torch.rand(3, device=device)]
        )
    tolerance = 0 if device.type == "cpu" else 1e-6
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_parameters_without_gradient_keep_none_and_are_not_decayed(device):
    """The optimizer skips what has no gradient; a gradient of zeros would let weight decay shrink it."""
    model = make_model(router_poisson_loss_coef=0.0).to(device)
    steps = CapturedSteps(model, device=device)

    def step(inputs):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    steps(step, batches(device, 1, 1)[0][0])
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing
    assert all("poisson_rate" in name for name in missing)


def test_gradients_stay_at_their_addresses(model, device):
    steps = CapturedSteps(model, device=device)

    def step(inputs):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    seen = set()
    for parts in batches(device, 3, 2):
        for part in parts:
            steps(step, part)
            seen.add(tuple(p.grad.data_ptr() for p in model.parameters() if p.grad is not None))
        model.zero_grad(set_to_none=True)
    assert len(seen) == 1


def test_dropout_is_drawn_anew_in_each_replay(device):
    model = make_model(lora_dropout=0.5).to(device)
    steps = CapturedSteps(model, device=device)

    def step(inputs):
        out = model(**inputs)
        out.loss.backward()
        return (out.loss - out.aux_loss).detach()

    inputs = batches(device, 1, 1)[0][0]
    losses = [float(steps(step, inputs)) for _ in range(4)]
    assert len(set(losses)) == 4


def test_shapes_beyond_the_limit_run_eagerly_with_the_same_result(model, device):
    made = batches(device, 4, 2)
    losses, _, _ = train(copy.deepcopy(model), made)
    told = []
    steps = CapturedSteps(model, device=device, max_graphs=1, tell=told.append)
    again, _, _ = train(model, made, steps)
    assert steps.num_graphs == 1
    assert "more than 1 input shapes" in told[1]
    assert len(told) == 2
    tolerance = 0 if device.type == "cpu" else 1e-3
    torch.testing.assert_close(again, losses, rtol=tolerance, atol=tolerance)


class Refusing(captured.Rerun):
    """A recorder that cannot, as CUDA where a step waits for the device."""

    def __init__(self, step, device, pool):
        step()
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_recorded_is_an_error_or_runs_eagerly(model, monkeypatch):
    device = torch.device("cpu")
    model = model.cpu()
    monkeypatch.setattr(captured, "Rerun", Refusing)
    made = batches(device, 3, 2)
    with pytest.raises(GraphLoraError, match=r"not permitted when.*set step_mode to eager"):
        train(copy.deepcopy(model), made, CapturedSteps(copy.deepcopy(model), device=device))
    losses, _, state = train(copy.deepcopy(model), made)
    told = []
    steps = CapturedSteps(model, device=device, must_record=False, tell=told.append)
    again, _, again_state = train(model, made, steps)
    assert len(told) == 1
    assert "going on without" in told[0]
    assert torch.equal(again, losses)
    assert all(torch.equal(again_state[name], value) for name, value in state.items())


@pytest.mark.gpu
def test_evaluation_between_replays_changes_nothing():
    device = torch.device("cuda")
    model = make_model(lora_dropout=0.0).to(device)
    steps = CapturedSteps(model, device=device)

    def step(inputs):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    inputs = batches(device, 1, 1)[0][0]
    with torch.no_grad():
        before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(3):
        model.load_state_dict(before)
        losses.append(steps(step, inputs))
        model.eval()
        with torch.no_grad():
            model(**{k: v for k, v in inputs.items() if k != "num_items_in_batch"})
        model.zero_grad()
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(3), rtol=1e-6, atol=1e-6)


def test_a_warm_up_has_padding_as_a_recording_may_have_it(model, device):
    """While it is recorded, transformers cannot look whether a mask is needed; a warm-up must not leave it away."""
    steps, seen = CapturedSteps(model, device=device), []

    def step(inputs):
        seen.append(inputs["attention_mask"].clone())
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    batch = {name: tensor.to(device) for name, tensor in make_batch([8, 8]).items()}
    steps(step, batch)
    warm_ups, recorded = seen[: captured.NUM_WARM_UPS], seen[captured.NUM_WARM_UPS :]
    assert not any(bool(mask.all()) for mask in warm_ups)
    if device.type == "cpu":
        assert all(torch.equal(mask, batch["attention_mask"]) for mask in recorded)
