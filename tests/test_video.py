"""Written videos read back with imageio; every hostile output path; nothing left behind by an interrupt."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from samplers import video
from wanjax import marks

SUFFIXES = [".mp4", ".webm", ".gif", ".webp", ""]
# Decibels on the clip below. Four of the five are lossy: 4:2:0 chroma, 256 colours.
QUALITY = {".mp4": 38, ".webm": 38, ".gif": 32, ".webp": np.inf, "": np.inf}


def moving_disc(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A disc that crosses a smooth background: distinct frames, uint8 [T, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    ground = np.stack([40 + x, 60 + 2 * y, 120 + 0 * x], axis=-1)
    centres = np.linspace(6, width - 6, count)
    inside = (x[None] - centres[:, None, None]) ** 2 + (y[None] - height / 2) ** 2 < 36
    return np.where(inside[..., None], np.array([230, 80, 40]), ground).astype(np.uint8)


def read_back(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([iio.imread(frame) for frame in sorted(path.iterdir())])
    plugin = "pyav" if path.suffix in (".mp4", ".webm") else "pillow"
    options = {} if plugin == "pyav" else {"mode": "RGB"}
    return np.stack(list(iio.imiter(path, plugin=plugin, **options)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count,scale", [(25, 8), (81, 1), (1, 2)])
def test_every_frame_comes_back(tmp_path, suffix, count, scale):
    frames = moving_disc(count)
    path = tmp_path / f"clip{suffix}"
    video.write(path, frames, 16, scale)
    decoded = read_back(path)
    expected = video.enlarge(frames, scale)
    assert decoded.shape == expected.shape
    # Chroma at half size blurs the edges of unenlarged pixel art, whatever the encoder does.
    floor = 26 if scale == 1 and suffix in video.CODECS else QUALITY[suffix]
    for index in (0, count // 2, count - 1):
        assert psnr(decoded[index], expected[index]) >= floor, index
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("fps", [16, 23.976])
def test_stream_properties(tmp_path, suffix, fps):
    import av

    path = tmp_path / f"clip{suffix}"
    video.write(path, moving_disc(25), fps, 4)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        picture = next(container.decode(stream))
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
        assert container.duration / 1e6 == pytest.approx(25 / fps, abs=0.01)
        assert stream.codec_context.name in ("h264", "vp9", "libvpx-vp9", "libdav1d")
        assert picture.format.name == "yuv420p"
        assert (picture.colorspace, picture.color_primaries, picture.color_range) == (1, 1, 1)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sides_repeat_the_edge(tmp_path, suffix):
    frames = moving_disc(5, 31, 47)
    path = tmp_path / f"odd{suffix}"
    video.write(path, frames, 16, 3)
    decoded = read_back(path)
    assert decoded.shape == (5, 94, 142, 3)
    assert psnr(decoded[:, :93, :141], video.enlarge(frames, 3)) >= 32


@pytest.mark.parametrize("suffix,tick", [(".gif", 10), (".webp", 1)])
def test_animation_times_do_not_drift(tmp_path, suffix, tick):
    path = tmp_path / f"clip{suffix}"
    frames = moving_disc(25)
    frames[10] = frames[9]  # identical neighbours share one stored frame and keep their time
    video.write(path, frames, 16)
    durations = []
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert len(durations) == 24
    assert abs(sum(durations) - 25 * 1000 / 16) <= tick
    assert max(np.abs(np.delete(durations, 9) - 62.5)) <= tick


def test_primary_colours_survive(tmp_path):
    """A wrong matrix or range shifts pure colours by tens of levels."""
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128]]
    frames = np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (6, 64, 64, 3)).copy()
    for suffix in SUFFIXES:
        path = tmp_path / f"colours{suffix}"
        video.write(path, frames, 10)
        assert np.abs(read_back(path).astype(int) - frames).max() <= 4, suffix


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [0, 3])
def test_failure_leaves_nothing(tmp_path, monkeypatch, suffix, error, at):
    frames, calls = moving_disc(9), []
    enlarge = video.enlarge

    def interrupted(pixels, factor):
        calls.append(1)
        if len(calls) > at:
            raise error("stopped")
        return enlarge(pixels, factor)

    path = tmp_path / f"clip{suffix}"
    monkeypatch.setattr(video, "enlarge", interrupted)
    with pytest.raises(error, match="stopped"):
        video.write(path, frames, 16)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(video, "enlarge", enlarge)
    video.write(path, frames, 16)
    before = read_back(path)
    calls.clear()
    monkeypatch.setattr(video, "enlarge", interrupted)
    with pytest.raises(error, match="stopped"):
        video.write(path, frames[::-1], 16)
    assert os.listdir(tmp_path) == [path.name]
    np.testing.assert_array_equal(read_back(path), before)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to one process")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_in_another_process(tmp_path, number):
    script = """
        import signal
        import numpy as np
        from samplers import video
        from wanjax import writing
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        frames = np.random.default_rng(0).integers(0, 256, (81, 256, 256, 3), np.uint8)
        with writing.terminate_as_interrupt():
            print("ready", flush=True)
            while True:
                video.write("clip.webp", frames, 16)
    """
    root = Path(video.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"ready\n"
        while not any(hidden.iterdir() for hidden in tmp_path.glob(".wanjax-*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(getattr(signal, number))
        try:
            assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert os.listdir(tmp_path) == []


def test_frame_folder_replaced_whole(tmp_path):
    folder = tmp_path / "clip"
    video.write(folder, moving_disc(9), 16)
    video.write(folder, moving_disc(5), 16)
    assert sorted(os.listdir(folder)) == [f"{index:05d}.png" for index in range(5)]
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(video.OutputError, match="thesis.txt"):
        video.write(folder, moving_disc(5), 16)
    assert (folder / "thesis.txt").read_text() == "years of work" and os.listdir(tmp_path) == ["clip"]


def test_frame_folder_comes_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    folder = tmp_path / "clip"
    video.write(folder, moving_disc(3), 16)
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        video.write(folder, moving_disc(5), 16)
    assert len(os.listdir(folder)) == 3 and os.listdir(tmp_path) == ["clip"]


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    video.write(tmp_path / "clip.gif", moving_disc(2), 16)
    video.write_json(tmp_path / "clip.json", {})
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_frames_of_another_kind_are_refused(tmp_path):
    frames = moving_disc(2)
    for wrong in (frames.astype(np.float32), frames[0], frames[..., :1], frames[:0]):
        with pytest.raises(ValueError, match="uint8"):
            video.write(tmp_path / "clip.mp4", wrong, 16)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            video.write(tmp_path / "clip.mp4", frames, fps)
    with pytest.raises(ValueError, match="scale 0"):
        video.write(tmp_path / "clip.mp4", frames, 16, 0)
    with pytest.raises(video.OutputError, match="unknown suffix"):
        video.write(tmp_path / "clip.avi", frames, 16)
    assert os.listdir(tmp_path) == []


def test_check_output_names_the_neighbours(tmp_path):
    outputs = video.check_output(tmp_path / "clip.v2.MP4")
    assert outputs.video == tmp_path / "clip.v2.MP4"
    assert outputs.sheet == tmp_path / "clip.v2.sheet.png"
    assert outputs.settings == tmp_path / "clip.v2.json"
    assert video.check_output(f"{tmp_path}/frames/").sheet == tmp_path / "frames.sheet.png"
    assert os.listdir(tmp_path) == []


def test_check_output_works_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = video.check_output("clip.gif")
    video.write(outputs.video, moving_disc(2), 16)
    video.write_png(outputs.sheet, moving_disc(1)[0])
    video.write_json(outputs.settings, {})
    assert sorted(os.listdir(tmp_path)) == ["clip.gif", "clip.json", "clip.sheet.png"]


def refused(path, reason: str, overwrite: bool = False) -> None:
    with pytest.raises(video.OutputError, match=reason) as caught:
        video.check_output(path, overwrite)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("output ")


def test_check_output_refuses_before_any_compute(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    refused(tmp_path / "clip.avi", r"unknown suffix .avi; use .mp4, .webm, .gif, .webp or")
    refused(tmp_path / "none" / "clip.mp4", "mkdir -p")
    refused(tmp_path / "file" / "clip.mp4", "not a folder")
    refused("", "names no file")
    refused("..", "names no file")
    refused(tmp_path / ".mp4", "names no file")
    refused("/", "names no file")
    refused(tmp_path / ("long" * 100 + ".mp4"), "not a usable name")
    refused(f"{tmp_path}/nul\0.mp4", "not a usable name")
    for overwrite in (False, True):
        refused(tmp_path / "folder.mp4", "is a folder", overwrite)
        refused(tmp_path / "pipe.mp4", "not a regular file", overwrite)
        refused(tmp_path / "dangling.mp4", "dangling", overwrite)
        refused(tmp_path / "file", "not a folder", overwrite)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_check_output_tries_to_write():
    refused("/proc/clip.mp4", "cannot write in folder /proc")  # closed to root as well


@pytest.mark.parametrize("neighbour", ["clip.mp4", "clip.sheet.png", "clip.json"])
def test_check_output_wants_overwrite_for_each_neighbour(tmp_path, neighbour):
    (tmp_path / neighbour).touch()
    refused(tmp_path / "clip.mp4", f"{neighbour}: exists; pass --overwrite")
    video.check_output(tmp_path / "clip.mp4", overwrite=True)
    assert os.listdir(tmp_path) == [neighbour]


def test_check_output_on_folders_of_frames(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    video.check_output(folder)  # an empty folder holds nothing to lose
    (folder / "00000.png").touch()
    refused(folder, "pass --overwrite")
    video.check_output(folder, overwrite=True)
    (folder / "holiday.jpg").touch()
    refused(folder, "holiday.jpg", overwrite=True)
    assert sorted(os.listdir(folder)) == ["00000.png", "holiday.jpg"]


def test_enlarge():
    frames = moving_disc(3, 4, 6)
    large = video.enlarge(frames, 3)
    assert large.shape == (3, 12, 18, 3)
    for row in range(3):
        for column in range(3):
            np.testing.assert_array_equal(large[:, row::3, column::3], frames)
    assert video.enlarge(frames[0], 2).shape == (8, 12, 3)


def test_enlarge_factor():
    cases = {
        (32, 32): 8,
        (32, 64): 8,
        (48, 48): 6,
        (160, 200): 2,
        (256, 256): 1,
        (255, 900): 2,
        (480, 864): 1,
    }
    for size, factor in cases.items():
        assert video.enlarge_factor(*size) == factor, size


def tile(sheet: np.ndarray, place: int, columns: int, height: int, width: int) -> np.ndarray:
    top, left = 4 + place // columns * (height + 18) + 14, 4 + place % columns * (width + 4)
    return sheet[top : top + height, left : left + width]


def test_contact_sheet_shows_first_and_last():
    frames = moving_disc(25, 32, 32)
    sheet = video.contact_sheet(frames)
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * 146 + 4, 7 * 132 + 4, 3)
    chosen = [0, 2, 4, 6, 7, 9, 11, 13, 15, 17, 18, 20, 22, 24]
    for place, index in enumerate(chosen):
        np.testing.assert_array_equal(tile(sheet, place, 7, 128, 128), video.enlarge(frames[index], 4))
    assert len(np.unique(sheet[4:18, 4:132].reshape(-1, 3), axis=0)) > 2  # the label


def test_contact_sheet_with_keyframes():
    frames, keys = moving_disc(25, 32, 32), np.full((2, 32, 32, 3), [[[[9]]], [[[99]]]], np.uint8)
    sheet = video.contact_sheet(frames, keys, columns=4, rows=2)
    shown = [tile(sheet, place, 4, 128, 128)[::4, ::4] for place in range(8)]
    for pixels, expected in zip(shown, [keys[0], *frames[[0, 5, 10, 14, 19, 24]], keys[1]], strict=True):
        np.testing.assert_array_equal(pixels, expected)
    only_first = video.contact_sheet(frames, keys[:1], columns=4, rows=1)
    np.testing.assert_array_equal(tile(only_first, 3, 4, 128, 128)[::4, ::4], frames[24])


def test_contact_sheet_of_few_large_and_odd_frames():
    assert video.contact_sheet(moving_disc(1)).shape == (4 + 18 + 128, 4 + 4 + 192, 3)
    assert video.contact_sheet(moving_disc(5, 480, 864)).shape[1] == 5 * (288 + 4) + 4
    assert video.contact_sheet(moving_disc(3, 31, 47)).ndim == 3
    with pytest.raises(ValueError, match="too small"):
        video.contact_sheet(moving_disc(5), moving_disc(2), columns=3, rows=1)
    with pytest.raises(ValueError, match="fit it"):
        video.contact_sheet(moving_disc(5), moving_disc(2, 16, 16))


def test_png_and_json(tmp_path):
    frame = moving_disc(1)[0]
    video.write_png(tmp_path / "a.png", frame)
    np.testing.assert_array_equal(iio.imread(tmp_path / "a.png"), frame)
    settings = {"prompt": "圆 moves \udc80", "seed": 3, "timings": {"decode": 0.5}, "size": [32, 32]}
    video.write_json(tmp_path / "a.json", settings)
    expected = {"written_by": marks.mark()} | settings
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == expected
    assert "圆" in (tmp_path / "a.json").read_text(encoding="utf-8")
    for wrong, error in ((float("nan"), ValueError), (object(), TypeError)):
        with pytest.raises(error):
            video.write_json(tmp_path / "a.json", {"value": wrong})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == expected
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.png"]


def test_staged_outputs_appear_together_or_not_at_all(tmp_path):
    outputs = video.check_output(tmp_path / "clip", overwrite=True)
    frames = np.zeros((2, 8, 8, 3), np.uint8)

    def write(parts):
        video.write(parts.video, frames, 8)
        video.write_png(parts.sheet, frames[0])
        assert not list(tmp_path.glob("clip*"))
        video.write_json(parts.settings, {})

    with pytest.raises(KeyboardInterrupt), video.staged(outputs) as parts:
        write(parts)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with video.staged(outputs) as parts:
        write(parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "clip.json", "clip.sheet.png"]
    assert len(list(outputs.video.iterdir())) == 2


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_sides_beyond_the_format_are_refused(tmp_path, suffix):
    limit = video.MAX_SIDE[suffix]
    video.check_sides(tmp_path / f"clip{suffix}", 16, limit)
    with pytest.raises(video.OutputError, match=f"holds {limit} a side"):
        video.check_sides(tmp_path / f"clip{suffix}", limit + 1, 16)
    video.write(tmp_path / f"clip{suffix}", np.zeros((1, 2, limit, 3), np.uint8), 8)
    assert (tmp_path / f"clip{suffix}").stat().st_size
