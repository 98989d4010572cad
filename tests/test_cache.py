"""The compilation cache of the command line: whose folder it is, and that every program of a run is found in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nano import write_model
from PIL import Image

from samplers import cache

RUN = """
import json, os, sys
import jax
counts, lowered = {"hits": 0, "misses": 0}, []
def listen(event, **_):
    name = event.rpartition("/cache_")[2]
    if name in counts:
        counts[name] += 1
def listen_for_duration(event, duration, fun_name="", **_):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        lowered.append(fun_name)
jax.monitoring.register_event_listener(listen)
jax.monitoring.register_event_duration_secs_listener(listen_for_duration)
from samplers import command, files
if "STAND_IN" in os.environ:  # a program of a moment in place of the run's
    def make(*_):
        jax.jit(lambda x: x + 1)(1)
        return {"seconds": {}}
    files.make = make
code = command.main(sys.argv[1:])
print(json.dumps(counts | {"lowered": lowered, "code": code, "folder": jax.config.jax_compilation_cache_dir}))
"""

PROGRAMS = {f"jit({name})" for name in
            ("encode_text", "encode_images", "encode_keyframes", "noise", "denoise", "decode")}  # fmt: skip


def run(tmp_path, *extra, **environment):
    """(counts of programs found and not found, error output) of one run in a process of its own."""
    Image.new("RGB", (24, 16), "red").save(tmp_path / "a.png")
    line = ["--first", "a.png", "--last", "a.png", "--model", "nano", "--steps", "2", "--overwrite", *extra]
    quick = "--xla_backend_optimization_level=0"  # what is found does not depend on how it was compiled
    own = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home"), "XLA_FLAGS": quick, "PYTHONPATH": os.getcwd()}
    own.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", RUN, *line], capture_output=True, text=True, cwd=tmp_path,
                          env=own | environment)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_second_run_finds_every_program(tmp_path):
    """Kept ones without tracing them, with other settings too; in JAX's cache where those kept are lost."""
    write_model(tmp_path / "nano")
    first, _ = run(tmp_path)
    assert first["code"] == 0 and first["misses"] >= 5 and first["hits"] == 0 and set(first["lowered"]) >= PROGRAMS
    folder = Path(first["folder"])
    kept = folder / "programs"
    assert folder.is_relative_to(tmp_path / "home")
    assert all(os.stat(place).st_mode & 0o777 == 0o700 for place in (folder, kept))
    assert any("denoise" in file.name for file in folder.iterdir())
    assert len(list(kept.glob("*.key"))) == len(list(kept.glob("*.program"))) == len(PROGRAMS)
    second, _ = run(tmp_path, "--steps", "5", "--method", "paper", "--seed", "3", "--guidance", "3", "--quiet")
    assert second["code"] == 0 and second["misses"] == 0 and not PROGRAMS & set(second["lowered"])
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    third, _ = run(tmp_path)
    assert third["code"] == 0 and third["misses"] == 0 and third["hits"] == first["misses"]
    assert set(third["lowered"]) >= PROGRAMS


def test_where_programs_are_kept_can_be_chosen(tmp_path):
    write_model(tmp_path / "nano")
    off, _ = run(tmp_path, "--no-compile-cache", STAND_IN="1")
    assert off["code"] == 0 and off["hits"] == off["misses"] == 0 and off["folder"] is None
    assert not (tmp_path / "home").exists()
    own, _ = run(tmp_path, STAND_IN="1", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert own["code"] == 0 and own["misses"] == 1 and own["folder"] == str(tmp_path / "own")
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "home").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(OSError, match="others can write to it.*--no-compile-cache") as caught:
        cache.private(folder)
    assert "\n" not in str(caught.value)
    folder.chmod(0o755)
    cache.private(folder)


def test_a_refused_folder_is_one_line_of_the_command(tmp_path):
    write_model(tmp_path / "nano")
    folder = Path(cache.default_folder().name)
    place = tmp_path / "home" / "wanjax" / folder
    place.mkdir(parents=True)
    place.chmod(0o777)
    report, error = run(tmp_path)
    assert report["code"] == 2 and "others can write to it" in error and len(error.strip().splitlines()) == 1


def test_each_kind_of_processor_has_its_own(monkeypatch):
    here = cache.default_folder()
    assert here.parent.name == "wanjax"
    monkeypatch.setattr(cache.platform, "machine", lambda: "another")
    assert cache.default_folder() != here
