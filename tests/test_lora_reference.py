"""Merged weights beside those of diffusers' `load_lora_weights` and PEFT's `merge_and_unload`, same random matrices."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from foreign import DIT
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from reference import numpy_state, relative_error
from safetensors.torch import load_file, save_file
from test_dit import reference_model

from convert import lora, sources

RANK, SCALE = 3, 0.7


@pytest.fixture(scope="module")
def model():
    """A small transformer of diffusers; not to be changed."""
    return reference_model(DIT)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora_reference")
    model.save_pretrained(folder / "transformer")
    return sources.find(folder)


def agree(source, request, reference, before):
    """Every merged tensor equals the reference's; returns the names of those that changed."""
    own = lora.merge(source, [str(request)]).parts["dit"].tensors.named
    changed = []
    for name, wanted in reference.items():
        read = own[name].read()
        if np.array_equal(wanted, before[name]):
            np.testing.assert_array_equal(read, wanted, err_msg=name)
        else:
            assert relative_error(read, wanted) < 1e-5, name
            assert relative_error(read - before[name], wanted - before[name]) < 1e-5, name
            changed.append(name)
    return changed


def diffusers_merged(model, file, scale):
    """State after diffusers' own loading and fusing, under the names of the model without adapters."""
    pipe = WanPipeline(tokenizer=None, text_encoder=None, transformer=copy.deepcopy(model), vae=None, scheduler=None)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["transformer"], lora_scale=scale)
    state = numpy_state(pipe.transformer)
    return {name.replace(".base_layer", ""): array for name, array in state.items() if ".lora_" not in name}


LINEARS = {
    **{f"blocks.{i}.self_attn.{x}": (128, 128) for i in range(2) for x in "qkvo"},
    **{f"blocks.{i}.cross_attn.{x}": (128, 128) for i in range(2) for x in ("q", "k", "v", "o", "k_img", "v_img")},
    **{f"blocks.{i}.ffn.0": (96, 128) for i in range(2)},
    **{f"blocks.{i}.ffn.2": (128, 96) for i in range(2)},
}
OTHERS = {
    "time_embedding.0": (128, 32), "time_embedding.2": (128, 128), "text_embedding.0": (128, 32),
    "text_embedding.2": (128, 128), "time_projection.1": (768, 128), "head.head": (64, 128),
    "img_emb.proj.1": (32, 32), "img_emb.proj.3": (128, 32),
}  # fmt: skip


def factors(linears, pattern, down, up, alpha=None, bias=None, seed=0):
    """Tensors of a file; `pattern`: key of a linear from its name."""
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for name, (out, width) in linears.items():
        key = pattern(name)
        held[f"{key}.{down}.weight"] = torch.randn(RANK, width, generator=generator)
        held[f"{key}.{up}.weight"] = torch.randn(out, RANK, generator=generator)
        if alpha is not None:
            held[f"{key}.alpha"] = torch.tensor(float(alpha))
        if bias is not None:
            held[f"{key}.{bias}"] = torch.randn(out, generator=generator)
    return held


def comfy(name):
    return f"diffusion_model.{name}"


def kohya(name):
    return f"lora_unet_{name.replace('.', '_')}"


# diffusers reads no alpha outside of the blocks, and of kohya's names the blocks alone.
FILES = {
    "lora_down": factors(LINEARS | OTHERS, comfy, "lora_down", "lora_up"),
    "lora_A": factors(LINEARS | OTHERS, comfy, "lora_A", "lora_B"),
    "alpha": factors(LINEARS, comfy, "lora_down", "lora_up", alpha=2),
    "biases": factors(LINEARS | OTHERS, comfy, "lora_down", "lora_up", bias="diff_b"),
    "alpha and biases": factors(LINEARS, comfy, "lora_down", "lora_up", alpha=2, bias="diff_b"),
    "whole head": factors(LINEARS, comfy, "lora_A", "lora_B", bias="diff_b")
    | {
        "diffusion_model.head.head.diff": torch.linspace(-1, 2, 64 * 128).reshape(64, 128),
        "diffusion_model.head.head.diff_b": torch.linspace(-1, 2, 64),
    },
    "kohya": factors(LINEARS, kohya, "lora_down", "lora_up", alpha=1),
}


@pytest.mark.parametrize("form", FILES)
def test_files_that_diffusers_converts(model, source, tmp_path, form):
    save_file(FILES[form], tmp_path / "a.safetensors")
    reference = diffusers_merged(model, tmp_path / "a.safetensors", SCALE)
    changed = agree(source, f"{tmp_path / 'a.safetensors'}:{SCALE}", reference, numpy_state(model))
    updates = sum(key.endswith(("_down.weight", "lora_A.weight", "diff_b", "diff")) for key in FILES[form])
    assert len(changed) == updates


CONFIGS = {
    "plain": {},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "convolution": {"target_modules": ["patch_embedding", "to_q"], "lora_bias": True},
    "alpha by module": {"alpha_pattern": {"attn1.to_q": 5, "^blocks.1.attn2.to_k": 2, r"blocks\.0\.ffn\..*": 3}},
    "rank by module": {"rank_pattern": {"to_q": 2, "blocks.1.attn2.to_k": 1}},
    # Two that match one module, and one that begins inside a name and so matches nothing.
    "order": {"alpha_pattern": {"to_k": 1, "attn2.to_k": 9, "o_q": 50}, "rank_pattern": {"attn1.to_k": 2, "to_k": 4}},
    "both": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn2.to_q": 5}, "lora_bias": True},
}  # fmt: skip


def adapted(model, **changes):
    options = {
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["to_q", "to_k", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "proj_out"],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on biases, and on patterns that match nothing
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(model), LoraConfig(init_lora_weights=False, **options | changes))


def merged_by_peft(adapter):
    return numpy_state(copy.deepcopy(adapter).merge_and_unload())


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("given", ["file", "folder"])
def test_what_peft_saves(model, source, tmp_path, options, given):
    """`save_pretrained`'s folder, its settings beside it."""
    adapter = adapted(model, **CONFIGS[options])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes biases for unfinished matrices
        adapter.save_pretrained(tmp_path / "a")
        # What counts is the file: PEFT sorts the patterns when it saves them, and the first that matches wins.
        read = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    file = tmp_path / "a" if given == "folder" else tmp_path / "a" / "adapter_model.safetensors"
    assert agree(source, file, merged_by_peft(read), numpy_state(model))


@pytest.mark.parametrize("options", ["plain", "bias", "rslora", "alpha by module", "both"])
def test_what_diffusers_saves(model, source, tmp_path, options):
    """`save_lora_weights`, PEFT's settings in the file's metadata, read back by diffusers too."""
    adapter = adapted(model, **CONFIGS[options])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(adapter)
    settings = adapter.peft_config["default"].to_dict()
    layers = {key.removeprefix("base_model.model."): value.contiguous() for key, value in state.items()}
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata={
        key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()})  # fmt: skip
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert agree(source, tmp_path, merged_by_peft(adapter), numpy_state(model))
    reference = diffusers_merged(model, file, 1.0)
    agree(source, file, reference, numpy_state(model))


@pytest.mark.parametrize("name", ["default", "foo", "default_0", "v1-b"])
def test_names_of_adapters_in_the_keys(model, source, tmp_path, name):
    """The raw state dict of a model with an adapter, as some trainers store it."""
    adapter = adapted(model, lora_bias=True, lora_alpha=RANK)
    state = {key.replace(".default.", f".{name}."): value.contiguous() for key, value in adapter.state_dict().items()
             if ".lora_" in key}  # fmt: skip
    assert any(f".lora_B.{name}.bias" in key for key in state)
    save_file(state, tmp_path / "a.safetensors")
    assert agree(source, tmp_path / "a.safetensors", merged_by_peft(adapter), numpy_state(model))


def test_settings_of_another_file(model, source, tmp_path):
    adapter = adapted(model)
    adapter.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"rank_pattern": {"attn1.to_q": 7}}))
    with pytest.raises(ValueError, match=r"say rank 7 for blocks.0.attn1.to_q, its matrices have 3"):
        lora.merge(source, [str(tmp_path)])


def test_an_adapter_trained_from_other_base_weights_is_refused(model, source, tmp_path):
    """PiSSA's matrices are those of another base; PEFT's own loading changes the base first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
        )
    adapter.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="made with init_lora_weights=pissa, which cannot be merged here"):
        lora.merge(source, [str(tmp_path)])
