"""Devices and their published figures, the devices of this machine, and names such as "v5e-8" or "h100x2".

Imports no JAX: devices are looked for without touching them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from samplers import flags

GIB = 2**30
MOST = 4096
"""Devices of one machine or slice."""


@dataclass(frozen=True)
class Chip:
    """One device, as JAX counts devices.

    Attributes:
      platform: "gpu", "tpu" or "cpu".
      memory: bytes that the driver or the compiler says a device has.
      peak: dense bfloat16 operations a second, summed in float32, published; None where nobody knows.
      single: the same of float32: on GPUs as published, on TPUs a sixth, for it is done in six bfloat16 passes.
      bandwidth: bytes a second of its memory, published.
      link: bytes a second from the host, one way, by the generation of PCIe.
      source: where the figures are from.
    """

    platform: str
    memory: int
    peak: float | None = None
    single: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    source: str = ""


def _tpu(memory: float, peak: float, bandwidth: float, source: str) -> Chip:
    return Chip("tpu", int(memory * GIB), peak * 1e12, peak * 1e12 / 6, bandwidth * 1e9, 15e9, source)


def _gpu(mib: int, peak: float, single: float, bandwidth: float, pcie: int, source: str) -> Chip:
    """PCIe of 16 lanes gives 32 GB/s one way in its fourth generation, 64 in its fifth; about 0.8 of it arrives."""
    return Chip("gpu", mib * 2**20, peak * 1e12, single * 1e12, bandwidth * 1e9, {4: 25e9, 5: 50e9}[pcie], source)


_TPUS = "docs.cloud.google.com/tpu/docs/{}; memory: libtpu; link: jax-ml.github.io/scaling-book, TPUs"
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": _tpu(30.75, 275, 1228, _TPUS.format("v4")),
        "v5e": _tpu(15.75, 197, 819, _TPUS.format("v5e")),
        "v5p": _tpu(95.74, 459, 2765, _TPUS.format("v5p")),
        "v6e": _tpu(31.25, 918, 1638, _TPUS.format("v6e")),
        "tpu7x": _tpu(94.75, 1153.5, 3690, _TPUS.format("tpu7x") + "; two devices a chip"),
        "h100": _gpu(81559, 989, 67, 3350, 5, "NVIDIA H100 data sheet, SXM; memory: nvidia-smi"),
        "h200": _gpu(143771, 989, 67, 4800, 5, "NVIDIA H200 data sheet, SXM; memory: nvidia-smi"),
        "b200": _gpu(183359, 2250, 75, 7700, 5, "NVIDIA HGX B200 data sheet; memory: nvidia-smi"),
        "a100": _gpu(81920, 312, 19.5, 2039, 4, "NVIDIA A100 80GB data sheet, SXM; memory: nvidia-smi"),
        "a100-40gb": _gpu(40960, 312, 19.5, 1555, 4, "NVIDIA A100 data sheet; memory: nvidia-smi"),
        "l40s": _gpu(46068, 362, 91.6, 864, 4, "NVIDIA L40S data sheet; memory: nvidia-smi"),
        "a6000": _gpu(49140, 154.8, 38.7, 768, 4, "NVIDIA RTX A6000, Ampere GA102 white paper; memory: nvidia-smi"),
        "l4": _gpu(23034, 121, 30.3, 300, 4, "NVIDIA L4 data sheet; memory: nvidia-smi"),
        "rtx3090": _gpu(24576, 71, 35.6, 936, 4, "NVIDIA Ampere GA102 white paper; memory: nvidia-smi"),
        "rtx4090": _gpu(24564, 165.2, 82.6, 1008, 4, "NVIDIA Ada white paper; memory: nvidia-smi"),
        "rtx5090": _gpu(32607, 209.5, 104.8, 1792, 5, "NVIDIA RTX Blackwell white paper; memory: nvidia-smi"),
    }
)
"""By the name that --devices takes."""

_PCI: Mapping[str, str] = MappingProxyType(
    {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
)


@dataclass(frozen=True)
class Devices:
    """Some equal devices.

    Attributes:
      name: as it was asked for, or of the device that was found.
      count: how many.
      chip: one of them.
      host: bytes of host memory; None where it is not known.
    """

    name: str
    count: int
    chip: Chip
    host: int | None = None


def parse(text: str) -> Devices:
    """Reads a name in CHIPS with a number ("v5e-8", "h100x8"), a slice ("v6e:2x4"), or "this".

    Raises:
      ValueError: one line, for another name or number.
    """
    name = text.strip().lower()
    if name == "this":
        return this()
    number = 1
    found = re.fullmatch(r"(.+?)(?:[-x](\d+)|:(\d+(?:x\d+)+))", name)
    if name not in CHIPS and found:
        name, count, sides = found.groups()
        for side in (sides or count).split("x"):
            number *= min(int(side[:9]), MOST + 1)
    if name not in CHIPS:
        raise ValueError(f"devices {text!r}: no such; give this, or one of {', '.join(CHIPS)}, with a number as in "
                         "v5e-8 or h100x8")  # fmt: skip
    if not 1 <= number <= MOST:
        raise ValueError(f"devices {text!r}: give from 1 to {MOST} of them")
    return Devices(text, number, CHIPS[name])


def this(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Devices:
    """The devices of this machine: its TPUs, else its NVIDIA GPUs, else its processor; JAX_PLATFORMS is followed.

    Args:
      root: of the file system in which TPUs are looked for.
    """
    from samplers.hostmemory import host_memory

    host = host_memory(root)
    asked = {name for name in environment.get("JAX_PLATFORMS", "").lower().split(",") if name}
    tpus = [_PCI[kind] for kind in flags.pci(root) if kind in _PCI] if not asked or "tpu" in asked else []
    if tpus:
        chip, each = CHIPS[tpus[0]], 2 if tpus[0] == "tpu7x" else 1
        return Devices(f"this: {tpus[0]}", each * tpus.count(tpus[0]), chip, host)
    gpus = _gpus(environment) if not asked or asked & {"cuda", "gpu"} else []
    if gpus:
        name, memory = gpus[0]
        chip = next((chip for own, chip in CHIPS.items() if _same(own, name, memory, chip)), None)
        chip = chip or Chip("gpu", memory, source="nvidia-smi")
        return Devices(f"this: {name}", sum(one == gpus[0] for one in gpus), chip, host)
    return Devices("this: CPU", 1, Chip("cpu", host, source="the host's memory"), host)


def _same(own: str, name: str, memory: int, chip: Chip) -> bool:
    """Whether a GPU that calls itself `name` is that of a name in CHIPS."""
    words = re.sub(r"[^a-z0-9]", "", name.lower())
    return own.partition("-")[0] in words and abs(memory - chip.memory) < 0.1 * chip.memory


def _gpus(environment: Mapping[str, str]) -> list[tuple[str, int]]:
    """(name, bytes) of each NVIDIA GPU that this process may see, by nvidia-smi."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return []
    query = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that does not answer has no device to give
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[3].isdigit()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        rows = [row for row in rows if any(name and (name == row[0] or row[1].startswith(name)) for name in names)]
    return [(row[2], int(row[3]) * 2**20) for row in rows]
