"""LoRA as a pytree: applied equals merged equals converted; adapters alone learn; files of it are diffusers' files."""

import dataclasses
import functools
import json
from pathlib import Path

import eight
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign import CONFIG, DIT, plain_params
from nano import NANO, random_params
from reference import relative_error
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import convert
from benchmarks import random_model
from convert import dit, keymap, loratree
from convert.tensors import SourceError
from wanjax import flow, lora, rope, sharding
from wanjax.dit import WanDiT

GRID = (2, 4, 4)
ALL = r"^(blocks/|patch_embed|text_in|time_modulation|head|image_embed/out)"


@functools.cache
def params():
    """Of the small model's transformer; not to be changed."""
    return random_params(NANO)["dit"]


@functools.cache
def inputs(batch=2):
    latents, conditions, _ = random_model.inputs(NANO.dit, GRID, batch, 0)
    return latents, np.float32([700, 20])[:batch], conditions, rope.table((2, 2, 2), NANO.dit.head_dim)


def trained(of=None, seed=0, **options):
    """Adapters that change something."""
    own = lora.init(jax.random.key(seed), params() if of is None else of, **{"rank": 3, "alpha": 6.0} | options)
    rng = np.random.default_rng(seed)
    flat = flatten_dict(own.weights, sep="/")
    flat = {path: 0.2 * rng.normal(size=leaf.shape).astype(np.float32) if path.endswith(lora.UP) else np.asarray(leaf)
            for path, leaf in flat.items()}  # fmt: skip
    return own.replace(weights=unflatten_dict(flat, sep="/"))


def kernel(tree, path):
    return np.asarray(flatten_dict(tree, sep="/")[f"{path}/kernel"])


@functools.cache
def program(config=NANO.dit):
    return jax.jit(functools.partial(lora.apply, WanDiT(config)))


@functools.cache
def plain_program():
    return jax.jit(lambda p, *rest: WanDiT(NANO.dit).apply({"params": p}, *rest))


def plain(tree):
    return plain_program()(tree, *inputs())


def test_new_adapters_change_nothing():
    own = lora.init(jax.random.key(0), params(), rank=4)
    np.testing.assert_array_equal(program()(params(), own, *inputs()), plain(params()))
    assert own.scale == 1 and own.rank == 4
    assert own.paths == tuple(sorted([*(f"blocks/{a}_attn/{x}" for a in ("self", "cross") for x in "qkvo"),
                                      "blocks/ffn_in", "blocks/ffn_out"]))  # fmt: skip
    downs = [leaf for path, leaf in flatten_dict(own.weights, sep="/").items() if path.endswith(lora.DOWN)]
    for down in downs:
        bound = down.shape[-2] ** -0.5
        assert 0.9 * bound < abs(down).max() <= bound and abs(float(down.std()) - bound / 3**0.5) < 0.15 * bound
    assert len({float(down.flatten()[0]) for down in downs}) == len(downs), "each linear has its own numbers"


def test_applied_is_merged_for_every_linear():
    """In layers of the scan and outside it, against kernels merged by hand in float64."""
    own = trained(targets=ALL)
    merged = lora.merge(params(), own)
    flat = flatten_dict(own.weights, sep="/")
    assert len(own.paths) > 15
    for path in own.paths:
        down, up = (np.float64(flat[f"{path}/{name}"]) for name in (lora.DOWN, lora.UP))
        expected = kernel(params(), path).astype(np.float64) + 2.0 * np.einsum("...ir,...ro->...io", down, up)
        np.testing.assert_allclose(kernel(merged, path), expected, rtol=1e-6, atol=1e-6)
    untouched = set(flatten_dict(params(), sep="/")) - {f"{path}/kernel" for path in own.paths}
    for name in untouched:
        np.testing.assert_array_equal(flatten_dict(merged, sep="/")[name], flatten_dict(params(), sep="/")[name])
    applied, expected = program()(params(), own, *inputs()), plain(merged)
    assert relative_error(applied, expected) < 1e-5
    assert relative_error(expected, plain(params())) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["nothing", "products"])
def test_gradients_are_those_through_the_merged_kernels(keeps):
    """With recomputed blocks, as large models are trained; the merged model keeps everything."""
    config = dataclasses.replace(NANO.dit, remat=True, remat_keeps=keeps)
    own = trained(targets="q$|ffn_out|text_in")

    def loss(own, apply):
        return jnp.square(apply(own)).mean()

    def merging(own):
        return WanDiT(NANO.dit).apply({"params": lora.merge(params(), own)}, *inputs())

    found = jax.jit(jax.grad(lambda o: loss(o, lambda o: lora.apply(WanDiT(config), params(), o, *inputs()))))(own)
    expected = jax.jit(jax.grad(lambda o: loss(o, merging)))(own)
    assert jax.tree.structure(found) == jax.tree.structure(own)
    for path, leaf in flatten_dict(found.weights, sep="/").items():
        assert relative_error(leaf, flatten_dict(expected.weights, sep="/")[path]) < 1e-4, path


def test_training_moves_the_adapters_alone_and_learns():
    latents, _, conditions, table = inputs()
    optimiser = optax.adam(3e-2)
    own = lora.init(jax.random.key(1), params(), rank=4)
    before = jax.tree.map(np.array, params())

    @jax.jit
    def step(base, own, moments):
        def loss(own):
            drawn = flow.draw(jax.random.key(5), latents, flow.logit_normal, 3.0)
            velocity = lora.apply(WanDiT(NANO.dit), base, own, drawn.noisy, drawn.timestep, conditions, table)
            return flow.mse(velocity, drawn.velocity)

        value, gradient = jax.value_and_grad(loss)(own)
        updates, moments = optimiser.update(gradient, moments)
        return optax.apply_updates(own, updates), moments, value

    start, moments, losses = own, optimiser.init(own), []
    for _ in range(12):
        own, moments, value = step(params(), own, moments)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), start, own)
    assert all(jax.tree.leaves(moved)), "every adapter learns"
    jax.tree.map(np.testing.assert_array_equal, params(), before)
    held = sum(leaf.size for leaf in jax.tree.leaves(moments)) - 1  # Adam's counter
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(own)), "moments are kept for adapters alone"


def test_files_come_back_and_convert_to_the_merged_model(source, tmp_path):
    """In diffusers' names, through `--lora` into a source in the original names; rotary columns as they were."""
    own = trained(plain_params()["dit"], targets=ALL)
    file = tmp_path / "a.safetensors"
    loratree.save(file, CONFIG.dit, own)
    assert "transformer.blocks.1.attn1.to_q.lora_A.weight" in load_file(file)
    again = loratree.read(file, CONFIG.dit)
    assert again.scale == own.scale and again.paths == own.paths
    jax.tree.map(np.testing.assert_array_equal, again.weights, jax.tree.map(np.asarray, own.weights))
    _, found = convert.load(source, "f32", only=["dit"], loras=[str(file)])
    expected = lora.merge(plain_params()["dit"], own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found["dit"], expected)
    with pytest.raises(ValueError, match="exists"):
        loratree.save(file, CONFIG.dit, own)
    loratree.save(file, CONFIG.dit, own, overwrite=True)


def test_other_spellings_are_read(tmp_path):
    """kohya's keys, in the original names, with an alpha for each linear."""
    own = trained(plain_params()["dit"], targets="self_attn/q$", alpha=1.5)
    loratree.save(tmp_path / "a.safetensors", CONFIG.dit, own)
    tensors = {}
    for name, array in load_file(tmp_path / "a.safetensors").items():
        stem, letter = name.removesuffix(".weight").split(".lora_")
        stem = stem.replace("transformer.", "lora_unet_").replace("attn1.to_q", "self_attn_q").replace(".", "_")
        tensors[f"{stem}.lora_{'down' if letter == 'A' else 'up'}.weight"] = array.astype(np.float16)
        tensors[f"{stem}.alpha"] = np.full((), 1.5, np.float32)
    save_file(tensors, tmp_path / "b.safetensors")
    again = loratree.read(tmp_path / "b.safetensors", CONFIG.dit)
    assert again.scale == 0.5 and again.paths == own.paths
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), again.weights, own.weights)
    some = {name: array for name, array in tensors.items() if "blocks_0" in name}
    cases = {"1 of 2 layers": some,
             "factors [0.5, 1.0]": tensors | {"lora_unet_blocks_0_self_attn_q.alpha": np.full((), 3, np.float32)},
             "down or up is missing": {name: array for name, array in tensors.items() if "up" not in name},
             "no factor of a linear": tensors | {"lora_unet_blocks_0_self_attn_q.diff_b": np.zeros(128, np.float32)},
             "do not fit": tensors | {"lora_unet_blocks_0_self_attn_q.lora_down.weight": np.zeros((3, 7), np.float32)},
             "holds NaN": tensors | {"lora_unet_blocks_0_self_attn_q.lora_up.weight": np.full((128, 3), np.nan)},
             }  # fmt: skip
    for message, held in cases.items():
        save_file(held, tmp_path / "c.safetensors")
        with pytest.raises(SourceError) as error:
            loratree.read(tmp_path / "c.safetensors", CONFIG.dit)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("alpha, targets", [(3.0, lora.TARGETS), (6.0, lora.TARGETS), (6.0, "blocks/.*(q|image)$")])
def test_diffusers_loads_what_is_saved(tmp_path, alpha, targets):
    from test_dit import reference_model
    from test_lora_reference import diffusers_merged

    model = reference_model(DIT)
    state = {name: array.numpy() for name, array in model.state_dict().items()}
    ours = keymap.convert(dit.diffusers(DIT), random_params(dataclasses.replace(NANO, dit=DIT))["dit"], state)
    own = trained(ours, rank=3, alpha=alpha, targets=targets)
    loratree.save(tmp_path / "a.safetensors", DIT, own)
    with safe_open(tmp_path / "a.safetensors", framework="np") as opened:
        told = json.loads(opened.metadata().get("lora_adapter_metadata", '{"transformer.lora_alpha": 3}'))
        assert told["transformer.lora_alpha"] == alpha
    found = diffusers_merged(model, tmp_path / "a.safetensors", 1.0)
    expected = keymap.invert(dit.diffusers(DIT), lora.merge(ours, own))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert relative_error(found[name], array) < 1e-6, name
    assert relative_error(state["blocks.1.attn1.to_q.weight"], expected["blocks.1.attn1.to_q.weight"]) > 0.1


@pytest.mark.slow
def test_adapters_of_8_bit_kernels():
    """Velocity and gradient are those beside the kernels that the codes stand for; into codes nothing is merged."""
    coded, own = eight.quantised(params(), "int8"), trained()
    flat = {path: leaf for path, leaf in flatten_dict(coded, sep="/").items() if not path.endswith("/factor")}
    for path in eight.KERNELS:
        place = f"blocks/{path}/kernel"
        flat[place] = flat[place].astype(np.float32) * flatten_dict(coded, sep="/")[f"blocks/{path}/factor"]

    def loss(own, config, base):
        velocity = lora.apply(WanDiT(config), base, own, *inputs())
        return jnp.square(velocity).mean(), velocity

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, found), slope = run(own, eight.eight(NANO.dit, "int8"), coded)
    (_, expected), wanted = run(own, NANO.dit, unflatten_dict(flat, sep="/"))
    assert relative_error(found, expected) < 1e-5
    for path, leaf in flatten_dict(slope.weights, sep="/").items():
        assert relative_error(leaf, flatten_dict(wanted.weights, sep="/")[path]) < 1e-4, path
    with pytest.raises(ValueError, match="stored in 8 bits"):
        lora.merge(coded, own)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"sequence": 2, "fsdp": 4}, {"data": 2, "tensor": 2, "fsdp": 2}])
def test_on_a_mesh(sizes):
    """Velocity and gradient on eight devices are those of one."""
    mesh = sharding.make_mesh(sizes)
    own, arrays = trained(), inputs()

    def loss(own, base, arrays):
        return jnp.square(lora.apply(WanDiT(NANO.dit), base, own, *arrays)).mean()

    expected = jax.jit(jax.value_and_grad(loss))(own, params(), arrays)
    with jax.set_mesh(mesh):
        base = sharding.shard_params(params(), mesh)
        found = jax.jit(jax.value_and_grad(loss))(own, base, arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), found, expected)


@pytest.mark.slow
def test_the_block_of_the_documents(tmp_path, monkeypatch):
    """docs/training.md's, as it stands, and a step by what it defines."""
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(text.split("```python\n")[1].split("```")[0], "docs/training.md", "exec"), names)
    config, adapters = names["config"], names["adapters"]
    latents, conditions, _ = random_model.inputs(config, (2, 4, 4), 2, 0)
    table = names["rope"].table(names["token_grid"](config, latents.shape), config.head_dim)
    moments = names["optimiser"].init(adapters)
    moved, _, loss = names["step"](names["params"], adapters, moments, latents, conditions, table, jax.random.key(1))
    assert np.isfinite(loss) and all(jax.tree.leaves(jax.tree.map(lambda x: np.isfinite(x).all(), moved)))
    again = loratree.read("lora.safetensors", config)
    jax.tree.map(np.testing.assert_array_equal, again.weights, jax.tree.map(np.asarray, adapters.weights))


def test_refusals():
    key = jax.random.key(0)
    for options, message in (({"targets": "nothing"}, "match none of blocks"), ({"targets": "("}, "not a regular"),
                             ({"rank": 0}, "rank 0"), ({"alpha": 0.0}, "alpha 0.0"),
                             ({"alpha": float("nan")}, "alpha nan")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lora.init(key, params(), **options)
    wider = trained(plain_params()["dit"])
    with pytest.raises(ValueError, match="do not fit; it was made for another model"):
        lora.merge(params(), wider)
    lost = {name: leaf for name, leaf in params()["blocks"].items() if name != "ffn_in"}
    with pytest.raises(ValueError, match="LoRA of blocks/ffn_in: no linear of this model"):
        lora.apply(WanDiT(NANO.dit), {**params(), "blocks": lost}, trained(), *inputs())


def test_refusals_of_files(tmp_path):
    own = trained(plain_params()["dit"])
    with pytest.raises(ValueError, match="ends in .safetensors"):
        loratree.save(tmp_path / "a.bin", CONFIG.dit, own)
    odd = own.replace(weights={"vae": own.weights["blocks"]["self_attn"]["q"]})
    with pytest.raises(ValueError, match="LoRA of vae: no linear"):
        loratree.save(tmp_path / "a.safetensors", CONFIG.dit, odd)
    assert not list(tmp_path.iterdir())
