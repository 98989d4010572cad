"""Figures on what limits the tiny model, on videos whose answers are known; its sheets, the animation; bad input."""

import dataclasses
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from nano import NANO
from PIL import Image

from benchmarks.tiny import animation, evaluate, limits, sheets
from benchmarks.tiny.clips import Background, Clip, Scene, Sprite, clip, render
from benchmarks.tiny.latents import training_clip
from samplers.plan import Settings
from wanjax import checkpoint, marks
from wanjax.writing import OutputError

RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)


def drawn(start=(8.0, 16.0), end=(20.0, 16.0), shape="square", frames=13, **changes):
    """A red shape over blue, drawn."""
    sprite = dataclasses.replace(Sprite(shape, ("red", "red"), (RED, RED), start, end), **changes)
    scene = Scene((sprite,), Background(("blue",), (BLUE,)))
    video, mask = render(scene, frames, 32)
    return Clip(video, "a red square moves right", False, mask, scene)


def test_motion_is_pixels_a_frame():
    np.testing.assert_allclose(limits.motion(drawn()), np.ones(12))
    arc = limits.motion(drawn(arc="over", arc_height=8.0))
    assert arc[0] == pytest.approx(arc[-1]) and arc[0] > 2 and arc[6] < 1.1  # a parabola is steep at both ends


def test_by_frame_is_the_psnr_of_each():
    one = clip(0)
    truth, region = np.stack([one.video] * 2), np.stack([one.motion_mask] * 2)
    made = truth.copy()
    made[0, 3] ^= 1
    made[1, 5] ^= 4
    table = limits.by_frame(made, truth, region)
    assert table.shape == (2, 25)
    assert table[0, 3] == pytest.approx(20 * np.log10(255)) and table[1, 5] == pytest.approx(20 * np.log10(255 / 4))
    assert (np.delete(table.ravel(), [3, 30]) > 70).all()


@pytest.mark.parametrize("shape", ["circle", "square", "ring", "cross"])
def test_centres_are_where_it_was_drawn(shape):
    """Of shapes that are symmetric about their centre, to half of the four samples a pixel that edges are drawn by."""
    one = drawn((7.3, 9.1), (22.8, 21.6), shape)
    found = limits.centres(one.video, one.scene)
    np.testing.assert_allclose(found, np.linspace((7.3, 9.1), (22.8, 21.6), 13), atol=0.125)


def test_centres_over_two_tones_and_of_nothing():
    one = next(c for c in map(clip, range(20)) if len(c.scene.background.colours) == 2)
    found = limits.centres(one.video, one.scene)
    assert np.isfinite(found).all()
    empty = np.broadcast_to(render(Scene((), one.scene.background), 2, 32)[0][:1], one.video.shape)
    assert np.isnan(limits.centres(empty, one.scene)).all()


def test_off_centre_of_a_shifted_clip_is_the_shift():
    clips = [drawn(), drawn((10.0, 10.0), (20.0, 20.0))]
    truth = [one.video for one in clips]
    assert limits.off_centre(np.stack(truth), clips) == 0
    shifted = np.stack([np.roll(video, (2, -1), axis=(1, 2)) for video in truth])
    assert limits.off_centre(shifted, clips) == pytest.approx(5**0.5, abs=1e-6)


@pytest.mark.parametrize("distance", [0.0, 0.75, 2.0])
def test_moved_clips_are_off_by_that_much(distance):
    clips = [drawn(), drawn((10.0, 10.0), (20.0, 20.0))]
    made = limits.moved(clips, distance)
    assert limits.off_centre(made, clips) == pytest.approx(distance, abs=0.125)
    if not distance:
        np.testing.assert_array_equal(made, truth_of(clips))


def test_rounding_again_is_as_large_as_rounding():
    """Against what storing in bfloat16 does to numbers of all sizes: errors bounded alike, and alike on average."""
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=100_000) * 10.0 ** rng.integers(-6, 3, 100_000)).astype(np.float32)
    stored = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    moved = limits.rounded_again({"kernel": numbers})["kernel"]
    relative = np.abs(moved - numbers) / np.abs(numbers)
    assert relative.max() <= 2**-8 * (1 + 1e-5)
    rounding = np.sqrt(np.mean(np.square((stored - numbers) / numbers)))
    assert np.sqrt(np.mean(relative**2)) == pytest.approx(rounding, rel=0.02)
    assert moved.dtype == np.float32 and not limits.rounded_again({"bias": np.zeros(9)})["bias"].any()


def test_training_clips_are_those_that_were_trained_on():
    known = limits.seen_in_training(5, 25)
    for one, number in zip(known, (0, 1, 8, 15, 21), strict=True):
        np.testing.assert_array_equal(one.video, training_clip(number, "challenges", 25).video)


def asked(*arguments):
    return limits.parser().parse_args(arguments)


def test_settings_are_tried_one_at_a_time():
    model = type("M", (), {"config": NANO})
    cases = limits.cases_of(model, asked("--guidance", "2", "1", "--steps", "3", "6", "--solvers", "unipc", "euler"))
    assert [(one.guidance, one.steps, one.solver) for one in cases] == [
        (2, 3, "unipc"), (1, 3, "unipc"), (2, 6, "unipc"), (2, 3, "euler")]  # fmt: skip


def test_the_report_tells_the_parts_apart(monkeypatch, tmp_path):
    """A VAE that is off by 4, a model off by 20 from it, both everywhere: each part's error stands where it belongs."""
    monkeypatch.setattr(evaluate, "reconstruct", lambda model, truth: np.clip(truth, 32, 220) + np.uint8(4))
    monkeypatch.setattr(evaluate, "generate",
                        lambda model, clips, *rest: np.clip(truth_of(clips), 32, 220) + np.uint8(24))  # fmt: skip
    monkeypatch.setattr(limits.shapes, "told", lambda judge, frames: np.zeros(len(frames), int))
    monkeypatch.setattr(limits.shapes, "learn", lambda: (None, {"right": 1.0}))
    monkeypatch.setattr(evaluate, "heldout", lambda count, frames: [
        drawn((8.0, 16.0), (20.0 - n, 16.0), frames=25) for n in range(count)])  # fmt: skip
    out, sheet = tmp_path / "limits.json", tmp_path / "limits.png"
    assert limits.main(["--clips", "6", "--out", str(out), "--sheet", str(sheet)]) == 0
    report = json.loads(out.read_text())
    # Of 26 (clipped to 32) and 230 (to 220), off by 6, then 4 more or 24 more; between them less.
    assert report["by_frame"]["model_to_vae"]["all"] == pytest.approx([20 * np.log10(255 / 20)] * 25, abs=0.01)
    lines = report["by_frame"]
    assert all(v > m for v, m in zip(lines["vae"]["all"], lines["model"]["all"], strict=True))
    assert report["pixels_a_frame"]["slow"][0] < report["pixels_a_frame"]["fast"][0]
    assert [(one["guidance"], one["steps"]) for one in report["cases"]] == [
        (1.5, 10), (1, 10), (2, 10), (1.5, 20), (1.5, 40), (1.5, 10)]  # fmt: skip
    assert report["rounded_again"] == {k: report["cases"][0][k] for k in report["rounded_again"]}
    with Image.open(sheet) as image:
        assert image.width > 13 * 64 and image.height > 4 * 3 * 64


def truth_of(clips):
    return np.stack([one.video for one in clips])


def test_a_sheet_holds_every_frame_where_it_says():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 8, 10, 3), dtype=np.uint8)
    blocks = [sheets.Block("one", {"truth": a, "a longer name": b}), sheets.Block("two", {"truth": b})]
    picture = sheets.sheet(blocks, (0, 3), scale=3)
    step_x, step_y = 30 + sheets.GAP, 24 + sheets.GAP
    left = picture.shape[1] - 2 * step_x
    assert picture.shape[0] == sheets.LINE * 3 + sheets.GAP * 3 + 3 * step_y and left > 60
    top = 2 * sheets.LINE + sheets.GAP
    for row, (video, skip) in enumerate([(a, 0), (b, 0), (b, sheets.LINE + sheets.GAP)]):
        for column, number in enumerate((0, 3)):
            y, x = top + row * step_y + skip, left + column * step_x
            np.testing.assert_array_equal(picture[y : y + 24 : 3, x : x + 30 : 3], video[number])
    assert (picture[: sheets.LINE, left:] != sheets.GROUND[0]).any()  # numbers of frames
    assert (picture[sheets.LINE : 2 * sheets.LINE, :60] != sheets.GROUND[0]).any()  # a caption


@pytest.mark.parametrize("frames, other", [((), None), ((0,), np.zeros((5, 8, 8, 3), np.uint8))])
def test_a_sheet_of_unlike_videos_is_refused(frames, other):
    rows = {"a": np.zeros((5, 8, 10, 3), np.uint8)} | ({} if other is None else {"b": other})
    with pytest.raises(ValueError, match="give one size, and frames"):
        sheets.sheet([sheets.Block("one", rows)], frames)


@pytest.mark.parametrize("width", [60, 150, 300, 1000])
def test_wrapped_text_is_the_same_words_in_lines_that_fit(width):
    text = "a black triangle moves down and left in a straight line, on a purple and red background"
    lines = sheets.wrapped(text, width).split("\n")
    assert " ".join(lines) == text
    font = sheets.letters()
    assert all(font.getlength(line) <= width or " " not in line for line in lines)
    assert all(font.getlength(f"{a} {b.split()[0]}") > width for a, b in zip(lines, lines[1:], strict=False))


def test_a_written_sheet_is_marked_and_takes_the_place_of_any_picture(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"another program's")
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    sheets.write(path, picture)
    with Image.open(path) as image:
        assert image.info["Software"] == marks.mark()
        np.testing.assert_array_equal(np.asarray(image), picture)
    with pytest.raises(OutputError):
        sheets.write(tmp_path / "nowhere" / "sheet.png", picture)


@pytest.mark.parametrize("count, across, down", [(1, 1, 1), (3, 2, 2), (6, 2, 3)])
def test_the_animation_shows_clip_and_keyframes(count, across, down):
    clips = [clip(n, "heldout") for n in range(count)]
    videos = np.stack([one.video[::-1] for one in clips])  # not the clips themselves
    pictures = animation.animation(clips, videos)
    cell_x, cell_y = 160 + 2 * (96 + 12), 160 + 2 * sheets.LINE + 4
    assert pictures.shape == (25 + animation.REST, down * (cell_y + 12) + 12, across * (cell_x + 12) + 12, 3)
    for n, one in enumerate(clips):
        left, top = 12 + n % 2 * (cell_x + 12), 12 + n // 2 * (cell_y + 12)
        for t, picture in ((0, 0), (7, 7), (24, 24), (24, 24 + animation.REST - 1)):
            whole = pictures[picture, top : top + 160, left + 108 : left + 268]
            np.testing.assert_array_equal(whole[::5, ::5], videos[n][t])
            for x, key in ((left, one.video[0]), (left + cell_x - 96, one.video[-1])):
                np.testing.assert_array_equal(pictures[picture, top + 32 : top + 128, x : x + 96][::3, ::3], key)


def test_the_animation_loops_and_rests_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", lambda model, clips, *rest: truth_of(clips))
    out = tmp_path / "example.webp"
    assert animation.main(["--out", str(out), "--numbers", "4", "2"]) == 0
    with Image.open(out) as image:
        assert image.format == "WEBP" and image.n_frames == 25 and image.info["loop"] == 0
        assert image.size == animation.animation([clip(n, "heldout") for n in (4, 2)], truth_of(
            [clip(n, "heldout") for n in (4, 2)])).shape[2:0:-1]  # fmt: skip
        image.seek(24)
        image.load()
        assert image.info["duration"] == pytest.approx(1000 * (1 + animation.REST) / 12, abs=2)


def test_the_pictures_of_the_readme_are_there_and_small():
    root = Path(__file__).parents[1]
    shown = re.findall(r"!\[.+\]\((.+)\)", (root / "README.md").read_text(encoding="utf-8"))
    assert shown[:2] == ["docs/example.webp", "docs/explain.png"]
    sizes = {name: (root / name).stat().st_size for name in shown}
    assert sizes["docs/example.webp"] < 1e6 and sizes["docs/explain.png"] < 200e3
    with Image.open(root / shown[0]) as image:
        assert image.n_frames == 25 and image.info["loop"] == 0


BAD = {
    limits: [["--model", "nowhere"], ["--clips", "0"], ["--steps", "0"], ["--guidance", "nan"], ["--solvers", "heun"],
             ["--out", "nowhere/it.json"], ["--sheet", "it.jpg"], ["--classifier", "nowhere"]],
    animation: [["--model", "nowhere"], ["--numbers", "-1"], ["--out", "it.mp4"], ["--out", "nowhere/it.webp"], []],
}  # fmt: skip


@pytest.mark.parametrize("module, arguments", [(m, a) for m, each in BAD.items() for a in each], ids=str)
def test_bad_arguments_are_one_line(module, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("computing began"))
    if module is animation and arguments and "--out" not in arguments:
        arguments = [*arguments, "--out", "it.webp"]
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "Traceback" not in line
    assert not list(tmp_path.iterdir())


def test_the_bundled_model_has_what_the_commands_take_for_granted():
    config = checkpoint.read_config("tiny")[1]
    assert Settings.of(config).frames == 25 and Settings.of(config).size == (32, 32)
