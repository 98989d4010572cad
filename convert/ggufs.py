"""Reads GGUF files (llama.cpp's and ComfyUI-GGUF's) through the `gguf` package, dequantised as they are used.

A file holds each tensor's axes in the opposite order. Writers drop leading axes of length one, and reshape what their
quantisers cannot take; the real shape is then in the field `comfy.gguf.orig_shape.<name>`. Transformers have the names
of the original layout; text encoders llama.cpp's.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from convert.keymap import Shape
from convert.tensors import SourceError, Tensor, Tensors

PLAIN: MappingProxyType[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
    }
)
"""Types that hold numbers as they are."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

_THREE_AXES = re.compile(r"(^|\.)(modulation|scale_shift_table|emb_pos|pos_embed|cls_embedding|pos_embedding)$")
"""Tensors that begin with axes of length one, which writers drop."""

T5: tuple[tuple[str, str], ...] = (
    (r"^token_embd\.", "shared."),
    (r"^output\.", "lm_head."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^dec\.", "decoder."),
)
"""llama.cpp's names of a T5 encoder, and those of diffusers."""


def read(path: Path) -> Tensors:
    """The tensors of a GGUF file; quantised ones are multiplied out in float32 when they are read.

    Raises:
      SourceError: the `gguf` package is not there; a damaged file; a type that it cannot dequantise.
    """
    try:
        import gguf  # here: an extra, and no other source needs it
    except ImportError as error:
        raise SourceError(
            f"{path}: a GGUF file; reading it takes the gguf package: pip install 'wanjax[gguf]'"
        ) from error
    try:
        reader = _reader(gguf)(path)
        named = {tensor.name: _tensor(path, gguf, reader, tensor) for tensor in reader.tensors}
    except SourceError:
        raise
    except Exception as error:  # a hostile file can raise anything: bad types, sizes that overflow, text that is none
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{path}: damaged or truncated GGUF file ({reason}); get it again") from error
    tensors = Tensors((path,), named)
    return tensors.renamed(_t5_name) if any(name.startswith("enc.blk.") for name in named) else tensors


def _reader(gguf: Any) -> type:
    """The package's reader, held to the bytes that are there: its own goes on past the end for as long as told to."""

    class Reader(gguf.GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    return Reader


def _tensor(path: Path, gguf: Any, reader: Any, tensor: Any) -> Tensor:
    if reader.byte_order != "I":
        raise SourceError(f"{path}: a big-endian GGUF file; only little-endian files are read")
    kind = tensor.tensor_type
    shape = _shape(path, gguf, reader, tensor)
    if kind.name in PLAIN:
        dtype = PLAIN[kind.name]
        return Tensor(shape, dtype, lambda: tensor.data.view(dtype).reshape(shape))
    try:
        _, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError as error:
        raise SourceError(f"{path}: {tensor.name} is {kind.name}, which the gguf package cannot dequantise") from error
    dequantise: Callable[..., np.ndarray] = gguf.dequantize
    return Tensor(
        shape, np.dtype(ml_dtypes.bfloat16), lambda: dequantise(tensor.data, kind).reshape(shape), form=kind.name
    )


def _shape(path: Path, gguf: Any, reader: Any, tensor: Any) -> Shape:
    """The tensor's shape in the layout that it came from."""
    stored = tuple(int(size) for size in reversed(tensor.shape))
    field = reader.get_field(f"{ORIGINAL_SHAPE}{tensor.name}")
    if field is None:
        leading = 3 - len(stored) if _THREE_AXES.search(tensor.name) else 0
        return (1,) * leading + stored
    original = field.contents()
    if not isinstance(original, list) or not all(isinstance(size, int) and size > 0 for size in original):
        raise SourceError(f"{path}: {ORIGINAL_SHAPE}{tensor.name} is {original!r}, not a shape; get it again")
    if math.prod(original) != math.prod(stored):
        raise SourceError(
            f"{path}: {tensor.name} is stored as {list(stored)}, which cannot be {original}; get it again"
        )
    return tuple(original)


def _t5_name(name: str) -> str:
    for pattern, replacement in T5:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
