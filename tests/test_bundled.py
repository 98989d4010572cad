"""The bundled tiny model through the pipeline, on its own example and on held-out clips."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wanjax
from benchmarks.tiny.clips import clip
from benchmarks.tiny.evaluate import baselines, psnr
from samplers import files
from samplers.pipeline import Batch, Inputs, make
from samplers.plan import Plan, Settings
from wanjax import checkpoint, manifest

SEEDS = range(1000, 1008)


@pytest.fixture(scope="module")
def made():
    """Held-out clips that neither training nor the published figures saw, and what the model makes of them."""
    model = checkpoint.load("tiny")
    plan = Plan.of(model.config, Settings.of(model.config))
    clips = [clip(seed, "heldout") for seed in SEEDS]
    inputs = Inputs.prepare([(c.video[0], c.video[-1]) for c in clips], plan)
    (made,) = make(model, plan, [Batch(inputs, [c.caption for c in clips], list(SEEDS))], chunk=plan.settings.steps)
    return np.stack([c.video for c in clips]), made.video


@pytest.mark.slow
def test_ends_are_the_keyframes(made):
    truth, video = made
    for frame in (0, -1):
        assert psnr(video[:, [frame]], truth[:, [frame]]).mean() > 28


@pytest.mark.slow
def test_the_shape_moves_and_does_not_fade(made):
    truth, video = made
    inside = slice(1, -1)
    fade = psnr(baselines(truth)["crossfade"][:, inside], truth[:, inside])
    gain = psnr(video[:, inside], truth[:, inside]) - fade
    assert gain.mean() > 2
    assert (gain > 0).mean() >= 0.75


def test_example_is_of_the_models_size():
    example = files.example()
    height, width = checkpoint.read_config("tiny")[1].sampling.size
    for name in ("first", "last"):
        with Image.open(example[name]) as image:
            assert image.size == (width, height)
    assert example["prompt"]


def test_its_manifest_is_that_of_its_files(tmp_path):
    """Made again it is the same to the byte; only a new version of wanjax changes its name in it."""
    folder = checkpoint.bundled()
    assert checkpoint.open_folder("tiny").notes == ()
    shutil.copytree(folder, tmp_path / "tiny")
    checkpoint.sign(tmp_path / "tiny")
    again, kept = ((path / "manifest.json").read_text() for path in (tmp_path / "tiny", folder))
    assert re.sub('"tool": ".*"', "", again) == re.sub('"tool": ".*"', "", kept)
    files = manifest.read_manifest(folder).files
    for name in ("config.json", "tokenizer.json"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == files[name]


def test_package_stays_small():
    """What is installed, weights included, is at most 24 MB."""
    folder = Path(wanjax.__file__).parent
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix not in (".pyc", ".pyo"))
    assert size <= 24e6
