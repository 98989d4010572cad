"""Metrics of a video against definitions in torch (float64) and known closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.tgi import metrics


def video(seed, shape=(5, 20, 24, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def torch_ssim(one, other):
    """Wang et al. 2004 with a Gaussian window 11 x 11 of sigma 1.5, valid, float64; [H, W, 3] -> float."""
    x, y = (torch.tensor(image, dtype=torch.float64).permute(2, 0, 1)[:, None] for image in (one, other))
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def blur(image):
        return F.conv2d(image, window[None, None])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top, bottom = (2 * mean_x * mean_y + c1) * (2 * cov + c2), (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((top / bottom).mean())


def pixel_off():
    other = video(0)
    other[:, 7, 9, 1] ^= 64
    return other


PAIRS = {
    "random": (video(0), video(1)),
    "identical": (video(0), video(0)),
    "constants": (np.full((5, 20, 24, 3), 30, np.uint8), np.full((5, 20, 24, 3), 200, np.uint8)),
    "black and white": (np.zeros((5, 20, 24, 3), np.uint8), np.full((5, 20, 24, 3), 255, np.uint8)),
    "one pixel off": (video(0), pixel_off()),
    "smallest": (video(2, (3, 11, 11, 3)), video(3, (3, 11, 11, 3))),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_ssim_is_torchs(pair):
    expected = [torch_ssim(one, other) for one, other in zip(*pair, strict=True)]
    np.testing.assert_allclose(metrics.ssim(*pair), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_psnr_is_its_formula_up_to_the_cap(pair):
    error = (torch.tensor(pair[0], dtype=torch.float64) - torch.tensor(pair[1], dtype=torch.float64)).square()
    expected = (10 * torch.log10(255.0**2 / error.mean((1, 2, 3)))).clamp(max=metrics.PSNR_CAP)
    np.testing.assert_allclose(metrics.psnr(*pair), expected, rtol=1e-12)


def test_psnr_is_a_mean_of_decibels_over_interior_frames():
    truth, made = np.full((4, 12, 12, 3), 100, np.uint8), np.full((4, 12, 12, 3), 100, np.uint8)
    made[1] += 10
    made[2] += 20
    figures = metrics.measure(made, truth)["metrics"]
    one, two = 20 * np.log10(25.5), 20 * np.log10(12.75)
    assert figures["psnr_interior"] == pytest.approx((one + two) / 2, abs=1e-6)
    assert figures["psnr_all"] == pytest.approx((one + two + 120) / 4, abs=1e-6)
    assert figures["psnr_ends"] == metrics.PSNR_CAP


@pytest.mark.parametrize("end", [0, -1])
def test_keyframes_do_not_count_in_interior_figures(end):
    truth, made = video(0), video(1)
    other = made.copy()
    other[end] = 255 - other[end]
    before, after = (metrics.measure(one, truth)["metrics"] for one in (made, other))
    for name in ("psnr_interior", "ssim_interior"):
        assert before[name] == after[name]
    for name in ("psnr_all", "ssim_all", "psnr_ends"):
        assert before[name] != after[name]


def ramp(levels):
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 12, 12, 3))


def test_pace_of_known_motions():
    even, still = ramp([10, 20, 30, 40, 50]), ramp([7] * 5)
    early, late = ramp([0, 80, 80, 80, 80]), ramp([0, 0, 0, 0, 80])
    np.testing.assert_allclose(metrics.motion(even), 10)
    for one in (even, still):
        np.testing.assert_allclose(metrics.pace(one), 0.25)
        assert metrics.pace_variance(one) == 0
    assert metrics.pace_variance(early) == metrics.pace_variance(late) == pytest.approx(3)  # T - 2
    assert metrics.pace_distance(early, late) == pytest.approx(3 / 4)  # all motion, three of four steps away
    assert metrics.pace_distance(even, even) == 0
    assert metrics.pace_distance(early, even) == metrics.pace_distance(even, early) > 0


def test_flicker_of_known_videos():
    assert metrics.flicker(ramp([10, 20, 30, 40])) == 0
    assert metrics.flicker(ramp([10, 20, 10, 20])) == 20
    assert metrics.flicker(ramp([10, 20])) == 0


@pytest.mark.parametrize(
    "made, truth, message",
    [
        (video(0), video(0)[:4], "one shape"),
        (video(0).astype(float), video(0), "one shape"),
        (video(0)[:2], video(0)[:2], "3 frames"),
        (video(0)[:, :10], video(0)[:, :10], "11 x 11"),
    ],
)
def test_what_cannot_be_measured_is_refused(made, truth, message):
    with pytest.raises(ValueError, match=message):
        metrics.measure(made, truth)


def test_every_figure_has_a_policy_and_a_direction():
    figures = metrics.measure(video(0), video(1))["metrics"]
    policy = metrics.policy()
    assert set(figures) == set(policy) <= set(metrics.HIGHER_IS_BETTER)
    for told in policy.values():
        assert {"implementation", "resize", "frames"} <= set(told)
