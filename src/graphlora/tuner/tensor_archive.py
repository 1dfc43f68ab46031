"""The tensors in a file of `torch.save`, without unpickling it: nothing in the file can run, or ask for memory.

Such a file is a zip archive with a pickle that describes the tensors and one record of raw values for each storage. The
two dozen pickle instructions that `torch.save` writes for a table of tensors are interpreted here, and every size is
compared with the record it is about. `torch.load(weights_only=True)` runs no code either, but trusts those sizes.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from graphlora.errors import GraphLoraError

MAX_PICKLE_BYTES = 64 * 2**20
MAX_DIMENSIONS = 8
_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
}
_TENSOR, _PARAMETER, _TABLE = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)
_KNOWN = {*_DTYPES, _TENSOR, _PARAMETER, _TABLE}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()


class _Damaged(Exception):
    """The file is not what `torch.save` writes; the text says in what."""


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    values: Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds a table of float tensors, float32.

    Args:
        path: a file of `torch.save`.

    Raises:
        GraphLoraError: the file is damaged, or holds anything but float tensors by name.
    """
    if not zipfile.is_zipfile(path):
        raise GraphLoraError(f"{path} is truncated, or no file of torch.save; copy it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Reader(archive, path).table()
    except _Damaged as error:
        raise GraphLoraError(f"{path} is damaged ({error}); copy it again.") from error
    # A hostile pickle can fail in any of these ways within the reader, zipfile or torch; none runs anything.
    except (
        OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError,
        zipfile.BadZipFile, NotImplementedError, zlib.error, struct.error,
    ) as error:  # fmt: skip
        if isinstance(error, GraphLoraError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GraphLoraError(f"{path} is damaged ({reason}); copy it again.") from error
    return content


class _Reader:
    """Interprets the pickle of one archive."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self.archive, self.path = archive, path
        self.sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        self.folder = self._folder()
        self.storages: dict[str, _Storage] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def table(self) -> dict[str, Tensor]:
        content = self._interpret(self.archive.read(f"{self.folder}data.pkl"))
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise GraphLoraError(
                f"{self.path} holds no table of tensors; it is not a checkpoint of the authors' code."
            )
        num_values = sum(value.numel() for value in content.values())
        if num_values > sum(self.sizes.values()):
            raise _Damaged("its tensors share their values")
        return {name: value.float() for name, value in content.items()}

    def _folder(self) -> str:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in self.archive.infolist()):
            raise _Damaged("it is compressed, which torch.save does not do")
        size = self.path.stat().st_size
        if sum(self.sizes.values()) > size or len(self.sizes) != len(self.archive.infolist()):
            raise _Damaged("its parts overlap")
        pickles = [name for name in self.sizes if name.endswith("data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _Damaged("it has no data.pkl")
        if self.sizes[pickles[0]] > MAX_PICKLE_BYTES:
            raise _Damaged("its data.pkl is too large")
        folder = pickles[0].removesuffix("data.pkl")
        if self.sizes.get(f"{folder}byteorder", 0) > 16:
            raise _Damaged("its byte order is unknown")
        if f"{folder}byteorder" in self.sizes and self.archive.read(f"{folder}byteorder") != b"little":
            raise _Damaged("its byte order is not little-endian")
        return folder

    def _interpret(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[cast(int, argument)] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[cast(int, argument)])
            else:
                self._build(name, argument)
        raise _Damaged("it ends too early")

    def _build(self, name: str, argument: Any) -> None:
        """Instructions that make something of what is on the stack."""
        if name == "GLOBAL":
            if argument not in _KNOWN:
                raise self._more_than_tensors(argument)
            self.stack.append(_Name(argument))
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._since_mark() if name == "TUPLE" else self._pop(int(name[-1]))))
        elif name == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            self.stack.append(self._call(function, arguments))
        elif name == "BUILD":
            self.stack.pop()
        elif name not in ("PROTO", "FRAME"):
            self._collect(name)

    def _collect(self, name: str) -> None:
        """Instructions that make or fill a dict or a list."""
        if name in ("EMPTY_DICT", "EMPTY_LIST"):
            self.stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._since_mark()
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._since_mark()
            self.stack[-1].extend(items)
        else:
            # Names that the newer pickles put on the stack as text.
            texts = [part for part in self.stack[-2:] if isinstance(part, str)]
            raise self._more_than_tensors(" ".join(texts) or name)

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count or any(part is _MARK for part in self.stack[-count:]):
            raise _Damaged("its pickle is not whole")
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def _since_mark(self) -> list[Any]:
        start = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK), None)
        if start is None:
            raise _Damaged("its pickle is not whole")
        found = self.stack[start + 1 :]
        del self.stack[start:]
        return found

    def _storage(self, identity: Any) -> _Storage:
        what, dtype, key, _, count = identity
        if what != "storage" or not isinstance(dtype, _Name) or dtype.name not in _DTYPES:
            raise self._more_than_tensors(getattr(dtype, "name", str(what)))
        known = self.storages.get(key)
        if known is None:
            record = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            kind = _DTYPES[dtype.name]
            values = torch.frombuffer(record, dtype=kind) if record else torch.empty(0, dtype=kind)
            known = self.storages[key] = _Storage(values)
        if type(count) is not int or count != len(known.values) or known.values.dtype != _DTYPES[dtype.name]:
            raise _Damaged(f"the record of storage {key!r} is of another size")
        return known

    def _call(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, _Name) else ""
        if name == _TABLE:
            return dict(arguments[0]) if arguments else {}
        if name == _TENSOR:
            return _view(*arguments[:4])
        if name == _PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        raise _Damaged("its pickle is not whole")

    def _more_than_tensors(self, what: str) -> GraphLoraError:
        return GraphLoraError(
            f"{self.path} holds more than tensors ({what.replace(' ', '.')}); it was not run. Only open such a "
            "file if you trust its source, and save its tensors alone with torch.save."
        )


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """A tensor of these sizes on the storage, each value of which it holds once."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
        raise _Damaged("a tensor's sizes are no sizes")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or prod(size) > len(storage.values):
        raise _Damaged("a tensor is larger than its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage.values):
        raise _Damaged("a tensor is larger than its storage")
    return torch.as_strided(storage.values, size, stride, offset)
