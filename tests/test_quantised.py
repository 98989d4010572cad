"""8-bit weights: multiplied out to the last bit where their meaning is told, and refused by name elsewhere."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from foreign import CONFIG, original, plain_params
from safetensors.torch import save_file

from convert import sources
from convert.quantised import unscaled
from convert.tensors import SourceError, open_file

EIGHT = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
OUT, IN = 6, 4


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(settings):
    """What a `comfy_quant` holds."""
    raw = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def opened(tmp_path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors", metadata)
    return unscaled(open_file(tmp_path / "x.safetensors"))


def product(eight, scale):
    """torch's, which is how ComfyUI computes it in float32."""
    return (eight.float() * scale.float()).numpy()


SHAPES = {"scalar": (), "one": (1,), "square": (1, 1), "row": (OUT,), "column": (OUT, 1)}


def scale_of(shape, dtype=torch.float32):
    return torch.full(shape, 0.0123).mul(torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)).to(dtype)


def column(scale, axes=2):
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *(1,) * (axes - 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("told, container", [
    *((told, kind) for told in ("marker", "metadata", "metadata, one word", "scaled_fp8")
      for kind in ("float8", "uint8")),
    ("dtype alone", "float8"),
])  # fmt: skip
def test_formats_that_are_told(tmp_path, shape, name, told, container):
    eight, scale = weight(OUT, IN).mul(30).to(EIGHT[name]), scale_of(SHAPES[shape])
    assert (eight.float() < 0).any()  # signs are what a wrong view loses
    tensors = {"a.weight": eight.view(torch.uint8) if container == "uint8" else eight, "a.bias": weight(OUT)}
    tensors["a.scale_weight" if told == "scaled_fp8" else "a.weight_scale"] = scale
    tensors["a.scale_input" if told == "scaled_fp8" else "a.input_scale"] = torch.tensor(2.0)
    metadata, settings = None, {"format": name, "full_precision_matrix_mult": True}
    if told == "marker":
        tensors["a.comfy_quant"] = text(settings)
    elif told.startswith("metadata"):
        layers = {"a": name if "word" in told else settings}
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    elif told == "scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(2).to(EIGHT[name])
    out = opened(tmp_path, tensors, metadata)
    assert set(out.named) == {"a.weight", "a.bias"}
    read = out.named["a.weight"].read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, product(eight, column(scale)))


@pytest.mark.parametrize("name", EIGHT)
def test_as_comfyui_multiplies(tmp_path, name):
    """Against the library that ComfyUI dequantises with, where it is installed."""
    layouts = pytest.importorskip("comfy_kitchen.tensor")
    eight, scale = weight(OUT, IN).mul(30).to(EIGHT[name]), torch.tensor(0.0123)
    params = layouts.TensorCoreFP8Layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=(OUT, IN))
    wanted = layouts.TensorCoreFP8Layout.dequantize(eight, params)
    out = opened(tmp_path, {"a.weight": eight, "a.weight_scale": scale, "a.comfy_quant": text({"format": name})})
    np.testing.assert_array_equal(out.named["a.weight"].read(), wanted.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(OUT, IN, 1, 2, 2), (OUT, IN), (OUT,)], ids=str)
def test_scales_of_any_float_and_weights_of_any_axes(tmp_path, dtype, shape):
    eight, scale = weight(*shape).to(torch.float8_e4m3fn), scale_of((OUT,), dtype)
    out = opened(tmp_path, {"a.weight": eight, "a.weight_scale": scale})
    np.testing.assert_array_equal(out.named["a.weight"].read(), product(eight, column(scale, len(shape))))


def test_metadata_without_the_prefix_and_markers_behind_any(tmp_path):
    eight, scale = weight(OUT, IN).to(torch.float8_e5m2), torch.tensor(0.5)
    bits = eight.view(torch.uint8)
    tensors = {"model.diffusion_model.a.weight": bits, "model.diffusion_model.a.weight_scale": scale,
               "text.b.weight": bits.clone(), "text.b.scale_weight": scale.clone(),
               "text.scaled_fp8": torch.zeros(2).to(torch.float8_e5m2)}  # fmt: skip
    layers = json.dumps({"layers": {"a": {"format": "float8_e5m2"}}})
    out = opened(tmp_path, tensors, {"_quantization_metadata": layers})
    assert set(out.named) == {"model.diffusion_model.a.weight", "text.b.weight"}
    for tensor in out.named.values():
        np.testing.assert_array_equal(tensor.read(), product(eight, scale))


BITS = weight(OUT, IN).to(torch.float8_e4m3fn).view(torch.uint8)
FP8 = BITS.view(torch.float8_e4m3fn)
ONE = torch.tensor(0.5)
NAN, INF = float("nan"), float("inf")

REFUSED = {
    "int8 with a scale": ({"a.weight": BITS.view(torch.int8), "a.weight_scale": ONE}, "a.weight is int8 with a scale"),
    "int8 told to be float8": ({"a.weight": BITS.view(torch.int8), "a.weight_scale": ONE,
                                "a.comfy_quant": text({"format": "float8_e4m3fn"})}, "a.weight is int8 with a scale"),
    "uint8 with a scale alone": ({"a.weight": BITS, "a.weight_scale": ONE}, "uint8 with a scale and no format told"),
    "bfloat16 with a scale": ({"a.weight": weight(OUT, IN).bfloat16(), "a.weight_scale": ONE}, "a.weight is bfloat16"),
    "another float8": ({"a.weight": FP8, "a.weight_scale": ONE, "a.comfy_quant": text({"format": "float8_e5m2"})},
                       "float8_e4m3fn with a scale and told to be float8_e5m2"),
    "no scale": ({"a.weight": FP8, "a.comfy_quant": text({"format": "float8_e4m3fn"})}, "without its weight_scale"),
    "no weight": ({"a.weight_scale": ONE, "b.weight": FP8}, "a.weight_scale is not the factor of a weight"),
    "two scales": ({"a.weight": FP8, "a.weight_scale": ONE, "a.scale_weight": ONE.clone()}, "a has two scales"),
    "zero": ({"a.weight": FP8, "a.weight_scale": ONE * 0}, "a.weight_scale holds 0.0"),
    "negative": ({"a.weight": FP8, "a.scale_weight": -ONE}, "a.scale_weight holds -0.5"),
    "not a number": ({"a.weight": FP8, "a.weight_scale": ONE * NAN}, "a.weight_scale holds nan"),
    "infinite": ({"a.weight": FP8, "a.weight_scale": ONE * INF}, "a.weight_scale holds inf"),
    "one row zero": ({"a.weight": FP8, "a.weight_scale": torch.arange(OUT).float()[:, None]}, "holds 0.0"),
    "a scale a column": ({"a.weight": FP8, "a.weight_scale": torch.ones(1, IN)}, r"a.weight_scale [1, 4] is not"),
    "a scale a block": ({"a.weight": FP8, "a.weight_scale": torch.ones(2, 2)}, r"a.weight_scale [2, 2] is not"),
    "an integer scale": ({"a.weight": FP8, "a.weight_scale": torch.tensor(1)}, "a.weight_scale is int64"),
    "a float8 scale": ({"a.weight": FP8, "a.weight_scale": ONE.to(torch.float8_e4m3fn)}, "float8_e4m3fn, not a fac"),
    "a scale of MXFP8": ({"a.weight": FP8, "a.weight_scale": torch.ones(OUT).to(torch.float8_e8m0fnu)}, "e8m0fnu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_scales_without_a_meaning(tmp_path, name):
    tensors, message = REFUSED[name]
    with pytest.raises(SourceError) as error:
        opened(tmp_path, tensors)
    assert message in str(error.value) and "x.safetensors" in str(error.value) and "\n" not in str(error.value)


SETTINGS = {
    "rotated int8": (
        {"format": "int8_tensorwise", "convrot": True},
        "[6, 4] is told to be int8_tensorwise, rotated in groups of 256, which do not divide its inputs",
    ),
    "int8 in groups of six": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 6},
        "groups of 6; known",
    ),
    "int8 in no number": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "4"},
        "groups of 4; known",
    ),
    "int8 turned by a number": ({"format": "int8_tensorwise", "convrot": 2}, "with convrot 2"),
    "int8 with more": ({"format": "int8_tensorwise", "params": {"smooth": [1]}}, "'int8_tensorwise' with smooth"),
    "int8 with odd ones": ({"format": "int8_tensorwise", "params": [1]}, "'int8_tensorwise' with params"),
    "older int8": ({"convrot": True, "per_row": True}, "names no format"),
    "float8 told to be it": (
        {"format": "int8_tensorwise"},
        "float8_e4m3fn with a scale and told to be int8_tensorwise",
    ),
    "mxfp8": ({"format": "mxfp8"}, "'mxfp8'"),
    "nvfp4": ({"format": "nvfp4"}, "'nvfp4'"),
    "svdquant": ({"format": "svdquant_w4a4"}, "'svdquant_w4a4'"),
    "awq": ({"format": "awq_w4a16"}, "'awq_w4a16'"),
    "rotated float8": ({"format": "float8_e4m3fn", "params": {"convrot": True}}, "'float8_e4m3fn' with params"),
    "a newer one": ({"format": "float9"}, "'float9'"),
    "no format": ({"full_precision_matrix_mult": True}, "names no format"),
    "a number as format": ({"format": 8}, "names no format"),
    "a list": ([1, 2], "names no format"),
    "no JSON": (b"{format", "not readable JSON"),
    "no text": (b"\xff\xfe\xff", "not readable JSON"),
    "empty": (b"", "not readable JSON"),
    "nested": (b"[" * 60_000, "not readable JSON (RecursionError)"),
    "long": (b" " * 100_000, "not a short text"),
}


@pytest.mark.parametrize("name, where", [
    (name, where) for name, (settings, _) in SETTINGS.items() for where in ("marker", "metadata")
    if where == "marker" or not isinstance(settings, bytes)
])  # fmt: skip
def test_other_formats_are_named(tmp_path, name, where):
    settings, message = SETTINGS[name]
    tensors = {"a.weight": BITS.view(torch.int8) if "int8" in name else FP8.clone(), "a.weight_scale": ONE}
    metadata = None
    if where == "marker":
        tensors["a.comfy_quant"] = text(settings) if settings != b"" else torch.zeros(0, dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"a": settings}})}
    with pytest.raises(SourceError) as error:
        opened(tmp_path, tensors, metadata)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("settings, message", [
    ("{", "not readable"), ("[]", "not readable"), ('{"layers": []}', "a list"), ("[" * 50_000, "not readable"),
    ('{"layers": {"b": "mxfp8"}}', "tells of b, of 0 weights"),
])  # fmt: skip
def test_metadata_of_the_wrong_kind(tmp_path, settings, message):
    with pytest.raises(SourceError, match=message) as error:
        opened(tmp_path, {"a.weight": FP8}, {"_quantization_metadata": settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, kind", [
    ("a.weight_scale_2", "NVFP4"), ("a.qweight", "GPTQ"), ("a.wscales", "SVDQuant"),
    ("a.weight.absmax", "bitsandbytes"),
    ("a.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"), ("a.SCB", "bitsandbytes"), ("a.weight._data", "quanto"),
    ("a.pre_quant_scale", "smoothed"), ("a.weight_scale_inv", "block-scaled"),
])  # fmt: skip
def test_formats_told_by_names(tmp_path, name, kind):
    with pytest.raises(SourceError, match=kind):
        opened(tmp_path, {"a.weight": FP8, name: ONE})


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16]


@pytest.fixture(scope="module")
def vae():
    tensors = original("vae", CONFIG.vae, plain_params()["vae"])
    return {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("which", ["one", "all"])
def test_integers_are_no_weights(tmp_path, vae, dtype, which):
    chosen = ["decoder.conv1.bias"] if which == "one" else list(vae)
    tensors = {name: tensor.to(dtype) if name in chosen else tensor for name, tensor in vae.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError) as error:
        sources.find(tmp_path / "x.safetensors")
    text = str(error.value)
    assert f"is {str(dtype).removeprefix('torch.')}" in text and "not weights" in text and "\n" not in text
    assert ("decoder.conv1.bias" in text) if which == "one" else (f"and {len(vae) - 3} more" in text)


def test_integers_in_a_torch_file(tmp_path, vae):
    torch.save({name: tensor.to(torch.int8) for name, tensor in vae.items()}, tmp_path / "x.pth")
    with pytest.raises(SourceError, match="is int8"):
        sources.find(tmp_path / "x.pth")


def test_integers_that_are_no_weights_are_not_read(tmp_path):
    """The text encoder's tokenizer and the vision tower's positions, as published."""
    params = plain_params()
    from convert import clip, umt5
    from convert.keymap import invert

    encoder = invert(umt5.diffusers(CONFIG.umt5), params["umt5"]) | {"spiece_model": np.arange(9, dtype=np.uint8)}
    tower = invert(clip.diffusers(CONFIG.clip), params["clip"])
    last = f"encoder.layers.{CONFIG.clip.num_layers}."
    tower |= {name.replace("encoder.layers.0.", last): x for name, x in tower.items() if "layers.0." in name}
    tower |= {"embeddings.position_ids": np.arange(5)[None]}
    for part, tensors in (("umt5", encoder), ("clip", tower)):
        file = tmp_path / f"{part}.safetensors"
        save_file({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, file)
        assert sources.find(file).parts[part].config == getattr(CONFIG, part)


def test_a_whole_model_of_8_bits(tmp_path, vae):
    """As ComfyUI writes one: matrices scaled, the rest in bfloat16; every number within float8's rounding."""
    params = plain_params()["dit"]
    tensors, wanted = {}, {}
    for name, array in original("dit", CONFIG.dit, params).items():
        tensor = torch.from_numpy(np.array(array))
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 448
            layer = name.removesuffix(".weight")
            eight = (tensor / scale).to(torch.float8_e4m3fn)
            tensors |= {
                name: eight,
                f"{layer}.weight_scale": scale,
                f"{layer}.comfy_quant": text({"format": "float8_e4m3fn"}),
            }
            wanted[name] = product(eight, scale)
        else:
            tensors[name] = tensor.bfloat16()
            wanted[name] = tensor.bfloat16().float().numpy()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    part = sources.find(tmp_path / "x.safetensors").parts["dit"]
    assert part.config == CONFIG.dit and part.tensors.named.keys() == wanted.keys()
    for name, tensor in part.tensors.named.items():
        np.testing.assert_array_equal(tensor.read().astype(np.float32), wanted[name])
    assert part.tensors.named["head.head.weight"].stored == "float8_e4m3fn with a scale"
    assert part.tensors.named["head.head.weight"].dtype == ml_dtypes.bfloat16
