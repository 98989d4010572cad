"""LoRA files in every spelling give the merged weights; what does not fit is listed."""

import functools
import json

import numpy as np
import pytest
from foreign import CONFIG, original, plain_params
from safetensors.numpy import load_file, save_file

import convert
from convert import __main__ as command
from convert import lora, sources
from convert.tensors import SourceError
from wanjax import checkpoint

RANK = 3
# One linear in the original and in the diffusers layout, and the path of the parameter.
LINEARS = {
    "blocks.1.self_attn.q": ("blocks.1.attn1.to_q", "blocks/self_attn/q", 1),
    "blocks.0.cross_attn.k_img": ("blocks.0.attn2.add_k_proj", "blocks/cross_attn/k_image", 0),
    "blocks.0.ffn.2": ("blocks.0.ffn.net.2", "blocks/ffn_out", 0),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", "text_out", None),
}
SPELLINGS = {
    "diffusers": ("transformer.{diffusers}.lora_{ab}.weight", False),
    "peft": ("base_model.model.{diffusers}.lora_{ab}.default.weight", False),
    "plain": ("{original}.lora_{ab}.weight", True),
    "comfy": ("diffusion_model.{original}.lora_{updown}.weight", True),
    "kohya": ("lora_unet_{underscores}.lora_{updown}.weight", True),
}


@functools.cache
def transformer():
    return original("dit", CONFIG.dit, plain_params()["dit"])


def shape_of(name):
    return transformer()[f"{name}.weight"].shape


def write_lora(path, spelling, names=LINEARS, alpha=6.0, seed=0):
    """A file in a spelling; our name of a linear -> (down, up)."""
    pattern, has_alpha = SPELLINGS[spelling]
    rng, tensors, held = np.random.default_rng(seed), {}, {}
    for name in names:
        out, width = shape_of(name)
        down, up = (rng.normal(size=size).astype(np.float32) for size in ((RANK, width), (out, RANK)))
        held[name] = down, up
        for letter, word, matrix in (("A", "down", down), ("B", "up", up)):
            key = pattern.format(diffusers=LINEARS[name][0], original=name, underscores=name.replace(".", "_"),
                                 ab=letter, updown=word)  # fmt: skip
            tensors[key] = matrix
        if has_alpha:
            stem = key[: key.index(".lora_")]
            tensors[f"{stem}.alpha"] = np.full((), alpha, np.float32)
    save_file(tensors, path)
    return held


def kernel(params, name):
    _, path, layer = LINEARS[name]
    leaf = params["dit"]
    for step in (*path.split("/"), "kernel"):
        leaf = leaf[step]
    return leaf if layer is None else leaf[layer]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_merged(source, tmp_path, spelling):
    held = write_lora(tmp_path / "a.safetensors", spelling)
    _, params = convert.load(source, "f32", loras=[f"{tmp_path / 'a.safetensors'}:0.5"])
    plain = plain_params()
    factor = 0.5 * (6.0 if SPELLINGS[spelling][1] else RANK) / RANK
    for name, (down, up) in held.items():
        expected = kernel(plain, name).astype(np.float64) + factor * (up.astype(np.float64) @ down).T
        np.testing.assert_allclose(kernel(params, name), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(kernel(params, "blocks.0.ffn.2").shape, kernel(plain, "blocks.0.ffn.2").shape)
    untouched = params["dit"]["blocks"]["self_attn"]["v"]["kernel"]
    np.testing.assert_array_equal(untouched, plain["dit"]["blocks"]["self_attn"]["v"]["kernel"])
    np.testing.assert_array_equal(params["vae"]["quant"]["bias"], plain["vae"]["quant"]["bias"])


def test_two_files_add_up_and_reach_the_folder(source, tmp_path, capsys):
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    held = [write_lora(file, "plain", seed=i) for i, file in enumerate(files)]
    line = [
        str(source),
        str(tmp_path / "m"),
        "--dtype",
        "f32",
        "--only",
        "dit",
        "--lora",
        str(files[0]),
        f"{files[1]}:-2",
    ]
    assert command.main(line) == 0
    name, factors = "blocks.1.self_attn.q", (2.0, -4.0)
    expected = kernel(plain_params(), name).astype(np.float64)
    for (down, up), factor in zip((one[name] for one in held), factors, strict=True):
        expected = expected + factor * (up.astype(np.float64) @ down).T
    shapes = checkpoint.param_shapes(CONFIG)["dit"]
    from wanjax import store

    restored = {"dit": store.restore(tmp_path / "m", "dit", shapes, None)}
    np.testing.assert_allclose(kernel(restored, name), expected, rtol=1e-5, atol=1e-6)
    manifest = store.read_manifest(tmp_path / "m")
    assert sum("safetensors" in file for file in manifest.sources) == 4 and manifest.loras == tuple(line[-2:])


def test_keys_that_fit_nothing_are_all_listed(source, tmp_path):
    file = tmp_path / "a.safetensors"
    write_lora(file, "plain")
    odd = {"blocks.9.self_attn.q.lora_A.weight": np.zeros((3, 4), np.float32), "unet.x.lora_B.weight": np.zeros(2)}
    save_file(load_file(file) | odd, file)
    with pytest.raises(SourceError) as error:
        lora.merge(sources.find(source), [str(file)])
    text = str(error.value)
    assert "2 keys fit no linear" in text and all(key in text for key in odd)


def test_updates_of_another_size_are_all_listed(source, tmp_path):
    file, out = tmp_path / "a.safetensors", shape_of("blocks.0.ffn.2")[0]
    save_file({
        "blocks.0.ffn.2.lora_A.weight": np.zeros((3, 7), np.float32),
        "blocks.0.ffn.2.lora_B.weight": np.zeros((out, 3), np.float32),
        "blocks.0.ffn.0.lora_B.weight": np.zeros((96, 3), np.float32),
    }, file)  # fmt: skip
    with pytest.raises(SourceError) as error:
        lora.merge(sources.find(source), [str(file)])
    text = str(error.value)
    assert "2 updates do not fit" in text and "blocks.0.ffn.0.weight: only up" in text
    assert f"blocks.0.ffn.2.weight [{out}, 96]: up [{out}, 3], down [3, 7]" in text


@pytest.mark.parametrize("request_text, message", [
    ("{}:big", "'big' is not a scale"), ("{}:nan", "scale must be finite"), ("nowhere.safetensors", "cannot be read"),
])  # fmt: skip
def test_bad_requests(source, tmp_path, request_text, message):
    write_lora(tmp_path / "a.safetensors", "plain")
    with pytest.raises(SourceError, match=message):
        lora.merge(sources.find(source), [request_text.format(tmp_path / "a.safetensors")])


def test_a_source_without_transformer(source):
    with pytest.raises(SourceError, match="no transformer to merge it into"):
        lora.merge(sources.find(source, only=["vae"]), ["x"])


@pytest.mark.parametrize("told", ["beside", "metadata"])
@pytest.mark.parametrize("root", [False, True])
def test_pefts_own_settings_tell_alpha(source, tmp_path, told, root):
    name, file = "blocks.1.self_attn.q", tmp_path / "adapter_model.safetensors"
    down, up = write_lora(file, "peft", [name])[name]
    settings = {"r": RANK, "lora_alpha": 16, "use_rslora": root}
    if told == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": x for key, x in settings.items()})}
        save_file(load_file(file), file, metadata)
    _, params = convert.load(source, "f32", only=["dit"], loras=[str(file)])
    factor = 16 / (RANK**0.5 if root else RANK)
    expected = kernel(plain_params(), name).astype(np.float64) + factor * (up.astype(np.float64) @ down).T
    np.testing.assert_allclose(kernel(params, name), expected, rtol=1e-5, atol=1e-5)


def test_settings_that_cannot_be_merged(source, tmp_path):
    write_lora(tmp_path / "adapter_model.safetensors", "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(SourceError, match="made with use_dora"):
        lora.merge(sources.find(source), [str(tmp_path / "adapter_model.safetensors")])


def test_two_spellings_of_one_matrix(source, tmp_path):
    write_lora(tmp_path / "a.safetensors", "plain", ["blocks.0.ffn.2"])
    write_lora(tmp_path / "b.safetensors", "comfy", ["blocks.0.ffn.2"])
    both = load_file(tmp_path / "a.safetensors") | load_file(tmp_path / "b.safetensors")
    save_file(both, tmp_path / "c.safetensors")
    with pytest.raises(SourceError, match=r"blocks.0.ffn.2.weight has two \w+ matrices"):
        lora.merge(sources.find(source), [str(tmp_path / "c.safetensors")])


def test_a_wanjax_folder_takes_none(capsys, tmp_path):
    line = [str(checkpoint.bundled()), str(tmp_path / "m"), "--lora", "x.safetensors"]
    assert command.main(line) == 2
    assert "merges into foreign weights" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
