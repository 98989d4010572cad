"""Set before JAX starts: eight fake CPU devices for the sharding tests; few threads for torch."""

import os

DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture
def uncompiled(monkeypatch):
    """The fused kernel of the torch VAE is the same function; compiling it would only cost time."""
    from benchmarks.tiny import torch_vae

    monkeypatch.setattr(torch_vae, "_fused_norm_silu", lambda: torch_vae.norm_silu)
