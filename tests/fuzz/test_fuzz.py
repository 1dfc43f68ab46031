"""Every reader of files ends in success or one clear error: on new inputs, and on those that once found a bug.

`python -m reliability.fuzz READER --count 100000` is the same at full size.
"""

import pytest
from reliability.fuzz.reader import Reader, check, write_input
from reliability.fuzz.run import CORPUS, READERS, fuzz, replay

from graphlora.errors import GraphLoraError

INPUTS = 300
ENTRIES = [entry for name in READERS for entry in sorted((CORPUS / name).glob("*"))]


@pytest.mark.parametrize("name", READERS)
def test_no_input_ends_in_anything_but_success_or_one_line(name):
    counts = fuzz(READERS[name], INPUTS, seed=20261122)
    assert counts.bugs == {}
    assert counts.reached >= 0.3, counts.outcomes
    assert counts.outcomes["accepted"] > 0
    assert counts.outcomes["validators"] > 0


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.parent.name}-{entry.name}")
def test_inputs_that_found_bugs(entry, tmp_path):
    outcome = replay(READERS[entry.parent.name], entry, tmp_path)
    assert outcome.kind != "bug", outcome.detail


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_a_corpus(name):
    assert any((CORPUS / name).glob("*")), f"no inputs for {name}"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyError("x"), "bug"),
        (MemoryError(), "bug"),
        (GraphLoraError(""), "bug"),
        (GraphLoraError("a.json: broken"), "validators"),
        (None, "accepted"),
    ],
)
def test_the_fuzzer_tells_errors_of_ours_from_bugs(error, kind, tmp_path):
    def validate(parsed):
        if error is not None:
            raise error

    reader = Reader("x", "x", lambda rng: {}, lambda folder: folder, validate, ())
    assert check(reader, tmp_path).kind == kind


def test_inputs_follow_from_the_seed():
    from random import Random

    for reader in READERS.values():
        assert reader.generate(Random("a")) == reader.generate(Random("a"))
        assert any(reader.generate(Random(str(i))) != reader.generate(Random("a")) for i in range(5))


def test_files_of_the_input_before_are_gone(tmp_path):
    write_input({"a.json": b"1", "b.json": b"2"}, tmp_path)
    write_input({"b.json": b"3"}, tmp_path, {"a.json": b"1", "b.json": b"2"})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("b.json", b"3")]
