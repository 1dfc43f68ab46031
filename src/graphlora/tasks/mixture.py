"""Mixtures of tasks: examples of several sources in given proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphlora.errors import GraphLoraError
from graphlora.tasks.catalog import check_known, load_examples
from graphlora.tasks.example import Example, TextExample


@dataclass(frozen=True)
class Mixture:
    """Sources and their weights; only the ratios of the weights matter.

    Attributes:
        weights: Spec (as in `load_examples`) to a weight above 0.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        """Raise `GraphLoraError` for no sources or a weight that is not above 0."""
        if not self.weights:
            raise GraphLoraError("the mixture is empty; give at least one task with a weight")
        for spec, weight in self.weights.items():
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not 0 < weight < float("inf")
            ):
                raise GraphLoraError(
                    f"the mixture gives {spec!r} the weight {weight!r}; give a number above 0"
                )

    def load(
        self, split: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
    ) -> list[Any]:
        """Examples of all sources, shuffled; ids get the source before them, and so do empty domains.

        Args:
            split: Split of every source.
            data_dir: As in `load_examples`.
            limit: Size of the mixture; sources too small for their share repeat. Without it, the mixture is
                as large as the first source to run out allows, and nothing repeats.
            seed: Seed of the choice and the order.

        Raises:
            GraphLoraError: A source cannot be loaded, or `limit` is below 1.
        """
        if limit is not None and limit < 1:
            raise GraphLoraError(f"limit is {limit}; give at least 1, or leave it out")
        for spec in self.weights:
            check_known(spec)
        parts = [_marked(spec, load_examples(spec, split, data_dir=data_dir)) for spec in self.weights]
        total = sum(self.weights.values())
        shares = np.array([weight / total for weight in self.weights.values()])
        size = limit or max(
            1, int(min(len(part) / share for part, share in zip(parts, shares, strict=True)) + 1e-9)
        )
        generator = np.random.default_rng(seed)
        mixed = [
            item
            for part, count in zip(parts, _counts(shares, size), strict=True)
            for item in _draw(part, count, generator)
        ]
        return [mixed[int(position)] for position in generator.permutation(len(mixed))]


def load_mixture(
    weights: Mapping[str, float],
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Any]:
    """Examples of `Mixture(weights)`; see `Mixture.load`."""
    return Mixture(weights).load(split, data_dir=data_dir, limit=limit, seed=seed)


def _marked(spec: str, examples: Sequence[Example | TextExample]) -> list[Example | TextExample]:
    return [replace(item, id=f"{spec}/{item.id}", domain=item.domain or spec) for item in examples]


def _counts(shares: np.ndarray, size: int) -> list[int]:
    """Whole numbers that add up to `size` and are closest to the shares (largest remainders)."""
    exact = shares * size
    counts = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: size - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def _draw(part: list[Any], count: int, generator: np.random.Generator) -> list[Any]:
    """`count` items without repeats, or in whole passes over the part where it is too small."""
    chosen: list[int] = []
    while len(chosen) < count:
        chosen.extend(int(position) for position in generator.permutation(len(part))[: count - len(chosen)])
    return [part[position] for position in chosen]
