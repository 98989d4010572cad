"""The transformer's layers one after the other: the same clips, never more than two layers on the device."""

import dataclasses
import gc
import shutil
import weakref

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from nano import NANO, random_params, write_model, write_orbax

from samplers import kept, pipeline, programs, streamed
from samplers.ahead import compile_ahead, shapes
from samplers.pipeline import Batch, Inputs
from samplers.plan import Plan, Settings
from wanjax import checkpoint, sharding, streaming
from wanjax.checkpoint import CheckpointError
from wanjax.types import CrossBias

LAYERS = 5
CONFIG = dataclasses.replace(NANO, dit=dataclasses.replace(NANO.dit, num_layers=LAYERS))
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
RUNS = {
    "plain": {"method": "wan"},
    "paper": {"method": "paper"},
    "batched": {"method": "paper", "guidance_mode": "batched"},
    "interval": {"method": "release", "guidance_mode": "batched", "guidance_interval": (0.3, 0.8)},
    "without guidance": {"method": "paper", "guidance": 1.0},
    "noise anew": {"method": "paper", "solver": "lcm"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "deep", CONFIG)


def clips(model, settings, chunk=1, ahead=False, bias=None):
    """Videos and latents of two batches, the second of two clips; of one clip where compiled ahead."""
    plan = Plan.of(model.config, Settings.of(model.config, prompt="a red circle", **settings))
    batches = [Batch(Inputs.prepare([PICTURES] * n, plan), ["a red circle"] * n, range(n)) for n in (1, 2)]
    if not ahead:
        made = pipeline.make(model, plan, batches, chunk=chunk, cross_bias=bias)
    else:
        with compile_ahead(plan, chunk) as ready:
            made = pipeline.make(model, plan, batches[:1], chunk=chunk, ready=ready)
    return [array for one in made for array in (one.video, np.asarray(one.latents))]


def equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("run", [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("batched", "noise anew") else []) for name in RUNS
])  # fmt: skip
def test_the_same_clips_bit_for_bit(folder, run):
    chunk = 2 if run in ("paper", "noise anew") else 1
    wanted = clips(checkpoint.load(folder), RUNS[run])
    equal(clips(checkpoint.load(folder, policy="stage"), RUNS[run]), wanted)
    model = checkpoint.load(folder, policy="stream")
    assert model.config.dit.stream == "loop"
    equal(clips(model, RUNS[run], chunk), wanted)
    equal(clips(model, RUNS[run], chunk, ahead=True), wanted[:2])


def test_a_bias_of_the_callers(folder):
    shape = (LAYERS, 1, 2)  # layers, clips, token frames
    rng = np.random.default_rng(1)
    bias = CrossBias(rng.normal(size=(*shape, 8)).astype(np.float32),
                     rng.normal(size=(*shape, 2, NANO.dit.image_tokens)).astype(np.float32))  # fmt: skip

    def one(policy):
        model = checkpoint.load(folder, policy=policy)
        return pipeline.inbetween(model, *PICTURES, "a red circle", cross_bias=bias, method="paper").latents

    wanted = one("keep")
    equal([one("stream")], [wanted])
    plain = pipeline.inbetween(checkpoint.load(folder, policy="stream"), *PICTURES, "a red circle", method="paper")
    assert np.abs(plain.latents - wanted).max() > 1e-3


def arguments(plan, rng):
    """Of `Programs.denoise`, after the params."""
    d = plan.config.dit
    told = pipeline.Conditions(
        rng.normal(size=(1, d.text_length, d.text_dim)).astype(np.float32),
        rng.normal(size=(1, 2, d.image_tokens, d.image_dim)).astype(np.float32),
        rng.normal(size=(1, *plan.latent_shape[:-1], d.condition_channels)).astype(np.float32),
    )
    noise = rng.normal(size=(1, *plan.latent_shape)).astype(np.float32)
    carry = pipeline.start(plan, jax.numpy.asarray(noise))
    return carry, plan.table, np.int32(0), told, np.zeros_like(told.text), plan.method, None


def evaluated(config, params, rng, method="paper"):
    """The carry after two rows of the table."""
    plan = Plan.of(config, Settings.of(config, method=method))
    return programs.Programs.of(plan, 2).denoise(params, *arguments(plan, rng))


@pytest.mark.parametrize(("method", "weights"), [
    ("paper", "int8"), pytest.param("paper", "fp8", marks=pytest.mark.slow),
    pytest.param("wan", None, marks=pytest.mark.slow),
])  # fmt: skip
def test_every_form_computes_the_same(folder, method, weights):
    """Also the forms of other machines: kernels held in host memory, and stacks there that the program fetches."""
    rng = lambda: np.random.default_rng(3)  # noqa: E731
    model = checkpoint.load(folder, weights=weights)
    wanted, expected = evaluated(model.config, model.part("dit"), rng(), method), checkpoint.param_shapes(model.config)
    expected = expected["dit"]
    for platform, form in (("cpu", "loop"), ("gpu", "loop"), ("tpu", "program")):
        config = streaming.with_stream(model.config, platform)
        assert config.dit.stream == form
        params = streaming.restore(folder, expected, form, anew=platform == "cpu")
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)}
        assert kinds == ({"device"} if platform == "cpu" else {"device", "pinned_host"})
        equal(jax.tree.leaves(evaluated(config, params, rng(), method)), jax.tree.leaves(wanted))
        if platform != "cpu":
            moved = streaming.moved(model.part("dit"), form)
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), moved, params)
            assert all(jax.tree.leaves(same))


def test_a_program_compiled_for_host_memory_takes_it(folder):
    """As on a TPU: compiled from shapes ahead of the weights, whose kernels then come in host memory."""
    plan = Plan.of(streaming.with_stream(CONFIG, "tpu"), Settings.of(CONFIG, method="paper"))
    denoise = kept.compiled(programs.Programs.of(plan, 2).denoise, shapes(plan)["denoise"], None)
    params = streaming.restore(folder, checkpoint.param_shapes(CONFIG)["dit"], "program")
    found = denoise(params, *arguments(plan, np.random.default_rng(3)))
    wanted = evaluated(CONFIG, checkpoint.load(folder).part("dit"), np.random.default_rng(3))
    equal(jax.tree.leaves(found), jax.tree.leaves(wanted))


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("form", ["loop", "program"])
def test_shapes_are_those_of_what_is_read(folder, form, weights):
    expected = checkpoint.param_shapes(checkpoint.with_weights(CONFIG, weights))["dit"]
    told = streaming.shapes(expected, form)
    found = streaming.restore(folder, expected, form, anew=False)
    if form == "loop":
        assert len(found.layers) == LAYERS
        found = found.replace(layers=found.layers[:1])
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), told, found)
    assert all(jax.tree.leaves(same))
    if form == "program":  # what a program is compiled for says where its arguments lie
        waits = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(told) if leaf.sharding is not None}
        assert waits == {"pinned_host"}


def live():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


@pytest.mark.parametrize("anew", [pytest.param(True, marks=pytest.mark.slow), False])
def test_two_layers_at_most(folder, anew):
    """When a layer is fetched, the one before the last is gone."""
    params = streaming.restore(folder, checkpoint.param_shapes(CONFIG)["dit"], "loop", anew=anew)
    fetched, seen = [], []

    class Watched:
        rest = params.rest

        @staticmethod
        def fetch(layer):
            gc.collect()
            seen.append((layer, sum(one() is not None for one in fetched)))
            kernels = params.fetch(layer)
            fetched.extend(weakref.ref(kernel) for kernel in kernels.values())
            return kernels

    evaluated(streaming.with_stream(CONFIG, "cpu"), Watched, np.random.default_rng(3))
    kernels = len(params.fetch(0))
    rows, passes = 2, 2
    assert [layer for layer, _ in seen] == list(range(LAYERS)) * rows * passes
    # None may be left: the layer before may be done with while the garbage is collected.
    assert max(count for _, count in seen) <= kernels and not any(one() is not None for one in fetched)


def test_what_lies_on_the_device_between_stages(folder):
    before = live()
    model = checkpoint.load(folder, policy="stream")
    assert live() == before
    rest = model.part("dit").rest
    kernels = sum(leaf.size * 4 for path, leaf in _kernels())
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(checkpoint.param_shapes(CONFIG)["dit"]))
    assert live() - before == total - kernels == sum(leaf.nbytes for leaf in jax.tree.leaves(rest))
    model.part("vae")
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(rest))
    model.free("vae")
    assert live() == before


def _kernels():
    flat = jax.tree_util.tree_leaves_with_path(checkpoint.param_shapes(CONFIG)["dit"]["blocks"])
    return [(path, leaf) for path, leaf in flat if path[-1].key == "kernel"]


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_damage(tmp_path, form):
    """A flipped bit in a layer is found when the part is read, and named; what was lost since, when it is used."""
    folder = (write_orbax if form == "orbax" else write_model)(tmp_path / "nano")
    clean = checkpoint.load(folder, policy="stream").part("dit")
    for layer in range(NANO.dit.num_layers):
        held = clean.fetch(layer)
        wanted = random_params(NANO)["dit"]["blocks"]["self_attn"]["q"]["kernel"][layer]
        np.testing.assert_array_equal(held["blocks/self_attn/q/kernel"], wanted)
    if form == "orbax":
        chunks = sorted(file for file in (folder / "dit" / "blocks.ffn_in.kernel" / "c").rglob("*") if file.is_file())
        assert len(chunks) == NANO.dit.num_layers
        file, place = chunks[1], 100
    else:
        file = folder / "dit.safetensors"
        wanted = random_params(NANO)["dit"]["blocks"]["ffn_in"]["kernel"].tobytes()
        place = file.read_bytes().index(wanted[:64]) + len(wanted) - 3
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="dit/blocks/ffn_in/kernel: (damaged|not the array of the manifest)"):
        checkpoint.load(folder, policy="stream").part("dit")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="missing or damaged|get it again|convert the weights again"):
        clean.fetch(1)


def test_a_read_that_fails_ends_the_run(folder):
    params = streaming.restore(folder, checkpoint.param_shapes(CONFIG)["dit"], "loop")

    def read(layer):
        if layer == 3:
            raise CheckpointError("layer 3 is lost; get it again")
        return params.read(layer)

    with pytest.raises(CheckpointError, match="layer 3 is lost"):
        evaluated(streaming.with_stream(CONFIG, "cpu"), params.replace(read=read), np.random.default_rng(3))


def test_a_mesh_is_refused(folder):
    mesh = sharding.make_mesh({"sequence": 2}, jax.devices()[:2])
    with pytest.raises(ValueError, match="policy 'stream': is for one device"):
        checkpoint.load(folder, policy="stream", mesh=mesh)
    model = checkpoint.load(folder, policy="stream")
    for use in (lambda: model.part("dit", mesh), lambda: model.place(mesh)):
        with pytest.raises(ValueError, match="policy 'stream': is for one device"):
            use()


@pytest.fixture
def without_cache():
    """Without JAX's own cache, and without what was found in it: out of neither anything is kept."""
    place = jax.config.jax_compilation_cache_dir
    jax.clear_caches()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", place)
    compilation_cache.reset_cache()


def test_programs_are_kept(folder, tmp_path, monkeypatch, without_cache):
    """A second run finds all programs of the loop."""
    (tmp_path / "kept").mkdir(mode=0o700)
    eps = 1.1e-6  # in no other test, which might have had its programs from JAX's cache
    config = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, eps=eps))
    plan = Plan.of(streaming.with_stream(config, "cpu"), Settings.of(config, steps=4))
    loop, arguments = programs.Programs.of(plan).denoise, shapes(plan)["denoise"]
    assert sorted(arguments) == ["add", "advance", "embed", "head", "layer"]
    for name, own in arguments.items():
        kept.compiled(getattr(loop, name), own, tmp_path / "kept")
    monkeypatch.setattr(kept, "_lower", lambda *_: pytest.fail("compiled again"))
    found = {name: kept.compiled(getattr(loop, name), own, tmp_path / "kept") for name, own in arguments.items()}
    assert isinstance(loop, streamed.Loop)
    params = checkpoint.load(folder, policy="stream").part("dit")
    monkeypatch.setattr(programs.Programs, "of", lambda *_: dataclasses.replace(
        plain, denoise=dataclasses.replace(loop, chunk=2, **found)))  # fmt: skip
    plain = programs.Programs(*[None] * 6)
    rng = np.random.default_rng(3)
    with_kept = evaluated(plan.config, params, rng, "wan")
    monkeypatch.undo()
    equal([with_kept.sample], [evaluated(plan.config, params, np.random.default_rng(3), "wan").sample])
