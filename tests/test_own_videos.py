"""A folder of one's own videos as a data set: every container, captions, and everything that can be wrong with them."""

import json
from fractions import Fraction

import av
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from benchmarks.tgi.data import DataError, stretched
from benchmarks.tgi.videos import videos
from samplers import video


def clip(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright block that goes right over a grey ground, uint8 [frames, height, width, 3]."""
    made = np.full((frames, height, width, 3), 90, np.uint8)
    for index in range(frames):
        made[index, 8:24, index : index + 16] = (220, 60, 30)
    return made


def encode(path, frames, codec, pixels="yuv420p"):
    """Writes what `samplers.video` does not: other containers."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path):
    """Three videos of 7 frames."""
    place = tmp_path / "own"
    place.mkdir()
    for name in ("b.mp4", "a.webm", "c.gif"):
        video.write(place / name, clip(7), 8)
    return place


def refused(*wanted, **arguments):
    with pytest.raises(DataError) as caught:
        videos(**arguments)
    for text in wanted:
        assert text in str(caught.value), str(caught.value)
    return str(caught.value)


def test_videos_by_name(folder):
    data = videos(str(folder), 5)
    assert data.name == "videos" and data.length == 5
    assert [item.id for item in data.items] == ["a", "b", "c"]
    for item in data.items:
        assert (item.challenge, item.caption, item.first_image_desc, item.last_image_desc) == ("", "", "", "")
        assert item.length == 5 and item.extra == {}
        read = item.read()
        assert read.dtype == np.uint8 and read.shape == (5, 32, 48, 3)
        assert np.abs(read.astype(int) - clip(5)).mean() < 6, item.id
        assert stretched(item.read(), (16, 16)).shape == (5, 16, 16, 3)


def test_the_same_as_imageio_reads(folder):
    for item in videos(folder, 7).items[:2]:
        path = next(folder.glob(f"{item.id}.*"))
        np.testing.assert_array_equal(item.read(), iio.imread(path, plugin="pyav"))


@pytest.mark.parametrize(
    "name, codec, pixels",
    [
        ("x.mov", "libx264", "yuv420p"),
        ("x.MKV", "libx264", "yuv444p"),
        ("x.avi", "mjpeg", "yuvj420p"),
        ("x.mp4", "mpeg4", "yuv420p"),
    ],
)
def test_other_containers_and_codecs(tmp_path, name, codec, pixels):
    encode(tmp_path / name.lower(), clip(5), codec, pixels)
    (tmp_path / name.lower()).rename(tmp_path / name)
    (item,) = videos(tmp_path, 5).items
    assert item.id == "x" and np.abs(item.read().astype(int) - clip(5)).mean() < 8


def test_what_is_no_video_is_passed_over(folder):
    for name in ("notes.txt", "captions.json", ".hidden.mp4", "._b.mp4"):
        (folder / name).write_text("no video")
    (folder / "folder.mp4").mkdir()
    assert len(videos(folder, 5).items) == 3


def test_captions(folder, tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"b.mp4": "a block goes right", "c.gif": ""}))
    assert [item.caption for item in videos(folder, 5, path).items] == ["", "a block goes right", ""]
    path.write_text(json.dumps({"b.mov": "one", "d.mp4": "two", "a.webm": "three"}))
    refused("2 problems", str(path), "'b.mov'", "'d.mp4'", folder=folder, length=5, captions=path)


@pytest.mark.parametrize("text", ["{", "[]", '{"b.mp4": 3}', None])
def test_captions_that_are_none(folder, tmp_path, text):
    path = tmp_path / "captions.json"
    if text is not None:
        path.write_text(text)
    refused(str(path), folder=folder, length=5, captions=path)


def test_identity(folder, tmp_path):
    data = videos(folder, 5)
    assert json.loads(json.dumps(data.identity)) == data.identity
    assert data.identity["ids"] == ["a", "b", "c"] and data.identity["source"] == "videos"
    moved = folder.rename(tmp_path / "elsewhere")
    assert videos(moved, 5).identity == data.identity
    path = tmp_path / "captions.json"
    path.write_text('{"c.gif": "told"}')
    others = [videos(moved, 5, path), videos(moved, 6)]
    changed = clip(7)
    changed[1] = 0
    video.write(moved / "c.gif", changed, 8)
    others.append(videos(moved, 5))
    assert len({one.identity["sha256"] for one in (data, *others)}) == 4


def test_all_that_is_wrong_comes_together(folder):
    video.write(folder / "short.mp4", clip(4), 8)
    (folder / "noise.mkv").write_bytes(b"\x13" * 500)
    (folder / "empty.mov").touch()
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    video.write(folder / "c.mp4", clip(7), 8)  # beside c.gif
    with av.open(str(folder / "sound.avi"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    message = refused("6 problems:", "short.mp4: 4 frames, 5 are needed", "noise.mkv: not a readable video",
                      "empty.mov: not a readable video", "cut.mp4: ", "c.mp4: another video",
                      "sound.avi: 0 frames", folder=folder, length=5)  # fmt: skip
    assert len(message.splitlines()) == 7


def test_no_videos(tmp_path):
    refused(str(tmp_path), "holds no video", ".webm", folder=tmp_path, length=5)
    refused("nowhere", "cannot be read as a folder", folder=tmp_path / "nowhere", length=5)
    (tmp_path / "file.mp4").touch()
    refused("file.mp4", "cannot be read as a folder", folder=tmp_path / "file.mp4", length=5)
    refused("length 1", folder=tmp_path, length=1)


def test_files_that_go_away_later(folder):
    items = videos(folder, 5).items
    (folder / "a.webm").unlink()
    with pytest.raises(DataError, match=r"a\.webm: not a readable video"):
        items[0].read()


def test_frames_that_change_size(tmp_path):
    """A GIF cannot; MJPEG in AVI is a list of pictures, each with a size of its own."""
    with av.open(str(tmp_path / "x.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for index in range(4):
            size = (48, 32) if index < 2 else (64, 32)
            packet = av.Packet(jpeg(tmp_path / "frame.jpg", size))
            packet.stream, packet.pts, packet.dts = stream, index, index
            packet.time_base, packet.is_keyframe = Fraction(1, 8), True
            container.mux(packet)
    assert len(videos(tmp_path, 2).items) == 1
    refused("x.avi: its frames change size", folder=tmp_path, length=4)


def jpeg(path, size):
    Image.new("RGB", size, "red").save(path)
    return path.read_bytes()


def test_a_turned_picture_comes_upright(tmp_path):
    """The matrix of an upright phone video: what is stored at the right is shown at the bottom."""
    path = tmp_path / "phone.mp4"
    stored = np.zeros((3, 32, 64, 3), np.uint8)
    stored[:, :, 48:] = 255
    encode(path, stored, "libx264")
    plain = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30], ">i4").tobytes()
    whole = path.read_bytes()
    track = whole.index(plain, whole.index(b"tkhd"))
    path.write_bytes(whole[:track] + turned + whole[track + len(turned) :])
    (item,) = videos(tmp_path, 3).items
    read = item.read()
    assert read.shape == (3, 64, 32, 3)
    assert read[:, 52:].min() > 200 and read[:, :44].max() < 50
