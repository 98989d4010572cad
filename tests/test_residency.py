"""What of a model is in memory: lazy parts, policies, and that freed is freed."""

import dataclasses
import gc
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO, random_params, write_model, write_orbax

from wanjax import checkpoint, sharding, store
from wanjax.checkpoint import CheckpointError, Model

PARTS = ("dit", "vae", "umt5", "clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="module")
def params():
    return random_params(NANO)


def equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def live() -> int:
    """Bytes of all JAX arrays that are not deleted."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_keep_has_all_from_the_start(folder, params):
    before = live()
    model = checkpoint.load(folder)
    assert type(model.params) is dict and live() - before == size(params)
    equal(model.params, params)
    for part in PARTS:
        assert model.part(part) is model.params[part]


def test_stage_holds_one_part_at_a_time(folder, params):
    before = live()
    model = checkpoint.load(folder, policy="stage")
    assert live() == before and sorted(model.params) == sorted(PARTS)
    last = None
    for part in ("umt5", "clip", "vae", "dit", "vae"):
        held = model.part(part)
        equal(held, params[part])
        assert live() - before == size(params[part]), part
        assert last is None or all(leaf.is_deleted() for leaf in jax.tree.leaves(last))
        assert model.part(part) is held is model.params[part]
        last = held
    model.free("vae")
    assert live() == before and all(leaf.is_deleted() for leaf in jax.tree.leaves(last))
    equal(model.params["vae"], params["vae"])


def test_stage_goes_through_the_mapping(folder, params):
    model = checkpoint.load(folder, policy="stage")
    assert {part: size(tree) for part, tree in model.params.items()} == {part: size(params[part]) for part in PARTS}
    with pytest.raises(KeyError):
        model.params["unet"]


@pytest.mark.parametrize("policy", ["keep", "stage"])
def test_freed_parts_come_again(folder, params, policy):
    model = checkpoint.load(folder, policy=policy)
    held, before = model.part("umt5"), live()
    model.free("umt5")
    model.free("umt5")  # nothing is left to free
    assert before - live() == size(params["umt5"])
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(held["token_embed"])
    equal(model.part("umt5"), params["umt5"])


def test_a_model_of_given_params(params):
    before = live()
    given = jax.tree.map(jnp.asarray, params)
    model = Model(NANO, dict(given), None)
    equal(model.part("clip"), params["clip"])
    model.free("clip")
    assert live() - before == size(params) - size(params["clip"])
    with pytest.raises(ValueError, match="part 'clip' was freed"):
        model.part("clip")
    for use in (model.part, model.free):
        with pytest.raises(ValueError, match="no part 'unet'; it has clip, dit, umt5, vae"):
            use("unet")
    hosted = Model(NANO, dict(params), None)  # numpy arrays, as a training loop may hold
    hosted.free("dit")
    assert "dit" not in hosted.params and hosted.part("vae") is params["vae"]


def test_replaced_params_are_the_parts(folder, params):
    """Nothing of the folder comes back when other params were put in its place."""
    model = checkpoint.load(folder)
    other = {part: jax.tree.map(lambda leaf: leaf + 1, tree) for part, tree in params.items()}
    changed = dataclasses.replace(model, params=other)
    assert changed.part("vae") is other["vae"]
    changed.free("vae")
    with pytest.raises(ValueError, match="freed"):
        changed.part("vae")
    equal(model.part("vae"), params["vae"])


@pytest.mark.parametrize("policy", ["keep", "stage"])
def test_on_a_mesh(folder, params, policy):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    wanted = sharding.shard_params(params["dit"], mesh)
    for model in (
        checkpoint.load(folder, mesh=mesh, policy=policy),
        checkpoint.load(folder, policy=policy).place(mesh),
    ):
        part = model.part("dit")
        equal(part, params["dit"])
        assert jax.tree.map(lambda leaf: leaf.sharding, part) == jax.tree.map(lambda leaf: leaf.sharding, wanted)
        assert isinstance(model.params, dict) == (policy == "keep")
    part = checkpoint.load(folder, policy=policy).part("dit", mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, part) == jax.tree.map(lambda leaf: leaf.sharding, wanted)


def test_work_in_flight_keeps_its_arrays(folder, params):
    model = checkpoint.load(folder, policy="stage")
    many = jax.jit(lambda w: jax.lax.fori_loop(0, 200, lambda i, x: jnp.tanh(x @ w), jnp.eye(len(w), dtype=w.dtype)))
    kernel = model.part("dit")["time_out"]["kernel"]
    out = many(kernel)
    model.part("vae")
    assert kernel.is_deleted()
    np.testing.assert_array_equal(out, many(params["dit"]["time_out"]["kernel"]))


def test_several_threads_read_a_part_once(folder, monkeypatch):
    model, read = checkpoint.load(folder, policy="stage"), []
    plain = checkpoint.store.restore
    monkeypatch.setattr(checkpoint.store, "restore", lambda *args: read.append(args[1]) or plain(*args))
    found = []
    threads = [threading.Thread(target=lambda: found.append(model.part("clip"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == ["clip"] and len(found) == 4 and all(tree is found[0] for tree in found)


def test_damage_is_found_when_it_is_read(tmp_path):
    folder = write_model(tmp_path / "nano")
    file = folder / "vae.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="vae/.*: not the array of the manifest"):
        checkpoint.load(folder)
    model = checkpoint.load(folder, policy="stage")
    model.part("dit")
    before = live()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="vae/.*: not the array of the manifest"):
            model.part("vae")
    assert live() < before  # the transformer is gone, and nothing of the damaged part stays
    model.part("dit")


def test_unknown_policy(folder):
    with pytest.raises(ValueError, match="policy 'swap': choose keep, stage, stream"):
        checkpoint.load(folder, policy="swap")


def test_the_next_part_is_read_ahead(folder, monkeypatch):
    """Each part's files are asked for while the part before it is at work; "keep" needs none of that."""
    asked, calls = [], []
    turn = threading.Event()
    monkeypatch.setattr(checkpoint.store, "read_ahead", lambda path, part: (asked.append((path, part)), turn.set()))
    checkpoint.load(folder)
    assert not asked
    model = checkpoint.load(folder, policy="stage")
    for part, following in (("umt5", "clip"), ("clip", "vae"), ("vae", "dit"), ("dit", "vae")):
        turn.clear()
        calls.append((folder, following))
        model.part(part)
        assert turn.wait(10) and asked == calls
        assert model.part(part) and asked == calls  # not again for one that is there


@pytest.mark.parametrize("write", [write_model, write_orbax])
def test_reading_ahead_fills_the_cache(tmp_path, write):
    folder = write(tmp_path / "nano")
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file.relative_to(folder).parts[0][:3] == "dit"
    )
    assert files

    def cached() -> int:
        """How many of the files' first bytes are in memory."""
        count = 0
        for file in files:
            with open(file, "rb") as stream:
                try:
                    count += os.preadv(stream.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
                except BlockingIOError:
                    pass
                except OSError as error:
                    pytest.skip(f"this file system does not say what is cached: {error}")
        return count

    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached() == len(files):
        pytest.skip("this file system keeps all files in memory")
    for file in files:
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store.read_ahead(folder, "dit")
    deadline = time.monotonic() + 10
    while cached() < len(files) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cached() == len(files)
    store.read_ahead(folder, "unet")  # nothing there: nothing to do
