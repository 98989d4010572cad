"""What a conversion will make, with everything about it checked that needs no tensor."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from convert import eight, tokenizer
from convert.families import SLOTS, describe
from convert.sources import Part, Source
from convert.tensors import SourceError
from convert.tokenizer import Vocabulary
from wanjax import checkpoint
from wanjax.config import PRESETS, DiTConfig, ModelConfig, preset
from wanjax.precision import BFLOAT16, FLOAT32, Precision

DTYPES = ("bf16", "f32", "int8", "fp8", "keep")


@dataclass(frozen=True)
class Plan:
    """A conversion with everything about it checked that needs no tensor.

    Attributes:
      source: where from.
      config: of the whole model; parts that the source lacks are the published ones.
      shapes: of every parameter, by part of the source.
      tokenizer: the folder's, None where the source has none that can be read.
      notes: the source's, and more lines that the user should see.
    """

    source: Source
    config: ModelConfig
    shapes: Mapping[str, Any]
    tokenizer: Vocabulary | None
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        files = [file for part in self.source.parts.values() for file in part.tensors.files]
        return [*files, *([self.tokenizer.file] if self.tokenizer and self.tokenizer.file else [])]


def plan(source: Source, dtype: str = "keep", model: str = "auto") -> Plan:
    """Checks that a source is one whole model.

    Args:
      dtype: "bf16" or "f32" for transformer and encoders, or "keep"; the VAE stays float32 unless "bf16" files say so.
        "int8" or "fp8" is "bf16" but for the kernels of the transformer's blocks.
      model: a preset that it must be, or "auto".

    Raises:
      SourceError: parts that do not belong together, tensors missing, extra or of another shape, another model, a
        tokenizer that cannot be used.
    """
    config = _with_dtype(_whole(source, model), source, dtype)
    shapes = checkpoint.param_shapes(config)
    own = {name: shapes[name] for name in source.parts}
    plain = checkpoint.param_shapes(config.with_precision(config.dit.precision.plain))
    told = []
    for name, part in source.parts.items():
        part.check(plain[name])
        told += eight.notes(part, flatten_dict(own[name], sep="/"))
    vocabulary, notes = tokenizer.find(source, config.umt5.vocab_size)
    return Plan(source, config, own, vocabulary, (*source.notes, *told, *notes))


def _whole(source: Source, model: str) -> ModelConfig:
    """The model that the parts make, named after a preset where its transformer is that preset's."""
    parts = {name: part.config for name, part in source.parts.items()}
    dit, clip = parts.get("dit"), parts.get("clip")
    base = preset(model if model != "auto" else _nearest(dit))
    stored = all(part.family.layout == "wanjax" for part in source.parts.values())
    if model == "auto" and stored and checkpoint.is_folder(source.path):
        return checkpoint.read_config(source.path, whole=False)[1]
    if model != "auto" and dit is not None and _size(dit) != _size(base.dit):
        raise SourceError(f"{source.path}: holds a {describe(dit)}, not {model}; leave --model away")
    if clip is not None and clip.dim % clip.num_heads:
        raise SourceError(
            f"{source.path}: vision tower of width {clip.dim}: {clip.num_heads} heads do not divide it; give a "
            "folder with its config.json"
        )
    same = dit is None or _size(dit) == _size(base.dit)
    sampling = base.sampling if source.shift is None else dataclasses.replace(base.sampling, shift=source.shift)
    name = base.name if same else "custom"
    try:
        return dataclasses.replace(base, name=name, sampling=sampling, **_fitting(base, parts) | parts)
    except ValueError as error:
        raise SourceError(f"{source.path}: its parts do not belong together: {error}") from error


def _fitting(base: ModelConfig, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Transformer and encoders as published, but for the sizes in which they must agree with `parts`."""
    dit, umt5, clip = parts.get("dit"), parts.get("umt5"), parts.get("clip")
    if dit is None:
        dit = base.dit if umt5 is None else dataclasses.replace(base.dit, text_dim=umt5.dim)
        dit = dit if clip is None else dataclasses.replace(dit, image_dim=clip.dim, image_tokens=clip.num_tokens)
    found = {"dit": dit, "umt5": dataclasses.replace(base.umt5, dim=dit.text_dim)}
    if base.clip is not None and clip is None:  # a tower that is not there must only fit, whatever its heads would be
        side = base.clip.patch_size * math.isqrt(dit.image_tokens - 1)
        heads = math.gcd(base.clip.num_heads, dit.image_dim)
        found["clip"] = dataclasses.replace(base.clip, dim=dit.image_dim, num_heads=heads, image_size=side)
    return found


def _size(config: DiTConfig) -> DiTConfig:
    return dataclasses.replace(config, precision=FLOAT32, remat=False)


def _nearest(dit: DiTConfig | None) -> str:
    """The preset with this transformer, else one that takes as many keyframes."""
    published = {name: make().dit for name, make in PRESETS.items() if name != "tiny"}
    if dit is None:
        return "flf2v_14b"
    exact = [name for name, own in published.items() if _size(own) == _size(dit)]
    return (exact or [name for name, own in published.items() if own.num_images == dit.num_images])[0]


def _with_dtype(config: ModelConfig, source: Source, dtype: str) -> ModelConfig:
    if dtype not in DTYPES:
        raise SourceError(f"dtype {dtype!r}: choose {', '.join(DTYPES)}")
    if dtype != "keep":
        kernel = checkpoint.WEIGHTS.get(dtype)
        return config.with_precision(FLOAT32 if dtype == "f32" else dataclasses.replace(BFLOAT16, kernel=kernel))
    kept = {
        name: dataclasses.replace(getattr(config, name), precision=_own_precision(part))
        for name, part in source.parts.items()
    }
    return dataclasses.replace(config, **kept)


def _own_precision(part: Part) -> Precision:
    """float32 where most numbers are stored so, else half precision: a few matrices are float32 in every file."""
    if part.family.layout == "wanjax":
        return part.config.precision
    numbers: Counter[np.dtype] = Counter()
    for tensor in part.tensors.named.values():
        numbers[tensor.dtype] += math.prod(tensor.shape)
    most = numbers.most_common(1)[0][0]
    if part.family.part == "vae" or most.itemsize >= 4:
        return FLOAT32
    return dataclasses.replace(BFLOAT16, param="float16") if most == np.float16 else BFLOAT16


def lacking(planned: Plan, only: Sequence[str] | None = None) -> list[str]:
    """The plan's notes, and on what a folder made of it will not have.

    Args:
      only: the parts that were asked for; None for a whole model.

    Raises:
      SourceError: a part that was asked for is not there.
    """
    wanted = only or [name for name in SLOTS if getattr(planned.config, name) is not None]
    absent = [name for name in wanted if name not in planned.source.parts]
    if absent:
        have = " ".join(name for name in SLOTS if name in planned.source.parts)
        raise SourceError(f"{planned.source.path}: no {', '.join(absent)} in it; add them, or convert --only {have}")
    notes = [f"the folder will hold {', '.join(only)} alone and cannot be run by itself"] if only else []
    if planned.tokenizer is None and "umt5" in wanted:
        notes.append(f"no tokenizer in the source; put umt5-xxl's {checkpoint.TOKENIZER} into the folder")
    return [*planned.notes, *notes]


def work(planned: Plan) -> int:
    """Bytes that `write` tells of: hashed ones, then written ones."""
    hashed = sum(file.stat().st_size for file in planned.files)
    leaves = [leaf for shapes in planned.shapes.values() for leaf in jax.tree.leaves(shapes)]
    return hashed + sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
