"""The benchmarks run, report what they should, and notice what is wrong. Times themselves are not tested."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano import NANO

from benchmarks import attention as attention_benchmark
from benchmarks import film as film_benchmark
from benchmarks import (
    gpu_parity,
    load_time,
    measure,
    method_cost,
    random_model,
    steps,
    streaming,
    throughput,
    vs_diffusers,
)
from samplers import flops, programs, sample
from samplers.plan import Plan, Settings
from wanjax import shapes
from wanjax.accepted import check_conditions
from wanjax.config import PRESETS, preset
from wanjax.precision import BFLOAT16

ROOT = Path(__file__).parents[1]
TINY = preset("tiny")
PROGRAMS = {"throughput": throughput, "gpu_parity": gpu_parity, "attention": attention_benchmark,
            "vs_diffusers": vs_diffusers, "method_cost": method_cost, "load_time": load_time,
            "streaming": streaming, "film": film_benchmark}  # fmt: skip

# These programs run once: compiling quickly matters more than running quickly.
QUICK = {"xla_backend_optimization_level": 0}


def run_suite(folder: Path, python: str, dry: bool = True) -> tuple[int, dict[str, str], str]:
    """Exit code, status of every part, and what was printed."""
    environment = os.environ | {"DRY_RUN": str(int(dry)), "PYTHON": python}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh", folder], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1750,
    )  # fmt: skip
    lines = map(json.loads, (folder / "suite.jsonl").read_text().splitlines())
    return done.returncode, {line["part"]: line["status"] for line in lines}, done.stdout


@pytest.mark.slow
def test_dry_run_of_the_gpu_suite(tmp_path):
    code, parts, text = run_suite(tmp_path, sys.executable)
    assert code == 0, text[-5000:]
    named = {"device", "parity", "throughput", "attention", "method", "vae", "streaming", "diffusers"}
    assert named <= parts.keys()
    reports = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    for name in named - {"device"}:
        environment = reports[name]["environment"]
        assert environment["backend"] == "cpu" and environment["versions"]["jax"] == jax.__version__
        assert environment["command"].startswith("python -m benchmarks.") and environment["date"]
    assert all(check["passed"] for check in reports["parity"]["checks"])
    assert {r["kind"] for r in reports["parity"]["checks"]} == set(gpu_parity.LIMITS) - {"float32, device against CPU"}
    sequential = reports["throughput"]["runs"]["step, guidance sequential"]
    assert (
        sequential["flops"]
        == sum(sequential["flops_by_part"].values())
        == pytest.approx(sequential["flops_per_second"] * sequential["median_seconds"])
    )
    assert sequential["share_of_matmul"] > 0 and sequential["peak_memory_bytes"]["host"] > 2**20
    assert len(sequential["seconds"]) == 2 and sequential["compile_seconds"] > 0
    assert reports["throughput"]["runs"]["step, guidance batched"]["flops"] == sequential["flops"]
    assert len(reports["vae"]["runs"]) == 2
    timed = {(row["case"], row["kernel"]) for row in reports["attention"]["timing"] if "median_seconds" in row}
    assert timed == {(case, kernel) for case in ("self", "text", "image") for kernel in ("xla", "chunked")}
    assert len(reports["diffusers"]["results"]) == 2
    for result in reports["diffusers"]["results"].values():
        assert result["agree"] and result["ratio"] > 0 and len(result["diffusers"]["seconds"]) == 2
    (whole,) = (result for name, result in reports["diffusers"]["results"].items() if "transformer" in name)
    assert whole["ratio_compiled"] > 0 and whole["torch_compile_seconds"] > 0
    assert "cache" not in {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("dry", [True, False])
def test_every_part_of_the_gpu_suite_takes_its_arguments(tmp_path, dry, monkeypatch):
    """All that is checked before anything is computed, also of the sizes that only a GPU runs."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo "$2 $*" >>"{tmp_path}/calls"\nexit 0\n')
    python.chmod(0o755)
    code, parts, text = run_suite(tmp_path, str(python), dry)
    assert code == 0 and set(parts.values()) == {"ok"}, text
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    started = []
    for line in (tmp_path / "calls").read_text().splitlines():
        module, _, _, *arguments = line.split()
        if module.startswith("benchmarks."):
            program = PROGRAMS[module.removeprefix("benchmarks.")]
            monkeypatch.setattr(program, "run", lambda *_, program=program: started.append(program) or True)
            assert program.main(arguments) == 0
    assert started == [gpu_parity, throughput, attention_benchmark, method_cost, throughput, streaming, vs_diffusers]


def test_a_failing_part_stops_no_other_and_shows_in_the_exit_code(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *gpu_parity*|*attention.json*) exit 3;; esac\n')
    python.chmod(0o755)
    code, parts, _ = run_suite(tmp_path / "out", str(python))
    assert code == 2
    assert [name for name, status in parts.items() if status != "ok"] == ["parity", "attention"]
    assert list(parts)[-1] == "diffusers"


def test_interleave_takes_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.interleave(functions, 3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(timing.seconds) for timing in times.values()] == [3, 3]


def test_timing():
    timing = measure.Timing((4.0, 1.0, 2.0))
    assert timing.median == 2 and timing.spread == 1.5


@pytest.mark.slow
def test_the_configuration_chooses_kernel_and_convolution(monkeypatch):
    """ "auto" is what the product takes on this machine, other names are taken as they are."""
    size = ["--preset", "tiny", "--size", "16x16", "--frames", "5", "--matmul", "128"]
    taken = []

    def step_run(inputs, *_):
        return taken.append(inputs.config.attention)

    def vae_run(config, *_):
        return taken.append(config.conv3d) or {}

    monkeypatch.setattr(throughput, "step_run", lambda *args: step_run(*args) or {})
    monkeypatch.setattr(throughput, "vae_run", vae_run)
    monkeypatch.setattr(throughput, "_show", lambda *_: None)
    own = TINY.for_platform("cpu")
    for kernel, wanted in (("auto", own.dit.attention), ("chunked", "chunked"), ("cudnn", "cudnn")):
        assert throughput.main([*size, "--layers", "1", "--attention", kernel]) == 0
        assert taken == [wanted]
        taken.clear()
    assert throughput.main([*size, "--no-dit", "--vae", "--conv3d", "auto", "conv3d", "taps"]) == 0
    assert taken == [form for form in (own.vae.conv3d, "conv3d", "taps") for _ in ("encode", "decode")]


def test_random_parameters():
    config = dataclasses.replace(TINY.dit, num_layers=2, precision=BFLOAT16)
    tree = shapes.dit(config)
    params = random_model.params(tree)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert params["blocks"]["ffn_in"]["kernel"].dtype == jnp.bfloat16
    kernel = np.asarray(params["blocks"]["ffn_in"]["kernel"], np.float32)
    assert kernel.std() * config.dim**0.5 == pytest.approx(1, abs=0.02)
    assert np.abs(kernel[0] - kernel[1]).mean() * config.dim**0.5 > 1
    # The rows are windows of one pool; as a matrix they are as good as independent: the edges of a random
    # spectrum, 1 and 3 at four times as many columns as rows.
    spectrum = np.linalg.svd(kernel[0], compute_uv=False)
    assert spectrum[0] == pytest.approx(3, abs=0.15) and spectrum[-1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", PRESETS)
def test_random_inputs_are_those_of_the_model(name):
    """`WanDiT` refuses others; every published number of images."""
    config = dataclasses.replace(preset(name).dit, num_layers=1)
    latents, conditions, negative = jax.eval_shape(lambda: random_model.inputs(config, (2, 4, 4), 2, 0))
    check_conditions(config, conditions, latents.shape)
    assert negative.shape == conditions.text.shape


@pytest.mark.slow
def test_guided_step_is_two_passes():
    """What is timed follows scale * conditional + (1 - scale) * unconditional, in both modes."""
    config = dataclasses.replace(TINY.dit, num_layers=1)
    inputs = steps.RandomModel(config, (2, 4, 4), 1)
    params, conditions, negative, *rest = inputs.arguments
    functions = {mode: jax.jit(steps.part(config, mode), compiler_options=QUICK) for mode in ("sequential", "batched")}

    def step(mode, scale, swap=False):
        told, other = (conditions.replace(text=negative), conditions.text) if swap else (conditions, negative)
        table = steps.rows(TINY, scale)
        after = functions[mode](params, told, other, *rest, table, inputs.plain())
        return np.asarray(steps.velocity(inputs.carry, after, table))

    wanted = 5 * step("sequential", 1) - 4 * step("sequential", 1, swap=True)
    for mode in functions:
        assert measure.relative_error(step(mode, 5), wanted) < 1e-4


@pytest.mark.parametrize(("mode", "rows"), [("sequential", 1), ("batched", 3)])
def test_a_step_is_the_pipelines(mode, rows):
    """Operation by operation."""
    plan = Plan.of(NANO, Settings.of(NANO, method="paper"))
    config = plan.config.dit
    noise, conditions, negative = random_model.inputs(config, plan.latent_shape[:3], 1, 0)
    arguments = (shapes.dit(config), conditions, negative, sample.start(jnp.asarray(noise)), steps.STEP, plan.table,
                 plan.method)  # fmt: skip

    def wanted(params, conditions, negative, carry, first, table, method):
        return programs.denoise(config, params, carry, table, first, conditions, negative, method, None,
                                             n=rows, guidance_mode=mode)  # fmt: skip

    def program(function):
        return str(jax.make_jaxpr(function)(*arguments))

    assert program(steps.part(config, mode, rows)) == program(wanted)
    assert program(steps.part(config, mode, rows + 1)) != program(wanted)


@pytest.mark.slow
def test_attention_agreement_notices_a_wrong_implementation(monkeypatch):
    case = attention_benchmark.Case("text", 2, 6, 5, 2, 8, "11SK", residual=True)
    assert all(row["passed"] for row in attention_benchmark.agreement(case))
    right = attention_benchmark.attention

    def no_bias(q, k, v, bias, **options):
        return right(q, k, v, None if options["kernel"] == "xla" else bias, **options)

    def other_residual(*arrays, **options):
        out, (top, log_sum) = right(*arrays, **options)
        return out, (top, log_sum + (options["kernel"] == "xla"))

    for wrong in (no_bias, other_residual):
        monkeypatch.setattr(attention_benchmark, "attention", wrong)
        failed = [row["kernel"] for row in attention_benchmark.agreement(case) if not row["passed"]]
        assert failed == ["xla"]


def test_cases_are_the_attentions_of_a_block():
    def found(name, biases=()):
        return [(c.name, c.keys, c.bias) for c in attention_benchmark.cases(preset(name), (1, 4, 4), 1, biases)]

    assert found("flf2v_14b") == found("i2v_14b") == [("self", 4, ""), ("text", 512, ""), ("image", 257, "")]
    assert found("t2v_1_3b", ("11SK",)) == [("self", 4, ""), ("text", 512, ""), ("text", 512, "11SK")]


def test_attention_too_large_is_left_out():
    model = preset("flf2v_14b")
    case = attention_benchmark.cases(model, (21, 60, 108), 1, ())[0]
    assert case.queries == 34_020
    assert case.flops * model.dit.num_layers == flops.dit(model.dit, (21, 60, 108))["self-attention scores"]
    assert "172 GiB do not fit" in attention_benchmark.why_not(case, "xla")


def test_parity_check_fails_over_its_limit(tmp_path):
    checks = gpu_parity.Checks(tmp_path / "parity.json")
    x = jnp.arange(1.0, 9.0)
    checks.add("something", "bfloat16 against float32", x * 1.01, x)
    assert checks.passed
    checks.add("something", "bfloat16 against float32", x * 1.03, x)
    checks.add("something", "bfloat16 against float32", x * jnp.nan, x)
    assert not checks.passed
    written = json.loads((tmp_path / "parity.json").read_text())["checks"]
    assert [check["passed"] for check in written] == [True, False, False]
    assert written[2]["relative_error"] is None  # JSON has no NaN


def test_outputs_that_differ_are_not_timed():
    import torch

    pair = {"wanjax": lambda: jnp.ones(4), "diffusers": lambda: torch.ones(4)}
    assert vs_diffusers.compare(pair, "float32", 1)["ratio"] > 0
    pair[vs_diffusers.COMPILED] = lambda: torch.ones(4)
    assert vs_diffusers.compare(pair, "float32", 1)["ratio_compiled"] > 0

    def refuse():
        raise RuntimeError("no compiler\nhere")

    result = vs_diffusers.compare(pair | {vs_diffusers.COMPILED: refuse}, "float32", 1)
    assert result["torch_compile_error"] == "no compiler" and result["ratio"] > 0 and "ratio_compiled" not in result
    pair["diffusers"] = lambda: 1.001 * torch.ones(4)
    result = vs_diffusers.compare(pair, "float32", 1)
    assert not result["agree"] and "ratio" not in result


def test_without_diffusers_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vs_diffusers.importlib.util, "find_spec", lambda name: None)
    assert vs_diffusers.main(["--out", str(tmp_path / "out.json")]) == 0
    assert "torch and diffusers not installed" in capsys.readouterr().out
    assert "skipped" in json.loads((tmp_path / "out.json").read_text())


CLIPS = [module for name, module in PROGRAMS.items() if name not in ("load_time", "film")]


@pytest.mark.parametrize("program", CLIPS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "480x860"], "nearest size is 480x864"),
        (["--size", "480"], "give HEIGHTxWIDTH"),
        (["--size", "480x"], "give HEIGHTxWIDTH"),
        (["--frames", "80"], "nearest are 77 and 81"),
        (["--frames", "0"], "whole number of at least 1"),
        (["--frames", "1" * 5000], "whole number of at least 1"),
    ],
)
def test_bad_arguments(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--preset", "flf2v_14b", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS.values())
def test_outputs_are_refused_before_anything_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "run", None)
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "folder.json").mkdir()
    for name, message in (("no/x.json", "create it with mkdir"), ("mine.json", "wanjax did not write it"),
                          ("folder.json", "is a folder"), ("a\0b.json", "not a usable name")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            program.main(["--out", str(tmp_path / name)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error.splitlines()[-1]
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'


def test_reports_are_replaced(tmp_path):
    for number in (1, 2):
        measure.write(measure.output(str(tmp_path / "x.json")), {"number": number, "inner": [np.nan, (1.5, np.inf)]})
    written = json.loads((tmp_path / "x.json").read_text())
    assert written.pop("written_by").startswith("wanjax")
    assert written == {"number": 2, "inner": [None, [1.5, None]]}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[name].main(["--help"])
    assert stop.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("raised", [RuntimeError("Unable to initialize backend 'tpu'\nmore"), AssertionError()])
def test_a_platform_that_is_not_there(raised, monkeypatch, capsys):
    def backend():
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(jax, "default_backend", backend)
    for program in (throughput, attention_benchmark, gpu_parity, method_cost, load_time):
        with pytest.raises(SystemExit) as stop:
            program.main([])
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "JAX_PLATFORMS=tpu (" in error and "install JAX" in error


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (FloatingPointError("NaN or inf"), 1), (OSError(28, "No space left"), 1),
     (MemoryError(), 1), (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"), 1)],
)  # fmt: skip
def test_what_a_user_may_meet_ends_in_one_line(raised, code, monkeypatch, capsys):
    def run(*_):
        raise raised

    monkeypatch.setattr(throughput, "run", run)
    assert throughput.main([]) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("python -m benchmarks.throughput: ")


def test_a_run_that_finds_something_wrong_ends_with_1(monkeypatch):
    monkeypatch.setattr(attention_benchmark, "run", lambda *_: False)
    assert attention_benchmark.main([]) == 1
