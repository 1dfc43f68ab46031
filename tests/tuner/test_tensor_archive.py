"""A file of `torch.save` is read without running it, and without believing the sizes that it states."""

import io
import zipfile

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.tuner.tensor_archive import read_tensors


def save(path, content):
    torch.save(content, path)
    return path


def rewritten(path, change, method=zipfile.ZIP_STORED):
    """The archive with `change` applied to its parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    path.write_bytes(out.getvalue())
    return path


def folder_of(parts):
    return next(name for name in parts if name.endswith("data.pkl")).removesuffix("data.pkl")


def swap(old, new):
    def change(parts):
        name = f"{folder_of(parts)}data.pkl"
        assert old in parts[name]
        parts[name] = parts[name].replace(old, new, 1)

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_gives_what_torch_load_gives(dtype, tmp_path):
    whole = torch.randn(6, 5).to(dtype)
    content = {
        "matrix": whole,
        "turned": whole.T,
        "part": whole[1:3, 2:],
        "scalar": torch.tensor(2.5, dtype=dtype),
        "none": torch.empty(0, 3, dtype=dtype),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=dtype)),
    }
    path = save(tmp_path / "a.bin", content)
    found = read_tensors(path)
    expected = torch.load(path, weights_only=True)
    assert list(found) == list(content)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach().float(), rtol=0, atol=0)


def test_reads_a_state_dict(tmp_path):
    layer = torch.nn.Linear(3, 2)
    found = read_tensors(save(tmp_path / "a.bin", layer.state_dict()))
    assert torch.equal(found["weight"], layer.weight)


COUNT_6, COUNT_MANY = b"K\x06tq", b"M\xff\xfftq"
DAMAGE = {
    "more values than the record": (swap(COUNT_6, COUNT_MANY), "record of storage '0' is of another size"),
    "larger than its storage": (swap(b"K\x02K\x03\x86", b"K\x02K\x04\x86"), "larger than its storage"),
    "values used twice": (swap(b"K\x03K\x01\x86", b"K\x00K\x00\x86"), None),
    "behind its storage": (swap(b"QK\x00K\x02", b"QK\x01K\x02"), "larger than its storage"),
    "another record": (lambda parts: parts.update({f"{folder_of(parts)}data/0": b"1234"}), "another size"),
    "no record": (lambda parts: parts.pop(f"{folder_of(parts)}data/0"), "no item named"),
    "integers": (
        swap(b"ctorch\nFloatStorage", b"ctorch\nLongStorage"),
        r"more than tensors \(torch\.LongStorage\)",
    ),
    "code": (
        swap(b"ctorch._utils\n_rebuild_tensor_v2", b"cposix\nsystem"),
        r"more than tensors \(posix\.system\)",
    ),
    "big-endian": (lambda parts: parts.update({f"{folder_of(parts)}byteorder": b"big"}), "not little-endian"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_sizes_are_compared_with_what_is_there(change, message, tmp_path):
    path = rewritten(save(tmp_path / "a.bin", {"a": torch.ones(2, 3)}), change)
    if message is None:
        assert read_tensors(path)["a"].shape == (2, 3)
        return
    with pytest.raises(GraphLoraError, match=message):
        read_tensors(path)


def test_a_few_values_cannot_stand_for_many(tmp_path):
    path = save(tmp_path / "a.bin", {"a": torch.ones(1).expand(10**9)})
    assert path.stat().st_size < 2000
    with pytest.raises(GraphLoraError, match="larger than its storage"):
        read_tensors(path)


def test_many_tensors_cannot_share_the_same_values(tmp_path):
    one = torch.ones(1000, dtype=torch.float16)
    path = save(tmp_path / "a.bin", {str(i): one for i in range(2000)})
    with pytest.raises(GraphLoraError, match="share their values"):
        read_tensors(path)


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path):
    path = save(tmp_path / "a.bin", {"a": torch.zeros(10**6)})
    rewritten(path, lambda parts: None, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(GraphLoraError, match="compressed"):
        read_tensors(path)


def test_a_layer_number_cannot_make_a_long_list(tmp_path):
    from graphlora.tuner.authors_checkpoint import checked_checkpoint

    tensors = {f"mixlora.layers.{10**15}.gate.weight": torch.ones(2, 2)}
    with pytest.raises(GraphLoraError, match="not a checkpoint of the authors' code"):
        checked_checkpoint(tmp_path, {"routing_strategy": "goe"}, tensors)
