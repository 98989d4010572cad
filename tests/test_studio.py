"""The studio without a browser: what it draws, checks, makes, refuses, and in which order."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nano import NANO, write_place
from PIL import Image

import samplers
from benchmarks.tiny import clips
from samplers import asked, files, hints, options
from samplers.studio import draw, fields, serve
from samplers.studio.__main__ import main
from samplers.studio.draw import Drawing
from samplers.studio.make import PLAIN, Studio, shown_method
from samplers.studio.options import MODEL
from samplers.studio.options import parser as command
from wanjax import checkpoint
from wanjax.method import METHODS, Method

ROOT = Path(samplers.__file__).parents[1]


# ---- the command line


def test_nothing_but_the_page_needs_gradio():
    names = ("__main__", "draw", "fields", "heat", "line", "make", "options", "safety", "serve", "views")
    modules = ", ".join(["samplers", "samplers.command", *(f"samplers.studio.{name}" for name in names)])
    script = f"import sys, {modules}\nprint([one for one in ('gradio', 'fastapi', 'uvicorn') if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--port", "70000"], "--port 70000: give a number from 0 to 65535"),
        (["--host", "::1", "--port", "0"], "--host ::1: give an IPv4 address or a name"),
        (["--host", "192.0.2.1", "--port", "0"], "cannot listen there"),
        (["--port", "0", "--token", "short"], "--token: give at least 16 letters"),
        (["--port", "0", "--token", "a token with blanks"], "--token: give at least 16 letters"),
        (["--port", "0", "--model", "/no/such/model"], "/no/such/model"),
        (["--port", "0", "--devices", "99"], "devices 99: there are 8"),
    ],
)
def test_bad_options_are_one_line(arguments, told, capsys):
    assert main([*arguments, "--no-compile-cache"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m samplers.studio: error: ") and told in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with serve.listen("127.0.0.1", 0) as sock:
        assert main(["--port", str(sock.getsockname()[1])]) == 2
    assert "or --port 0 for a free one" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--devices", "few"], ["--memory", "much"], ["--port", "http"], ["--no-such"]])
def test_options_that_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_without_gradio(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("samplers.studio.__main__.find_spec", lambda name: None if name == "gradio" else find(name))
    assert main([]) == 2
    assert "pip install 'wanjax[studio]'" in capsys.readouterr().err


# ---- drawing


def as_scene(first, last, path="straight"):
    """The training set's scene of two drawings."""
    ends = [(32 * one.x, 32 * one.y) for one in (first, last)]
    rgb = tuple(tuple(np.array(draw.COLOURS[one.colour]) / 255) for one in (first, last))
    sprite = clips.Sprite(first.shape, (first.colour, last.colour), rgb, *ends, arc=path,
                          radius=(32 * first.size, 32 * last.size))  # fmt: skip
    ground = clips.Background((first.ground,), (tuple(np.array(draw.COLOURS[first.ground]) / 255),))
    return clips.Scene((sprite,), ground)


@pytest.mark.parametrize("shape", draw.SHAPES)
@pytest.mark.parametrize("size", [32, 64])
def test_shapes_are_those_of_the_training_clips(shape, size):
    one = Drawing(shape, "yellow", "purple", 0.4, 0.55, 0.18)
    wanted = clips.render(as_scene(one, one), 2, size)[0][0]
    error = np.abs(draw.draw(one, size, size).astype(int) - wanted)
    assert error.mean() < 1.2 and error.max() < 70  # soft edges, by 64 samples a pixel and by 16
    plain = dataclasses.replace(one, colour="purple")
    assert np.abs(draw.draw(plain, size, size).astype(int) - wanted).mean() > 4  # the shape is what is compared


def test_names_of_shapes_and_colours_are_those_of_the_training_clips():
    assert set(draw.SHAPES) == set(clips.COMMON_SHAPES) and set(draw.COLOURS) == set(clips.COLOURS)
    for name, rgb in draw.COLOURS.items():
        assert np.abs(np.array(rgb) / 255 - clips.COLOURS[name]).max() < 1 / 255


@pytest.mark.parametrize("path", draw.PATHS)
@pytest.mark.parametrize("end", [(0.8, 0.5), (0.2, 0.2), (0.5, 0.1), (0.8, 0.9), (0.3, 0.5), (0.31, 0.9)])
@pytest.mark.parametrize("more", [{}, {"size": 0.22}, {"size": 0.14, "colour": "orange"}, {"colour": "grey"}])
def test_prompts_are_captions_of_the_training_clips(path, end, more):
    first = Drawing("ring", "cyan", "orange", 0.3, 0.5)
    last = dataclasses.replace(first, x=end[0], y=end[1], **more)
    assert draw.prompt(first, last, path) == clips.caption(as_scene(first, last, path))


@pytest.mark.parametrize("example", draw.EXAMPLES)
def test_the_bundled_model_knows_every_example(example):
    first, last, path = example
    pictures = [draw.draw(one, 32, 32) for one in (first, last)]
    assert hints.about(checkpoint.bundled(), draw.prompt(*example), pictures) == []
    thumbnail = draw.strobe(*example, side=64)
    assert thumbnail.shape == (64, 64, 3) and thumbnail.dtype == np.uint8


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": "heart"},
        {"colour": "mauve"},
        {"ground": None},
        {"x": 1.2},
        {"y": "0.5"},
        {"size": 0.5},
        {"size": True},
    ],
)
def test_drawings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Drawing(**wrong)


# ---- the page's values


@pytest.mark.parametrize("name", METHODS)
def test_a_profile_as_it_is_is_no_option(name):
    values = fields.of_method(METHODS[name], NANO, 5)
    assert fields.options(values, METHODS[name], NANO, 5) == {}


@pytest.mark.parametrize(
    "value, part",
    [
        ({"strength_end": 1.5}, {"kab": {"strength_end": 1.5}}),
        ({"strength_mid": 0.0}, {"kab": {"strength_mid": 0.0}}),
        ({"kab_until": 0.9}, {"kab": {"steps": (0.0, 0.9)}}),
        ({"kab_first": 0, "kab_last": 1}, {"kab": {"layers": (0, 1)}}),
        ({"anchor_curve": "ease-in"}, {"kab": {"curve": "ease-in"}}),
        ({"s_edge": 1.2}, {"retro": {"s_edge": 1.2}}),
        ({"s_mid": 0.8}, {"retro": {"s_mid": 0.8}}),
        ({"w_edge": 2}, {"retro": {"w_edge": 2.0}}),
        ({"retro_mode": "position"}, {"retro": {"mode": "position"}}),
        ({"weight_text": 2, "weight_last": 0.5}, {"isolation": {"weights": (2.0, 1.0, 0.5)}}),
    ],
)
def test_every_slider_is_its_setting(value, part, studio):
    values = fields.of_method(METHODS["paper"], NANO, 5) | value | {"method": "paper", "frames": 5}
    wanted = METHODS["paper"]
    for name, changed in part.items():
        wanted = dataclasses.replace(wanted, **{name: dataclasses.replace(getattr(wanted, name), **changed)})
    assert shown_method(values, studio) == wanted


@pytest.mark.parametrize("part", fields.PARTS)
def test_a_part_that_is_off_takes_its_sliders_along(part, studio):
    moved = {"strength_end": 2, "s_edge": 1.3, "weight_text": 0.1}
    values = fields.of_method(METHODS["paper"], NANO, 5) | moved | {part: False, "method": "paper", "frames": 5}
    found = shown_method(values, studio)
    assert getattr(found, part) is None and sum(one is None for one in vars(found).values()) == 1


def test_nothing_of_the_sliders_reaches_wan(studio):
    values = fields.of_method(METHODS["paper"], NANO, 5) | {"strength_end": 3, "method": "wan", "frames": 5}
    assert shown_method(values, studio) == Method()


def test_marks_lie_where_the_paper_is():
    for field in fields.fields(checkpoint.open_folder("tiny").config, 25):
        if not field.choices:
            assert field.low <= field.paper <= field.high
            assert field.low + field.share * (field.high - field.low) == pytest.approx(field.paper)
    shown = fields.of_method(METHODS["paper"], NANO, 5)
    assert {one.name: one.paper for one in fields.fields(NANO, 5)} == {
        k: v for k, v in shown.items() if k not in fields.PARTS
    }


# ---- jobs


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def studio(room):
    (room / "clips").mkdir(mode=0o700)
    how = {name: getattr(command().parse_args(["--model", str(room / "nano")]), name) for name in MODEL}
    return Studio(how, room / "clips")


@pytest.fixture
def values(room):
    s = NANO.sampling
    plain = {"prompt": "a red circle", "seed": 3} | {name: getattr(s, name) for name in PLAIN if hasattr(s, name)}
    return {"first": room / "a.png", "last": room / "b.png", "inner": [], "base": None, "method": "paper"} | plain | (
        fields.of_method(METHODS["paper"], NANO, 5))  # fmt: skip


def by_command(room, out, *arguments):
    """The job of the same as a command line."""
    p = options.parser()
    given = asked.parse(
        p, ["--model", str(room / "nano"), "--out", str(out), "--save-every", "0", *map(str, arguments)]
    )
    return files.prepare(**asked.one(given))


@pytest.mark.parametrize(
    "change, arguments",
    [
        ({}, ["--method", "paper"]),
        ({"method": "wan", "strength_end": 2.0}, []),
        ({"method": "release", "retro_mode": "magnitude"}, ["--method", "release"]),
        ({"strength_end": 2.0, "kab_until": 0.9}, ["--method", "paper", "--strength-end", 2, "--kab-steps", "0-0.9"]),
        ({"kab": False, "steps": 5}, ["--method", "paper", "--no-kab", "--steps", 5]),
        ({"guidance": 1.0, "seed": 9, "shift": 2.5, "solver": "euler"},
         ["--method", "paper", "--guidance", 1, "--seed", 9, "--shift", 2.5, "--solver", "euler"]),
        ({"prompt": "--a, {b} `c` ${d}"}, ["--method", "paper", "--prompt=--a, {b} `c` ${d}"]),
    ],
)  # fmt: skip
def test_a_job_of_the_page_is_that_of_the_command_line(change, arguments, studio, values, room, tmp_path):
    same = ["--first", room / "a.png", "--last", room / "b.png", "--prompt", "a red circle", "--seed", 3]
    wanted = by_command(room, tmp_path / "x.mp4", *same, *arguments)
    made = studio.job(values | change, studio.place())
    assert made.told == wanted.told and (made.fps, made.scale) == (wanted.fps, wanted.scale)


def test_keyframes_anywhere(studio, values, room, tmp_path):
    job = studio.job(values | {"inner": [(room / "c.png", 2.0)]}, studio.place())
    more = ["--first", room / "a.png", "--keyframe", f"{room / 'c.png'}@2", "--last", room / "b.png"]
    wanted = by_command(room, tmp_path / "x.mp4", *more, "--prompt", "a red circle", "--seed", 3, "--method", "paper")
    assert job.plan.at == (0, 2, 4) and job.told == wanted.told
    assert studio.job(values | {"last": None}, studio.place()).plan.at == (0,)
    assert studio.job(values | {"first": None}, studio.place()).plan.at == (4,)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"first": None, "last": None}, "keyframes: there is none"),
        ({"seed": -1}, "seed -1"),
        ({"frames": 6}, "frames 6"),
        ({"steps": 0}, "steps: got 0"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"solver": "rk4"}, "--solver"),
        ({"strength_end": -1.0}, "strength_end -1"),
        ({"kab_first": 1, "kab_last": 0}, "kab layers 1-0"),
        ({"prompt": None}, "prompt None"),
    ],
)
def test_bad_values_are_one_line(change, told, studio, values):
    with pytest.raises(ValueError, match=told) as raised:
        studio.job(values | change, studio.place())
    assert "\n" not in str(raised.value)


def test_uploads_are_checked_as_on_the_command_line(studio, values, tmp_path):
    (tmp_path / "bomb.png").write_bytes(_png_header(60_000, 60_000))
    (tmp_path / "text.png").write_text("no image")
    for name in ("bomb.png", "text.png"):
        with pytest.raises(ValueError, match=name) as raised:
            studio.job(values | {"first": tmp_path / name}, studio.place())
        with pytest.raises(ValueError) as wanted:
            files.prepare(tmp_path / name, tmp_path / name, tmp_path / "x.mp4")
        assert str(raised.value) == str(wanted.value)
    upright = Image.new("RGB", (24, 16), "red")
    upright.paste("blue", (0, 0, 12, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half
    upright.rotate(180).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "plain.png")
    turned, plain = (
        studio.job(values | {"first": tmp_path / name}, studio.place()) for name in ("turned.png", "plain.png")
    )
    assert np.array_equal(turned.inputs.pixels, plain.inputs.pixels)


def _png_header(width, height):
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
