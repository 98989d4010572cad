"""Which weight files of a folder make one model, and which of several copies is the better one."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from convert.tensors import SUFFIXES, SourceError, Tensor, Tensors, open_file, open_index, read_index, some

INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
"""Name of a sharded checkpoint's index, with or without a variant: `x.index.json`, `x.index.fp16.json`."""

ROWS = 64
"""Of each matrix, to compare copies."""

SHARD = re.compile(r"-\d+-of-\d+\b")

MANTISSA: MappingProxyType[str, float] = MappingProxyType(
    {
        "float64": 52, "float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2,
        "float8_e4m3fn with a scale": 3.5, "float8_e5m2 with a scale": 2.5, "int8 with a scale": 5.5,
        "int8 with a scale, rotated": 5.9,
        "Q8_1": 6, "Q8_0": 6, "Q6_K": 5, "Q5_K": 4.2, "Q5_1": 4.1, "Q5_0": 4, "Q4_K": 3.2, "Q4_1": 3.1, "Q4_0": 3,
    }
)  # fmt: skip
"""How exact each way to store a number is, about in bits; what is not listed is coarser."""

_PRECISION = re.compile(
    r"(?i)(?<![a-z0-9])(?:b?fp?(?:8|16|32)|float(?:8|16|32)|int8|convrot|e4m3fn|e5m2|scaled|pytorch|safetensors|gguf|"
    r"i?q\d+(?:[_-](?:k(?:[_-](?:xxs|xs|s|m|l))?|[01]|nl|xxs|xs|s|m))?|\d+-of-\d+)(?![a-z0-9])"
)
"""Words of a file's name that tell its precision or form and not its model."""


@dataclass(frozen=True)
class Group:
    """The file, or the files, of one set of tensors.

    Attributes:
      path: the file or the index, as a message names it.
      open: gives the tensors.
    """

    path: Path
    open: Callable[[], Tensors]

    @property
    def model(self) -> str:
        """The name without the words that tell a precision."""
        stem = INDEX.sub("", self.path.name) if INDEX.search(self.path.name) else self.path.stem
        return re.sub(r"[\W_]+", "-", _PRECISION.sub("", stem)).strip("-").lower()


def groups(folder: Path, deep: bool = False) -> tuple[list[Group], list[str]]:
    """Every set of tensors of a folder, shards as one, and notes on what was left out.

    Args:
      deep: also of the folders in it, among which models of other kinds may lie: what is unusable is left out then.

    Raises:
      SourceError: not `deep`, and an index that cannot be read, shards without their index, or an index without any of
      its shards where nothing else is.
    """
    files = _files(folder) if deep else sorted(file for file in folder.iterdir() if file.is_file())
    shards: dict[Path, set[Path]] = {}
    notes = []
    for index in (file for file in files if INDEX.search(file.name)):
        try:
            shards[index] = {index.parent / name for name in read_index(index).values()}
        except SourceError as error:
            if not deep:
                raise
            notes.append(f"{error}; left out")
    known = set().union(*shards.values())
    alone = [file for file in files if file.suffix.lower() in SUFFIXES and file not in known]
    lost = [file for file in alone if SHARD.search(file.name)]
    if lost:
        names = some([file.name for file in lost], 5)
        text = f"{lost[0].parent}: {names} are shards without their index.json; download it too"
        if not deep:
            raise SourceError(text)
        notes.append(f"{text}; left out")
        alone = [file for file in alone if file not in lost]
    found = [Group(file, lambda file=file: open_file(file)) for file in alone]
    for index, own in shards.items():
        if not any(shard.is_file() for shard in own) and (alone or len(shards) > 1):
            notes.append(f"{index}: none of its shards is there; left out")
        else:
            found.append(Group(index, lambda index=index: open_index(index)))
    return sorted(found, key=lambda group: group.path), notes


def _files(folder: Path) -> list[Path]:
    """All files below a folder, also through links to folders; each folder once."""
    seen, files = set(), []
    for path, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        files += [Path(path) / name for name in names]
    return sorted(file for file in files if file.is_file())


def exactness(tensors: Tensors) -> float:
    """How exact most numbers of a model are stored."""
    numbers: Counter[str] = Counter()
    for tensor in tensors.named.values():
        numbers[tensor.stored] += math.prod(tensor.shape)
    return MANTISSA.get(numbers.most_common(1)[0][0], 1)


def copies(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of tensors of the same names and shapes are the same numbers, each to its own precision.

    Compares some vectors and some matrices; False where a form has no bound for a single number (GGUF's).
    """
    if one.shapes != other.shapes:
        return False
    for vectors, count in ((True, 8), (False, 4)):
        names = sorted(name for name, shape in one.shapes.items() if (len(shape) == 1) == vectors and math.prod(shape))
        step = max(1, len(names) // count)
        if not all(_same(one.named[name], other.named[name]) for name in names[step // 2 :: step]):
            return False
    return True


FLOOR: MappingProxyType[str, float] = MappingProxyType({"float8_e4m3fn": 2.0**-10, "float8_e5m2": 2.0**-17})
"""Largest error of a number near zero, where a factor does not raise the numbers."""


def _same(one: Tensor, other: Tensor) -> bool:
    if not all(tensor.stored in MANTISSA for tensor in (one, other)) or any(
        tensor.form and not tensor.form.startswith("float8") for tensor in (one, other)
    ):
        return False
    a, b = (np.asarray(tensor.read())[:ROWS].astype(np.float64) for tensor in (one, other))
    # Each may be off by half of its last place; near zero by half of the smallest number.
    bits = min(math.floor(MANTISSA[tensor.stored]) for tensor in (one, other))
    floor = max(FLOOR.get(tensor.stored, 2.0**-25) for tensor in (one, other))
    if bits < 4:
        floor = max(floor, float(np.max(np.abs(a), initial=0.0)) * 2.0**-17)
    return bool(np.all(np.abs(a - b) <= 2.0**-bits * np.abs(a) * 1.1 + 1.1 * floor))


def _named_alike(one: Group, other: Group) -> bool:
    """Whether two names beside each other differ in the precision alone."""
    return one.path.parent == other.path.parent and one.model == other.model


def best(folder: Path, slot: str, found: Sequence[tuple[Group, Tensors]], one_model: bool) -> tuple[int, list[str]]:
    """Which of several sets of tensors of one part is taken, and a note on it.

    Args:
      found: more than one.
      one_model: the folder is that of one model, whatever its files are called.

    Raises:
      SourceError: they are not copies of one model; one line that lists them and names the option.
    """
    (first, tensors), *others = found
    for group, other in others:
        if tensors.shapes != other.shapes or not (one_model or _named_alike(first, group) or copies(tensors, other)):
            names = some([str(group.path.relative_to(folder)) for group, _ in found], 8)
            raise SourceError(f"{folder}: {names} are each a {slot}; choose one with --{slot} FILE")

    def rank(k: int) -> tuple[float, bool]:
        tensors = found[k][1]
        return exactness(tensors), tensors.files[0].suffix.lower() == ".safetensors"

    taken = max(range(len(found)), key=rank)
    names = some([str(group.path.relative_to(folder)) for group, _ in found], 8)
    path = found[taken][0].path.relative_to(folder)
    return taken, [f"{folder}: {names} are copies of one {slot}; {path} is taken, the best of them"]
