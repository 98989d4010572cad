"""Files of the adapters that `wanjax.lora` trains: written in diffusers' form, read from any spelling of it.

wanjax keeps kernels as [in, out] and stacks layers; neither axis of a kernel is permuted (rotary pairs are neighbours
in both worlds), so a file's factors are ours, layer by layer and transposed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save as safetensors_bytes

from convert import dit, families, lorasettings
from convert.keymap import Rule
from convert.lora import parse_request
from convert.loranames import Targets, parse, refuse_others
from convert.sources import Part
from convert.tensors import SourceError, Tensors, open_file, some
from wanjax import marks, shapes
from wanjax.config import DiTConfig
from wanjax.lora import DOWN, UP, Lora
from wanjax.writing import write_bytes

_PREFIX = "transformer"
_LETTERS = {DOWN: "A", UP: "B"}


def save(path: Path, config: DiTConfig, lora: Lora, overwrite: bool = False) -> None:
    """Writes adapters as diffusers' `save_lora_weights` does; `python -m convert --lora` and diffusers read them.

    An alpha that is not the rank stands in the metadata, where diffusers looks. Programs that do not look there take it
    to be the rank, which is right for what `lora.init` makes by default.

    Args:
      path: ends in .safetensors.
      config: of the transformer.

    Raises:
      ValueError: another ending, or adapters of what the transformer does not have; the file is there already (with
      `overwrite`: and wanjax did not write it), or its folder is not. OSError: a full disk.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: give a name that ends in .safetensors")
    rules, flat = _rules(config), flatten_dict(lora.weights, sep="/")
    tensors: dict[str, np.ndarray] = {}
    modules = []
    for target in lora.paths:
        if target not in rules:
            raise ValueError(f"LoRA of {target}: no linear of this transformer")
        rule = rules[target]
        modules.append(rule.theirs.removesuffix(".weight").removeprefix("blocks.{i}."))
        down, up = (np.asarray(jax.device_get(flat[f"{target}/{name}"]), np.float32) for name in (DOWN, UP))
        stacked = (down, up) if rule.stacked else (down[None], up[None])
        for layer, (one, other) in enumerate(zip(*stacked, strict=True)):
            stem = f"{_PREFIX}.{rule.theirs.removesuffix('.weight').replace('{i}', str(layer))}.lora_"
            tensors[f"{stem}A.weight"] = foreign = np.ascontiguousarray(rule.transform.backward(one))
            tensors[f"{stem}B.weight"] = np.ascontiguousarray(other.T).reshape(
                *other.T.shape, *[1] * (foreign.ndim - 2)
            )
    metadata = {"format": "pt", marks.KEY: marks.mark()}
    if lora.scale != 1:
        metadata[lorasettings.METADATA] = _settings(config, lora, set(modules))
    write_bytes(path, safetensors_bytes(tensors, metadata), overwrite=overwrite)


def _settings(config: DiTConfig, lora: Lora, modules: set[str]) -> str:
    """PEFT's settings as diffusers keeps them in a file's metadata."""
    if config.num_images and "attn2.to_k" in modules:
        # diffusers gives a LoRA without the images' keys and values zeros there, and PEFT compares with this list.
        modules = modules | {"attn2.add_k_proj", "attn2.add_v_proj"}
    told = {"r": lora.rank, "lora_alpha": lora.scale * lora.rank, "target_modules": sorted(modules)}
    return json.dumps({f"{_PREFIX}.{name}": value for name, value in told.items()}, indent=2, sort_keys=True)


def read(path: Path | str, config: DiTConfig) -> Lora:
    """Adapters from a file (or the folder of one), to go on training or to apply.

    Any spelling that `--lora` takes, of matrices of one rank and one alpha, in all layers of every linear.

    Args:
      config: of the transformer that they are for.

    Raises:
      SourceError: unreadable, another kind, for another model, or of more than one rank or alpha: such a file can only
        be merged (`python -m convert --lora`).
    """
    path = parse_request(str(path))[0]
    found, factors = _matrices(path, config)
    kernels, weights = flatten_dict(shapes.dit(config), sep="/"), {}
    for target, rule in _rules(config).items():
        shape = kernels[f"{target}/kernel"].shape
        layers = [name.removesuffix(".weight") for name in rule.names(shape)]
        held = [layer for layer in layers if layer in found]
        if not held:
            continue
        if len(held) < len(layers):
            raise SourceError(f"{path}: adapts {target} in {len(held)} of {len(layers)} layers, which cannot be "
                              "trained on; python -m convert --lora merges it")  # fmt: skip
        downs, ups = zip(*(_ours(path, rule, layer, found[layer], shape[-2:]) for layer in layers), strict=True)
        weights[f"{target}/{DOWN}"], weights[f"{target}/{UP}"] = (
            np.stack(arrays) if rule.stacked else arrays[0] for arrays in (downs, ups)
        )
    ranks = {leaf.shape[-1] for name, leaf in weights.items() if name.endswith(DOWN)}
    if len(ranks) > 1 or len(factors) > 1:
        raise SourceError(f"{path}: ranks {sorted(ranks)} and factors {sorted(factors)}, where one of each can be "
                          "trained on; python -m convert --lora merges it")  # fmt: skip
    return Lora(unflatten_dict(weights, sep="/"), factors.pop())


def _rules(config: DiTConfig) -> dict[str, Rule]:
    """diffusers' rules of kernels, by the path of the linear."""
    return {rule.ours.removesuffix("/kernel"): rule for rule in dit.diffusers(config) if rule.ours.endswith("/kernel")}


def _matrices(path: Path, config: DiTConfig) -> tuple[dict[str, dict[str, np.ndarray]], set[float]]:
    """Down and up in float32 by diffusers' name of the linear, and the factors of their products."""
    tensors, settings = open_file(path).named, lorasettings.read(path)
    refuse_others(path, tensors)
    family = next(one for one in families.FAMILIES if (one.part, one.layout) == ("dit", "diffusers"))
    targets = Targets(Part(family, config, Tensors((path,), {})))
    found: dict[str, dict[str, np.ndarray]] = {}
    modules: dict[str, str] = {}
    odd = []
    for name, tensor in tensors.items():
        key = parse(name)
        target = None if key is None else targets.find(key)
        if target is None or key.role not in ("down", "up", "alpha"):
            odd.append(name)
            continue
        array = tensor.read().astype(np.float32)
        if not np.isfinite(array).all():
            raise SourceError(f"{path}: {name} holds NaN or inf; its file is damaged")
        module = target.removesuffix(".weight")
        modules[module] = key.target
        found.setdefault(module, {})[key.role] = array
    if odd:
        raise SourceError(f"{path}: {len(odd)} tensors are no factor of a linear ({some(sorted(odd), 3)})")
    lacking = [module for module, roles in found.items() if not {"down", "up"} <= roles.keys()]
    if lacking or not found:
        raise SourceError(f"{path}: {some(sorted(lacking), 3)}: down or up is missing" if lacking
                          else f"{path}: holds no LoRA")  # fmt: skip
    factors = {_factor(settings, modules[module], roles) for module, roles in found.items()}
    return found, factors


def _factor(settings: lorasettings.Settings, module: str, roles: Mapping[str, np.ndarray]) -> float:
    rank = len(roles["down"])
    if "alpha" in roles and roles["alpha"].size == 1:
        return float(roles["alpha"].reshape(())) / rank
    return settings.factor(module, rank)


def _ours(
    path: Path, rule: Rule, name: str, roles: Mapping[str, np.ndarray], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Down [I, r] and up [r, O] of one layer."""
    down, up = roles["down"], roles["up"]
    wanted = rule.transform.foreign_shape((shape[0], len(down)))
    if down.shape != wanted or up.shape[:2] != (shape[1], len(down)) or up.size != shape[1] * len(down):
        raise SourceError(f"{path}: {name} {[shape[1], *wanted[1:]]}: down {list(down.shape)}, up {list(up.shape)} do "
                          "not fit; made for another model?")  # fmt: skip
    return np.ascontiguousarray(rule.transform.forward(down)), np.ascontiguousarray(up.reshape(shape[1], -1).T)
