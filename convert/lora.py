"""LoRA files merged into the transformer, in float32, as its weights are read.

With s the scale that is asked for and c the file's own factor (alpha / rank):

  X.lora_A, X.lora_B (lora_down, lora_up; lora_mid)   weight += s c B A   (a convolution's kernel is in A, mid or B)
  X.lora_B.bias (PEFT's lora_bias)                    bias += s c b
  X.diff, X.diff_b, blocks.N.diff_m                   weight, bias, modulation += s d   (no alpha)

X is any linear, norm, convolution or table of the transformer (`loranames`). c comes from X.alpha, else from PEFT's
settings (`lorasettings`), else it is 1. What kohya's metadata repeats of alpha (ss_network_alpha) is not read, as by
kohya's own loader, ComfyUI and diffusers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert import lorasettings
from convert.hub import HUB
from convert.keymap import Shape
from convert.loranames import Targets, parse, refuse_others
from convert.sources import Part, Source
from convert.tensors import SourceError, Tensor, Tensors, open_file
from wanjax.compare import listed
from wanjax.writing import absolute

IN_FOLDER = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
             "pytorch_lora_weights.bin")  # fmt: skip
"""What PEFT and diffusers call the file of a LoRA's folder."""

ROWS = 1024
"""Rows of a product held at once, to bound the memory."""

Change = Callable[[np.ndarray], None]
"""Adds its part to a float32 tensor, in place; reads its matrices only then."""


@dataclass(frozen=True)
class Held:
    """A tensor of a LoRA file.

    Attributes:
      where: file and key, for messages.
      module: what it changes, as the file spells it.
    """

    where: str
    module: str
    tensor: Tensor

    @property
    def shape(self) -> Shape:
        """As stored."""
        return self.tensor.shape

    def read(self) -> np.ndarray:
        """In float32.

        Raises:
          SourceError: NaN or inf in it.
        """
        array = self.tensor.read().astype(np.float32)
        if not np.isfinite(array).all():
            raise SourceError(f"{self.where} holds NaN or inf; its file is damaged")
        return array


def merge(source: Source, requests: Sequence[str]) -> Source:
    """The source with updates merged into its transformer as its weights are read; reads no matrix itself.

    Args:
      requests: "FILE" or "FILE:scale" each; FILE may be the folder of a PEFT or diffusers LoRA.

    Raises:
      SourceError: no transformer, a bad scale, a file without updates or of another kind; keys that match nothing, or
        whose sizes do not fit, all of them.
    """
    part = source.parts.get("dit")
    if part is None:
        raise SourceError("--lora: the source has no transformer to merge it into")
    if part.family.layout == "wanjax":
        raise SourceError("--lora: merges into foreign weights, not into a wanjax folder; convert the source again")
    targets = Targets(part)
    changes: dict[str, list[Change]] = {}
    files = []
    for request in requests:
        path, scale = parse_request(request)
        found = _grouped(path, targets)
        settings = lorasettings.read(path)
        files += [path] if settings.file is None else [path, settings.file]
        for name, own in _of_file(path, scale, part, found, settings).items():
            changes.setdefault(name, []).extend(own)
    named = dict(part.tensors.named)
    for name, own in changes.items():
        named[name] = _merged(named[name], own)
    part = dataclasses.replace(part, tensors=Tensors((*part.tensors.files, *dict.fromkeys(files)), named))
    return dataclasses.replace(source, parts={**source.parts, "dit": part}, loras=tuple(requests))


def _merged(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    def read() -> np.ndarray:
        total = np.array(weight.read(), np.float32, order="C")
        for change in changes:
            change(total)
        return total

    return dataclasses.replace(weight, read=read, rows=None, codes=None)


def parse_request(text: str) -> tuple[Path, float]:
    """File and scale of "FILE" or "FILE:scale"; a drive's letter is no file, and a name with a colon is a name.

    Raises:
      SourceError: not a scale, or a folder without one LoRA.
    """
    if text.startswith(HUB):
        raise SourceError(f"--lora {text}: must be a file on this machine; get it with hf download")
    path, colon, scale = text.rpartition(":")
    drive = len(path) == 1 and path.isalpha() and scale.startswith(("/", "\\"))  # C:\x.safetensors
    if not colon or drive or Path(text).exists():
        return _file(Path(text)), 1.0
    try:
        number = float(scale)
    except ValueError as error:
        raise SourceError(f"--lora {text}: {scale!r} is not a scale; give FILE or FILE:0.8") from error
    if not np.isfinite(number):
        raise SourceError(f"--lora {text}: the scale must be finite")
    return _file(Path(path)), number


def _file(path: Path) -> Path:
    """The file of a LoRA that may be given as the folder it was saved to."""
    path = absolute(path)
    if not path.is_dir():
        return path
    usual = [path / name for name in IN_FOLDER if (path / name).is_file()]
    found = usual[:1] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        held = ", ".join(file.name for file in found) or f"none of {', '.join(IN_FOLDER)}"
        raise SourceError(f"{path}: a folder with {held}; give the file")
    return found[0]


class _Misfit(Exception):
    """One update that cannot be added to its tensor; the text is a line of the list."""


def _of_file(
    path: Path, scale: float, part: Part, found: Mapping[str, Mapping[str, Held]], settings: lorasettings.Settings
) -> dict[str, list[Change]]:
    """The changes that a file makes, by the source's names of the tensors; `found`: its tensors by name and role."""
    changes: dict[str, list[Change]] = {}
    wrong = []
    for target, roles in found.items():
        bias = f"{target.removesuffix('weight')}bias"
        shapes = {name: part.tensors.named[name].shape for name in (target, bias) if name in part.tensors.named}
        alone = "diff" in roles or "diff" in found.get(bias, {})  # then an alpha has nothing to scale
        try:
            for name, change in _changes(target, bias, roles, shapes, scale, settings, alone):
                changes.setdefault(name, []).append(change)
        except _Misfit as error:
            wrong.append(str(error))
    if wrong:
        raise SourceError(f"{path}: {len(wrong)} updates do not fit (made for another model?):{listed(sorted(wrong))}")
    return changes


def _grouped(path: Path, targets: Targets) -> dict[str, dict[str, Held]]:
    """The tensors of a file by role, by the source's name of what they change; every key must be used."""
    tensors = open_file(path).named
    refuse_others(path, tensors)
    found: dict[str, dict[str, Held]] = {}
    odd = []
    for name, tensor in tensors.items():
        key = parse(name)
        target = key and targets.find(key)
        if target is None:
            odd.append(name)
            continue
        if tensor.dtype.kind in "iub" and key.role != "alpha":
            raise SourceError(
                f"{path}: {name} is {tensor.dtype.name}, which is no weight without a scale; get it in a float format"
            )
        role = "diff" if key.role.startswith("diff") else key.role
        if role in found.setdefault(target, {}):
            raise SourceError(f"{path}: {target} has two {role} matrices in different spellings; keep one")
        found[target][role] = Held(f"{path}: {name}", key.target, tensor)
    if odd:
        raise SourceError(
            f"{path}: {len(odd)} keys fit no linear, norm or table of the transformer:{listed(sorted(odd))}"
        )
    if not found:
        raise SourceError(f"{path}: holds no LoRA")
    return found


def _changes(
    target: str, bias: str, roles: Mapping[str, Held], shapes: Mapping[str, Shape], scale: float,
    settings: lorasettings.Settings, alone: bool,
) -> Iterator[tuple[str, Change]]:  # fmt: skip
    """What the tensors of one target change, by name; `alone`: an alpha without matrices is no mistake."""
    if target not in shapes:
        raise _Misfit(f"{target}: missing in the source itself")
    if "diff" in roles:
        yield target, _whole(target, shapes[target], roles["diff"], scale)
    factors = {role: held for role, held in roles.items() if role != "diff" and not (alone and role == "alpha")}
    if not factors:
        return
    if "down" not in roles or "up" not in roles:
        raise _Misfit(f"{target}: only {', '.join(factors)}")
    up, down, mid = roles["up"], roles["down"], roles.get("mid")
    form = _form(shapes[target], up, down, mid)
    if form is None:
        middle = f", mid {list(mid.shape)}" if mid is not None else ""
        raise _Misfit(f"{target} {list(shapes[target])}: up {list(up.shape)}, down {list(down.shape)}{middle}")
    rank, matrices = form
    own = settings.factor(down.module, rank) if "alpha" not in roles else _alpha(target, roles["alpha"]) / rank
    yield target, _product(matrices, scale * own)
    if "up_bias" in roles:
        if bias not in shapes:
            raise _Misfit(f"{target}: a bias for a layer that has none")
        yield bias, _whole(bias, shapes[bias], roles["up_bias"], scale * own)


def _whole(name: str, shape: Shape, held: Held, factor: float) -> Change:
    """A change of the tensor's own shape, up to axes of one."""
    if [size for size in held.shape if size != 1] != [size for size in shape if size != 1]:
        raise _Misfit(f"{name} {list(shape)}: {held.where.rpartition('.')[2]} {list(held.shape)}")

    def add(total: np.ndarray) -> None:
        total += np.float32(factor) * held.read().reshape(total.shape)

    return add


def _alpha(target: str, held: Held) -> float:
    if math.prod(held.shape) != 1:
        raise _Misfit(f"{target}: alpha {list(held.shape)} is not one number")
    return float(held.read().reshape(()))


Matrices = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Reads [out, n] and [n, in * kernel], whose product is what a LoRA adds."""


def _form(shape: Shape, up: Held, down: Held, mid: Held | None) -> tuple[int, Matrices] | None:
    """The rank and the matrices of a LoRA of a weight [out, in, *kernel]; None where it does not fit.

    Axes of one after the first two do not count, so a linear's factors may be those of a convolution and the reverse.
    The kernel may lie in `down` (kohya, PEFT), in `mid` (LyCORIS' Tucker form) or in `up`; a linear's factors may also
    be stored transposed.
    """
    u, d, weight = _axes(up.shape), _axes(down.shape), _axes(shape)
    if min(map(len, (u, d, weight))) < 2 or 0 in u + d:
        return None
    out, width, kernel = weight[0], weight[1], weight[2:]
    if mid is not None:
        if u[:1] + u[2:] != (out,) or d[1:] != (width,) or _axes(mid.shape) != (u[1], d[0], *kernel):
            return None
        return d[0], lambda: (up.read().reshape(u), _tucker(mid.read().reshape(u[1], d[0], -1), down.read().reshape(d)))
    if u == (out, d[0]) and d[1:] in ((width, *kernel), (math.prod(weight[1:]),)):
        return d[0], lambda: (up.read().reshape(u), down.read().reshape(d[0], -1))
    if u == (out, d[0], *kernel) and d[1:] == (width,):
        return d[0], lambda: (up.read().reshape(out, -1), _spread(down.read().reshape(d), math.prod(kernel)))
    if u == (d[-1], out) and d == (math.prod(weight[1:]), u[0]):
        return u[0], lambda: (up.read().reshape(u).T, down.read().reshape(d).T)
    return None


def _axes(shape: Shape) -> Shape:
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def _tucker(mid: np.ndarray, down: np.ndarray) -> np.ndarray:
    """[a, b, k] and [b, i] to [a, i * k]: a convolution after a linear."""
    return np.einsum("abk,bi->aik", mid, down).reshape(len(mid), -1)


def _spread(down: np.ndarray, size: int) -> np.ndarray:
    """[r, i] to [r * k, i * k] with nothing between two positions of the kernel: for a kernel that lies in `up`."""
    return np.einsum("ri,kl->rkil", down, np.eye(size, dtype=np.float32)).reshape(len(down) * size, -1)


def _product(matrices: Matrices, factor: float) -> Change:
    def add(total: np.ndarray) -> None:
        left, right = matrices()
        flat = total.reshape(len(total), -1)
        for first in range(0, len(flat), ROWS):
            flat[first : first + ROWS] += (np.float32(factor) * left[first : first + ROWS]) @ right

    return add
