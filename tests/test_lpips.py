"""LPIPS against a torch definition of its own, with the published names and random weights."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import numpy_state, randomize, relative_error

from benchmarks.tgi.networks import lpips


class Lpips(torch.nn.Module):
    """The published network: torchvision's `features` and the `lpips` package's `lin` layers, [N, C, H, W]."""

    def __init__(self):
        super().__init__()
        sizes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        self.features = torch.nn.ModuleDict(
            {name: torch.nn.Conv2d(*size) for name, size in zip(("0", "3", "6", "8", "10"), sizes, strict=True)}
        )
        for i, size in enumerate(sizes):
            lin = torch.nn.Conv2d(size[1], 1, 1, bias=False)
            # Its weights sit behind a dropout in the file's names.
            self.add_module(f"lin{i}", torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"1": lin})}))

    def trunk(self, x):
        found = []
        for name, conv in self.features.items():
            x = F.relu(conv(F.max_pool2d(x, 3, 2) if name in ("3", "6") else x))
            found.append(x)
        return found

    def forward(self, a, b):
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        total = 0
        for i, (f, g) in enumerate(zip(self.trunk((a - shift) / scale), self.trunk((b - shift) / scale), strict=True)):
            f, g = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (f, g))
            total = total + self.get_submodule(f"lin{i}.model.1")((f - g).square()).mean((1, 2, 3))
        return total


@pytest.fixture(scope="module")
def reference():
    model = randomize(Lpips(), 3)
    with torch.no_grad():
        for i in range(5):  # the published ones are not negative
            model.get_parameter(f"lin{i}.model.1.weight").abs_()
    return model


@pytest.fixture(scope="module")
def params(reference):
    return lpips.from_torch(numpy_state(reference))


distance = jax.jit(lpips.distance)


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def expected(model, a, b):
    with torch.no_grad():
        return model(*(torch.tensor(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (a, b)))


@pytest.mark.parametrize("size", [(31, 31), (64, 48), (97, 130)], ids=str)
def test_as_the_torch_definition(reference, params, size):
    a, b = images(3, *size), images(3, *size, seed=1)
    b[1] = np.clip(a[1].astype(int) + 3, 0, 255)  # one pair is nearly equal
    out = distance(params, a, b)
    assert out.shape == (3,) and out.dtype == np.float32
    assert out[1] < out[0] / 3
    assert relative_error(out, expected(reference, a, b)) < 2e-6
    assert relative_error(out[1:2], expected(reference, a, b)[1:2]) < 1e-5


def test_equal_images_and_order(params):
    a, b = images(2, 40, 40), images(2, 40, 40, seed=1)
    assert np.asarray(distance(params, a, a)).max() < 1e-12  # sums over a batch may be split otherwise for each half
    np.testing.assert_allclose(distance(params, a, b), distance(params, b, a), rtol=1e-6)


def test_black_images_have_no_feature_but_a_distance(params):
    """Where every feature is zero the length is zero, too: no NaN."""
    quiet = jax.tree.map(np.zeros_like, params)
    assert not np.asarray(distance(quiet, images(1, 31, 31), images(1, 31, 31, seed=1))).any()


def test_the_smallest_image(params):
    with pytest.raises(RuntimeError, match="Output size is too small"):
        Lpips().trunk(torch.zeros(1, 3, 30, 64))
    with pytest.raises(ValueError, match="30x64: AlexNet takes none smaller than 31x31"):
        lpips.distance(params, images(1, 30, 64), images(1, 30, 64))
    with pytest.raises(ValueError, match="64x30"):
        lpips.distance(params, images(1, 64, 30), images(1, 64, 30))


@pytest.mark.parametrize(
    "a, b",
    [
        (images(1, 32, 32), images(2, 32, 32)),
        (images(1, 32, 32), images(1, 32, 32).astype(np.float32)),
        (images(32, 32), images(32, 32)),
        (images(1, 32, 32)[..., :1], images(1, 32, 32)[..., :1]),
    ],
    ids=["counts", "dtype", "rank", "grey"],
)
def test_other_arrays_are_refused(params, a, b):
    with pytest.raises(ValueError, match="two uint8"):
        lpips.distance(params, a, b)


def test_shapes_are_those_of_the_parameters(params):
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), lpips.shapes())


def test_every_difference_is_told(reference):
    state = numpy_state(reference) | {"classifier.6.bias": np.zeros(10), "net.x": np.zeros(3)}
    state["features.0.bias"] = state["features.0.bias"][:5]
    del state["lin2.model.1.weight"], state["features.3.bias"]
    with pytest.raises(ValueError) as error:
        lpips.from_torch(state)
    assert str(error.value) == (
        "missing: features.3.bias, lin2.model.1.weight; unexpected: net.x; "
        "misshapen: classifier.6.bias [10] for [1000], features.0.bias [5] for [64]"
    )
