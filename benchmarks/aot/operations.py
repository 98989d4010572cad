"""Operations of compiled matrix products and convolutions, two a multiply-add; of fused kernels by formula."""

import math
import re
from collections.abc import Mapping

import numpy as np

from benchmarks.aot.hlo import Instruction, arrays

Shapes = Mapping[str, str]
"""Printed shapes of a computation's instructions by name."""


def operations(one: Instruction, shapes: Shapes) -> int | None:
    """Of one execution; 0 for an instruction without products, None for a kernel of which they are not known."""
    if one.op == "dot":
        return _dot(one, shapes, _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest))
    if one.op == "convolution":
        return _convolution(one, shapes)
    if one.op != "custom-call":
        return 0
    if one.target.startswith("__cublas$"):
        return _dot(one, shapes, _numbers(r'"lhs_contracting_dimensions": ?\[([\d, "]*)\]', one.rest))
    if one.target.startswith("__cudnn$conv"):
        return _convolution(one, shapes)
    if one.target.startswith("__cudnn$fmha"):
        logits = _numbers(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([\d, "]*)\]', one.rest)
        return 4 * math.prod(logits) * arrays(one.shape)[0][1][-1]
    return _kernel(one, shapes) if is_kernel(one) else 0


KERNELS = ("tpu_custom_call", "mosaic", "triton", "__cudnn$", "__cublas$", "__gpu$")
"""What names of custom calls that are kernels begin with or contain."""


def is_kernel(one: Instruction) -> bool:
    """Whether it is a custom call that computes, and does not only allocate, shard or annotate."""
    return one.op == "custom-call" and any(part in one.target for part in KERNELS)


def _kernel(one: Instruction, shapes: Shapes) -> int | None:
    """As the kernel itself says; else of attention, whose q and k are the first of its large operands.

    Whether heads or tokens come first, the longest axis of k but the last is its tokens.
    """
    said = re.search(r'"?flops"?\s*[:=]\s*"?(\d+)', one.rest)
    if said and int(said[1]):
        return int(said[1])
    if not re.search(r"splash|flash|attention|attn", one.name + one.scope):
        return None
    found = [dims for name in one.operands for dtype, dims in arrays(shapes.get(name, ""))
             if len(dims) >= 3 and dtype in ("bf16", "f16", "f32")]  # fmt: skip
    if len(found) < 2 or found[0][-1] != found[1][-1]:
        return None
    return 4 * math.prod(found[0]) * max(found[1][:-1])


def kernel_name(one: Instruction) -> str:
    """What kind of kernel it is: its target, and what XLA calls the instruction, which Pallas names."""
    own = re.sub(r"[.\d]+$", "", one.name)
    return one.target if own in ("custom-call", "") else f"{one.target} {own}"


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _dot(one: Instruction, shapes: Shapes, contracted: list[int]) -> int:
    left = arrays(shapes[one.operands[0]])[0][1]
    return 2 * math.prod(arrays(one.shape)[0][1]) * math.prod(left[axis] for axis in contracted)


def _convolution(one: Instruction, shapes: Shapes) -> int:
    """Counts the places of the kernel that meet a number of the input; the others are padding."""
    source, kernel, out = (arrays(text)[0][1] for text in (*map(shapes.get, one.operands[:2]), one.shape))
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or ["", ""])[1]))
    groups = (_numbers(r"batch_group_count=(\d+)", one.rest) or [1])[0]
    met = 1
    for axis in map(str, range(sum(letter.isdigit() for letter in left))):
        settings = {key: value.split("x")[int(axis)] for key, value in window.items()}
        met *= _met(source[left.index(axis)], kernel[right.index(axis)], out[result.index(axis)], settings)
    batch, width_in, width_out = source[left.index("b")], kernel[right.index("i")], kernel[right.index("o")]
    return 2 * batch // groups * width_in * width_out * met


def _met(length: int, kernel: int, out: int, settings: Mapping[str, str]) -> int:
    """Pairs (output, place of the kernel) of one axis that meet one of `length` numbers."""
    stride, dilated, spread = (int(settings.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(settings.get("pad", "0_0").split("_")[0])
    starts, total = np.arange(out) * stride - before, 0
    for place in range(kernel):
        at = starts + place * spread
        total += int(np.count_nonzero((at >= 0) & (at % dilated == 0) & (at // dilated < length)))
    return total
