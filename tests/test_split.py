"""Models behind any prefix, several in one file, and names that say what a file is instead."""

import json

import numpy as np
import pytest
import torch
from foreign import CONFIG, SHARD, TABLES, copy_of, imagined, original, plain_params, plain_shapes, write_original
from reference import listing
from safetensors.numpy import save_file

from convert import __main__ as command
from convert import families, sources, split
from convert.keymap import ConversionError, Rule, check, invert
from convert.tensors import SourceError
from wanjax.config import DiTConfig

PARTS = ("dit", "vae", "umt5", "clip")


def tensors_of(part, layout="original"):
    params, config = plain_params()[part], getattr(CONFIG, part)
    if layout == "original":
        return original(part, config, params)
    tensors = invert(TABLES[part].diffusers(config), params)
    if part == "clip":  # the published file goes on to a last block that is not read
        last = f"encoder.layers.{config.num_layers}."
        tensors |= {name.replace("encoder.layers.0.", last): x for name, x in tensors.items() if ".layers.0." in name}
    return tensors


def behind(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def same(part, name, layout="original"):
    """The part is the model, to the last number."""
    assert part.family.part == name and part.config == getattr(CONFIG, name)
    part.check(plain_shapes()[name])
    wanted = tensors_of(name, layout)
    for key, tensor in part.tensors.named.items():
        np.testing.assert_array_equal(tensor.read(), wanted[key])


PREFIXES = ["model.", "diffusion_model.", "model.diffusion_model.", "dit.", "module.", "_orig_mod.", "transformer.",
            "module._orig_mod.", "state_dict.model.", "a.new.one."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_taken_off(tmp_path, prefix):
    for part in PARTS:
        for layout in ("original", "diffusers"):
            file = tmp_path / f"{part}-{layout}.safetensors"
            save_file(behind(prefix, tensors_of(part, layout)), file)
            found = sources.find(file)
            assert set(found.parts) == {part} and not found.notes
            same(found.parts[part], part, layout)


@pytest.mark.parametrize("wrap", [
    lambda x: {"model_state": x}, lambda x: {"state_dict": x}, lambda x: {"model": x, "epoch": 3}, lambda x: {"ema": x},
    lambda x: {"state_dict": behind("module.", x)}, lambda x: {"generator_ema": behind("model.", x)},
])  # fmt: skip
def test_what_training_codes_wrap(tmp_path, wrap):
    state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors_of("dit").items()}
    torch.save(wrap(state), tmp_path / "x.pt")
    same(sources.find(tmp_path / "x.pt").parts["dit"], "dit")


@pytest.mark.parametrize("ema", ["ema.", "model_ema.", "generator_ema."])
def test_of_a_model_and_its_average_the_average(tmp_path, ema):
    other = {name: tensor + 1 for name, tensor in tensors_of("dit").items()}
    save_file(behind("model.", other) | behind(ema, tensors_of("dit")), tmp_path / "x.safetensors")
    found = sources.find(tmp_path / "x.safetensors")
    same(found.parts["dit"], "dit")
    (note,) = found.notes
    assert f"'{ema}' is taken" in note


def test_two_models_of_one_kind_are_refused(tmp_path):
    save_file(behind("a.", tensors_of("vae")) | behind("b.", tensors_of("vae")), tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="several of vae, under 'a.', 'b.'; save the one that is meant"):
        sources.find(tmp_path / "x.safetensors")


ALL = {
    "dit": "model.diffusion_model.",
    "vae": "vae.",
    "umt5": "text_encoders.umt5xxl.transformer.",
    "clip": "clip_vision.",
}
OLD = ALL | {"vae": "first_stage_model.", "umt5": "cond_stage_model.umt5xxl.transformer."}


@pytest.fixture(scope="module")
def beside():
    """What ComfyUI's all-in-one files hold beside the models."""
    return {"text_encoders.umt5xxl.logit_scale": np.ones((), np.float32),
            "text_encoders.spiece_model": np.arange(7, dtype=np.uint8)}  # fmt: skip


@pytest.mark.parametrize("prefixes", [ALL, OLD, {**ALL, "dit": ""}], ids=["new", "old", "one without"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_all_in_one(tmp_path, beside, prefixes, layout):
    layouts = {part: layout if part != "dit" else "original" for part in PARTS}
    tensors = dict(beside)
    for part, prefix in prefixes.items():
        tensors |= behind(prefix, tensors_of(part, layouts[part]))
    save_file(tensors, tmp_path / "all.safetensors")
    found = sources.find(tmp_path / "all.safetensors")
    assert list(found.parts) == list(PARTS)
    pieces = found.parts["umt5"].tensors.named["spiece_model"]
    np.testing.assert_array_equal(pieces.read(), beside["text_encoders.spiece_model"])
    del found.parts["umt5"].tensors.named["spiece_model"]
    for part in PARTS:
        same(found.parts[part], part, layouts[part])
    assert set(sources.find(tmp_path / "all.safetensors", ["vae"]).parts) == {"vae"}


def test_all_in_one_with_something_else(tmp_path):
    tensors = {**behind("model.", tensors_of("dit")), **behind("vae.", tensors_of("vae"))}
    tensors |= {f"audio.{i}": np.zeros(1, np.float32) for i in range(9)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SourceError) as error:
        sources.find(tmp_path / "x.safetensors")
    assert "audio.0, audio.1, audio.2, audio.3, audio.4, and 4 more" in str(error.value)


def test_one_model_and_something_else_is_said_to_be_extra(tmp_path):
    save_file(behind("model.", tensors_of("dit")) | {"audio.0": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    part = sources.find(tmp_path / "x.safetensors").parts["dit"]
    with pytest.raises(SourceError, match=r"extra \(1\):\n  audio.0"):
        part.check(plain_shapes()["dit"])


def test_with_and_without_a_prefix(tmp_path):
    tensors = tensors_of("dit")
    save_file(behind("model.", tensors) | {"head.head.bias": tensors["head.head.bias"]}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="two tensors come to the same name"):
        sources.find(tmp_path / "x.safetensors")


def test_a_text_encoder_with_the_second_copy_of_its_embedding_alone(tmp_path):
    tensors = tensors_of("umt5", "diffusers")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, tmp_path / "x.safetensors")
    same(sources.find(tmp_path / "x.safetensors").parts["umt5"], "umt5", "diffusers")


def test_a_whole_clip(tmp_path):
    """With the text tower that is not read."""
    tensors = behind("vision_model.", tensors_of("clip", "diffusers"))
    tensors |= {
        f"text_model.{name}": np.ones(2, np.float32) for name in ("embeddings.x", "encoder.layers.0.mlp.fc1.weight")
    }
    tensors |= {"logit_scale": np.ones((), np.float32), "text_projection.weight": np.ones((2, 2), np.float32),
                "visual_projection.weight": np.ones((2, 2), np.float32)}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    part = sources.find(tmp_path / "x.safetensors").parts["clip"]
    assert part.config == CONFIG.clip
    part.check(plain_shapes()["clip"])


@pytest.mark.parametrize("name, told", [
    (None, "holds several of clip, under"),
    ("encoder.layers.0.mlp.fc1.bias", "come to the same name, encoder.layers.0.mlp.fc1.bias; save one"),
])  # fmt: skip
def test_a_vision_tower_with_and_without_its_prefix_is_refused(tmp_path, name, told):
    """Whole, or one tensor of it."""
    plain = tensors_of("clip", "diffusers")
    again = plain if name is None else {name: next(iter(plain.values()))}
    save_file(behind("vision_model.", plain) | again, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=told):
        sources.find(tmp_path / "x.safetensors").parts["clip"].check(plain_shapes()["clip"])


MARKS = [(part, layout, mark) for part in PARTS for layout in ("original", "diffusers")
         for family in families.FAMILIES if (family.part, family.layout) == (part, layout)
         for mark in family.marks]  # fmt: skip


@pytest.mark.parametrize("part, layout, mark", MARKS)
def test_a_missing_tensor_that_tells_the_model_is_named(part, layout, mark):
    shapes = {name: tensor.shape for name, tensor in tensors_of(part, layout).items() if name != mark}
    for prefix in ("", "model.diffusion_model."):
        with pytest.raises(SourceError) as error:
            split.models(imagined(behind(prefix, shapes)))
        text = str(error.value)
        assert f"without {prefix}{mark}; incomplete, get it again" in text and families.TITLES[part] in text


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("lost", [
    ["patch_embedding.weight", "head.head.weight"], ["blocks.0.ffn.0.weight", "blocks.0.self_attn.q.weight"],
])  # fmt: skip
def test_several_missing_in_a_published_file(prefix, lost):
    shapes = {name: shape for name, shape in listing("official_dit_flf2v_14b.txt").items() if name not in lost}
    with pytest.raises(SourceError) as error:
        split.models(imagined(behind(prefix, shapes)))
    assert all(prefix + name in str(error.value) for name in lost) and "a transformer" in str(error.value)


def found_config(part, shapes, stated=None):
    ((family, tensors),), _ = split.models(imagined(shapes))
    return families.read_config(family, tensors, stated or {})


@pytest.mark.parametrize("layout, name, stated", [
    ("original", "img_emb.emb_pos", {"model_type": "flf2v"}),
    ("diffusers", "condition_embedder.image_embedder.pos_embed", {"pos_embed_seq_len": 514}),
])  # fmt: skip
def test_a_missing_position_is_named_where_the_configuration_tells_of_it(layout, name, stated):
    shapes = {key: tensor.shape for key, tensor in tensors_of("dit", layout).items() if key != name}
    with pytest.raises(SourceError, match=f"{name} is missing, and config.json says first-and-last-frame"):
        found_config("dit", shapes, stated)
    assert found_config("dit", shapes).num_images == 1


@pytest.mark.parametrize("layout, name", [
    ("original", "img_emb.proj.0.weight"), ("diffusers", "condition_embedder.image_embedder.norm1.weight"),
])  # fmt: skip
def test_a_missing_size_of_the_image_branch_is_named(layout, name):
    shapes = {key: tensor.shape for key, tensor in tensors_of("dit", layout).items() if key != name}
    with pytest.raises(SourceError, match=f"{name} is missing, which tells sizes"):
        found_config("dit", shapes)


@pytest.mark.parametrize("part, layout, mark", MARKS)
@pytest.mark.parametrize("how", ["scalar", "flat", "one more", "empty"])
def test_wrong_ranks_are_named(part, layout, mark, how):
    """No unpacking error, whatever tensor it is; what tells no size is found by the comparison of shapes."""
    tensors = tensors_of(part, layout)
    shape = tensors[mark].shape
    wrong = {"scalar": (), "flat": (int(np.prod(shape)),), "one more": (*shape, 1), "empty": (0, *shape[1:])}[how]
    shapes = {name: tensor.shape for name, tensor in tensors.items()} | {mark: wrong}
    ((family, found),), _ = split.models(imagined(shapes))
    with pytest.raises(SourceError) as error:
        config = families.read_config(family, found, {})
        sources.Part(family, config, found).check(plain_shapes()[part])
    text = str(error.value)
    assert mark in text and str(list(wrong)) in text and "unpack" not in text and "index" not in text


@pytest.mark.parametrize("name, number", [("blocks.7.modulation", "2, 3, 4, 5, 6"), ("blocks.99999999999.x", "and")])
def test_layers_that_are_missing_between_others(name, number):
    shapes = {key: tensor.shape for key, tensor in tensors_of("dit").items()} | {name: (1, 6, 128)}
    with pytest.raises(SourceError, match="blocks.N is missing for N = 2, 3, 4, 5, 6") as error:
        found_config("dit", shapes)
    assert number in str(error.value)


@pytest.mark.parametrize("part, key, value", [
    ("dit", "num_heads", "many"), ("dit", "num_heads", 0), ("dit", "num_heads", -4), ("dit", "num_heads", 1.5),
    ("dit", "num_heads", True), ("dit", "num_heads", [1]), ("dit", "eps", float("nan")), ("dit", "eps", {}),
    ("dit", "text_len", 1e300), ("vae", "latents_mean", 3), ("vae", "latents_std", ["x"] * 16),
    ("umt5", "layer_norm_epsilon", float("inf")), ("umt5", "relative_attention_max_distance", "128"),
    ("clip", "num_attention_heads", None.__class__), ("clip", "layer_norm_eps", -1),
])  # fmt: skip
def test_numbers_of_a_configuration_that_are_none(part, key, value):
    shapes = {name: tensor.shape for name, tensor in tensors_of(part).items()}
    with pytest.raises(SourceError, match=f"config.json says {key}") as error:
        found_config(part, shapes, {key: value})
    assert "\n" not in str(error.value)


def test_lists_of_differences_are_cut():
    rules = [Rule("a", "x.{i}")]
    from jax import ShapeDtypeStruct

    with pytest.raises(ConversionError) as error:
        check(rules, {"a": ShapeDtypeStruct((30, 4), np.float32)}, {f"y.{i}": (1,) for i in range(25)})
    text = str(error.value)
    assert "missing (30):" in text and "and 10 more" in text and "extra (25):" in text and "and 5 more" in text
    assert len(text.splitlines()) == 1 + 2 * 22


JSON = {
    "nested": "[" * 100_000, "nested objects": '{"a":' * 100_000, "a list": "[1]", "a number": "3", "null": "null",
    "text": '"x"', "cut": '{"a"', "empty": "", "not a text": b"\xff\xfe\x00",
}  # fmt: skip


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("file", ["index", "config", "scheduler"])
def test_json_of_the_wrong_kind_is_one_line(tmp_path, capsys, file, kind):
    path = tmp_path / "source"
    path.mkdir()
    if file == "scheduler":
        (path / "vae").mkdir()
        (path / "scheduler").mkdir()
        save_file(tensors_of("vae", "diffusers"), path / "vae" / "diffusion_pytorch_model.safetensors")
        (path / "vae" / "config.json").write_text("{}")
    else:
        save_file(tensors_of("vae"), path / "vae.safetensors")
    name = {"index": "x.safetensors.index.json", "config": "config.json", "scheduler": sources.SCHEDULER}[file]
    content = JSON[kind]
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command.main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and "not a readable" in error and "Traceback" not in error


@pytest.mark.parametrize("where", [
    {}, [], "x", {"a": 1}, {"a": ["x"]}, {"a": {"b": "c"}}, {"a": None}, {"a": "../x"}, {"a": "/etc/x"}, {"a": "x/y"},
    {"a": ""}, {"a": ".."}, {"a": "a\\b"}, {"a": "no.safetensors"},
])  # fmt: skip
def test_weight_maps_of_the_wrong_kind(tmp_path, capsys, where):
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert command.main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "index.json" in error and "Traceback" not in error


def test_a_shard_alone(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_original(folder, CONFIG, plain_params())
    with pytest.raises(SourceError, match="one shard of several; give their index.json, or the folder"):
        sources.find(folder / SHARD)
    copy = copy_of(folder, tmp_path / "copy")
    part = sources.find(copy / "diffusion_pytorch_model.safetensors.index.json").parts["dit"]
    same(part, "dit")


def test_every_default_configuration_is_known():
    """What the search for the nearest family takes the names from."""
    assert [type(config()) for config in families.SLOTS.values()][0] is DiTConfig
    assert all(split._kinds(k) for k in range(len(families.FAMILIES)))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a" * 1000, "a\u202eb", "a\x00b"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_names_that_no_message_can_hold(tmp_path, name, suffix):
    file = tmp_path / f"x{suffix}"
    tensors = tensors_of("vae") | {name: np.zeros(1, np.float32)}
    if suffix == ".pth":
        torch.save({key: torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}, file)
    else:
        save_file(tensors, file)
    with pytest.raises(SourceError, match="is no name of a tensor") as error:
        sources.find(file)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
