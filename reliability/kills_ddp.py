"""`reliability.kills` for two processes (gloo) under torchrun: all of them are killed at once, as a node is lost."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from reliability.kills import Pair, fail_unless_held, figure, record_values, run_rounds
from reliability.record import write_record

PROMISE = "A run of two processes, killed at any moment, resumes from a whole checkpoint and ends with equal weights."


def main(count: int, seed: int) -> None:
    """Run and record."""
    with tempfile.TemporaryDirectory() as name:
        tally = run_rounds(Path(name), count, seed, Pair, print, per_device_train_batch_size=2)
    fail_unless_held(tally)
    write_record(
        "kills_ddp", PROMISE, "`python -m reliability.kills_ddp`", figure(tally), record_values(tally)
    )
    print(figure(tally))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reliability.kills_ddp", description=__doc__)
    parser.add_argument("--count", type=int, default=5, help="kills (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    options = parser.parse_args()
    main(options.count, options.seed)
