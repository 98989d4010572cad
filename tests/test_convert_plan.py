"""What a conversion will make, decided before any tensor is read: sizes that parts tell, and the tokenizer."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import spiece_model
from conversion import CONFIG, plain_params, refused
from foreign import copy_of, original, write_original
from nano import random_params, write_tokenizer
from safetensors.numpy import load_file, save_file

from convert import __main__ as command
from convert import plan, sources, umt5, write
from convert.keymap import invert
from convert.tensors import SourceError
from wanjax import checkpoint
from wanjax.config import preset
from wanjax.tokenizer import Tokenizer

TOKENIZER = "google/umt5-xxl/tokenizer.json"


def test_presets_are_recognised():
    for name in ("flf2v_14b", "i2v_14b", "t2v_1_3b"):
        assert plan._nearest(preset(name).dit) == name
    assert plan._nearest(dataclasses.replace(preset("i2v_14b").dit, num_layers=3)) == "i2v_14b"


def sized(image_dim: int, heads: int, images: int):
    """The small model with another width of image tokens, and one keyframe or two."""
    dit = dataclasses.replace(CONFIG.dit, image_dim=image_dim, num_images=images)
    return dataclasses.replace(CONFIG, dit=dit, clip=dataclasses.replace(CONFIG.clip, dim=image_dim, num_heads=heads))


@pytest.mark.parametrize("image_dim, heads", [(40, 4), (24, 8), (7, 7), (1, 1)])
def test_a_transformer_alone_with_any_width_of_image_tokens(tmp_path, image_dim, heads):
    """No vision tower is there whose heads could divide it or not."""
    config = sized(image_dim, heads, 2)
    save_file(original("dit", config.dit, random_params(config)["dit"]), tmp_path / "dit.safetensors")
    planned = plan.plan(sources.find(tmp_path, ["dit"]))
    assert planned.config.dit == config.dit
    assert (planned.config.clip.dim, planned.config.clip.num_tokens) == (image_dim, config.clip.num_tokens)
    assert not image_dim % planned.config.clip.num_heads


def test_a_vision_tower_whose_heads_are_not_told(tmp_path):
    config = sized(40, 4, 2)
    tensors = original("clip", config.clip, random_params(config)["clip"])
    save_file({name: np.atleast_1d(x) for name, x in tensors.items()}, tmp_path / "clip.safetensors")
    with pytest.raises(SourceError, match="width 40: 16 heads do not divide it; give a folder with its config.json"):
        plan.plan(sources.find(tmp_path, ["clip"]))


def test_an_image_to_video_transformer_has_as_many_image_tokens_as_the_tower_gives(tmp_path):
    """No tensor of its is as long; 257 is only the published one's."""
    config = sized(32, 16, 1)
    write_original(tmp_path, config, random_params(config))
    shutil.rmtree(tmp_path / "google")
    planned = plan.plan(sources.find(tmp_path))
    assert planned.config.dit == config.dit and planned.config.dit.image_tokens == config.clip.num_tokens == 5
    for dtype in plan.DTYPES:
        assert plan.plan(sources.find(tmp_path), dtype).config.dit.image_tokens == 5


NO_TOKENIZER = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html></html>", "a web page"),
    "empty": (b"", "empty; get it again"),
    "blank": (b" \n", "empty; get it again"),
    "cut": (b'{"version": "1.0", "model"', "not a readable tokenizer.json"),
    "other JSON": (b"[1, 2]", "not a readable tokenizer.json"),
    "deep": (b"[" * 100_000, "not a readable tokenizer.json"),
    "bytes": (b"\xff\xfe\x00\x01", "no UTF-8 text"),
    "no vocabulary": (json.dumps({"version": "1.0", "model": {"type": "Unigram", "vocab": []}}).encode(),
                      "not a readable tokenizer.json"),
    "no </s>": (json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1},
                "unk_token": "[UNK]"}}).encode(), "the vocabulary has no </s>"),
    "another's": (json.dumps({"version": "1.0", "model": {"type": "WordLevel", "unk_token": "<unk>",
                  "vocab": {"<unk>": 0, "</s>": 1, "<pad>": 99}}}).encode(), "100 tokens, the text encoder has 64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(source, tmp_path_factory):
    """The text encoder alone, with a tokenizer beside it."""
    path = tmp_path_factory.mktemp("encoder") / "source"
    path.mkdir()
    shutil.copyfile(source / "models_t5.pth", path / "models_t5.pth")
    write_tokenizer(path / "tokenizer.json")
    return path


@pytest.mark.parametrize("kind", NO_TOKENIZER)
def test_what_is_no_tokenizer_is_found_before_anything_is_written(encoder, tmp_path, capsys, monkeypatch, kind):
    path = copy_of(encoder, tmp_path / "copy")
    data, message = NO_TOKENIZER[kind]
    (path / "tokenizer.json").write_bytes(data)
    monkeypatch.setattr(write, "sha256", lambda *arguments: pytest.fail("long work"))
    error = refused(capsys, path, tmp_path / "m", "--only", "umt5")
    assert message in error and str(path / "tokenizer.json") in error and "\n" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


def test_a_tokenizer_that_nothing_wanted_needs_is_left_out_with_a_note(source, tmp_path, capsys):
    path = copy_of(source, tmp_path / "copy")
    (path / TOKENIZER).write_bytes(NO_TOKENIZER["pointer"][0])
    assert command.main([str(path), str(tmp_path / "m"), "--only", "vae"]) == 0
    assert "note: left out: tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "m" / "tokenizer.json").exists()


def test_without_a_tokenizer_a_note_says_so(encoder, tmp_path):
    path = copy_of(encoder, tmp_path / "copy")
    (path / "tokenizer.json").unlink()
    planned = plan.plan(sources.find(path))
    assert planned.tokenizer is None
    assert plan.lacking(planned, ["umt5"])[1:] == [
        "no tokenizer in the source; put umt5-xxl's tokenizer.json into the folder"
    ]


@pytest.fixture(scope="module")
def small_model():
    """A SentencePiece model that the small text encoder can take."""
    return spiece_model.trained(vocabulary=60, byte_fallback=False)


def placed(form, encoder, path, model):
    """A source with this SentencePiece model in one of the places where it is found."""
    if form == "tensor":
        path.mkdir()
        tensors = invert(umt5.diffusers(CONFIG.umt5), plain_params()["umt5"])  # as ComfyUI's
        save_file(tensors | {"spiece_model": np.frombuffer(model, np.uint8)}, path / "umt5_xxl.safetensors")
        return path
    copy_of(encoder, path)
    (path / "tokenizer.json").unlink()
    (path / form).parent.mkdir(parents=True, exist_ok=True)
    (path / form).write_bytes(model)
    return path


@pytest.mark.parametrize("form", ["spiece.model", "google/umt5-xxl/spiece.model", "tokenizer/spiece.model",
                                  "tokenizer.model", "tensor"])  # fmt: skip
def test_a_sentencepiece_model_is_found(encoder, tmp_path, small_model, form):
    path = placed(form, encoder, tmp_path / "source", small_model)
    planned = plan.plan(sources.find(path))
    own = Tokenizer.parse(planned.tokenizer.text, form).encode(["a red circle"], 24)[0][0].tolist()
    wanted = spiece_model.processor(small_model).encode("a red circle") + [1]
    assert own == wanted + [0] * (24 - len(wanted))
    assert planned.tokenizer.file == (None if form == "tensor" else path / form)
    assert form == "tensor" or path / form in planned.files
    assert plan.lacking(planned, ["umt5"]) == ["the folder will hold umt5 alone and cannot be run by itself"]


@pytest.mark.parametrize("form", ["google/umt5-xxl/spiece.model", "tensor"])
def test_a_sentencepiece_model_becomes_the_folders_tokenizer(encoder, tmp_path, small_model, form):
    path = placed(form, encoder, tmp_path / "source", small_model)
    assert command.main([str(path), str(tmp_path / "m"), "--only", "umt5"]) == 0
    ids, mask = Tokenizer(tmp_path / "m" / "tokenizer.json").encode(["a red circle"], 24)
    wanted = spiece_model.processor(small_model).encode("a red circle") + [1]
    assert ids[0][mask[0] == 1].tolist() == wanted
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert form == "tensor" or any(name.endswith(form) for name in manifest["sources"])


def test_a_tokenizer_json_goes_before_a_sentencepiece_model(encoder, tmp_path, small_model):
    path = copy_of(encoder, tmp_path / "copy")
    (path / "spiece.model").write_bytes(small_model)
    assert plan.plan(sources.find(path)).tokenizer.file == path / "tokenizer.json"


def test_without_the_extra_a_note_names_it(encoder, tmp_path, small_model, monkeypatch):
    path = placed("spiece.model", encoder, tmp_path / "source", small_model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setattr("convert.tokenizer.find_spec", lambda name: None)
    planned = plan.plan(sources.find(path))
    assert planned.tokenizer is None
    notes = plan.lacking(planned, ["umt5"])
    assert any("spiece.model: a SentencePiece model; pip install 'wanjax[sentencepiece]' reads it" in n for n in notes)


@pytest.mark.parametrize("form", ["spiece.model", "tensor"])
def test_a_damaged_sentencepiece_model_is_named(encoder, tmp_path, small_model, form):
    for data in (b"", b"nonsense", small_model[: len(small_model) // 2]):
        path = placed(form, encoder, tmp_path / f"source{len(data)}", data)
        with pytest.raises(SourceError, match="damaged or not a SentencePiece model") as error:
            plan.plan(sources.find(path))
        assert "spiece" in str(error.value) and "\n" not in str(error.value)


def test_load_file_and_plan_read_the_same(encoder, small_model, tmp_path):
    """The model inside a text encoder is what was put there."""
    path = placed("tensor", encoder, tmp_path / "source", small_model)
    assert load_file(path / "umt5_xxl.safetensors")["spiece_model"].tobytes() == small_model
    assert plan.plan(sources.find(path)).tokenizer.file is None
    assert checkpoint.TOKENIZER == "tokenizer.json"
