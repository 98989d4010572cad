"""Flags of XLA for this machine: set where they pay, never over the user's, never where they are unknown."""

import importlib.util
import os
import subprocess
import sys

import pytest

from samplers import flags

V6E = "0x006f"


def machine(root, tpus=(), gpus=0):
    """The files by which devices are known."""
    for number, kind in enumerate(tpus):
        folder = root / f"sys/bus/pci/devices/{number}"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text(f"{kind}\n")
    (root / "dev").mkdir()
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(gpus))):
        (root / "dev" / name).touch()
    other = root / "sys/bus/pci/devices/other"
    other.mkdir(parents=True)
    (other / "vendor").write_text("0x8086\n")
    return root


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """All accelerator packages are there."""
    monkeypatch.setattr(flags, "_installed", lambda *_: True)


def settled(root, distributed=False, **environment):
    note = flags.settle(environment, distributed, root)
    return environment, note


def test_tpus_get_theirs(tmp_path):
    environment, note = settled(machine(tmp_path, [V6E] * 4))
    added = environment.pop("LIBTPU_INIT_ARGS")
    assert added.split() == [f"--{name}={value}" for name, value in flags.TPU.items()]
    assert added in note and "\n" not in note and not environment
    assert flags.OVERLAP not in added


def test_what_the_user_set_stays(tmp_path):
    own = "--xla_latency_hiding_scheduler_rerun=0 --xla_enable_async_all_gather --xla_other=1"
    environment, note = settled(machine(tmp_path, [V6E]), LIBTPU_INIT_ARGS=own)
    added = environment["LIBTPU_INIT_ARGS"].removeprefix(f"{own} ")
    assert "rerun" not in added and "async_all_gather" not in added and "async_all_to_all=true" in added
    assert "rerun" not in note
    again, note = settled(tmp_path, **environment)
    assert again == environment and note is None


@pytest.mark.parametrize("value", ["=true", "", "=1"])
def test_fusion_is_left_out_beside_overlap(tmp_path, value):
    environment, _ = settled(machine(tmp_path, [V6E]), LIBTPU_INIT_ARGS=f"--{flags.OVERLAP}{value}")
    assert "collective_fusion" not in environment["LIBTPU_INIT_ARGS"]


@pytest.mark.parametrize("gpus, more, wanted", [
    (8, {}, True), (1, {}, False), (1, {"distributed": True}, True), (0, {"distributed": True}, False),
    (8, {"JAX_PLATFORMS": "cuda"}, True), (8, {"JAX_PLATFORMS": "cpu"}, False),
    (8, {"JAX_PLATFORMS": "cpu,tpu"}, False), (8, {"CUDA_VISIBLE_DEVICES": "3"}, False),
    (8, {"CUDA_VISIBLE_DEVICES": "0,3"}, True), (8, {"CUDA_VISIBLE_DEVICES": ""}, False),
    (8, {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}, False),
])  # fmt: skip
def test_several_gpus_get_theirs(tmp_path, gpus, more, wanted):
    before = dict(more)
    environment, note = settled(machine(tmp_path, gpus=gpus), **more)
    before.pop("distributed", None)
    assert (note is not None) == wanted == (environment != before)
    assert not wanted or environment["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true"


@pytest.mark.parametrize("tpus, asked", [((), None), ([V6E], "cpu"), ([V6E], "cuda")])
def test_nothing_elsewhere(tmp_path, tpus, asked):
    more = {} if asked is None else {"JAX_PLATFORMS": asked}
    assert settled(machine(tmp_path, tpus), **more) == (more, None)


def test_nothing_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "_installed", lambda *_: False)
    assert settled(machine(tmp_path, [V6E], gpus=8)) == ({}, None)


def test_names_are_known_and_read_after_the_import():
    """The CPU's library reads the GPU's names too, and ends for one that it does not know."""
    known = " ".join(f"--{name}={value}" for name, value in flags.GPUS.items())
    code = "import os, sys, jax; os.environ['XLA_FLAGS'] = sys.argv[1]; print(jax.device_count())"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for more, wanted in ((known, "3"), ("--xla_gpu_no_such_thing=true", "")):
        arguments = [sys.executable, "-c", code, f"--xla_force_host_platform_device_count=3 {more}"]
        run = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=200)
        assert run.stdout.strip() == wanted, run.stderr
        assert (run.returncode == 0) == bool(wanted)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_names_are_known_to_libtpu():
    """It compiles for TPUs that are not there, and ends for a name that it does not know."""
    code = ("from jax.experimental import topologies; "
            "print(len(topologies.get_topology_desc(topology_name='v6e:2x4', platform='tpu').devices))")  # fmt: skip
    known = " ".join(f"--{name}={value}" for name, value in flags.TPU.items())
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-8",
        "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
    }  # fmt: skip
    for more, wanted in ((known, "8"), ("--xla_tpu_no_such_thing=true", "")):
        run = subprocess.run([sys.executable, "-c", code], env=environment | {"LIBTPU_INIT_ARGS": more},
                             capture_output=True, text=True, timeout=200)  # fmt: skip
        assert run.stdout.strip() == wanted, run.stderr
