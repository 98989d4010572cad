"""Torch files read without torch: the same numbers, and nothing of the file is run."""

import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from convert.torchfile import read
from convert.torchpickle import TorchFileError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def saved(path, value):
    torch.save(value, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_to_the_last_bit(tmp_path, dtype):
    tensor = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    out = read(saved(tmp_path / "x.pth", {"x": tensor}))["x"]
    assert out.shape == (3, 4, 5) and not out.flags.writeable
    assert str(out.dtype) == str(dtype).removeprefix("torch.")
    raw = tensor.contiguous().view(torch.uint8).numpy()
    assert np.ascontiguousarray(out).view(np.uint8).tobytes() == raw.tobytes()


def test_views_shared_storages_and_parameters(tmp_path):
    base = torch.arange(24.0)
    state = OrderedDict(
        turned=base.view(4, 6).T, part=base[5:9], same=base, scalar=base[3], empty=torch.zeros(0, 3),
        repeated=base[:1].expand(7), parameter=torch.nn.Parameter(base.view(2, 12).clone()),
    )  # fmt: skip
    out = read(saved(tmp_path / "x.pth", state))
    assert out.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(out[name], tensor.detach().numpy())


def test_a_modules_state_dict_and_a_wrapped_one(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    for value in (module.state_dict(), {"state_dict": module.state_dict()}):
        out = read(saved(tmp_path / "x.pth", value))
        assert out.keys() == module.state_dict().keys()
        assert out["0.weight"].dtype == ml_dtypes.bfloat16


def test_nothing_is_read_before_it_is_used(tmp_path):
    out = read(saved(tmp_path / "x.pth", {"x": torch.zeros(1 << 20)}))["x"]
    while out.base is not None and not isinstance(out, np.memmap):
        out = out.base
    assert isinstance(out, np.memmap)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_a_hostile_pickle_is_named_and_not_run(tmp_path, protocol):
    canary = tmp_path / "canary"
    path = tmp_path / "x.pth"
    torch.save({"x": torch.zeros(2), "y": Evil(canary)}, path, pickle_protocol=protocol)
    with pytest.raises(TorchFileError, match=r"x.pth: holds (io|_io|builtins|__builtin__)\.open.*not run"):
        read(path)
    assert not canary.exists()


def repacked(source, target, change, compression=zipfile.ZIP_STORED):
    """A copy of a torch file whose data.pkl went through `change`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)
    return target


HOSTILE = {
    "os.system": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R.",
    "dotted name": b"\x80\x04\x8c\x0ctorch._utils\x8c\x1c_rebuild_parameter.__globals__\x93.",
    "unknown storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nEvilStorage\nX\x01\x00\x00\x000NK\x01tQ.",
    "a constructor's defaults": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0e\x00\x00\x00__kwdefaults__}"
    b"X\x05\x00\x00\x00dtypectorch\nHalfStorage\nss\x86b.",
    "underflow": b"\x80\x02R.",
    "garbage": b"\xff\xff\xff",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_structures(tmp_path, name):
    source = saved(tmp_path / "good.pth", {"x": torch.zeros(2)})
    bad = repacked(source, tmp_path / "bad.pth", lambda _: HOSTILE[name])
    with pytest.raises(TorchFileError, match="bad.pth") as error:
        read(bad)
    assert "\n" not in str(error.value)


def test_a_tensor_outside_its_storage(tmp_path):
    source = saved(tmp_path / "good.pth", {"x": torch.zeros(40)})
    bad = repacked(source, tmp_path / "bad.pth", lambda data: data.replace(b"K(\x85", b"K)\x85"))
    with pytest.raises(TorchFileError, match="does not fit its storage"):
        read(bad)


def test_damaged_and_foreign_files(tmp_path):
    good = saved(tmp_path / "good.pth", {"x": torch.zeros(5000), "y": torch.ones(3)})
    data = good.read_bytes()
    ancient = io.BytesIO()
    with tarfile.open(fileobj=ancient, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.txt", "hello")
    cases = {
        "truncated": (data[: len(data) // 2], "damaged or truncated"),
        "ancient": (ancient.getvalue(), "tar format"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        "page": (b"<!doctype html><html>", "a web page"),
        "empty": (b"", "not a torch file"),
        "pickle": (pickle.dumps({"x": 1}), "not a torch file"),
        "zip": (zipped.getvalue(), "without torch's data.pkl"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(TorchFileError, match=message):
            read(path)
    with pytest.raises(TorchFileError, match="No such file"):
        read(tmp_path / "nowhere.pth")
    compressed = repacked(good, tmp_path / "compressed.pth", lambda x: x, zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match="is compressed"):
        read(compressed)


@pytest.mark.parametrize("value, prefix", [
    ({"model_state": {"x": torch.ones(2)}}, "model_state."),
    ({"model": {"x": torch.ones(2)}, "epoch": 3, "lr": 0.1, "name": "run", "losses": [1.0], "best": None}, "model."),
    ({"state_dict": {"module": {"x": torch.ones(2)}}}, "module."),
    ({"a": {"b": {"c": {"x": torch.ones(2)}}}}, "a.b.c."),
])  # fmt: skip
def test_tensors_in_the_dictionaries_of_training_codes(tmp_path, value, prefix):
    out = read(saved(tmp_path / "x.pth", value))
    assert list(out) == [f"{prefix}x"] and out[f"{prefix}x"].tolist() == [1, 1]


def test_dictionaries_without_end(tmp_path):
    tree = {"x": torch.zeros(2)}
    for _ in range(20):
        tree = {"a": tree}
    with pytest.raises(TorchFileError, match="'a' is a dict"):
        read(saved(tmp_path / "x.pth", tree))


@pytest.mark.parametrize(
    "value, message",
    [
        ([torch.zeros(2)], "holds a list"),
        ({"x": torch.zeros(2), "epoch": 3}, "'epoch' is a int, not a tensor"),
        ({"x": torch.zeros(2), "model": {"x": [torch.zeros(2)]}}, "'x' is a list"),
        ({"model": {"x": torch.zeros(2)}, "optimizer": {0: torch.zeros(2)}}, "'0' is a ndarray"),
        ({"a": {"x": torch.zeros(2)}, "a.x": torch.zeros(2)}, "two tensors come to the name a.x"),
        (torch.zeros(2), "holds a ndarray"),
    ],
)
def test_what_is_not_tensors_by_name(tmp_path, value, message):
    with pytest.raises(TorchFileError, match=message):
        read(saved(tmp_path / "x.pth", value))


def test_an_entry_whose_own_header_is_damaged(tmp_path):
    """Its name is no text, or endless: one short line."""
    data = bytearray(saved(tmp_path / "good.pth", {"x": torch.zeros(2)}).read_bytes())
    place = data.index(b"good/data.pkl")
    for spoilt in (b"\xea", b"\n"):
        data[place : place + 1] = spoilt
        (tmp_path / "bad.pth").write_bytes(data)
        with pytest.raises(TorchFileError, match="damaged or truncated") as error:
            read(tmp_path / "bad.pth")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_missing_storage(tmp_path):
    source = saved(tmp_path / "good.pth", {"x": torch.zeros(2)})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "bad.pth", "w") as new:
        for info in old.infolist():
            if not info.filename.endswith("data/0"):
                new.writestr(info.filename, old.read(info))
    with pytest.raises(TorchFileError, match="no entry .*data/0"):
        read(tmp_path / "bad.pth")
