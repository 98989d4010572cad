"""Sources and targets as users write them: every path is absolute before any library sees it."""

import os
import shutil
from pathlib import Path

import pytest
from conversion import equal, plain_params, refused

from convert import __main__ as command
from convert import sources, write
from wanjax import checkpoint, store
from wanjax.writing import absolute

NAMES = {
    "above": ("here", "../m", "m"),
    "above twice": ("here/deeper", "../../m", "m"),
    "around": ("here", "deeper/../../m", "m"),
    "through a link": ("here", "link/../m", "elsewhere/m"),  # .. is above what the link points to
    "below a link": ("here", "link/m", "elsewhere/inner/m"),
    "home": ("here", "~/m", "home/m"),
    "spaces": ("here", "a model of mine", "here/a model of mine"),
    "unicode": ("here", "模型 é 🎬", "here/模型 é 🎬"),
    "odd": ("here", "a#b?c%20d&e=[f]", "here/a#b?c%20d&e=[f]"),
    "relative": ("here", "m", "here/m"),
    "dotted": ("here", "./m/", "here/m"),
}  # fmt: skip


@pytest.fixture
def places(tmp_path, monkeypatch):
    for name in ("here/deeper", "home", "elsewhere/inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("kind", NAMES)
def test_absolute(places, monkeypatch, kind):
    folder, name, wanted = NAMES[kind]
    monkeypatch.chdir(places / folder)
    assert absolute(name) == places / wanted
    assert ".." not in absolute(name).parts and absolute(name).is_absolute()


def test_a_link_at_the_end_stays(places):
    assert absolute(places / "here" / "link") == places / "here" / "link"


@pytest.mark.parametrize("name", [".", "..", "here/..", "/"])
def test_a_folder_without_a_name_of_its_own(places, monkeypatch, name):
    monkeypatch.chdir(places)
    assert absolute(name) == Path(name).resolve()


def test_a_user_that_is_not_there_is_one_line(source, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    assert "no folder" in refused(capsys, source, "~nobody-of-that-name/m")
    assert "no such file or folder" in refused(capsys, "~nobody-of-that-name/source", "m")


@pytest.mark.parametrize("kind", NAMES)
def test_targets(source, places, monkeypatch, kind):
    folder, name, wanted = NAMES[kind]
    monkeypatch.chdir(places / folder)
    assert command.main([str(source), name, "--only", "clip", "--dtype", "f32"]) == 0
    manifest = store.read_manifest(places / wanted)
    store.verify(places / wanted, manifest.arrays)
    assert not list(places.rglob(".*"))  # neither lock nor hidden folder anywhere


@pytest.mark.parametrize("kind", ["above", "home", "through a link", "unicode"])
def test_sources(source, places, monkeypatch, kind):
    folder, name, lies = NAMES[kind]
    shutil.copytree(source, places / lies)
    monkeypatch.chdir(places / folder)
    found = sources.find(name, ["vae"])
    assert found.path == places / lies
    assert all(file.is_absolute() for file in found.parts["vae"].tensors.files)


def test_a_wanjax_folder_by_a_relative_path_is_a_source(made, places, monkeypatch):
    """Its arrays are read through TensorStore, which takes no `..`."""
    shutil.copytree(made, places / "m")
    monkeypatch.chdir(places / "here")
    assert command.main(["../m", "../again"]) == 0
    equal(checkpoint.load(places / "again").params, plain_params())


def test_the_manifest_names_sources_the_same_from_everywhere(source, places, monkeypatch):
    shutil.copytree(source, places / "original")
    names = []
    for folder, name in (("here", "../original"), (".", "original"), ("here/deeper", "../../original")):
        monkeypatch.chdir(places / folder)
        target = places / f"m{len(names)}"
        planned = write.plan(sources.find(name, ["clip"]))
        names.append(set(write.write(planned, target, "keep").sources))
    assert (
        names[0]
        == names[1]
        == names[2]
        == {
            os.path.join("original", "models_clip.pth"),
            os.path.join("original", "google", "umt5-xxl", "tokenizer.json"),
        }
    )


@pytest.mark.parametrize("name", ["", "..", "here/..", "/", "."])
def test_targets_that_name_nothing(source, places, monkeypatch, capsys, name):
    monkeypatch.chdir(places)
    assert "names no folder to make" in refused(capsys, source, name)


def test_a_name_too_long_is_found_before_any_work(source, places, capsys, monkeypatch):
    """The hidden names are longer than the target's."""
    monkeypatch.setattr(sources, "find", lambda *arguments: pytest.fail("work"))
    for length in (250, 252, 255, 300):
        assert "File name too long" in refused(capsys, source, places / ("x" * length))
