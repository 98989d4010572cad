"""Published weights of the metrics' networks: read in every form they come in, written whole, and loaded strictly."""

import hashlib
import json
import zipfile
from collections import OrderedDict

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax.traverse_util import flatten_dict
from reference import numpy_state, randomize
from safetensors import safe_open
from test_inception import Inception

from benchmarks.tgi.networks import weights

CONVOLUTIONS = {"0": (64, 3, 11), "3": (192, 64, 5), "6": (384, 192, 3), "8": (256, 384, 3), "10": (256, 256, 3)}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The two files of LPIPS, the second as old as the published one, and their tensors."""
    rng = np.random.default_rng(0)
    trunk, lins = OrderedDict(), OrderedDict()
    for i, (number, (outputs, inputs, size)) in enumerate(CONVOLUTIONS.items()):
        trunk[f"features.{number}.weight"] = rng.standard_normal((outputs, inputs, size, size), np.float32)
        trunk[f"features.{number}.bias"] = rng.standard_normal(outputs, np.float32)
        lins[f"lin{i}.model.1.weight"] = rng.random((1, outputs, 1, 1), np.float32)
    folder = tmp_path_factory.mktemp("published")
    files = folder / "alexnet-owt-7be5be79.pth", folder / "alex.pth"
    torch.save(tensors(trunk), files[0])
    old(tensors(lins), files[1])
    return files, trunk | lins


def tensors(arrays):
    return OrderedDict((name, torch.from_numpy(array)) for name, array in arrays.items())


def old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def run(*arguments):
    return weights.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    assert run("lpips", out, *published[0]) == 0
    return out


def same(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_lpips_from_its_two_files(published, converted):
    files, arrays = published
    same(weights.load("lpips", converted), weights.lpips.from_torch(arrays))
    with safe_open(converted, framework="np") as file:
        label = file.metadata()
    assert label["network"] == "lpips" and label["version"] == weights.lpips.VERSION
    assert json.loads(label["sources"]) == [
        {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files
    ]
    assert [file.name for file in converted.parent.iterdir()] == ["lpips.safetensors"]


def test_what_a_run_tells(published, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"an older one")
    assert run("lpips", out, *reversed(published[0])) == 0
    told = capsys.readouterr()
    assert told.err == "" and told.out.count("\n") == 1
    assert str(out) in told.out and weights.digest(out) in told.out


def test_safetensors_and_half_precision_sources(published, tmp_path):
    source, out = tmp_path / "all.safetensors", tmp_path / "lpips.safetensors"
    arrays = {name: array.astype(np.float16) for name, array in published[1].items()}
    safetensors.numpy.save_file(arrays, source)
    assert run("lpips", out, source) == 0
    params = weights.load("lpips", out)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    same(params, weights.lpips.from_torch(arrays))


def test_inception_from_an_old_file(tmp_path):
    model = randomize(Inception(), 1)
    source, out = old(model.state_dict(), tmp_path / "pt_inception.pth"), tmp_path / "inception.safetensors"
    assert run("inception", out, source) == 0
    same(weights.load("inception", out), weights.inception.from_torch(numpy_state(model)))


def zeros(network):
    shapes = flatten_dict(weights.NETWORKS[network].shapes(), sep="/")
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}


def labelled(path, network, arrays, **changes):
    label = {"network": network, "version": weights.NETWORKS[network].VERSION} | changes
    safetensors.numpy.save_file(arrays, path, metadata=label)
    return path


@pytest.mark.parametrize("network", ["lpips", "inception", "i3d"])
def test_every_network_loads_what_its_shapes_say(network, tmp_path):
    params = weights.load(network, labelled(tmp_path / "x.safetensors", network, zeros(network)))
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), weights.NETWORKS[network].shapes())
    assert isinstance(jax.tree.leaves(params)[0], jax.Array)


def refusal(network, path):
    with pytest.raises(ValueError) as error:
        weights.load(network, path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert text.endswith(f"make it again with python -m benchmarks.tgi.networks.weights {network}")
    return text


def test_a_file_of_another_network(converted):
    assert "holds lpips, not inception" in refusal("inception", converted)


def test_a_file_without_a_label(tmp_path):
    safetensors.numpy.save_file(zeros("lpips"), tmp_path / "x.safetensors")
    assert "was not made by the converter" in refusal("lpips", tmp_path / "x.safetensors")


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    arrays = zeros("lpips") | {"more": np.zeros(1, np.float32), "conv0/bias": np.zeros(3, np.float32)}
    arrays["conv1/bias"] = arrays["conv1/bias"].astype(np.float16)
    del arrays["lin4/weight"]
    text = refusal("lpips", labelled(tmp_path / "x.safetensors", "lpips", arrays, version="v0.0"))
    for part in ["version v0.0 for v0.1-alex", "missing: lin4/weight", "unexpected: more",
                 "misshapen: conv0/bias [3] for [64]", "not float32: conv1/bias"]:  # fmt: skip
        assert part in text


def test_what_is_no_converted_file(published, converted, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(converted.read_bytes()[:-100])
    assert "truncated" in refusal("lpips", cut)
    assert "cannot be read" in refusal("lpips", tmp_path / "none.safetensors")
    assert "not a safetensors file" in refusal("lpips", published[0][0])


def torchscript(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", b"\x80\x02}.")
    return path


def text(path, content):
    path.write_bytes(content)
    return path


class Evil:
    def __reduce__(self):
        return (print, ("run",))


BAD = {
    "not there": (lambda f, p: [f / "none.pth"], "cannot be read"),
    "empty": (lambda f, p: [text(f / "e.pth", b"")], "not a torch file"),
    "a web page": (lambda f, p: [text(f / "e.pth", b"<!DOCTYPE html>")], "a web page"),
    "TorchScript": (lambda f, p: [torchscript(f / "i3d.pt")], "a TorchScript program, not weights"),
    "code in a zip file": (lambda f, p: [save(Evil(), f / "e.pth")], "which is not a tensor"),
    "code in an old file": (lambda f, p: [old(Evil(), f / "e.pth")], "which is not a tensor"),
    "an old file cut off": (lambda f, p: [text(f / "e.pth", p[1].read_bytes()[:-9])], "damaged or truncated"),
    "one file of two": (lambda f, p: [p[0]], "missing: lin0.model.1.weight"),
    "one file twice": (lambda f, p: [p[0], p[0]], "as a source before it does"),
    "another network's": (lambda f, p: [save({"a.b": torch.zeros(2)}, f / "e.pth")], "unexpected: a.b"),
    "NaN": (lambda f, p: [p[0], spoilt(f / "e.pth", p[1])], "NaN or infinity in lin0/weight"),
}


def save(value, path):
    torch.save(value, path)
    return path


def spoilt(path, source):
    state = torch.load(source)
    state["lin0.model.1.weight"][0, 3] = torch.nan
    return save(state, path)


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_end_in_one_line_and_no_file(case, published, tmp_path, capsys):
    make, reason = BAD[case]
    folder = tmp_path / "out"
    folder.mkdir()
    out = text(folder / "x.safetensors", b"older")
    assert run("lpips", out, *make(tmp_path, published[0])) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and reason in told.err
    assert out.read_bytes() == b"older" and list(folder.iterdir()) == [out]


def test_targets_that_cannot_be(published, converted, tmp_path, capsys):
    (tmp_path / "folder.safetensors").mkdir()
    for out, sources, reason in [
        (tmp_path / "x.pth", published[0], "name the file to write *.safetensors"),
        (tmp_path / "none" / "x.safetensors", published[0], "no such folder"),
        (tmp_path / "folder.safetensors", published[0], "cannot be written"),
        (converted, [converted], "is a source too"),
    ]:
        assert run("lpips", out, *sources) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and reason in told
    assert [file.name for file in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_network_that_is_not_known(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run("vgg", tmp_path / "x.safetensors", "y.pth")
    assert end.value.code == 2 and "lpips" in capsys.readouterr().err


def test_available_are_those_that_are_there(tmp_path):
    assert weights.available(tmp_path) == {}
    for name in ("lpips.safetensors", "i3d.safetensors", "vgg.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "inception.safetensors").mkdir()
    assert weights.available(tmp_path) == {name: tmp_path / f"{name}.safetensors" for name in ("lpips", "i3d")}


def test_digest(tmp_path):
    assert weights.digest(text(tmp_path / "x", b"abc")) == hashlib.sha256(b"abc").hexdigest()
