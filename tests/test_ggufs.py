"""GGUF files, written by the gguf package, against its own dequantiser."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from foreign import CONFIG, original, plain_params, plain_shapes
from gguf import GGMLQuantizationType as Kind
from gguf.tensor_mapping import TensorNameMap
from safetensors.numpy import save_file

from convert import sources, umt5
from convert.keymap import convert, invert
from convert.tensors import SourceError, open_file

RNG = np.random.default_rng(0)


def write(path, tensors, shapes=None, arch="wan", **fields):
    """A GGUF file: name -> (stored bytes or numbers, type); `shapes`: name -> the shape that it had."""
    writer = gguf.GGUFWriter(str(path), arch)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in shape])
    for name, value in fields.items():
        writer.add_string(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(kind, rows=4, columns=512):
    """Bytes of random numbers; where the package cannot quantise, random blocks with sane scales."""
    numbers = RNG.normal(size=(rows, columns)).astype(np.float32)
    try:
        return gguf.quantize(numbers, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = RNG.integers(0, 256, (rows, columns // block, size), np.uint8)
        halves = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
        for start in halves.get(kind, ()):
            raw[..., start : start + 2] = np.float16(0.01).reshape(1).view(np.uint8)
        return raw.reshape(rows, -1)


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q2_K, Kind.Q3_K, Kind.Q4_0,
         Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_to_the_last_bit(tmp_path, kind):
    data = stored(kind)
    tensor = open_file(write(tmp_path / "x.gguf", {"a.weight": (data, kind)})).named["a.weight"]
    assert tensor.shape == (4, 512) and tensor.stored in (kind.name, {"F32": "float32", "F16": "float16",
                                                                      "BF16": "bfloat16"}.get(kind.name))  # fmt: skip
    wanted = gguf.dequantize(data, kind)
    np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted)
    assert np.isfinite(wanted).all() and np.abs(wanted).max() > 0


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(8, 16, 1, 2, 2), (32, 36, 1, 2, 2), (4, 2, 8, 16)], ids=str)
def test_original_shapes(tmp_path, kind, shape):
    """Reshaped for the quantiser, and told in the metadata."""
    rows = int(np.prod(shape)) // 256
    data = stored(kind, rows, 256)
    file = write(tmp_path / "x.gguf", {"patch.weight": (data, kind)}, {"patch.weight": shape})
    tensor = open_file(file).named["patch.weight"]
    assert tensor.shape == shape
    np.testing.assert_array_equal(tensor.read().astype(np.float32), gguf.dequantize(data, kind).reshape(shape))


def test_five_axes_as_they_are(tmp_path):
    data = RNG.normal(size=(8, 3, 1, 2, 2)).astype(np.float32)
    tensor = open_file(write(tmp_path / "x.gguf", {"patch_embedding.weight": (data, Kind.F32)})).named
    np.testing.assert_array_equal(tensor["patch_embedding.weight"].read(), data)


def quantised(tensors, kind):
    """As writers of GGUF do: matrices whose rows fit are quantised, the rest is float32, leading ones are dropped."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    out = {}
    for name, array in tensors.items():
        array = np.ascontiguousarray(array, np.float32)
        fits = array.ndim == 2 and array.shape[1] % block == 0
        while array.ndim > 1 and array.shape[0] == 1:
            array = array[0]
        out[name] = (gguf.quantize(array, kind), kind) if fits else (array, Kind.F32)
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.BF16, Kind.F16], ids=lambda kind: kind.name)
def test_a_transformer(tmp_path, prefix, kind):
    params = plain_params()
    tensors = original("dit", CONFIG.dit, params["dit"])
    held = quantised(tensors, kind)
    file = write(tmp_path / "wan.gguf", {prefix + name: value for name, value in held.items()})
    part = sources.find(file).parts["dit"]
    assert part.config == CONFIG.dit
    part.check(plain_shapes()["dit"])
    for name, tensor in part.tensors.named.items():
        wanted = gguf.dequantize(*held[name]).reshape(tensors[name].shape)
        np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted)
    assert sum(tensor.form == kind.name for tensor in part.tensors.named.values()) == (32 if kind == Kind.Q8_0 else 0)


def test_a_text_encoder_under_llama_cpp_names(tmp_path):
    """Names by the package's own table, and a decoder that is not read."""
    params = plain_params()["umt5"]
    tensors = invert(umt5.diffusers(CONFIG.umt5), params)
    table = TensorNameMap(gguf.MODEL_ARCH.T5, CONFIG.umt5.num_layers)
    held = {table.get_name(name, (".weight",)): value for name, value in quantised(tensors, Kind.Q8_0).items()}
    held["dec.blk.0.attn_q.weight"] = np.ones((4, 4), np.float32), Kind.F32
    held["output.weight"] = np.ones((4, 4), np.float32), Kind.F32
    part = sources.find(write(tmp_path / "t5.gguf", held, arch="t5")).parts["umt5"]
    assert part.config == CONFIG.umt5 and part.family.layout == "diffusers"
    shapes = plain_shapes()["umt5"]
    part.check(shapes)
    arrays = {name: tensor.read() for name, tensor in part.tensors.named.items()}
    read = convert(part.family.rules(part.config), shapes, arrays, part.family.unused(part.config, arrays))
    for ours, wanted in zip(*(leaves(tree) for tree in (read, params)), strict=True):
        assert np.abs(ours - wanted).max() <= np.abs(wanted).max() / 120


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_nothing_is_read_before_it_is_used(tmp_path):
    data = stored(Kind.F32)
    array = open_file(write(tmp_path / "x.gguf", {"a": (data, Kind.F32)})).named["a"].read()
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


def damage(data, how):
    """The bytes of a good file, spoilt."""
    count = np.uint64(2**60).tobytes()
    return {
        "cut in the tensors": data[:-100],
        "cut in the names": data[:120],
        "cut in the head": data[:10],
        "magic alone": b"GGUF",
        "version": data[:4] + np.uint32(9).tobytes() + data[8:],
        "big-endian": data[:4] + np.uint32(3).byteswap().tobytes() + data[8:],
        "tensors without end": data[:8] + count + data[16:],
        "fields without end": data[:16] + count + data[24:],
        "a name without end": data[:24] + count + data[32:],
        "a type of nobody": data.replace(np.uint32(8).tobytes() + np.uint64(0).tobytes(),
                                         np.uint32(250).tobytes() + np.uint64(0).tobytes()),
        "noise": data[:24] + bytes(range(256)) * 4,
    }[how]  # fmt: skip


@pytest.mark.parametrize("how", ["cut in the tensors", "cut in the names", "cut in the head", "magic alone", "version",
                                 "big-endian", "tensors without end", "fields without end", "a name without end",
                                 "a type of nobody", "noise"])  # fmt: skip
def test_damaged_files(tmp_path, how):
    data = write(tmp_path / "x.gguf", {"a.weight": (stored(Kind.Q8_0), Kind.Q8_0)}).read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(data, how))
    assert bad.read_bytes() != data
    with pytest.raises(SourceError, match="bad.gguf") as error:
        open_file(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape, message", [([3, 5], "cannot be"), ([-1, 4], "not a shape"), ([0], "not a shape")])
def test_original_shapes_that_lie(tmp_path, shape, message):
    file = write(tmp_path / "x.gguf", {"a": (stored(Kind.F32, 1, 16), Kind.F32)}, {"a": shape})
    with pytest.raises(SourceError, match=message):
        open_file(file)


@pytest.mark.parametrize("kind", [Kind.Q8_1, Kind.Q8_K], ids=lambda kind: kind.name)
def test_a_type_that_the_package_cannot_read_is_named(tmp_path, kind):
    _, size = gguf.GGML_QUANT_SIZES[kind]
    file = write(tmp_path / "x.gguf", {"a.weight": (np.zeros((2, size), np.uint8), kind)})
    with pytest.raises(SourceError, match=f"a.weight is {kind.name}, which the gguf package cannot dequantise"):
        open_file(file)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
def test_integers_are_no_weights(tmp_path, dtype):
    held = quantised(original("vae", CONFIG.vae, plain_params()["vae"]), Kind.F32)
    kind = Kind[f"I{8 * np.dtype(dtype).itemsize}"]
    held["conv2.bias"] = held["conv2.bias"][0].astype(dtype), kind
    with pytest.raises(SourceError, match=f"conv2.bias is {np.dtype(dtype).name}"):
        sources.find(write(tmp_path / "x.gguf", held))


def test_without_the_package(tmp_path):
    file = write(tmp_path / "x.gguf", {"a": (stored(Kind.F32), Kind.F32)})
    code = f"""
import sys
sys.modules["gguf"] = None
from convert.__main__ import main
sys.exit(main([{str(file)!r}, {str(tmp_path / "m")!r}]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "pip install 'wanjax[gguf]'" in run.stderr


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.bin", "wan.gguf", "wan.pth"])
def test_files_are_told_by_their_first_bytes(tmp_path, name):
    """Whatever they are called."""
    numbers = np.arange(64, dtype=np.float32).reshape(2, 32)
    writers = {
        "gguf": lambda file: write(file, {"a": (numbers, Kind.F32)}),
        "safetensors": lambda file: save_file({"a": numbers}, file),
        "torch": lambda file: torch.save({"a": torch.from_numpy(numbers)}, file),
    }
    for writer in writers.values():
        writer(tmp_path / name)
        np.testing.assert_array_equal(open_file(tmp_path / name).named["a"].read(), numbers)
