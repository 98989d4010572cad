"""The flow-matching objective that Wan2.1 is trained by, as pure functions of arrays and keys.

A latent at noise level sigma is x = (1 - sigma) * data + sigma * noise, the model predicts its velocity noise - data
from x and the timestep 1000 * sigma, and the loss is the mean squared error (rectified flow; "Wan: Open and Advanced
Large-Scale Video Generative Models", arXiv 2503.20314, where sigma is drawn logit-normal). How often each level is
learnt is decided twice: by the density that an unshifted time is drawn from, and by the timestep shift, which moves it
towards noise as in sampling (`samplers.schedule`).

    drawn = flow.draw(key, latents, flow.logit_normal, shift=5.0)
    velocity = WanDiT(config).apply({"params": params}, drawn.noisy, drawn.timestep, conditions, table)
    loss = flow.mse(velocity, drawn.velocity)

Axis letters as in `types`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.special import ndtri

from wanjax.types import Conditions

TRAIN_TIMESTEPS = 1000.0
"""The timestep given to the model is this times sigma."""

Density = Callable[[jax.Array], jax.Array]
"""A distribution of unshifted times by its quantile function: numbers that are uniform in [0, 1] to times in [0, 1]."""


@struct.dataclass
class Drawn:
    """What the model learns from in one evaluation.

    Attributes:
      sigma, timestep: float32 [B], noise level in [0, 1], and 1000 times it.
      noisy: [B, ...], the data at that level.
      velocity: [B, ...], what is to be predicted from it.
    """

    sigma: jax.Array
    timestep: jax.Array
    noisy: jax.Array
    velocity: jax.Array


def uniform(quantile: jax.Array) -> jax.Array:
    """The uniform density of times."""
    return quantile


def logit_normal(quantile: jax.Array, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Times whose logarithm of the odds t / (1 - t) is normal: few at both ends.

    "rf/lognorm(mean, std)" of "Scaling Rectified Flow Transformers" (arXiv 2403.03206), whose choice is 0 and 1, as is
    that of diffusers' trainers. Other values: `functools.partial(logit_normal, mean=0.5)`.
    """
    return jax.nn.sigmoid(mean + std * ndtri(quantile))


def stratified(key: jax.Array, order: jax.Array, size: int) -> jax.Array:
    """float32 [size] in [0, 1): one number in each of `size` equal parts, in random order.

    Each is uniform by itself; together they cover the levels more evenly than independent ones, so that the loss of a
    batch varies less.

    Args:
      key, order: of the places within the parts, and of their order.
    """
    strata = jax.random.permutation(order, size)
    return (strata + jax.random.uniform(key, (size,))) / size


def shifted(time: jax.Array, shift: float) -> jax.Array:
    """Noise level of an unshifted time in [0, 1]: shift * t / (1 + (shift - 1) * t); 1 leaves it."""
    return shift * time / (1 + (shift - 1) * time)


def draw(key: jax.Array, data: jax.Array, density: Density = uniform, shift: float = 1.0) -> Drawn:
    """Noise levels, noise and target of a batch.

    Args:
      data: [B, ...] normalised latents, float32 or float64.
      density: of unshifted times, such as `uniform` or `logit_normal`; stratified over the batch.
      shift: Wan2.1 samples with 3 (480p image-to-video) to 16 (FLF2V).

    Raises:
      ValueError: a shift that is not a positive, finite number, or data in half precision.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: got {shift!r}; give a positive finite number")
    if data.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"data: is {data.dtype}, in which small noise is lost; give float32")
    level_key, order_key, noise_key = jax.random.split(key, 3)
    sigma = shifted(density(stratified(level_key, order_key, data.shape[0])), shift)
    noise = jax.random.normal(noise_key, data.shape, data.dtype)
    return Drawn(sigma, TRAIN_TIMESTEPS * sigma, noised(data, noise, sigma), velocity(data, noise))


def noised(data: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Data [B, ...] at the noise levels sigma [B]."""
    level = _rows(sigma, data.ndim)
    return (1 - level) * data + level * noise


def velocity(data: jax.Array, noise: jax.Array) -> jax.Array:
    """What the model predicts, wherever between data and noise it is asked."""
    return noise - data


def mse(predicted: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean squared error; of clips in the proportions of weight [B], such as `cosmap(sigma)`, where one is given."""
    error = jnp.square(predicted - target)
    return error.mean() if weight is None else (_rows(weight, error.ndim) * error).mean()


def cosmap(sigma: jax.Array) -> jax.Array:
    """Weights of the loss by noise level, 2 / (pi * (1 - 2 sigma + 2 sigma^2)): 0.64 at both ends, 1.27 in the middle.

    The density CosMap of arXiv 2403.03206 as a weight, as diffusers' trainers have it; its mean over levels is 1.
    """
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


def kept(key: jax.Array, size: int, rate: float) -> jax.Array:
    """bool [size]: which rows keep their condition when each loses it with probability `rate`.

    Raises:
      ValueError: a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: got {rate!r}; give a probability, 0 to 1")
    return jax.random.uniform(key, (size,)) >= rate


def drop_captions(key: jax.Array, conditions: Conditions, empty: jax.Array, rate: float = 0.1) -> Conditions:
    """Some clips get the empty caption, so that the model also learns what guidance starts from.

    Args:
      empty: [text_length, text_dim], the text encoder's output of "" as `conditioning.pad_text` leaves it. Zeros are
        another caption, which Wan2.1's sampling never gives the model.
      rate: of clips.
    """
    keep = kept(key, conditions.text.shape[0], rate)
    return conditions.replace(text=_choose(keep, conditions.text, jnp.broadcast_to(empty, conditions.text.shape)))


def drop_keyframes(key: jax.Array, conditions: Conditions, without: Conditions, rate: float) -> Conditions:
    """Some clips lose keyframes: their images and latent are those of `without`, their text stays.

    Args:
      without: the same clips told by fewer keyframes, such as the first alone: vision tokens zero where an image is
        gone, mask and latent of a keyframe video that is gray there (`conditioning`). It takes the autoencoder to make
        and so cannot be had from `conditions`.
      rate: of clips.
    """
    keep = kept(key, conditions.text.shape[0], rate)
    images, latent = (jax.tree.map(partial(_choose, keep), getattr(conditions, name), getattr(without, name))
                      for name in ("images", "latent"))  # fmt: skip
    return conditions.replace(images=images, latent=latent)


def _choose(keep: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(_rows(keep, one.ndim), one, other)


def _rows(x: jax.Array, ndim: int) -> jax.Array:
    """[B] as [B, 1, 1, ...] of so many axes."""
    return x.reshape(x.shape[0], *[1] * (ndim - 1))
