"""The wheel that `pip install .` makes: its scripts start; it holds the tiny model, and nothing that a clone needs."""

import contextlib
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {"wanjax-inbetween": "--keyframe", "wanjax-convert": "--lora", "wanjax-plan": "--devices",
           "wanjax-studio": "--token"}  # fmt: skip
"""And an option that its help must show."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of the tracked files alone; by the setuptools of this environment where it is new enough."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        assert "CI" not in os.environ, "no clone, so the wheel would not be tried"
        pytest.skip("no clone: cannot tell which files are tracked")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", out, copy]
    (backend,) = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])
    with contextlib.suppress(metadata.PackageNotFoundError):
        if backend.specifier.contains(metadata.version(backend.name)):
            command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.slow
def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"wanjax", "convert", "samplers", f"wanjax-{PROJECT['version']}.dist-info"}
    assets = {name.removeprefix("wanjax/assets/") for name in names if name.startswith("wanjax/assets/")}
    tracked = subprocess.run(["git", "ls-files", "wanjax/assets"], cwd=ROOT, capture_output=True, text=True).stdout
    assert assets == {name.removeprefix("wanjax/assets/") for name in tracked.split()}
    assert {"tiny/config.json", "tiny/dit.safetensors", "tiny/vae.safetensors"} <= assets
    assert {"samplers/studio/page.css", "samplers/studio/page.js"} <= set(names)
    assert "wanjax/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 24e6


@pytest.mark.slow
def test_its_scripts_start_in_a_fresh_environment(wheel, tmp_path):
    """The dependencies are those of this environment; wanjax itself is the wheel's."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    assert subprocess.run(install, capture_output=True).returncode == 0
    own = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                              capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
    # Behind the wheel's own folder; a .pth file in that folder (an editable install of a clone) is not followed.
    (own / "beside.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    where = "import wanjax, convert, samplers; print(*(m.__file__ for m in (wanjax, convert, samplers)))"
    told = subprocess.run([python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert all(path.startswith(str(own)) for path in told.stdout.split()) and told.stdout, told.stderr
    for script, option in SCRIPTS.items():
        done = subprocess.run([python.with_name(script), "--help"], cwd=tmp_path, env=environment, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0 and option in done.stdout, (script, done.stderr)
    bad = subprocess.run([python.with_name("wanjax-plan"), "--devices", "toaster"], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert bad.returncode == 2 and "toaster" in bad.stderr and "Traceback" not in bad.stderr


def test_every_script_is_tried():
    assert PROJECT["scripts"].keys() == SCRIPTS.keys()


def test_requirements_can_be_parsed_and_agree():
    """An extra that asks for a package of the dependencies asks for no older one than they do."""
    lowest = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    for extra, texts in PROJECT["optional-dependencies"].items():
        for one in map(Requirement, texts):
            if one.name in lowest:
                floors = [str(own.version) for own in one.specifier if own.operator == ">="]
                assert all(lowest[one.name].contains(floor) for floor in floors), (extra, one)


ACCELERATORS = ("cuda12", "cuda13", "tpu")
"""Extras that are one of jax's own, by the same name; their libraries are gigabytes, so pip is not asked for them."""


@pytest.mark.slow
def test_every_extra_can_be_resolved(wheel):
    """By pip, of the wheel, with what is installed here taken as it is; nothing is installed."""
    extras = PROJECT["optional-dependencies"].keys() - {*ACCELERATORS}
    assert {"explain", "sentencepiece", "gguf", "bench", "train", "docs", "test"} <= extras
    for extra in sorted(extras):
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "-q"]
        done = subprocess.run([*command, f"wanjax[{extra}] @ {wheel.as_uri()}"], capture_output=True, text=True)
        assert done.returncode == 0, (extra, done.stderr[-2000:])
        assert "does not provide the extra" not in done.stderr, (extra, done.stderr)


def test_extras_for_accelerators_are_those_of_jax():
    known = set(metadata.metadata("jax").get_all("Provides-Extra"))
    for extra in ACCELERATORS:
        (one,) = map(Requirement, PROJECT["optional-dependencies"][extra])
        assert (one.name, one.extras) == ("jax", {extra}) and extra in known


def test_the_citation():
    """Required keys and kinds of the Citation File Format 1.2.0, and the version that the package has."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert (cited["cff-version"], cited["version"], cited["license"]) == ("1.2.0", PROJECT["version"], "Apache-2.0")
    for one in (cited, *cited["references"]):
        assert one["title"] and one["authors"]
        for author in one["authors"]:
            assert "name" in author or {"family-names", "given-names"} <= author.keys()
    kinds = [one["type"] for one in cited["references"]]
    assert set(kinds) <= {"article", "conference-paper", "software", "generic"}
    papers = {item["value"] for one in cited["references"] for item in one["identifiers"]}
    assert {"arXiv:2603.17651", "arXiv:2503.20314"} <= papers


def test_the_changelog_knows_the_version():
    text = (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{PROJECT['version']}]" in text and text.index("## [Unreleased]") < text.index(
        f"[{PROJECT['version']}]"
    )
