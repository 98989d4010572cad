"""Published weights of the metrics' networks: brought over once, into one safetensors file each, and read from there.

    python -m benchmarks.tgi.networks.weights lpips     lpips.safetensors     alexnet-owt-7be5be79.pth alex.pth
    python -m benchmarks.tgi.networks.weights inception inception.safetensors pt_inception-2015-12-05-6726825d.pth
    python -m benchmarks.tgi.networks.weights i3d       i3d.safetensors       rgb_imagenet.pt

The sources are the user's own copies of public files: torchvision's AlexNet and weights/v0.1/alex.pth of the `lpips`
package; the Inception that pytorch-fid downloads; the I3D of the torch port. Nothing is downloaded here. They are read
without torch and without running code from them. A converted file's metadata say which network and version it holds,
and the sha256 of the files it was made from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from benchmarks.tgi.networks import i3d, inception, lpips
from benchmarks.tgi.networks.layout import differences
from convert.tensors import SourceError, open_file, sha256
from wanjax import writing

BAD_INPUT = 2
SUFFIX = ".safetensors"


class Network(Protocol):
    """What every network's module has."""

    NAME: str
    VERSION: str

    def shapes(self) -> dict[str, Any]:
        """The parameters as a nested dict of `jax.ShapeDtypeStruct`."""

    def from_torch(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Parameters from the published tensors; ValueError lists every difference."""


NETWORKS: MappingProxyType[str, Network] = MappingProxyType({net.NAME: net for net in (lpips, inception, i3d)})


def convert(network: str, out: Path, sources: Sequence[Path]) -> None:
    """Makes one file of published ones; it stands there whole or not at all.

    Args:
      network: "lpips", "inception" or "i3d".
      out: to write, `*.safetensors`; one that is there is replaced.
      sources: torch or safetensors files that hold the network's tensors together.

    Raises:
      ValueError: sources that cannot be read, hold other tensors, or a target that cannot be written.
    """
    if out.suffix != SUFFIX:
        raise ValueError(f"{out}: name the file to write *{SUFFIX}")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it first")
    if any(source.exists() and out.exists() and source.samefile(out) for source in sources):
        raise ValueError(f"{out}: is a source too; give it another name")
    named = _read(sources)
    told = ", ".join(map(str, sources))
    try:
        params = NETWORKS[network].from_torch(named)
    except ValueError as error:
        raise ValueError(f"{told}: not the files of {network} ({error}); get those that --help names") from error
    flat = flatten_dict(params, sep="/")
    odd = [name for name, array in flat.items() if not np.isfinite(array).all()]
    if odd:
        raise ValueError(f"{told}: NaN or infinity in {', '.join(odd)}; get the files again")
    made_of = [{"file": Path(name).name, "sha256": value} for name, value in sha256(sources).items()]
    label = {"network": network, "version": NETWORKS[network].VERSION, "sources": json.dumps(made_of)}
    _write(out, safetensors.numpy.save(flat, metadata=label))


def _read(sources: Sequence[Path]) -> dict[str, np.ndarray]:
    """All tensors of the sources together."""
    named: dict[str, np.ndarray] = {}
    for source in sources:
        found = {name: tensor.read() for name, tensor in open_file(source).named.items()}
        if twice := sorted(set(named) & set(found)):
            raise ValueError(f"{source}: holds {', '.join(twice[:5])} as a source before it does; give each file once")
        named |= found
    return named


def _write(out: Path, content: bytes) -> None:
    try:
        writing.write_bytes(out, content, overwrite=True, anything=True)
    except (writing.OutputError, OSError) as error:
        raise ValueError(f"{out}: cannot be written ({error})") from error


def load(network: str, path: Path) -> dict[str, Any]:
    """The parameters of a converted file.

    Args:
      network: "lpips", "inception" or "i3d".
      path: made by `convert`.

    Returns:
      Nested dict of float32 arrays, on the default device.

    Raises:
      ValueError: not a converted file, of another network or version, or other tensors in it; all that is wrong.
    """
    module = NETWORKS[network]
    mend = f"make it again with python -m benchmarks.tgi.networks.weights {network}"
    try:
        tensors = open_file(path)
        with safe_open(path, framework="np") as file:
            label = file.metadata() or {}
    except SourceError as error:  # it names the file already
        raise ValueError(f"{error}; {mend}") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); {mend}") from error
    if label.get("network") != network:
        held = f"holds {label['network']}" if "network" in label else "was not made by the converter"
        raise ValueError(f"{path}: {held}, not {network}; {mend}")
    wrong = []
    if label.get("version") != module.VERSION:
        wrong.append(f"version {label.get('version')} for {module.VERSION}")
    wanted = {name: leaf.shape for name, leaf in flatten_dict(module.shapes(), sep="/").items()}
    wrong += differences(wanted, tensors.shapes)
    if odd := sorted(name for name, tensor in tensors.named.items() if tensor.dtype != np.float32):
        wrong.append(f"not float32: {', '.join(odd)}")
    if wrong:
        raise ValueError(f"{path}: not {network} as it should be ({'; '.join(wrong)}); {mend}")
    return unflatten_dict({name: jnp.array(tensor.read()) for name, tensor in tensors.named.items()}, sep="/")


def available(folder: Path) -> dict[str, Path]:
    """The converted files of a folder, `<network>.safetensors`, by network; those that are not there are left out."""
    files = {name: folder / f"{name}{SUFFIX}" for name in NETWORKS}
    return {name: file for name, file in files.items() if file.is_file()}


def digest(path: Path) -> str:
    """sha256 of a file in hexadecimal digits."""
    return next(iter(sha256([path]).values()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.tgi.networks.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("network", choices=tuple(NETWORKS))
    p.add_argument("out", metavar="OUT.safetensors", type=Path, help="file to write")
    p.add_argument("sources", metavar="SOURCE", type=Path, nargs="+", help="published files, your own copies")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 for bad input."""
    given = parser().parse_args(arguments)
    try:
        convert(given.network, given.out, given.sources)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    print(f"{given.out}: {given.network}, {given.out.stat().st_size} bytes, sha256 {digest(given.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
