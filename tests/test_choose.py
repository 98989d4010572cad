"""Which files of a repository are fetched, from names as the published repositories have them."""

import pytest

from convert.choose import choose, one_file, part
from convert.families import SLOTS
from convert.tensors import SourceError

SHARDS = [f"diffusion_pytorch_model-{k:05d}-of-00007.safetensors" for k in range(1, 8)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"
T5, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
ORIGINAL = [
    ".gitattributes", "LICENSE.txt", "README.md", "Wan2.1_VAE.pth", "assets/logo.png", "config.json", *SHARDS, INDEX,
    "examples/i2v_input.JPG", "google/umt5-xxl/special_tokens_map.json", "google/umt5-xxl/spiece.model",
    "google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json", CLIP, T5,
    "xlm-roberta-large/sentencepiece.bpe.model", "xlm-roberta-large/tokenizer.json",
]  # fmt: skip
DIFFUSERS = [
    "README.md", "model_index.json", "image_encoder/config.json", "image_encoder/model.safetensors",
    "image_processor/preprocessor_config.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    *(f"text_encoder/model-0000{k}-of-00005.safetensors" for k in range(1, 6)),
    "text_encoder/model.safetensors.index.json", "tokenizer/special_tokens_map.json", "tokenizer/spiece.model",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "transformer/config.json",
    *(f"transformer/{name}" for name in SHARDS), f"transformer/{INDEX}", "transformer_2/config.json",
    "transformer_2/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
COMFY = [f"split_files/{name}" for name in [
    "clip_vision/clip_vision_h.safetensors", "diffusion_models/wan2.1_flf2v_720p_14B_fp16.safetensors",
    "diffusion_models/wan2.1_flf2v_720p_14B_fp8_e4m3fn.safetensors",
    "diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors", "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
    "loras/wan2.1_distill_lora.safetensors", "text_encoders/umt5_xxl_fp16.safetensors",
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "vae/wan_2.1_vae.safetensors",
]] + ["README.md", "example workflows_Wan2.1/image_to_video.json"]  # fmt: skip
FLAT = ["Wan2_1-FLF2V-14B-720P_fp8_e4m3fn.safetensors", "Wan2_1_VAE_bf16.safetensors", "Wan2_1_VAE_fp32.safetensors",
        "umt5-xxl-enc-bf16.safetensors", "umt5-xxl-enc-fp8_e4m3fn.safetensors", "taew2_1.safetensors",
        "open-clip-xlm-roberta-large-vit-huge-14_visual_fp16.safetensors", "Wan21_CausVid_lora_rank32.safetensors",
        "README.md"]  # fmt: skip


def chosen(names, only=tuple(SLOTS)):
    choice = choose(names, only, "hf://a/b")
    return {*choice.small}, {*choice.weights}, {*choice.indexes}


def test_the_original_repository():
    small, weights, indexes = chosen(ORIGINAL)
    assert small == {"config.json", "google/umt5-xxl/tokenizer.json"}
    assert weights == {"Wan2.1_VAE.pth", T5, CLIP} and indexes == {INDEX}


@pytest.mark.parametrize("only, weights, indexes", [
    (["vae"], {"Wan2.1_VAE.pth"}, set()), (["umt5"], {T5}, set()), (["clip"], {CLIP}, set()),
    (["dit"], set(), {INDEX}), (["dit", "vae"], {"Wan2.1_VAE.pth"}, {INDEX}),
])  # fmt: skip
def test_parts_of_the_original_repository(only, weights, indexes):
    small, *found = chosen(ORIGINAL, only)
    assert found == [weights, indexes]
    assert ("config.json" in small) == ("dit" in only)  # it is the transformer's


def test_a_diffusers_repository():
    small, weights, indexes = chosen(DIFFUSERS)
    assert weights == {"image_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert indexes == {f"transformer/{INDEX}", "text_encoder/model.safetensors.index.json"}
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "vae/config.json",
            "transformer/config.json", "text_encoder/config.json", "image_encoder/config.json"} == small  # fmt: skip


@pytest.mark.parametrize("only, folder", [("dit", "transformer"), ("vae", "vae"), ("umt5", "text_encoder"),
                                          ("clip", "image_encoder")])  # fmt: skip
def test_parts_of_a_diffusers_repository(only, folder):
    small, weights, indexes = chosen(DIFFUSERS, [only])
    assert {name.split("/")[0] for name in weights | indexes} == {folder}
    assert {name for name in small if name.endswith("/config.json")} == {f"{folder}/config.json"}


VARIANTS = {
    "half precision beside": (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
    "torch beside": (["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
    "only a variant": (["model.fp16.safetensors"], "model.fp16.safetensors"),
    "variants": (["model.fp16.safetensors", "model.bf16.safetensors", "model.fp8.safetensors"],
                 "model.fp16.safetensors"),
    "8 bits": (["model.fp8_scaled.safetensors", "model.int8.safetensors"], "model.int8.safetensors"),
    "int8 beside": (["model.bf16.safetensors", "model.int8.safetensors"], "model.bf16.safetensors"),
    "an index beside": (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"],
                        "model.safetensors.index.json"),
    "indexes": (["model.safetensors.index.json", "model.safetensors.index.fp16.json"], "model.safetensors.index.json"),
    "torch shards": (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
                     "pytorch_model.bin.index.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_best_copy_of_a_folder(kind):
    names, best = VARIANTS[kind]
    everything = ["text_encoder/config.json", *(f"text_encoder/{name}" for name in names)]
    _, weights, indexes = chosen(everything, ["umt5"])
    assert weights | indexes == {f"text_encoder/{best}"}


def test_comfyuis_tree_needs_a_choice_only_where_models_differ():
    with pytest.raises(
        SourceError, match="are each a dit; choose one by its path, such as hf://a/b/split_files/diff"
    ) as e:
        chosen(COMFY)
    assert "\n" not in str(e.value)
    _, weights, _ = chosen(COMFY, ["vae", "umt5", "clip"])
    assert weights == {"split_files/vae/wan_2.1_vae.safetensors", "split_files/clip_vision/clip_vision_h.safetensors",
                       "split_files/text_encoders/umt5_xxl_fp16.safetensors"}  # fmt: skip
    one = [name for name in COMFY if "wan2.1" not in name or "flf2v" in name]
    assert "split_files/diffusion_models/wan2.1_flf2v_720p_14B_fp16.safetensors" in chosen(one)[1]


@pytest.mark.parametrize("root", ["", "models/"])
def test_comfyuis_tree_in_other_places(root):
    names = [name.replace("split_files/", root) for name in COMFY if "t2v" not in name and "i2v" not in name]
    assert f"{root}vae/wan_2.1_vae.safetensors" in chosen(names)[1]
    names = [name.replace("diffusion_models", "unet").replace("text_encoders", "clip") for name in names]
    assert f"{root}clip/umt5_xxl_fp16.safetensors" in chosen(names)[1]


def test_files_side_by_side():
    _, weights, _ = chosen(FLAT)
    assert weights == {FLAT[0], "Wan2_1_VAE_fp32.safetensors", "umt5-xxl-enc-bf16.safetensors", FLAT[6]}
    _, weights, _ = chosen([*FLAT, "wan-14b-Q4_K_M.gguf"], ["vae"])
    assert weights == {"Wan2_1_VAE_fp32.safetensors"}


def test_gguf_files_are_copies_by_their_names():
    names = [f"wan2.1-flf2v-14b-{kind}.gguf" for kind in ("Q3_K_S", "Q8_0", "Q4_K_M", "Q6_K", "Q5_0")]
    assert chosen(names, ["dit"])[1] == {"wan2.1-flf2v-14b-Q8_0.gguf"}
    assert chosen([*names, "wan2.1-flf2v-14b-BF16.gguf"], ["dit"])[1] == {"wan2.1-flf2v-14b-BF16.gguf"}
    with pytest.raises(SourceError, match="each a dit"):
        chosen([*names, "wan2.1-i2v-14b-Q8_0.gguf"], ["dit"])


def test_many_candidates_are_cut():
    names = [f"wan-{word}.safetensors" for word in "abcdefghijklmnop"]
    with pytest.raises(SourceError, match="wan-h.safetensors, and 8 more are each a dit"):
        chosen(names)


def test_a_wanjax_folder():
    arrays = [f"{slot}/{name}" for slot in SLOTS for name in ("_METADATA", "final_norm.scale/zarr.json")]
    names = ["config.json", "manifest.json", "tokenizer.json", *arrays]
    small, weights, _ = chosen(names)
    assert small == {"config.json", "manifest.json", "tokenizer.json"} and weights == set(arrays)
    assert chosen(names, ["vae"])[1] == {"vae/_METADATA", "vae/final_norm.scale/zarr.json"}
    flat = ["config.json", "tokenizer.json", *(f"{slot}.safetensors" for slot in SLOTS)]
    small, weights, _ = chosen(flat)
    assert small == {"config.json", "tokenizer.json"} and weights == set(flat[2:])
    assert chosen(flat, ["vae"])[0] == {"config.json", "tokenizer.json"}  # of the whole folder


@pytest.mark.parametrize("names", [[], ["README.md"], ["loras/x_lora.safetensors", "vace.safetensors"]])
def test_nothing_that_can_be_read(names):
    with pytest.raises(SourceError, match="hf://a/b: no model files of dit, vae, umt5, clip in it; it holds"):
        chosen(names)


@pytest.mark.parametrize("only, missing", [(["clip"], "clip"), (["umt5"], "umt5")])
def test_a_part_that_is_not_there(only, missing):
    with pytest.raises(SourceError, match=f"no model files of {missing} in it"):
        chosen(["Wan2.1_VAE.pth", "config.json"], only)


def test_one_file():
    choice = one_file(COMFY, "split_files/vae/wan_2.1_vae.safetensors", "hf://a/b/x")
    assert choice.weights == ("split_files/vae/wan_2.1_vae.safetensors",) and not choice.small
    choice = one_file(DIFFUSERS, "vae/diffusion_pytorch_model.safetensors", "hf://a/b/x")
    assert choice.small == ("vae/config.json",)
    assert not one_file(ORIGINAL, "Wan2.1_VAE.pth", "hf://a/b/x").small  # config.json is the transformer's
    assert one_file(ORIGINAL, INDEX, "hf://a/b/x").indexes == (INDEX,)
    with pytest.raises(SourceError, match="hf://a/b/x: one shard of several"):
        one_file(ORIGINAL, SHARDS[0], "hf://a/b/x")


@pytest.mark.parametrize("name, slot", [
    (T5, "umt5"), (CLIP, "clip"), ("Wan2.1_VAE.pth", "vae"), (SHARDS[0], "dit"), ("clip_vision_h.safetensors", "clip"),
    ("a_clip_of/wan.safetensors", "dit"), ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "umt5"),
])  # fmt: skip
def test_parts_by_name(name, slot):
    assert part(name) == slot
