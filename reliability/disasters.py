"""What goes wrong around a run: full disks, read-only places, lost files, signals, damaged checkpoints; nothing mocked.

Each scene starts `graphlora train`, lets the disaster happen, and wants three things: one line that says what happened
and what to do, an exit code that is documented, and a checkpoint from which the run goes on to the weights of an
undisturbed one. Disks are small tmpfs mounts, in a mount namespace of the command's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from graphlora.training.checkpoints import CHECKPOINTS, STAGING, last_checkpoint
from reliability.kills import Forked
from reliability.record import ROOT, write_record
from reliability.tiny import differing, recipe

PROMISE = (
    "A full disk, a read-only directory, vanished data, a damaged checkpoint, Ctrl-C and SIGTERM each end in a message "
    "and a usable checkpoint, from which the run ends with the weights of an undisturbed one."
)
EARLY = 4
GO_ON = r"once that is mended, go on with: graphlora train --config \S+ --resume$"
PATIENCE = 120.0


class Wrong(Exception):
    """A scene did not end as promised."""


class Stage:
    """Model, data and an undisturbed run; starts further runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.path = folder / "recipe.yaml"
        self.undisturbed = folder / "undisturbed"
        self.data = folder / "rows.jsonl"
        self.path.write_text(yaml.safe_dump(recipe(folder, output_dir=str(self.undisturbed))))
        self.run([], 0)

    def start(self, words: list[str]) -> Forked:
        """Start a run with an empty log."""
        self.log.write_text("")
        return Forked(["--config", str(self.path), *words], self.log)

    def run(self, words: list[str], code: int) -> str:
        """A whole run; its last line."""
        return self.end(self.start(words), code)

    def end(self, process: Forked, code: int) -> str:
        """Wait for the end; the last line of the log."""
        self.until(lambda: process.poll() is not None, process)
        text = self.log.read_text()
        if process.poll() != code or "Traceback" in text:
            raise Wrong(f"exit code {process.poll()} instead of {code}: {text[-2000:]}")
        lines = text.strip().splitlines()
        return lines[-1] if lines else ""

    def until(self, holds: Callable[[], bool], process: Forked) -> None:
        """Wait until it holds; the process may end meanwhile."""
        end = time.perf_counter() + PATIENCE
        while not holds():
            if time.perf_counter() > end:
                process.kill()
                raise Wrong(f"nothing happened in {PATIENCE:.0f} s: {self.log.read_text()[-2000:]}")
            if process.poll() is not None and not holds():
                return
            time.sleep(0.0005)

    def started(self, output: Path) -> Forked:
        """A run that has written a checkpoint and goes on."""
        process = self.start(["--output_dir", str(output)])
        self.until((output / CHECKPOINTS / f"checkpoint-{EARLY}").exists, process)
        if process.poll() is not None:
            raise Wrong(f"the run ended too early: {self.log.read_text()[-2000:]}")
        return process

    def goes_on(self, output: Path) -> None:
        """Resume and compare with the undisturbed run."""
        if last_checkpoint(output) is None:
            raise Wrong(f"no whole checkpoint in {output}")
        self.run(["--output_dir", str(output), "--resume"], 0)
        if "going on from " not in self.log.read_text():
            raise Wrong("the run did not resume")
        different, total = differing(self.undisturbed, output)
        if different:
            raise Wrong(f"{different} of {total} tensors differ after going on")


def expect(pattern: str, line: str) -> str:
    """The line, if it is as promised."""
    if not re.search(pattern, line):
        raise Wrong(f"expected {pattern!r}, got {line!r}")
    return line


def mount(place: Path, options: str) -> Path:
    """A small disk of its own at the place."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    return place


def full_disk(stage: Stage) -> str:
    """The disk fills up while the run is on."""
    disk = mount(stage.folder / "small", "size=6m")
    output, filler = disk / "out", disk / "filler"
    process = stage.started(output)
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            pass
    line = stage.end(process, 2)
    expect(
        rf"cannot write .*No space left on device; the last whole checkpoint is \S+checkpoint-\d+; {GO_ON}",
        line,
    )
    filler.unlink()
    stage.goes_on(output)
    return line


def full_disk_at_start(stage: Stage) -> str:
    """There is too little room from the beginning."""
    disk = mount(stage.folder / "tiny", "size=256k")
    line = stage.run(["--output_dir", str(disk / "out")], 2)
    return expect(r"has 0 MB free, it needs about \d MB; make room", line)


def read_only_at_start(stage: Stage) -> str:
    """The directory cannot be written from the beginning."""
    disk = mount(stage.folder / "read_only", "size=1m,ro")
    line = stage.run(["--output_dir", str(disk / "out")], 2)
    return expect(r"cannot write to output_dir .*: Read-only file system; choose another", line)


def read_only_in_between(stage: Stage) -> str:
    """The directory becomes read-only while the run is on."""
    disk = mount(stage.folder / "turning", "size=32m")
    output = disk / "out"
    process = stage.started(output)
    while subprocess.run(["mount", "-o", "remount,ro", str(disk)], stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.001)  # a file is open for writing
    line = stage.end(process, 2)
    expect(
        rf"cannot write .*Read-only file system.*; the last whole checkpoint is \S+checkpoint-\d+; {GO_ON}",
        line,
    )
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    stage.goes_on(output)
    return line


def file_in_place_of_directory(stage: Stage) -> str:
    """`output_dir` leads through a file."""
    (stage.folder / "file").write_text("")
    line = stage.run(["--output_dir", str(stage.folder / "file" / "out")], 2)
    return expect(r"cannot write to output_dir .*Not a directory; choose another", line)


def data_gone_before(stage: Stage) -> str:
    """The data file is not there."""
    line = stage.run(
        ["--output_dir", str(stage.folder / "gone"), "--task", str(stage.folder / "no.jsonl")], 2
    )
    return expect(r"no data file", line)


def data_gone_in_between(stage: Stage) -> str:
    """The data file vanishes while the run is on; it is missed when the run is resumed, and put back."""
    output, aside = stage.folder / "lost", stage.folder / "aside.jsonl"
    process = stage.started(output)
    stage.data.rename(aside)
    os.kill(process.pid, signal.SIGTERM)
    stage.end(process, 143)
    line = stage.run(["--output_dir", str(output), "--resume"], 2)
    expect(r"no data file", line)
    aside.rename(stage.data)
    stage.goes_on(output)
    return line


def _signalled(stage: Stage, number: int, code: int, name: str) -> str:
    output = stage.folder / name
    process = stage.started(output)
    os.kill(process.pid, number)
    line = stage.end(process, code)
    expect(r"stopped; saved \S+checkpoint-\d+\. Go on with: graphlora train --config \S+ --resume$", line)
    stage.goes_on(output)
    return line


def sigterm(stage: Stage) -> str:
    """A preempted node."""
    return _signalled(stage, signal.SIGTERM, 143, "preempted")


def ctrl_c(stage: Stage) -> str:
    """A person who has seen enough."""
    return _signalled(stage, signal.SIGINT, 130, "interrupted")


def second_signal(stage: Stage) -> str:
    """A second signal does not wait for the end of the step or of a save."""
    output = stage.folder / "twice"
    process = stage.started(output)
    stage.until((output / CHECKPOINTS / STAGING).exists, process)
    # Two of one kind would arrive as one.
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    line = stage.end(process, 143)
    # Checkpoints of even steps are saved anyway; no other one was saved on the way out.
    expect(r"stopped; saved \S+checkpoint-\d*[02468]\. Go on with: ", line)
    stage.goes_on(output)
    return line


def _damaged(stage: Stage, name: str, spoil: Callable[[Path], object], reason: str) -> str:
    output = stage.folder / name
    process = stage.started(output)
    os.kill(process.pid, signal.SIGTERM)
    stage.end(process, 143)
    newest = last_checkpoint(output)
    assert newest is not None
    spoil(newest)
    stage.goes_on(output)
    log = stage.log.read_text()
    lines = [line for line in log.splitlines() if "is damaged" in line]
    return expect(
        rf"{newest.name} is damaged \({reason}\); it is passed over and kept as damaged-", "".join(lines)
    )


def checkpoint_cut_short(stage: Stage) -> str:
    """The newest checkpoint lost the end of a file."""
    return _damaged(
        stage,
        "cut",
        lambda path: os.truncate(path / "optimizer.pt", 1000),
        r"optimizer.pt has 1000 of \d+ bytes",
    )


def checkpoint_with_a_flipped_bit(stage: Stage) -> str:
    """The newest checkpoint has another bit somewhere; its size and form are right."""

    def flip(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(bytes(content))

    return _damaged(stage, "flipped", flip, "adapter_model.safetensors is not what was written")


def checkpoint_without_a_file(stage: Stage) -> str:
    """The newest checkpoint lost a file."""
    return _damaged(stage, "without", lambda p: (p / "rng_state.pth").unlink(), "rng_state.pth is missing")


MOUNTED = (full_disk, full_disk_at_start, read_only_at_start, read_only_in_between)
SCENES = (
    *MOUNTED,
    file_in_place_of_directory,
    data_gone_before,
    data_gone_in_between,
    sigterm,
    ctrl_c,
    second_signal,
    checkpoint_cut_short,
    checkpoint_with_a_flipped_bit,
    checkpoint_without_a_file,
)


def play(names: list[str]) -> dict[str, str]:
    """Play scenes in this process, which may mount; the line that each ended in."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import graphlora.training.run  # noqa: F401 - loaded once, for all forks

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name))
        for scene in SCENES:
            if scene.__name__ in names:
                found[scene.__name__] = scene(stage).replace(name, "")
                print(f"{scene.__name__}: {found[scene.__name__]}", flush=True)
        for disk in ("small", "tiny", "read_only", "turning"):
            if (stage.folder / disk).is_mount():
                subprocess.run(["umount", str(stage.folder / disk)], check=True)
    return found


def can_mount() -> bool:
    """Whether this user may mount in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(words, capture_output=True).returncode == 0


def play_apart(names: list[str]) -> dict[str, str]:
    """Play scenes in a process of their own, with its own mounts where scenes need some.

    Raises:
        Wrong: A scene did not end as promised.
    """
    mounts = any(scene.__name__ in names for scene in MOUNTED)
    words = [sys.executable, "-W", "ignore", "-m", "reliability.disasters", "--play", *names]
    done = subprocess.run(
        ["unshare", "-rm", *words] if mounts else words, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise Wrong(f"{done.stdout}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Play all scenes and record."""
    names = [scene.__name__ for scene in SCENES]
    if not can_mount():
        raise SystemExit(
            "this user cannot mount in a namespace (unshare -rm); run as root or allow user namespaces"
        )
    found = play_apart(names)
    figure = f"{len(found)} of {len(names)} disasters end in a message; all runs that had begun go on to equal weights"
    test = "tests/reliability/test_disasters.py"
    write_record("disasters", PROMISE, test, figure, {"lines": found})
    print(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reliability.disasters", description=__doc__)
    parser.add_argument(
        "--play", nargs="+", metavar="SCENE", help="play these scenes here and write no record"
    )
    chosen = parser.parse_args().play
    if chosen:
        print(json.dumps(play(chosen)))
    else:
        main()
