"""`python -m samplers.plan`: figures, machines, sources, and what it says to input that is wrong."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest

from convert import hub
from samplers import budget, chips, compiled_budget, flops, memory, plan_command
from samplers.estimate import GIB
from samplers.plan import Settings
from wanjax.config import preset

ROOT = Path(__file__).parents[1]
BIG = ("--model", "flf2v_14b", "--devices")


def run(capsys, *arguments):
    """(exit code, output, error stream) of the command."""
    try:
        code = plan_command.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err.strip()


def read(capsys, *arguments):
    """The JSON of a run."""
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def process(*arguments, code=None, **environment):
    """The command in a process of its own."""
    own = ["-c", code] if code else ["-m", "samplers.plan"]
    return subprocess.run([sys.executable, "-W", "error", *own, *map(str, arguments)], cwd=ROOT, text=True, timeout=120,
                          capture_output=True, env=os.environ | environment)  # fmt: skip


def test_the_published_model_on_one_gpu(capsys):
    found = read(capsys, *BIG, "h100", "--size", "720x1280", "--frames", "81", "--steps", "40")
    assert {part: round(own["memory"] / GIB, 1) for part, own in found["parts"].items()} == {
        "dit": 30.9, "umt5": 10.6, "clip": 1.1, "vae": 0.5,
    }  # fmt: skip
    assert {part: round(own["int8"] / GIB, 1) for part, own in found["parts"].items()}["dit"] == 15.9
    assert [(way["memory"], way["weights"]) for way in found["ways"]] == [
        (policy, weights) for policy in ("keep", "stage", "stream") for weights in ("bf16", "int8")
    ]
    for way in found["ways"]:
        assert way["peak_bytes"] == max(way["stages"].values())
        assert set(way["stages"]) == {"text", "images", "keyframes", "denoise", "decode"}
    assert (found["choice"]["memory"], found["choice"]["weights"], found["refusal"]) == ("keep", "bf16", None)
    assert found["operations"]["denoise"] == 40 * found["operations"]["step"]
    grid = (21, 90, 160)
    assert found["operations"]["step"] == flops.total(flops.dit(preset("flf2v_14b").dit, grid, batch=2))
    assert found["download_bytes"] is None


@pytest.mark.parametrize("devices, size, chosen", [
    ("h100", "720x1280", ("keep", "bf16")), ("rtx4090", "480x864", ("stage", "int8")),
    ("a100-40gb", "480x864", ("stage", "bf16")), ("v5e-1", "720x1280", ("stream", "bf16")),
    ("v6e-1", "480x864", ("stage", "int8")), ("v5e-8", "480x864", ("keep", "bf16")),
    ("h100x8", "720x1280", ("keep", "bf16")), ("v6e:2x4", "720x1280", ("keep", "bf16")),
])  # fmt: skip
def test_what_auto_picks(capsys, devices, size, chosen):
    found = read(capsys, *BIG, devices, "--size", size)
    assert (found["choice"]["memory"], found["choice"]["weights"]) == chosen
    assert found["choice"]["peak_bytes"] * memory.SPARE <= found["devices"]["memory"]
    assert found["devices"]["count"] == (8 if "8" in devices or ":" in devices else 1)


def test_the_time_of_the_measured_gpu_lies_in_the_range(capsys):
    """One H200: 6.13 s a step of 480x864x81, the VAE in float32 5.6 and 9.9 s."""
    found = read(capsys, *BIG, "h200", "--size", "480x864", "--steps", "50")["seconds"]
    for stage, measured in (("denoise", 50 * 6.13), ("encode", 5.6), ("decode", 9.9)):
        assert found[stage][0] < measured < found[stage][1], stage
    assert found["total"] == pytest.approx([sum(found[stage][end] for stage in ("encode", "denoise", "decode"))
                                            for end in (0, 1)])  # fmt: skip


def test_streaming_is_as_slow_as_the_link(capsys):
    small = (*BIG, "rtx4090", "--memory", "stream", "--size", "64x64", "--frames", "5")
    few = read(capsys, *small, "--weights", "bf16")
    moved = 2 * few["settings"]["steps"] * few["choice"]["host_bytes"] / 25e9
    assert few["seconds"]["denoise"][0] == pytest.approx(moved)
    narrow = read(
        capsys, *BIG, "rtx4090", "--memory", "stream", "--weights", "int8", "--size", "64x64", "--frames", "5"
    )
    assert narrow["seconds"]["denoise"][0] == pytest.approx(moved / 2, rel=0.01)


def test_guidance_of_one_halves_the_work(capsys):
    one, two = (read(capsys, *BIG, "h100", "--guidance", scale)["operations"] for scale in (1, 5))
    assert two["step"] == 2 * one["step"] and two["decode"] == one["decode"]


def test_skipped_passes_save_work_and_take_memory(capsys):
    every, half = (read(capsys, *BIG, "h100", "--steps", 50, *more) for more in ((), ("--skip-passes", 0.5)))
    assert half["settings"]["skip_passes"] == 0.5 and every["settings"]["skip_passes"] == 0
    assert half["operations"]["denoise"] == every["operations"]["denoise"] / 2
    assert half["operations"]["decode"] == every["operations"]["decode"]
    assert half["seconds"]["denoise"] == pytest.approx([one / 2 for one in every["seconds"]["denoise"]])
    more = [way["stages"]["denoise"] - before["stages"]["denoise"]
            for way, before in zip(half["ways"], every["ways"], strict=True)]  # fmt: skip
    assert set(more) == {2 * 4 * 4 * (21 * 60 * 108 * 16 + 1)}
    code, _, err = run(capsys, *BIG, "h100", "--skip-passes", 0.7)
    assert code == 2 and "skip passes 0.7: give a share of the steps from 0 to 0.6" in err


def test_devices_share_the_work(capsys):
    one, eight = (read(capsys, *BIG, name) for name in ("v6e-1", "v6e-8"))
    assert one["seconds"]["denoise"][1] == pytest.approx(8 * eight["seconds"]["denoise"][1])
    assert eight["devices"]["mesh"] == {"fsdp": 1, "sequence": 8}
    assert eight["ways"][0]["peak_bytes"] < one["ways"][0]["peak_bytes"] / 4
    assert {way["memory"] for way in eight["ways"]} == {"keep", "stage"}


def test_the_text_says_the_same(capsys):
    code, out, err = run(capsys, *BIG, "rtx4090")
    assert (code, err) == (0, "")
    found = read(capsys, *BIG, "rtx4090")
    assert "flf2v_14b, 480x864, 81 frames, 50 steps, on rtx4090: 24.0 GiB" in out
    assert "it would run with --memory stage --weights int8: " in out
    assert "time, estimated: " in out and "GiB, estimated" in out
    for way in found["ways"]:
        assert f"{way['peak_bytes'] / GIB:.2f}" in out
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in out  # 18.5 of 24 GiB is more than JAX takes by itself
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in run(capsys, *BIG, "h200")[1]


def test_nothing_that_fits_is_told_with_what_would(capsys):
    found = read(capsys, *BIG, "rtx4090", "--size", "2160x3840")
    assert found["choice"] is None and "largest size of this shape is" in found["refusal"]
    code, out, _ = run(capsys, *BIG, "rtx4090", "--memory", "keep", "--weights", "bf16")
    assert code == 0 and "nothing fits: model flf2v_14b: its weights alone are 43.1 GiB, there are 24.0" in out
    assert found["seconds"]["total"][0] > 0


def test_a_limit_for_the_vae_takes_windows(capsys):
    found = read(capsys, *BIG, "h100", "--size", "720x1280", "--vae-memory", "6", "--dtype", "bfloat16")
    assert found["choice"]["tiles"] > 1
    assert found["choice"]["stages"]["decode"] - sum(own["memory"] for own in found["parts"].values()) <= 6 * GIB
    whole = read(capsys, *BIG, "h100", "--size", "720x1280", "--dtype", "bfloat16")
    assert found["seconds"]["decode"][0] > whole["seconds"]["decode"][0]


def test_a_folder_is_measured(capsys):
    found = read(capsys, "--devices", "this")
    assert found["model"]["name"] == "tiny"
    for part, own in found["parts"].items():
        assert own["disk"] == (ROOT / "wanjax" / "assets" / "tiny" / f"{part}.safetensors").stat().st_size
    wide = read(capsys, "--dtype", "bfloat16")
    assert wide["parts"]["dit"]["memory"] < found["parts"]["dit"]["memory"]


def repository(folder, sizes):
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            file.truncate(size)
    return folder


SIZES = {
    "model_index.json": 700, "transformer/config.json": 400, "vae/config.json": 300, "vae/m.safetensors": 5000,
    "transformer/m.safetensors.index.json": 900, "transformer/m-00001-of-00002.safetensors": 70000,
    "transformer/m-00002-of-00002.safetensors": 60000, "transformer/m-00001-of-00002.fp16.safetensors": 31000,
    "text_encoder/model.safetensors": 30000, "image_encoder/model.safetensors": 20000,
    "tokenizer/tokenizer.json": 1000, "README.md": 100000, "assets/logo.png": 50000,
}  # fmt: skip


def test_a_repository_is_asked_for_sizes_alone(tmp_path):
    """The hub gives its list and not one file; one that it lacks is refused; without a hub the formula does."""
    name = "someone/Wan2.1-FLF2V-14B-720P"
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    with hub_server.served(repository(tmp_path / "repository", SIZES), name) as (url, server):
        done = process("--model", f"hf://{name}", "--devices", "h100", "--json", HF_ENDPOINT=url, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert not server.fetched
        absent = process("--model", "hf://someone/flf2v-14b-else", HF_ENDPOINT=url, **environment)
    assert {part: own["disk"] for part, own in found["parts"].items()} == {
        "dit": 130900, "vae": 5000, "umt5": 30000, "clip": 20000,
    }  # fmt: skip
    assert found["download_bytes"] == 130900 + 5000 + 30000 + 20000 + 700 + 400 + 300 + 1000
    assert found["model"]["name"] == "flf2v_14b"
    assert absent.returncode == 2 and absent.stderr.startswith("error: hf://someone/flf2v-14b-else: no such repository")
    assert absent.stderr.count("\n") == 1

    gone = process("--model", f"hf://{name}", "--devices", "h100", HF_HUB_OFFLINE="1", **environment)
    assert gone.returncode == 0 and gone.stderr == ""
    assert f"note: hf://{name}: cannot be had from the hub (HF_HUB_OFFLINE is set)" in gone.stdout
    assert "dit         -      30.89" in gone.stdout and "download" not in gone.stdout


@pytest.mark.parametrize("index, name, shard", [
    ("m.safetensors.index.json", "m-00001-of-00002.safetensors", True),
    ("m.safetensors.index.json", "m-00001-of-00002.fp16.safetensors", False),
    ("m.safetensors.index.fp16.json", "m-00001-of-00002.fp16.safetensors", True),
    ("m.fp16.safetensors.index.json", "m.fp16-00001-of-00002.safetensors", True),
    ("a/m.bin.index.json", "a/m-00001-of-00002.bin", True), ("a/m.bin.index.json", "b/m-00001-of-00002.bin", False),
    ("m.bin.index.json", "m-00001-of-00002.safetensors", False), ("m.bin.index.json", "mm-00001-of-00002.bin", False),
])  # fmt: skip
def test_shards_of_an_index(index, name, shard):
    assert hub._shards(index, [name]) == ([name] if shard else [])


@pytest.mark.parametrize("arguments, line", [
    (("--devices", "tpu9"), "error: devices 'tpu9': no such; give this, or one of v4, v5e"),
    (("--devices", "v5e-0"), "error: devices 'v5e-0': give from 1 to 4096 of them"),
    (("--devices", "v5e-" + "9" * 5000), "error: devices 'v5e-9"), (("--devices", ""), "error: devices '': no such"),
    (("--devices", "v5e-"), "error: devices 'v5e-': no such"), (("--devices", "x8"), "error: devices 'x8': no such"),
    (("--devices", "v5e-8\n8"), "error: devices 'v5e-8\\n8': no such"),
    (("--model", "nowhere/at/all"), "error: model 'nowhere/at/all': no such folder"),
    (("--model", ""), "error: model "), (("--model", "a\0b"), "error: model 'a\\x00b': cannot be read"),
    (("--model", ROOT), f"error: model {ROOT}: no config.json in it"),
    (("--model", "hf://"), "error: hf://: not a model repository"),
    (("--model", "hf://someone/other"), "error: model hf://someone/other: its name does not tell which model"),
    (("--model", "t2v_1_3b"), "error: model t2v_1_3b: takes no keyframes"),
    (("--frames", "80"), "error: frames 80"), (("--frames", "-3"), "error: frames -3"),
    (("--size", "481x864"), "error: size 481x864"), (("--size", "0x0"), "error: size 0"),
    (("--steps", "0"), "error: steps: got 0"), (("--guidance", "nan"), "error: guidance nan"),
    (("--size", "big"), "error: argument --size: 'big' is not HEIGHTxWIDTH"), (("--frames", "x"), "error: argument"),
    (("--vae-memory", "-1"), "error: argument --vae-memory: '-1' is not a number of GiB above 0"),
    (("--vae-memory", "nan"), "error: argument --vae-memory"),
    (("--vae-memory", "inf"), "error: argument --vae-memory"),
    (("--memory", "all"), "error: argument --memory"), (("--weights", "int4"), "error: argument --weights"),
    (("--vae-memory", "0.001"), "error: vae memory 0.0 GiB"), (("--compile", "sound"), "error: argument --compile"),
    (("--model", "flf2v_14b", "--devices", "rtx4090", "--compile"), "error: --compile: not for rtx4090; for h100-1"),
    (("--devices", "h100", "--model", "flf2v_14b", "--size", "99999x99999"), "error: size"),
    (("--devices", "v5e-8", "--model", "flf2v_14b", "--memory", "stream"), "error: memory stream: is for one device"),
])  # fmt: skip
def test_bad_input_is_one_line(capsys, arguments, line):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    said = err[err.index("error: ") :]  # argparse prints the usage in front
    assert said.startswith(line) and "\n" not in said


def test_a_compiler_that_is_not_there_is_told(monkeypatch, capsys):
    real = compiled_budget.subprocess.run

    def absent(command, **options):
        hidden = "import sys, runpy; sys.modules['libtpu'] = None; sys.argv = sys.argv[1:]; "
        hidden += "import importlib.util as u; f = u.find_spec; "
        hidden += "u.find_spec = lambda n, *a: None if n == 'libtpu' else f(n, *a); "
        hidden += "runpy.run_module('benchmarks.aot', run_name='__main__', alter_sys=True)"
        return real([command[0], "-c", hidden, "aot", *command[3:]], **options)

    monkeypatch.setattr(compiled_budget.subprocess, "run", absent)
    code, out, err = run(capsys, *BIG, "v6e-1", "--compile")
    assert (code, out) == (2, "")
    assert err == "error: --compile: target v6e:1x1: libtpu is not installed; pip install 'jax[tpu]'"


def test_the_compilers_word_stands_beside_the_estimate(monkeypatch, capsys):
    """From a report as `benchmarks.aot` writes it, for the arguments that it is given."""
    given = []

    def answered(root, arguments):
        given.append(arguments)
        own = json.loads((ROOT / "benchmarks/results/aot/denoise_h100x1_720x1280_81f.json").read_text())
        return own

    monkeypatch.setattr(compiled_budget, "_asked", answered)
    code, out, _ = run(capsys, *BIG, "h100", "--size", "720x1280", "--compile")
    assert code == 0
    (arguments,) = given
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert pairs == {"--target": "h100x1", "--part": "denoise", "--preset": "flf2v_14b", "--size": "720x1280",
                     "--frames": "81", "--steps": "50", "--guidance-mode": "sequential", "--dtype": "bfloat16",
                     "--layers": "2"}  # fmt: skip
    head, row = out.splitlines()[-2:] if "note" not in out else out.split("\nnote")[0].splitlines()[-2:]
    assert head.split()[:3] == ["GiB", "besides", "weights"]
    name, estimated, compiled, off = row.split()
    assert name == "denoise" and abs(float(estimated) / float(compiled) - 1) < 0.1
    assert float(off.strip("%")) / 100 == pytest.approx(float(estimated) / float(compiled) - 1, abs=0.003)


def test_the_arguments_are_understood_by_the_compilers_command():
    from benchmarks.aot.__main__ import parser

    config = preset("flf2v_14b")
    settings = {"size": [480, 864], "frames": 81, "steps": 50, "guidance_mode": "sequential"}
    for (name, count), target in compiled_budget.TARGETS.items():
        assert name in chips.CHIPS
        mesh = {"fsdp": 1, "sequence": count} if count > 1 else {}
        for stage in ("text", "images", "keyframes", "denoise", "decode"):
            own = compiled_budget._arguments(config, settings, target, mesh, stage, "stream", "int8")
            args = parser().parse_args(own)
            assert (args.part, args.target, args.dtype) == (stage, target, "float32")
            streams = ("stream", "int8") if stage == "denoise" else ("keep", None)
            assert (args.memory, args.weights) == streams


def test_help_needs_no_jax():
    code = "import sys\nfrom samplers.plan_command import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
    code += "    assert end.code == 0 and 'jax' not in sys.modules and 'numpy' not in sys.modules"
    done = process(code=code)
    assert done.returncode == 0, done.stderr
    start = time.process_time()
    assert "--devices" in process("--help").stdout
    assert time.process_time() - start < 1.5


def test_no_device_is_touched_and_the_answer_comes_at_once():
    """Of a platform that is not there any touch would fail; seconds are the child's own on a processor."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process(*BIG, "v5e-8", JAX_PLATFORMS="nowhere")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "it would run with --memory keep" in done.stdout
    assert after.ru_utime - before.ru_utime < 4  # about 1.5 on an idle core; two seconds by the clock


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m samplers.plan --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def machine(folder, *ids):
    """A file system with PCI devices of Google's."""
    for number, kind in enumerate(ids):
        place = folder / f"sys/bus/pci/devices/{number}"
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x1ae0\n")
        (place / "device").write_text(f"{kind}\n")
    return folder


@pytest.mark.parametrize("ids, name, count", [
    (["0x006f"] * 8, "v6e", 8), (["0x0063"], "v5e", 1), (["0x0062"] * 4, "v5p", 4), (["0x0076"] * 4, "tpu7x", 8),
])  # fmt: skip
def test_tpus_of_this_machine(tmp_path, ids, name, count):
    found = chips.this({"PATH": ""}, machine(tmp_path, *ids))
    assert (found.chip, found.count) == (chips.CHIPS[name], count)
    assert found.host > GIB
    assert chips.this({"PATH": "", "JAX_PLATFORMS": "cpu"}, tmp_path).chip.platform == "cpu"


@pytest.mark.parametrize("said, visible, name, count", [
    ("0, GPU-aa, NVIDIA GeForce RTX 4090, 24564", None, "rtx4090", 1),
    ("0, GPU-aa, NVIDIA H100 80GB HBM3, 81559\n1, GPU-ab, NVIDIA H100 80GB HBM3, 81559", None, "h100", 2),
    ("0, GPU-aa, NVIDIA H100 80GB HBM3, 81559\n1, GPU-ab, NVIDIA H100 80GB HBM3, 81559", "1", "h100", 1),
    ("0, GPU-aa, NVIDIA A100-SXM4-40GB, 40960", "GPU-a", "a100-40gb", 1),
    ("0, GPU-aa, NVIDIA A100-SXM4-80GB, 81920", "0", "a100", 1),
    ("0, GPU-aa, Quadro Something, 8192", None, None, 1), ("0, GPU-aa, NVIDIA L4, 23034", "", "cpu", 1),
    ("No devices were found", None, "cpu", 1), ("", None, "cpu", 1),
])  # fmt: skip
def test_gpus_of_this_machine(tmp_path, said, visible, name, count):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    environment = {"PATH": str(tmp_path)} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    tool.write_text(tool.read_text().replace("cat", "/bin/cat"))
    found = chips.this(environment, tmp_path / "root")
    assert found.count == count
    if name == "cpu":
        assert found.chip.platform == "cpu"
    elif name is None:
        assert (found.chip.platform, found.chip.memory, found.chip.peak) == ("gpu", 8 * GIB, None)
    else:
        assert found.chip == chips.CHIPS[name]


def test_a_tool_that_fails_has_no_devices(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert chips.this({"PATH": str(tmp_path)}, tmp_path).chip.platform == "cpu"


@pytest.mark.parametrize("name", chips.CHIPS)
def test_every_chip_has_all_its_figures_and_a_source(name):
    chip = chips.parse(name).chip
    assert chip.source and chip.memory > 10 * GIB and chip.bandwidth > 1e11 and chip.link > 1e9
    assert 1e13 < chip.single < chip.peak < 1e16
    assert chips.parse(f"{name}-4") == chips.Devices(f"{name}-4", 4, chip)
    assert chips.parse(f" {name.upper()}x4 ").count == 4


@pytest.mark.parametrize("name, model", [
    ("Wan-AI/Wan2.1-FLF2V-14B-720P", "flf2v_14b"), ("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "flf2v_14b"),
    ("Wan-AI/Wan2.1-I2V-14B-480P", "i2v_14b"), ("alibaba-pai/Wan2.1-Fun-1.3B-InP", "fun_inp_1_3b"),
    ("alibaba-pai/Wan2.1-Fun-14B-InP", "fun_inp_14b"), ("Wan-AI/Wan2.1-T2V-1.3B", "t2v_1_3b"),
])  # fmt: skip
def test_repositories_are_known_by_name(monkeypatch, name, model):
    monkeypatch.setattr(budget, "sizes", lambda address, parts: {"dit": 5, "settings": 1})
    found = budget.source(f"hf://{name}")
    assert found.config.name == model and found.download == 6
    assert found.config.dit.precision.param == "bfloat16"


def test_a_damaged_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    code, _, err = run(capsys, "--model", tmp_path)
    assert code == 2 and err.startswith(f"error: {tmp_path / 'config.json'}: ") and "\n" not in err


ROWS = re.findall(r"^\| `([\w-]+)` \| (.+) \| ([\d.]+) \| (.+) \| ([\d.]+) \|$",
                  (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip


def test_the_documents_table_is_of_the_formula():
    assert len(ROWS) > 10
    source = budget.source("flf2v_14b")
    for name, *cells in ROWS:
        for size, way, gib in zip(((480, 864), (720, 1280)), cells[::2], cells[1::2], strict=True):
            found = budget.report(source, chips.parse(name), {"size": size})["choice"]
            told = [found["memory"], "" if found["weights"] == "bf16" else found["weights"],
                    "" if found["tiles"] == 1 else f"{found['tiles']} windows"]  # fmt: skip
            assert (", ".join(filter(None, told)), f"{found['peak_bytes'] / GIB:.1f}") == (way, gib), name


def test_settings_are_the_models_own(capsys):
    found = read(capsys, "--model", "fun_inp_1_3b", "--devices", "rtx4090")
    wanted = Settings.of(preset("fun_inp_1_3b"))
    assert found["settings"]["size"] == list(wanted.size) and found["settings"]["steps"] == wanted.steps
