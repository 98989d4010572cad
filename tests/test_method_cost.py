"""The benchmark of the methods' cost runs, compares what it says, and its arithmetic is right. No time is tested."""

import json

import numpy as np
import pytest

from benchmarks import method_cost, method_report
from benchmarks.measure import Timing
from wanjax.config import preset


@pytest.mark.slow
def test_every_arm_is_measured_with_one_program(tmp_path, capsys):
    """`Steps` raises where two arms lower to different programs, or an arm does nothing."""
    out = tmp_path / "cost.json"
    size = ["--preset", "tiny", "--layers", "2", "--size", "16x16", "--frames", "9", "--dtype", "float32"]
    method_cost.main([*size, "--repeats", "2", "--layer-repeats", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert set(report["arms"]) == set(method_cost.ARMS)
    assert all(len(arm["seconds"]) == 2 for arm in report["arms"].values())
    assert report["distance_to_wan"]["wan"] == 0 and report["distance_to_wan"]["plain"] < 1e-5
    assert min(report["distance_to_wan"][name] for name in ("kab", "kab_joint", "isolation", "retro")) > 0
    assert set(report["programs"]) == {"plain", "method"}
    assert report["programs"]["method"]["program"]["temp_size_in_bytes"] > 0
    assert {"off", "on", "given", "extra_seconds"} == set(report["one_layer"])
    assert set(report["formula"]) == {"measured", "480x864x81", "720x1280x81"}
    assert report["environment"]["device"] == "cpu" and report["environment"]["date"]
    text = capsys.readouterr().out
    assert "active step, 1 of 2 layers" in text and "that in 20 of 50 steps" in text


def test_formula_of_the_full_model():
    """One guided step is two passes of 1.79 PFLOP; KAB adds 8 layers of 0.068 TFLOP to one of them, in 20 of 50."""
    f = method_report.formula(preset("flf2v_14b").dit, (21, 60, 108))
    assert f["layers"] == [8, 40] and f["steps"] == [20, 50] and f["tokens"] == 34_020
    assert f["kab_flops"]["layer"] == 2 * 2 * 2 * 1620 * 1026 * 5120
    assert f["kab_ratio"]["step"] == pytest.approx(1 + 8 * 6.80804e10 / 3.58894e15, abs=1e-9)
    assert f["kab_ratio"]["run"] == pytest.approx(1 + 0.4 * 8 * 6.80804e10 / 3.58894e15, abs=1e-9)
    assert f["isolation_flops"] == f["retro_flops"] == 0


def test_scaling_to_full_depth_and_run():
    assert method_report.whole_run(1.05, 20, 50) == pytest.approx(1.02)
    # A step of 2 layers, all of its time in them, 1 with KAB at +10 %: a layer takes 0.5, KAB adds 0.1 to it.
    assert method_report.at_depth(1.1, (1, 2), (8, 40), 1.0) == pytest.approx(1 + 8 * 0.1 / 20)
    # Half the time outside the layers: 0.5 + 40 * 0.25 without KAB.
    assert method_report.at_depth(1.1, (1, 2), (8, 40), 0.5) == pytest.approx(1 + 0.8 / 10.5)


def test_ratios_are_taken_within_rounds():
    times = {"a": Timing((2.0, 4.0, 30.0)), "b": Timing((1.0, 2.0, 10.0))}
    assert method_report.compared(times, "a", "b") == {"ratio": 2.0, "ratio_range": [2.0, 3.0]}


def test_active_window():
    active = method_report.active_steps(21)
    np.testing.assert_array_equal(np.flatnonzero(active), np.arange(1, 21))
    assert method_report.active_layers(40) == 8 and method_report.active_layers(10) == 2


@pytest.mark.parametrize("extra", [["--layers", "1"], ["--frames", "5"], ["--size", "17x16"], ["--frames", "10"]])
def test_bad_sizes_are_refused(extra, capsys):
    with pytest.raises(SystemExit) as stop:
        method_cost.main(["--preset", "tiny", "--layers", "2", "--size", "16x16", "--frames", "9", *extra])
    assert stop.value.code == 2
    assert capsys.readouterr().err
