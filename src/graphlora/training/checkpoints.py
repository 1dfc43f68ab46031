"""Output directories and checkpoints: refused early where they must fail, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphlora.errors import GraphLoraError
from graphlora.records import flush, write_text
from graphlora.training.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from graphlora.training.manifest import MANIFEST_FILE, sha256

CHECKPOINTS = "checkpoints"
STAGING = ".incomplete"
RECIPE_FILE = "config.yaml"
RECORD_FILE = "record.json"
STATE_FILE = "trainer_state.json"
SEAL_FILE = "checksums.json"
CARD_FILE = "README.md"
# Metadata, and then the section about GraphLoRA or PEFT's template.
GENERATED_CARD = re.compile(
    r"\s*(---\n.*?\n---\s*)?(<!-- graphlora -->|# Model Card for Model ID)", re.DOTALL
)
DAMAGED = "damaged-"
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
    _clear_leftovers(output)
    if resume:
        _set_aside_damaged(output)
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
    """Whether training can go on from the checkpoint: nothing missing, nothing cut short, nothing changed."""
    return damage(checkpoint) is None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; `None` for a whole one.

    Every file must be what was written, by size and SHA-256. Checkpoints of releases that wrote no checksums are whole
    where their files can be read.
    """
    try:
        sealed = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))["files"]
        for name, (size, digest) in sealed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
            if sha256(path) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return _damage_without_seal(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL_FILE} cannot be read ({error})"
    return None if STATE_FILE in sealed else f"{SEAL_FILE} does not list {STATE_FILE}"


def seal(checkpoint: Path) -> None:
    """Write down the size and SHA-256 of every file of a finished checkpoint."""
    files = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, sha256(path)]
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_text(checkpoint / SEAL_FILE, json.dumps({"files": files}, indent=1) + "\n")


def _damage_without_seal(checkpoint: Path) -> str | None:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        read_adapter(checkpoint)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    randomness = list(checkpoint.glob("rng_state*.pth"))
    for path in (*(checkpoint / name for name in TORCH_FILES), *randomness):
        if not path.is_file() or not zipfile.is_zipfile(path):
            return f"{path.name} is missing or cut short"
    return None if randomness else "rng_state.pth is missing"


def go_on_command(output: Path) -> str:
    """The command that resumes a run; processes that torchrun started on this machine are started again."""
    several, local = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    by_config = os.environ.get("ACCELERATE_USE_FSDP") is not None
    launch = f"torchrun --nproc_per_node {local} -m " if several == local != "1" and not by_config else ""
    return f"{launch}graphlora train --config {shlex.quote(str(output / RECIPE_FILE))} --resume"


def checkpoint_processes(checkpoint: Path) -> int:
    """Number of processes that wrote a checkpoint: each one leaves its random state."""
    return max(1, len(list(checkpoint.glob("rng_state*.pth"))))


def refused_pickle(checkpoint: Path | None, error: Exception) -> GraphLoraError:
    """The error of a checkpoint whose optimizer, scheduler or random state holds more than tensors and numbers.

    transformers loads these files with `weights_only`, so that nothing in them has run.
    """
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = f" ({found.group(1)})" if found else ""
    return GraphLoraError(
        f"{checkpoint} holds more than tensors{what} in {', '.join(TORCH_FILES)} or rng_state.pth; it was not run. "
        "Delete that checkpoint and resume from the one before, or start again with --overwrite"
    )


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
    """Put a finished directory in its place by renaming; a reader never sees half of it, also after a crash."""
    for path in (*source.rglob("*"), source):
        flush(path)
    old = _replaced(target)
    if target.exists():
        target.rename(old)
    source.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where a directory waits while another one takes its place."""
    return target.with_name(f".{target.name}.old")


def _clear_leftovers(output: Path) -> None:
    """Remove what a killed process left half done."""
    for staging in (output / STAGING, output / CHECKPOINTS / STAGING):
        shutil.rmtree(staging, ignore_errors=True)
    for name in (RECIPE_FILE, RECORD_FILE):
        for path in output.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    for old in (output / CHECKPOINTS).glob(".checkpoint-*.old"):
        target = old.with_name(old.name[1:].removesuffix(".old"))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _set_aside_damaged(output: Path) -> None:
    """Rename what is newer than the newest whole checkpoint, and say so.

    A damaged checkpoint that kept its name would be the newest, and so be kept in place of a whole one.
    """
    for path in _checkpoints(output):
        reason = damage(path)
        if reason is None:
            return
        aside = path.with_name(DAMAGED + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        sys.stderr.write(f"{path} is damaged ({reason}); it is passed over and kept as {aside.name}\n")


def _checkpoints(output: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [
        (int(path.name.split("-")[1]), path)
        for path in (output / CHECKPOINTS).glob("checkpoint-*")
        if path.is_dir() and path.name.split("-")[1].isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def remove_run(output: Path) -> None:
    """Delete what a run wrote; other files stay, and a model card that begins with somebody's own words."""
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    for name in (RECIPE_FILE, CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, MANIFEST_FILE):
        (output / name).unlink(missing_ok=True)
    card = output / CARD_FILE
    if card.is_file() and GENERATED_CARD.match(card.read_text(encoding="utf-8", errors="replace")):
        card.unlink()


def withdraw_recipe(output: Path) -> None:
    """Delete the recipe of a run that has saved nothing, so that the directory holds no run."""
    if not any(_checkpoints(output)):
        (output / RECIPE_FILE).unlink(missing_ok=True)


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _is_disk_failure(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(message in str(error).lower() for message in FULL_MESSAGES)
