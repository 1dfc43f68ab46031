"""The order of rows: one that only the seed and the epoch decide, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Row positions in an order that only the seed and the epoch decide, so that a resumed run repeats it."""

    def __init__(self, lengths: Sequence[int], seed: int, group: int | None = None) -> None:
        """Order rows.

        Args:
            lengths: Tokens of each row.
            seed: Seed of the order.
            group: Rows per optimizer step where they are to be of similar length; `None` for any order.
        """
        self.lengths, self.seed, self.group, self.epoch = list(lengths), seed, group, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Positions of the rows of this epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group is not None:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch.

    accelerate does not reach a sampler behind both a shard and skipped batches, where it is when several processes go
    on in the middle of an epoch: they would see the rows in the order of the first epoch.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the order of the epoch that begins or goes on."""
        self._sampler.set_epoch(int((state.epoch or 0) + 1e-6))
