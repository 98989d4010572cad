"""What the networks share: from the tensors of a published file to parameters, compared as sets before any is used."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from convert.keymap import Shape, Transform


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
      foreign: name in the published file.
      path: in the parameters.
      shape: as a parameter.
      transform: from the file's axes to ours.
    """

    foreign: str
    path: tuple[str, ...]
    shape: Shape
    transform: Transform


def shapes_of(entries: Iterable[Entry]) -> dict[str, Any]:
    """The tree of float32 parameters."""
    return unflatten_dict({entry.path: jax.ShapeDtypeStruct(entry.shape, np.float32) for entry in entries})


def from_tensors(
    entries: Sequence[Entry], tensors: Mapping[str, np.ndarray], unused: Mapping[str, Shape]
) -> dict[str, Any]:
    """The tree of parameters, float32 copies.

    Args:
      entries: all of the network.
      tensors: as published.
      unused: name and shape of tensors that may be there and serve nothing.

    Raises:
      ValueError: missing, unexpected and wrongly shaped tensors, all of them.
    """
    wanted = {entry.foreign: entry.transform.foreign_shape(entry.shape) for entry in entries}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = differences(wanted, found, unused)
    if wrong:
        raise ValueError("; ".join(wrong))
    return unflatten_dict(
        {
            entry.path: np.array(entry.transform.forward(np.asarray(tensors[entry.foreign])), np.float32, order="C")
            for entry in entries
        }
    )


def differences(
    wanted: Mapping[str, Shape], found: Mapping[str, Shape], unused: Mapping[str, Shape] | None = None
) -> list[str]:
    """What separates two sets of named shapes, in words: missing, unexpected, misshapen; [] where they agree."""
    allowed = {**(unused or {}), **wanted}
    groups = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in allowed],
        "misshapen": [
            f"{name} {list(found[name])} for {list(shape)}"
            for name, shape in allowed.items()
            if name in found and found[name] != shape
        ],
    }
    return [f"{word}: {', '.join(sorted(names))}" for word, names in groups.items() if names]
