"""Who does which run: lock files in the results folder, so that processes and hosts that share it do not do the same.

A claim is the file `<run_id>.claim.<n>`, made so that only one process can succeed. The highest n holds. Where its
process is gone, the next one makes n + 1; nothing is ever taken away from under a process that still works.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from graphlora.errors import GraphLoraError

FOLDER = "claims"
REFRESH_SECONDS = 30.0
EXPIRE_SECONDS = 300.0


@dataclass(frozen=True)
class Owner:
    """A process: host, id, and when it started, because ids are used again."""

    host: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        return cls(host_name(), os.getpid(), psutil.Process().create_time())

    def is_gone(self) -> bool | None:
        """Whether the process has ended; `None` where only its own host could say."""
        if self.host != host_name():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class Claim:
    """A run that this process does."""

    path: Path

    def refresh(self) -> None:
        """Tell other hosts that the process is alive."""
        with suppress(FileNotFoundError):
            os.utime(self.path)

    def release(self) -> None:
        """Give the run back, or up once its record is there."""
        name = self.path.name.rpartition(".")[0]
        for path in self.path.parent.glob(f"{name}.*"):
            path.unlink(missing_ok=True)


def host_name() -> str:
    """Name of this host; containers on one machine count as hosts of their own."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}{space.removeprefix('pid:')}"


def claim(folder: Path, run_id: str) -> Claim | None:
    """Take a run, if no living process has it.

    Args:
        folder: Folder of the study's records.
        run_id: The run.

    Raises:
        GraphLoraError: The folder cannot be written.
    """
    place = folder / FOLDER
    newest = _newest(place, run_id)
    if newest is not None and not is_stale(newest):
        return None
    number = 1 if newest is None else int(newest.suffix[1:]) + 1
    path = place / f"{run_id}.claim.{number}"
    owner = Owner.me()
    text = json.dumps({"host": owner.host, "pid": owner.pid, "started": owner.started, "time": time.time()})
    try:
        place.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError:
        return None
    except OSError as error:
        raise GraphLoraError(f"cannot write {place}: {error.strerror}; choose another --output") from error
    return Claim(path)


def is_stale(path: Path) -> bool:
    """Whether the process of a claim has ended, or, on another host, has not refreshed it for too long."""
    try:
        owner = _owner(path)
        age = _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return False
    gone = None if owner is None else owner.is_gone()
    return age > EXPIRE_SECONDS if gone is None else gone


def claimed(folder: Path) -> dict[str, Owner | None]:
    """Runs that a living process does now."""
    found: dict[str, Owner | None] = {}
    for run_id in {path.name.split(".")[0] for path in (folder / FOLDER).glob("*.claim.*")}:
        newest = _newest(folder / FOLDER, run_id)
        if newest is not None and not is_stale(newest):
            found[run_id] = _owner(newest)
    return found


def claims_of(folder: Path, pid: int) -> list[str]:
    """Runs that a process of this host had claimed, whether it lives or not."""
    found = []
    for path in (folder / FOLDER).glob("*.claim.*"):
        owner = _owner(path)
        if owner is not None and (owner.host, owner.pid) == (host_name(), pid):
            found.append(path.name.split(".")[0])
    return found


@contextmanager
def refreshed(taken: Claim) -> Iterator[None]:
    """Refreshes a claim while the work inside runs."""
    done = threading.Event()

    def keep() -> None:
        while not done.wait(REFRESH_SECONDS):
            taken.refresh()

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _newest(place: Path, run_id: str) -> Path | None:
    pattern = re.compile(re.escape(run_id) + r"\.claim\.(\d+)")
    found = [path for path in place.glob(f"{run_id}.claim.*") if pattern.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.suffix[1:]), default=None)


def _owner(path: Path) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Owner(str(values["host"]), int(values["pid"]), float(values["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _now(folder: Path) -> float:
    """Time by the clock of the file system, which other hosts' refreshes are written in."""
    probe = folder / f".clock.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
