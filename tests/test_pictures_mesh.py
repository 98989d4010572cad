"""The autoencoder's stages on meshes of every form: pictures lie in rows and columns whatever the mesh's axes are."""

import jax
import numpy as np
import pytest
from nano import NANO, random_params
from reference import relative_error

from samplers import pipeline
from samplers.plan import Plan, Settings
from wanjax import sharding
from wanjax.checkpoint import Model

SIZE = (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 4}, {"fsdp": 4}, {"fsdp": 2, "sequence": 2}, {"fsdp": 8}], ids=str)
def test_one_axis_of_devices_for_two_of_pictures(sizes):
    """(8, 8) latents on four or eight devices lie in two rows; the axes of the mesh cannot say how, and need not."""
    model = Model(NANO, random_params(NANO), None)
    plan = Plan.of(NANO, Settings.of(NANO, size=SIZE))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 2, *SIZE, 3), dtype=np.uint8)
    latents = rng.normal(size=(1, *plan.latent_shape)).astype(np.float32)
    condition, video = pipeline.encode_keyframes(model, plan, pixels), pipeline.decode(model, plan, latents)
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    placed = model.place(mesh)
    with jax.set_mesh(mesh):
        assert relative_error(pipeline.encode_keyframes(placed, plan, pixels), condition) < 1e-5
        found = pipeline.decode(placed, plan, sharding.shard_batch(latents, mesh))
    assert np.abs(found.astype(int) - video).max() <= 1
