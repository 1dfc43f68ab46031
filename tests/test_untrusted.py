"""Text of others: bounded in size and depth, one line whatever is wrong, and nothing that drives the terminal."""

import pickle

import pytest
import yaml

from graphlora import untrusted
from graphlora.errors import MAX_LENGTH, GraphLoraError, one_line
from graphlora.typed import Mismatch, fits, fitted
from graphlora.untrusted import compose_yaml, local_path, parse_json, read_json_object, read_text, yaml_value

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP_CHAIN = "- &a0 [x]\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 200))

BAD_YAML = {
    "laughs": (LAUGHS, "more than 100,000 values"),
    "laughs by merging": (LAUGHS + "z: {<<: [*i, *i]}", "more than 100,000 values"),
    "inside itself": ("a: &a [*a]", r"f\.yaml:1: an alias stands inside of what it names"),
    "deep": ("[" * 200_000, "nested more than 100 deep"),
    "deep blocks": ("- " * 200_000, "nested more than 100 deep"),
    "deep by aliases": (DEEP_CHAIN, "nested more than 100 deep"),
    "python": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no date": ("a: 2001-99-99", "does not fit its type"),
    "no number": ("a: !!int x", "does not fit its type"),
    "digits": ("a: " + "9" * 5000, "does not fit its type"),
    "no bool": ("a: !!bool x", "does not fit its type"),
    "tab": ("a:\n\t- b", r"f\.yaml:2: broken YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML)
@pytest.mark.parametrize("loader", ["C", "Python"])
def test_yaml_that_ends_in_one_line(text, message, loader, monkeypatch):
    if loader == "Python":
        monkeypatch.setattr(untrusted, "_LOADER", yaml.SafeLoader)
    with pytest.raises(GraphLoraError, match=message):
        yaml_value(compose_yaml(text, "f.yaml"), "f.yaml")


def test_aliases_and_merges_of_ordinary_size_are_fine():
    text = "base: &base {r: 8, top_k: 2}\nours: {<<: *base, r: 4}\nlist: [*base, *base]"
    value = yaml_value(compose_yaml(text, "f"), "f")
    assert value["ours"] == {"r": 4, "top_k": 2}
    assert value["list"] == [{"r": 8, "top_k": 2}] * 2


BAD_JSON = {
    "deep": ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
    "deep enough": ("[" * 101 + "]" * 101, "nested more than 100 deep"),
    "digits": ("1" * 5000, "too many digits"),
    "half a pair": ('{"a": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": ('{"\\uDfff": 1}', "half of a surrogate pair"),
    "broken": ('{"a": 1,\n}', r"x: broken JSON \(.* at line 2, column 1\)"),
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_ends_in_one_line(text, message):
    with pytest.raises(GraphLoraError, match=message):
        parse_json(text, "x")


def test_json_of_ordinary_shape_is_fine():
    assert parse_json("[" * 100 + "]" * 100, "x")
    assert parse_json('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
    wide = [[0]] * 500
    assert parse_json(str(wide), "x") == wide


def test_files_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path, "a thing") == {"a": 1}
    with pytest.raises(GraphLoraError, match=r"larger than 4 bytes; that is not a thing"):
        read_text(path, "a thing", limit=4)
    path.write_bytes(b"\xff")
    with pytest.raises(GraphLoraError, match="not UTF-8 text"):
        read_text(path, "a thing")
    with pytest.raises(GraphLoraError, match="cannot read a thing"):
        read_text(tmp_path / "none", "a thing")
    with pytest.raises(GraphLoraError, match="cannot read a thing"):
        read_text(tmp_path / "a\0b", "a thing")


def test_an_endless_file_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(GraphLoraError, match=r"larger than 1,048,576 bytes"):
        untrusted.read_yaml(tmp_path / "sparse.yaml", "the recipe")


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "~nobody-of-that-name/x", "not there"])
def test_names_that_are_no_path_here(name):
    assert local_path(name) is None


def test_a_message_is_one_printable_line_of_bounded_length():
    error = GraphLoraError("a\nb\x1b[2J\u202e" + "x" * 10_000 + "; the remedy")
    text = str(error)
    assert text.startswith("a b\\x1b[2J\\u202e")
    assert text.endswith("; the remedy")
    assert text.isprintable()
    assert len(text) <= MAX_LENGTH
    assert str(GraphLoraError(text)) == text
    assert str(pickle.loads(pickle.dumps(error))) == text
    assert len(one_line("\x00" * 10**6)) <= MAX_LENGTH


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-4", float, 1e-4),
        ("8", int | None, 8),
        (1, float | None, 1.0),
        ("null", str | None, None),
        ("null", str, "null"),
        ("8", str | None, "8"),
        ("[a, b]", str | list[str] | None, ["a", "b"]),
        ({"a": "1e-6", "b": [1]}, dict[str, object] | dict[str, float], None),
        ({"a": 1}, str | dict[str, float], {"a": 1.0}),
    ],
)
def test_values_become_their_type(value, hint, expected):
    if expected is None and isinstance(value, dict):
        with pytest.raises(Mismatch):
            fitted({**value, 1: 2}, hint)
        return
    found = fitted(value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1.0, int),
        ("x", float),
        (10**400, float),
        (None, int),
        ({1: 2}, dict[str, int]),
        (["a"], list[int]),
    ],
)
def test_values_of_another_type(value, hint):
    assert not fits(value, hint)
    with pytest.raises(Mismatch):
        fitted(value, hint)
