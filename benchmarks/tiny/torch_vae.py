"""The tiny model's VAE in torch, on `diffusers`' AutoencoderKLWan, in one pass over the whole sequence.

`diffusers` runs four frames at a time; every causal convolution starts from zeros either way, so the results are the
same, and training is faster. Axis letters: B batch, C channels, T frames, H height, W width; channels first.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)

from benchmarks.tiny.latents import write_vae
from wanjax.checkpoint import Model

CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 4,
}
INITIAL_LOG_VARIANCE = -6.0


def conv(module: WanCausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """Causal convolution of a whole sequence; one frame needs only the last temporal tap."""
    if x.shape[2] == 1 and module.stride[0] == 1:
        pad = module._padding[0]
        return F.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, padding=pad)[:, :, None]
    return module(x)


def norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """SiLU of the RMS norm over channels of [B, C, N], with gamma [C, 1]: WanRMS_norm, then F.silu."""
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
    return F.silu(wide * (inverse * x.shape[1] ** 0.5) * gamma).to(x.dtype)


@functools.cache
def _fused_norm_silu() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`norm_silu` as one kernel where torch finds a C++ compiler: it is a third of a step otherwise."""
    if shutil.which("g++") is None:
        return norm_silu
    torch._dynamo.config.recompile_limit = 64  # one kernel for every number of channels and layout
    return torch.compile(norm_silu, dynamic=True)


def activate(module: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    """The norm and SiLU before every convolution."""
    return _fused_norm_silu()(x.flatten(2), module.gamma.flatten(1)).view(x.shape)


def residual(module: WanResidualBlock, x: torch.Tensor) -> torch.Tensor:
    """A residual block over a whole sequence, [B, C, T, H, W] to [B, C', T, H, W]."""
    shortcut = conv(module.conv_shortcut, x) if isinstance(module.conv_shortcut, WanCausalConv3d) else x
    x = conv(module.conv1, activate(module.norm1, x))
    return conv(module.conv2, activate(module.norm2, x)) + shortcut


def resample(module: WanResample, x: torch.Tensor) -> torch.Tensor:
    """Resample a whole sequence.

    The first frame is a group of its own in the chunked run: it skips the temporal convolution in both directions,
    and is invisible to the upsampling one.
    """
    if module.mode == "upsample3d" and x.shape[2] > 1:
        pairs = module.time_conv(x[:, :, 1:])
        batch, channels, frames, height, width = pairs.shape
        pairs = pairs.view(batch, 2, channels // 2, frames, height, width).permute(0, 2, 3, 1, 4, 5)
        x = torch.cat([x[:, :, :1], pairs.reshape(batch, channels // 2, 2 * frames, height, width)], dim=2)
    batch, frames = x.shape[0], x.shape[2]
    x = module.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
    if module.mode == "downsample3d" and frames > 1:
        x = torch.cat([x[:, :, :1], module.time_conv(x)], dim=2)
    return x


def _run(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, WanResidualBlock):
        return residual(layer, x)
    if isinstance(layer, WanResample):
        return resample(layer, x)
    if isinstance(layer, WanAttentionBlock):
        return layer(x)
    raise TypeError(f"no whole-sequence form of {type(layer).__name__}")


def _middle(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = residual(block.resnets[0], x)
    for attention, block_residual in zip(block.attentions, block.resnets[1:], strict=True):
        x = residual(block_residual, attention(x))
    return x


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents, each [B, 16, F, h, w], of video [B, 3, T, H, W] in [-1, 1].

    Equal to `vae.encode` (which works in chunks of four frames), but one pass over the whole sequence: every
    causal convolution starts from zeros either way.
    """
    x = conv(vae.encoder.conv_in, video)
    for layer in vae.encoder.down_blocks:
        x = _run(layer, x)
    x = _middle(vae.encoder.mid_block, x)
    x = conv(vae.encoder.conv_out, activate(vae.encoder.norm_out, x))
    mean, log_variance = conv(vae.quant_conv, x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Video [B, 3, T, H, W] of latents [B, 16, F, h, w]: `vae.decode` in one pass, and without its final clamp."""
    x = conv(vae.decoder.conv_in, conv(vae.post_quant_conv, latents))
    x = _middle(vae.decoder.mid_block, x)
    for block in vae.decoder.up_blocks:
        for layer in block.resnets:
            x = _run(layer, x)
        if block.upsamplers is not None:
            x = _run(block.upsamplers[0], x)
    return conv(vae.decoder.conv_out, activate(vae.decoder.norm_out, x))


def new_vae() -> AutoencoderKLWan:
    """An untrained VAE, seeded by torch's global generator.

    Kernels keep the variance of a single frame, of which only the last temporal tap sees anything: with torch's own
    initialisation the signal fades so much from end to end that training loses its first minutes. Residual branches
    start small. The log-variance starts small too, so that the latents are not drowned in noise.
    """
    vae = AutoencoderKLWan(**CONFIG)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
                fan_in = math.prod(module.weight.shape[1:]) / (module.weight.shape[2] if module.weight.ndim == 5 else 1)
                bound = math.sqrt(3.0 / fan_in) * (0.3 if name.endswith("conv2") else 1.0)
                module.weight.uniform_(-bound, bound)
                module.bias.zero_()
        vae.quant_conv.bias[CONFIG["z_dim"] :] = INITIAL_LOG_VARIANCE
        vae.quant_conv.weight[CONFIG["z_dim"] :] *= 0.05
    return vae


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Turn an image VAE into a video VAE that treats every frame alone, in place.

    Convolutions keep their last temporal tap (the present frame); the strided one of a downsampler passes the last
    frame of its window, the one of an upsampler repeats its frame.
    """
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:
            module.weight[:, :, :-1] = 0.0
    for module in vae.modules():
        if isinstance(module, WanResample) and module.mode.endswith("3d"):
            outputs, inputs = module.time_conv.weight.shape[:2]
            module.time_conv.weight.zero_()
            module.time_conv.bias.zero_()
            module.time_conv.weight[torch.arange(outputs), torch.arange(outputs) % inputs, -1, 0, 0] = 1.0


def as_torch(model: Model) -> AutoencoderKLWan:
    """The model's VAE in torch, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        write_vae(Path(folder), model.config.vae, jax.tree.map(np.asarray, model.part("vae")))
        vae = AutoencoderKLWan.from_pretrained(folder)
    return vae.eval()
