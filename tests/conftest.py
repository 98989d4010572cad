"""Set before JAX starts: eight fake CPU devices for the sharding tests; few threads for torch."""

import os

DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

import torch  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count() or 1))
