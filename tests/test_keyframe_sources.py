"""Keyframes out of tagged pictures, videos, Python objects and every kind of path."""

import io
import os
import struct
import warnings
from pathlib import Path

import icc
import imageio.v3 as iio
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from samplers import video
from wanjax import keyframes
from wanjax.keyframes import KeyframeError, KeyframeWarning

COLOURS = np.array([[[200, 80, 60], [60, 120, 220], [255, 255, 255], [0, 0, 0]]], np.uint8).repeat(4, axis=0)
# The first two are given by the W3C's and Apple's conversions; white and black stay.
IN_SRGB = np.array([[[216, 69, 50], [30, 122, 227], [255, 255, 255], [0, 0, 0]]], np.uint8).repeat(4, axis=0)


def seen(path, matte=(0, 0, 0)) -> np.ndarray:
    """What `read` gives, as integers; any warning is an error."""
    return np.asarray(keyframes.read(path, matte)).astype(int)


# Colour profiles


@pytest.mark.parametrize(
    "name,options",
    [
        ("a.png", {}),
        ("a.jpg", {"quality": 100, "subsampling": 0}),
        ("a.tiff", {}),
        ("a.webp", {"lossless": True}),
        ("a.avif", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_display_p3_becomes_srgb(tmp_path, name, options):
    wide = COLOURS.repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(wide).save(tmp_path / name, icc_profile=icc.rgb(), **options)
    lossy = name in ("a.jpg", "a.avif")
    error = np.abs(seen(tmp_path / name) - IN_SRGB.repeat(8, axis=0).repeat(8, axis=1))
    assert error[4::8, 4::8].max() <= ({"a.jpg": 4, "a.avif": 6}.get(name, 1))
    Image.fromarray(wide).save(tmp_path / name, **options)  # without the profile nothing moves
    assert np.abs(seen(tmp_path / name)[4::8, 4::8] - COLOURS).max() <= (2 if lossy else 0)


def test_linear_rgb_becomes_srgb(tmp_path):
    """As renderers write it: read as sRGB it is far too dark."""
    matrix = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=icc.rgb(matrix, icc.gamma(1.0)))
    assert np.abs(seen(tmp_path / "a.png") - srgb_of_linear(pixels)).max() <= 1


def test_profile_of_palettes_gray_and_transparency(tmp_path):
    Image.fromarray(COLOURS).quantize(4).save(tmp_path / "p.png", icc_profile=icc.rgb())
    assert np.abs(seen(tmp_path / "p.png") - IN_SRGB).max() <= 1
    alpha = np.array([[255, 0, 128, 255]], np.uint8).repeat(4, axis=0)
    Image.fromarray(np.dstack([COLOURS, alpha])).save(tmp_path / "rgba.png", icc_profile=icc.rgb())
    matte = np.array([10, 200, 30])
    expected = IN_SRGB * (alpha[..., None] / 255) + matte * (1 - alpha[..., None] / 255)
    assert np.abs(seen(tmp_path / "rgba.png", tuple(matte)) - expected).max() <= 1.5
    Image.fromarray(COLOURS).save(tmp_path / "key.png", icc_profile=icc.rgb(), transparency=(60, 120, 220))
    expected = IN_SRGB.copy()
    expected[:, 1] = matte
    assert np.abs(seen(tmp_path / "key.png", tuple(matte)) - expected).max() <= 1
    # Gray under a profile of RGB: the three channels alike, which P3 keeps.
    gray = np.array([[0, 60, 128, 255]], np.uint8)
    Image.fromarray(gray).save(tmp_path / "l.png", icc_profile=icc.rgb())
    assert np.abs(seen(tmp_path / "l.png") - gray[..., None]).max() <= 1


def srgb_of_linear(values: np.ndarray) -> np.ndarray:
    linear = values / 255.0
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["L", "LA", "key", "I;16", "I", "F"])
def test_profile_of_gray(tmp_path, mode):
    """Linear light, where reading as sRGB is far too dark: 55 levels in the middle."""
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path, options, expected = tmp_path / "gray.png", {}, srgb_of_linear(gray)[..., None].repeat(3, -1)
    if mode == "LA":
        picture = Image.fromarray(np.dstack([gray, np.full_like(gray, 255)]), mode="LA")
    elif mode == "key":
        picture, options = Image.fromarray(gray), {"transparency": 100}
        expected[gray == 100] = (1, 2, 3)
    elif mode == "I;16":
        picture = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        path = tmp_path / "gray.tiff"
        picture = Image.fromarray(gray.astype(np.int32) * 257 if mode == "I" else (gray / 255).astype(np.float32))
    else:
        picture = Image.fromarray(gray)
    picture.save(path, icc_profile=icc.gray(icc.gamma(1.0)), **options)
    assert np.abs(seen(path, (1, 2, 3)) - expected).max() <= 1


def test_deep_gray_is_smooth_under_a_profile(tmp_path):
    """16 bits are not cut to 8 before the curve: in dark linear light one level of 8 bits is 13 of sRGB."""
    values = np.arange(0, 2570, 10, dtype=np.uint16).reshape(1, -1)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=icc.gray(icc.gamma(1.0)))
    found = seen(tmp_path / "a.png")[0, :, 0]
    assert np.abs(np.diff(found)).max() <= 2 and len(np.unique(found)) > 45
    assert np.abs(found - srgb_of_linear(values[0] / 257)).max() <= 2


def corner_lab(c, m, y, k):
    """Inks of a mild press, within sRGB."""
    return (
        (96 - 25 * c - 22 * m - 6 * y) * (1 - 0.7 * k) + 2,
        (-18 * c + 22 * m) * (1 - k),
        (-20 * c + 28 * y) * (1 - k),
    )


@pytest.mark.parametrize("name", ["a.tiff", "a.jpg"])
def test_profile_of_cmyk(tmp_path, name):
    inks = np.array([[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])
    picture = Image.fromarray((inks * 255).astype(np.uint8).reshape(4, 4, 4).repeat(8, 0).repeat(8, 1), mode="CMYK")
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    picture.save(tmp_path / name, icc_profile=icc.cmyk(corner_lab), **options)
    found = seen(tmp_path / name)[4::8, 4::8].reshape(16, 3)
    # Paper comes out white and the darkest ink black: relative colorimetric, with black point compensation.
    lab = np.array([corner_lab(*ink) for ink in inks])
    y_of = lambda lightness: ((lightness + 16) / 116) ** 3  # noqa: E731
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(icc.cmyk(corner_lab))), ImageCms.createProfile("sRGB"),
        "CMYK", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION)  # fmt: skip
    theirs = np.asarray(ImageCms.applyTransform(picture, transform))[4::8, 4::8].reshape(16, 3)
    assert np.abs(found - theirs).max() <= (2 if name == "a.jpg" else 0)
    black = y_of(lab[:, 0].min())
    scaled = [(116 * np.cbrt((y_of(one[0]) - black) / (1 - black)) - 16, one[1], one[2]) for one in lab]
    bright = lab[:, 0] > 60
    expected = np.array([icc.lab_to_srgb(*one) for one in scaled])
    assert np.abs(found - expected)[bright].max() <= 6 and bright.sum() >= 4
    picture.save(tmp_path / name, **options)
    naive = np.asarray(picture.convert("RGB"))[4::8, 4::8].reshape(16, 3).astype(int)
    assert np.abs(seen(tmp_path / name)[4::8, 4::8].reshape(16, 3) - naive).max() <= (3 if name == "a.jpg" else 0)
    assert np.abs(found - naive).max() > 60


def test_srgb_profiles_change_no_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    matrix = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    for profile in (srgb, icc.rgb(matrix)):
        Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_array_equal(seen(tmp_path / "a.png"), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "l.png", icc_profile=icc.gray(icc.SRGB_CURVE))
    np.testing.assert_array_equal(seen(tmp_path / "l.png"), np.dstack([pixels[..., 0]] * 3))


@pytest.mark.parametrize(
    "kind", ["noise", "cut", "empty tags", "other mode", "gray for colour", "colour for deep gray", "space unknown"]
)
def test_profiles_that_cannot_be_used_are_told(tmp_path, kind):
    picture, profile = Image.fromarray(COLOURS), icc.rgb()
    if kind == "noise":
        profile = b"not a profile" * 20
    elif kind == "cut":
        profile = profile[:200]
    elif kind == "empty tags":
        profile = icc.profile("RGB ", {})
    elif kind == "other mode":
        profile = icc.cmyk(corner_lab)
    elif kind == "gray for colour":
        profile = icc.gray(icc.gamma(1.0))
    elif kind == "colour for deep gray":
        picture = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257)
    else:
        profile = icc.profile("HSV ", {})
    picture.save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(KeyframeWarning, match="colour profile cannot be used.*taken for sRGB") as caught:
        found = seen(tmp_path / "a.png")
    expected = COLOURS if kind != "colour for deep gray" else np.dstack([COLOURS[..., 0]] * 3)
    np.testing.assert_array_equal(found, expected)
    assert str(caught[0].message).startswith(str(tmp_path / "a.png")) and "\n" not in str(caught[0].message)


# Frames of videos and animations


def clip(count: int = 12) -> np.ndarray:
    """Frames of one gray each, in a colour cast, uint8 [T, 32, 48, 3]."""
    shades = np.arange(count, dtype=np.uint8)[:, None] * 18 + np.array([10, 20, 30], np.uint8)
    return np.broadcast_to(shades[:, None, None], (count, 32, 48, 3)).copy()


@pytest.mark.parametrize(
    "suffix,error", [(".mp4", 3), pytest.param(".webm", 3, marks=pytest.mark.slow), (".gif", 0), (".webp", 0)]
)
def test_frame_by_number(tmp_path, suffix, error):
    frames, path = clip(), tmp_path / f"clip{suffix}"
    video.write(path, frames, 8)
    for index in (0, 3, -1, -12):
        assert np.abs(seen(f"{path}@{index}") - frames[index]).max() <= error, index
    for index in (12, -13):
        with pytest.raises(
            KeyframeError, match=f"@{index}: no such frame; the file holds 12: give 0 to 11, or -12 to -1"
        ):
            keyframes.read(f"{path}@{index}")


@pytest.mark.parametrize("suffix", ["mov", "mkv", "avi"])
def test_other_containers(tmp_path, suffix):
    frames = clip()
    codec = "mpeg4" if suffix == "avi" else "libx264"
    iio.imwrite(tmp_path / f"a.{suffix}", frames, plugin="pyav", codec=codec, fps=8)
    assert np.abs(seen(tmp_path / f"a.{suffix}@-1") - frames[-1]).max() <= 8


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_telephone_videos_come_upright(tmp_path, turns):
    """The matrix in a track's header turns the picture clockwise by quarters (ISO/IEC 14496-12)."""
    frames = clip()
    frames[:, :16, :24] = (200, 30, 30)
    video.write(tmp_path / "a.mp4", frames, 8)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    at = content.index(b"tkhd") + 44
    cosine, sine = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    matrix = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    content[at : at + 36] = struct.pack(">9i", *matrix)
    (tmp_path / "a.mp4").write_bytes(content)
    expected = np.rot90(frames[2], -turns)
    found = seen(tmp_path / "a.mp4@2")
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 3


def test_frames_of_images(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "one.png")
    for index in (0, -1):
        np.testing.assert_array_equal(seen(tmp_path / f"one.png@{index}"), COLOURS)
    with pytest.raises(KeyframeError, match=r"one.png@1: no such frame; the file holds 1: give 0 or -1$"):
        keyframes.read(tmp_path / "one.png@1")
    pages = [Image.new("L", (8, 8), shade) for shade in (10, 20, 30)]
    for suffix in ("tiff", "png"):
        pages[0].save(tmp_path / f"pages.{suffix}", save_all=True, append_images=pages[1:])
        assert [seen(tmp_path / f"pages.{suffix}@{index}")[0, 0, 0] for index in (0, 1, -1)] == [10, 20, 30]
    alpha = [Image.new("RGBA", (8, 8), (200, 0, 0, level)) for level in (255, 0)]
    alpha[0].save(tmp_path / "a.webp", save_all=True, append_images=alpha[1:], lossless=True)
    assert seen(tmp_path / "a.webp@1", (1, 2, 3))[0, 0].tolist() == [1, 2, 3]


def test_names_with_an_at_sign(tmp_path):
    for name, shade in {"a@2.png": 10, "photo@2x.png": 20, "a.png@1": 30, "@3.png": 40, "a@b@-1.png": 50}.items():
        Image.new("L", (4, 4), shade).save(tmp_path / name, format="png")
        assert seen(tmp_path / name)[0, 0, 0] == shade
    (tmp_path / "folder@1").mkdir()
    Image.new("L", (4, 4), 60).save(tmp_path / "folder@1" / "x.png")
    assert seen(tmp_path / "folder@1" / "x.png@0")[0, 0, 0] == 60
    assert seen(tmp_path / "a@2.png@-1")[0, 0, 0] == 10
    assert keyframes.split(tmp_path / "a@2.png") == (tmp_path / "a@2.png", None)
    assert keyframes.split(f"{tmp_path}/a@2.png@-1") == (tmp_path / "a@2.png", -1)
    assert keyframes.split(f"{tmp_path}/none.mp4@7") == (tmp_path / "none.mp4", 7)
    with pytest.raises(KeyframeError, match="none.mp4: no such file"):
        keyframes.read(tmp_path / "none.mp4@7")
    with pytest.raises(KeyframeError, match="no such file"):
        keyframes.read(tmp_path / "@3")


def test_videos_that_name_no_frame_or_hold_none(tmp_path):
    video.write(tmp_path / "clip.mp4", clip(), 8)
    with pytest.raises(KeyframeError, match=r"a video; name one of its frames, such as clip.mp4@0 or, the last, clip"):
        keyframes.read(tmp_path / "clip.mp4")
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "noise.mp4").write_bytes(b"\x13" * 500)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "head.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    for name in ("noise.mp4@0", "text.txt@-1", "head.mp4@11", "empty.mp4@0", "@0"):
        with pytest.raises(KeyframeError) as caught:
            keyframes.read(f"{tmp_path}/{name}")
        assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    with pytest.raises(KeyframeError, match="not an image"):
        keyframes.read(tmp_path / "text.txt")


# What Python programs hold


def test_image_takes_what_programs_hold(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    video.write(tmp_path / "a.gif", np.stack([COLOURS, COLOURS[::-1]]), 8)
    held = {
        "str": str(tmp_path / "a.png"),
        "Path": tmp_path / "a.png",
        "frame": f"{tmp_path}/a.gif@0",
        "Pillow": Image.fromarray(COLOURS),
        "lazy Pillow": Image.open(tmp_path / "a.png"),
        "NumPy": COLOURS,
        "strided": np.ascontiguousarray(COLOURS[:, ::-1])[:, ::-1],
        "JAX": jnp.asarray(COLOURS),
        "torch": torch.from_numpy(COLOURS),
    }
    for name, source in held.items():
        picture = keyframes.image(source)
        assert isinstance(picture, Image.Image) and picture.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(picture), COLOURS, err_msg=name)


def test_pillow_images_are_treated_as_their_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (8, 12, 4), np.uint8))
    picture.save(tmp_path / "a.png", exif=exif, icc_profile=icc.rgb())
    with Image.open(tmp_path / "a.png") as opened:
        ours = np.asarray(keyframes.image(opened, (9, 8, 7)))
    np.testing.assert_array_equal(ours, seen(tmp_path / "a.png", (9, 8, 7)))
    assert ours.shape == (12, 8, 3)


class Lazy:
    """An array of another library that cannot be read from here."""

    shape, dtype = (4, 4, 3), np.dtype(np.uint8)

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("on another device\nlong story")


@pytest.mark.parametrize(
    "source,reason",
    [
        (None, "NoneType; give a path, a Pillow image or a uint8 array"),
        (b"a.png", "bytes; give"),
        (3, "int; give"),
        ([1, 2], "list; give"),
        ([COLOURS], "list; give"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\): holds no pixels"),
        (jnp.zeros((4, 0, 3), jnp.uint8), "holds no pixels"),
        (np.zeros((4, 4), np.uint8), "not .H, W, 3.; gray: give it three times"),
        (np.zeros((4, 4, 1), np.uint8), "gray: give it three times"),
        (np.zeros((4, 4, 4), np.uint8), r"with alpha: give Image.fromarray"),
        (np.zeros((3, 8, 8), np.uint8), r"channels last: give array.transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"give one image, array\[0\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "not .H, W, 3."),
        (np.zeros((), np.uint8), "not .H, W, 3."),
        (np.zeros((4, 4, 3), np.float32), r"float32 .*not uint8; give np.rint\(array \* 255\)"),
        (jnp.zeros((4, 4, 3), jnp.bfloat16), "bfloat16 .*not uint8; give np.rint"),
        (torch.zeros((4, 4, 3)), "not uint8; give np.rint"),
        (np.zeros((4, 4, 3), np.int64), r"int64 .*not uint8; give array.astype\(np.uint8\)"),
        (np.zeros((4, 4, 3), bool), "not uint8"),
        (torch.zeros((4, 4, 3), requires_grad=True), "cannot be read .*give a NumPy array"),
        (Lazy(), r"cannot be read \(on another device\)"),
        (Image.new("RGB", (0, 5)), "5x0 pixels; give an image that has some"),
    ],
)
def test_what_is_no_keyframe_is_named(source, reason):
    with pytest.raises(KeyframeError, match=f"^first keyframe: .*{reason}") as caught:
        keyframes.image(source, name="first keyframe")
    assert "\n" not in str(caught.value)


# Paths


def test_every_kind_of_path(tmp_path, monkeypatch):
    place = tmp_path / "a b" / "ü圆"
    place.mkdir(parents=True)
    Image.fromarray(COLOURS).save(place / "bild 1.png")
    video.write(place / "clip.gif", np.stack([COLOURS, COLOURS[:, ::-1]]), 8)
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    (tmp_path / "link.png").symlink_to(place / "bild 1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(place)
    for path in (
        "bild 1.png",
        "./bild 1.png",
        "../ü圆/bild 1.png",
        "~/a b/ü圆/bild 1.png",
        "~/link.png",
        "../../link/bild 1.png",
        "../../link/../ü圆/bild 1.png",
        Path("bild 1.png"),
        "~/link/clip.gif@0",
        "clip.gif@-2",
    ):
        np.testing.assert_array_equal(seen(path), COLOURS, err_msg=str(path))
    with pytest.raises(KeyframeError, match=f"{place / 'none.png'}: no such file"):
        keyframes.read("none.png")


# Filters


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(32, 48), (160, 96)])
def test_filters_are_pillows(resample, size):
    from diffusers.video_processor import VideoProcessor

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8))
    ours = keyframes.fit(picture, *size, resample=resample)
    theirs = VideoProcessor(vae_scale_factor=8, resample=resample).preprocess(picture, *size)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(ours, np.rint((theirs.numpy() + 1) * 127.5).astype(np.uint8))
    for mode in ("crop", "pad"):
        other = {"bicubic": "lanczos", "lanczos": "bicubic"}[resample]
        assert (keyframes.fit(picture, *size, mode, resample=resample)
                != keyframes.fit(picture, *size, mode, resample=other)).any()  # fmt: skip
    with pytest.raises(ValueError, match="resample 'nearest': choose bicubic, lanczos"):
        keyframes.fit(picture, *size, resample="nearest")
    with pytest.raises(ValueError, match="resample"):
        keyframes.clip_input(picture, resample="box")


@pytest.mark.parametrize("shape", [(60, 100), (480, 300), (32, 32), (225, 224), (224, 1000), (7, 31), (333, 334)])
@pytest.mark.parametrize("size", [224, 32])
def test_cropped_clip_input_against_transformers(shape, size):
    import transformers

    # transformers 5 renamed the Pillow processor, and gave the old name to one that needs torchvision.
    pillow_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    theirs = pillow_processor(**({} if size == 224 else sides))(picture, return_tensors="np")["pixel_values"][0]
    ours = keyframes.clip_input(picture, size, fit="crop")
    assert ours.dtype == np.float32 and ours.shape == (size, size, 3)
    assert np.abs(ours - theirs.transpose(1, 2, 0)).max() <= 1e-6
    with pytest.raises(ValueError, match="CLIP fit 'pad': choose stretch or crop"):
        keyframes.clip_input(picture, size, fit="pad")


def test_nothing_warns_about_plain_files(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keyframes.read(os.fspath(tmp_path / "a.png"))
