"""Which model a set of tensors is, and its configuration, read from names and shapes alone.

Everything that shapes tell is read from them; what they do not tell (heads, lengths) comes from a `config.json` where
there is one, else from the published models. The two are compared where both speak.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from convert import clip, dit, umt5, vae
from convert.keymap import Rule, Shape
from convert.tensors import SourceError, Tensors, some
from wanjax.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig

HEAD_DIM = 128
"""Width of a DiT head in every published Wan2.1 model."""

Config = DiTConfig | VAEConfig | UMT5Config | CLIPConfig


@dataclass(frozen=True)
class Family:
    """One model in one layout.

    Attributes:
      part: "dit", "vae", "umt5" or "clip".
      layout: "original" or "diffusers".
      marks: names that all files of this family have, and none of another.
      rules: config -> table.
      config: (shapes, config.json or {}) -> config.
      unused: (config, names) -> names that are there and not read.
    """

    part: str
    layout: str
    marks: tuple[str, ...]
    rules: Callable[[Any], list[Rule]]
    config: Callable[[Mapping[str, Shape], Mapping[str, Any]], Config]
    unused: Callable[[Any, Iterable[str]], tuple[str, ...]] = lambda config, names: ()


TITLES: MappingProxyType[str, str] = MappingProxyType(
    {
        "dit": "transformer",
        "vae": "video autoencoder (VAE)",
        "umt5": "text encoder (UMT5)",
        "clip": "vision tower (CLIP)",
    }
)


def title(family: Family) -> str:
    """A family by its usual name, for messages."""
    return f"a {TITLES[family.part]}"


def describe(config: Config) -> str:
    """A model by its usual name, for messages."""
    if isinstance(config, DiTConfig):
        kind = {0: "text-to-video (T2V)", 1: "image-to-video (I2V, no emb_pos)", 2: "first-and-last-frame (FLF2V)"}
        return f"{kind[config.num_images]} transformer of {config.num_layers} layers, width {config.dim}"
    part = next(part for part, kind in SLOTS.items() if isinstance(config, kind))
    return TITLES[part]


def _shape(shapes: Mapping[str, Shape], name: str, axes: int) -> Shape:
    """The shape of a tensor that tells sizes.

    Raises:
      SourceError: it is missing, of another number of axes, or empty.
    """
    if name not in shapes:
        raise SourceError(f"{name} is missing, which tells sizes; incomplete, get it again")
    shape = tuple(shapes[name])
    if len(shape) != axes or 0 in shape:
        raise SourceError(f"{name} has the shape {list(shape)}, where {axes} axes belong; another model, or damaged")
    return shape


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many layers a numbered name has.

    Raises:
      SourceError: some are missing between others.
    """
    numbers = {int(found[1]) for name in shapes if (found := re.match(pattern, name))}
    missing = [str(i) for i in range(min(max(numbers, default=-1), len(shapes)) + 1) if i not in numbers]
    if missing:
        where = pattern.partition("(")[0].replace("\\", "")
        raise SourceError(f"{where}N is missing for N = {some(missing, 5)}; incomplete, get it again")
    return len(numbers)


def _told(stated: Mapping[str, Any], key: str, default: Any) -> Any:
    """A positive number (or a list of numbers) that config.json tells, of the kind that the default is."""
    value = stated.get(key)
    if value is None:
        return default
    kinds = (int,) if isinstance(default, int) else (int, float)
    if isinstance(default, tuple):
        numbers = value if isinstance(value, list) else [None]
        if all(type(number) in kinds and math.isfinite(number) for number in numbers):
            return tuple(numbers)
    elif type(value) in kinds and math.isfinite(value) and value > 0:
        return value
    raise SourceError(f"config.json says {key} {str(value)[:80]!r}, which is no such number; get it again")


def _stated(stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compares config.json with what the tensors say; every difference in one line."""
    differences = [
        f"{key} {str(stated[key])[:80]}, the tensors {value}"
        for key, value in found.items()
        if stated.get(key) is not None and stated[key] != value
    ]
    if differences:
        raise SourceError(f"config.json says {'; '.join(differences)}: files of two models are mixed up")


def _dit(shapes: Mapping[str, Shape], stated: Mapping[str, Any], **names: str) -> DiTConfig:
    """`names`: foreign ones of the tensors that tell sizes, by our role."""
    dim, channels, *patch = _shape(shapes, names["patch"], 5)
    layers = _count(shapes, r"blocks\.(\d+)\.")
    heads = _told(stated, "num_attention_heads", _told(stated, "num_heads", 0))
    if not heads:
        if dim % HEAD_DIM:
            raise SourceError(
                f"transformer of width {dim}: how many heads is not told; give a folder with its config.json"
            )
        heads = dim // HEAD_DIM
    if dim % heads:
        raise SourceError(f"config.json says {heads} heads, which do not divide the width {dim} of the tensors")
    found = {
        "num_layers": layers, "ffn_dim": _shape(shapes, names["ffn"], 2)[0],
        "freq_dim": _shape(shapes, names["time"], 2)[1], "text_dim": _shape(shapes, names["text"], 2)[1],
    }  # fmt: skip
    out = _shape(shapes, names["head"], 2)[0] // math.prod(patch)
    sizes = {"dim": dim, "in_dim": channels, "in_channels": channels, "out_dim": out, "out_channels": out}
    _stated(stated, found | sizes | {"patch_size": list(patch), "attention_head_dim": dim // heads})
    # Which of them are there is compared with the table later; one of them says that there is an image branch.
    image = any(name.startswith(names["branch"]) or names["key"] in name for name in shapes)
    position = None if names["position"] not in shapes else _shape(shapes, names["position"], 3)
    if position is None and (stated.get("model_type") == "flf2v" or stated.get("pos_embed_seq_len") is not None):
        raise SourceError(f"{names['position']} is missing, and config.json says first-and-last-frame; get it again")
    return DiTConfig(
        dim=dim,
        num_heads=heads,
        in_channels=channels,
        out_channels=out,
        patch_size=tuple(patch),
        text_length=_told(stated, "text_len", 512),
        eps=_told(stated, "eps", DiTConfig.eps),
        image_dim=_shape(shapes, names["image"], 1)[0] if image else None,
        image_tokens=257 if position is None else position[1] // 2,
        num_images=0 if not image else 1 if position is None else 2,
        **found,
    )


def _vae(
    shapes: Mapping[str, Shape], stated: Mapping[str, Any], first: str, latent: str, layers: str, conv: str
) -> VAEConfig:
    """From the encoder's list of layers, `layers` and a number: what has no `conv` is a resampler."""
    base = _shape(shapes, first, 5)[0]
    levels: list[list[int]] = [[]]
    times = []
    for i in range(_count(shapes, rf"{re.escape(layers)}(\d+)\.")):
        if f"{layers}{i}.{conv}" in shapes:
            levels[-1].append(_shape(shapes, f"{layers}{i}.{conv}", 5)[0] // base)
        else:
            levels.append([])
            times.append(f"{layers}{i}.time_conv.weight" in shapes)
    counts = {len(level) for level in levels}
    if len(counts) != 1 or any(len(set(level)) != 1 for level in levels):
        raise SourceError("autoencoder: its levels differ in depth or change width inside; not a Wan2.1 VAE")
    config = VAEConfig(
        base_dim=base,
        dim_mult=tuple(level[0] for level in levels),
        num_res_blocks=counts.pop(),
        latent_channels=_shape(shapes, latent, 5)[0],
        temporal_downsample=tuple(times),
        latent_mean=_told(stated, "latents_mean", VAEConfig.latent_mean),
        latent_std=_told(stated, "latents_std", VAEConfig.latent_std),
    )
    _stated(stated, {"base_dim": base, "z_dim": config.latent_channels, "dim_mult": list(config.dim_mult),
                     "temperal_downsample": list(times)})  # fmt: skip
    return config


def _umt5(shapes: Mapping[str, Shape], stated: Mapping[str, Any], embed: str, block: str, bias: str, q: str,
          ffn: str) -> UMT5Config:  # fmt: skip
    vocab, dim = _shape(shapes, embed, 2)
    buckets, heads = _shape(shapes, bias, 2)
    found = {
        "num_layers": _count(shapes, block), "vocab_size": vocab, "num_heads": heads,
    }  # fmt: skip
    sizes = {"d_model": dim, "d_ff": _shape(shapes, ffn, 2)[0], "d_kv": _shape(shapes, q, 2)[0] // heads,
             "relative_attention_num_buckets": buckets}  # fmt: skip
    _stated(stated, found | sizes)
    return UMT5Config(
        dim=dim,
        head_dim=sizes["d_kv"],
        ffn_dim=sizes["d_ff"],
        num_buckets=buckets,
        max_distance=_told(stated, "relative_attention_max_distance", UMT5Config.max_distance),
        eps=_told(stated, "layer_norm_epsilon", UMT5Config.eps),
        **found,
    )


def _clip(shapes: Mapping[str, Shape], stated: Mapping[str, Any], patch: str, place: str, axes: int, block: str,
          ffn: str) -> CLIPConfig:  # fmt: skip
    positions = _shape(shapes, place, axes)
    inner = stated.get("vision_config")
    stated = inner if isinstance(inner, dict) else stated
    dim, _, size, _ = _shape(shapes, patch, 4)
    side = math.isqrt(positions[-2] - 1)
    if side**2 + 1 != positions[-2] or not side:
        raise SourceError(f"{positions[-2]} positions are no square of patches and a class token; another model")
    found = {
        "hidden_size": dim,
        "intermediate_size": _shape(shapes, ffn, 2)[0],
        "patch_size": size,
        "image_size": side * size,
    }
    count = _count(shapes, block)
    _stated(stated, found | {"num_hidden_layers": count, "hidden_act": "gelu"})
    return CLIPConfig(
        num_layers=count - 1,  # Wan2.1 reads the features before the last block
        dim=dim,
        num_heads=_told(stated, "num_attention_heads", CLIPConfig.num_heads),
        ffn_dim=found["intermediate_size"],
        image_size=found["image_size"],
        patch_size=size,
        eps=_told(stated, "layer_norm_eps", CLIPConfig.eps),
    )


def _also(*starts: str) -> Callable[[Any, Iterable[str]], tuple[str, ...]]:
    """Names that begin so."""
    return lambda config, present: tuple(name for name in present if name.startswith(starts))


_EMBED, _LAYER = "condition_embedder", "encoder.block.0.layer"

FAMILIES: tuple[Family, ...] = (
    Family("dit", "original", ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "time_embedding.0.weight",
                               "text_embedding.0.weight", "head.head.weight", "blocks.0.ffn.0.weight"),
           dit.original, partial(
               _dit, patch="patch_embedding.weight", ffn="blocks.0.ffn.0.weight", time="time_embedding.0.weight",
               text="text_embedding.0.weight", head="head.head.weight", image="img_emb.proj.0.weight",
               position="img_emb.emb_pos", branch="img_emb.", key=".cross_attn.k_img.")),
    Family("dit", "diffusers", ("patch_embedding.weight", "condition_embedder.time_embedder.linear_1.weight",
                                "condition_embedder.text_embedder.linear_1.weight", "proj_out.weight",
                                "blocks.0.ffn.net.0.proj.weight"),
           dit.diffusers, partial(
               _dit, patch="patch_embedding.weight", ffn="blocks.0.ffn.net.0.proj.weight", key=".attn2.add_k_proj.",
               time=f"{_EMBED}.time_embedder.linear_1.weight", text=f"{_EMBED}.text_embedder.linear_1.weight",
               head="proj_out.weight", image=f"{_EMBED}.image_embedder.norm1.weight",
               position=f"{_EMBED}.image_embedder.pos_embed", branch=f"{_EMBED}.image_embedder.")),
    Family("vae", "original", ("encoder.conv1.weight", "conv2.weight", "encoder.downsamples.0.residual.2.weight"),
           vae.original, partial(_vae, first="encoder.conv1.weight", latent="conv2.weight",
                                 layers="encoder.downsamples.", conv="residual.2.weight")),
    Family("vae", "diffusers", ("encoder.conv_in.weight", "post_quant_conv.weight",
                                "encoder.down_blocks.0.conv1.weight"),
           vae.diffusers, partial(_vae, first="encoder.conv_in.weight", latent="post_quant_conv.weight",
                                  layers="encoder.down_blocks.", conv="conv1.weight")),
    Family("umt5", "original", ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight",
                                "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight"),
           umt5.original, partial(
               _umt5, embed="token_embedding.weight", block=r"blocks\.(\d+)\.", q="blocks.0.attn.q.weight",
               bias="blocks.0.pos_embedding.embedding.weight", ffn="blocks.0.ffn.fc1.weight"), _also(*umt5.BESIDE)),
    Family("umt5", "diffusers", ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
                                 "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                                 "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"),
           umt5.diffusers, partial(
               _umt5, embed="shared.weight", block=r"encoder\.block\.(\d+)\.", q=f"{_LAYER}.0.SelfAttention.q.weight",
               bias=f"{_LAYER}.0.SelfAttention.relative_attention_bias.weight",
               ffn=f"{_LAYER}.1.DenseReluDense.wi_1.weight"), _also(*umt5.IGNORE)),
    Family("clip", "original", ("visual.patch_embedding.weight", "visual.pos_embedding",
                                "visual.transformer.0.mlp.0.weight"),
           clip.original, partial(
               _clip, patch="visual.patch_embedding.weight", place="visual.pos_embedding", axes=3,
               block=r"visual\.transformer\.(\d+)\.", ffn="visual.transformer.0.mlp.0.weight"), clip.original_unused),
    Family("clip", "diffusers", ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
                                 "encoder.layers.0.mlp.fc1.weight"),
           clip.diffusers, partial(
               _clip, patch="embeddings.patch_embedding.weight", place="embeddings.position_embedding.weight", axes=2,
               block=r"encoder\.layers\.(\d+)\.", ffn="encoder.layers.0.mlp.fc1.weight"),
           lambda config, names: (*clip.unused(config), *_also(*clip.BESIDE)(config, names))),
)  # fmt: skip
"""Every model in every layout; its marks being there is what tells it."""

SLOTS: MappingProxyType[str, type] = MappingProxyType(
    {"dit": DiTConfig, "vae": VAEConfig, "umt5": UMT5Config, "clip": CLIPConfig}
)


def read_config(family: Family, tensors: Tensors, stated: Mapping[str, Any]) -> Config:
    """The configuration of tensors whose family is known.

    Args:
      stated: the `config.json` beside them, {} without one.

    Raises:
      SourceError: sizes that contradict each other or config.json.
    """
    try:
        return family.config(tensors.shapes, stated)
    except SourceError as error:
        raise SourceError(f"{tensors.files[0]}: {error}") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise SourceError(f"{tensors.files[0]}: not a whole {family.part} ({error})") from error
