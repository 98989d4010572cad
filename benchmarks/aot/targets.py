"""Machines that programs are compiled for without them: their devices, and the published figures of one device."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies

from samplers import chips, flags

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device, as JAX counts devices.

    Attributes:
      memory: GiB that a program may use (TPUs: as the compiler's own messages say; GPUs: what the driver leaves).
      peak: dense bfloat16 operations a second, published.
      clock: Hz that estimated cycles are of, which the published peak and the matrix units imply; None if unknown.
      accelerator: what libtpu calls a machine of eight.
    """

    memory: float
    peak: float
    clock: float | None = None
    accelerator: str = ""


def _chip(name: str, clock: float | None = None, accelerator: str = "") -> Chip:
    """With the figures that `samplers.chips` has of it."""
    own = chips.CHIPS[name]
    return Chip(own.memory / GIB, own.peak, clock, accelerator)


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": _chip("v5e", 1.5e9, "v5litepod-8"),
        "v5p": _chip("v5p", 1.75e9, "v5p-8"),
        "v6e": _chip("v6e", 1.75e9, "v6e-8"),
        "tpu7x": _chip("tpu7x", None, "tpu7x-8"),
        "h100": _chip("h100"),
    }
)

TARGETS: tuple[str, ...] = (
    "v6e:1x1", "v6e:2x4", "v5e:1x1", "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "tpu7x:2x2x1",
    "h100x1", "h100x2", "h100x4", "h100x8",
)  # fmt: skip

_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84930265088 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of the GPU, a text proto (xla/tools/hlo_opt/gpu_specs/h100_sxm.txtpb has the same figures)."""


@dataclass(frozen=True)
class Target:
    """A machine by its name in TARGETS."""

    name: str

    @property
    def chip(self) -> Chip:
        return CHIPS[self._kind]

    @property
    def platform(self) -> str:
        """As `Plan.of` takes it: "tpu" or "gpu"."""
        return "gpu" if self._kind == "h100" else "tpu"

    @property
    def packages(self) -> tuple[str, ...]:
        """What compiles for it."""
        return ("jax-cuda13-plugin",) if self.platform == "gpu" else ("libtpu",)

    @property
    def _kind(self) -> str:
        return self.name.split(":")[0] if ":" in self.name else self.name.split("x")[0]

    def prepare(self) -> None:
        """Sets the environment that the compiler reads when it is first used; JAX itself computes on the CPU.

        Raises:
          ValueError: the compiler is not installed.
        """
        module = self.packages[0].replace("-", "_")
        if importlib.util.find_spec(module) is None:
            extra = "cuda13" if self.platform == "gpu" else "tpu"
            raise ValueError(f"target {self.name}: {self.packages[0]} is not installed; pip install 'jax[{extra}]'")
        jax.config.update("jax_platforms", "cpu")
        # Compile times are measured, and no program of another version may come out of a cache.
        jax.config.update("jax_enable_compilation_cache", False)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
        }  # fmt: skip
        if self.chip.accelerator:
            os.environ["TPU_ACCELERATOR_TYPE"] = self.chip.accelerator
        # As the command line sets them on such a machine.
        if self.platform == "tpu":
            flags.add(os.environ, "LIBTPU_INIT_ARGS", flags.TPU)
        elif not self.name.endswith("x1"):
            flags.add(os.environ, "XLA_FLAGS", flags.GPUS)

    def devices(self) -> Sequence[Any]:
        """Devices that can be compiled for and do nothing else. Call `prepare` before."""
        if self.platform == "gpu":
            count = int(self.name.split("x")[1])
            found = topologies.get_topology_desc(
                platform="cuda", topology_name=self.name, target_config=_H100, topology=f"1x1x{count}"
            )
        else:
            one = {"chips_per_host_bounds": [1, 1, 1]} if self.name.endswith(":1x1") else {}
            found = topologies.get_topology_desc(topology_name=self.name, platform="tpu", **one)
        return list(found.devices)
