"""Models that are close to Wan2.1's and are not run by wanjax, named for what they are."""

import re
from collections.abc import Iterable

from wanjax.config import DiTConfig

KNOWN = "wanjax runs Wan2.1's FLF2V, I2V, T2V and Fun-InP models"
"""The end of a refusal."""

NAMES: tuple[tuple[str, str], ...] = (
    (r"vace_patch_embedding\.|vace_blocks\.", "a VACE transformer"),
    (r"casual_audio_encoder\.|cond_encoder\.|trainable_cond_mask\.", "a Wan2.2 S2V transformer (speech to video)"),
    (r"face_adapter\.|motion_encoder\.|face_encoder\.", "a Wan2.2 Animate transformer"),
    (r"audio_proj\.|blocks\.\d+\.audio_cross_attn", "an audio-driven transformer (HuMo, MultiTalk, InfiniteTalk)"),
    (r"control_adapter\.", "a Fun-Camera transformer"),
    (r"ref_conv\.", "a Fun-Control transformer (ref_conv)"),
    (r"patch_embedding_(pose|mask|global)\.", "a SCAIL or WanDancer transformer"),
    (r"fps_embedding\.|fps_projection\.", "a SkyReels diffusion-forcing transformer"),
    (r"(blocks\.\d+\.)(cam_encoder|projector)\.", "a ReCamMaster transformer"),
    (r"controlnet_(blocks|patch_embedding)|control_layers\.", "a ControlNet of a transformer"),
    (r"encoder\.downsamples\.\d+\.downsamples\.|encoder\.down_blocks\.\d+\.(resnets|downsampler)\.",
     "the VAE of Wan2.2 TI2V-5B (or another family's)"),
    (r"(lora_A|lora_B|lora_down|lora_up)\b|(hada|lokr)_w1", "a LoRA; give it with --lora beside a transformer"),
    (r"(down|input)_blocks\.\d+\..*transformer_blocks\.|double_blocks\.|joint_blocks\.|single_transformer_blocks\.",
     "another family's transformer or UNet"),
)  # fmt: skip
"""Beginnings of tensor names (behind any dot) that only the model beside them has; the first that is found speaks."""


def by_name(names: Iterable[str]) -> str | None:
    """What a set of tensor names is, where it is none of ours."""
    text = "\n".join(names)
    return next((title for pattern, title in NAMES if re.search(rf"(?m)(?:^|\.)(?:{pattern})", text)), None)


def by_shape(config: DiTConfig) -> str | None:
    """What a transformer is, where its channels are none of ours.

    Wan2.2's models have Wan2.1's names; their channels and a missing image branch tell them.
    """
    channels, out, images = config.in_channels, config.out_channels, config.num_images
    if out == 48:
        kind = {48: "TI2V-5B", 100: "Fun-5B-InP"}.get(channels, "5B")
        return f"a Wan2.2 {kind} transformer ({channels} channels in, 48 out)"
    if not images and (channels, out) == (36, 16):
        return "a Wan2.2 I2V-A14B transformer (36 channels in and no image branch), one of that model's two"
    if not images and channels > out:
        return (
            f"a transformer with a condition of {channels - out} channels and no image branch, as of Wan2.2 Fun-Control"
        )
    if images and (channels, out) == (48, 16):
        return "a Fun-Control transformer (48 channels in)"
    return None


def by_folder(names: Iterable[str]) -> str | None:
    """What a folder is, from the names in it, where it holds a model of two transformers."""
    names = set(names)
    if {"high_noise_model", "low_noise_model"} & names or {"transformer", "transformer_2"} <= names:
        return "a Wan2.2 model of two transformers (high and low noise)"
    return None
