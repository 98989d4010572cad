"""8-bit weights with a scale: what they stand for is told by markers and dtypes, or they are refused by name.

ComfyUI's files hold float8 or int8 values and a factor each, of a whole matrix or of each row:

- `X.weight`, `X.weight_scale`, and `X.comfy_quant`, a JSON text as uint8 that names the format; or the same told in the
  file's metadata; float8 values may lie in a uint8 tensor then;
- before that, `X.weight`, `X.scale_weight`, and one `scaled_fp8` whose dtype tells the format.

A product is exact in float32 as ComfyUI's own dequantiser computes it. int8 values may be of a matrix whose inputs were
rotated in groups (ConvRot), which is undone. `X.input_scale` and `X.scale_input` serve 8-bit products and are dropped.
Every other format (MXFP8, NVFP4, SVDQuant, GPTQ, ...) would be noise if it were read as numbers.
"""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from convert.tensors import DTYPES, Codes, SourceError, Tensor, Tensors, some

FLOAT8: MappingProxyType[str, np.dtype] = MappingProxyType(
    {"float8_e4m3fn": DTYPES["F8_E4M3"], "float8_e5m2": DTYPES["F8_E5M2"]}
)
"""ComfyUI's formats that are float8 values with a factor."""

INT8 = "int8_tensorwise"
"""That of int8 values, with a factor of each row too; "rotated" as many inputs together as are told."""

ROTATED = 256
"""How many, where it is not told."""

WEIGHTS = (*(DTYPES[name] for name in ("F64", "F32", "F16", "BF16")), *FLOAT8.values())
"""Dtypes whose values are weights as they are."""

FOREIGN: MappingProxyType[str, str] = MappingProxyType(
    {
        "weight_scale_2": "NVFP4",
        "pre_quant_scale": "smoothed (pre_quant_scale)",
        "weight_scale_inv": "block-scaled float8",
        "weight_zero_point": "asymmetric integer",
        "qweight": "GPTQ, AWQ or SVDQuant",
        "qzeros": "GPTQ or AWQ",
        "wscales": "SVDQuant",
        "smooth_factor": "SVDQuant",
        "absmax": "bitsandbytes",
        "quant_map": "bitsandbytes",
        "SCB": "bitsandbytes 8-bit",
        "_data": "quanto",
        "_scale": "quanto",
    }
)
"""Last words of names that only these formats have."""

MAX_MARKER = 1 << 16
"""Bytes of a `comfy_quant`; real ones have less than a hundred."""

_SCALES, _INPUTS = ("scale_weight", "weight_scale"), ("scale_input", "input_scale")
_PLAIN_KEYS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}


def unscaled(tensors: Tensors) -> Tensors:
    """The same tensors with scaled float8 and int8 weights multiplied out, in float32; reads scales and markers.

    Raises:
      SourceError: another format, named; a factor that is not a positive finite number for the matrix or for each row,
      or whose weight is not there or not of 8 bits.
    """
    refuse_foreign(tensors)
    where, named = tensors.files[0], dict(tensors.named)
    formats = _formats(tensors)
    eras = _markers(named)
    scales: dict[str, tuple[str, Tensor]] = {}
    for name in list(named):
        layer, _, last = name.rpartition(".")
        if last in _SCALES:
            if layer in scales:
                raise SourceError(f"{where}: {layer} has two scales of its weight; get it again")
            scales[layer] = name, named.pop(name)
        elif last in (*_INPUTS, "comfy_quant", "scaled_fp8"):
            del named[name]
    for layer in sorted(scales.keys() | formats.keys()):
        weight = named.get(f"{layer}.weight")
        if weight is None:
            name = scales[layer][0] if layer in scales else f"{layer}.comfy_quant"
            raise SourceError(f"{where}: {name} is not the factor of a weight; get it again")
        if layer not in scales:
            raise SourceError(f"{where}: {layer}.weight is {formats[layer][0]} without its weight_scale; get it again")
        name, scale = scales[layer]
        format, group = formats.get(layer) or (_of_era(eras, layer), 0)
        named[f"{layer}.weight"] = _product(where, f"{layer}.weight", weight, name, scale, format, group)
    return Tensors(tensors.files, named)


def refuse_foreign(tensors: Tensors) -> None:
    """Refuses formats that are told by the names of their tensors.

    Raises:
      SourceError: such a name, and its format.
    """
    for name in tensors.named:
        last = name.rpartition(".")[2]
        if last in FOREIGN or ".quant_state." in name:
            kind = FOREIGN.get(last, "bitsandbytes")
            raise SourceError(
                f"{tensors.files[0]}: {name} belongs to {kind} weights, which are not read; get bf16 or fp8_scaled ones"
            )


def refuse_others(tensors: Tensors, ignore: Iterable[str]) -> None:
    """Refuses tensors that are no weights, such as integers without a scale whose meaning is known.

    Args:
      ignore: names that are not read.

    Raises:
      SourceError: their names and dtypes.
    """
    ignore = set(ignore)
    odd = [f"{name} is {tensor.dtype.name}" for name, tensor in tensors.named.items()
           if tensor.dtype not in WEIGHTS and name not in ignore]  # fmt: skip
    if odd:
        raise SourceError(
            f"{tensors.files[0]}: {some(odd, 3)}: not weights without a scale whose meaning is known; "
            "get bf16 or fp8_scaled ones"
        )


def _markers(named: dict[str, Tensor]) -> dict[str, str]:
    """Format by prefix, from each `scaled_fp8`; another dtype than float8 means e4m3fn, as ComfyUI reads it."""
    return {
        name.removesuffix("scaled_fp8"): tensor.dtype.name if tensor.dtype.name in FLOAT8 else "float8_e4m3fn"
        for name, tensor in named.items()
        if name.rpartition(".")[2] == "scaled_fp8"
    }


def _of_era(markers: dict[str, str], layer: str) -> str | None:
    fitting = [prefix for prefix in markers if layer.startswith(prefix)]
    return markers[max(fitting, key=len)] if fitting else None


def _formats(tensors: Tensors) -> dict[str, tuple[str, int]]:
    """Format, and how many inputs are rotated together (0: none), of each layer that a `comfy_quant` or the metadata
    tell of."""
    where = tensors.files[0]
    told: dict[str, Any] = {}
    for layer, settings in tensors.formats.items():
        told[layer] = {"format": settings} if isinstance(settings, str) else settings
    for name, tensor in tensors.named.items():
        if name.endswith(".comfy_quant"):
            told[name.removesuffix(".comfy_quant")] = _marker(where, name, tensor)
    return {layer: _format(where, layer, settings) for layer, settings in told.items()}


def _marker(where: Path, name: str, tensor: Tensor) -> Any:
    if tensor.dtype != np.uint8 or math.prod(tensor.shape) > MAX_MARKER:
        raise SourceError(
            f"{where}: {name} is {tensor.dtype.name} {list(tensor.shape)}, not a short text; get it again"
        )
    try:
        return json.loads(np.ascontiguousarray(tensor.read()).tobytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: {name} is not readable JSON ({type(error).__name__}); get it again") from error


def _format(where: Path, layer: str, settings: Any) -> tuple[str, int]:
    """The 8-bit format that settings name, and how many inputs are rotated together."""
    name = settings.get("format") if isinstance(settings, dict) else None
    if not isinstance(name, str):
        raise SourceError(f"{where}: what is told of {layer} names no format; get it again")
    group = 0
    if name == INT8:
        settings, group = _rotation(where, layer, settings)
    odd = [key for key, value in settings.items() if key not in _PLAIN_KEYS and value]
    if name not in (*FLOAT8, INT8) or odd:
        more = f" with {', '.join(sorted(odd))}" if odd else ""
        raise SourceError(
            f"{where}: {layer}.weight is {name[:40]!r}{more[:80]}, which is not read; "
            f"of ComfyUI's formats {', '.join(FLOAT8)} and {INT8} are, get an fp8_scaled or bf16 file"
        )
    return name, group


def _rotation(where: Path, layer: str, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The settings without what is told of a rotation, at the top or under "params", and its group."""
    inner = settings.get("params")
    rest = {k: v for k, v in settings.items() if k != "params"} | inner if isinstance(inner, dict) else dict(settings)
    rotated, group = rest.pop("convrot", False), rest.pop("convrot_groupsize", ROTATED)
    powers = [4**k for k in range(1, 8)]
    if not isinstance(rotated, bool) or isinstance(group, bool) or group not in powers:
        raise SourceError(f"{where}: {layer}.weight is {INT8} with convrot {str(rotated)[:20]}, groups of "
                          f"{str(group)[:20]}; known are {', '.join(map(str, powers))}")  # fmt: skip
    return rest, group if rotated else 0


def _turned(matrix: np.ndarray, group: int) -> np.ndarray:
    """[O, I] float32 with its inputs rotated in groups by ConvRot's matrix, which is its own inverse."""
    one = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
    turn = functools.reduce(np.kron, [one] * round(math.log(group, 4)))
    return (matrix.reshape(-1, group) @ turn).reshape(matrix.shape)


def _product(
    where: Path, name: str, weight: Tensor, factor: str, scale: Tensor, format: str | None, group: int
) -> Tensor:
    """The weight times its scale, in float32, rotated back."""
    if weight.dtype == np.uint8 and format in FLOAT8:
        eight = FLOAT8[format]
    elif weight.dtype == np.int8 and format == INT8:
        eight = weight.dtype
        if len(weight.shape) != 2 or (group and weight.shape[1] % group):
            told = f"rotated in groups of {group}, which do not divide its inputs" if group else "and is no matrix"
            raise SourceError(f"{where}: {name} {list(weight.shape)} is told to be {INT8}, {told}; get it again")
    elif weight.dtype in FLOAT8.values() and format in (None, weight.dtype.name):
        eight = weight.dtype
    else:
        told = f"told to be {format}" if format else "no format told"
        raise SourceError(
            f"{where}: {name} is {weight.dtype.name} with a scale and {told}; get bf16 or fp8_scaled weights"
        )
    factors = _factors(where, name, weight, factor, scale)

    def values() -> np.ndarray:
        found = weight.read()
        return found.view(eight) if found.dtype != eight else found

    def read() -> np.ndarray:
        product = values().astype(np.float32)
        product *= factors
        return _turned(product, group) if group else product

    codes = None
    if len(weight.shape) == 2 and not group:
        codes = Codes(eight, lambda: (values(), np.broadcast_to(factors, (weight.shape[0], 1))))
    form = f"{eight.name} with a scale{', rotated' if group else ''}"
    return Tensor(weight.shape, np.dtype(ml_dtypes.bfloat16), read, form=form, codes=codes)


def _factors(where: Path, name: str, weight: Tensor, factor: str, scale: Tensor) -> np.ndarray:
    """The scale in float32, to be multiplied with the weight: of no axis, or a column."""
    rows = weight.shape[:1]
    column = scale.shape[:1] == rows and all(size == 1 for size in scale.shape[1:])
    if math.prod(scale.shape) != 1 and not column:
        raise SourceError(
            f"{where}: {factor} {list(scale.shape)} is not the factor of a weight {list(weight.shape)}: "
            "one number, or one a row, is"
        )
    if scale.dtype not in WEIGHTS or scale.dtype in FLOAT8.values():
        raise SourceError(
            f"{where}: {factor} is {scale.dtype.name}, not a factor of {name}; get bf16 or fp8_scaled weights"
        )
    factors = np.asarray(scale.read()).astype(np.float32).reshape(-1)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        bad = factors[~(np.isfinite(factors) & (factors > 0))][0]
        raise SourceError(f"{where}: {factor} holds {bad}, and a scale is positive and finite; its file is damaged")
    return factors.reshape(()) if factors.size == 1 else factors.reshape(-1, *(1,) * (len(weight.shape) - 1))
