"""One JSON record per run: what was run, on what, from which source, with which result. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.untrusted import parse_json

SCHEMA_VERSION = 1
# In the provenance of a study's runs: its worker processes on the device. Older records lack it.
WORKERS = "workers_on_device"
PACKAGES = (
    "graphlora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "trl",
    "triton",
    "lm_eval",
)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The record of one run.

    Attributes:
        kind: Sort of run: `"evaluation"`, `"training"`, ...
        run_id: Identifier, unique without coordination.
        created: UTC time of the record, ISO 8601.
        config: Everything that decides the run, as JSON values.
        config_hash: `config_hash(config)`; two runs of one configuration share it.
        metrics: Results, as JSON values.
        provenance: `provenance()` of the process.
        model: Name or path of the base model, and the adapter where there is one.
        seed: Seed of the run.
        device: Device the run used, `"cpu"` or the accelerator's name.
        dtype: Type of the weights.
        wall_time: Seconds.
        peak_memory: Bytes; `None` where it cannot be measured.
        data_hash: `data_hash` of the examples.
        study: Study that the run belongs to.
        variant: Variant within the study.
        schema_version: Version of this format.
    """

    kind: str
    run_id: str
    created: str
    config: dict[str, Any]
    config_hash: str
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    model: str | None = None
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    wall_time: float | None = None
    peak_memory: int | None = None
    data_hash: str | None = None
    study: str | None = None
    variant: str | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def create(
        cls, kind: str, config: Mapping[str, Any], metrics: Mapping[str, Any], **rest: Any
    ) -> RunRecord:
        """A new record of this moment and this process.

        Args:
            kind: Sort of run.
            config: Everything that decides the run.
            metrics: Results.
            rest: Further fields of the record.
        """
        return cls(
            kind=kind,
            run_id=uuid.uuid4().hex[:12],
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            config=dict(config),
            config_hash=config_hash(config),
            metrics=dict(metrics),
            provenance=provenance(),
            **rest,
        )

    def to_json(self) -> str:
        """The record as JSON text; numbers that are not finite become null."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=2, ensure_ascii=False, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "record") -> RunRecord:
        """The record in a JSON text.

        Args:
            text: The text.
            where: Its place, for error messages.

        Raises:
            GraphLoraError: Not a record, a version this release does not know, or fields of a wrong type.
        """
        values = parse_json(text, where)
        if not isinstance(values, dict) or "schema_version" not in values:
            raise GraphLoraError(f"{where}: not a run record (no schema_version)")
        if values["schema_version"] != SCHEMA_VERSION:
            raise GraphLoraError(
                f"{where}: schema_version {values['schema_version']!r} is unknown; "
                f"this release reads {SCHEMA_VERSION}"
            )
        _check_fields(values, where)
        return cls(**values)

    def write(self, path: str | Path) -> Path:
        """Write the record so that a reader sees the old file or the whole new one, also after a crash.

        Raises:
            GraphLoraError: The place cannot be written.
        """
        return write_text(path, self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """The record in a file.

        Raises:
            GraphLoraError: No such file, or not a record.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GraphLoraError(f"cannot read the record {path}: {error}") from error
        return cls.from_json(text, str(path))


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file through a temporary file beside it, flushed to disk and then renamed.

    Raises:
        GraphLoraError: The place cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise GraphLoraError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error
    return path


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk; not for directories on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of a configuration, the same for any order of its keys (16 hexadecimal digits)."""
    return hashlib.sha256(_canonical(config).encode()).hexdigest()[:16]


def data_hash(items: Iterable[Any]) -> str:
    """Hash of examples (data classes or JSON values) in their order (16 hexadecimal digits)."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(_canonical(item).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Where a result comes from: source commit, package versions, platform.

    Returns:
        `commit` and `dirty` (`None` where the package does not run from a git checkout), `versions` of the
        installed packages, `python`, `platform` and `cpu_count`.
    """
    commit, dirty = _source()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def _source() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(status)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check_fields(values: dict[str, Any], where: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(RunRecord)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
    )
    if unknown or missing:
        parts = [
            f"{kind} {', '.join(names)}"
            for kind, names in (("unknown", unknown), ("missing", missing))
            if names
        ]
        raise GraphLoraError(f"{where}: fields of a run record do not fit: {'; '.join(parts)}")
    for name, value in values.items():
        if not isinstance(value, _types(str(fields[name].type))) or isinstance(value, bool):
            raise GraphLoraError(f"{where}: field {name} is {value!r}; expected {fields[name].type}")


def _types(annotation: str) -> tuple[type, ...]:
    known = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "dict[str, Any]": (dict,),
        "None": (type(None),),
    }
    return tuple(kind for part in annotation.split(" | ") for kind in known[part])


def _canonical(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value
