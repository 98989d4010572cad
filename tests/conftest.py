"""Set before JAX starts: eight fake CPU devices for the sharding tests, one compilation cache for all workers of a run,
no search for TPUs where there is no accelerator; few threads for torch."""

import os
import shutil
import tempfile
from pathlib import Path

FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
for flag in FLAGS:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):  # workers inherit them
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN_CACHE = None
if CACHE not in os.environ:
    OWN_CACHE = os.environ[CACHE] = tempfile.mkdtemp(prefix="wanjax-test-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# libtpu is there to compile with (tests/test_aot.py); every process would look for its chips and complain.
if not any(any(Path("/dev").glob(names)) for names in ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A small model in the original repository's form; not to be changed."""
    import conversion

    return conversion.write_source(tmp_path_factory.mktemp("source") / "original")


@pytest.fixture(scope="session")
def made(source, tmp_path_factory):
    """The same model converted, in float32; not to be changed."""
    from convert.__main__ import main

    target = tmp_path_factory.mktemp("made") / "model"
    assert main([str(source), str(target), "--dtype", "f32"]) == 0
    return target


@pytest.fixture
def uncompiled(monkeypatch):
    """The fused kernel of the torch VAE is the same function; compiling it would only cost time."""
    from benchmarks.tiny import torch_vae

    monkeypatch.setattr(torch_vae, "_fused_norm_silu", lambda: torch_vae.norm_silu)


def pytest_unconfigure():
    """Of the process that made it: removes the cache."""
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
