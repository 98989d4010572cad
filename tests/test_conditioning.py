"""Mask and conditioning against diffusers' own `prepare_latents`, run on a stand-in for the pipeline."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wanjax import conditioning


class FakeVAE(torch.nn.Module):
    """Stands in for AutoencoderKLWan: records the conditioning video and returns a given latent."""

    def __init__(self, latent: torch.Tensor) -> None:
        super().__init__()
        self.latent, self.video = latent, None
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(latents_mean=[0.0] * 16, latents_std=[1.0] * 16, z_dim=16)

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        self.video = video
        return SimpleNamespace(latents=self.latent)


def reference(first, last, frames: int, stride: int, latent) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' condition [1, F, h, w, stride + 16] and video [1, T, H, W, 3], brought to channels last."""
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline

    def to_torch(array):
        return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())

    vae = FakeVAE(to_torch(latent))
    pipeline = SimpleNamespace(
        vae=vae,
        vae_scale_factor_temporal=stride,
        vae_scale_factor_spatial=8,
        config=SimpleNamespace(expand_timesteps=False),
    )
    condition = WanImageToVideoPipeline.prepare_latents(
        pipeline,
        to_torch(first),
        batch_size=1,
        height=first.shape[1],
        width=first.shape[2],
        num_frames=frames,
        dtype=torch.float32,
        device=torch.device("cpu"),
        last_image=None if last is None else to_torch(last),
    )[1]
    return np.moveaxis(condition.numpy(), 1, -1), np.moveaxis(vae.video.numpy(), 1, -1)


@pytest.mark.parametrize("frames", [5, 9, 13, 25, 33, 41, 65, 81])
@pytest.mark.parametrize("with_last", [True, False])
@pytest.mark.parametrize("stride", [4, 2])
def test_condition_equals_diffusers(frames, with_last, stride):
    rng = np.random.default_rng(frames)
    first, last = rng.uniform(-1, 1, (2, 1, 16, 24, 3)).astype(np.float32)
    last = last if with_last else None
    latent = rng.standard_normal((1, (frames - 1) // stride + 1, 2, 3, 16), np.float32)
    condition, video = reference(first, last, frames, stride, latent)
    images, at = (np.stack([first], 1), (0,)) if last is None else (np.stack([first, last], 1), (0, -1))
    ours = conditioning.keyframe_video(jnp.asarray(images), at, frames)
    np.testing.assert_array_equal(ours, video)
    mask = conditioning.mask(frames, stride, at)
    assert mask.dtype == jnp.float32 and mask.shape == ((frames - 1) // stride + 1, stride)
    np.testing.assert_array_equal(conditioning.latent_condition(jnp.asarray(latent), mask), condition)


def test_mask_of_81_frames_written_out():
    expected = np.zeros((21, 4))
    expected[0] = 1
    expected[20, 3] = 1
    np.testing.assert_array_equal(conditioning.mask(81, 4), expected)
    np.testing.assert_array_equal(conditioning.mask(81, 4, (-1,)).sum(), 1)
    np.testing.assert_array_equal(conditioning.mask(81, 4, (0,)).sum(), 4)
    for frames in (80, 1, 0):
        with pytest.raises(ValueError, match="nearest"):
            conditioning.mask(frames, 4)


@pytest.mark.parametrize("stride", [4, 2])
@pytest.mark.parametrize("at", [(), (7,), (0, 1), (0, 5, -1), (-1, 3, 0, 4), (8, 2)], ids=str)
def test_keyframes_anywhere(at, stride):
    """A pixel frame's channel of the mask and its place in the video, by plain loops."""
    frames, given = 17, [place % 17 for place in at]
    folded = np.zeros((16 // stride + 1, stride))
    for place in given:
        if place == 0:
            folded[0] = 1
        else:
            folded[1 + (place - 1) // stride, (place - 1) % stride] = 1
    np.testing.assert_array_equal(conditioning.mask(frames, stride, at), folded)
    images = np.random.default_rng(0).uniform(-1, 1, (2, len(at), 4, 6, 3)).astype(np.float32)
    video = np.asarray(conditioning.keyframe_video(jnp.asarray(images), at, frames))
    assert video.shape == (2, 17, 4, 6, 3) and video.dtype == np.float32
    for frame in range(17):
        wanted = images[:, given.index(frame)] if frame in given else 0
        np.testing.assert_array_equal(video[:, frame], np.broadcast_to(wanted, (2, 4, 6, 3)))


@pytest.mark.parametrize("at, message", [((0, 9), "keyframe at 9: give a whole number from -9 to 8"),
                                         ((-10,), "keyframe at -10: give"), ((8, -1), "keyframes at 8, 8: two at one"),
                                         ((3, 3), "keyframes at 3, 3: two at one frame")])  # fmt: skip
def test_bad_places_are_named(at, message):
    for make in (lambda: conditioning.mask(9, 4, at),
                 lambda: conditioning.keyframe_video(jnp.zeros((1, len(at), 4, 4, 3)), at, 9)):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            make()
        assert "\n" not in str(caught.value)


def test_works_traced_and_keeps_dtype():
    images = jnp.stack([jnp.ones((2, 8, 8, 3)), -jnp.ones((2, 8, 8, 3))], 1).astype(jnp.bfloat16)
    video = jax.jit(conditioning.keyframe_video, static_argnums=(1, 2))(images, (0, -1), 9)
    assert video.shape == (2, 9, 8, 8, 3) and video.dtype == jnp.bfloat16
    np.testing.assert_array_equal(video[0, :, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, -1])
    latent = jnp.ones((2, 3, 2, 2, 16), jnp.bfloat16)
    condition = jax.jit(lambda latent: conditioning.latent_condition(latent, conditioning.mask(9, 4)))(latent)
    assert condition.shape == (2, 3, 2, 2, 20) and condition.dtype == jnp.bfloat16
    np.testing.assert_array_equal(condition[1, :, 1, 0, :4], [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_shapes_that_do_not_match_are_named():
    two = jnp.zeros((1, 2, 8, 8, 3))
    with pytest.raises(ValueError, match="^2 keyframes at 3 places: give a place for each$"):
        conditioning.keyframe_video(two, (0, 1, -1), 9)
    with pytest.raises(ValueError, match="^keyframes at 0, 0: two at one frame; give each a frame of its own$"):
        conditioning.keyframe_video(two, (0, -1), 1)
    with pytest.raises(ValueError, match="latent of 4 frames"):
        conditioning.latent_condition(jnp.zeros((1, 4, 2, 2, 16)), conditioning.mask(9, 4))


def test_pad_text_as_the_reference_cuts_and_fills():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((3, 16, 8), np.float32)
    lengths = [1, 7, 16]
    attention_mask = (np.arange(16) < np.array(lengths)[:, None]).astype(np.int32)
    # The reference's way: cut each row to its length, then fill up with zeros.
    rows = [torch.from_numpy(row[:length]) for row, length in zip(embeddings, lengths, strict=True)]
    expected = torch.stack([torch.cat([row, row.new_zeros(16 - len(row), 8)]) for row in rows])
    padded = conditioning.pad_text(jnp.asarray(embeddings), jnp.asarray(attention_mask))
    np.testing.assert_array_equal(padded, expected)
    poisoned = jnp.where(jnp.asarray(attention_mask)[..., None] == 1, embeddings, jnp.nan)
    np.testing.assert_array_equal(conditioning.pad_text(poisoned, jnp.asarray(attention_mask)), expected)
    half = conditioning.pad_text(jnp.asarray(embeddings, jnp.bfloat16), jnp.asarray(attention_mask))
    assert half.dtype == jnp.bfloat16
