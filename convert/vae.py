"""Tensor names of the causal video autoencoder: diffusers layout (`vae/`) and original Wan2.1 layout."""

from typing import Any

from convert.keymap import CONV2D, CONV3D, Rule, Transform, channel, patch
from wanjax.config import VAEConfig

POINT2D = patch((1, 1))
POINT3D = patch((1, 1, 1))


def diffusers(config: VAEConfig) -> list[Rule]:
    """Rules for `AutoencoderKLWan` of any width, depth and temporal pattern."""
    return [
        *_encoder(config),
        *_conv("quant", "quant_conv", POINT3D),
        *_conv("post_quant", "post_quant_conv", POINT3D),
        *_decoder(config),
    ]


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


def _conv(ours: str, theirs: str, transform: Transform = CONV3D) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", transform), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _res_block(ours: str, theirs: str, shortcut: bool = False) -> list[Rule]:
    rules = []
    for i in ("1", "2"):
        rules.append(Rule(f"{ours}/norm{i}/gamma", f"{theirs}.norm{i}.gamma", channel(3)))
        rules += _conv(f"{ours}/conv{i}", f"{theirs}.conv{i}")
    return rules + (_conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut", POINT3D) if shortcut else [])


def _resample(ours: str, theirs: str, temporal: bool) -> list[Rule]:
    rules = _conv(f"{ours}/spatial", f"{theirs}.resample.1", CONV2D)
    return rules + (_conv(f"{ours}/temporal", f"{theirs}.time_conv") if temporal else [])


def _ends(side: str) -> list[Rule]:
    """What encoder and decoder have alike: first convolution, middle, head."""
    middle = f"{side}.mid_block"
    return [
        *_conv(f"{side}/conv_in", f"{side}.conv_in"),
        *_res_block(f"{side}/middle/res_0", f"{middle}.resnets.0"),
        Rule(f"{side}/middle/attention/norm/gamma", f"{middle}.attentions.0.norm.gamma", channel(2)),
        *_conv(f"{side}/middle/attention/qkv", f"{middle}.attentions.0.to_qkv", POINT2D),
        *_conv(f"{side}/middle/attention/proj", f"{middle}.attentions.0.proj", POINT2D),
        *_res_block(f"{side}/middle/res_1", f"{middle}.resnets.1"),
        Rule(f"{side}/head/norm/gamma", f"{side}.norm_out.gamma", channel(3)),
        *_conv(f"{side}/head/conv", f"{side}.conv_out"),
    ]


def _encoder(config: VAEConfig) -> list[Rule]:
    rules, width, index = _ends("encoder"), config.base_dim, 0
    for i, mult in enumerate(config.dim_mult):
        level = f"encoder/level_{i}"
        # Their blocks and resamplers are counted in one list.
        for j in range(config.num_res_blocks):
            theirs = f"encoder.down_blocks.{index}"
            rules += _res_block(f"{level}/res_{j}", theirs, width != config.base_dim * mult)
            width, index = config.base_dim * mult, index + 1
        if i < len(config.temporal_downsample):
            theirs = f"encoder.down_blocks.{index}"
            rules += _resample(f"{level}/resample", theirs, config.temporal_downsample[i])
            index += 1
    return rules


def _decoder(config: VAEConfig) -> list[Rule]:
    rules, width = _ends("decoder"), config.base_dim * config.dim_mult[-1]
    for i, mult in enumerate(config.dim_mult[::-1]):
        level, theirs = f"decoder/level_{i}", f"decoder.up_blocks.{i}"
        for j in range(config.num_res_blocks + 1):
            shortcut = width != config.base_dim * mult
            rules += _res_block(f"{level}/res_{j}", f"{theirs}.resnets.{j}", shortcut)
            width = config.base_dim * mult
        if i < len(config.temporal_downsample):
            temporal = config.temporal_downsample[::-1][i]
            rules += _resample(f"{level}/resample", f"{theirs}.upsamplers.0", temporal)
            width //= 2
    return rules


def original(config: VAEConfig) -> list[Rule]:
    """Rules for `Wan2.1_VAE.pth`, where the layers of each side are counted in one list."""
    return [
        *_conv("quant", "conv1", POINT3D),
        *_conv("post_quant", "conv2", POINT3D),
        *_original_ends("encoder"),
        *_original_encoder(config),
        *_original_ends("decoder"),
        *_original_decoder(config),
    ]


def _original_res_block(ours: str, theirs: str, shortcut: bool = False) -> list[Rule]:
    rules = []
    for i, (norm, conv) in enumerate(((0, 2), (3, 6)), 1):
        rules.append(Rule(f"{ours}/norm{i}/gamma", f"{theirs}.residual.{norm}.gamma", channel(3)))
        rules += _conv(f"{ours}/conv{i}", f"{theirs}.residual.{conv}")
    return rules + (_conv(f"{ours}/shortcut", f"{theirs}.shortcut", POINT3D) if shortcut else [])


def _original_ends(side: str) -> list[Rule]:
    middle = f"{side}.middle"
    return [
        *_conv(f"{side}/conv_in", f"{side}.conv1"),
        *_original_res_block(f"{side}/middle/res_0", f"{middle}.0"),
        Rule(f"{side}/middle/attention/norm/gamma", f"{middle}.1.norm.gamma", channel(2)),
        *_conv(f"{side}/middle/attention/qkv", f"{middle}.1.to_qkv", POINT2D),
        *_conv(f"{side}/middle/attention/proj", f"{middle}.1.proj", POINT2D),
        *_original_res_block(f"{side}/middle/res_1", f"{middle}.2"),
        Rule(f"{side}/head/norm/gamma", f"{side}.head.0.gamma", channel(3)),
        *_conv(f"{side}/head/conv", f"{side}.head.2"),
    ]


def _original_encoder(config: VAEConfig) -> list[Rule]:
    rules, width, index = [], config.base_dim, 0
    for i, mult in enumerate(config.dim_mult):
        level = f"encoder/level_{i}"
        for j in range(config.num_res_blocks):
            shortcut = width != config.base_dim * mult
            rules += _original_res_block(f"{level}/res_{j}", f"encoder.downsamples.{index}", shortcut)
            width, index = config.base_dim * mult, index + 1
        if i < len(config.temporal_downsample):
            temporal = config.temporal_downsample[i]
            rules += _resample(f"{level}/resample", f"encoder.downsamples.{index}", temporal)
            index += 1
    return rules


def _original_decoder(config: VAEConfig) -> list[Rule]:
    rules, width, index = [], config.base_dim * config.dim_mult[-1], 0
    for i, mult in enumerate(config.dim_mult[::-1]):
        level = f"decoder/level_{i}"
        for j in range(config.num_res_blocks + 1):
            shortcut = width != config.base_dim * mult
            rules += _original_res_block(f"{level}/res_{j}", f"decoder.upsamples.{index}", shortcut)
            width, index = config.base_dim * mult, index + 1
        if i < len(config.temporal_downsample):
            temporal = config.temporal_downsample[::-1][i]
            rules += _resample(f"{level}/resample", f"decoder.upsamples.{index}", temporal)
            width, index = width // 2, index + 1
    return rules
