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

from benchmarks import attention as attention_benchmark
from benchmarks import flops, gpu_parity, measure, random_model, throughput, vs_diffusers
from wanjax import layers
from wanjax.attention import attention
from wanjax.config import BFLOAT16, preset

ROOT = Path(__file__).parents[1]
TINY = preset("tiny")

# These programs run once: compiling quickly matters more than running quickly.
QUICK = {"xla_backend_optimization_level": 0}


def run_suite(folder: Path, python: str) -> tuple[int, dict[str, str], str]:
    """Exit code, status of every part, and what was printed."""
    environment = os.environ | {"DRY_RUN": "1", "PYTHON": python}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh", folder], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=550,
    )  # fmt: skip
    lines = map(json.loads, (folder / "suite.jsonl").read_text().splitlines())
    return done.returncode, {line["part"]: line["status"] for line in lines}, done.stdout


def test_dry_run_of_the_gpu_suite(tmp_path):
    code, parts, text = run_suite(tmp_path, sys.executable)
    assert code == 0, text[-5000:]
    assert {"device", "parity", "throughput", "attention", "method", "vae", "diffusers"} <= parts.keys()
    reports = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    for name in ("parity", "throughput", "attention", "method", "vae", "diffusers"):
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
    assert sequential["share_of_matmul"] > 0 and sequential["host_peak_bytes"] > 2**20
    assert len(sequential["seconds"]) == 2 and sequential["compile_seconds"] > 0
    assert reports["throughput"]["runs"]["step, guidance batched"]["flops"] == sequential["flops"]
    assert len(reports["vae"]["runs"]) == 2
    timed = {row["implementation"] for row in reports["attention"]["timing"] if "median_seconds" in row}
    assert timed == {"xla", "chunked 1 MiB", "chunked 256 MiB"}
    assert len(reports["diffusers"]["results"]) == 2
    for result in reports["diffusers"]["results"].values():
        assert result["agree"] and result["ratio"] > 0 and len(result["diffusers"]["seconds"]) == 2


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


def test_forced_implementations():
    q = jnp.ones((1, 4, 1, 8))
    with measure.forced(attention="no such"), pytest.raises(ValueError, match="no such"):
        attention(q, q, q)
    assert attention(q, q, q).shape == q.shape
    own = layers.conv3d_form()
    for form in ("conv3d", "taps"):
        with measure.forced(conv3d=form):
            assert layers.conv3d_form() == form
    assert layers.conv3d_form() == own


def test_random_parameters():
    config = dataclasses.replace(TINY.dit, num_layers=2, precision=BFLOAT16)
    shapes = random_model.dit_shapes(config)
    params = random_model.params(shapes)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert params["blocks"]["ffn_in"]["kernel"].dtype == jnp.bfloat16
    kernel = np.asarray(params["blocks"]["ffn_in"]["kernel"], np.float32)
    assert kernel.std() * config.dim**0.5 == pytest.approx(1, abs=0.02)
    assert np.abs(kernel[0] - kernel[1]).mean() * config.dim**0.5 > 1
    # The rows are windows of one pool; as a matrix they are as good as independent: the edges of a random
    # spectrum, 1 and 3 at four times as many columns as rows.
    spectrum = np.linalg.svd(kernel[0], compute_uv=False)
    assert spectrum[0] == pytest.approx(3, abs=0.15) and spectrum[-1] == pytest.approx(1, abs=0.15)


def test_guided_step_is_two_passes():
    """What is timed follows scale * conditional + (1 - scale) * unconditional, in both modes."""
    config = dataclasses.replace(TINY.dit, num_layers=1)
    benchmark = throughput.DiTBenchmark(config, (2, 4, 4), 1)
    functions = {
        mode: jax.jit(throughput.guided_step(config, mode), compiler_options=QUICK)
        for mode in ("sequential", "batched")
    }

    def step(mode, scale, swap=False):
        conditions, negative = benchmark.conditions, benchmark.negative
        if swap:
            conditions, negative = conditions.replace(text=negative), conditions.text
        arguments = (conditions, negative, np.float32(scale), benchmark.table)
        return np.asarray(functions[mode](benchmark.params, benchmark.latents, np.float32(900), *arguments))

    wanted = 5 * step("sequential", 1) - 4 * step("sequential", 1, swap=True)
    for mode in functions:
        assert measure.relative_error(step(mode, 5), wanted) < 1e-4


def test_attention_agreement_notices_a_wrong_implementation(monkeypatch):
    case = attention_benchmark.Case("text", 2, 6, 5, 2, 8, "11SK")
    assert all(row["passed"] for row in attention_benchmark.agreement(case))
    right = attention_benchmark.attention

    def wrong(q, k, v, bias, **options):
        return right(q, k, v, None if options["implementation"] == "xla" else bias, **options)

    monkeypatch.setattr(attention_benchmark, "attention", wrong)
    failed = [row["implementation"] for row in attention_benchmark.agreement(case) if not row["passed"]]
    assert failed == ["xla"]


def test_attention_too_large_is_left_out():
    model = preset("flf2v_14b")
    case = attention_benchmark.cases(model, (21, 60, 108), 1, ())[0]
    assert case.queries == 34_020
    assert case.flops * model.dit.num_layers == flops.dit(model.dit, (21, 60, 108))["self-attention scores"]
    assert "172 GiB do not fit" in attention_benchmark.why_not(case, "xla")


def test_parity_check_fails_over_its_limit(tmp_path):
    checks = gpu_parity.Checks(str(tmp_path / "parity.json"))
    x = jnp.arange(1.0, 9.0)
    checks.add("something", "bfloat16 against float32", x * 1.01, x)
    assert checks.passed
    checks.add("something", "bfloat16 against float32", x * 1.03, x)
    checks.add("something", "bfloat16 against float32", x * jnp.nan, x)
    assert not checks.passed
    written = json.loads((tmp_path / "parity.json").read_text())["checks"]
    assert [check["passed"] for check in written] == [True, False, False]


def test_outputs_that_differ_are_not_timed():
    import torch

    pair = {"wanjax": lambda: jnp.ones(4), "diffusers": lambda: torch.ones(4)}
    assert vs_diffusers.compare(pair, "float32", 1)["ratio"] > 0
    pair["diffusers"] = lambda: 1.001 * torch.ones(4)
    result = vs_diffusers.compare(pair, "float32", 1)
    assert not result["agree"] and "ratio" not in result


def test_without_diffusers_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vs_diffusers.importlib.util, "find_spec", lambda name: None)
    assert vs_diffusers.main(["--out", str(tmp_path / "out.json")]) == 0
    assert "torch and diffusers not installed" in capsys.readouterr().out
    assert "skipped" in json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("main", [throughput.main, gpu_parity.main, attention_benchmark.main, vs_diffusers.main])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "480x860"], "nearest size is 480x864"),
        (["--size", "480"], "give HEIGHTxWIDTH"),
        (["--frames", "80"], "nearest are 77 and 81"),
        (["--frames", "0"], "whole number of at least 1"),
    ],
)
def test_bad_arguments(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--preset", "flf2v_14b", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
