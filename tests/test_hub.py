"""hf:// against a hub on this machine and a cache laid out by hand: what is fetched, from where, and what is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub_server
import huggingface_hub
import huggingface_hub.errors
import pytest
from conversion import equal, plain_params, refused, started
from foreign import SHARD, copy_of

from convert import hub
from convert.families import SLOTS
from convert.hub import Address, parse
from convert.tensors import SourceError
from wanjax import checkpoint

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = {SHARD, SHARD.replace("00002-of", "00001-of")}
TOKENIZER = "google/umt5-xxl/tokenizer.json"

PLACES = """
import sys
from convert import hub
def noted(text):
    print(f"note: {text}", file=sys.stderr)
for line in sys.argv[1:]:
    address, *only = line.split()
    try:
        print(hub.place(address, only or ("dit", "vae", "umt5", "clip"), noted))
    except ValueError as error:
        print(f"error: {error}")
"""


@pytest.mark.parametrize("text, address", [
    ("hf://a/b", Address("a/b")), ("hf://a/b/", Address("a/b")), ("hf://models/a/b", Address("a/b")),
    ("hf://a/b@v1", Address("a/b", "v1")), ("hf://a/b@v1/x/y.pth", Address("a/b", "v1", "x/y.pth")),
    ("hf://a/b/x/", Address("a/b", None, "x")), ("hf://a/b@refs/pr/3/vae", Address("a/b", "refs/pr/3", "vae")),
    ("hf://a/b@a%2Fb/vae", Address("a/b", "a/b", "vae")), ("hf://a/b.c-1/x@y", Address("a/b.c-1", None, "x@y")),
])  # fmt: skip
def test_addresses(text, address):
    assert parse(text) == address
    assert parse(str(address).replace("@a/b", "@a%2Fb")) == address


@pytest.mark.parametrize("text", ["hf://", "hf://a", "hf://a/", "hf:///b", "hf://a/b@", "hf://a/b@/x", "hf://a /b",
                                  "hf://datasets/a/b", "hf://spaces/a/b", "hf://a/b/..", "hf://a/b@../x"])  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(SourceError, match="^hf://") as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def repository(source, tmp_path_factory):
    """The small model as the original repository, with what else lies in one."""
    folder = copy_of(source, tmp_path_factory.mktemp("hub") / "repository")
    for name in ("README.md", "assets/logo.png", "xlm-roberta-large/tokenizer.json", "loras/some_lora.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not to be read")
    (folder / "other").mkdir()
    (folder / "other" / "wan_2.1_vae_bf16.pth").write_bytes(b"vae")
    return folder


def asked(cache: Path, *lines: str, url: str = "http://127.0.0.1:1", **settings: str) -> tuple[list[str], str]:
    """What `hub.place` gives for each line, in a process of its own, and its error stream."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"} | settings
    done = subprocess.run([sys.executable, "-W", "error", "-c", PLACES, *lines], cwd=Path(__file__).parents[1], env=env,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_only_what_will_be_read_is_fetched(repository, tmp_path):
    """One cache filled step by step; each file's bytes are asked for once, and none that is not read."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--wan" / "snapshots" / hub_server.COMMIT
    with hub_server.served(repository) as (url, server):

        def fetched(*lines):
            server.fetched.clear()
            places, _ = asked(cache, *lines, url=url)
            return places, set(server.fetched)

        assert fetched("hf://someone/wan vae") == ([str(snapshot)], {"Wan2.1_VAE.pth", TOKENIZER})
        assert fetched("hf://someone/wan@v1 vae") == ([str(snapshot)], set())
        path = "other/wan_2.1_vae_bf16.pth"
        assert fetched(f"hf://someone/wan@refs/pr/3/{path}") == ([str(snapshot / path)], {path})
        assert fetched("hf://someone/wan/other vae") == ([str(snapshot / "other")], set())
        assert fetched(f"hf://someone/wan/{INDEX}") == ([str(snapshot / INDEX)], {INDEX, *SHARDS})
        assert fetched("hf://someone/wan") == ([str(snapshot)], {"models_t5.pth", "models_clip.pth"})
        refusals, bytes_sent = fetched(
            "hf://someone/wan@nope", "hf://someone/else", "hf://someone/gated", "hf://someone/broken",
            "hf://some--one/x..y", "hf://someone/wan/nowhere", f"hf://someone/wan/{SHARD}", "hf://someone/wan/assets",
        )  # fmt: skip
    assert not bytes_sent
    for line, wanted in zip(refusals, [
        "hf://someone/wan@nope: no revision 'nope' of it", "hf://someone/else: no such repository, or a private one",
        "hf://someone/gated: asks for its terms to be accepted; do so on https://huggingface.co/someone/gated",
        "hf://someone/broken: the hub does not answer (Server error '500", "hf://some--one/x..y: not a repository's",
        "hf://someone/wan/nowhere: no such file or folder in it; it holds README.md, Wan2.1_VAE.pth, assets, ",
        f"hf://someone/wan/{SHARD}: one shard of several", "hf://someone/wan/assets: no model files of dit, vae",
    ], strict=True):  # fmt: skip
        assert line.startswith(f"error: {wanted}"), line

    # The hub has gone: what the cache holds does, and what it does not hold is said.
    places, errors = asked(cache, "hf://someone/wan", "hf://someone/else")
    assert places[0] == str(snapshot) and "note: hf://someone/wan: the hub cannot be reached" in errors
    assert (
        places[1].startswith("error: hf://someone/else: the hub cannot be reached (")
        and "check the network" in places[1]
    )
    (snapshot / SHARD).unlink()
    lines = (
        "hf://someone/wan",
        "hf://someone/wan vae",
        "hf://someone/wan@v2",
        f"hf://someone/wan@{hub_server.COMMIT} vae",
    )
    places, errors = asked(cache, *lines, HF_HUB_OFFLINE="1")
    assert not errors and places[1] == places[3] == str(snapshot)
    assert places[0] == f"error: hf://someone/wan: {SHARD} missing; it is incomplete there, or in the cache"
    assert places[2] == "error: hf://someone/wan@v2: cannot be had from the hub (HF_HUB_OFFLINE is set) or its cache"


def hub_cache(folder: Path, source: Path) -> None:
    """A cache as huggingface_hub keeps it, holding one repository."""
    repository = folder / "models--someone--wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    copy_of(source, repository / "snapshots" / ("0" * 40))


def test_a_hub_repository_from_the_cache_alone(source, tmp_path):
    hub_cache(tmp_path / "hub", source)
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def run(name):
        process = started(f"hf://{name}", tmp_path / "m", "--dtype", "f32", env=offline)
        _, errors = process.communicate(timeout=300)
        return process.returncode, errors

    code, errors = run("someone/else")
    assert code == 2 and "Traceback" not in errors
    assert "hf://someone/else: cannot be had from the hub (HF_HUB_OFFLINE is set) or its cache" in errors
    code, errors = run("someone/wan")
    assert code == 0, errors
    equal(checkpoint.load(tmp_path / "m").params, plain_params())


@pytest.fixture
def fake(source, tmp_path, monkeypatch):
    """A hub without a server: its names, and copies of the files that are asked for in one snapshot."""
    state = SimpleNamespace(names=[file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()],
                            fetched=[], snapshot=tmp_path / "snapshot", revisions=set())  # fmt: skip

    def info(self, repository, *, revision=None):
        state.revisions.add(revision)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in state.names])

    def download(*, repo_id, filename, revision=None):
        state.fetched.append(filename)
        state.revisions.add(revision)
        (state.snapshot / filename).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(source / filename, state.snapshot / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state


def test_shards_come_by_the_index(fake):
    assert hub.place("hf://a/b@v2", ["dit"], pytest.fail) == fake.snapshot
    assert set(fake.fetched) == {INDEX, TOKENIZER, *SHARDS} and len(fake.fetched) == 4
    assert fake.fetched.index(INDEX) < min(map(fake.fetched.index, SHARDS))
    assert fake.revisions == {"v2"}


def test_a_source_on_the_hub_is_found(fake):
    from convert import sources

    source = sources.find("hf://a/b", ["vae"])
    assert set(source.parts) == {"vae"} and source.path == fake.snapshot
    assert sources.find("hf://a/b/Wan2.1_VAE.pth").path == fake.snapshot / "Wan2.1_VAE.pth"
    assert "models_t5.pth" not in fake.fetched


def test_what_is_picked_elsewhere_is_not_fetched(fake, source):
    from convert import sources

    found = sources.find("hf://a/b", SLOTS, {"dit": source / INDEX, "umt5": "hf://a/b/models_t5.pth"})
    assert set(found.parts) == set(SLOTS) and found.path == fake.snapshot
    assert not {INDEX, *SHARDS} & set(fake.fetched) and fake.fetched.count("models_t5.pth") == 1


def test_an_index_that_names_what_is_not_there(fake):
    fake.names.remove(SHARD)
    with pytest.raises(SourceError, match=f"hf://a/b: {SHARD} missing; it is incomplete there"):
        hub.place("hf://a/b", SLOTS, pytest.fail)
    assert SHARD not in fake.fetched


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, json.dumps({"weight_map": {"x": "../../secret"}})])
def test_an_index_that_is_none(fake, monkeypatch, content):
    plain = huggingface_hub.hf_hub_download

    def download(**arguments):
        path = plain(**arguments)
        if arguments["filename"] == INDEX:
            Path(path).write_text(content)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SourceError, match=f"{INDEX}: (not a readable index|names '../../secret')"):
        hub.place("hf://a/b", ["dit"], pytest.fail)


def test_a_repository_that_changes_meanwhile_is_noticed(fake, monkeypatch):
    plain = huggingface_hub.hf_hub_download

    def download(**arguments):
        path = plain(**arguments)
        fake.snapshot = fake.snapshot.with_name("later")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SourceError, match="hf://a/b: changed on the hub while it was fetched; run it again"):
        hub.place("hf://a/b", SLOTS, pytest.fail)


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "cannot be stored (No space left on device); free some space"),
    (PermissionError(13, "Permission denied"), "cannot be stored (Permission denied)"),
    (RuntimeError("some\nlibrary's own"), "the hub cannot be reached (some library's own); check the network"),
    (huggingface_hub.errors.LocalEntryNotFoundError("gone"), "cannot be had from the hub (no connection) or its cache"),
])  # fmt: skip
def test_failures_on_the_way_are_one_line(fake, monkeypatch, tmp_path, capsys, error, message):
    def download(**arguments):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    told = refused(capsys, "hf://a/b", tmp_path / "m")
    assert told.startswith(f"error: hf://a/b: {message}") and "\n" not in told


def test_several_models_ask_for_a_path(fake, tmp_path, capsys):
    fake.names = [f"diffusion_models/wan-{word}.safetensors" for word in ("i2v", "flf2v")]
    told = refused(capsys, "hf://a/b", tmp_path / "m")
    assert "are each a dit; choose one by its path, such as hf://a/b/diffusion_models/wan-flf2v" in told
    assert not fake.fetched
