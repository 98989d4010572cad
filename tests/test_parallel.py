"""The transformer on eight devices computes what one does, whatever the mesh, the padding, and where frames are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative_error

from wanjax import rope, sharding
from wanjax.attention import parallel, splash
from wanjax.config import DiTConfig
from wanjax.dit import WanDiT
from wanjax.layout import TokenLayout
from wanjax.types import Conditions, CrossControl

CONFIG = DiTConfig(
    num_layers=2, dim=96, num_heads=12, ffn_dim=64, text_dim=16, text_length=7, freq_dim=16, image_dim=16,
    image_tokens=5,
)  # fmt: skip
FRAMES, HEIGHT, WIDTH = 5, 6, 10
"""15 tokens a frame, 75 in all: neither is a multiple of the devices, so frames straddle and padding is needed."""

LAYOUTS = [
    TokenLayout.of(5, 15), TokenLayout.of(5, 15, 4), TokenLayout.of(5, 15, 8, 16), TokenLayout.of(21, 1620, 8, 128),
    TokenLayout.of(2, 3, 8), TokenLayout.of(4, 16, 8), TokenLayout.of(3, 5, 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout(layout):
    """Every token is somewhere once, in the part and frame that it should be, and comes back."""
    tokens = np.arange(1, layout.frames * layout.queries + 1)
    laid = layout.lay(tokens[None])[0]
    assert sorted(laid[laid > 0]) == list(tokens) and len(laid) == layout.parts * layout.local
    valid = layout.valid()
    np.testing.assert_array_equal(laid > 0, np.ones(len(laid), bool) if valid is None else valid)
    np.testing.assert_array_equal(layout.restore(jnp.asarray(laid[None]))[0], tokens)
    for part, own in enumerate(laid.reshape(layout.parts, layout.local)):
        frames = np.asarray(layout.split(jnp.asarray(own[None])))[:, 0]
        counted = layout.counted(part)
        counted = np.ones(layout.share) if counted is None else np.asarray(counted)
        for frame, queries in enumerate(frames):
            assert ((queries > 0) == (counted > 0)).all()
            assert ((queries[queries > 0] - 1) // layout.queries == frame).all()
        np.testing.assert_array_equal(layout.join(layout.split(jnp.asarray(own[None])))[0], own)


def test_full_size_is_padded_by_little():
    """480x864 and 720x1280, 81 frames, on eight TPUs: whole blocks of 1024 once heads and tokens are swapped."""
    for queries, wanted in ((1620, 34816), (3600, 75776)):
        layout = TokenLayout.of(21, queries, 8, splash.BLOCK // 8)
        assert layout.parts * layout.local == wanted


@functools.cache
def case():
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    batch = 2
    latents = normal(batch, FRAMES, HEIGHT, WIDTH, 16)
    conditions = Conditions(normal(batch, 7, 16), normal(batch, 2, 5, 16), normal(batch, FRAMES, HEIGHT, WIDTH, 20))
    table = rope.table((FRAMES, HEIGHT // 2, WIDTH // 2), CONFIG.head_dim)
    curve = np.linspace([1, 0], [0, 1], FRAMES).astype(np.float32)
    strength = np.tile(np.array([0, 40, 30, 40, 0], np.float32), (2, batch, 1))
    strength[0, 0] = 0  # a layer in which one clip alone is anchored
    control = CrossControl(
        anchors=jnp.array([0, FRAMES - 1]), curve=jnp.asarray(curve),
        floor=jnp.float32(5e-4), isolated=jnp.asarray(True), weights=jnp.array([1, 0.7, 1.2], jnp.float32),
    )  # fmt: skip
    shapes = jax.eval_shape(
        lambda: WanDiT(CONFIG).init(
            jax.random.key(0), latents, jnp.ones(batch), conditions, table, None, control, strength
        )
    )["params"]
    params = jax.tree.map_with_path(
        # Norms near one, so that attention looks somewhere and KAB has something to change.
        lambda path, leaf: normal(*leaf.shape, scale=0.2) + (2 if path[-1].key == "scale" else 0), shapes
    )  # fmt: skip
    return params, latents, conditions, table, control, jnp.asarray(strength)


def run(config, params, latents, conditions, table, control, strength):
    """Velocities with KAB, without it, and with its change alone."""
    call = jax.jit(lambda *x: WanDiT(config).apply(
        {"params": x[0]}, x[1], jnp.array([300.0, 700.0]), x[2], table, None, control, x[3]
    ))  # fmt: skip
    found = [np.float64(call(params, latents, conditions, strength * on))
             for on in (1, 0)]  # fmt: skip
    return found[0], found[0] - found[1]


@functools.cache
def one_device():
    return run(CONFIG, *case())


MESHES = [
    {"fsdp": 2, "sequence": 4}, {"data": 2, "sequence": 2, "tensor": 2},
    *(pytest.param(sizes, marks=pytest.mark.slow)
      for sizes in ({"sequence": 2}, {"sequence": 3}, {"sequence": 4}, {"sequence": 6}, {"fsdp": 8},
                    {"fsdp": 2, "tensor": 4})),
]  # fmt: skip


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_computes_the_same(sizes):
    params, latents, conditions, *rest = case()
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        inputs = sharding.shard_batch((latents, conditions), mesh)
        out, change = run(CONFIG, sharding.shard_params(params, mesh), *inputs, *rest)
    wanted, wanted_change = one_device()
    assert relative_error(wanted - wanted_change, wanted) > 1e-3, "KAB does nothing here"
    assert relative_error(out, wanted) <= 1e-5
    assert relative_error(change, wanted_change) <= 1e-4


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "sequence": 2}], ids=str)
def test_padding_to_blocks_changes_nothing(monkeypatch, sizes):
    """In float32 the kernel "splash" leaves the work to "xla", but its blocks still ask for padding."""
    monkeypatch.setattr(splash, "BLOCK", 16)
    config = CONFIG.__class__(**{**CONFIG.__dict__, "attention": "splash"})
    params, latents, conditions, *rest = case()
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod([1, *sizes.values()], dtype=int)])
    with jax.set_mesh(mesh):
        assert parallel.layout(FRAMES, 15, "splash").padded
        inputs = sharding.shard_batch((latents, conditions), mesh)
        out, change = run(config, sharding.shard_params(params, mesh), *inputs, *rest)
    wanted, wanted_change = one_device()
    assert relative_error(out, wanted) <= 1e-5 and relative_error(change, wanted_change) <= 1e-4


def test_heads_that_the_mesh_does_not_divide():
    mesh = sharding.make_mesh({"sequence": 8})
    q = jnp.ones((1, 8, 12, 8))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="sequence=8: does not divide the 12 heads.*sequence=4"):
        parallel.self_attention(q, q, q, None, CONFIG.precision, "xla")


def test_what_travels():
    """A layer swaps tokens for heads four times, and gathers weights; nothing of all tokens is ever gathered."""
    params, latents, conditions, table, *_ = case()
    mesh = sharding.make_mesh({"fsdp": 2, "sequence": 4})
    with jax.set_mesh(mesh):
        call = jax.jit(lambda p, x, c: WanDiT(CONFIG).apply({"params": p}, x, jnp.ones(2), c, table))
        lowered = call.lower(sharding.shard_params(params, mesh), *sharding.shard_batch((latents, conditions), mesh))
    lines = lowered.compile().as_text().splitlines()
    assert len([line for line in lines if " all-to-all(" in line and "/all_to_all" in line]) == 4
    tokens = TokenLayout.of(FRAMES, 15, 8).local * 8
    gathered = [line.split(" all-gather(")[0] for line in lines if " all-gather(" in line]
    assert gathered and not [line for line in gathered if f"[2,{tokens},{CONFIG.dim}]" in line]
    assert [line for line in gathered if f"[1,{CONFIG.dim},{CONFIG.ffn_dim}]" in line], (
        "weights are not gathered in the block"
    )
