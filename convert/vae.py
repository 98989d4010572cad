"""Tensor names of the causal video autoencoder: diffusers layout (`vae/`) and original Wan2.1 layout."""

import itertools
from dataclasses import dataclass
from typing import Any

from convert.keymap import CONV2D, CONV3D, Rule, Transform, channel, patch
from wanjax.config import VAEConfig

POINT2D = patch((1, 1))
POINT3D = patch((1, 1, 1))


@dataclass(frozen=True)
class _Names:
    """How a layout calls the layers.

    Attributes:
      quant: the convolutions behind the encoder and before the decoder.
      ends: of each side first convolution, middle block, attention, middle block, last norm, last convolution.
      block: of a residual block norm, convolution, norm, convolution, shortcut.
      down: n-th layer of the encoder, blocks and resamplers in one count.
      up, upsampler: of the decoder, by level, block in it, and count as in the encoder.
    """

    quant: tuple[str, ...]
    ends: tuple[str, ...]
    block: tuple[str, ...]
    down: str
    up: str
    upsampler: str


DIFFUSERS = _Names(
    ("quant_conv", "post_quant_conv"),
    ("conv_in", "mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1", "norm_out", "conv_out"),
    ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    "encoder.down_blocks.{n}",
    "decoder.up_blocks.{level}.resnets.{block}",
    "decoder.up_blocks.{level}.upsamplers.0",
)
ORIGINAL = _Names(
    ("conv1", "conv2"),
    ("conv1", "middle.0", "middle.1", "middle.2", "head.0", "head.2"),
    ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
    "encoder.downsamples.{n}",
    "decoder.upsamples.{n}",
    "decoder.upsamples.{n}",
)


def diffusers(config: VAEConfig) -> list[Rule]:
    """Rules for `AutoencoderKLWan` of any width, depth and temporal pattern."""
    return _rules(config, DIFFUSERS)


def original(config: VAEConfig) -> list[Rule]:
    """Rules for `Wan2.1_VAE.pth`, where the layers of each side are counted in one list."""
    return _rules(config, ORIGINAL)


def diffusers_config(config: VAEConfig) -> dict[str, Any]:
    """What stands in the `config.json` beside those tensors ("temperal" is the reference's spelling)."""
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.base_dim,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.dim_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample),
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
        "scale_factor_temporal": config.temporal_stride,
        "scale_factor_spatial": config.spatial_stride,
    }


def _rules(config: VAEConfig, names: _Names) -> list[Rule]:
    return [
        *_conv("quant", names.quant[0], POINT3D),
        *_conv("post_quant", names.quant[1], POINT3D),
        *_ends("encoder", names),
        *_encoder(config, names),
        *_ends("decoder", names),
        *_decoder(config, names),
    ]


def _conv(ours: str, theirs: str, transform: Transform = CONV3D) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", transform), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _res_block(ours: str, theirs: str, names: _Names, shortcut: bool = False) -> list[Rule]:
    rules = []
    for i, (norm, conv) in enumerate((names.block[:2], names.block[2:4]), 1):
        rules.append(Rule(f"{ours}/norm{i}/gamma", f"{theirs}.{norm}.gamma", channel(3)))
        rules += _conv(f"{ours}/conv{i}", f"{theirs}.{conv}")
    return rules + (_conv(f"{ours}/shortcut", f"{theirs}.{names.block[4]}", POINT3D) if shortcut else [])


def _resample(ours: str, theirs: str, temporal: bool) -> list[Rule]:
    rules = _conv(f"{ours}/spatial", f"{theirs}.resample.1", CONV2D)
    return rules + (_conv(f"{ours}/temporal", f"{theirs}.time_conv") if temporal else [])


def _ends(side: str, names: _Names) -> list[Rule]:
    """What encoder and decoder have alike: first convolution, middle, head."""
    first, res_0, attention, res_1, norm, last = (f"{side}.{name}" for name in names.ends)
    return [
        *_conv(f"{side}/conv_in", first),
        *_res_block(f"{side}/middle/res_0", res_0, names),
        Rule(f"{side}/middle/attention/norm/gamma", f"{attention}.norm.gamma", channel(2)),
        *_conv(f"{side}/middle/attention/qkv", f"{attention}.to_qkv", POINT2D),
        *_conv(f"{side}/middle/attention/proj", f"{attention}.proj", POINT2D),
        *_res_block(f"{side}/middle/res_1", res_1, names),
        Rule(f"{side}/head/norm/gamma", f"{norm}.gamma", channel(3)),
        *_conv(f"{side}/head/conv", last),
    ]


def _encoder(config: VAEConfig, names: _Names) -> list[Rule]:
    rules, width, count = [], config.base_dim, itertools.count()
    for i, mult in enumerate(config.dim_mult):
        level = f"encoder/level_{i}"
        for j in range(config.num_res_blocks):
            theirs, shortcut = names.down.format(n=next(count)), width != config.base_dim * mult
            rules += _res_block(f"{level}/res_{j}", theirs, names, shortcut)
            width = config.base_dim * mult
        if i < len(config.temporal_downsample):
            theirs = names.down.format(n=next(count))
            rules += _resample(f"{level}/resample", theirs, config.temporal_downsample[i])
    return rules


def _decoder(config: VAEConfig, names: _Names) -> list[Rule]:
    rules, width, count = [], config.base_dim * config.dim_mult[-1], itertools.count()
    for i, mult in enumerate(config.dim_mult[::-1]):
        level = f"decoder/level_{i}"
        for j in range(config.num_res_blocks + 1):
            theirs, shortcut = names.up.format(level=i, block=j, n=next(count)), width != config.base_dim * mult
            rules += _res_block(f"{level}/res_{j}", theirs, names, shortcut)
            width = config.base_dim * mult
        if i < len(config.temporal_downsample):
            theirs = names.upsampler.format(level=i, n=next(count))
            rules += _resample(f"{level}/resample", theirs, config.temporal_downsample[::-1][i])
            width //= 2
    return rules
