"""Changes valid documents: trees of plain values, text and bytes. Everything follows from the generator's seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Tree = Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    1000,
    4097,
    10**6,
    10**9,
    2**31,
    2**63,
    10**18,
    10**40,
    10**400,
    -(10**9),
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-12,
    1e-320,
    1e308,
    1e16,
    float("nan"),
    float("inf"),
    float("-inf"),
)
TEXTS = (
    "",
    " ",
    "0",
    "1",
    "-1",
    "1e-4",
    "1e999",
    "0x1f",
    "1_000",
    "1:30",
    "null",
    "~",
    "true",
    "no",
    "None",
    "nan",
    ".inf",
    "a" * 300,
    "A" * 5000,
    "\x00",
    "\x1b[2J",
    "\n",
    "\u202e\u2066",
    "\U0001f600",
    "\ud800",
    "é" * 40,
    "%s%n{0}{x!r}",
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "~",
    "~nobody9/x",
    "a/" * 300,
    "C:\\x",
    "file://x",
    "hub:a/b",
    "[",
    "(a+)+$",
    "a{99999999999}",
    "(?P<x>",
    ".*" * 20,
    "*",
    "\\",
    "all-linear",
    "__class__",
    "__import__('os')",
    "[1, 2]",
    "{a: 1}",
    "{'a': [",
    "&a [*a]",
    "!!python/object/apply:os.system [ls]",
    "2001-99-99",
    "base",
    "test",
)
MAX_TEXT = 20_000


def interesting(rng: Random) -> Tree:
    """A value that breaks assumptions."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NUMBERS)
    if kind < 0.75:
        return rng.choice(TEXTS)
    return copy.deepcopy(
        rng.choice(
            (
                None,
                True,
                False,
                [],
                {},
                [[]],
                [None],
                {"": None},
                [1, "a", None],
                {"a": {"b": [1]}},
                [[0, 1]] * 50,
            )
        )
    )


def deep(rng: Random, depth: int) -> Tree:
    """A value inside of `depth` lists or mappings."""
    value: Tree = rng.choice((0, "x", None))
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutate(tree: Tree, rng: Random, words: Sequence[Any] = (), count: int | None = None) -> Tree:
    """A changed copy of a tree of dicts, lists and plain values.

    Args:
        tree: The valid document.
        rng: Source of all choices.
        words: Keys and values that mean something to the reader.
        count: Number of changes; left out: mostly one or two.
    """
    tree = copy.deepcopy(tree)
    for _ in range(count or min(6, 1 + int(rng.expovariate(1.0)))):
        tree = _change(tree, rng, words)
    return tree


def mutate_text(text: str, rng: Random) -> str:
    """A text with characters inserted, deleted, repeated or replaced."""
    for _ in range(1 + int(rng.expovariate(1.0))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 1, 1, 2, 5, 40)))
        middle = rng.choice(
            ("", rng.choice(TEXTS), text[start:end] * rng.choice((2, 3, 30)), chr(rng.randrange(1, 0x3000)))
        )
        text = (text[:start] + middle + text[end:])[:MAX_TEXT]
    return text


def mutate_bytes(content: bytes, rng: Random) -> bytes:
    """Bytes with bits flipped, parts cut out, repeated or exchanged."""
    found = bytearray(content)
    for _ in range(1 + int(rng.expovariate(0.7))):
        start = rng.randrange(len(found) + 1)
        length = rng.choice((1, 1, 1, 2, 4, 8, 64))
        kind = rng.random()
        if kind < 0.4 and start < len(found):
            found[start] ^= 1 << rng.randrange(8)
        elif kind < 0.55:
            found[start : start + length] = rng.randbytes(length)
        elif kind < 0.7:
            del found[start : start + length]
        elif kind < 0.8:
            found[start:start] = found[start : start + length] * rng.choice((1, 2, 100))
        elif kind < 0.9:
            found[start:start] = rng.choice(
                (b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\n", b'"', b"\xed\xa0\x80", b"{", b"[")
            )
        else:
            del found[start:]
    return bytes(found)


def _change(tree: Tree, rng: Random, words: Sequence[Any]) -> Tree:
    places = list(_places(tree))
    if not places:
        return interesting(rng)
    parent, key = rng.choice(places)
    action: Callable[..., None] = rng.choices(
        (_set_interesting, _set_word, _retype, _tweak, _delete, _rename, _add, _resize, _deepen),
        (22, 16, 10, 22, 8, 6, 8, 6, 2),
    )[0]
    action(parent, key, rng, words)
    return tree


def _places(tree: Tree) -> Any:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def _set_interesting(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    parent[key] = interesting(rng)


def _set_word(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    parent[key] = copy.deepcopy(rng.choice(words)) if words else interesting(rng)


def _retype(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    value = parent[key]
    forms: list[Callable[[], Tree]] = [
        lambda: [value],
        lambda: {"a": value},
        lambda: str(value)[:MAX_TEXT],
        lambda: [value, value],
    ]
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        forms += [lambda: float(value), lambda: bool(value), lambda: int(value) if value == value else 0]
    if isinstance(value, (list, dict)) and value:
        forms += [lambda: next(iter(value.values() if isinstance(value, dict) else value))]
    parent[key] = rng.choice(forms)()


def _tweak(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value // 2, 0, 1))
    elif isinstance(value, float):
        parent[key] = rng.choice((value + 1, -value, value * 10, value / 10, value * 1e6, 0.0, 1.0))
    elif isinstance(value, str):
        parent[key] = mutate_text(value, rng)
    else:
        parent[key] = interesting(rng)


def _delete(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    del parent[key]


def _rename(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    value = parent.pop(key)
    names = [word for word in words if isinstance(word, str)]
    name: Any = rng.choice(names) if names and rng.random() < 0.6 else mutate_text(str(key), rng)
    if isinstance(parent, dict):
        parent[name] = value
    else:
        parent.insert(rng.randrange(len(parent) + 1), value)


def _add(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    value = copy.deepcopy(rng.choice(words)) if words and rng.random() < 0.5 else interesting(rng)
    if isinstance(parent, dict):
        names = [word for word in words if isinstance(word, str)]
        parent[rng.choice(names) if names and rng.random() < 0.7 else rng.choice(TEXTS)] = value
    else:
        parent.insert(rng.randrange(len(parent) + 1), value)


def _resize(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    value = parent[key]
    if isinstance(value, list) and value:
        parent[key] = (value * rng.choice((2, 3, 40)))[:400]
    elif isinstance(value, str):
        parent[key] = (value * rng.choice((2, 10, 500)))[:MAX_TEXT]
    elif isinstance(parent, list) and parent:
        rng.shuffle(parent)
    else:
        parent[key] = [value] * rng.choice((1, 2, 30))


def _deepen(parent: Tree, key: Any, rng: Random, words: Sequence[Any]) -> None:
    parent[key] = deep(rng, rng.choice((3, 20, 90, 150)))
