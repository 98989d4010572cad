"""I3D against a torch definition written here from the architecture, with padding of its own, on random weights."""

import jax
import numpy as np
import pytest
import torch
from reference import numpy_state, randomize, relative_error
from torch.nn import functional as F

from benchmarks.tgi.networks import i3d, layers

# In, then the widths of b0, b1a, b1b, b2a, b2b, b3b: table 1 of the GoogLeNet paper, inflated.
MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}


def same(x, kernel, stride):
    """Zeros around [N, C, T, H, W] so that ceil(size / stride) windows fit, the odd one at the end."""
    pads = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


def pool(x, kernel, stride):
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


class Conv(torch.nn.Module):
    def __init__(self, inputs, outputs, size=1, stride=1, last=False):
        super().__init__()
        self.conv3d = torch.nn.Conv3d(inputs, outputs, size, stride, bias=last)
        if not last:
            self.bn = torch.nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x):
        x = self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return F.relu(self.bn(x)) if hasattr(self, "bn") else x


class Mixed(torch.nn.Module):
    def __init__(self, inputs, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Conv(inputs, b0)
        self.b1a, self.b1b = Conv(inputs, b1a), Conv(b1a, b1b, 3)
        self.b2a, self.b2b = Conv(inputs, b2a), Conv(b2a, b2b, 3)
        self.b3b = Conv(inputs, b3b)

    def forward(self, x):
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Conv(3, 64, 7, 2)
        self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Conv(64, 64), Conv(64, 192, 3)
        for name, widths in MIXED.items():
            setattr(self, f"Mixed_{name}", Mixed(*widths))
        self.logits = Conv(1024, 400, last=True)

    def forward(self, video):
        """[N, C, T, H, W] from -1 to 1 -> [N, 400]."""
        n, c, t, h, w = video.shape
        frames = F.interpolate(video.transpose(1, 2).reshape(n * t, c, h, w), (224, 224), mode="bilinear")
        x = frames.reshape(n, t, c, 224, 224).transpose(1, 2)
        x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name == "4b":
                x = pool(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = getattr(self, f"Mixed_{name}")(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), 1)).flatten(2).mean(2)


@pytest.fixture(scope="module")
def reference():
    """Weights of unit gain under ReLU, and statistics of the norms that are not 0 and 1."""
    module, generator = randomize(I3D(), 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.Conv3d):
                part.weight *= 2**0.5
            if isinstance(part, torch.nn.BatchNorm3d):
                part.running_mean.normal_(0, 0.2, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


@pytest.fixture(scope="module")
def params(reference):
    return i3d.from_torch(numpy_state(reference))


def video(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (1, frames, height, width, 3)).astype(np.uint8)


def wanted(reference, pixels):
    with torch.inference_mode():
        return reference(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 4, 1, 2, 3))


# 9: one step after the last pool, from odd sizes in time at every stride; 17: two steps, so the mean over time counts.
@pytest.mark.parametrize("frames, height, width", [(9, 40, 56), pytest.param(17, 64, 48, marks=pytest.mark.slow)])
def test_logits_as_torch(reference, params, frames, height, width):
    pixels = video(frames, height, width)
    logits = jax.jit(i3d.features)(params, pixels)
    assert logits.shape == (1, 400) and logits.dtype == np.float32
    assert np.std(logits) > 0.01  # not a constant that any network would give
    assert relative_error(logits, wanted(reference, pixels)) <= 1e-5


def test_fewest_frames(params):
    assert i3d.MIN_FRAMES == 9
    with pytest.raises(ValueError, match="8 frames.* at least 9"):
        i3d.features(params, np.zeros((1, 8, 32, 32, 3), np.uint8))
    shapes = i3d.shapes()
    out = jax.eval_shape(i3d.features, shapes, jax.ShapeDtypeStruct((2, 9, 32, 32, 3), np.uint8))
    assert out.shape == (2, 400)


def test_with_eight_frames_torch_has_no_window_left(reference):
    with pytest.raises(RuntimeError, match="smaller than kernel size"):
        wanted(reference, video(8, 32, 32))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((9, 32, 32, 3), np.uint8), r"\[9, 32, 32, 3\]"),
        (np.zeros((1, 9, 32, 32, 4), np.uint8), r"\[1, 9, 32, 32, 4\]"),
        (np.zeros((1, 9, 32, 32, 3), np.int32), "int32"),
    ],
)
def test_pixels_that_it_does_not_take(params, array, message):
    with pytest.raises(ValueError, match=message):
        i3d.features(params, array)


def test_floats_and_bytes_are_the_same_pixels(params):
    pixels = video(9, 24, 24)
    from_bytes = jax.eval_shape(i3d.features, params, pixels)
    from_floats = jax.eval_shape(i3d.features, params, pixels.astype(np.float32) / 127.5 - 1)
    assert (from_bytes.shape, from_bytes.dtype) == (from_floats.shape, from_floats.dtype)
    np.testing.assert_allclose(i3d._scaled(pixels), pixels.astype(np.float64) / 127.5 - 1, atol=1e-6)


def test_names_and_shapes_of_the_file_all_at_once(reference):
    state = numpy_state(reference)
    del state["Mixed_3b.b0.bn.weight"]
    state["head.weight"] = np.zeros(3, np.float32)
    state["logits.conv3d.bias"] = np.zeros(101, np.float32)
    with pytest.raises(ValueError) as caught:
        i3d.from_torch(state)
    for name in ("Mixed_3b.b0.bn.weight", "head.weight", "logits.conv3d.bias"):
        assert name in str(caught.value)


@pytest.mark.parametrize("height, width, size", [(5, 7, 16), (50, 33, 16), (16, 16, 16)])
def test_resize_as_torch(height, width, size):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    torch_x = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), (size, size), mode="bilinear")
    assert relative_error(layers.resized(x, size), torch_x.permute(0, 2, 3, 1)) <= 1e-6


@pytest.mark.parametrize("size", [4, 7, 8, 9])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (2, 2), (7, 2)])
def test_padding_of_convolutions_and_pools(size, kernel, stride):
    generator = np.random.default_rng(size)
    x = generator.normal(size=(1, size, size, size, 2)).astype(np.float32)
    w = generator.normal(size=(kernel, kernel, kernel, 2, 3)).astype(np.float32)
    channels_first = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
    window, step = (kernel,) * 3, (stride,) * 3
    padded = same(channels_first, window, step)
    conv = F.conv3d(padded, torch.from_numpy(w).permute(4, 3, 0, 1, 2), stride=stride).permute(0, 2, 3, 4, 1)
    assert relative_error(layers.convolve(x, w, stride, "SAME"), conv) <= 1e-6
    maximum = layers.run((layers.Pool("max", window, step),), {}, np.abs(x))
    torch_maximum = F.max_pool3d(padded.abs(), window, step).permute(0, 2, 3, 4, 1)
    np.testing.assert_array_equal(maximum, torch_maximum.numpy())
