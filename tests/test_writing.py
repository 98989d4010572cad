"""The room for results: whose a file is, what may be replaced, what names mean, small files, signals."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import av
import pytest
from PIL import Image
from writers import FRAMES, group, tree, write_group, writers

from samplers import video
from wanjax import marks, publishing, writing
from wanjax.writing import OutputError, Target

FORMATS = ["clip.mp4", "clip.webm", "clip.gif", "clip.webp", "clip"]


# Whose a file is


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_that_wanjax_wrote_it(tmp_path, name):
    video.write(tmp_path / name, FRAMES, 8)
    assert marks.foreign(tmp_path / name) is None
    with writing.beside(tmp_path / name, folder=name == "clip", overwrite=True) as part:
        video.write(part, FRAMES[:1], 8)
    assert os.listdir(tmp_path) == [name]


def test_pictures_and_json_say_that_wanjax_wrote_them(tmp_path):
    video.write_png(tmp_path / "a.png", FRAMES[0])
    writing.write_json(tmp_path / "a.json", {"seed": 3})
    assert marks.foreign(tmp_path / "a.png") is None and marks.foreign(tmp_path / "a.json") is None
    assert json.loads((tmp_path / "a.json").read_text()) == {"written_by": marks.mark(), "seed": 3}
    assert list(json.loads((tmp_path / "a.json").read_text()))[0] == "written_by"


def foreign_file(path: Path) -> None:
    """A file of the format of its name that another program made."""
    pictures = [Image.fromarray(frame) for frame in FRAMES]
    if path.suffix in (".mp4", ".webm"):
        with av.open(str(path), "w", format=path.suffix[1:]) as container:
            stream = container.add_stream(video.CODECS[path.suffix][0], rate=8)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            container.metadata["comment"] = "made by wanjaxish"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(FRAMES[0], format="rgb24")))
            container.mux(stream.encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps({"name": "package", "version": "1.0.0", "settings": {}}))
    else:
        pictures[0].save(path, save_all=path.suffix != ".png", append_images=pictures[1:])


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.webp", "a.png", "a.json"])
def test_what_others_wrote_is_never_replaced(tmp_path, name):
    foreign_file(tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="wanjax did not write it; move it away or choose") as caught:
        writing.check([Target(tmp_path / name)], overwrite=True)
    assert str(caught.value).startswith(f"output {tmp_path / name}: ") and "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="did not write"), writing.beside(tmp_path / name, overwrite=True):
        raise AssertionError("entered")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name,content",
    [
        ("list.json", b"[1, 2]"),
        ("deep.json", b"[" * 100_000),
        ("cut.json", b'{"written_by": "wanjax 0.1'),
        ("latin.json", b'{"a": "\xe9"}'),
        ("other.json", b'{"written_by": "wanjaxish"}'),
        ("number.json", b'{"written_by": 5}'),
        ("package.json", b'{"name": "x", "versions": {"node": "20"}, "settings": {}, "model": 1, "video": "a"}'),
        ("notes.txt", b"wanjax"),
        ("a.png", b"not a picture"),
        ("a.mp4", b"not a video"),
        ("a.webp", b"RIFF"),
    ],
)
def test_odd_files_are_others(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert marks.foreign(tmp_path / name) == "wanjax did not write it"


def test_clip_json_of_another_program_stops_the_run(tmp_path):
    foreign_file(tmp_path / "package.json")
    with pytest.raises(OutputError, match="package.json: wanjax did not write it"):
        video.check_output(tmp_path / "package.mp4", overwrite=True)


@pytest.mark.parametrize("kind", ["photo among frames", "text", "folder", "link", "odd name"])
def test_folder_with_anything_foreign_is_kept(tmp_path, kind):
    folder = tmp_path / "frames"
    video.write(folder, FRAMES, 8)
    if kind == "photo among frames":
        foreign_file(folder / "00001.png")
    elif kind == "text":
        (folder / "thesis.txt").write_text("years of work")
    elif kind == "folder":
        (folder / "00003.png").mkdir()
    elif kind == "link":
        (folder / "00003.png").symlink_to(folder / "00000.png")
    else:
        shutil.copy(folder / "00000.png", folder / "best.png")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="it holds '"):
        video.check_output(folder, overwrite=True)
    with pytest.raises(OutputError, match="it holds '"):
        video.write(folder, FRAMES, 8)
    assert tree(tmp_path) == before


# What versions without marks wrote


def older(folder: Path, name: str, frames: int = 3) -> None:
    """Outputs of an older version: no marks, a JSON that names the video, written last."""
    path = folder / name
    if path.suffix:
        foreign_file(path)
    else:
        path.mkdir()
        for index in range(frames):
            foreign_file(path / f"{index:05d}.png")
    foreign_file(folder / f"{path.stem}.sheet.png")
    report = {"video": str(Path("elsewhere") / name), "model": {}, "settings": {"frames": frames},
              "versions": {"python": "3.11", "wanjax": "0.1.0"}}  # fmt: skip
    time.sleep(0.01)
    (folder / f"{path.stem}.json").write_text(json.dumps(report))


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_of_older_versions_are_ours(tmp_path, name):
    older(tmp_path, name)
    outputs = video.check_output(tmp_path / name, overwrite=True)
    with video.staged(outputs) as parts:
        video.write(parts.video, FRAMES[:1], 8)
        video.write_png(parts.sheet, FRAMES[0])
        video.write_json(parts.settings, {})
    assert sorted(os.listdir(tmp_path)) == sorted([name, "clip.json", "clip.sheet.png"])
    assert marks.foreign(tmp_path / name) is None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("change", ["newer", "another name", "no report", "marked report"])
def test_but_not_what_came_later_or_is_not_named(tmp_path, name, change):
    older(tmp_path, name)
    path, told = tmp_path / name, tmp_path / "clip.json"
    if change == "newer":
        for one in [path, *(path.iterdir() if path.is_dir() else ())]:
            os.utime(one, (time.time() + 10, time.time() + 10))
    elif change == "another name":
        told.write_text(told.read_text().replace(name, f"x{name}"))
    elif change == "no report":
        told.unlink()
    else:  # of this version, whose files carry marks themselves
        told.write_text(json.dumps(json.loads(told.read_text()) | {"written_by": marks.mark()}))
    with pytest.raises(OutputError, match="wanjax did not write|which wanjax did not write"):
        video.check_output(path, overwrite=True)


def test_plots_of_older_versions_are_ours(tmp_path):
    for name in ("retro.png", "strength.png", "attention.png"):
        foreign_file(tmp_path / name)
    assert "did not write" in marks.foreign(tmp_path)
    (tmp_path / "attention.json").write_text(json.dumps(dict.fromkeys(marks._PLOT_KEYS)))
    assert marks.foreign(tmp_path) is None


# Inputs


def input_cases(folder: Path) -> dict[str, tuple[Path, Path]]:
    """name -> (input, output): ways to name one file twice."""
    video.write(folder / "frames", FRAMES, 8)
    video.write(folder / "clip.gif", FRAMES, 8)
    video.write(folder / "other.gif", FRAMES, 8)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "link.gif").symlink_to("clip.gif")
    (folder / "second.gif").symlink_to("link.gif")
    (folder / "inside.png").symlink_to(folder / "frames" / "00001.png")
    (folder / "way").symlink_to(folder / "deep" / "er", target_is_directory=True)
    os.link(folder / "clip.gif", folder / "hard.gif")
    (folder / "frames" / "00003.png").write_bytes((folder / "frames" / "00000.png").read_bytes())
    return {
        "the same": (folder / "clip.gif", folder / "clip.gif"),
        "by ..": (folder / "deep" / ".." / "clip.gif", folder / "clip.gif"),
        "by .. behind a link": (folder / "way" / ".." / ".." / "clip.gif", folder / "clip.gif"),
        "a link as the input": (folder / "link.gif", folder / "clip.gif"),
        "a link to a link": (folder / "second.gif", folder / "clip.gif"),
        "a link as the output": (folder / "clip.gif", folder / "link.gif"),
        "the link between": (folder / "second.gif", folder / "link.gif"),
        "a hard link": (folder / "hard.gif", folder / "clip.gif"),
        "in a folder": (folder / "frames" / "00000.png", folder / "frames"),
        "in a folder, by ..": (folder / "deep" / ".." / "frames" / "00000.png", folder / "frames"),
        "in a folder, by a link": (folder / "inside.png", folder / "frames"),
        "the folder itself": (folder / "frames", folder / "frames"),
        "in an input folder": (folder, folder / "clip.gif"),
    }


def test_no_input_is_ever_replaced(tmp_path):
    for name, (given, out) in input_cases(tmp_path).items():
        before = tree(tmp_path)
        with pytest.raises(OutputError, match="the input .*; choose another name") as caught:
            video.check_output(out, overwrite=True, inputs=[tmp_path / "other.gif", given])
        assert str(given) in str(caught.value) and "\n" not in str(caught.value), name
        assert tree(tmp_path) == before
    outputs = video.check_output(tmp_path / "clip.gif", overwrite=True, inputs=[tmp_path / "other.gif", "none.png"])
    assert outputs.video == tmp_path / "clip.gif"


def test_relative_and_home_inputs(tmp_path, monkeypatch):
    video.write(tmp_path / "frames", FRAMES, 8)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path / "frames")
    for given in ("00000.png", "./00000.png", "../frames/00000.png", "~/frames/00000.png"):
        for out in ("../frames", "~/frames", tmp_path / "frames"):
            with pytest.raises(OutputError, match="holds the input"):
                video.check_output(out, overwrite=True, inputs=[given])


def test_outputs_that_lie_in_each_other(tmp_path):
    for one, other in (("a", "a"), ("a", "a/b"), ("a/b/c", "a")):
        with pytest.raises(OutputError, match="in each other's way"):
            writing.check([Target(tmp_path / one, folder=True), Target(tmp_path / other)])


# Paths


def test_absolute(tmp_path, monkeypatch):
    (tmp_path / "a b" / "ü圆").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a b" / "ü圆", target_is_directory=True)
    (tmp_path / "file").symlink_to("a b")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path / "a b")
    for given, expected in {
        "x.mp4": "a b/x.mp4",
        "./x": "a b/x",
        "../x": "x",
        "../a b/ü圆/../x y": "a b/x y",
        "../link/x": "a b/ü圆/x",
        "../link/../x": "a b/x",  # what the system takes it for; text alone would say x
        "../link": "link",
        "../link/": "link",
        "..": "",
        ".": "a b",
        "~": "",
        "~/x": "x",
        "~/link/..": "a b",
        "none/../x": "a b/x",
    }.items():
        expected = tmp_path / expected if given != "~" else tmp_path
        assert writing.absolute(given) == expected, given
        assert writing.absolute(given).is_absolute()
    assert writing.absolute("~nobody-of-this-name/x") == tmp_path / "a b" / "~nobody-of-this-name" / "x"
    with pytest.raises(ValueError, match="not a usable name") as caught:
        writing.absolute("a\0b/c")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["a b", "ü圆", "-x", "'q\"", "100%", "a\nb"])
def test_any_name_can_be_written(tmp_path, folder):
    (tmp_path / folder).mkdir()
    for name in ("clip.gif", "ü 圆.json"):
        with writing.beside(tmp_path / folder / name) as part:
            part.write_bytes(b"x")
    assert sorted(os.listdir(tmp_path / folder)) == ["clip.gif", "ü 圆.json"]


def test_names_and_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "file").write_text("x")
    for path, reason in {
        tmp_path / "dangling.json": "dangling link",
        tmp_path / "loop.json": "not a usable name|dangling",
        tmp_path / "none" / "a.json": "mkdir -p",
        tmp_path / "file" / "a.json": "no folder|not a folder",
        tmp_path / ("long" * 100): "not a usable name",
        Path("/proc/a.json"): "cannot write in folder /proc",
    }.items():
        for write in (lambda path: writing.check([Target(path)]), lambda path: writing.write_json(path, {})):
            with pytest.raises(OutputError, match=reason) as caught:
                write(path)
            assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["dangling.json", "file", "loop.json"]
    assert not (tmp_path / "nowhere.json").exists()


# One file


def test_small_files(tmp_path):
    writing.write_bytes(tmp_path / "a.bin", b"\0\1")
    writing.write_text(tmp_path / "a.txt", "圆 \udc80\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "圆 \\udc80\n"
    writing.write_json(tmp_path / "list.json", [1, 2], indent=1)
    writing.write_json(tmp_path / "plain.json", {"a": 1}, mark=False)
    assert json.loads((tmp_path / "plain.json").read_text()) == {"a": 1}
    before = tree(tmp_path)
    for name in ("a.bin", "a.txt", "list.json", "plain.json"):
        with pytest.raises(OutputError, match="exists; pass --overwrite"):
            writing.write_text(tmp_path / name, "x")
        with pytest.raises(OutputError, match="did not write it"):
            writing.write_text(tmp_path / name, "x", overwrite=True)
    assert tree(tmp_path) == before
    for name in ("a.bin", "a.txt", "list.json", "plain.json"):
        writing.write_text(tmp_path / name, "x", overwrite=True, anything=True)
    assert set(tree(tmp_path).values()) == {b"x"}
    (tmp_path / "link").symlink_to("a.txt")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(OutputError):
            writing.write_text(tmp_path / name, "x", overwrite=True, anything=True)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    writing.write_json(tmp_path / "a.json", {})
    with writing.beside(tmp_path / "b", folder=True) as part:
        part.mkdir()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("number", sorted({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}))
def test_without_hard_links(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "link", refuse)
    for who in ("one", "two"):
        with writing.staged(writing.check(group(tmp_path), overwrite=who == "two")) as parts:
            write_group(parts, who)
        assert writers(tmp_path) == [who] * 3
    checked = writing.check([Target(tmp_path / "new.json")])
    with pytest.raises(OutputError, match="appeared"), writing.staged(checked) as (part,):
        part.write_bytes(b"ours")
        (tmp_path / "new.json").write_bytes(b"theirs")
    assert (tmp_path / "new.json").read_bytes() == b"theirs"
    with pytest.raises(FileExistsError):
        publishing.publish(tmp_path / "clip.json", tmp_path / "new.json")
    assert (tmp_path / "new.json").read_bytes() == b"theirs" and writers(tmp_path) == ["two"] * 3


# Locks and flushing


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
    again = pytest.raises(OutputError, match="^busy: wait$")
    with writing.locked(tmp_path / "x.lock", ""), again, writing.locked(tmp_path / "x.lock", "busy: wait"):
        raise AssertionError("entered")
    assert os.listdir(tmp_path) == []
    with writing.locked(tmp_path / "x.lock", "busy"):
        pass
    with pytest.raises(OutputError, match="cannot be locked"), writing.locked(Path("/proc/x.lock"), "busy"):
        raise AssertionError("entered")


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order, fsync, link, rename = [], os.fsync, os.link, os.rename
    names = {}

    def note(descriptor):
        order.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "link", lambda a, b, **k: (order.append(("name", os.stat(a).st_ino)), link(a, b, **k)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(("name", os.stat(a).st_ino)), rename(a, b)))
    with writing.staged(writing.check(group(tmp_path))) as parts:
        parts[0].mkdir()
        for name, path in {"0": parts[0] / "0.json", "1": parts[1], "2": parts[2]}.items():
            path.write_text(name)
            names[name] = path.stat().st_ino
        names["folder"] = parts[0].stat().st_ino
        order.clear()
    first = min(index for index, (kind, _) in enumerate(order) if kind == "name")
    assert set(names.values()) <= {inode for kind, inode in order[:first] if kind == "sync"}
    assert ("sync", tmp_path.stat().st_ino) in order[first:]  # and then the names
