"""What the tiny model says it does not know: nothing of drawn clips, something of everything else."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.tiny.challenges import challenge
from benchmarks.tiny.clips import caption, clip, scene
from samplers import hints
from wanjax import checkpoint


def pictures():
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:32, :32]
    blurred = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (32, 32), Image.Resampling.BICUBIC
    )
    return {
        "noise": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "slope": np.stack([8 * row, 8 * column, 4 * (row + column)], -1).astype(np.uint8),
        "blurred": np.array(blurred),
    }


def test_drawn_clips_are_known():
    for seed in range(6):
        for drawn in (clip(seed, "heldout"), clip(seed, "heldout", rich=True), challenge(seed, "heldout")):
            assert hints.about(checkpoint.bundled(), drawn.caption, [drawn.video[0], drawn.video[-1]]) == []


def test_the_words_are_those_of_the_captions():
    known = set((checkpoint.bundled() / hints.WORDS).read_text(encoding="utf-8").split())
    used = {word for seed in range(300) for rich in (False, True)
            for word in caption(scene(seed, "train", rich=rich)).replace(",", "").split()} | {"star"}  # fmt: skip
    assert used <= known and {"fades", "shape", "cat", "photo"}.isdisjoint(known)


@pytest.mark.parametrize("name", pictures())
def test_other_pictures_are_told(name):
    (line,) = hints.about(checkpoint.bundled(), "a red circle moves right", [pictures()[name]])
    assert "keyframes unlike the drawn shapes" in line and "prompt" not in line


@pytest.mark.parametrize("prompt, words", [
    ("a red Cat runs right", "'cat', 'runs'"), ("一只猫 moves", "'一只猫'"), ("photo of a circle", "'photo'"),
    ("a b c d e f g h i j k", "and more"),
])  # fmt: skip
def test_strange_words_are_told(prompt, words):
    ground = clip(0).video[0]
    (line,) = hints.about(checkpoint.bundled(), prompt, [ground])
    assert words in line and "\n" not in line and "keyframes" not in line


def test_other_models_say_nothing(tmp_path):
    assert hints.about(tmp_path, "a cat", [pictures()["noise"]]) == []
