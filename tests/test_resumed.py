"""Trainings that go on: from the newest checkpoint, or refused in one line before Orbax reads anything."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct

from benchmarks import resumed


@struct.dataclass
class State:
    params: dict
    moments: optax.OptState


def state(width, fill=1.0):
    params = {"kernel": jnp.full((2, width), fill), "scale": jnp.full(width, fill)}
    return State(params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params))


@pytest.fixture()
def folder(tmp_path):
    with resumed.manager(tmp_path / "checkpoints") as manager:
        for step in range(1, 5):
            manager.save(step, args=ocp.args.StandardSave(state(3, float(step))))
    return tmp_path / "checkpoints"


def test_the_newest_state_comes_back_in_its_own_types(folder):
    assert len(list(folder.iterdir())) == resumed.KEPT
    with resumed.manager(folder) as manager:
        found = resumed.restored(manager, state(3, 0.0), True, "--rank")
    jax.tree.map(np.testing.assert_array_equal, found, state(3, 4.0))
    assert jax.tree.structure(found) == jax.tree.structure(state(3))


@pytest.mark.parametrize(
    "resume, width, message",
    [(False, 3, "add --resume or choose another folder"), (True, 4, "was trained with another --rank")],
)
def test_what_does_not_fit_is_refused(folder, resume, width, message):
    with resumed.manager(folder) as manager, pytest.raises(ValueError, match=message):
        resumed.restored(manager, state(width), resume, "--rank")
    gc.collect()  # readers that were left behind would warn here, and warnings are errors


def test_an_empty_folder(tmp_path):
    new = state(3)
    with resumed.manager(tmp_path / "a") as manager:
        assert resumed.restored(manager, new, False, "--rank") is new
        with pytest.raises(ValueError, match="holds no checkpoint"):
            resumed.restored(manager, new, True, "--rank")
