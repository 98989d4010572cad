"""Where models lie: ComfyUI's tree, picked files, variants, copies; and models that are named for what they are."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from foreign import CONFIG, TABLES, copy_of, original, plain_params, plain_shapes, write_original
from safetensors.torch import save_file as save_torch

import convert
from convert import __main__ as command
from convert import folders, inspect, sources
from convert.keymap import invert
from convert.tensors import SourceError
from wanjax import checkpoint
from wanjax.config import preset

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn,
          "e5m2": torch.float8_e5m2}  # fmt: skip


def state(part, layout="original", change=0.0):
    params = plain_params()[part]
    if layout == "original":
        tensors = original(part, getattr(CONFIG, part), params)
    else:
        tensors = invert(TABLES[part].diffusers(getattr(CONFIG, part)), params)
    return {name: torch.from_numpy(np.array(tensor)) + change for name, tensor in tensors.items()}


def scaled(tensors):
    """As ComfyUI's fp8_scaled files."""
    out = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            out |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.removesuffix("weight") + "scale_weight": scale}
        else:
            out[name] = tensor.half()
    return out


def save(path, tensors, form="fp32"):
    """In one of the dtypes, scaled float8, or GGUF; by torch where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gguf":
        writer = gguf.GGUFWriter(str(path), "wan")
        for name, tensor in tensors.items():
            fits = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
            kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path
    tensors = (
        scaled(tensors) if form == "scaled" else {name: tensor.to(DTYPES[form]) for name, tensor in tensors.items()}
    )
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (torch.save if path.suffix in (".bin", ".pth", ".pt") else save_torch)(tensors, path)
    return path


def first(part):
    return part.tensors.files[0].name


def clip_diffusers():
    tensors = state("clip", "diffusers")
    last = f"encoder.layers.{CONFIG.clip.num_layers}."
    return tensors | {
        name.replace("encoder.layers.0.", last): x.clone() for name, x in tensors.items() if ".layers.0." in name
    }


FILES = {"dit": "diffusion_models/wan/flf2v_fp16.safetensors", "umt5": "text_encoders/umt5_xxl_fp16.safetensors",
         "vae": "vae/wan_2.1_vae.safetensors", "clip": "clip_vision/clip_vision_h.safetensors"}  # fmt: skip
OLDER = FILES | {"dit": "unet/flf2v.gguf", "umt5": "clip/umt5.safetensors"}


def tree(root, files):
    for part, file in files.items():
        save(root / file, state(part) if part in ("dit", "vae") else
             clip_diffusers() if part == "clip" else state(part, "diffusers"))  # fmt: skip
    return root


@pytest.mark.parametrize("files", [FILES, OLDER], ids=["present", "older"])
@pytest.mark.parametrize("inside", ["", "models", "split_files"])
def test_comfyui_tree(tmp_path, files, inside):
    """As it is, ComfyUI's own folder above it, its repositories on the hub."""
    tree(tmp_path / "x" / inside, files)
    source = sources.find(tmp_path / "x")
    assert list(source.parts) == ["dit", "vae", "umt5", "clip"] and not source.notes
    for part, file in files.items():
        assert source.parts[part].config == getattr(CONFIG, part) and first(source.parts[part]) == Path(file).name
    assert set(sources.find(tmp_path / "x", ["vae", "clip"]).parts) == {"vae", "clip"}


def test_comfyui_tree_with_models_of_other_kinds(tmp_path):
    root = tree(tmp_path, FILES)
    for file in ("diffusion_models/flux.safetensors", "vae/ae.safetensors", "text_encoders/sub/clip_l.safetensors"):
        save(root / file, {"double_blocks.0.x": torch.zeros(2)})
    (root / "vae" / "cut.pth").write_bytes(b"PK\x03\x04 not whole")
    (root / "diffusion_models" / "x.safetensors.index.json").write_text("{")
    (root / "diffusion_models" / "y-00001-of-00003.safetensors").write_bytes(b"")
    (root / "loras").mkdir()
    source = sources.find(root)
    assert list(source.parts) == ["dit", "vae", "umt5", "clip"]
    assert [note.split(": ")[1].split(" are")[0] for note in source.notes] == [
        "3 files beside the dit", "2 files beside the vae", "1 files beside the umt5"]  # fmt: skip
    (root / FILES["vae"]).unlink()
    source = sources.find(root)
    assert "vae" not in source.parts
    assert any("no vae of Wan2.1 in vae" in note and "cut.pth" in note for note in source.notes)


def test_comfyui_tree_through_links(tmp_path):
    """Users link folders of other disks, and at times in a circle."""
    real = tree(tmp_path / "disk", FILES)
    root = tmp_path / "models"
    root.mkdir()
    for name in ("diffusion_models", "vae"):
        (root / name).mkdir()
        (root / name / "linked").symlink_to(real / name, target_is_directory=True)
        (root / name / "circle").symlink_to(root / name, target_is_directory=True)
    assert set(sources.find(root).parts) == {"dit", "vae"}


def several(root):
    """Two transformers that are not the same model."""
    save(root / "diffusion_models" / "flf2v_720p.safetensors", state("dit"), "bf16")
    save(root / "diffusion_models" / "tuned.safetensors", state("dit", change=0.1), "bf16")
    return root


def test_several_candidates_are_listed_with_the_option(tmp_path, capsys):
    root = several(tree(tmp_path / "models", {k: v for k, v in FILES.items() if k != "dit"}))
    assert command.main([str(root), str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith(
        "diffusion_models/flf2v_720p.safetensors, diffusion_models/tuned.safetensors are each a dit; "
        "choose one with --dit FILE"
    )
    assert "\n" not in error
    picked = sources.find(root, files={"dit": root / "diffusion_models" / "tuned.safetensors"})
    assert first(picked.parts["dit"]) == "tuned.safetensors" and len(picked.parts) == 4


def test_twenty_candidates_are_one_short_line(tmp_path):
    for k in range(20):
        save(tmp_path / f"model{k:02}.safetensors", state("vae", change=0.1 * k))
    with pytest.raises(SourceError) as error:
        sources.find(tmp_path)
    assert "model07.safetensors, and 12 more are each a vae" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def picks(tmp_path_factory):
    """Four files in four folders."""
    root = tmp_path_factory.mktemp("picks")
    return {part: tree(root / part, {part: file}) / file for part, file in FILES.items()}


def test_picked_files_without_a_source(picks, tmp_path, capsys):
    options = [text for part, file in picks.items() for text in (f"--{part}", str(file))]
    assert command.main([str(tmp_path / "m"), *options, "--dtype", "f32"]) == 0
    assert "no tokenizer" in capsys.readouterr().err
    config, params = convert.load(None, "f32", files=picks)
    assert config.dit.num_layers == CONFIG.dit.num_layers and set(params) == {"dit", "vae", "umt5", "clip"}
    for leaf, wanted in zip(*(leaves(tree) for tree in (params, plain_params())), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6)
    assert command.main(["inspect", *options]) == 0
    assert "absent: nothing" in capsys.readouterr().out


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_some_picked_files_make_some_parts(picks, tmp_path, capsys):
    assert command.main(["--vae", str(picks["vae"]), str(tmp_path / "m")]) == 0
    assert "will hold vae alone" in capsys.readouterr().err
    assert checkpoint.read_config(tmp_path / "m", whole=False)[1].vae.base_dim == CONFIG.vae.base_dim


@pytest.mark.parametrize("arguments, message", [
    (["--vae", "{dit}", "{out}"], "holds a transformer, not the vae"),
    (["{out}", "--vae", "{dit}", "--only", "dit"], "--vae {dit}: not among the parts that are wanted, dit"),
    (["{out}"], "no source: give a file, a folder or hf://owner/name"),
    (["--dit", "nowhere.safetensors", "{out}"], "nowhere.safetensors: no such file or folder"),
    (["inspect", "--full", "--vae", "{vae}"], "--full reads a wanjax folder"),
])  # fmt: skip
def test_picks_that_cannot_be(picks, tmp_path, capsys, arguments, message):
    names = {part: str(file) for part, file in picks.items()} | {"out": str(tmp_path / "m")}
    assert command.main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error and error.count("\n") == 1


def test_options_between_the_paths():
    for line in (["S", "--dit", "F", "D"], ["--dit", "F", "S", "D"], ["S", "D", "--dit", "F"]):
        options = command.parser().parse_intermixed_args(line)
        assert (options.source, str(options.target), options.dit) == ("S", "D", "F")


@pytest.mark.parametrize("index", ["{}.safetensors.index.fp16.json", "{}.safetensors.fp16.index.json"])
@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_shards_of_a_variant(tmp_path, stem, index):
    folder = tmp_path / "text_encoder"
    tensors = {name: tensor.half() for name, tensor in state("umt5", "diffusers").items()}
    write_shards(folder, tensors, f"{stem}.fp16-{{:05}}-of-00002.safetensors", index.format(stem))
    part = sources.find(tmp_path).parts["umt5"]
    assert len(part.tensors.files) == 2
    part.check(plain_shapes()["umt5"])


def write_shards(folder, tensors, shard, index):
    folder.mkdir(exist_ok=True, parents=True)
    where = {}
    for k in (1, 2):
        names = sorted(tensors)[k % 2 :: 2]
        save_torch({name: tensors[name].contiguous() for name in names}, folder / shard.format(k))
        where |= dict.fromkeys(names, shard.format(k))
    (folder / index).write_text(json.dumps({"weight_map": where}))


COPIES = {  # files of one subfolder of diffusers, the taken one first
    "fp32, fp16": ("model.safetensors fp32", "model.fp16.safetensors fp16"),
    "fp16, bf16": ("model.fp16.safetensors fp16", "model.bf16.safetensors bf16"),
    "safetensors, bin": ("model.safetensors fp32", "pytorch_model.bin fp32"),
    "fp32 bin, fp16": ("pytorch_model.bin fp32", "model.fp16.safetensors fp16"),
    "bf16, fp8": ("model.safetensors bf16", "model_fp8_e4m3fn.safetensors fp8"),
    "scaled, fp8": ("model_fp8_scaled.safetensors scaled", "model_fp8.safetensors fp8"),
    "e4m3fn, e5m2": ("model_fp8_e4m3fn.safetensors fp8", "model_fp8_e5m2.safetensors e5m2"),
    "Q8_0, scaled": ("model_q8_0.gguf fp32", "model_fp8_scaled.safetensors scaled"),
    "three": ("model.fp32.safetensors fp32", "model.fp16.safetensors fp16", "model.bf16.safetensors bf16"),
}


@pytest.mark.parametrize("which", COPIES)
@pytest.mark.parametrize("place", ["diffusers", "side by side"])
def test_of_copies_the_better_one(tmp_path, which, place):
    folder = tmp_path / "text_encoder" if place == "diffusers" else tmp_path
    for copy in COPIES[which]:
        name, form = copy.split()
        save(folder / name, state("umt5", "diffusers"), form)
    source = sources.find(tmp_path)
    taken = COPIES[which][0].split()[0]
    assert first(source.parts["umt5"]) == taken
    (note,) = source.notes
    assert f"{taken} is taken" in note and all(copy.split()[0] in note for copy in COPIES[which])


def test_shards_and_a_variant_beside(tmp_path):
    """The published form: an index of each."""
    folder, tensors = tmp_path / "text_encoder", state("umt5", "diffusers")
    write_shards(folder, tensors, "model-{:05}-of-00002.safetensors", "model.safetensors.index.json")
    half = {name: tensor.half() for name, tensor in tensors.items()}
    write_shards(folder, half, "model.fp16-{:05}-of-00002.safetensors", "model.safetensors.index.fp16.json")
    source = sources.find(tmp_path)
    assert first(source.parts["umt5"]) == "model-00001-of-00002.safetensors"
    for shard in folder.glob("model-*"):  # the variant alone was downloaded, and both indexes
        shard.unlink()
    source = sources.find(tmp_path)
    assert first(source.parts["umt5"]) == "model.fp16-00001-of-00002.safetensors"
    assert "model.safetensors.index.json: none of its shards is there; left out" in source.notes[0]
    next(folder.glob("model.fp16-00001*")).unlink()
    with pytest.raises(SourceError, match="shard model.fp16-00001-of-00002.safetensors missing"):
        sources.find(tmp_path)


@pytest.mark.parametrize("names", [("a.safetensors", "b.pth"), ("mine.safetensors", "other_bf16.safetensors")])
@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "fp8", "scaled"])
def test_copies_of_any_name_are_told_by_their_numbers(tmp_path, names, form):
    save(tmp_path / names[0], state("dit"))
    save(tmp_path / names[1], state("dit"), form)
    source = sources.find(tmp_path)
    assert first(source.parts["dit"]) == names[0] and len(source.notes) == 1


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "fp8", "scaled"])
def test_another_model_of_the_same_sizes_is_no_copy(tmp_path, form):
    """Such as one with a LoRA merged: some matrices differ by some percent."""
    save(tmp_path / "a.safetensors", state("dit"))
    tuned = state("dit")
    for name, tensor in tuned.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            tuned[name] = tensor + 0.03 * tensor.std() * noise
    save(tmp_path / "b.safetensors", tuned, form)
    with pytest.raises(SourceError, match="are each a dit; choose one with --dit FILE"):
        sources.find(tmp_path)


def test_the_same_name_in_two_folders_is_no_sign_of_a_copy(tmp_path):
    """As the two transformers of Wan2.2 often lie."""
    for folder, change in (("high_noise", 0.0), ("low_noise", 0.1)):
        save(tmp_path / "diffusion_models" / folder / "model.safetensors", state("dit", change=change))
    with pytest.raises(SourceError, match="high_noise/model.safetensors, .*low_noise/model.safetensors are each a dit"):
        sources.find(tmp_path)


@pytest.mark.parametrize("one, other, same", [
    ("wan2.1_i2v_480p_14B_fp16", "wan2.1_i2v_480p_14B_fp8_e4m3fn", True),
    ("wan2.1_i2v_480p_14B_bf16", "wan2.1_i2v_720p_14B_bf16", False),
    ("Wan2_1-I2V-14B-480P_fp8_e5m2", "Wan2_1-I2V-14B-480P_fp8_e4m3fn", True),
    ("umt5_xxl_fp16", "umt5_xxl_fp8_e4m3fn_scaled", True), ("umt5-xxl-enc-bf16", "umt5-xxl-enc-fp8_e4m3fn", True),
    ("wan2.1-flf2v-14b-720p-Q4_K_M", "wan2.1-flf2v-14b-720p-Q8_0", True),
    ("wan-Q5_K_S", "wan-Q6_K", True), ("wan_IQ4_NL", "wan_bf16", True),
    ("Wan2.1-Fun-V1.0-1.3B-InP", "Wan2.1-Fun-V1.1-1.3B-InP", False), ("wan2.1_vae", "wan2.2_vae", False),
    ("high_noise_fp16", "low_noise_fp16", False), ("clip_vision_h", "clip_vision_g", False),
])  # fmt: skip
def test_names_without_their_precision(one, other, same):
    models = [folders.Group(Path(f"{name}.safetensors"), None).model for name in (one, other)]
    assert (models[0] == models[1]) == same


def test_a_name_that_looks_like_a_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("Wan-AI/Wan2.1-FLF2V-14B-720P", "Comfy-Org/x/split_files/vae/wan_2.1_vae.safetensors", "a/b@main"):
        assert command.main([name, "m"]) == 2
        assert f"did you mean hf://{name}?" in capsys.readouterr().err
    for name in ("models/x.safetensors", "./Wan-AI/x", "../a/b", "/no/where", "nothing"):
        assert command.main([name, "m"]) == 2
        error = capsys.readouterr().err
        assert "no such file or folder" in error and "hf://" not in error, name


@pytest.mark.parametrize("settings, shift", [
    ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}, 3.0),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7}, 7.0), ({"flow_shift": None}, None), ({}, None),
    ({"shift": 3.0, "use_dynamic_shifting": True}, None),
])  # fmt: skip
def test_the_shift_of_a_scheduler(tmp_path, settings, shift):
    save(tmp_path / "source" / "transformer" / "diffusion_pytorch_model.safetensors", state("dit", "diffusers"))
    (tmp_path / "source" / "scheduler").mkdir()
    (tmp_path / "source" / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    source = sources.find(tmp_path / "source")
    assert source.shift == shift


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_folders_default_is_the_schedulers_shift(tmp_path, shift):
    save(tmp_path / "source" / "transformer" / "diffusion_pytorch_model.safetensors", state("dit", "diffusers"))
    if shift:
        (tmp_path / "source" / "scheduler").mkdir()
        (tmp_path / "source" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": shift}))
    config, _ = convert.load(tmp_path / "source", "f32")
    assert config.sampling.shift == (shift or preset("flf2v_14b").sampling.shift)


@pytest.mark.parametrize("value", [0, -1, "5", [5], True, float("nan"), float("inf")])
def test_a_shift_that_is_none(tmp_path, value):
    (tmp_path / "vae").mkdir()
    (tmp_path / "scheduler").mkdir()
    save(tmp_path / "vae" / "x.safetensors", state("vae", "diffusers"))
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": value}))
    with pytest.raises(SourceError, match="scheduler_config.json: flow_shift is .*, not a positive number"):
        sources.find(tmp_path)


def image_to_video(width=None):
    """A small transformer of one image, whose vision tokens no tensor counts; they may have another width."""
    tensors = {name: x for name, x in state("dit").items() if name != "img_emb.emb_pos"}
    old = len(tensors["img_emb.proj.0.weight"])
    for name in ("proj.0.weight", "proj.0.bias", "proj.1.weight", "proj.1.bias", "proj.3.weight"):
        shape = tensors[f"img_emb.{name}"].shape
        tensors[f"img_emb.{name}"] = torch.ones(tuple((width or old) if size == old else size for size in shape))
    return tensors


@pytest.mark.parametrize("only", [("dit", "vae", "umt5", "clip"), ("dit",)], ids=["all", "dit alone"])
@pytest.mark.parametrize("place", ["side by side", "tree", "picked"])
def test_image_tokens_are_those_of_the_vision_tower_beside(tmp_path, only, place):
    dit = save(tmp_path / ("diffusion_models" if place == "tree" else ".") / "i2v.safetensors", image_to_video())
    tower = save(tmp_path / ("clip_vision" if place == "tree" else ".") / "tower.safetensors", state("clip"))
    if place == "picked":
        source = sources.find(None, only=("dit", "clip"), files={"dit": dit, "clip": tower})
    else:
        source = sources.find(tmp_path, only)
    assert source.parts["dit"].config.image_tokens == CONFIG.clip.num_tokens != 257
    assert source.parts["dit"].config.num_images == 1


def test_image_tokens_without_a_tower(tmp_path):
    save(tmp_path / "i2v.safetensors", image_to_video())
    assert sources.find(tmp_path).parts["dit"].config.image_tokens == 257
    (tmp_path / "tower.safetensors").write_bytes(b"")  # not asked for, not told of
    assert sources.find(tmp_path / "i2v.safetensors", ["dit"]).parts["dit"].config.image_tokens == 257


@pytest.mark.parametrize("width", [20, 33])
def test_a_transformer_alone_whose_vision_tokens_have_an_odd_width(tmp_path, width):
    """The vision tower that is not there must not be in the way."""
    save(tmp_path / "i2v.safetensors", image_to_video(width))
    assert command.main([str(tmp_path / "i2v.safetensors"), str(tmp_path / "m"), "--only", "dit"]) == 0


def test_inspect_tells_how_numbers_are_stored(tmp_path):
    save(tmp_path / "fp8.safetensors", state("dit"), "scaled")
    save(tmp_path / "q.gguf", state("vae"))
    assert "float8_e4m3fn with a scale" in inspect.describe(tmp_path / "fp8.safetensors")
    save(tmp_path / "sub" / "q.gguf", state("dit"))
    assert "Q8_0" in inspect.describe(tmp_path / "sub" / "q.gguf")


def test_without_the_resource_module(picks, tmp_path):
    """As on Windows."""
    code = f"""
import sys
sys.modules["resource"] = None
from convert.__main__ import main
sys.exit(main(["--vae", {str(picks["vae"])!r}, {str(tmp_path / "m")!r}]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert "peak memory" not in run.stdout and "GB in" in run.stdout


def test_an_original_folder_as_published_has_no_notes(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    write_original(path, CONFIG, plain_params())
    assert sources.find(copy_of(path, tmp_path / "copy")).notes == ()
