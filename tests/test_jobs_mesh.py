"""Clips of a list side by side on a mesh: those of single runs, also after an interruption and with guessed passes.

The tolerance is that of float32 sums in another order, through every step: latents of unit size agree within 1e-4.
"""

import json

import jax
import numpy as np
import pytest
from nano import write_place

from samplers import command, latents, resume, work

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4
WAYS = {"plain": [], "guessed passes, noise anew": ["--skip-passes", "0.5", "--solver", "lcm"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def clips(place):
    lines = [("a", "b", "a red circle", 0), ("b", "c", "a blue square", 1), ("c", "a", "moves left", 5)]
    return [{"first": str(place / f"{first}.png"), "last": str(place / f"{last}.png"), "prompt": prompt, "seed": seed}
            for first, last, prompt, seed in lines]  # fmt: skip


def arguments(place, *more):
    return ["--model", str(place / "nano"), "--steps", "6", "--scale", "1", "--quiet", "--keep-latents", "--save-every",
            "1", *map(str, more)]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_clips_side_by_side_are_those_of_single_runs(place, tmp_path, monkeypatch, way):
    several, single, devices = [], [], jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)  # a mesh takes all there are
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(one | {"out": f"{n}.gif"}) + "\n" for n, one in enumerate(clips(place))))
    own = arguments(place, "--jobs", path, "--mesh", "data=2", *WAYS[way])
    together, keep, calls = [], resume.RunFolder.keep, []
    denoise = work.denoise
    monkeypatch.setattr(work, "denoise", lambda model, own, *a: (together.append(len(own)), denoise(model, own, *a))[1])

    def stopping(folder, name, *told, **more):
        keep(folder, name, *told, **more)
        calls.append(name)
        if calls.count(resume.CARRY) == 5:  # of the first two clips, in the third step, one of them
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(resume.RunFolder, "keep", stopping)
        assert command.main(own) == 130
    assert together == [2]
    for n in (0, 1):
        assert (tmp_path / f"{n}.run" / "carry.safetensors").is_file()
    assert command.main(own) == 0
    assert not list(tmp_path.glob("*.run"))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    again = fresh / "clips.jsonl"
    again.write_text(path.read_text())
    together.clear()
    assert command.main(arguments(place, "--jobs", again, "--mesh", "data=2", *WAYS[way])) == 0
    assert together == [2, 1]
    for n, one in enumerate(clips(place)):
        out = tmp_path / f"single{n}.gif"
        told = [f"--{name}={value}" for name, value in one.items()]
        assert command.main(arguments(place, *told, "--out", out, *WAYS[way])) == 0
        single.append(latents.read(tmp_path / f"single{n}.latents.safetensors").latents)
        several.append([latents.read(folder / f"{n}.latents.safetensors").latents for folder in (tmp_path, fresh)])
    for alone, (stopped, whole) in zip(single, several, strict=True):
        assert 0.3 < np.std(alone) < 30
        np.testing.assert_allclose(whole, alone, rtol=TOLERANCE, atol=TOLERANCE * np.abs(alone).max())
        np.testing.assert_allclose(stopped, alone, rtol=TOLERANCE, atol=TOLERANCE * np.abs(alone).max())
