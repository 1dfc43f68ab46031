"""Output directories and checkpoints: refused early where they must fail, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphlora.errors import GraphLoraError
from graphlora.training.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from graphlora.training.manifest import MANIFEST_FILE

CHECKPOINTS = "checkpoints"
STAGING = ".incomplete"
RECIPE_FILE = "config.yaml"
RECORD_FILE = "record.json"
STATE_FILE = "trainer_state.json"
TORCH_FILES = ("optimizer.pt", "scheduler.pt")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
FULL_MESSAGES = (
    "no space left",
    "file too large",
    "quota exceeded",
    "failed writing",
    "read-only file system",
)


def prepare_output(output_dir: str | Path, *, resume: bool, overwrite: bool) -> Path | None:
    """Make the output directory, and find out before any work whether the run can go there.

    Args:
        output_dir: The directory.
        resume: Go on from the newest whole checkpoint.
        overwrite: A run that is there may be replaced; `remove_run` does it once everything else is in order.

    Returns:
        The checkpoint to go on from; `None` to start at the beginning.

    Raises:
        GraphLoraError: The directory cannot be written, or holds a run and neither option is given.
    """
    output = Path(output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as file:
            file.write(b"0")
    except OSError as error:
        raise GraphLoraError(
            f"cannot write to output_dir {output}: {error.strerror}; choose another"
        ) from error
    shutil.rmtree(output / CHECKPOINTS / STAGING, ignore_errors=True)
    if resume:
        return last_checkpoint(output)
    if holds_run(output) and not overwrite:
        raise GraphLoraError(
            f"output_dir {output} holds a run already; add --resume to go on with it, --overwrite to "
            "replace it, or choose another output_dir"
        )
    return None


def holds_run(output: Path) -> bool:
    """Whether a run has written its recipe, adapter or checkpoints there."""
    names = (RECIPE_FILE, CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE)
    return any((output / name).exists() for name in names) or any(_checkpoints(output))


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint whose files are all there and whole."""
    return next((path for path in _checkpoints(output) if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether training can go on from the checkpoint: nothing missing, nothing cut short."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        read_adapter(checkpoint)
    except (OSError, ValueError):
        return False
    randomness = list(checkpoint.glob("rng_state*.pth"))
    files = [*(checkpoint / name for name in TORCH_FILES), *randomness]
    return bool(randomness) and all(path.is_file() and zipfile.is_zipfile(path) for path in files)


def checkpoint_processes(checkpoint: Path) -> int:
    """Number of processes that wrote a checkpoint: each one leaves its random state."""
    return max(1, len(list(checkpoint.glob("rng_state*.pth"))))


def check_space(output: Path, num_bytes: int) -> None:
    """Raise `GraphLoraError` where the disk has less room than `num_bytes`."""
    # Another process may be about to make the directory; its parent is on the same disk.
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise GraphLoraError(
            f"output_dir {output} has {free / 1e6:.0f} MB free, it needs about {num_bytes / 1e6:.0f} MB; "
            "make room, lower save_total_limit, or choose another"
        )


@contextmanager
def writing(place: Path, kept: str) -> Iterator[None]:
    """Turn a failure of the disk while writing `place` into one clear line that says what is kept.

    Raises:
        GraphLoraError: The disk is full, or the place cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, _safetensor_error()) as error:
        if not _is_disk_failure(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
        raise GraphLoraError(f"cannot write {place}: {reason}; {kept}") from error


def replace_directory(source: Path, target: Path) -> None:
    """Put a finished directory in its place by renaming; a reader never sees half of it."""
    for path in source.rglob("*"):
        if path.is_file():
            _flush(path)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    source.rename(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(output: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [
        (int(path.name.split("-")[1]), path)
        for path in (output / CHECKPOINTS).glob("checkpoint-*")
        if path.is_dir() and path.name.split("-")[1].isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def remove_run(output: Path) -> None:
    """Delete what a run wrote; other files stay."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    for name in (RECIPE_FILE, CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, MANIFEST_FILE, "README.md"):
        (output / name).unlink(missing_ok=True)


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _is_disk_failure(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(message in str(error).lower() for message in FULL_MESSAGES)
