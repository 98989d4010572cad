"""Comparison and report on made-up scores whose answers are known."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.tgi import __main__ as cli
from benchmarks.tgi import compare, report
from benchmarks.tgi.arms import Arm
from benchmarks.tgi.run import strip_file
from benchmarks.tgi.scores import LINES, Key, Scores
from wanjax.kab import KAB
from wanjax.method import Method

CATEGORIES = ("occlusion", "near-static")
ENVIRONMENT = {"device": "cpu", "processor": "made up", "cores": 2, "versions": {"jax": "0.10"}, "commit": "abc",
               "command": "python -m benchmarks.tgi run", "date": "2026-01-02T03:04:05"}  # fmt: skip


def write_run(folder, effects, clips=140, sha="1", seed=0, length=25):
    """Scores of `wan` at 20 dB a clip with a spread of 5, and of arms that differ by (mean, spread)."""
    arms = {"wan": {}} | {arm: {} for arm in effects}
    sets = {str(length): {"name": "made up", "ids": [f"c{n:03d}" for n in range(clips)]}}
    config = {"model": {"name": "m", "sha256": sha}, "settings": {"steps": 3}, "sets": sets,
              "metrics": {}, "batch": 4, "arms": arms,
              "planned": {str(length): {arm: [0] for arm in arms}},
              "environments": [ENVIRONMENT]}  # fmt: skip
    rng = np.random.default_rng(seed)
    base = rng.normal(20, 5, clips)
    lines = []
    for arm, (mean, spread) in {"wan": (0.0, 0.0), **effects}.items():
        noise = rng.normal(0, 1, clips)
        noise = (noise - noise.mean()) / (noise.std() or 1.0)
        for n, value in enumerate(base + mean + spread * noise):
            about = {"length": length, "clip": f"c{n:03d}", "arm": arm, "seed": 0, "challenge": CATEGORIES[n % 2]}
            figures = {"metrics": {"psnr_interior": float(value)}, "psnr_frames": [40.0, float(value), 40.0]}
            lines.append(about | figures)
    with Scores(folder, config) as scores:
        scores.append(lines)
    return scores


EFFECTS = {"paper": (0.3, 1.0), "kab": (0.2, 1.0), "retro": (0.0, 1.0), "isolation": (-0.5, 1.0), "vae": (9.0, 1.0),
           "kab-joint": (0.6, 1.0)}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / str(n), EFFECTS, sha=str(n), seed=n) for n in range(2)]


def test_differences_are_those_put_in(runs):
    found = compare.differences(runs[0], 25, "psnr_interior")
    for arm, (mean, spread) in EFFECTS.items():
        half = 1.96 * spread / np.sqrt(140)
        assert found[arm]["mean"] == pytest.approx(mean, abs=1e-6)
        assert found[arm]["high"] - found[arm]["low"] == pytest.approx(2 * half, rel=0.1)
    assert found["paper"]["p_holm"] < 0.05 < found["retro"]["p_holm"]
    assert found["vae"]["p_holm"] is None, "a bound is no rival"
    assert "wan" not in found
    part = compare.differences(runs[0], 25, "psnr_interior", "occlusion")
    assert part["paper"]["clips"] == 70


def test_holm_counts_the_rivals_alone(runs):
    found = compare.differences(runs[0], 25, "psnr_interior")
    raw = {arm: row["p"] for arm, row in found.items() if arm != "vae"}
    smallest = min(raw, key=raw.get)
    assert found[smallest]["p_holm"] == pytest.approx(len(raw) * raw[smallest], abs=1e-6)


def test_an_own_arm_is_told_by_its_settings(tmp_path):
    run = write_run(tmp_path / "run", {"mine": (0.1, 1.0)}, clips=4)
    run.config["arms"]["mine"] = Arm("mine", "own", "", "random-bias", Method(kab=KAB(strength_mid=0.1))).plain()
    text = report.markdown(report.collect([run], ["one"], [{}]))
    assert "- `wan`: Wan2.1 as it is\n- `mine`: random-bias; kab {strength_end: 0.7, strength_mid: 0.1, floor: " in text


def test_what_is_told_more_is_no_rival(tmp_path):
    """Arms of three keyframes change no other arm's corrected p, are described, and have claims of their own."""
    without = write_run(tmp_path / "without", EFFECTS)
    more = write_run(tmp_path / "with", EFFECTS | {"three": (3.0, 1.0), "three-chain": (2.0, 1.0)})
    found, wanted = (compare.differences(run, 25, "psnr_interior") for run in (more, without))
    assert {arm: found[arm]["p_holm"] for arm in wanted} == {arm: row["p_holm"] for arm, row in wanted.items()}
    assert found["three"]["p_holm"] is None and found["three"]["mean"] == pytest.approx(3, abs=1e-6)
    assert compare.arms(more, 25)[-2:] == ["three", "three-chain"]
    text = report.markdown(report.collect([more], ["one"], [{}]))
    assert "- `three`: Wan2.1 with the middle frame as a third keyframe, one clip" in text
    assert verdicts([more])["three", "three-chain"]["verdict"] == "held"


def verdicts(runs):
    return {(c["arm"], c["against"]): c for c in compare.judge(runs, 25)}


def test_verdicts(runs):
    found = verdicts(runs)
    assert found["paper", "wan"]["verdict"] == "held"
    assert found["retro", "wan"]["verdict"] == "not shown"
    assert found["isolation", "kab"]["verdict"] == "held"  # expected to be worse, and is
    assert found["kab-joint", "kab"]["verdict"] == "opposite"
    assert all(one["enough"] for one in found.values())
    assert ("trf", "paper") not in found, "not run, not judged"


def test_one_contrary_run_undoes_a_claim(runs, tmp_path):
    contrary = write_run(tmp_path / "c", EFFECTS | {"paper": (-0.3, 1.0)}, sha="c", seed=5)
    assert verdicts([runs[0], contrary])["paper", "wan"]["verdict"] == "not shown"


def test_few_clips_or_one_run_are_not_enough(runs, tmp_path):
    assert not any(one["enough"] for one in verdicts(runs[:1]).values())
    few = [write_run(tmp_path / str(n), EFFECTS, clips=127, sha=str(n)) for n in range(2)]
    assert not any(one["enough"] for one in verdicts(few).values())


def test_the_report_is_written(runs, tmp_path):
    for arm, seed, colour in (("wan", 0, "red"), ("wan", 1, "blue"), ("paper", 0, "red")):
        file = strip_file(runs[0].folder, Key(25, "c000", arm, seed))
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 16), colour).save(file)
    sets = [{"25": {"wan": {"fid": {"distance": 12.5, "low": 11.0, "high": 14.0}, "fvd": "undefined"}}}, {}]
    made = report.collect(runs, ["one", "two"], sets, {"wan": {"subject_consistency": {"mean": 0.9, "videos": {}}}})
    files = report.write(made, runs, tmp_path / "report")
    assert {file.name for file in files} == {
        "report.md", "report.json", "25-differences.png", "25-categories.png", "25-frames.png", "25-wall.png"
    }  # fmt: skip
    assert all(file.stat().st_size > 200 for file in files)
    text = (tmp_path / "report" / "report.md").read_text()
    for words in ("### one", "### two", "`paper` > `wan`", "held", "not shown", "opposite", "12.50", "undefined",
                  "unavailable", "subject_consistency", "0.9000", "+0.30 [", "near-static (70)",
                  "- cpu (made up, 2 cores), jax 0.10, commit abc, from 2026-01-02: `python -m"):  # fmt: skip
        assert words in text, words
    assert "Fewer than" not in text
    with Image.open(tmp_path / "report" / "25-wall.png") as wall:
        assert {colour for _, colour in wall.crop((150, 0, 240, 32)).getcolors()} == {(255, 0, 0), (255, 255, 255)}
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(json.dumps(made))


def test_a_single_clip_has_no_interval(tmp_path):
    one = write_run(tmp_path / "one", {"paper": (0.5, 0.0)}, clips=1)
    found = compare.differences(one, 25, "psnr_interior")["paper"]
    assert found["low"] is None and found["clips"] == 1
    text = report.markdown(report.collect([one], ["one"], [{}]))
    assert "(one clip)" in text and "Fewer than" in text
    assert verdicts([one])["paper", "wan"]["verdict"] == "not shown"


@pytest.mark.parametrize("change, message", [
    ({"sha": "0"}, "x: the same model as one"),
    ({"sha": "1"}, "x: the same model as two"),
    ({"length": 33}, "no clip length that all have scores of"),
    ({"clips": 139}, "x: its clips of length 25 are not those of one"),
])  # fmt: skip
def test_runs_that_do_not_go_together(runs, tmp_path, change, message):
    other = write_run(tmp_path / "x", EFFECTS, **{"sha": "x"} | change)
    with pytest.raises(ValueError, match=message):
        compare.compatible([*runs, other], ["one", "two", "x"])
    compare.compatible(runs, ["one", "two"])


def test_runs_whose_arms_differ_in_settings_do_not_go_together(runs, tmp_path):
    other = write_run(tmp_path / "x", EFFECTS, sha="x")
    other.config["arms"]["kab"] = {"kind": "method"}
    with pytest.raises(ValueError, match="its arm kab are not those"):
        compare.compatible([runs[0], other], ["one", "x"])


def test_two_seeds_are_paired_by_seed(tmp_path):
    """Every clip of `paper` is 1 dB over `wan` in seed 0, its only one; seed 1 of `wan` is 4 dB better."""
    run = write_run(tmp_path / "run", {"paper": (1.0, 0.0)}, clips=8)
    more = [line | {"seed": 1, "metrics": {"psnr_interior": line["metrics"]["psnr_interior"] + 4}}
            for line in run.lines if line["arm"] == "wan"]  # fmt: skip
    run.append(more)
    assert compare.differences(run, 25, "psnr_interior")["paper"]["mean"] == pytest.approx(1.0)
    assert verdicts([run])["paper", "wan"]["runs"][0]["mean"] == pytest.approx(1.0)


def test_a_length_that_not_all_runs_have_is_named(runs, tmp_path):
    more = write_run(tmp_path / "more", EFFECTS, sha="more", seed=3)
    longer = write_run(tmp_path / "longer", EFFECTS, sha="more", seed=3, length=33)
    more.append(longer.lines)
    made = report.collect([runs[0], more], ["one", "more"], [{}, {}])
    assert list(made["lengths"]) == ["25"]
    assert "more has 33 frames too, which not all runs have" in report.markdown(made)


def test_seeds_that_differ_between_arms_are_told(tmp_path):
    run = write_run(tmp_path / "run", {"paper": (1.0, 1.0)}, clips=4)
    text = report.markdown(report.collect([run], ["one"], [{}]))
    assert "Noise seeds: one: 0." in text
    run.config["planned"]["25"] = {"wan": [0, 1], "paper": [0], "vae": [None]}
    text = report.markdown(report.collect([run], ["one"], [{}]))
    assert "Noise seeds: one: 0, 1 of wan, and 0 of paper." in text


def test_runs_with_an_image_model_each_share_a_report(runs, tmp_path):
    """TRF needs one of its own for a model of two keyframes; its name stands with the arm."""
    made = [write_run(tmp_path / str(n), {"trf": (-1.0, 1.0)}, clips=4, sha=str(n)) for n in range(2)]
    for n, one in enumerate(made):
        one.config["arms"]["trf"] = {"kind": "two-way", "image_model": {"name": "i2v", "sha256": f"abc{n}"}}
    compare.compatible(made, ["one", "two"])
    text = report.markdown(report.collect(made, ["one", "two"], [{}, {}]))
    assert "; by i2v (abc0)" in text and "; by i2v (abc1)" in text


def test_claims_that_not_all_runs_can_tell_are_named(runs, tmp_path):
    other = write_run(tmp_path / "x", {"paper": (0.3, 1.0)}, sha="x")
    made = report.collect([runs[0], other], ["one", "x"], [{}, {}])
    assert {"arm": "kab", "against": "wan"} in made["lengths"]["25"]["unjudged"]
    text = report.markdown(made)
    assert "Not judged, as not all runs have the arms: " in text and "`kab` and `wan`" in text
    assert "Not judged" not in report.markdown(report.collect(runs, ["one", "two"], [{}, {}]))


@pytest.mark.parametrize("kept, shown", [
    ({("wan", 1): "red", ("paper", 1): "red"}, "red"),  # a length of another seed than the folder's first
    ({("wan", 0): "blue", ("wan", 1): "red", ("paper", 1): "red"}, "red"),  # a seed that was hardly begun
    ({("wan", 0): "red", ("wan", 1): "blue", ("paper", 0): "red", ("paper", 1): "blue"}, "red"),
])  # fmt: skip
def test_the_wall_is_of_one_noise(tmp_path, kept, shown):
    run = write_run(tmp_path / "run", {"paper": (1.0, 1.0)}, clips=4)
    run.config["planned"]["25"] = {"wan": [0, 1], "paper": [0, 1]}
    for (arm, seed), colour in kept.items():
        file = strip_file(run.folder, Key(25, "c001", arm, seed))
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 16), colour).save(file)
    strips = report._strips(run, 25, "c001", ["truth", "wan", "paper"])
    red = Image.new("RGB", (1, 1), shown).getpixel((0, 0))
    assert {arm: strip.getpixel((0, 0)) for arm, strip in strips.items()} == {"wan": red, "paper": red}


def test_results_of_vbench_for_an_arm_that_was_not_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"paper": (1.0, 1.0)}, clips=4)
    results = tmp_path / "x_eval_results.json"
    results.write_text(json.dumps({"subject_consistency": [0.9, [{"video_path": "a.mp4", "video_results": 0.9}]]}))
    line = ["report", str(run.folder), "--out", str(tmp_path / "report"), "--vbench"]
    assert cli.main([*line, f"papre={results}"]) == 2
    assert "--vbench papre=...: no run has this arm" in capsys.readouterr().err
    assert cli.main([*line, f"paper={results}", f"paper={results}"]) == 2
    assert "paper is named twice" in capsys.readouterr().err and not (tmp_path / "report").exists()
    assert cli.main([*line, f"paper={results}"]) == 0
    assert "0.9000 (1)" in (tmp_path / "report" / "report.md").read_text()


def test_an_unfinished_run_is_refused_or_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"paper": (1.0, 1.0)}, clips=8)
    file = run.folder / LINES
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-3]))
    line = ["report", str(run.folder), "--out", str(tmp_path / "report")]
    assert cli.main(line) == 2
    assert "paper has 5 of 8 clips of 25 frames" in capsys.readouterr().err and not (tmp_path / "report").exists()
    assert cli.main([*line, "--partial"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "UNFINISHED" in text and "paper 5 of 8 at 25 frames" in text
