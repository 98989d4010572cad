"""The estimate of memory against XLA's own figures for the published model, and the refusal of what cannot fit."""

import pytest

from samplers import memory
from samplers.plan import Settings
from wanjax import sharding
from wanjax.config import BFLOAT16, VAE_BFLOAT16, preset

GIB = 2**30
# GiB that XLA's memory analysis gave for FLF2V-14B, 81 frames, bfloat16, compiled for H100s.
FIGURES = {
    ("float32", (480, 864), 1): {"encode": 6.60, "denoise": 2.66, "decode": 7.79},
    ("bfloat16", (480, 864), 1): {"denoise": 2.66, "decode": 4.32},
    ("bfloat16", (720, 1280), 1): {"encode": 8.23, "denoise": 5.82, "decode": 9.28},
    ("bfloat16", (480, 864), 2): {"denoise": 1.66},
    ("bfloat16", (480, 864), 8): {"denoise": 0.64},
    ("bfloat16", (720, 1280), 8): {"encode": 1.39, "decode": 1.98},
}
"""By policy of the VAE, size and devices."""
WEIGHTS = {"dit": 30.89, "umt5": 10.58, "clip": 1.14, "vae": 0.47}


def clip(size=(480, 864), **changes):
    config = preset("flf2v_14b").with_precision(BFLOAT16)
    return config, Settings.of(config, size=size, **changes)


@pytest.mark.parametrize("vae, size, devices", FIGURES, ids=str)
def test_estimates_are_near_the_compilers(vae, size, devices):
    config = preset("flf2v_14b").with_precision(BFLOAT16, vae=VAE_BFLOAT16 if vae == "bfloat16" else None)
    mesh = sharding.choose_mesh(devices, 40)
    found = memory.estimate(config, Settings.of(config, size=size), mesh)
    for stage, gib in FIGURES[vae, size, devices].items():
        assert found.temporary[stage] / GIB == pytest.approx(gib, rel=0.05 if devices == 1 else 0.3), stage
    for part, gib in WEIGHTS.items():
        split = 1 if part == "vae" else devices
        assert found.weights[part] / GIB == pytest.approx(gib / split, rel=0.02), part


def test_what_cannot_fit_is_refused_with_a_size_that_does():
    memory.check(*clip(), memory=80 * GIB)
    with pytest.raises(ValueError, match=r"size 720x1280, 81 frames: takes about 60\.\d GiB.*largest size") as caught:
        memory.check(*clip((720, 1280)), memory=45 * GIB)
    assert "\n" not in str(caught.value)
    height, width = (int(side) for side in str(caught.value).rpartition(" is ")[2].split("x"))
    memory.check(*clip((height, width)), memory=45 * GIB)
    with pytest.raises(ValueError):
        memory.check(*clip((height + 32, width + 64)), memory=45 * GIB)


def test_weights_that_cannot_fit_are_told_by_themselves():
    with pytest.raises(ValueError, match=r"weights alone are 43\.\d GiB, there are 24\.0"):
        memory.check(*clip(), memory=24 * GIB)


def test_a_mesh_splits_weights_and_tokens():
    one, eight = (memory.estimate(*clip(), mesh) for mesh in ({}, {"tensor": 8}))
    assert one.weights["dit"] // 8 == eight.weights["dit"]
    assert one.temporary["decode"] > 4 * eight.temporary["decode"]
    assert one.temporary["denoise"] > 3 * eight.temporary["denoise"]
    memory.check(*clip(), {"tensor": 8}, memory=24 * GIB)


def test_this_machine_has_some():
    assert memory.available() > GIB


def test_the_estimate_is_of_the_policy():
    config = preset("flf2v_14b")
    wide = memory.estimate(config, Settings.of(config))
    assert wide.weights["dit"] > 1.9 * memory.estimate(*clip()).weights["dit"]
    assert wide.peak > memory.estimate(*clip()).peak


def test_nothing_of_the_runs_size_is_made_before(monkeypatch):
    """A size whose rotary table alone would fill the memory."""
    config = preset("tiny")
    monkeypatch.setattr(memory, "available", lambda: 24 * GIB)
    with pytest.raises(ValueError, match="size 65536x65536"):
        memory.check(config, Settings.of(config, size=(65536, 65536)))
