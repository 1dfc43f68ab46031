"""`manifest.json` beside an adapter: what its files, its base model and its output were when it was made.

`graphlora verify` reads it. It finds damage and mix-ups; who can write the folder can also write a new manifest, so it
is no signature. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from graphlora.adapter_table import MANIFEST_FILE
from graphlora.errors import GraphLoraError
from graphlora.records import write_text
from graphlora.training.adapter_files import CONFIG_FILE, WEIGHTS_FILE

SCHEMA_VERSION = 1
# The model card is left out: people write in it.
REQUIRED, OPTIONAL = (CONFIG_FILE, WEIGHTS_FILE), ("config.yaml", "record.json")
HASHED = (*REQUIRED, *OPTIONAL)
# What decides which weights and which computation a base model has, under the names of transformers.
IDENTITY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an adapter was when it was made.

    Attributes:
        created: UTC time, ISO 8601.
        files: SHA-256 of each of the adapter's files, by name.
        base_config: Shape of the base model: `base_identity` of its config.
        base_weights: `"sha256:..."` of a sample of every weight of the base; `None` where it was not taken.
        output: Recorded output (`graphlora.training.reproducing`); `None` where there is none.
        reason: Why there is no output.
        schema_version: Version of this format.
    """

    created: str
    files: dict[str, str]
    base_config: dict[str, Any]
    base_weights: str | None = None
    output: dict[str, Any] | None = None
    reason: str | None = None
    schema_version: int = SCHEMA_VERSION

    def write(self, adapter: Path) -> Path:
        """Write it beside the adapter.

        Raises:
            GraphLoraError: The place cannot be written.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"
        return write_text(adapter / MANIFEST_FILE, text)


def read_manifest(adapter: Path) -> Manifest:
    """The manifest of an adapter.

    Raises:
        GraphLoraError: There is none (an adapter from elsewhere), or it is damaged.
    """
    path = adapter / MANIFEST_FILE
    if not path.is_file():
        raise GraphLoraError(
            f"{adapter} has no {MANIFEST_FILE}, so nothing says what it should be; where you trust these files, "
            f"make one with: graphlora verify {adapter} --record"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        version = values.get("schema_version") if isinstance(values, dict) else None
        raise _damaged(path, f"schema_version is {version!r}, this release reads {SCHEMA_VERSION}")
    fields = {field.name: field for field in dataclasses.fields(Manifest)}
    for name in {**fields, **values}:
        expected = _types(str(fields[name].type)) if name in fields else ()
        if not isinstance(values.get(name), expected):
            raise _damaged(path, f"{name} is {str(values.get(name))[:80]!r}")
    for name, digest in values["files"].items():
        if name not in HASHED or not isinstance(digest, str):
            raise _damaged(path, f"files names {name!r}, which is no file of an adapter")
    if missing := [name for name in REQUIRED if name not in values["files"]]:
        raise _damaged(path, f"files does not name {missing[0]}")
    return Manifest(**values)


def hash_files(adapter: Path) -> dict[str, str]:
    """SHA-256 of each of the adapter's files that is there.

    Raises:
        GraphLoraError: One cannot be read.
    """
    return {name: sha256(adapter / name) for name in HASHED if (adapter / name).is_file()}


def compare_files(adapter: Path, manifest: Manifest) -> dict[str, str]:
    """What became of each recorded file: `"as recorded"`, `"changed"` or `"missing"`.

    Raises:
        GraphLoraError: One cannot be read.
    """
    found = hash_files(adapter)
    return {
        name: "missing" if name not in found else "as recorded" if found[name] == digest else "changed"
        for name, digest in manifest.files.items()
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        GraphLoraError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise GraphLoraError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    return digest.hexdigest()


def base_identity(config: Any) -> dict[str, Any]:
    """What of a base model's config must stay the same, as JSON values; of a composed model, its text part's."""
    text = config.get_text_config()
    values = {name: getattr(text, name, None) for name in IDENTITY}
    return {name: value for name, value in values.items() if isinstance(value, (str, int, bool))}


def compare_base(config: Any, manifest: Manifest) -> list[str]:
    """Differences between a base model's config and the recorded one, each as `"vocab_size 100, recorded 200"`."""
    found = base_identity(config)
    return [
        f"{name} {found.get(name)}, recorded {value}"
        for name, value in manifest.base_config.items()
        if found.get(name) != value
    ]


def _damaged(path: Path, detail: str) -> GraphLoraError:
    return GraphLoraError(f"{path} is no manifest ({detail}); restore it from a copy")


def _types(annotation: str) -> tuple[type, ...]:
    known = {"str": str, "int": int, "None": type(None)}
    return tuple(known.get(part, dict) for part in annotation.split(" | "))
