"""The benchmark of lists runs, and tells overhead from computing."""

import json

import pytest
from nano import write_model

from benchmarks import jobs


def test_figures_are_medians_of_differences():
    def one(clip, library):
        clocks = {"wall": 1.0, "user": 2.0, "system": 0.5}
        return {"clip": {name: clip * n for name, n in clocks.items()},
                "library": {name: library * n for name, n in clocks.items()}, "stages": {"write": clip}}  # fmt: skip

    found = jobs.figures([one(3, 2), one(5, 1), one(9, 8)])
    assert found["clip"] == {"wall": 5, "user": 10, "system": 2.5, "processor": 12.5}
    assert found["overhead"] == {"wall": 1, "user": 2, "system": 0.5, "processor": 2.5}
    assert found["stages"] == {"write": 5}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:prompt 1")  # the example's is longer than this model takes
def test_it_runs_and_reports(tmp_path, capsys):
    model = write_model(tmp_path / "nano")
    line = ["--model", str(model), "--clips", "1", "--repeats", "1", "--out", str(tmp_path / "jobs.json")]
    assert jobs.main(line) == 0
    report = json.loads((tmp_path / "jobs.json").read_text())
    assert report["clip"]["user"] > 0 and report["stages"]["write"] > 0 and len(report["rounds"]) == 1
    assert "overhead" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir() if "nano" not in path.name} == {"jobs.json"}
