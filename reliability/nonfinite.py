"""Runs in which one row of the data makes one layer give a value that is not finite.

Layer, row and the way of finding out (the CPU's, or the GPU's, where the host looks one step later) are drawn anew for
each run. A run that stops must name the layer and the row; one that leaves the step out must do so too, and leave
weights, optimizer, loads and running means exactly as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graphlora.training import Recipe, train
from graphlora.training.nonfinite import NonFiniteError, NonFiniteGuard
from graphlora.training.trainer import AdapterTrainer
from graphlora.training.workbench import Workbench
from reliability.record import write_record
from reliability.tiny import recipe

PROMISE = (
    "A loss or gradient that is not finite stops the run, or is left out without a trace, and names the step, the row "
    "of the data and the first layer."
)
PARTS = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
LAYERS = ("model.embed_tokens", "lm_head", *(f"model.layers.{i}.{part}" for i in range(2) for part in PARTS))
# A token that only the chosen row has.
MARK = "~"


class Spoiling(Workbench):
    """The surroundings of a run whose base model breaks at a layer for rows with the mark."""

    quiet = True

    def __init__(self, layer: str, value: float) -> None:
        self._layer, self._value = layer, value
        self._rows: Tensor | None = None

    def base_model(self, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The base model with hooks."""
        model = super().base_model(recipe, dtype, device)
        mark = self.tokenizer(recipe).convert_tokens_to_ids(MARK)

        def see(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self._rows = (ids == mark).any(dim=1)

        def spoil(module: Any, args: Any, output: Tensor) -> Tensor:
            del module, args
            assert self._rows is not None
            bad = self._rows[:, None, None] if len(self._rows) == len(output) else torch.zeros(())
            return torch.where(bad > 0, torch.full_like(output, self._value), output)

        model.model.register_forward_pre_hook(see, with_kwargs=True)
        model.get_submodule(self._layer).register_forward_hook(spoil)
        return model


def spoil_data(folder: Path, position: int) -> Path:
    """The data with a mark in one row, and that row's name; validation does not have it."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [row | {"id": f"row-{number}"} for number, row in enumerate(rows)]
    rows[position]["question"] = f"What color is {MARK}?"
    data = folder / f"marked{position}"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "validation.jsonl").write_text(json.dumps(rows[(position + 1) % len(rows)]) + "\n")
    return data


def run_case(folder: Path, number: int, draw: random.Random) -> dict[str, Any]:
    """One run; what it was, and `wrong` with the reason where it did not end as promised."""
    layer, position = draw.choice(LAYERS), draw.randrange(40)
    skips, waits, value = draw.random() < 0.5, draw.random() < 0.5, draw.choice((float("nan"), float("inf")))
    values = recipe(
        folder,
        task=str(spoil_data(folder, position)),
        output_dir=str(folder / f"case{number}"),
        eval_strategy="no",
        max_steps=6,
        seed=draw.randrange(1000),
        optim="adamw_torch" if waits else "adamw_torch_fused",
        on_nonfinite="skip" if skips else "stop",
    )
    told = io.StringIO()
    states: list[dict[str, Tensor]] = []
    with _ways(waits, states), contextlib.redirect_stderr(told):
        try:
            train(Recipe.from_dict(values), workbench=Spoiling(layer, value))
            line = next((line for line in told.getvalue().splitlines() if "left out" in line), "")
        except NonFiniteError as error:
            line = str(error)
    case = {"layer": layer, "row": f"row-{position}", "skips": skips, "waits": waits, "line": line}
    return case | {"wrong": _what_is_wrong(case, states)}


def _what_is_wrong(case: dict[str, Any], states: list[dict[str, Tensor]]) -> str | None:
    line = case["line"]
    if f"first in the output of {case['layer']}, row(s) {case['row']} (" not in line:
        return f"layer or row not named: {line!r}"
    if not case["skips"]:
        return None
    step = int(line.split(" at step ")[1].split(";")[0])
    if step >= len(states):
        return None  # the last step: nothing was looked at after it
    before, after = states[step - 1], states[step]
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return f"the step left out changed {moved}" if moved else None


@contextlib.contextmanager
def _ways(waits: bool, states: list[dict[str, Tensor]]) -> Any:
    """Chooses how the guard finds out, and keeps what training keeps before each step."""
    set_up, step = NonFiniteGuard.__init__, AdapterTrainer.training_step

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        set_up(self, *args, **kwargs, waits=waits)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if len(states) == self.state.global_step:
            states.append(_state(self))
        return step(self, *args, **kwargs)

    with (
        mock.patch.object(NonFiniteGuard, "__init__", init),
        mock.patch.object(AdapterTrainer, "training_step", training_step),
    ):
        yield


def _state(trainer: Any) -> dict[str, Tensor]:
    found = {name: t.clone() for name, t in trainer.model.state_dict().items() if "lora" in name}
    for number, state in trainer.optimizer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": t.clone() for name, t in state.items()}
    return found


def run_cases(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` runs."""
    draw = random.Random(seed)
    recipe(folder)
    return [run_case(folder, number, draw) for number in range(count)]


def main(count: int, seed: int) -> None:
    """Run and record."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cases = run_cases(Path(name), count, seed)
    if wrong := [case for case in cases if case["wrong"]]:
        raise SystemExit(f"the promise does not hold: {wrong}")
    left_out = sum(case["skips"] for case in cases)
    figure = (
        f"{count} runs ({count - left_out} stopped, {left_out} left the step out): all name row and layer, "
        "0 values of weights, optimizer and loads changed"
    )
    write_record(
        "nonfinite",
        PROMISE,
        "tests/training/test_nonfinite.py",
        figure,
        {"runs": count, "left_out": left_out, "layers": len({case["layer"] for case in cases}), "seed": seed},
    )
    print(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reliability.nonfinite", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="runs (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of layers and rows (default: 0)")
    options = parser.parse_args()
    main(options.count, options.seed)
