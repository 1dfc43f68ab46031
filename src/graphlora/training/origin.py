"""Where numbers stop being finite: the first layer, and the rows of the batch. Runs a batch again, with hooks."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphlora.training.packing import TOKEN_MASK

MAX_ROWS = 4
MAX_TEXT = 60
LAST = sys.maxsize


@dataclass
class Origin:
    """The first tensor that is not finite.

    Attributes:
        place: In words, such as `"the output of model.layers.3.mlp"`.
        rows: Positions in the batch; empty where they cannot be told.
        order: How many tensors came before it, so that processes can tell whose is first.
    """

    place: str
    rows: list[int]
    order: int = 0


def find_origin(model: nn.Module, num_rows: int, run: Callable[[], Tensor]) -> Origin | None:
    """Forward and backward of one micro-batch; what in them is not finite first.

    Args:
        model: The adapted model.
        num_rows: Rows of the batch.
        run: Computes the loss.

    Returns:
        `None` where everything is finite.
    """
    found: list[Origin] = []
    # Within compiled layers no module would be seen.
    with torch.compiler.set_stance("force_eager"), _watched(model, num_rows, found):
        loss = run()
        if not found and not _is_finite(loss):
            found.append(Origin("the loss itself, of finite logits", [], LAST))
        # Always, because other processes may have found nothing and wait for this one.
        loss.backward()
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return Origin(f"the gradient of {_short(name)}", [], LAST)
    return None


@contextmanager
def _watched(model: nn.Module, num_rows: int, found: list[Origin]) -> Iterator[None]:
    """Within it, `found` gets what is not finite, in the order of computation."""
    seen = itertools.count()

    def look(name: str, tensor: Tensor, what: str) -> None:
        order = next(seen)
        if not found and not _is_finite(tensor):
            weights = model.get_submodule(name).parameters(recurse=False)
            cause = "" if all(map(_is_finite, weights)) else ", whose weights are not finite"
            found.append(Origin(f"the {what} of {_short(name)}{cause}", _bad_rows(tensor, num_rows), order))

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            for tensor in _tensors(output):
                look(name, tensor, "output")
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: look(name, grad, "gradient at the output"))

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _tensors(getattr(value, item.name))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor.detach()).all())


def _bad_rows(tensor: Tensor, num_rows: int) -> list[int]:
    if tensor.ndim < 2 or tensor.shape[0] != num_rows:
        return []
    return (~torch.isfinite(tensor.detach())).flatten(1).any(dim=1).nonzero().flatten().tolist()


def _short(name: str) -> str:
    if name in ("base_model", "base_model.model"):
        return "the model"
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@dataclass(frozen=True)
class NamedRows:
    """Rows of the data to train on, and what to call them.

    Attributes:
        rows: Each with `input_ids`; empty for data that is streamed.
        names: Their names.
        decode: From token ids to text.
    """

    rows: Sequence[Any]
    names: Sequence[str]
    decode: Callable[[list[int]], str]

    def words(self, tokens: Sequence[list[int]]) -> str:
        """Names of the rows with these token ids, and how they begin."""
        wanted = {tuple(row) for row in tokens}
        found: dict[tuple[int, ...], str] = {}
        for position, row in enumerate(self.rows):
            key = tuple(row["input_ids"])
            if key in wanted and key not in found:
                found[key] = self.names[position] if position < len(self.names) else str(position)
        words = []
        for row in tokens[:MAX_ROWS]:
            text = " ".join(self.decode(row).split())
            text = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
            name = found.get(tuple(row))
            words.append(f"{text!r}" if name is None else f"{name} ({text!r})")
        more = f" and {len(tokens) - MAX_ROWS} more" if len(tokens) > MAX_ROWS else ""
        return ", ".join(words) + more


def first_nonfinite(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    loss_of: Callable[[dict[str, Any]], Tensor],
    data: NamedRows,
) -> tuple[int, int, str] | None:
    """Where the micro-batches of a step stop being finite; `None` where they do not.

    Every process runs all of them, forward and backward, so that none waits for another. Gradients are changed.

    Args:
        model: The adapted model.
        batches: As the data loader gave them.
        loss_of: Loss of a micro-batch, which it may change.
        data: Names of the rows.

    Returns:
        Number of the micro-batch, number of the tensor in it, and both in words.
    """
    first = None
    for number, inputs in enumerate(batches):
        rows = batch_rows(inputs)
        origin = find_origin(model, len(rows), lambda inputs=inputs: loss_of(dict(inputs)))
        if origin is not None and first is None:
            chosen = [rows[row] for row in origin.rows if row < len(rows)] or rows
            first = number, origin.order, f"first in {origin.place}, row(s) {data.words(chosen)}"
    return first


def batch_rows(inputs: dict[str, Any]) -> list[list[int]]:
    """Token ids of each row of a batch, without padding; of a packed batch, of each document."""
    ids = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask", inputs.get(TOKEN_MASK))
    counted = torch.ones_like(ids) if mask is None else mask.cpu().view(ids.shape)
    positions = inputs.get("position_ids")
    if positions is not None and len(ids) == 1:
        starts = (positions.cpu()[0] == 0).nonzero().flatten().tolist()
        spans = zip(starts, [*starts[1:], ids.shape[1]], strict=True)
        documents = [ids[0, start:end][counted[0, start:end].bool()].tolist() for start, end in spans]
        return [tokens for tokens in documents if tokens]
    return [row[keep.bool()].tolist() for row, keep in zip(ids, counted, strict=True)]
