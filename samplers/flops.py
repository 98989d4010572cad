"""Floating-point operations of the models by formula, part by part.

Counted are matrix products and convolutions, two operations a multiply-add; norms, activations, softmax and
other elementwise work (about one percent at full size) are not. Axis letters as in `wanjax.types`.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from wanjax.config import DiTConfig, VAEConfig

Count = dict[str, int]
"""Operations by the name of the part."""


def total(count: Mapping[str, int]) -> int:
    """Operations of all parts together."""
    return sum(count.values())


def tokens(config: DiTConfig, latent_grid: tuple[int, int, int]) -> int:
    """Video tokens S of latents (F, h, w)."""
    return math.prod(latent_grid) // math.prod(config.patch_size)


def dit(config: DiTConfig, latent_grid: tuple[int, int, int], batch: int = 1) -> Count:
    """One evaluation of the diffusion transformer. A guided step is two of them, in either guidance mode.

    Args:
      latent_grid: latent frames, height and width (F, h, w).
      batch: number of samples B.
    """
    c, s, d = config, tokens(config, latent_grid), config.dim
    image = c.num_images * c.image_tokens
    keys = c.text_length + image
    patch = math.prod(c.patch_size)
    per_layer = {
        "self-attention projections": 4 * s * d * d,
        "self-attention scores": 2 * s * s * d,
        "cross-attention": 2 * s * d * d + 2 * keys * d * d + 2 * s * keys * d,
        "ffn": 2 * s * d * c.ffn_dim,
    }
    embedders = s * patch * c.in_channels * d
    embedders += c.freq_dim * d + d * d + 6 * d * d
    embedders += c.text_length * (c.text_dim * d + d * d)
    if image:
        embedders += image * (c.image_dim * c.image_dim + c.image_dim * d)
    products = {part: c.num_layers * n for part, n in per_layer.items()}
    products |= {"embedders": embedders, "head": s * d * patch * c.out_channels}
    return {part: 2 * batch * n for part, n in products.items()}


def kab(
    config: DiTConfig, latent_grid: tuple[int, int, int], layers: int = 1, batch: int = 1, anchors: int = 2
) -> Count:
    """What KAB adds to one evaluation that has it in `layers` layers: the anchors' frames are attended from once more.

    A frame's logits serve its frame attention and its output; a bias adds no product, nor do isolated images.

    Args:
      anchors: A, keyframes that others are anchored to.
    """
    c = config
    a_key = 4 * batch * layers * anchors * _frame_tokens(c, latent_grid) * c.dim  # q k^T, and probabilities times v
    return {"anchors to text": a_key * c.text_length, "anchors to images": a_key * c.num_images * c.image_tokens}


def kab_bytes(
    config: DiTConfig, latent_grid: tuple[int, int, int], layers: int = 1, batch: int = 1, anchors: int = 2
) -> Count:
    """Bytes of logits and probabilities written and read for KAB where no kernel is fused across a softmax.

    Both are of one frame at a time, [B, N, Q, K]; over the F frames and A anchors B * N * (F + A) * Q * K numbers.
    "frame attention": logits written by the product and read by the softmax, probabilities written and read by the
    mean; all in the softmax dtype. "biased attention": the same logits read again, probabilities written and read in
    the compute dtype. Without KAB a fused kernel (cuDNN) moves none of it.
    """
    keys = config.text_length + config.num_images * config.image_tokens
    queries = tokens(config, latent_grid) + anchors * _frame_tokens(config, latent_grid)
    numbers = batch * layers * config.num_heads * queries * keys
    softmax, compute = (jnp.dtype(name).itemsize for name in (config.precision.softmax, config.precision.compute))
    return {"frame attention": 4 * softmax * numbers, "biased attention": (softmax + 2 * compute) * numbers}


def _frame_tokens(config: DiTConfig, latent_grid: tuple[int, int, int]) -> int:
    """Tokens Q of one token frame."""
    return tokens(config, (config.patch_size[0], *latent_grid[1:]))


def vae_encode(config: VAEConfig, frames: int, size: tuple[int, int], batch: int = 1) -> Count:
    """Encoding a video of `frames` pixel frames of `size` (height, width), as many as the model takes."""
    later = (frames - 1) // config.temporal_stride
    return _chunks(_encode_chunk(config, size, True), _encode_chunk(config, size, False), later, batch)


def vae_decode(config: VAEConfig, frames: int, size: tuple[int, int], batch: int = 1) -> Count:
    """Decoding to a video of `frames` pixel frames of `size` (height, width)."""
    later = (frames - 1) // config.temporal_stride
    return _chunks(_decode_chunk(config, size, True), _decode_chunk(config, size, False), later, batch)


def _chunks(first: Count, later: Count, number: int, batch: int) -> Count:
    return {part: 2 * batch * (first[part] + number * later[part]) for part in first}


def _kernel(first: bool) -> int:
    """Places of a 3x3x3 kernel that do work: in a first chunk two of three frames are the zeros before it."""
    return 9 if first else 27


def _res_block(positions: int, width_in: int, width: int, kernel: int) -> int:
    """Multiply-adds of two 3x3x3 convolutions and, where the width changes, the projected skip."""
    skip = width_in * width if width_in != width else 0
    return positions * (kernel * width_in * width + kernel * width * width + skip)


def _middle(frames: int, positions: int, width: int, kernel: int) -> Count:
    attention = frames * positions * (4 * width * width + 2 * positions * width)
    return {
        "convolutions": 2 * _res_block(frames * positions, width, width, kernel),
        "attention": attention,
    }


def _encode_chunk(config: VAEConfig, size: tuple[int, int], first: bool) -> Count:
    """Multiply-adds of one encoder chunk; the first has one frame and no temporal downsampling."""
    frames, positions = 1 if first else config.temporal_stride, size[0] * size[1]
    width, kernel = config.base_dim, _kernel(first)
    convolutions = frames * positions * kernel * 3 * width
    for i, mult in enumerate(config.dim_mult):
        for _ in range(config.num_res_blocks):
            convolutions += _res_block(frames * positions, width, config.base_dim * mult, kernel)
            width = config.base_dim * mult
        if i < len(config.temporal_downsample):
            positions //= 4
            convolutions += frames * positions * 9 * width * width
            if config.temporal_downsample[i] and not first:
                frames //= 2
                convolutions += frames * positions * 3 * width * width
    moments = 2 * config.latent_channels
    middle = _middle(frames, positions, width, kernel)
    ends = frames * positions * (kernel * width * moments + moments * moments)
    return {
        "convolutions": convolutions + middle["convolutions"] + ends,
        "attention": middle["attention"],
    }


def _decode_chunk(config: VAEConfig, size: tuple[int, int], first: bool) -> Count:
    """Multiply-adds of one decoder chunk, one latent frame; the first has no temporal upsampling."""
    frames, positions, kernel = 1, size[0] * size[1] // config.spatial_stride**2, _kernel(first)
    latent, width = config.latent_channels, config.base_dim * config.dim_mult[-1]
    middle = _middle(frames, positions, width, kernel)
    convolutions = positions * (latent * latent + kernel * latent * width) + middle["convolutions"]
    for i, mult in enumerate(config.dim_mult[::-1]):
        for _ in range(config.num_res_blocks + 1):
            convolutions += _res_block(frames * positions, width, config.base_dim * mult, kernel)
            width = config.base_dim * mult
        if i < len(config.temporal_downsample):
            if config.temporal_downsample[::-1][i] and not first:
                convolutions += frames * positions * 3 * width * 2 * width
                frames *= 2
            positions *= 4
            convolutions += frames * positions * 9 * width * (width // 2)
            width //= 2
    convolutions += frames * positions * kernel * width * 3
    return {"convolutions": convolutions, "attention": middle["attention"]}
