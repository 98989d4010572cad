"""Both forms of a model folder: every kind of damage is named in one line, before any work where it can be seen."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from nano import NANO, random_params, write_model, write_orbax, write_tokenizer

from wanjax import checkpoint, manifest, sharding, store
from wanjax.checkpoint import CheckpointError

FORMS = ("orbax", "safetensors")
KERNEL = "dit/blocks/ffn_in/kernel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"orbax": write_orbax(root / "orbax"), "safetensors": write_model(root / "safetensors")}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def folder(folders, form, tmp_path):
    return shutil.copytree(folders[form], tmp_path / "copy")


@pytest.fixture
def orbax(folders, tmp_path):
    return shutil.copytree(folders["orbax"], tmp_path / "copy")


def equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def refused(call, *arguments, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def flip(file, at=0.5):
    data = bytearray(file.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 4
    file.write_bytes(data)


def edit(file, change):
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def test_both_forms_hold_the_same(folders):
    for path in folders.values():
        model = checkpoint.load(path)
        assert model.config == NANO
        equal(model.params, random_params(NANO))
    one, two = (manifest.read_manifest(path) for path in folders.values())
    assert dict(one.arrays) == dict(two.arrays) and (one.form, two.form) == FORMS
    assert one.files.keys() == two.files.keys() == {"config.json", "tokenizer.json"}
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    loaded = [checkpoint.load(path, mesh=mesh).params for path in folders.values()]
    equal(*loaded)
    kernel = loaded[0]["dit"]["blocks"]["ffn_in"]["kernel"]
    assert kernel.sharding == loaded[1]["dit"]["blocks"]["ffn_in"]["kernel"].sharding
    assert not kernel.sharding.is_fully_replicated


@pytest.mark.parametrize("part", ["dit", "vae", "umt5", "clip"])
@pytest.mark.parametrize("at", [0.55, 0.8, 1.0])
def test_a_flipped_bit_in_a_safetensors_file(folders, tmp_path, part, at):
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    flip(folder / f"{part}.safetensors", at)
    assert f"{folder}: {part}/" in refused(checkpoint.load, folder)


def test_flipped_bits_in_a_safetensors_header(folders, tmp_path):
    """Names, shapes, dtypes, offsets, punctuation: none is read as another model."""
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    file, found = folder / "clip.safetensors", manifest.read_manifest(folder)
    plain, shapes = file.read_bytes(), checkpoint.param_shapes(NANO)["clip"]
    for bit in range(0, 8 * (8 + int.from_bytes(plain[:8], "little")), 61):
        data = bytearray(plain)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="clip"):
            store.check(folder, "clip", shapes, found)
            store.restore(folder, "clip", shapes, None)


@pytest.mark.parametrize("name", [KERNEL, "dit/head/bias", "vae/quant/kernel", "umt5/token_embed", "clip/class_embed"])
def test_a_flipped_bit_in_a_chunk(orbax, name):
    chunks = sorted(file for file in (store.place(orbax, name) / "c").rglob("*") if file.is_file())
    for at in (0.1, 0.6, 1.0):
        flip(chunks[-1], at)
        for fast in (False, True):
            assert f"{name}: damaged" in refused(checkpoint.load, orbax, fast=fast)
        flip(chunks[-1], at)
    checkpoint.load(orbax)


def test_flipped_bits_in_a_zarr_description(orbax):
    """Either it is refused, or nothing that matters was hit and the numbers are right."""
    file, shapes = store.place(orbax, KERNEL) / "zarr.json", checkpoint.param_shapes(NANO)["dit"]
    shapes = {"blocks": {"ffn_in": {"kernel": shapes["blocks"]["ffn_in"]["kernel"]}}}
    found = manifest.read_manifest(orbax)
    found = dataclasses.replace(found, arrays={KERNEL: found.arrays[KERNEL]})
    plain, wanted, refusals = file.read_bytes(), random_params(NANO)["dit"]["blocks"]["ffn_in"]["kernel"], 0
    for bit in range(0, 8 * len(plain), 23):
        data = bytearray(plain)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            store.check(orbax, "dit", shapes, found)
            kernel = store.restore(orbax, "dit", shapes, None)["blocks"]["ffn_in"]["kernel"]
            np.testing.assert_array_equal(kernel, wanted)
        except CheckpointError as error:
            refusals += 1
            assert "ffn_in" in str(error) and "\n" not in str(error)
    assert refusals > 0.8 * len(range(0, 8 * len(plain), 23))


def test_exchanged_files_are_found_by_their_digest(orbax):
    """Two layers of one array in each other's place: every chunk's own checksum is right."""
    one, two = (store.place(orbax, KERNEL) / "c" / str(layer) / "0" / "0" for layer in (0, 1))
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert f"{KERNEL}: not the array of the manifest" in refused(checkpoint.load, orbax)
    checkpoint.load(orbax, fast=True)
    assert f"{KERNEL}: not the array of the manifest" in refused(
        store.verify, orbax, manifest.read_manifest(orbax).arrays
    )


def test_shards_are_compared_by_their_chunks(orbax):
    """What a host reads of an array that several share out has no digest of its own."""
    leaf = checkpoint.param_shapes(NANO)["dit"]["blocks"]["ffn_in"]["kernel"]
    where = NamedSharding(sharding.make_mesh({"tensor": 8}), P(None, None, "tensor"))
    array = store.open_array(store.place(orbax, KERNEL))
    wanted = random_params(NANO)["dit"]["blocks"]["ffn_in"]["kernel"]
    np.testing.assert_array_equal(store._shards(orbax, KERNEL, array, leaf, where), wanted)
    flip(store.place(orbax, KERNEL) / "c" / "1" / "0" / "0")
    array = store.open_array(store.place(orbax, KERNEL))
    assert f"{KERNEL}: damaged" in refused(store._shards, orbax, KERNEL, array, leaf, where)


def test_digests_of_what_waits_are_bounded(folders, monkeypatch):
    """With no room to wait, arrays are digested one by one; the numbers are the same."""
    monkeypatch.setattr(store, "AHEAD", 0)
    equal(checkpoint.load(folders["orbax"]).params, random_params(NANO))


def test_verify_reads_either_form(folder, form):
    arrays, told = manifest.read_manifest(folder).arrays, []
    store.verify(folder, arrays, told.append)
    assert sum(told) == manifest.size(manifest.read_manifest(folder))
    edit(folder / "manifest.json", lambda fields: fields["arrays"]["vae/quant/bias"].update(sha256="0" * 64))
    assert "vae/quant/bias: not the array of the manifest" in refused(
        store.verify, folder, manifest.read_manifest(folder).arrays
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_change_in_config_or_tokenizer(folder, name):
    """One that leaves it readable: another size of video, another order of words."""
    text = (folder / name).read_text()
    changed = text.replace('"steps": 3', '"steps": 2') if name == "config.json" else text.replace("circle", "cjrcle")
    assert changed != text
    (folder / name).write_text(changed)
    assert f"{folder / name}: not the file of the manifest" in refused(checkpoint.read_config, folder)
    checkpoint.sign(folder)  # it was meant
    checkpoint.load(folder)


LOST = {
    "chunk": (lambda path: (path / "c" / "1" / "0" / "0").unlink(), "damaged (c/1/0/0 is missing)"),
    "layers": (lambda path: shutil.rmtree(path / "c"), "damaged (c/0/0/0 is missing)"),
    "cut off": (lambda path: os.truncate(path / "c" / "0" / "0" / "0", 1000), "damaged (c/0/0/0 is cut off)"),
    "empty": (lambda path: (path / "c" / "1" / "0" / "0").write_bytes(b""), "damaged (c/1/0/0 is cut off)"),
    "description": (lambda path: (path / "zarr.json").unlink(), "not on disk"),
    "array": (lambda path: shutil.rmtree(path), "not on disk"),
    "not JSON": (lambda path: (path / "zarr.json").write_text("<html>"), "damaged (zarr.json: "),
    "deep": (lambda path: (path / "zarr.json").write_text("[" * 100_000), "damaged (zarr.json: "),
    "a list": (lambda path: (path / "zarr.json").write_text("[]"), "damaged (zarr.json: "),
    "another shape": (lambda path: edit(path / "zarr.json", lambda f: f.update(shape=[2, 48, 95])),
                      "damaged (zarr.json is not of this array)"),
    "another dtype": (lambda path: edit(path / "zarr.json", lambda f: f.update(data_type="int32")),
                      "damaged (zarr.json is not of this array)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOST)
def test_lost_and_cut_files_are_found_before_any_reading(orbax, kind):
    damage, told = LOST[kind]
    damage(store.place(orbax, KERNEL))
    assert f"{orbax}: {KERNEL}: {told}" in refused(checkpoint.read_config, orbax)


def test_many_lost_arrays_are_counted(orbax):
    shutil.rmtree(orbax / "clip")
    (orbax / "clip").mkdir()
    assert refused(checkpoint.read_config, orbax).count("not on disk (and 20 more arrays)") == 1


def test_safetensors_are_checked_before_any_reading(folders, tmp_path):
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    os.truncate(folder / "vae.safetensors", (folder / "vae.safetensors").stat().st_size - 1)
    assert "vae.safetensors: damaged" in refused(checkpoint.read_config, folder)
    shutil.copy(folder / "clip.safetensors", folder / "vae.safetensors")
    with pytest.raises(CheckpointError, match="vae is not the model of config.json") as caught:
        checkpoint.read_config(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22 and lines[-1].strip().startswith("and ") and lines[-1].endswith(" more")


def test_a_part_cannot_take_anothers_place(folders, tmp_path):
    """Same names and shapes, other numbers: only the digests know."""
    folder, other = shutil.copytree(folders["safetensors"], tmp_path / "copy"), write_model(tmp_path / "other", seed=1)
    shutil.copy(other / "umt5.safetensors", folder / "umt5.safetensors")
    checkpoint.read_config(folder)
    assert "umt5/" in refused(checkpoint.load, folder)


WRONG_KINDS = {
    "list": "[]", "null": "null", "number": "3", "string": '"x"', "empty": "", "page": "<html>", "deep": "[" * 100_000,
    "deep in a field": '{"format": 1, "dit": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
    "latin": b'{"name": "\xe9"}', "utf-16": '{"name": "x"}'.encode("utf-16"), "nothing in it": "{}",
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "tokenizer.json"])
def test_files_of_the_wrong_kind(folder, name, kind):
    content = WRONG_KINDS[kind]
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert name in refused(checkpoint.read_config, folder)
    if name == "config.json" and kind != "nothing in it":
        assert not checkpoint.is_folder(folder)


@pytest.mark.parametrize("change", [
    lambda f: f["dit"].update(dim="48"), lambda f: f["dit"].update(num_layers=None),
    lambda f: f["dit"].update(num_heads=0), lambda f: f["vae"].update(dim_mult=3),
    lambda f: f["umt5"].update(dim=[]), lambda f: f.update(dit=[1]), lambda f: f["clip"].update(patch_size=0),
    lambda f: f["dit"].update(ffn_dim=96.5), lambda f: f["umt5"].update(vocab_size="many"),
    lambda f: f["vae"].update(dim_mult=[1, "2", 2]), lambda f: f["dit"].update(precision={"param": "float8"}),
])  # fmt: skip
def test_configs_of_the_wrong_kind(folder, change):
    edit(folder / "config.json", change)
    assert "config.json" in refused(checkpoint.read_config, folder)


@pytest.mark.parametrize("change, told", [
    (lambda f: f.update(format=[2]), "format"),
    (lambda f: f.update(form="tar"), "form 'tar', this wanjax reads orbax and safetensors"),
    (lambda f: f.update(form=[]), "form"),
    (lambda f: f.update(files=["config.json"]), "not a readable manifest"),
    (lambda f: f["files"].update({"../config.json": ""}), "leads outside the folder"),
    (lambda f: f["files"].update({"..": ""}), "leads outside the folder"),
    (lambda f: f["arrays"].update({"dit/a\0b": {"shape": [1], "dtype": "float32", "sha256": ""}}), "leads outside"),
    (lambda f: f["arrays"].update({"dit/..\\x": {"shape": [1], "dtype": "float32", "sha256": ""}}), "leads outside"),
    (lambda f: f["arrays"][KERNEL].update(shape="248"), "not a readable manifest"),
    (lambda f: f["arrays"][KERNEL].update(shape=None), "not a readable manifest"),
    (lambda f: f["arrays"][KERNEL].update(dtype={}), "not a readable manifest"),
    (lambda f: f.update(arrays=[]), "not a readable manifest"),
])  # fmt: skip
def test_manifests_of_the_wrong_kind(folder, change, told):
    edit(folder / "manifest.json", change)
    text = refused(checkpoint.read_config, folder)
    assert "manifest.json" in text and told in text


@pytest.mark.parametrize("change, told", [
    (lambda f: f["arrays"].pop(KERNEL), "ffn_in/kernel: missing, config wants (2, 48, 96)"),
    (lambda f: f["arrays"][KERNEL].update(shape=[2, 48, 95]), "ffn_in/kernel: (2, 48, 95), config wants (2, 48, 96)"),
    (lambda f: f["arrays"].update({"dit/x": {"shape": [1], "dtype": "float32", "sha256": ""}}),
     "dit/x: (1,), config wants none"),
])  # fmt: skip
def test_manifests_of_another_model(folder, change, told):
    edit(folder / "manifest.json", change)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_config(folder)
    assert told in str(caught.value)


def test_another_dtype_than_the_manifests(folder):
    edit(folder / "manifest.json", lambda f: f["arrays"]["clip/class_embed"].update(dtype="int32"))
    assert "clip/class_embed: " in refused(checkpoint.load, folder)


def test_tokenizers_that_cannot_be_used(folder):
    words = json.loads((folder / "tokenizer.json").read_text())
    for content, told in (
        ("version https://git-lfs.github.com/spec/v1\n", "not a readable tokenizer.json"),
        (json.dumps(words | {"model": words["model"] | {"vocab": {"<unk>": 0, "</s>": 1, "<pad>": 64}}}), "65 tokens"),
        (json.dumps(words | {"added_tokens": [], "model": words["model"] | {"vocab": {"<unk>": 0}}}), "has no </s>"),
    ):
        (folder / "tokenizer.json").write_text(content)
        checkpoint.sign(folder)  # its digest is right, so it is the content that is told
        text = refused(checkpoint.read_config, folder)
        assert "tokenizer.json" in text and told in text


def test_folders_without_digests(folder, form):
    """By an older wanjax: they load, with a note; `sign` mends it."""
    if form == "orbax":  # its arrays have theirs
        edit(folder / "manifest.json", lambda fields: [fields.pop(name) for name in ("files", "form")])
        assert checkpoint.open_folder(folder).notes == ()
    else:
        (folder / "manifest.json").unlink()
        (note,) = checkpoint.open_folder(folder).notes
        assert str(folder) in note and "without checksums" in note and "\n" not in note
    equal(checkpoint.load(folder).params, random_params(NANO))
    checkpoint.sign(folder)
    assert checkpoint.open_folder(folder).notes == ()
    found = manifest.read_manifest(folder)
    assert found.form == form and found.files.keys() == {"config.json", "tokenizer.json"}
    edit(folder / "config.json", lambda fields: fields.update(name="other"))
    assert "not the file of the manifest" in refused(checkpoint.load, folder)


def test_a_converted_folder_that_lost_its_manifest(orbax):
    (orbax / "manifest.json").unlink()
    assert "manifest.json missing" in refused(checkpoint.load, orbax)


def test_only_whole_models_are_signed(tmp_path, folders):
    assert "no config.json" in refused(checkpoint.sign, tmp_path)
    folder = shutil.copytree(folders["safetensors"], tmp_path / "copy")
    (folder / "manifest.json").unlink()
    (folder / "clip.safetensors").unlink()
    assert "clip.safetensors" in refused(checkpoint.sign, folder)
    assert not (folder / "manifest.json").exists()


def reached(folder, way, root, monkeypatch):
    """The same folder under another name."""
    (root / "beside").mkdir()
    monkeypatch.setenv("HOME", str(root))
    if way == "link":
        (root / "link").symlink_to(folder)
        return root / "link"
    if way == "link to a link, then up":  # up from where the link leads, as the system takes it
        (root / "beside" / "link").symlink_to(folder / "..")
        (root / "short").symlink_to(root / "beside" / "link")
        return root / "short" / ".." / root.name / folder.name
    monkeypatch.chdir(root / "beside")
    return {
        "dots": f"../{folder.name}", "more dots": f"./.././beside/..//{folder.name}/", "home": f"~/{folder.name}",
        "relative": os.path.relpath(folder), "dots in the middle": str(root / "beside" / ".." / folder.name),
    }[way]  # fmt: skip


WAYS = ("dots", "more dots", "home", "relative", "dots in the middle", "link", "link to a link, then up")


@pytest.mark.parametrize("name", ["plain", "with spaces", "模型 ünï", "a#b%20c?d&e", "-x"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_folder(folders, form, tmp_path, monkeypatch, name, way):
    folder = tmp_path / name
    shutil.copytree(folders[form], folder)
    given = reached(folder, way, tmp_path, monkeypatch)
    found, config = checkpoint.read_config(given)
    assert found == folder.resolve() and found.is_absolute() and config == NANO
    if name != "plain" and way != "dots":  # reading takes the path that was found
        return
    model = checkpoint.load(given, policy="stage")
    monkeypatch.chdir("/")  # what comes later does not depend on where the process is then
    equal(model.part("clip"), random_params(NANO)["clip"])


def test_saved_under_a_relative_name(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    checkpoint.save("../ü m", NANO, random_params(NANO), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b", "tokenizer.json", "ü m"]
    checkpoint.load("../ü m")


@pytest.mark.parametrize("given", ["~nobody-of-this-name/m", "a\0b", "loop", "x" * 300, "no/such", ""])
def test_names_that_lead_nowhere(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert "model " in refused(checkpoint.read_config, given)


def test_a_file_in_a_folders_place(folders, tmp_path):
    folder = shutil.copytree(folders["orbax"], tmp_path / "copy")
    shutil.rmtree(folder / "vae")
    (folder / "vae").write_text("")
    assert "vae/" in refused(checkpoint.read_config, folder)
    assert "no such folder" in refused(checkpoint.read_config, folder / "config.json")


def test_one_device_is_the_default(folders):
    leaf = jax.tree.leaves(checkpoint.load(folders["orbax"]).params)[0]
    assert leaf.sharding == SingleDeviceSharding(jax.devices()[0])
