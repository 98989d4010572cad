"""ReTRo: the scale vector by hand and against the oracle, and what each mode does to the rotary table."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from reference import relative_error

from wanjax import retro, rope
from wanjax.retro import ReTRo
from wanjax.rope import MODES

# 1.06 at edge frames and 0.94 between, then means of five with the ends repeated: 0.94 + 0.12 * (edges among five) / 5.
ONE_EDGE_FRAME = [1.012, 0.988, 0.964]
TWO_EDGE_FRAMES = [1.036, 1.012, 0.988, 0.964]


def latent(frames):
    return (frames - 1) // 4 + 1


def scale(frames, **changes):
    return retro.scale_vector(ReTRo(**changes), frames, latent(frames))


@pytest.mark.parametrize(
    "frames, width, edge", [(25, 2, ONE_EDGE_FRAME), (33, 3, ONE_EDGE_FRAME), (65, 6, TWO_EDGE_FRAMES),
                            (81, 8, TWO_EDGE_FRAMES)]
)  # fmt: skip
def test_published_lengths(frames, width, edge):
    assert retro.edge_width(ReTRo(), frames) == width
    wanted = edge + [0.94] * (latent(frames) - 2 * len(edge)) + edge[::-1]
    np.testing.assert_allclose(scale(frames), wanted, rtol=1e-12)
    np.testing.assert_allclose(scale(frames), oracle.scale_vector(frames, latent(frames), width), rtol=1e-12)


@pytest.mark.parametrize("frames", range(5, 202, 4))
def test_other_lengths(frames):
    """Widths are in proportion, at least one; and s is symmetric for every whole width."""
    width = retro.edge_width(ReTRo(), frames)
    assert width >= 1 and (abs(width - frames * 8 / 81) <= 0.5 or width == 1)
    np.testing.assert_allclose(scale(frames), oracle.scale_vector(frames, latent(frames), width), rtol=1e-12)
    for w in (None, 1, 2, frames // 4, frames // 2):
        s = scale(frames, w_edge=w)
        np.testing.assert_allclose(s, s[::-1], rtol=1e-12)


@pytest.mark.parametrize("smooth", [0, 1, 3, 10])
@pytest.mark.parametrize("width", [1, 5.5, 12.5])
def test_settings_against_float64(smooth, width):
    ours = scale(25, s_edge=1.3, s_mid=0.8, w_edge=width, smooth=smooth)
    wanted = oracle.scale_vector(25, 7, width, 1.3, 0.8, smooth)
    np.testing.assert_allclose(ours, wanted, rtol=1e-12)


def test_no_smoothing_reaches_s_edge():
    np.testing.assert_allclose(scale(81, smooth=0), [1.06] * 2 + [0.94] * 17 + [1.06] * 2, rtol=1e-12)


def test_the_width_is_rounded_to_six_decimals():
    """0.0999998 becomes 0.1, which frame 9 of 0 .. 10 just reaches from its side and frame 1 does not from its own."""
    s = retro.scale_vector(ReTRo(w_edge=25 * 0.0999998, smooth=0), 25, 11)
    assert np.array_equal(np.flatnonzero(s > 1), [0, 9, 10])


@pytest.mark.parametrize("value", [1.0, 1.06, 0.94, 1 / 3, 7.7])
def test_equal_factors_are_kept_to_the_last_bit(value):
    for frames in (5, 25, 81):
        for smooth in (0, 1, 2, 5):
            assert (scale(frames, s_edge=value, s_mid=value, smooth=smooth) == value).all()


@pytest.mark.parametrize("frames", [25, 81])
@pytest.mark.parametrize("at", [(0,), (3,), (0, 3, 6), (2, 4), (1, 5, 6)], ids=str)
def test_edges_at_every_keyframe(frames, at):
    found = retro.scale_vector(ReTRo(), frames, latent(frames), at)
    np.testing.assert_allclose(
        found, oracle.scale_vector(frames, latent(frames), edge_of(frames), anchors=at), rtol=1e-12
    )
    bare = retro.scale_vector(ReTRo(smooth=0), frames, latent(frames), at)
    assert (bare[list(at)] == 1.06).all() and (bare == 0.94).any()


def edge_of(frames):
    return retro.edge_width(ReTRo(), frames)


def test_keyframes_at_the_ends_are_the_published_rule():
    for frames in range(5, 202, 4):
        assert np.array_equal(
            retro.scale_vector(ReTRo(), frames, latent(frames), (0, latent(frames) - 1)), scale(frames)
        )
    assert (retro.scale_vector(ReTRo(), 81, 21, ()) == 0.94).all()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "changes, message",
    [({name: value}, f"{name} {value}") for name in ("s_edge", "s_mid") for value in (0.0, -1.0, NAN, INF)]
    + [({"w_edge": w}, f"w_edge {w}: must be from 1 to 12.5 pixel frames") for w in (0, 0.9, 12.6, -3, NAN, INF)]
    + [({"smooth": n}, f"retro smooth {n}") for n in (-1, 1.5, True, NAN, INF)]
    + [({"mode": "angle"}, "retro mode 'angle': choose frequency, magnitude, position")],
    ids=str,
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        scale(25, **changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_one_frame_has_no_two_ends():
    with pytest.raises(ValueError, match="frames 1: ReTRo needs at least two latent frames"):
        scale(1)


def random_scale(frames):
    return np.random.default_rng(frames).uniform(0.3, 2.0, frames)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid, head_dim", [((7, 3, 2), 48), ((21, 1, 2), 128), ((2, 2, 1), 16)])
def test_table_against_float64(mode, grid, head_dim):
    s = random_scale(grid[0])
    table = rope.table(grid, head_dim, s, mode)
    exact = oracle.rope_factors(grid, head_dim, s, mode)
    assert table.cos.dtype == table.sin.dtype == np.float32
    assert relative_error(table.cos, exact.real) <= 1e-6
    assert relative_error(table.sin, exact.imag) <= 1e-6
    plain, temporal = rope.table(grid, head_dim), rope.axis_pairs(head_dim)[0]
    for ours, without in ((table.cos, plain.cos), (table.sin, plain.sin)):
        assert np.array_equal(ours[:, temporal:], without[:, temporal:])
        if grid[0] > 2 or mode != "position":  # two frames are both ends
            assert relative_error(ours[:, :temporal], without[:, :temporal]) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_ones_change_nothing_bit_for_bit(mode):
    for grid in ((1, 2, 2), (7, 3, 2), (21, 1, 1)):
        plain, ours = rope.table(grid, 48), rope.table(grid, 48, np.ones(grid[0]), mode)
        assert np.array_equal(plain.cos, ours.cos) and np.array_equal(plain.sin, ours.sin)


def test_magnitude_scales_temporal_logits():
    frames, s = 9, random_scale(9)
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, frames, 1, 48), np.float32) for _ in range(2))
    temporal = np.arange(48) < 2 * rope.axis_pairs(48)[0]

    def logits(part, table):
        a, b = (np.float64(rope.apply(jnp.asarray(x * part), table))[0, :, 0] for x in (q, k))
        return a @ b.T

    plain, ours = rope.table((frames, 1, 1), 48), rope.table((frames, 1, 1), 48, s, "magnitude")
    assert relative_error(logits(temporal, ours), np.outer(s, s) * logits(temporal, plain)) <= 1e-6
    assert np.array_equal(logits(~temporal, ours), logits(~temporal, plain))


def positions(table):
    """Where frames stand, from their slowest temporal pair, which never comes near half a turn."""
    pairs = rope.axis_pairs(48)[0]
    slowest = 10000.0 ** -((pairs - 1) / pairs)
    return np.arctan2(np.float64(table.sin[:, pairs - 1]), np.float64(table.cos[:, pairs - 1])) / slowest


def test_position_keeps_the_ends_and_the_order():
    for s in (random_scale(21), scale(81), scale(81, s_edge=100.0, s_mid=0.01)):
        moved = positions(rope.table((21, 1, 1), 48, s, "position"))
        assert moved[0] == 0 and abs(moved[-1] - 20) <= 1e-5
        assert (np.diff(moved) > 0).all()
        assert np.abs(moved - np.arange(21)).max() > 0.05
    # Slow where s is small: between the keyframes, frames stand closer together than at them.
    moved = np.diff(positions(rope.table((21, 1, 1), 48, scale(81), "position")))
    assert moved[0] > 1 > moved[10]


def test_position_knows_no_common_factor():
    s = random_scale(9)
    once, twice = (rope.table((9, 1, 1), 48, factor * s, "position") for factor in (1, 2.5))
    assert relative_error(twice.cos, once.cos) <= 1e-7 and relative_error(twice.sin, once.sin) <= 1e-7


def test_frequency_multiplies_angles():
    s = scale(81)
    np.testing.assert_allclose(positions(rope.table((21, 1, 1), 48, s)), s * np.arange(21), rtol=1e-5)
    plain = rope.table((21, 1, 1), 48, mode="frequency")
    np.testing.assert_allclose(positions(plain), np.arange(21), rtol=1e-5)


def test_unknown_mode():
    with pytest.raises(ValueError, match="^temporal rope mode 'angle': choose frequency, magnitude, position$"):
        rope.table((5, 1, 1), 48, np.ones(5), "angle")
