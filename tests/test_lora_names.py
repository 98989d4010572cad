"""Spellings of LoRA files, what is refused by name, and how a file and its scale are given."""

import json
import os

import numpy as np
import pytest
from foreign import imagined
from reference import listing, relative_error
from safetensors.numpy import save_file
from test_lora_forms import normal, tensors

from convert import __main__ as command
from convert import families, lora, sources
from convert.loranames import Key, Targets, bare, parse
from convert.sources import Part
from convert.tensors import SourceError
from wanjax.compare import LISTED
from wanjax.config import preset
from wanjax.writing import absolute

NAME, OTHER, RANK = "blocks.1.self_attn.o", "blocks.1.attn1.to_out.0", 3
OUT, WIDTH = 128, 128


@pytest.fixture(scope="module", params=["original", "diffusers"])
def layout(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("names") / "dit.safetensors"
    save_file(tensors(request.param), file)
    return request.param, sources.find(file)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("name") / "dit.safetensors"
    save_file(tensors("original"), file)
    return sources.find(file)


def weight(layout, source, requests):
    """(before, after) of the one linear that the files here change."""
    name = f"{NAME if layout == 'original' else OTHER}.weight"
    part = lora.merge(source, [str(request) for request in requests]).parts["dit"]
    return tensors(layout)[name], part.tensors.named[name].read()


def pair(down="{}.lora_A.weight", up="{}.lora_B.weight", name=NAME):
    return {down.format(name): normal(RANK, WIDTH), up.format(name): normal(OUT, RANK)}


def write(path, update, metadata=None):
    save_file({key: np.asarray(value) for key, value in update.items()}, path, metadata)
    return path


FLAT, OTHER_FLAT = NAME.replace(".", "_"), OTHER.replace(".", "_")
UP_DOWN = "{}.lora_down.weight", "{}.lora_up.weight"
A_B = "{}.lora_A.weight", "{}.lora_B.weight"
SPELLED = [
    *((prefix + name, A_B) for name in (NAME, OTHER) for prefix in (
        "", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", "pipe.dit.", "dit.",
        "base_model.model.diffusion_model.", "base_model.model.transformer.", "module.", "_orig_mod.", "model.",
        "unet.", "diffusion_model.module.", "diffusion.model.")),
    *((prefix + name, UP_DOWN) for name in (FLAT, OTHER_FLAT) for prefix in (
        "lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_", "diffusion_model_", "")),
    # Half flattened.
    ("lora_unet_blocks_1.self_attn.o", UP_DOWN), ("lora_unet_blocks.1.self_attn_o", UP_DOWN),
    ("diffusion_model.blocks_1_self_attn.o", A_B), ("lycoris_blocks_1.attn1.to_out.0", UP_DOWN),
    # diffusers' attention processors.
    ("transformer.blocks.1.attn1.processor.to_out.0", A_B), ("blocks.1.attn1.processor.to_out", A_B),
    ("transformer.blocks.1.attn1.processor.to_out", ("{}_lora.down.weight", "{}_lora.up.weight")),
    ("blocks.1.attn1.to_out.0", ("{}.lora.down.weight", "{}.lora.up.weight")),
    ("transformer.blocks.1.attn1.to_out.0", ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight")),
    # Adapters by name, and matrices that are bare parameters.
    ("base_model.model.blocks.1.self_attn.o", ("{}.lora_A.default.weight", "{}.lora_B.default.weight")),
    ("base_model.model.blocks.1.attn1.to_out.0", ("{}.lora_A.foo.weight", "{}.lora_B.foo.weight")),
    ("pipe.dit.blocks.1.self_attn.o", ("{}.lora_A.my_style-2.weight", "{}.lora_B.my_style-2.weight")),
    ("diffusion_model.blocks.1.self_attn.o", ("{}.lora_A", "{}.lora_B")),
]  # fmt: skip


@pytest.mark.parametrize("spelled, words", SPELLED, ids=[f"{name}{words[0][2:]}" for name, words in SPELLED])
def test_spellings(layout, tmp_path, spelled, words):
    file = write(tmp_path / "a.safetensors", pair(*words, name=spelled) | {f"{spelled}.alpha": np.float32(2)})
    before, after = weight(*layout, [file])
    wanted = before + 2 / RANK * (normal(OUT, RANK).astype(np.float64) @ normal(RANK, WIDTH))
    assert relative_error(after, wanted) < 1e-6


PUBLISHED = {
    "official_dit_flf2v_14b.txt": ("original", "flf2v_14b"), "official_dit_i2v_14b.txt": ("original", "i2v_14b"),
    "official_dit_t2v_1_3b.txt": ("original", "t2v_1_3b"),
    "diffusers_transformer_flf2v_14b.txt": ("diffusers", "flf2v_14b"),
}  # fmt: skip


@pytest.mark.parametrize("file", PUBLISHED)
def test_every_tensor_of_the_published_models_has_its_own_names(file):
    """No two tensors share a flattened name, and each is found by it and by the plain one."""
    layout, name = PUBLISHED[file]
    family = next(family for family in families.FAMILIES if (family.part, family.layout) == ("dit", layout))
    held, config = imagined(listing(file)), preset(name).dit
    targets = Targets(Part(family, config, held))
    reached = set()
    for name in held.named:
        stem, _, kind = name.rpartition(".")
        role = {"weight": "diff", "bias": "diff_b"}.get(kind)
        key = Key(bare(stem), role) if role else Key(bare(name), "diff")
        flat = Key(bare(f"lora_unet_{key.target.replace('.', '_')}"), key.role)
        assert targets.find(key) == targets.find(flat) == name
        reached.add(targets.find(key))
    assert reached == set(held.named)
    for i in range(config.num_layers):
        assert targets.find(parse(f"diffusion_model.blocks.{i}.diff_m")) in held.named


@pytest.mark.parametrize("key", [
    "blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.lora_A.bias", "blocks.0.self_attn.q.lora_C.weight", "alpha",
    "blocks.0.self_attn.q.base_layer.weight", "blocks.0.self_attn.q.lora_A.a.b.weight", "lora_A.weight", "",
])  # fmt: skip
def test_keys_that_are_no_updates(key):
    assert parse(key) is None


def test_long_lists_are_cut(source, tmp_path):
    update = pair() | {f"vace_blocks.{i:03}.q.lora_A.weight": normal(1, 1) for i in range(300)}
    file = write(tmp_path / "a.safetensors", update)
    with pytest.raises(SourceError) as error:
        lora.merge(source, [str(file)])
    lines = str(error.value).splitlines()
    assert len(lines) == LISTED + 2 and lines[0].startswith(f"{file}: 300 keys fit no linear")
    assert lines[1].strip() == "vace_blocks.000.q.lora_A.weight" and lines[-1].strip() == f"and {300 - LISTED} more"


def test_updates_that_do_not_fit_are_cut(source, tmp_path):
    update = {f"blocks.{i}.{part}.{x}.lora_A.weight": normal(1, 1) for i in range(2)
              for part in ("self_attn", "cross_attn") for x in "qkvo"}  # fmt: skip
    update |= {
        f"blocks.{i}.{name}.diff": normal(2) for i in range(2) for name in ("norm3", "ffn.0", "ffn.2", "modulation")
    }
    with pytest.raises(SourceError, match=r"24 updates do not fit[^\0]*\n  and 4 more$"):
        lora.merge(source, [str(write(tmp_path / "a.safetensors", update))])


@pytest.mark.parametrize("keys, kind", [
    (["X.dora_scale"], "DoRA"), (["X.lora_magnitude_vector"], "DoRA"),
    (["X.lora_magnitude_vector.default.weight"], "DoRA"), (["X.lokr_w1", "X.lokr_w2_a", "X.lokr_w2_b"], "LoKr"),
    (["X.hada_w1_a", "X.hada_w1_b", "X.hada_w2_a"], "LoHa"), (["X.ia3_l"], "IA3"), (["X.on_input", "X.weight"], "IA3"),
    (["X.a1.weight", "X.a2.weight", "X.b1.weight", "X.b2.weight"], "GLoRA"), (["X.glora_A"], "GLoRA"),
    (["X.oft_blocks", "X.rescale"], "OFT"), (["X.oft_R.weight"], "OFT"), (["X.boft_R"], "OFT"),
    (["X.vera_lambda_b"], "VeRA"), (["X.lora_E"], "AdaLoRA"), (["X.set_weight"], "patch that sets weights"),
    (["X.reshape_weight"], "patch that sets weights"),
])  # fmt: skip
@pytest.mark.parametrize("spelled", ["diffusion_model.blocks.1.self_attn.o", "lycoris_blocks_1_self_attn_o"])
def test_other_kinds_are_refused_by_name(source, tmp_path, capsys, keys, kind, spelled):
    """Also beside matrices of a plain LoRA, which alone would give wrong weights. One line, exit code 2."""
    update = {key.replace("X", spelled): normal(4) for key in keys}
    file = write(tmp_path / "a.safetensors", update | pair(name=spelled))
    line = [source.path, tmp_path / "m", "--only", "dit", "--lora", file]
    assert command.main([str(x) for x in line]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and f"{file}: a {kind} ({spelled}." in error and "merge it with the program" in error


@pytest.mark.parametrize("key", [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_te1_encoder_block_0.lora_up.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "text_encoder_2.x.lora_A.weight",
    "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.diff", "te_x.alpha",
    "base_model.model.text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
])  # fmt: skip
def test_text_encoders_are_refused_by_name(source, tmp_path, key):
    update = pair("{}.lora_down.weight", "{}.lora_up.weight", f"lora_unet_{FLAT}")
    file = write(tmp_path / "a.safetensors", update | {key: normal(2, 2)})
    with pytest.raises(SourceError) as error:
        lora.merge(source, [str(file)])
    assert f"{file}: changes a text encoder too ({key})" in str(error.value) and "\n" not in str(error.value)


def test_two_adapters_in_one_file(source, tmp_path):
    update = {}
    for name in ("foo", "bar"):
        update |= pair(f"{{}}.lora_A.{name}.weight", f"{{}}.lora_B.{name}.weight")
    with pytest.raises(SourceError, match=r"holds 2 adapters \(bar, foo\); save one alone"):
        lora.merge(source, [str(write(tmp_path / "a.safetensors", update))])


@pytest.mark.parametrize("metadata", [
    {"ss_network_alpha": "1", "ss_network_dim": "8"}, {"format": "pt"}, {"lora_adapter_metadata": "{}"}, {},
    {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 99, "transformer.lora_alpha": RANK})},
])  # fmt: skip
def test_metadata_that_changes_nothing(source, tmp_path, metadata):
    """kohya's repeats the alphas of the tensors, and is read by no loader where they are absent."""
    before, after = weight("original", source, [write(tmp_path / "a.safetensors", pair(), metadata)])
    assert relative_error(after, before + normal(OUT, RANK).astype(np.float64) @ normal(RANK, WIDTH)) < 1e-6


def test_an_alpha_of_the_tensors_comes_before_the_settings(source, tmp_path):
    told = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 50, "transformer.r": RANK})}
    file = write(tmp_path / "a.safetensors", pair() | {f"{NAME}.alpha": np.float32(2)}, told)
    before, after = weight("original", source, [file])
    wanted = before + 2 / RANK * (normal(OUT, RANK).astype(np.float64) @ normal(RANK, WIDTH))
    assert relative_error(after, wanted) < 1e-6


@pytest.mark.parametrize("settings, message", [
    ({"use_dora": True}, "made with use_dora"), ({"use_qalora": True}, "made with use_qalora"),
    ({"layer_replication": [[0, 2]]}, "made with layer_replication"), ({"peft_type": "LOHA"}, "a LOHA by its PEFT"),
    ({"init_lora_weights": "olora"}, "init_lora_weights=olora"), ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"), ({"alpha_pattern": {"(": 1}}, "cannot be read"),
    ({"alpha_pattern": {"q": None, "o": "x"}}, "alpha_pattern 'o' is 'x'"), ({"rank_pattern": [1]}, "is a list"),
    ({"r": 8}, "say rank 8 for blocks.1.self_attn.o, its matrices have 3"), ([1], "a list, not an object"),
    ("{", "cannot be read"), ("[" * 100_000, "cannot be read"),
])  # fmt: skip
@pytest.mark.parametrize("told", ["beside", "metadata"])
def test_settings_that_are_refused(source, tmp_path, settings, message, told):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    file = write(tmp_path / "adapter_model.safetensors", pair(), {"lora_adapter_metadata": text})
    if told == "beside":
        write(file, pair())
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(SourceError, match=message.replace("(", r"\(")) as error:
        lora.merge(source, [str(file)])
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_harmless_settings(source, tmp_path):
    file = write(tmp_path / "adapter_model.safetensors", pair())
    told = {"peft_type": "LORA", "init_lora_weights": "gaussian", "use_dora": False, "bias": "none", "lora_alpha": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    assert lora.merge(source, [str(file)]).parts["dit"].tensors.files[-1].name == "adapter_config.json"


@pytest.mark.parametrize("text, path, scale", [
    ("x.safetensors", "x.safetensors", 1.0), ("x.safetensors:0.8", "x.safetensors", 0.8), ("x:-2", "x", -2.0),
    ("a/x:1e-1", "a/x", 0.1), ("a:b/x:.5", "a:b/x", 0.5),
    (r"C:\loras\x.safetensors", r"C:\loras\x.safetensors", 1.0),
    ("C:/loras/x.safetensors", "C:/loras/x.safetensors", 1.0),
    (r"C:\loras\x.safetensors:0.8", r"C:\loras\x.safetensors", 0.8), ("d:/x.safetensors:-1", "d:/x.safetensors", -1.0),
    (r"\\host\share\x.safetensors:0.8", r"\\host\share\x.safetensors", 0.8), ("~/x:2", "HOME/x", 2.0),
])  # fmt: skip
def test_files_and_scales(monkeypatch, text, path, scale):
    monkeypatch.setenv("HOME", "/some/home")
    found, number = lora.parse_request(text)
    assert (found, number) == (absolute(path.replace("HOME", "/some/home")), scale)


def test_a_colon_in_a_files_name(source, tmp_path):
    file = write(tmp_path / "a:0.5", pair())
    if os.name == "posix":
        before, after = weight("original", source, [file])
        assert relative_error(after, before + normal(OUT, RANK).astype(np.float64) @ normal(RANK, WIDTH)) < 1e-6


@pytest.mark.parametrize("text, message", [
    ("x:", "'' is not a scale"), ("x:big", "'big' is not a scale"), ("x:inf", "must be finite"),
    ("x:nan", "must be finite"), ("~no_such_user/x:1", None),
    ("x:0.8x", "is not a scale"), ("hf://owner/name/x.safetensors", "must be a file on this machine"),
    ("hf://owner/name:0.8", "must be a file on this machine"), ("C:\\x.safetensors:big", "'big' is not a scale"),
])  # fmt: skip
def test_requests_that_are_refused(source, text, message):
    with pytest.raises(SourceError, match=f"--lora .*{message}" if message else "~no_such_user/x: cannot be read"):
        lora.merge(source, [text])


def test_a_source_that_lacks_what_a_file_changes(tmp_path):
    held = {name: tensor for name, tensor in tensors("original").items() if name != f"{NAME}.weight"}
    source = sources.find(write(tmp_path / "dit.safetensors", held))
    with pytest.raises(SourceError, match=f"{NAME}.weight: missing in the source itself"):
        lora.merge(source, [str(write(tmp_path / "a.safetensors", pair()))])


@pytest.mark.parametrize("held, found", [
    (["adapter_model.safetensors", "other.safetensors"], "adapter_model.safetensors"),
    (["pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"), (["a.safetensors"], "a.safetensors"),
    (["a.safetensors", "b.safetensors"], None), ([], None),
])  # fmt: skip
def test_folders(source, tmp_path, held, found):
    for name in held:
        write(tmp_path / name, pair())
    if found is not None:
        assert lora.merge(source, [str(tmp_path)]).parts["dit"].tensors.files[-1].name == found
        return
    with pytest.raises(SourceError, match="a folder with .*; give the file"):
        lora.merge(source, [f"{tmp_path}:0.5"])


def test_a_whole_model_is_no_lora(source, tmp_path):
    file = write(tmp_path / "a.safetensors", dict(tensors("original")))
    with pytest.raises(SourceError, match="keys fit no linear"):
        lora.merge(source, [str(file)])
    with pytest.raises(SourceError, match="holds no LoRA"):
        lora.merge(source, [str(write(tmp_path / "b.safetensors", {}))])
