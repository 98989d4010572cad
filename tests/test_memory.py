"""The estimate of memory against XLA's own figures for the published model, and the refusal of what cannot fit."""

import dataclasses

import pytest

from samplers import memory
from samplers.plan import Plan, Settings
from wanjax.config import BFLOAT16, preset

GIB = 2**30
# GiB that XLA's memory analysis gave for FLF2V-14B, 81 frames, bfloat16, VAE float32, compiled for an H100.
FIGURES = {
    (480, 864): {"encode": 6.89, "denoise": 3.68, "decode": 8.67},
    (720, 1280): {"denoise": 8.08, "decode": 18.94},
}
WEIGHTS = {"dit": 30.89, "umt5": 10.58, "clip": 1.14, "vae": 0.47}


def plan(size=(480, 864), **changes):
    config = preset("flf2v_14b").with_precision(BFLOAT16)
    return Plan.of(config, Settings.of(config, size=size, **changes), platform="gpu")


@pytest.mark.parametrize("size", FIGURES, ids=str)
def test_estimates_are_near_the_compilers(size):
    found = memory.estimate(plan(size))
    for stage, gib in FIGURES[size].items():
        assert found.temporary[stage] / GIB == pytest.approx(gib, rel=0.05), stage
    for part, gib in WEIGHTS.items():
        assert found.weights[part] / GIB == pytest.approx(gib, rel=0.02), part


def test_what_cannot_fit_is_refused_with_a_size_that_does():
    memory.check(plan(), memory=80 * GIB)
    with pytest.raises(ValueError, match=r"size 720x1280, 81 frames: takes about 62\.\d GiB.*largest size") as caught:
        memory.check(plan((720, 1280)), memory=45 * GIB)
    assert "\n" not in str(caught.value)
    height, width = (int(side) for side in str(caught.value).rpartition(" is ")[2].split("x"))
    memory.check(plan((height, width)), memory=45 * GIB)
    with pytest.raises(ValueError):
        memory.check(plan((height + 32, width + 64)), memory=45 * GIB)


def test_weights_that_cannot_fit_are_told_by_themselves():
    with pytest.raises(ValueError, match=r"weights alone are 43\.\d GiB, there are 24\.0"):
        memory.check(plan(), memory=24 * GIB)


def test_a_mesh_splits_weights_and_tokens():
    one, eight = (memory.estimate(plan(), mesh) for mesh in ({}, {"tensor": 8}))
    assert one.weights["dit"] // 8 == eight.weights["dit"] and one.temporary["decode"] == eight.temporary["decode"]
    assert one.temporary["denoise"] // 8 == eight.temporary["denoise"]
    memory.check(plan(), {"tensor": 8}, memory=24 * GIB)


def test_this_machine_has_some():
    assert memory.available() > GIB


def test_the_estimate_is_of_the_policy():
    config = preset("flf2v_14b")
    wide = Plan.of(config, Settings.of(config), platform="cpu")
    assert memory.estimate(wide).weights["dit"] > 1.9 * memory.estimate(plan()).weights["dit"]
    assert dataclasses.replace(memory.estimate(wide)).peak > memory.estimate(plan()).peak
