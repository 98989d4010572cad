"""Reads the tensors of a `torch.save` file without torch and without running code from it.

The zip container of torch 1.6 and later holds a pickle of the structure (`*/data.pkl`) and one uncompressed entry for
each storage (`*/data/<key>`); `torchlegacy` reads what was written before. Tensors are memory-mapped: nothing is read
before it is used.
"""

import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert import torchlegacy
from convert.torchpickle import Storage, TorchFileError, Unpickler, tensors_by_name

MAX_PICKLE = 256 * 2**20
"""A structure larger than this, in bytes, is no model: the largest published one has a few hundred kB."""

_TAR = b"ustar"


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as read-only memory maps in the dtypes they have.

    Args:
      path: written by `torch.save` of a state dict, or of {"state_dict": one}.

    Raises:
      TorchFileError: not such a file, damaged, or holding anything but tensors and dictionaries.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            if head.startswith(torchlegacy.MAGIC):
                tree = torchlegacy.structure(path, file)
            else:
                _check_magic(path, head)
                with zipfile.ZipFile(file) as archive:
                    tree = _structure(path, file, archive)
    except OSError as error:
        raise TorchFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (zipfile.BadZipFile, struct.error, UnicodeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]  # such as encrypted, or oddly packed
        raise TorchFileError(f"{path}: damaged or truncated ({reason}); get it again") from error
    return tensors_by_name(path, tree)


def _check_magic(path: Path, head: bytes) -> None:
    if head.startswith(b"PK"):
        return
    if head[257:262] == _TAR:
        raise TorchFileError(
            f"{path}: in the tar format of the first versions of torch; load and save it again with a newer torch"
        )
    raise TorchFileError(f"{path}: {mistaken(head) or 'not a torch file'}")


def mistaken(head: bytes) -> str | None:
    """What a file that begins so is, of what is often found in the place of weights; and the mend."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights; download the file itself"
    return None


def _structure(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> Any:
    """What the pickle describes: nested dicts with arrays as leaves."""
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TorchFileError(f"{path}: a zip file without torch's data.pkl")
    root = roots[0]
    if any(name.startswith(f"{root}code/") for name in names):
        raise TorchFileError(f"{path}: a TorchScript program, not weights; save its state_dict")
    order = b"little"
    if f"{root}byteorder" in names:
        with archive.open(f"{root}byteorder") as stream:
            order = stream.read(16).strip()
    if order != b"little":
        raise TorchFileError(f"{path}: byte order {order.decode(errors='replace')}; only little-endian files are read")
    info = archive.getinfo(f"{root}data.pkl")
    if info.file_size > MAX_PICKLE:
        raise TorchFileError(f"{path}: its structure has {info.file_size} bytes, more than any model's")
    storages: dict[str, Storage] = {}

    def storage(kind: Any, key: str) -> Storage:
        if key not in storages:
            storages[key] = Storage(kind, _mapped(path, file, archive, f"{root}data/{key}", kind))
        if storages[key].dtype != kind:
            raise TorchFileError(f"{path}: storage {key} is used in two dtypes")
        return storages[key]

    with archive.open(info) as stream:
        reader = Unpickler(stream, path, storage)
        try:
            return reader.load()
        except TorchFileError:
            raise
        except Exception as error:  # a hostile pickle can raise anything: stack underflow, bad opcodes, types
            raise TorchFileError(f"{path}: damaged structure ({type(error).__name__}: {error})") from error


def _mapped(path: Path, file: BinaryIO, archive: zipfile.ZipFile, name: str, dtype: np.dtype) -> np.ndarray:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise TorchFileError(f"{path}: no entry {name}; the file is incomplete, get it again") from error
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"{path}: {name} is compressed; load and save the file with torch")
    if info.file_size % dtype.itemsize:
        raise TorchFileError(f"{path}: {name} is not a whole number of {dtype} values")
    # The data begin after the entry's own header, whose extra field differs from the directory's.
    file.seek(info.header_offset)
    header = file.read(30)
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if header[:4] != b"PK\x03\x04" or start + info.file_size > os.fstat(file.fileno()).st_size:
        raise TorchFileError(f"{path}: {name} lies outside the file; it is truncated, get it again")
    if not info.file_size:
        return np.zeros(0, dtype)
    return np.memmap(path, np.uint8, "r", start, (info.file_size,)).view(dtype)
