"""A method as one value: the profiles, and the arrays that the sampler gets from them."""

import dataclasses

import numpy as np
import oracle
import pytest
from reference import relative_error

from wanjax import method, rope
from wanjax.config import preset
from wanjax.kab import KAB
from wanjax.method import METHODS, Isolation, Method
from wanjax.retro import ReTRo

TINY = preset("tiny")


def test_profiles():
    assert set(METHODS) == {"wan", "paper", "release"}
    assert METHODS["wan"] == Method(None, None, None)
    assert METHODS["paper"].retro.mode == "frequency"
    assert METHODS["release"].retro.mode == "magnitude"
    assert dataclasses.replace(METHODS["paper"], retro=None) == dataclasses.replace(METHODS["release"], retro=None)
    for name in ("paper", "release"):
        chosen = METHODS[name]
        assert chosen.isolation.weights == (1, 1, 1)
        kab, retro = chosen.kab, chosen.retro
        assert (kab.strength_end, kab.strength_mid, kab.floor) == (0.7, 0.3, 5e-4)
        assert (kab.steps, kab.curve) == ((0.0, 0.4), "linear")
        assert (retro.s_edge, retro.s_mid, retro.w_edge, retro.smooth) == (1.06, 0.94, None, 2)
    with pytest.raises(TypeError):
        METHODS["wan"] = Method()


def test_named():
    assert method.named("release") is METHODS["release"]
    with pytest.raises(ValueError, match="^unknown method 'kab': choose one of wan, paper, release$"):
        method.named("kab")


@pytest.mark.parametrize(
    "weights", [(-1, 1, 1), (1, float("nan"), 1), (1, 1, float("inf")), (1, 1), (1, 1, 1, 1), ()], ids=str
)
def test_bad_branch_weights(weights):
    with pytest.raises(ValueError, match="^branch weights .*give three numbers") as error:
        Isolation(weights)
    assert "\n" not in str(error.value)


SHAPES = [("tiny", 25, (32, 48), 10, (7, 4, 6), 24), ("flf2v_14b", 81, (480, 864), 50, (21, 30, 54), 64)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model, frames, size, steps, grid, pairs", SHAPES, ids=[x[0] for x in SHAPES])
def test_shapes(name, model, frames, size, steps, grid, pairs):
    config = preset(model)
    made = method.arrays(METHODS[name], config, frames, size, steps)
    wanted = {
        "cos": (made.table.cos, (np.prod(grid), pairs), np.float32),
        "sin": (made.table.sin, (np.prod(grid), pairs), np.float32),
        "strength": (made.strength, (steps, config.dit.num_layers, grid[0]), np.float32),
        "anchors": (made.control.anchors, (2,), np.int32),
        "curve": (made.control.curve, (grid[0], 2), np.float32),
        "floor": (made.control.floor, (), np.float32),
        "isolated": (made.control.isolated, (), np.bool_),
        "weights": (made.control.weights, (3,), np.float32),
    }
    for part, (array, shape, dtype) in wanted.items():
        assert (array.shape, array.dtype) == (shape, dtype), part


def arrays(chosen):
    return method.arrays(chosen, TINY, 25, (32, 48), 10)


def same_table(made, *args):
    table = rope.table((7, 4, 6), 48, *args)
    return np.array_equal(made.table.cos, table.cos) and np.array_equal(made.table.sin, table.sin)


def test_nothing_changed_is_nothing_changed():
    made = arrays(Method())
    assert same_table(made)
    assert not made.strength.any() and not made.control.isolated


@pytest.mark.parametrize("name", ["paper", "release"])
def test_profiles_against_float64(name):
    made = arrays(METHODS[name])
    np.testing.assert_allclose(made.strength, oracle.strength(10, 6, 7, (1, 1)), rtol=1e-6)
    mode = {"paper": "frequency", "release": "magnitude"}[name]
    exact = oracle.rope_factors((7, 4, 6), 48, oracle.scale_vector(25, 7, 2), mode)
    assert relative_error(made.table.cos, exact.real) <= 1e-6
    assert relative_error(made.table.sin, exact.imag) <= 1e-6
    assert made.control.isolated and np.array_equal(made.control.weights, np.ones(3))
    assert made.control.floor == np.float32(5e-4)
    np.testing.assert_allclose(made.control.curve[:, 1], np.arange(7) / 6, rtol=1e-6)
    assert np.array_equal(made.control.anchors, [0, 6])


def test_parts_are_switched_one_by_one():
    isolation = arrays(Method(isolation=Isolation((1.0, 0.5, 2.0))))
    assert isolation.control.isolated and same_table(isolation) and not isolation.strength.any()
    assert np.array_equal(isolation.control.weights, np.float32([1, 0.5, 2]))
    anchored = arrays(Method(kab=KAB(floor=1e-3, curve="ease-in", layers=(2, 5))))
    assert not anchored.control.isolated and same_table(anchored)
    np.testing.assert_allclose(anchored.strength, oracle.strength(10, 6, 7, (2, 5)), rtol=1e-6)
    assert anchored.control.floor == np.float32(1e-3)
    np.testing.assert_allclose(anchored.control.curve[:, 1], (np.arange(7) / 6) ** 2, rtol=1e-6)
    rescaled = arrays(Method(retro=ReTRo("position")))
    assert not rescaled.control.isolated and not rescaled.strength.any() and not same_table(rescaled)
    exact = oracle.rope_factors((7, 4, 6), 48, oracle.scale_vector(25, 7, 2), "position")
    assert relative_error(rescaled.table.sin, exact.imag) <= 1e-6


@pytest.mark.parametrize(
    "chosen, message",
    [
        (Method(kab=KAB(layers=(5, 12))), "kab layers 5-12: the model has layers 0 to 5"),
        (Method(kab=KAB(curve=(0.0, 1.0))), "anchor curve of 2 numbers: give one for each of the 7"),
        (Method(retro=ReTRo(w_edge=13)), "w_edge 13: must be from 1 to 12.5"),
    ],
    ids=["layers", "curve", "width"],
)
def test_settings_that_the_model_cannot_have(chosen, message):
    with pytest.raises(ValueError) as error:
        arrays(chosen)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


PLACES = [
    ((0,), (0,)), ((-1,), (6,)), ((0, 12, -1), (0, 3, 6)), ((5, 9), (2, 3)), ((24, 0), (0, 6)),
    ((1, 2, 3, 4), (1,)), ((5, 8, 9), (2, 3)), ((), ()),
]  # fmt: skip


@pytest.mark.parametrize("at, tokens", PLACES, ids=str)
def test_places_of_keyframes(at, tokens):
    """Pixel frames, also from the end, become token frames, each once; everything of a method is made from them."""
    assert method.token_frames(TINY, 25, at) == tokens
    chosen = Method(Isolation(), KAB() if at else None, ReTRo())
    made = method.arrays(chosen, TINY, 25, (32, 48), 10, at)
    assert np.array_equal(made.control.anchors, tokens) and made.control.anchors.dtype == np.int32
    np.testing.assert_allclose(made.control.curve, oracle.anchor_curve(7, tokens), atol=1e-7)
    wanted = oracle.strength(10, 6, 7, (1, 1), anchors=tokens) if at else np.zeros((10, 6, 7))
    np.testing.assert_allclose(made.strength, wanted, rtol=1e-6)
    exact = oracle.rope_factors((7, 4, 6), 48, oracle.scale_vector(25, 7, 2, anchors=tokens), "frequency")
    assert relative_error(made.table.cos, exact.real) <= 1e-6
    described = method.describe(chosen, TINY, 25, at)["retro_scale"]
    np.testing.assert_allclose(described, oracle.scale_vector(25, 7, 2, anchors=tokens), atol=1e-6)


@pytest.mark.parametrize("place", [25, -26, 1000])
def test_a_place_outside_the_clip(place):
    with pytest.raises(ValueError, match=f"^keyframe at {place}: give a whole number from -25 to 24$"):
        method.arrays(Method(), TINY, 25, (32, 48), 10, (0, place))


def test_patches_of_several_frames():
    config = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, patch_size=(2, 2, 2)))
    assert method.token_frames(config, 29, (0, 4, 5, 13, -1)) == (0, 1, 2, 3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("images", [0, 1, 2, 3, 5])
def test_weights_of_any_number_of_images(name, images):
    own = Isolation((1.0, 0.5, 2.0))
    assert np.array_equal(own.of(images), np.float32([1, 0.5, *[1.25] * max(0, images - 2), 2][: 1 + images]))
    made = method.arrays(METHODS[name], TINY, 25, (32, 48), 10, images=images)
    assert np.array_equal(made.control.weights, np.ones(1 + images)) and made.control.weights.dtype == np.float32


@pytest.mark.parametrize("model, images", [("t2v_1_3b", 0), ("i2v_14b", 1), ("fun_inp_1_3b", 1), ("tiny", 2)])
def test_weights_of_published_models(model, images):
    """A model that sees one image may still have two keyframes to anchor to."""
    made = method.arrays(METHODS["paper"], preset(model), 25, (32, 48), 10)
    assert made.control.weights.shape == (1 + images,) and made.control.anchors.shape == (2,)
