"""Several hosts as one: real processes that find each other over loopback, with fake CPU devices each."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nano import write_model, write_orbax
from PIL import Image
from safetensors.numpy import load_file, save_file

from wanjax import hosts, sharding

ROOT = Path(__file__).parents[1]
LONGEST = 600
"""Seconds until processes that hang are killed."""
PROGRAM = "python -m samplers.inbetween"


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


def begin(arguments, devices):
    """One process of ours, with so many fake devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def end(processes):
    """(exit code, lines of stdout, of stderr) of each, without those of the CPU's collectives; none outlives this."""
    try:
        said = [process.communicate(timeout=LONGEST) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    said = [[[line for line in text.splitlines() if line and "[Gloo]" not in line] for text in both] for both in said]
    return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]


def two(*arguments, own=((), ())):
    """The same command on two hosts of four devices; `own` arguments come last."""
    where = f"127.0.0.1:{free_port()}"
    return [begin(["-m", "samplers.inbetween", *arguments, "--distributed", f"{where},{number},2", *own[number]], 4)
            for number in (0, 1)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture
def job(tmp_path, model):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(tmp_path / name)
    return ["--first", tmp_path / "a.png", "--last", tmp_path / "b.png", "--model", model, "--scale", 1, "--steps", 2]


@pytest.mark.slow
def test_two_hosts_make_the_video_of_one(job, tmp_path):
    """2 hosts x 4 devices and 1 x 8: the same bits, also with KAB, whose means are summed over devices, with a solver
    that draws noise anew, and with plots. The one joins itself, so that sums over devices go through the same library.
    """
    more = ["--method", "paper", "--kab-steps", "0-1", "--solver", "lcm", "--quiet"]
    codes = end(two(*job, *more, "--out", tmp_path / "two", "--explain", tmp_path / "plots"))
    assert [code for code, *_ in codes] == [0, 0], codes
    # The CPU's collectives write to stdout too, from several threads into each other's lines.
    printed = [str(tmp_path / "two") in "\n".join(out) for _, out, _ in codes]
    assert printed == [True, False] and not codes[1][2], "host 0 alone prints"
    alone = ["--distributed", f"127.0.0.1:{free_port()},0,1", "--out", tmp_path / "one"]
    ((code, *output),) = end([begin(["-m", "samplers.inbetween", *job, *more, *alone], 8)])
    assert code == 0, output
    one, other = ([iio.imread(frame) for frame in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert len(one) == 5 and np.std(one) > 1
    np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "plots").iterdir())) == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def said(results):
    """The one line of each host that failed."""
    lines = [lines for _, _, lines in results]
    assert all(len(own) == 1 and own[0].startswith(f"{PROGRAM}: error: ") for own in lines), results
    return [own[0].removeprefix(f"{PROGRAM}: error: ") for own in lines]


@pytest.mark.slow
def test_what_stands_where_host_0_writes_stops_all(job, tmp_path):
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"precious")
    results = end(two(*job, "--out", out))
    assert [code for code, *_ in results] == [2, 2]
    own, other = said(results)
    assert "clip.mp4: exists" in own and other == f"host 0: {own}"
    assert out.read_bytes() == b"precious"


@pytest.mark.slow
def test_hosts_that_were_told_different_things(job, tmp_path):
    results = end(two(*job, "--out", tmp_path / "clip.mp4", own=(["--seed", 1], ["--seed", 2])))
    assert [code for code, *_ in results] == [2, 2]
    assert all("host 1: keyframes, settings, model or versions that are not those of host 0" in line
               for line in said(results))  # fmt: skip
    assert not list(tmp_path.glob("clip*"))


def left(folder):
    """What lies under the outputs' names or is hidden."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("clip", ".")))


@pytest.mark.slow
def test_damaged_weights_on_one_host_end_all(job, tmp_path, model):
    """The manifests are the same, so that it is found when host 1 alone reads."""
    copy = shutil.copytree(model, tmp_path / "copy")
    weights = load_file(copy / "dit.safetensors")
    name = "blocks/modulation"  # small, whole on every device
    save_file(weights | {name: weights[name] + 1}, copy / "dit.safetensors")
    results = end(two(*job, "--quiet", "--out", tmp_path / "clip.mp4", own=((), ("--model", copy))))
    assert [code for code, *_ in results] == [1, 1]
    other, own = said(results)
    assert f"dit/{name}: not the array of the manifest" in own and other == f"host 1: {own}"
    assert left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["as it begins", "in its steps"])
def test_a_host_that_is_told_to_stop_ends_all(job, tmp_path, moment):
    """Only what a run has to go on from stays."""
    processes = two(*job, "--steps", 900, "--save-every", 1, "--out", tmp_path / "clip.mp4", "--quiet")
    # Host 0 begins once all agreed.
    there = ".wanjax*" if moment == "as it begins" else "clip.run/carry.safetensors"
    until = time.monotonic() + LONGEST
    while not list(tmp_path.glob(there)) and time.monotonic() < until:
        assert processes[0].poll() is None, end(processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    results = end(processes)
    assert [code for code, *_ in results] == [130, 130]
    assert [line.split(";")[0] for line in said(results)] == ["host 1: interrupted", "interrupted"]
    assert left(tmp_path) == ([] if moment == "as it begins" else ["clip.run"])
    kept = sorted(path.name for path in tmp_path.glob("clip.run/*"))
    assert kept == ([] if moment == "as it begins" else ["carry.safetensors", "encoded.safetensors", "run.json"])


STUCK = """
import sys
from pathlib import Path
import numpy as np
from jax.experimental import multihost_utils
from samplers.resume import RunFolder
from wanjax import hosts, writing
hosts._GRACE = 2.0
out = Path(sys.argv[2])
with hosts.Company("stuck") as company:
    company.join(sys.argv[1])
    if not hosts.is_first():
        hosts.meet("held")
        company.fail(1, "burns")
    kept = RunFolder.of(out, {})
    with kept.opened(), writing.staged(writing.check([writing.Target(out)])) as (part,):
        part.write_bytes(b"half")
        if sys.argv[3]:
            writing.write_bytes(kept.path / "carry.safetensors", b"kept")
        hosts.meet("held")
        multihost_utils.process_allgather(np.zeros(3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["", "carry"])
def test_a_host_that_waits_inside_a_collective_leaves_nothing_hidden(tmp_path, keeps):
    """No exception reaches it there, so that it is ended from outside; that is an end in order all the same."""
    port = free_port()
    results = end([begin(["-c", STUCK, f"127.0.0.1:{port},{number},2", tmp_path / "clip.mp4", keeps], 2)
                   for number in (0, 1)])  # fmt: skip
    assert [(code, lines) for code, _, lines in results] == [
        (1, ["stuck: error: host 1: burns"]), (1, ["stuck: error: burns"])]  # fmt: skip
    assert left(tmp_path) == (["clip.run"] if keeps else [])
    if keeps:  # the lock's file is held by nobody any more
        assert {path.name for path in tmp_path.glob("clip.run/*")} - {"lock"} == {"carry.safetensors", "run.json"}


READ = """
import sys
import jax, numpy as np
from nano import NANO, random_params
from wanjax import checkpoint, hosts, sharding, store
from pathlib import Path
with hosts.Company("read") as company:
    company.join(sys.argv[1])
    read, whole = 0, store.numbers
    def numbers(*arguments):
        global read
        found = whole(*arguments)
        read += found.nbytes
        return found
    store.numbers = numbers
    params = store.restore(Path(sys.argv[2]), "dit", checkpoint.param_shapes(NANO)["dit"],
                           sharding.make_mesh({"fsdp": 4, "sequence": 2}))
    least = 0
    for leaf, wanted in zip(*map(jax.tree.leaves, (params, random_params(NANO)["dit"])), strict=True):
        shards = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        least += sum(shards.values())
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted[shard.index])
    print(read, least, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    company.done()
"""


@pytest.mark.parametrize("write", [write_model, write_orbax], ids=["safetensors", "orbax"])
def test_each_host_reads_its_own_shards(tmp_path, write):
    folder, port = write(tmp_path / "model"), free_port()
    results = end([begin(["-c", READ, f"127.0.0.1:{port},{number},2", folder], 4) for number in (0, 1)])
    assert [code for code, *_ in results] == [0, 0], results
    for _, out, _ in results:
        read, least, whole = map(int, out[0].split())
        assert read == least < 0.7 * whole


@pytest.mark.parametrize("text", ["", "here", "10.0.0.2,0,2", "10.0.0.2:80,0", "10.0.0.2:80,2,2", "10.0.0.2:80,-1,2",
                                  ":80,0,2", "10.0.0.2:0,0,2", "10.0.0.2:99999,0,2", "10.0.0.2:80,0,2,3"])  # fmt: skip
def test_addresses_that_are_none(text):
    with pytest.raises(ValueError, match="HOST:PORT,NUMBER,COUNT") as caught:
        hosts.Address.parse(text)
    assert "\n" not in str(caught.value)


def test_addresses():
    assert hosts.Address.parse("10.0.0.2:1234,1,4") == hosts.Address("10.0.0.2:1234", 1, 4)
    assert hosts.Address.parse("[::1]:1234,0,1") == hosts.Address("[::1]:1234", 0, 1)


def test_no_cluster_here(job):
    """A value is not needed where JAX finds the others; here it finds none."""
    ((code, _, lines),) = end([begin(["-m", "samplers.inbetween", *job, "--distributed"], 1)])
    assert code == 2 and len(lines) == 1 and "distributed auto: the hosts do not find each other" in lines[0]


JOIN = """
import sys
from wanjax import hosts
from wanjax.writing import terminate_as_interrupt
with terminate_as_interrupt(), hosts.Company("join") as company:
    try:
        print("joins", flush=True)
        company.join(sys.argv[1], timeout=int(sys.argv[2]))
    except ValueError as error:
        company.fail(2, error)
    except KeyboardInterrupt:
        company.fail(130, "interrupted")
"""


def test_hosts_that_do_not_come():
    """One line from each that waits, and Ctrl-C is heard meanwhile."""
    where = [f"127.0.0.1:{free_port()},{number},3" for number in (0, 1)]
    results = end([begin(["-c", JOIN, one, 3], 1) for one in where])
    assert [code for code, *_ in results] == [2, 2]
    for _, _, lines in results:
        assert len(lines) == 1 and "the hosts do not find each other (waited 3 s)" in lines[0]
    (waiting,) = [begin(["-c", JOIN, where[1], 200], 1)]
    assert waiting.stdout.readline() == "joins\n"
    time.sleep(1)
    waiting.send_signal(signal.SIGINT)
    assert end([waiting]) == [(130, [], ["join: error: interrupted"])]


def test_alone():
    mesh = sharding.make_mesh({"fsdp": 8})
    values = np.arange(16.0).reshape(8, 2)
    there = hosts.put(values, NamedSharding(mesh, P("fsdp")))
    assert there.sharding.spec == P("fsdp")
    np.testing.assert_array_equal(hosts.fetch(there), values)
    hosts.check_mesh(1)
    with hosts.Company("wanjax") as company:
        company.agree("anything", "token")
        company.done()
        assert hosts.is_first() and company.fail(2, "bad") == 2
    assert hosts.count() == 1 == jax.process_count()
