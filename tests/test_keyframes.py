"""Keyframe reading against hand-made files of every mode; resampling against torch and transformers."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from wanjax import keyframes, settings


def gradient(height: int, width: int) -> np.ndarray:
    """A smooth colour picture without symmetry, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    return np.rint(255 * np.stack([x, y * x, 1 - y], axis=-1)).astype(np.uint8)


def png16(path, values: np.ndarray, colour_type: int) -> None:
    """A 16-bit PNG of uint16 [H, W] or [H, W, C], which Pillow reads but cannot write in colour."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_read_is_exact_for_lossless_rgb(tmp_path):
    pixels = gradient(9, 13)
    for name in ("a.png", "a.bmp", "a.tiff", "a.ppm"):
        Image.fromarray(pixels).save(tmp_path / name)
        image = keyframes.read(tmp_path / name)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright = gradient(16, 24)
    # The stored picture whose viewing rule (the EXIF standard's table) gives the upright one back.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    seen = np.asarray(keyframes.read(path)).astype(int)
    assert seen.shape == upright.shape
    assert np.abs(seen - upright).max() <= (3 if suffix == "jpg" else 0)


def test_orientation_and_transparent_palette_together(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 0], [1, 2]], np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "p.png", transparency=2, exif=exif)
    red, green, matte = (255, 0, 0), (0, 255, 0), (7, 8, 9)
    expected = np.rot90(np.array([[red, green], [matte, red], [green, matte]], np.uint8), -1)
    np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / "p.png", matte)), expected)


def test_alpha_is_composited_over_the_matte(tmp_path):
    colour, alpha = gradient(8, 8), np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([colour[..., 0], alpha]), mode="LA").save(tmp_path / "la.png")
    weight = alpha[..., None] / 255
    for matte in ((0, 0, 0), (255, 128, 10)):
        seen = np.asarray(keyframes.read(tmp_path / "rgba.png", matte)).astype(float)
        assert np.abs(seen - (colour * weight + np.array(matte) * (1 - weight))).max() <= 1
        seen = np.asarray(keyframes.read(tmp_path / "la.png", matte)).astype(float)
        assert np.abs(seen - (colour[..., :1] * weight + np.array(matte) * (1 - weight))).max() <= 1
    assert keyframes.read(tmp_path / "rgba.png").getpixel((0, 0)) == (0, 0, 0)


def test_transparent_key_colours(tmp_path):
    gray = np.array([[0, 100], [200, 255]], np.uint8)
    Image.fromarray(gray).save(tmp_path / "l.png", transparency=100)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "i16.png", transparency=100 * 257)
    Image.fromarray(np.dstack([gray] * 3)).save(tmp_path / "rgb.png", transparency=(100, 100, 100))
    expected = np.dstack([gray] * 3)
    expected[0, 1] = (1, 2, 3)
    for name in ("l.png", "i16.png", "rgb.png"):
        np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / name, (1, 2, 3))), expected)


def test_one_bit_gray_palette_and_cmyk(tmp_path):
    gray = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(gray).save(tmp_path / "l.png")
    np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / "l.png")), np.dstack([gray] * 3))
    Image.fromarray(gray > 127).save(tmp_path / "one.png")
    expected = np.dstack([np.where(gray > 127, 255, 0)] * 3)
    np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / "one.png")), expected)
    colours = gradient(8, 8)
    palette = Image.fromarray(colours).quantize(64)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / "p.png")), np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(colours).convert("CMYK")
    cmyk.save(tmp_path / "c.tiff")
    cmyk.save(tmp_path / "c.jpg", quality=100, subsampling=0)
    assert np.abs(np.asarray(keyframes.read(tmp_path / "c.tiff")).astype(int) - colours).max() <= 1
    assert np.abs(np.asarray(keyframes.read(tmp_path / "c.jpg")).astype(int) - colours).max() <= 8


def test_deep_gray_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    expected = np.dstack([np.arange(256).reshape(16, 16)] * 3)
    png16(tmp_path / "a.png", ramp.astype(np.uint16), colour_type=0)
    Image.fromarray(ramp.astype("<u2")).save(tmp_path / "a.tiff")
    Image.fromarray(ramp.astype(">u2")).save(tmp_path / "b.tiff")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "c.tiff")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "d.tiff")
    Image.fromarray((ramp / 257).astype(np.float32)).save(tmp_path / "e.tiff")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "f.tiff")
    Image.fromarray((ramp / 65535 * (2**31 - 1)).astype(np.int32)).save(tmp_path / "g.tiff")
    (tmp_path / "h.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    opened = {}
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as image:
            opened[path.name] = image.mode
        np.testing.assert_array_equal(np.asarray(keyframes.read(path)), expected, err_msg=path.name)
    assert set(opened.values()) == {"I;16", "I;16B", "I", "F"}, opened


def test_sixteen_bit_colour(tmp_path):
    colours = gradient(12, 12)
    png16(tmp_path / "rgb.png", colours.astype(np.uint16) * 257, colour_type=2)
    np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / "rgb.png")), colours)
    opaque = np.dstack([colours, np.full((12, 12), 255)]).astype(np.uint16) * 257
    png16(tmp_path / "rgba.png", opaque, colour_type=6)
    np.testing.assert_array_equal(np.asarray(keyframes.read(tmp_path / "rgba.png")), colours)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tiff", "png"])
def test_first_of_several_frames(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"several.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(keyframes.KeyframeWarning, match="first is used"):
        image = keyframes.read(path)
    assert image.getcolors() == [(64, (255, 0, 0))]


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "missing.png": "no such file",
        "": "a folder",
        "empty.png": "empty file",
        "text.png": "not an image",
        "nan.tiff": "NaN",
        "pipe.png": "not a regular file",
        "text.png/below.png": "cannot be reached",
        "nul\0.png": "cannot be reached",
        "long" * 100 + ".png": "cannot be reached",
    }.items():
        with pytest.raises(keyframes.KeyframeError, match=reason) as caught:
            keyframes.read(f"{tmp_path}/{name}")
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    assert issubclass(keyframes.KeyframeError, ValueError)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "avif"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its own remark before the error, for TIFF
def test_truncated_at_any_place_is_an_error(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.01, 0.1, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share) + 1])
        with pytest.raises(keyframes.KeyframeError, match=r"truncated|not an image") as caught:
            keyframes.read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "avif"])
@pytest.mark.filterwarnings("ignore::Warning:PIL")  # its own remarks on damaged EXIF data and large sizes
@pytest.mark.filterwarnings("ignore::wanjax.keyframes.KeyframeWarning")
def test_altered_bytes_give_an_image_or_a_keyframe_error(tmp_path, suffix):
    path = tmp_path / f"altered.{suffix}"
    Image.fromarray(gradient(32, 32)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(40):
        altered = whole.copy()
        altered[rng.integers(0, min(len(whole), 300), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(altered.tobytes())
        try:
            assert keyframes.read(path).mode == "RGB"
        except keyframes.KeyframeError:
            failures += 1
    assert failures > 0


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(keyframes.KeyframeError, match="too many pixels"):
        keyframes.read(tmp_path / "large.png")


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_fit_keeps_what_has_the_size(mode):
    pixels = gradient(32, 48)
    np.testing.assert_array_equal(keyframes.fit(Image.fromarray(pixels), 32, 48, mode), pixels)


@pytest.mark.parametrize("height,width", [(32, 48), (160, 96), (16, 16)])
def test_stretch_is_antialiased_bicubic(height, width):
    pixels = gradient(100, 90)
    ours = keyframes.fit(Image.fromarray(pixels), height, width).astype(np.float64)
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double()
    theirs = torch.nn.functional.interpolate(batch, (height, width), mode="bicubic", antialias=True)
    theirs = theirs[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(ours - theirs).max() <= 1.5  # two roundings to 8 bits, one for each axis


def test_crop_takes_the_centre_and_pad_keeps_everything():
    bands = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 32, axis=0)
    image = Image.fromarray(np.broadcast_to(bands[:, None], (96, 32, 3)).copy())
    np.testing.assert_array_equal(keyframes.fit(image, 32, 32, "crop"), np.asarray(image)[32:64])
    padded = keyframes.fit(image, 96, 96, "pad", (9, 8, 7))
    np.testing.assert_array_equal(padded[:, 32:64], np.asarray(image))
    assert (padded[:, :32] == (9, 8, 7)).all() and (padded[:, 64:] == (9, 8, 7)).all()
    assert keyframes.fit(Image.new("RGB", (1000, 1), (255, 255, 255)), 32, 32, "pad").max() == 255
    for mode in ("stretch", "crop", "pad"):
        assert keyframes.fit(image, 16, 80, mode).shape == (16, 80, 3)
    with pytest.raises(ValueError, match="stretch, crop or pad"):
        keyframes.fit(image, 32, 32, "squash")


@pytest.mark.parametrize("shape,size", [((60, 100), 224), ((480, 300), 224), ((32, 32), 32)])
def test_clip_input_against_transformers(shape, size):
    import transformers

    # transformers 5 renamed the Pillow processor, and gave the old name to one that needs torchvision.
    pillow_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    image = Image.fromarray(gradient(*shape))
    square = {"height": size, "width": size}
    processor = pillow_processor(size=square, do_center_crop=False, do_resize=True)
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = keyframes.clip_input(image, size)
    assert ours.dtype == np.float32 and ours.shape == (size, size, 3)
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) <= 1e-6


def test_units():
    values = np.arange(256, dtype=np.uint8)
    unit = keyframes.to_unit(values)
    assert unit.dtype == np.float32 and unit[0] == -1 and unit[255] == 1
    np.testing.assert_allclose(unit, (torch.from_numpy(values) / 255).sub(0.5).div(0.5), atol=2e-7)
    np.testing.assert_array_equal(keyframes.from_unit(unit), values)
    outside = np.array([-3, -1, 0.0039, 1, 9], np.float32)
    np.testing.assert_array_equal(keyframes.from_unit(outside), [0, 0, 128, 255, 255])


def test_area_size_against_the_formula():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(200, 3000, (500, 2)).tolist():
        for area in (480 * 832, 720 * 1280):
            sides = np.sqrt(area * (height / width)), np.sqrt(area / (height / width))
            if any(abs(side / 16 - round(side / 16)) < 1e-9 for side in sides):
                continue  # an exact multiple, where the float formula may lose one
            expected = tuple(int(side // 16 * 16) for side in sides)
            assert keyframes.area_size((height, width), area) == expected
    for height in range(16, 2000, 16):
        assert keyframes.area_size((height, 832), height * 832) == (height, 832)
    assert keyframes.area_size((720, 1280), 480 * 832) == (464, 832)
    assert keyframes.area_size((1, 5000), 32 * 32) == (16, 2256)


def test_check_size_names_the_nearest():
    settings.check_size(480, 864, 16)
    settings.check_size(32, 32, 8)
    for size, nearest in {
        (481, 864): "480x864",
        (480, 860): "480x864",
        (0, -5): "16x16",
        (8, 7): "16x16",
    }.items():
        with pytest.raises(ValueError, match=f"size {size[0]}x{size[1]}.* of 16; .*{nearest}$"):
            settings.check_size(*size, 16)


def test_check_frames_names_the_two_nearest():
    for frames in (5, 25, 33, 65, 81, 401):
        settings.check_frames(frames, 4)
    settings.check_frames(3, 2)
    for frames, nearest in {
        80: "77 and 81",
        26: "25 and 29",
        1: "5 and 9",
        0: "5 and 9",
        -7: "5 and 9",
    }.items():
        with pytest.raises(ValueError, match=f"frames {frames}: .*{nearest}$"):
            settings.check_frames(frames, 4)
