"""LoRA files merged into the transformer's linears, in float32.

Spellings: `X.lora_A.weight`/`lora_B` (diffusers, PEFT), `X.lora_down.weight`/`lora_up` (kohya, ComfyUI), each with an
optional `X.alpha`; X is the linear's name in either layout, after any of the usual prefixes, or kohya's form of it with
underscores. The weight gains scale * alpha / rank * B A. Where the tensors tell no alpha, PEFT's own settings do
(`adapter_config.json` beside the file, or the file's metadata), else alpha is the rank.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from convert import dit
from convert.keymap import LINEAR
from convert.sources import Part, Source
from convert.tensors import SourceError, Tensor, Tensors, open_file

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_")
_KEY = re.compile(r"(?P<target>.+?)\.(?P<role>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?$")
_ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}


@dataclass(frozen=True)
class Update:
    """What one file adds to one linear: factor * up @ down."""

    down: Tensor
    up: Tensor
    factor: float


def merge(source: Source, requests: Sequence[str]) -> Source:
    """The source with updates merged into its transformer as its weights are read; reads no matrix itself.

    Args:
      requests: "FILE" or "FILE:scale" each.

    Raises:
      SourceError: no transformer, a bad scale, a file without updates; keys that match no linear, or whose sizes do
      not fit it, all of them.
    """
    part = source.parts.get("dit")
    if part is None:
        raise SourceError("--lora: the source has no transformer to merge it into")
    if part.family.layout == "wanjax":
        raise SourceError("--lora: merges into foreign weights, not into a wanjax folder; convert the source again")
    updates: dict[str, list[Update]] = {}
    files = []
    for request in requests:
        path, scale = _request(request)
        files.append(path)
        for name, update in _of_file(path, scale, part).items():
            updates.setdefault(name, []).append(update)
    named = dict(part.tensors.named)
    for name, own in updates.items():
        named[name] = _merged(named[name], own)
    part = dataclasses.replace(part, tensors=Tensors((*part.tensors.files, *files), named))
    return dataclasses.replace(source, parts={**source.parts, "dit": part}, loras=tuple(requests))


def _merged(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    def read() -> np.ndarray:
        total = weight.read().astype(np.float32)
        for update in updates:
            down, up = (tensor.read().astype(np.float32) for tensor in (update.down, update.up))
            total += update.factor * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(total.shape)
        return total

    return dataclasses.replace(weight, read=read)


def _request(text: str) -> tuple[Path, float]:
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError as error:
        raise SourceError(f"--lora {text}: {scale!r} is not a scale; give FILE or FILE:0.8") from error
    if not np.isfinite(number):
        raise SourceError(f"--lora {text}: the scale must be finite")
    return Path(path), number


def _of_file(path: Path, scale: float, part: Part) -> dict[str, Update]:
    targets, found, odd = _targets(part), {}, []
    for key, tensor in open_file(path).named.items():
        match = _KEY.fullmatch(key)
        target = match and targets.get(_plain(match["target"]))
        if target is None:
            odd.append(key)
        else:
            role = _ROLES[match["role"]]
            if role in found.setdefault(target, {}):
                raise SourceError(f"{path}: {target} has two {role} matrices in different spellings; keep one")
            found[target][role] = tensor
    if odd:
        raise SourceError(f"{path}: {len(odd)} keys fit no linear of the transformer:\n  " + "\n  ".join(sorted(odd)))
    if not found:
        raise SourceError(f"{path}: holds no LoRA")
    updates, wrong, declared = {}, [], _declared(path)
    for name, roles in found.items():
        shape = part.tensors.named[name].shape
        if "down" not in roles or "up" not in roles:
            wrong.append(f"{name}: only {', '.join(roles)}")
            continue
        down, up = roles["down"], roles["up"]
        rank = down.shape[0] if down.shape else 0
        if not rank or len(up.shape) < 2 or up.shape[1] != rank or (up.shape[0], int(np.prod(down.shape[1:]))) != (
            shape[0], int(np.prod(shape[1:]))):  # fmt: skip
            wrong.append(f"{name} {list(shape)}: up {list(up.shape)}, down {list(down.shape)}")
            continue
        if "alpha" in roles and int(np.prod(roles["alpha"].shape)) != 1:
            wrong.append(f"{name}: alpha {list(roles['alpha'].shape)} is not one number")
            continue
        own = float(roles["alpha"].read().reshape(())) / rank if "alpha" in roles else declared(rank)
        updates[name] = Update(down, up, scale * own)
    if wrong:
        raise SourceError(f"{path}: {len(wrong)} updates do not fit:\n  " + "\n  ".join(sorted(wrong)))
    return updates


def _declared(path: Path) -> Callable[[int], float]:
    """Factor by rank as PEFT's settings have it; 1 without any.

    Raises:
      SourceError: settings that change more than the factor.
    """
    beside, settings = path.with_name("adapter_config.json"), {}
    try:
        if beside.is_file() and path.stem.startswith("adapter_model"):
            settings = json.loads(beside.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
            # diffusers puts the name of the model in front of every key.
            settings = {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"{path}: its PEFT settings cannot be read ({error})") from error
    unknown = [key for key in ("use_dora", "alpha_pattern", "rank_pattern") if settings.get(key)]
    if unknown:
        raise SourceError(f"{path}: made with {', '.join(unknown)}, which cannot be merged here")
    alpha, root = settings.get("lora_alpha"), settings.get("use_rslora")
    return lambda rank: 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)


def _targets(part: Part) -> dict[str, str]:
    """Every spelling of a linear of the transformer -> the foreign name of its weight."""
    ours = {rule.ours: rule.theirs for rule in part.family.rules(part.config)}
    spellings: dict[str, str] = {}
    for table in (dit.original(part.config), dit.diffusers(part.config)):
        for rule in table:
            if rule.transform is not LINEAR:
                continue
            for i in range(part.config.num_layers if rule.stacked else 1):
                name, weight = (text.replace("{i}", str(i)) for text in (rule.theirs, ours[rule.ours]))
                plain = name.removesuffix(".weight")
                spellings |= {plain: weight, plain.replace(".", "_"): weight}
    return spellings


def _plain(target: str) -> str:
    for prefix in PREFIXES:
        target = target.removeprefix(prefix)
    return target
