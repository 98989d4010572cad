"""The manifest of a model folder: what is in it, with a digest of everything.

{"format": 1, "form": "orbax", "arrays": {"dit/head/bias": {"shape": [64], "dtype": "float32", "sha256": "..."}}, ...}
"""

import contextlib
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanjax.settings import refuse

MANIFEST = "manifest.json"
FORMAT = 1
ORBAX, SAFETENSORS = FORMS = ("orbax", "safetensors")
AGAIN = {ORBAX: "convert the weights again", SAFETENSORS: "get it again"}


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message is one line (or one list) naming what and the mend."""


@dataclass(frozen=True)
class Manifest:
    """What is in the folder.

    Attributes:
      arrays: "part/path" -> {"shape", "dtype", "sha256"}, the digest of the bytes in C order.
      sources: file -> sha256 of what it was made from.
      tool: who wrote it. dtype: what was asked for. loras: what was merged, "FILE:scale" each.
      files: config and tokenizer -> sha256 of the file; a file that is not named is not compared.
      form: "orbax" or "safetensors".
    """

    arrays: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, str]
    tool: str
    dtype: str
    loras: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    form: str = ORBAX

    def dumps(self) -> str:
        """As JSON text."""
        own = {"form": self.form, "tool": self.tool, "dtype": self.dtype, "loras": list(self.loras),
               "sources": dict(self.sources), "files": dict(self.files), "arrays": dict(self.arrays)}  # fmt: skip
        return json.dumps({"format": FORMAT} | own, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      CheckpointError: missing, unreadable, of a newer format, or with names that lead outside the folder.
    """
    file = folder / MANIFEST
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
    with told(f"{file}: not a readable manifest", AGAIN[ORBAX], *kinds):
        fields = json.loads(file.read_text(encoding="utf-8"))
        number, form = fields["format"], fields.get("form", ORBAX)
        refuse(
            (number != FORMAT, f"{file}: format {number}, this wanjax reads {FORMAT}; update wanjax or convert again"),
            (form not in FORMS, f"{file}: form {form!r}, this wanjax reads {' and '.join(FORMS)}; update wanjax"),
            error=CheckpointError,
        )
        arrays = {str(name): _entry(entry) for name, entry in fields["arrays"].items()}
        files = {str(name): str(digest) for name, digest in fields.get("files", {}).items()}
        loras = tuple(map(str, fields["loras"]))
        sources = dict(fields["sources"])
        manifest = Manifest(arrays, sources, str(fields["tool"]), str(fields["dtype"]), loras, files, form)
    outside = [f"array name {name!r}" for name in arrays if "/" not in name or any(map(_leads_out, name.split("/")))]
    outside += [f"file name {name!r}" for name in files if "/" in name or _leads_out(name)]
    refuse(*((True, f"{file}: {name} leads outside the folder") for name in outside), error=CheckpointError)
    return manifest


def manifest_of(folder: Path) -> Manifest | None:
    """As `read_manifest`; None where there is none, as in a folder of safetensors files by an older wanjax."""
    return read_manifest(folder) if os.path.lexists(folder / MANIFEST) else None


def _leads_out(step: str) -> bool:
    """Whether one step of a path is none, or may be several."""
    return step in ("", ".", "..") or "\\" in step or "\0" in step


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One array's entry with its fields in the types they must have. KeyError, TypeError or ValueError else."""
    shape, dtype = [operator.index(n) for n in entry["shape"]], entry["dtype"]
    if not isinstance(dtype, str):  # numpy would make something of a dictionary too
        raise TypeError(f"dtype {dtype!r} is not a name")
    return {"shape": shape, "dtype": np.dtype(dtype).name, "sha256": str(entry["sha256"])}


def raw(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, for a digest."""
    return memoryview(np.atleast_1d(array).view(np.uint8).reshape(-1))


def digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order."""
    return hashlib.sha256(raw(np.ascontiguousarray(array))).hexdigest()


def entry_of(array: np.ndarray) -> dict[str, Any]:
    """An array's entry in a manifest."""
    return {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": digest(array)}


def file_digest(file: Path) -> str:
    """sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size(manifest: Manifest) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize for entry in manifest.arrays.values())


@contextlib.contextmanager
def told(what: str, mend: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become a `CheckpointError`: what, their first line in brackets, the mend."""
    try:
        yield
    except CheckpointError:
        raise
    except kinds as error:
        raise CheckpointError(f"{what} ({first_line(error)}); {mend}") from error


def first_line(error: BaseException) -> str:
    """An error's message cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
