"""Shape and dtype of every parameter, written down: what `init` of the four models makes, without tracing it; and what
the transformer is given.

Tracing takes seconds, mostly in initialisers whose numbers nobody wants; `tests/test_shapes.py` holds both to be equal.
Names and roles are those of the modules in `dit`, `vae`, `umt5` and `clip`; blocks carry the layer axis in front.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from wanjax.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config, VAEConfig

Tree = dict[str, Any]


def param_shapes(config: ModelConfig) -> dict[str, Tree]:
    """Shape and dtype of every parameter, by model, as `jax.ShapeDtypeStruct`s; traces and allocates nothing.

    Returns:
      {"dit", "vae", "umt5", "clip"} -> nested dict; "clip" is absent for text-to-video.
    """
    shapes = {"dit": dit(config.dit), "vae": vae(config.vae), "umt5": umt5(config.umt5)}
    return shapes if config.clip is None else shapes | {"clip": clip(config.clip)}


def condition_shapes(
    c: DiTConfig, batch: int, grid: tuple[int, int, int], images: int | None = None
) -> dict[str, tuple[int | str, ...] | None]:
    """Shape of each field of `types.Conditions` that a transformer takes; None where it takes none.

    Args:
      grid: (F, h, w) of the latents.
      images: M; None is what the model was trained with, or for one that takes any number the letter.
    """
    count = images or ("M" if c.num_images == 1 else c.num_images)
    return {
        "text": (batch, c.text_length, c.text_dim),
        "images": (batch, count, c.image_tokens, c.image_dim) if c.num_images else None,
        "latent": (batch, *grid, c.condition_channels) if c.condition_channels else None,
    }


def _leaf(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def _dense(inputs: int, outputs: int, dtype: str, bias: bool = True, eight: str | None = None) -> Tree:
    """A linear layer; `eight` is the dtype of 8-bit codes."""
    factor = {"factor": _leaf("float32", 1, outputs)} if eight else {}
    offset = {"bias": _leaf(dtype, outputs)} if bias else {}
    return {"kernel": _leaf(eight or dtype, inputs, outputs)} | factor | offset


def _norm(width: int, bias: bool = True) -> Tree:
    """A norm's affine part, float32 under every policy."""
    return {"scale": _leaf("float32", width)} | ({"bias": _leaf("float32", width)} if bias else {})


def _stacked(tree: Tree, layers: int) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype), tree)


def dit(c: DiTConfig) -> Tree:
    """Parameters of `wanjax.dit.WanDiT`."""
    d, param, full = c.dim, np.dtype(c.precision.param).name, "float32"
    patch = math.prod(c.patch_size)
    product = functools.partial(_dense, dtype=param, eight=c.precision.kernel)
    self_attn = {name: product(d, d) for name in "qkvo"}
    cross_attn = {name: product(d, d) for name in "qkvo"}
    for attn in (self_attn, cross_attn):
        attn |= {"norm_q": _norm(d, bias=False), "norm_k": _norm(d, bias=False)}
    if c.num_images:
        cross_attn |= {name: product(d, d) for name in ("k_image", "v_image")}
        cross_attn["norm_k_image"] = _norm(d, bias=False)
    block = {
        "modulation": _leaf(full, 6, d),
        "self_attn": self_attn,
        "cross_norm": _norm(d),
        "cross_attn": cross_attn,
        "ffn_in": product(d, c.ffn_dim),
        "ffn_out": product(c.ffn_dim, d),
    }
    tree = {
        "patch_embed": _dense(patch * c.in_channels, d, param),
        "time_in": _dense(c.freq_dim, d, full),
        "time_out": _dense(d, d, full),
        "time_modulation": _dense(d, 6 * d, full),
        "text_in": _dense(c.text_dim, d, param),
        "text_out": _dense(d, d, param),
        "blocks": _stacked(block, c.num_layers),
        "head_modulation": _leaf(full, 2, d),
        "head": _dense(d, patch * c.out_channels, full),
    }
    if not c.num_images:
        return tree
    width = c.image_dim
    embed = {"norm_in": _norm(width), "in": _dense(width, width, param), "out": _dense(width, d, param),
             "norm_out": _norm(d)}  # fmt: skip
    if c.num_images == 2:  # first and last are told apart
        embed["position"] = _leaf(param, 2 * c.image_tokens, width)
    return tree | {"image_embed": embed}


def umt5(c: UMT5Config) -> Tree:
    """Parameters of `wanjax.umt5.UMT5Encoder`."""
    param, width = np.dtype(c.precision.param).name, c.num_heads * c.head_dim
    attn = {name: _dense(c.dim, width, param, bias=False) for name in "qkv"}
    attn |= {"o": _dense(width, c.dim, param, bias=False), "position_bias": _leaf(param, c.num_buckets, c.num_heads)}
    block = {
        "attn_norm": _norm(c.dim, bias=False),
        "attn": attn,
        "ffn_norm": _norm(c.dim, bias=False),
        "ffn_gate": _dense(c.dim, c.ffn_dim, param, bias=False),
        "ffn_in": _dense(c.dim, c.ffn_dim, param, bias=False),
        "ffn_out": _dense(c.ffn_dim, c.dim, param, bias=False),
    }
    return {
        "token_embed": _leaf(param, c.vocab_size, c.dim),
        "blocks": _stacked(block, c.num_layers),
        "final_norm": _norm(c.dim, bias=False),
    }


def clip(c: CLIPConfig) -> Tree:
    """Parameters of `wanjax.clip.CLIPVision`."""
    d, param = c.dim, np.dtype(c.precision.param).name
    block = {
        "attn_norm": _norm(d),
        "attn": {name: _dense(d, d, param) for name in "qkvo"},
        "ffn_norm": _norm(d),
        "ffn_in": _dense(d, c.ffn_dim, param),
        "ffn_out": _dense(c.ffn_dim, d, param),
    }
    return {
        "patch_embed": _dense(c.patch_size**2 * 3, d, param, bias=False),
        "class_embed": _leaf(param, d),
        "position_embed": _leaf(param, c.num_tokens, d),
        "pre_norm": _norm(d),
        "blocks": _stacked(block, c.num_layers),
    }


def vae(c: VAEConfig) -> Tree:
    """Parameters of `wanjax.vae.WanVAE`."""
    param, latent = np.dtype(c.precision.param).name, c.latent_channels
    widths = [c.base_dim * mult for mult in c.dim_mult]
    encoder = {"conv_in": _conv(3, c.base_dim, param), "middle": _middle(widths[-1], param)}
    decoder = {"conv_in": _conv(latent, widths[-1], param), "middle": _middle(widths[-1], param)}
    before = c.base_dim
    for i, (width, temporal) in enumerate(zip(widths, (*c.temporal_downsample, None), strict=True)):
        level = encoder[f"level_{i}"] = _res_blocks(before, width, c.num_res_blocks, param)
        if temporal is not None:
            level["resample"] = _resample(width, width, width, bool(temporal), param)
        before = width
    encoder["head"] = _head(before, 2 * latent, param)
    before = widths[-1]
    for i, (width, temporal) in enumerate(zip(widths[::-1], (*c.temporal_downsample[::-1], None), strict=True)):
        level = decoder[f"level_{i}"] = _res_blocks(before, width, c.num_res_blocks + 1, param)
        if temporal is not None:  # half the width goes on
            level["resample"] = _resample(width, width // 2, 2 * width, bool(temporal), param)
            width //= 2
        before = width
    decoder["head"] = _head(before, 3, param)
    return {
        "encoder": encoder,
        "decoder": decoder,
        "quant": _dense(2 * latent, 2 * latent, param),
        "post_quant": _dense(latent, latent, param),
    }


def _conv(inputs: int, outputs: int, dtype: str, size: Sequence[int] = (3, 3, 3)) -> Tree:
    return {"kernel": _leaf(dtype, *size, inputs, outputs), "bias": _leaf(dtype, outputs)}


def _gamma(width: int, dtype: str) -> Tree:
    return {"gamma": _leaf(dtype, width)}


def _res_block(inputs: int, outputs: int, dtype: str) -> Tree:
    tree = {"norm1": _gamma(inputs, dtype), "conv1": _conv(inputs, outputs, dtype),
            "norm2": _gamma(outputs, dtype), "conv2": _conv(outputs, outputs, dtype)}  # fmt: skip
    return tree if inputs == outputs else tree | {"shortcut": _dense(inputs, outputs, dtype)}


def _res_blocks(inputs: int, outputs: int, blocks: int, dtype: str) -> Tree:
    return {f"res_{i}": _res_block(outputs if i else inputs, outputs, dtype) for i in range(blocks)}


def _resample(width: int, spatial: int, temporal_width: int, temporal: bool, dtype: str) -> Tree:
    tree = {"spatial": _conv(width, spatial, dtype, (3, 3))}
    return tree | ({"temporal": _conv(width, temporal_width, dtype, (3, 1, 1))} if temporal else {})


def _middle(width: int, dtype: str) -> Tree:
    attention = {"norm": _gamma(width, dtype), "qkv": _dense(width, 3 * width, dtype),
                 "proj": _dense(width, width, dtype)}  # fmt: skip
    return {"res_0": _res_block(width, width, dtype), "attention": attention, "res_1": _res_block(width, width, dtype)}


def _head(inputs: int, outputs: int, dtype: str) -> Tree:
    return {"norm": _gamma(inputs, dtype), "conv": _conv(inputs, outputs, dtype)}
