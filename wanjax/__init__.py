"""Generative inbetweening in JAX: Wan2.1 first/last-frame video diffusion as pure functions over arrays.

The public names; `samplers.pipeline` makes videos of them. Importing runs nothing on a device.
"""

from wanjax import attention, kab, method, retro, rope
from wanjax.checkpoint import CheckpointError, Model, load, param_shapes, save
from wanjax.clip import CLIPVision
from wanjax.config import CLIPConfig, DiTConfig, ModelConfig, SamplingDefaults, UMT5Config, VAEConfig, preset
from wanjax.dit import WanDiT
from wanjax.kab import KAB
from wanjax.keyframes import KeyframeError
from wanjax.method import METHODS, Isolation, Method
from wanjax.precision import BFLOAT16, FLOAT32, Precision
from wanjax.retro import ReTRo
from wanjax.tokenizer import PromptCut, Tokenizer
from wanjax.types import Branches, Conditions, CrossBias, CrossControl, RopeTable
from wanjax.umt5 import UMT5Encoder
from wanjax.vae import WanVAE

__version__ = "0.1.0"

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "KAB",
    "METHODS",
    "CLIPConfig",
    "Branches",
    "CLIPVision",
    "CheckpointError",
    "Conditions",
    "CrossBias",
    "CrossControl",
    "DiTConfig",
    "Isolation",
    "KeyframeError",
    "Method",
    "Model",
    "ModelConfig",
    "Precision",
    "PromptCut",
    "ReTRo",
    "RopeTable",
    "SamplingDefaults",
    "Tokenizer",
    "UMT5Config",
    "UMT5Encoder",
    "VAEConfig",
    "WanDiT",
    "WanVAE",
    "attention",
    "kab",
    "load",
    "method",
    "param_shapes",
    "preset",
    "retro",
    "rope",
    "save",
]
