"""Frozen, validated configurations and the presets of the published models."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dacite

from wanjax.latent_rgb import WAN_RGB, LatentRGB
from wanjax.precision import FLOAT32, Precision
from wanjax.settings import check_finite, one_of, refuse

STREAMS = ("no", "program", "loop")
REMAT_KEEPS = ("nothing", "products")


@dataclass(frozen=True)
class DiTConfig:
    """Wan2.1 diffusion transformer. Defaults are FLF2V-14B.

    Attributes:
      in_channels: noisy latent + mask + conditioning latent channels.
      image_dim: width of the vision tokens; None for a text-to-video model without image branch.
      image_tokens: vision tokens of ONE keyframe (patches and the class token).
      num_images: 2 first and last keyframe (with `emb_pos`), 1 image-to-video (without), 0 text-to-video.
      remat: recompute block activations in the backward pass (training only).
      remat_keeps: what is not computed again then: "nothing", for the least memory, or "products" of matrices, which is
        faster than to keep everything where memory is slow, as on a CPU.
      attention: kernel of self- and cross-attention, a name in `attention.KERNELS`, or "auto", which
        `ModelConfig.for_platform` resolves.
      rotation: how pairs are rotated, a name in `rope.ROTATIONS`, or "auto", which is "pairs" here
        (`ModelConfig.for_platform` resolves it).
      stream: whether the blocks' kernels wait in host memory, and in which form they come: "no", "program" or "loop",
        see `streaming`.
    """

    num_layers: int = 40
    dim: int = 5120
    num_heads: int = 40
    ffn_dim: int = 13824
    in_channels: int = 36
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_length: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int | None = 1280
    image_tokens: int = 257
    num_images: int = 2
    remat: bool = False
    remat_keeps: str = "nothing"
    attention: str = "auto"
    rotation: str = "auto"
    stream: str = "no"
    precision: Precision = FLOAT32

    def __post_init__(self) -> None:
        images, blind, keeps = self.num_images, self.image_dim is None, self.remat_keeps
        refuse(
            (self.dim % self.num_heads, f"dit: dim {self.dim} is not a multiple of num_heads {self.num_heads}"),
            (self.head_dim % 2, f"dit: head width {self.head_dim} is odd; rotary pairs need it even"),
            (self.stream not in STREAMS, f"dit: stream {self.stream!r} is not one of {', '.join(STREAMS)}"),
            (keeps not in REMAT_KEEPS, f"dit: remat_keeps {keeps!r} is not one of {', '.join(REMAT_KEEPS)}"),
            (images not in (0, 1, 2), f"dit: num_images {images} is not 0, 1 or 2"),
            (blind != (images == 0), "dit: image_dim and num_images disagree: give both or neither"),
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels of `Conditions.latent` (0 for text-to-video)."""
        return self.in_channels - self.out_channels


@dataclass(frozen=True)
class VAEConfig:
    """Wan2.1 causal video autoencoder. Defaults are the published one.

    Attributes:
      temporal_downsample: one flag per spatial downsampling: does it halve time as well.
      latent_mean, latent_std: per channel, of the training data's latents; normalised = (z - mean) / std.
      latent_rgb: colours of latents for previews; None where nobody has fitted them (`preview_rgb`).
      conv3d: lowering of 3D convolutions: "conv3d"; "taps", a sum of 2D convolutions over the temporal taps; or
        "auto", which `ModelConfig.for_platform` resolves. Taps: decoding and encoding by the bundled model's VAE was 2
        to 4 times faster with them on a CPU (JAX 0.10.2, two cores); on GPUs they meet cuDNN's well-tuned NHWC
        kernels. TPUs take 3D convolutions natively.
      tiles: windows that the longer side of a picture is cut into, one after the other, for less memory at the price of
        their overlaps (`pieces`); the result is that of one window to float32's rounding. A picture that is too small
        for so many has fewer, and one that several devices share has one on each.
    """

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    latent_rgb: LatentRGB | None = None
    conv3d: str = "auto"
    tiles: int = 1
    precision: Precision = FLOAT32

    def __post_init__(self) -> None:
        form, levels, flags, z = self.conv3d, len(self.dim_mult), len(self.temporal_downsample), self.latent_channels
        refuse(
            (form not in ("auto", "conv3d", "taps"), f"vae: conv3d {form!r} is not auto, conv3d or taps"),
            (flags != levels - 1,
             f"vae: {levels} multipliers need {levels - 1} temporal_downsample flags, got {flags}"),
            ({len(self.latent_mean), len(self.latent_std)} != {z},
             f"vae: latent_mean and latent_std need {z} numbers each"),
            (self.latent_rgb is not None and len(self.latent_rgb.factors) != z,
             f"vae: latent_rgb needs {z} rows of factors"),
            (self.tiles < 1, f"vae: tiles {self.tiles}: give a whole number from 1"),
        )  # fmt: skip

    @property
    def preview_rgb(self) -> LatentRGB | None:
        """`latent_rgb`; without one that of Wan2.1's VAE, if the latents have the statistics of that."""
        published = VAEConfig.latent_mean, VAEConfig.latent_std
        return (
            WAN_RGB if self.latent_rgb is None and (self.latent_mean, self.latent_std) == published else self.latent_rgb
        )

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of `frames` pixel frames (n * temporal_stride + 1)."""
        return (frames - 1) // self.temporal_stride + 1


@dataclass(frozen=True)
class UMT5Config:
    """UMT5 text encoder. Defaults are UMT5-XXL."""

    num_layers: int = 24
    dim: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    vocab_size: int = 256384
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    precision: Precision = FLOAT32

    def __post_init__(self) -> None:
        refuse((self.num_buckets % 4, f"umt5: num_buckets {self.num_buckets} is not a multiple of 4"))


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP vision tower, up to the layer that Wan2.1 reads. Defaults are ViT-H/14.

    Attributes:
      num_layers: blocks that are run: 31 of the 32 published ones.
    """

    num_layers: int = 31
    dim: int = 1280
    num_heads: int = 16
    ffn_dim: int = 5120
    image_size: int = 224
    patch_size: int = 14
    eps: float = 1e-5
    precision: Precision = FLOAT32

    def __post_init__(self) -> None:
        size, patch = self.image_size, self.patch_size
        refuse((size % patch, f"clip: image_size {size} is not a multiple of {patch}"))

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


WAN_NEGATIVE_PROMPT = (
    "镜头切换，镜头晃动，色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


FUN_NEGATIVE_PROMPT = WAN_NEGATIVE_PROMPT.removeprefix("镜头切换，镜头晃动，")


@dataclass(frozen=True)
class SamplingDefaults:
    """What the command line uses for a model when nothing else is said.

    Attributes:
      size: (height, width) in pixels.
      shift: timestep shift of the flow-matching schedule.
      guidance: classifier-free guidance scale; 1 switches it off.
    """

    frames: int = 81
    size: tuple[int, int] = (480, 864)
    steps: int = 50
    guidance: float = 5.0
    shift: float = 16.0
    solver: str = "unipc"
    fps: int = 16
    negative_prompt: str = WAN_NEGATIVE_PROMPT


@dataclass(frozen=True)
class ModelConfig:
    """One complete model: transformer, autoencoder, encoders, and how it is usually sampled."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    umt5: UMT5Config
    clip: CLIPConfig | None
    sampling: SamplingDefaults = SamplingDefaults()

    def __post_init__(self) -> None:
        name, dit, vae, clip = self.name, self.dit, self.vae, self.clip
        takes = (dit.image_tokens, dit.image_dim)
        gives = takes if clip is None else (clip.num_tokens, clip.dim)
        wanted = 0 if dit.num_images == 0 else vae.temporal_stride + vae.latent_channels
        refuse(
            (dit.text_dim != self.umt5.dim, f"{name}: dit.text_dim {dit.text_dim} is not umt5.dim {self.umt5.dim}"),
            (dit.out_channels != vae.latent_channels, f"{name}: dit.out_channels is not vae.latent_channels"),
            ((clip is None) != (dit.num_images == 0),
             f"{name}: a clip config is needed if and only if the dit takes images"),
            (gives != takes,
             f"{name}: clip gives {gives[0]} tokens of {gives[1]}, dit takes {takes[0]} of {takes[1]}"),
            (dit.condition_channels != wanted, f"{name}: dit.in_channels must be {dit.out_channels + wanted}"),
            (any(part is not None and part.precision.kernel for part in (vae, self.umt5, clip)),
             f"{name}: precision.kernel is the transformer's alone; leave it away elsewhere"),
        )  # fmt: skip

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this: VAE stride times patch."""
        return self.vae.spatial_stride * self.dit.patch_size[1]

    def with_precision(
        self, dit: Precision, encoders: Precision | None = None, vae: Precision | None = None
    ) -> "ModelConfig":
        """The same model under another policy; the VAE keeps its own (its published file is float32) where none is
        given. 8-bit kernels are the transformer's alone."""
        encoders = encoders or dit.plain
        return dataclasses.replace(
            self,
            dit=dataclasses.replace(self.dit, precision=dit),
            vae=dataclasses.replace(self.vae, precision=vae or self.vae.precision),
            umt5=dataclasses.replace(self.umt5, precision=encoders),
            clip=None if self.clip is None else dataclasses.replace(self.clip, precision=encoders),
        )

    def for_platform(self, platform: str, kind: str = "") -> "ModelConfig":
        """The same model with every "auto" resolved; other choices stay.

        Args:
          platform: "cpu", "gpu" or "cuda", "rocm", or "tpu", as JAX names them.
          kind: of the device, as JAX names it ("TPU v6 lite"): a kernel may have a form for it.

        Raises:
          ValueError: another platform.
        """
        platform = one_of("platform", platform, _PLATFORMS, "choose one of")
        attention, rotation, conv3d, product = _PLATFORMS[platform]
        attention += f"-{_TPUS[kind]}" if platform == "tpu" and kind in _TPUS else ""

        def resolved(config: Any, **choices: str) -> Any:
            own = {field: name for field, name in choices.items() if getattr(config, field) == "auto"}
            return dataclasses.replace(config, **own)

        def part(config: Any, **choices: str) -> Any:
            precision = resolved(config.precision, product=product)
            return dataclasses.replace(resolved(config, **choices), precision=precision)

        return dataclasses.replace(
            self,
            dit=part(self.dit, attention=attention, rotation=rotation),
            vae=part(dataclasses.replace(self.vae, precision=_half(self.vae.precision, platform)), conv3d=conv3d),
            umt5=part(self.umt5),
            clip=None if self.clip is None else part(self.clip),
        )


def _half(precision: Precision, platform: str) -> Precision:
    """The autoencoder's float16 as a platform has it. TPUs multiply bfloat16 only: there the same numbers come of
    float32 in three passes. CPUs have nothing that is faster than float32."""
    if precision.compute != "float16" or platform not in ("cpu", "tpu"):
        return precision
    return Precision(precision.param, product=precision.product, passes="fast" if platform == "tpu" else "exact")


_PLATFORMS: Mapping[str, tuple[str, str, str, str]] = {
    "cpu": ("xla", "pairs", "taps", "float32"),
    "gpu": ("cudnn", "pairs", "taps", "compute"),
    "cuda": ("cudnn", "pairs", "taps", "compute"),
    "rocm": ("xla", "pairs", "taps", "compute"),
    "tpu": ("splash", "product", "conv3d", "compute"),
}
"""What "auto" means for attention, rotary pairs, 3D convolutions and matrix products."""
_TPUS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
         "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip


def _t2v_1_3b() -> ModelConfig:
    dit = DiTConfig(**_SMALL, in_channels=16, image_dim=None, num_images=0)
    sampling = SamplingDefaults(size=(480, 832), shift=5.0, guidance=5.0)
    return ModelConfig("t2v_1_3b", dit, VAEConfig(), UMT5Config(), None, sampling)


def _fun_inp(name: str, dit: DiTConfig) -> ModelConfig:
    """Wan2.1-Fun InP: image-to-video weights that also know a last keyframe, by its mask and latent alone.

    Sizes and sampling as in the published config.json and `examples/wan2.1_fun/predict_i2v.py` of VideoX-Fun.
    """
    sampling = SamplingDefaults(
        size=(480, 832), shift=5.0, guidance=6.0, solver="euler", negative_prompt=FUN_NEGATIVE_PROMPT
    )
    return ModelConfig(name, dit, VAEConfig(), UMT5Config(), CLIPConfig(), sampling)


def _tiny() -> ModelConfig:
    clip = CLIPConfig(num_layers=2, dim=128, num_heads=4, ffn_dim=512, image_size=32, patch_size=8)
    umt5 = UMT5Config(num_layers=2, dim=128, num_heads=4, head_dim=32, ffn_dim=256, vocab_size=768)
    dit = DiTConfig(
        num_layers=6, dim=192, num_heads=4, ffn_dim=768, text_dim=128, text_length=64, freq_dim=256,
        image_dim=clip.dim, image_tokens=clip.num_tokens,
    )  # fmt: skip
    vae = VAEConfig(base_dim=16, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True))
    sampling = SamplingDefaults(frames=25, size=(32, 32), steps=10, guidance=1.5, shift=3.0, fps=12, negative_prompt="")
    return ModelConfig("tiny", dit, vae, umt5, clip, sampling)


_SMALL = {"num_layers": 30, "dim": 1536, "num_heads": 12, "ffn_dim": 8960}
PRESETS: Mapping[str, Callable[[], ModelConfig]] = {
    "tiny": _tiny,
    "flf2v_14b": lambda: ModelConfig("flf2v_14b", DiTConfig(), VAEConfig(), UMT5Config(), CLIPConfig()),
    "i2v_14b": lambda: ModelConfig("i2v_14b", DiTConfig(num_images=1), VAEConfig(), UMT5Config(), CLIPConfig()),
    "t2v_1_3b": _t2v_1_3b,
    "fun_inp_1_3b": lambda: _fun_inp("fun_inp_1_3b", DiTConfig(**_SMALL, num_images=1)),
    "fun_inp_14b": lambda: _fun_inp("fun_inp_14b", DiTConfig(num_images=1)),
}


def preset(name: str) -> ModelConfig:
    """A named model configuration, by its name in PRESETS.

    Raises:
      ValueError: unknown name.
    """
    return PRESETS[one_of("unknown preset", name, PRESETS, "choose one of")]()


def to_json(config: ModelConfig) -> str:
    """The configuration as JSON text, readable again by `from_json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)


def from_json(text: str) -> ModelConfig:
    """Reads what `to_json` wrote; fields that it lacks take their defaults.

    Raises:
      ValueError: not JSON, or fields unknown, missing, of the wrong kind, not finite or inconsistent.
    """
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError("not an object with fields")
        check_finite(fields)
        # JSON has lists for tuples; Python counts true as a whole number, so it is shown as the text that it is.
        kinds = {int: _no_truth, float: _no_truth}
        return dacite.from_dict(ModelConfig, fields, dacite.Config(strict=True, cast=[tuple], type_hooks=kinds))
    except (TypeError, dacite.DaciteError, json.JSONDecodeError) as error:
        raise ValueError(f"model configuration: {error}") from error


def _no_truth(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
