"""Conversion to 8 bits: quantised from what is stored, or the file's own numbers kept where they are of that form."""

import dataclasses
import itertools
import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conversion import CONFIG, equal, plain_params, refused
from eight import DTYPES, KERNELS, NAMES, codes, quantised
from flax.traverse_util import flatten_dict
from foreign import original
from safetensors.torch import save_file
from test_quantised import EIGHT, opened, text

import convert
from convert import __main__ as command
from convert import sources, write
from wanjax import checkpoint, store
from wanjax.precision import BFLOAT16

WEIGHTS = sorted(DTYPES)


@pytest.fixture(scope="module")
def halves(source, tmp_path_factory):
    """The small model in bfloat16."""
    target = tmp_path_factory.mktemp("halves") / "m"
    assert command.main([str(source), str(target), "--dtype", "bf16"]) == 0
    return target


@pytest.mark.parametrize("weights", WEIGHTS)
def test_from_what_is_stored(source, halves, tmp_path, capsys, weights):
    """float32 here: rounded once, and all else as in bfloat16; half of the kernels' bytes on the disk."""
    capsys.readouterr()
    assert command.main([str(source), str(tmp_path / "m"), "--dtype", weights]) == 0
    assert "note: dit: of 24 matrices in its blocks 24 quantised from float32" in capsys.readouterr().err
    model, plain = checkpoint.load(tmp_path / "m"), checkpoint.load(halves)
    assert model.config.dit.precision == dataclasses.replace(BFLOAT16, kernel=NAMES[weights])
    assert model.config.umt5 == plain.config.umt5 and model.config.vae == plain.config.vae
    own = flatten_dict(quantised(plain_params()["dit"], weights), sep="/")
    wanted = flatten_dict(plain.params["dit"], sep="/")
    for path in own:
        if path.removesuffix("/kernel").removesuffix("/factor").removeprefix("blocks/") in KERNELS:
            wanted[path] = own[path]
    equal(flatten_dict(model.params["dit"], sep="/"), wanted)
    for part in ("vae", "umt5", "clip"):
        equal(model.params[part], plain.params[part])
    sizes = [sum(file.stat().st_size for kernel in KERNELS for leaf in ("kernel", "factor")
                 for file in (store.place(folder, f"dit/blocks/{kernel}/{leaf}") / "c").rglob("*") if file.is_file())
             for folder in (tmp_path / "m", halves)]  # fmt: skip
    assert 0.5 < sizes[0] / sizes[1] < 0.55
    config, params = convert.load(source, weights)
    assert config == model.config
    equal(params, jax.tree.map(np.asarray, model.params))
    assert command.main(["inspect", str(tmp_path / "m"), "--full"]) == 0
    told = capsys.readouterr().out
    assert f"dtype {weights}" in told and f"{NAMES[weights]} " in told and "every array is the one" in told


FORMS = {
    "a scale of the matrix": ("fp8", "float8_e4m3fn", (), "weight_scale"),
    "a scale of each row": ("fp8", "float8_e4m3fn", (-1, 1), "weight_scale"),
    "the older form": ("fp8", "float8_e4m3fn", (1,), "scale_weight"),
    "no scale": ("fp8", "float8_e4m3fn", None, None),
    "int8 with a scale": ("int8", "int8_tensorwise", (), "weight_scale"),
    "int8 with a scale of each row": ("int8", "int8_tensorwise", (-1,), "weight_scale"),
}
"""Of ComfyUI's files: what keeps them, their format, the scale's shape and name."""


def comfy(file, form, break_=None):
    """A transformer as ComfyUI writes one: its matrices in 8 bits, embedders too. Name -> (codes, scale [O, 1])."""
    _, format, shape, name = FORMS[form]
    tensors, held = {}, {}
    for key, array in original("dit", CONFIG.dit, plain_params()["dit"]).items():
        if array.ndim != 2 or not key.endswith(".weight"):
            tensors[key] = torch.from_numpy(np.array(array)).bfloat16()
            continue
        layer, wide = key.removesuffix(".weight"), torch.from_numpy(np.array(array))
        scale = torch.full((len(array), 1), 0.0123) if shape != (-1, 1) and shape != (-1,) else (
            wide.abs().amax(1, keepdim=True) / 100)  # fmt: skip
        scale = torch.ones(len(array), 1) if shape is None else scale
        own = (wide / scale).round().clamp(-128, 127).to(torch.int8) if "int8" in format else (
            (wide / scale).to(EIGHT[format]))  # fmt: skip
        if break_ == key:
            own.view(torch.uint8)[3, 2] = 0x7F
        tensors[key], held[key] = own, (own, scale)
        if name:
            tensors[f"{layer}.{name}"] = scale.reshape(shape) if -1 in shape else scale[0].reshape(shape)
        if name == "weight_scale":
            tensors[f"{layer}.comfy_quant"] = text({"format": format})
    if name == "scale_weight":
        tensors["scaled_fp8"] = torch.zeros(2).to(EIGHT[format])
    save_file({f"model.diffusion_model.{key}": tensor.contiguous() for key, tensor in tensors.items()}, file)
    return held


def arrays(folder, weights, name="ffn_in"):
    """Codes and factors of a stack of a converted folder."""
    found = [store.open_array(store.place(folder, f"dit/blocks/{name}/{leaf}")).read().result()
             for leaf in ("kernel", "factor")]  # fmt: skip
    assert found[0].dtype == DTYPES[weights] and found[1].dtype == np.float32
    return found


def bits(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.parametrize("form", FORMS)
def test_comfyuis_own_numbers_are_kept(tmp_path, capsys, form):
    weights = FORMS[form][0]
    held = comfy(tmp_path / "x.safetensors", form)
    assert (
        command.main([str(tmp_path / "x.safetensors"), str(tmp_path / "m"), "--dtype", weights, "--only", "dit"]) == 0
    )
    assert f"of 24 matrices in its blocks 24 kept as {NAMES[weights]}" in capsys.readouterr().err
    found, factors = arrays(tmp_path / "m", weights)
    for i in range(2):
        own, scale = held[f"blocks.{i}.ffn.0.weight"]
        np.testing.assert_array_equal(bits(found[i]), own.view(torch.uint8).numpy().T)
        np.testing.assert_array_equal(factors[i], scale.numpy().T)
    own, scale = held["text_embedding.0.weight"]  # no kernel of a block: multiplied out
    embed = store.open_array(store.place(tmp_path / "m", "dit/text_in/kernel")).read().result()
    np.testing.assert_array_equal(embed, (own.float() * scale).numpy().T.astype(ml_dtypes.bfloat16))
    assert command.main(["inspect", str(tmp_path / "x.safetensors")]) == 0


@pytest.mark.parametrize("form, weights", [("a scale of each row", "int8"), ("int8 with a scale", "fp8")])
def test_other_8_bits_are_quantised_from_the_product(tmp_path, capsys, form, weights):
    held = comfy(tmp_path / "x.safetensors", form)
    assert (
        command.main([str(tmp_path / "x.safetensors"), str(tmp_path / "m"), "--dtype", weights, "--only", "dit"]) == 0
    )
    assert f"24 quantised from {NAMES[FORMS[form][0]]} with a scale" in capsys.readouterr().err
    check_products(tmp_path / "m", weights, {key: (own.float() * scale).numpy() for key, (own, scale) in held.items()})


def check_products(folder, weights, products):
    found, factors = arrays(folder, weights)
    for i in range(2):
        wanted, factor = codes(products[f"blocks.{i}.ffn.0.weight"].T, weights)
        np.testing.assert_array_equal(found[i].astype(np.float64), wanted)
        np.testing.assert_array_equal(factors[i], factor)


@pytest.mark.parametrize(
    "name, form", [("wan_int8", "int8 with a scale of each row"), ("wan_fp8_scaled", "the older form")]
)
def test_the_better_of_two_copies(tmp_path, name, form):
    comfy(tmp_path / f"{name}.safetensors", form)
    tensors = original("dit", CONFIG.dit, plain_params()["dit"])
    tensors = {key: torch.from_numpy(np.array(array)).bfloat16() for key, array in tensors.items()}
    save_file(tensors, tmp_path / "wan_bf16.safetensors")
    found = sources.find(tmp_path, ["dit"])
    assert found.parts["dit"].tensors.files == (tmp_path / "wan_bf16.safetensors",)
    assert f"wan_bf16.safetensors, {name}.safetensors are copies of one dit; wan_bf16" in found.notes[0]


def rotation(size, group):
    """float64 [I, I]: ConvRot's matrix, block by block, from the digits of each place."""
    one = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    block = np.ones((group, group))
    for row, column in itertools.product(range(group), repeat=2):
        a, b = row, column
        for _ in range(round(np.log2(group) / 2)):
            block[row, column] *= one[a % 4][b % 4]
            a, b = a // 4, b // 4
    return np.kron(np.eye(size // group), block / np.sqrt(group))


@pytest.mark.parametrize("group", [4, 16, 64, 256, None])
@pytest.mark.parametrize("place", ["top", "params", "metadata"])
def test_a_rotated_matrix_is_turned_back(tmp_path, group, place):
    """Heavy tails, which the rotation spreads; without turning it back it would be noise."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_t(3, (6, 512))
    turn = rotation(512, group or 256)
    np.testing.assert_allclose(turn @ turn.T, np.eye(512), atol=1e-12)
    turned = matrix @ turn.T
    scale = np.abs(turned).max(1, keepdims=True).astype(np.float32) / 127
    own = torch.from_numpy(np.round(turned / scale).astype(np.int8))
    told = {"convrot": True} | ({"convrot_groupsize": group} if group else {})
    settings = {"format": "int8_tensorwise"} | ({"params": told} if place == "params" else told)
    tensors, metadata = {"a.weight": own, "a.weight_scale": torch.from_numpy(scale)}, None
    if place == "metadata":
        metadata = {"_quantization_metadata": json.dumps({"layers": {"a": settings}})}
    else:
        tensors["a.comfy_quant"] = text(settings)
    tensor = opened(tmp_path, tensors, metadata).named["a.weight"]
    assert tensor.codes is None and tensor.stored == "int8 with a scale, rotated"
    read = tensor.read()
    wanted = own.numpy().astype(np.float64) * scale @ turn
    np.testing.assert_allclose(read, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    error = np.linalg.norm(read - matrix) / np.linalg.norm(matrix)
    assert error < 0.02 < 0.9 < np.linalg.norm(own.numpy() * scale - matrix) / np.linalg.norm(matrix)


def test_gguf_to_int8(tmp_path, capsys):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "wan")
    products = {}
    for name, array in original("dit", CONFIG.dit, plain_params()["dit"]).items():
        array = np.ascontiguousarray(array)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 and "blocks" in name else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        products[name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert command.main([str(tmp_path / "x.gguf"), str(tmp_path / "m"), "--dtype", "int8", "--only", "dit"]) == 0
    assert "24 quantised from Q8_0" in capsys.readouterr().err
    check_products(tmp_path / "m", "int8", products)


def test_loras_come_before(tmp_path, capsys):
    """Of a file in 8 bits too: what they change is quantised anew, the rest is kept."""
    held = comfy(tmp_path / "x.safetensors", "a scale of each row")
    rng = np.random.default_rng(1)
    up, down = (rng.normal(size=size).astype(np.float32) for size in ((96, 2), (2, 128)))
    layer = "diffusion_model.blocks.1.ffn.0"
    save_file({f"{layer}.lora_A.weight": torch.from_numpy(down), f"{layer}.lora_B.weight": torch.from_numpy(up)},
              tmp_path / "lora.safetensors")  # fmt: skip
    assert command.main([str(tmp_path / "x.safetensors"), str(tmp_path / "m"), "--dtype", "fp8", "--only", "dit",
                         "--lora", f"{tmp_path / 'lora.safetensors'}:0.5"]) == 0  # fmt: skip
    told = capsys.readouterr().err
    assert "23 kept as float8_e4m3fn, 1 quantised from float8_e4m3fn with a scale" in told
    found, factors = arrays(tmp_path / "m", "fp8")
    own, scale = held["blocks.0.ffn.0.weight"]
    np.testing.assert_array_equal(bits(found[0]), own.view(torch.uint8).numpy().T)
    own, scale = held["blocks.1.ffn.0.weight"]
    wanted = (own.double() * scale).numpy() + 0.5 * up.astype(np.float64) @ down
    made = found[1].astype(np.float64) * factors[1]
    assert np.all(np.abs(made - wanted.T) <= np.abs(wanted.T) / 16 * 1.01 + 2.0**-10 * factors[1] * 1.01)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_wanjax_folder_in_8_bits(source, tmp_path, capsys, weights):
    first, other = tmp_path / "first", {"int8": "fp8", "fp8": "int8"}[weights]
    assert command.main([str(source), str(first), "--dtype", weights]) == 0
    for again in ("keep", weights):
        assert command.main([str(first), str(tmp_path / again), "--dtype", again]) == 0
        assert f"24 kept as {NAMES[weights]}" in capsys.readouterr().err
        one, two = (store.read_manifest(folder) for folder in (first, tmp_path / again))
        assert dict(one.arrays) == dict(two.arrays)
        assert (first / "config.json").read_text() == (tmp_path / again / "config.json").read_text()
    kernel, factor = arrays(first, weights)
    product = kernel.astype(np.float32) * factor
    assert command.main([str(first), str(tmp_path / "halves"), "--dtype", "bf16"]) == 0
    found = checkpoint.load(tmp_path / "halves")
    assert found.config.dit.precision == BFLOAT16
    equal(found.params["dit"]["blocks"]["ffn_in"]["kernel"], product.astype(ml_dtypes.bfloat16))
    assert command.main([str(first), str(tmp_path / "other"), "--dtype", other]) == 0
    assert f"24 quantised from {NAMES[weights]} with a scale" in capsys.readouterr().err
    check_products(tmp_path / "other", other, {f"blocks.{i}.ffn.0.weight": product[i].T for i in range(2)})


@pytest.mark.parametrize("form", ["no scale", "a scale of each row"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_nan_among_8_bits_is_named(tmp_path, capsys, form, weights):
    comfy(tmp_path / "x.safetensors", form, break_="blocks.1.cross_attn.k_img.weight")
    told = refused(capsys, tmp_path / "x.safetensors", tmp_path / "m", "--dtype", weights, "--only", "dit")
    assert "x.safetensors: blocks.1.cross_attn.k_img.weight holds NaN or inf" in told
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_after_an_interruption_it_goes_on(source, tmp_path, monkeypatch):
    """Kernel and factor are finished together or not at all."""
    plain, count = write._write_array, iter(range(100))

    def stopped(*arguments):
        if next(count) == 30:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_array", stopped)
        assert command.main([str(source), str(tmp_path / "m"), "--only", "dit", "--dtype", "int8"]) == 130
    progress = (tmp_path / ".m.part" / "progress.jsonl").read_text().splitlines()
    assert len(progress) > 30 and "factor" in json.loads(progress[-1])["name"]
    (tmp_path / ".m.part" / "progress.jsonl").write_text("\n".join(progress[:-1]) + "\n")  # its kernel is left alone
    assert command.main([str(source), str(tmp_path / "m"), "--only", "dit", "--dtype", "int8"]) == 0
    assert command.main([str(source), str(tmp_path / "n"), "--only", "dit", "--dtype", "int8"]) == 0
    one, two = (store.read_manifest(tmp_path / name) for name in "mn")
    assert dict(one.arrays) == dict(two.arrays)
    store.verify(tmp_path / "m", one.arrays)
