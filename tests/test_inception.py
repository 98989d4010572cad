"""FID's Inception against a torch definition of its own, with the published names and random weights."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import numpy_state, randomize, relative_error

from benchmarks.tgi.networks import inception, layers

STEM = [  # name, channels in and out, kernel, stride, padding
    ("Conv2d_1a_3x3", 3, 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 32, 3, 1, 0), ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
    ("Conv2d_3b_1x1", 64, 80, 1, 1, 0), ("Conv2d_4a_3x3", 80, 192, 3, 1, 0),
]  # fmt: skip


class Unit(torch.nn.Module):
    def __init__(self, inputs, outputs, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(torch.nn.Module):
    """Named units; `branches` says which run after which, "a|b" side by side, and what pools the last branch."""

    def __init__(self, units, branches, pool):
        super().__init__()
        for name, arguments in units.items():
            self.add_module(name, Unit(*arguments))
        self.branches, self.pool = branches, pool

    def forward(self, x):
        found = []
        for branch in self.branches:
            y = self.pool(x) if branch.startswith("pool") else x
            for step in branch.removeprefix("pool").split():
                y = torch.cat([self.get_submodule(name)(y) for name in step.split("|")], 1)
            found.append(y)
        return torch.cat(found, 1)


def mean(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def top(x):
    return F.max_pool2d(x, 3, 1, 1)


def halve(x):
    return F.max_pool2d(x, 3, 2)


def block_a(c, pooled):
    units = dict(
        branch1x1=(c, 64), branch5x5_1=(c, 48), branch5x5_2=(48, 64, 5, 1, 2), branch3x3dbl_1=(c, 64),
        branch3x3dbl_2=(64, 96, 3, 1, 1), branch3x3dbl_3=(96, 96, 3, 1, 1), branch_pool=(c, pooled),
    )  # fmt: skip
    order = ["branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"]
    return Block(units, [*order, "pool branch_pool"], mean)


def block_b(c):
    units = dict(
        branch3x3=(c, 384, 3, 2), branch3x3dbl_1=(c, 64), branch3x3dbl_2=(64, 96, 3, 1, 1),
        branch3x3dbl_3=(96, 96, 3, 2),
    )  # fmt: skip
    return Block(units, ["branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "pool"], halve)


def block_c(c, m):
    wide, tall = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    units = dict(
        branch1x1=(c, 192), branch7x7_1=(c, m), branch7x7_2=(m, m, *wide), branch7x7_3=(m, 192, *tall),
        branch7x7dbl_1=(c, m), branch7x7dbl_2=(m, m, *tall), branch7x7dbl_3=(m, m, *wide),
        branch7x7dbl_4=(m, m, *tall), branch7x7dbl_5=(m, 192, *wide), branch_pool=(c, 192),
    )  # fmt: skip
    order = ["branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3", " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))]
    return Block(units, [*order, "pool branch_pool"], mean)


def block_d(c):
    units = dict(
        branch3x3_1=(c, 192), branch3x3_2=(192, 320, 3, 2), branch7x7x3_1=(c, 192),
        branch7x7x3_2=(192, 192, (1, 7), 1, (0, 3)), branch7x7x3_3=(192, 192, (7, 1), 1, (3, 0)),
        branch7x7x3_4=(192, 192, 3, 2),
    )  # fmt: skip
    return Block(units, ["branch3x3_1 branch3x3_2", " ".join(f"branch7x7x3_{i}" for i in range(1, 5)), "pool"], halve)


def block_e(c, pool):
    wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    units = dict(
        branch1x1=(c, 320), branch3x3_1=(c, 384), branch3x3_2a=(384, 384, *wide), branch3x3_2b=(384, 384, *tall),
        branch3x3dbl_1=(c, 448), branch3x3dbl_2=(448, 384, 3, 1, 1), branch3x3dbl_3a=(384, 384, *wide),
        branch3x3dbl_3b=(384, 384, *tall), branch_pool=(c, 192),
    )  # fmt: skip
    order = ["branch1x1", "branch3x3_1 branch3x3_2a|branch3x3_2b"]
    order.append("branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b")
    return Block(units, [*order, "pool branch_pool"], pool)


class Inception(torch.nn.Module):
    """[N, 3, H, W] from 0 to 1 -> [N, 2048]."""

    def __init__(self):
        super().__init__()
        for name, *sizes in STEM:
            self.add_module(name, Unit(*sizes))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        for letter, inner in zip("bcde", (128, 160, 160, 192), strict=True):
            self.add_module(f"Mixed_6{letter}", block_c(768, inner))
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = block_d(768), block_e(1280, mean), block_e(2048, top)
        self.fc = torch.nn.Linear(2048, 1008)

    def forward(self, x):
        x = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
        for name, unit in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = halve(x)
            x = x if name == "fc" else unit(x)
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def reference():
    model = randomize(Inception(), 5)
    generator = torch.Generator().manual_seed(6)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.3 + torch.rand(buffer.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def params(reference):
    return inception.from_torch(numpy_state(reference))


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.slow
def test_as_the_torch_definition(reference, params):
    """On an image that is made larger along one side and smaller along the other."""
    pixels = images(2, 70, 401)
    pixels[1] //= 3  # two noises alike would give nearly the same features
    with torch.no_grad():
        expected = reference(torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255)
    out = jax.jit(inception.features)(params, pixels)
    assert out.shape == (2, 2048) and out.dtype == np.float32
    assert relative_error(out, expected) < 2e-6
    # With random weights what two images differ in is about a hundredth of what they share.
    assert relative_error(out[0] - out[1], expected[0] - expected[1]) < 1e-4


@pytest.mark.parametrize("size", [(32, 48), (299, 299), (300, 298), (480, 864), (1, 1)], ids=str)
def test_resize_as_torch(size):
    x = np.random.default_rng(1).random((1, *size, 3), np.float32)
    expected = F.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size=(299, 299), mode="bilinear", align_corners=False)
    out = layers.resized(x, inception.SIZE)
    np.testing.assert_allclose(out, expected.permute(0, 2, 3, 1).numpy(), atol=3e-5)
    assert relative_error(out, expected.permute(0, 2, 3, 1)) < 5e-6


def test_average_leaves_the_padding_out():
    x = np.random.default_rng(2).random((1, 5, 6, 2), np.float32)
    out = layers.run((inception.MEAN,), {}, x)
    np.testing.assert_allclose(out, mean(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy(), rtol=1e-6)


def test_shapes_are_those_of_the_parameters(params):
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), inception.shapes())
    assert jax.eval_shape(
        inception.features, inception.shapes(), jax.ShapeDtypeStruct((5, 32, 48, 3), np.uint8)
    ).shape == (5, inception.FEATURES)  # fmt: skip


@pytest.mark.parametrize(
    "pixels",
    [images(32, 32), images(0, 32, 32), images(1, 8, 8).astype(np.float32), images(1, 8, 8)[..., :1]],
    ids=["rank", "none", "dtype", "grey"],
)
def test_other_arrays_are_refused(params, pixels):
    with pytest.raises(ValueError, match="uint8 .* is wanted"):
        inception.features(params, pixels)


def test_every_difference_is_told(reference):
    state = numpy_state(reference)
    del state["Mixed_7c.branch1x1.bn.running_var"], state["fc.bias"]  # the second serves nothing
    state |= {"AuxLogits.fc.bias": np.zeros(3), "Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 5, 5))}
    with pytest.raises(ValueError) as error:
        inception.from_torch(state)
    assert str(error.value) == (
        "missing: Mixed_7c.branch1x1.bn.running_var; unexpected: AuxLogits.fc.bias; "
        "misshapen: Conv2d_1a_3x3.conv.weight [32, 3, 5, 5] for [32, 3, 3, 3]"
    )
