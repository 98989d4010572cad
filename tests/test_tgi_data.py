"""TGI-Bench read from a small tree, whole and broken in every way that a download can be."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import tgi_tree
from PIL import Image

from benchmarks.tgi.data import DataError, refuse, stretched
from benchmarks.tgi.tgi_bench import canonical, tgi_bench
from benchmarks.tiny.challenges import CATEGORIES, challenge


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tgi_tree.build(tmp_path_factory.mktemp("tgi"))


@pytest.fixture
def tree(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "tgi")


def frame(tree, clip, index, suffix=".jpg"):
    return tree / "TGI-Dataset" / tgi_tree.name(clip) / f"{index:05d}{suffix}"


def refused(tree, *wanted, length=25):
    """The message, which holds all of `wanted`."""
    with pytest.raises(DataError) as caught:
        tgi_bench(tree, length)
    for text in wanted:
        assert text in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [25, 33])
def test_a_whole_tree(whole, length):
    data = tgi_bench(whole, length)
    assert data.name == "tgi-bench" and data.length == length
    assert [item.id for item in data.items] == [tgi_tree.name(number) for number in range(8)]
    assert [item.challenge for item in data.items] == [*CATEGORIES, "large motion", "camera shake"]
    for number, item in enumerate(data.items):
        drawn = challenge(number, "dev", 33)
        assert item.caption == drawn.caption and item.length == length and item.extra == {}
        assert item.first_image_desc == drawn.story.first_image_desc
        assert item.last_image_desc == drawn.story.last_image_desc
        read = item.read()
        assert read.dtype == np.uint8 and read.shape == (length, 32, 32, 3)
        assert np.abs(read.astype(int) - drawn.video[:length]).mean() < 4
        np.testing.assert_array_equal(read[3], np.asarray(Image.open(frame(whole, number, 3))))


def test_frames_are_stretched_as_keyframes_are(whole):
    item = tgi_bench(str(whole), 25).items[2]
    fitted = stretched(item.read(), (48, 16))
    assert fitted.dtype == np.uint8 and fitted.shape == (25, 48, 16, 3)
    wanted = Image.fromarray(item.read()[4]).resize((16, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(fitted[4], np.asarray(wanted))
    np.testing.assert_array_equal(stretched(item.read(), (32, 32)), item.read())


def test_items_can_be_sent_to_another_process(whole):
    item = tgi_bench(whole, 25).items[0]
    again = pickle.loads(pickle.dumps(item))
    assert again == item and hash(again) == hash(item)
    np.testing.assert_array_equal(again.read(), item.read())


def test_identity_is_json_and_does_not_name_the_place(whole, tree):
    identity = tgi_bench(whole, 25).identity
    assert identity == tgi_bench(tree, 25).identity
    assert json.loads(json.dumps(identity)) == identity
    assert {name: identity[name] for name in ("name", "source", "length")} == {
        "name": "tgi-bench", "source": "tgi-bench", "length": 25}  # fmt: skip
    assert identity["ids"] == [tgi_tree.name(number) for number in range(8)] and len(identity["sha256"]) == 64
    assert tgi_bench(whole, 33).identity["sha256"] != identity["sha256"]


def test_identity_changes_with_captions_and_frame_files(tree):
    seen = {tgi_bench(tree, 25).identity["sha256"]}
    tgi_tree.edit(tree, lambda entries: entries[3].update(caption="something else"))
    seen.add(tgi_bench(tree, 25).identity["sha256"])
    with frame(tree, 3, 10).open("ab") as file:
        file.write(b"\0")
    seen.add(tgi_bench(tree, 25).identity["sha256"])
    assert len(seen) == 3
    frame(tree, 3, 30).unlink()  # beyond the length
    assert tgi_bench(tree, 25).identity["sha256"] in seen


def test_captions_within_the_data_set(tree):
    expected = tgi_bench(tree, 25)
    for length in (25, 33):
        path = tgi_tree.captions(tree, length)
        path.rename(tree / "TGI-Dataset" / path.name)
    assert tgi_bench(tree, 25) == expected


def test_unknown_fields_are_kept(tree):
    tgi_tree.edit(tree, lambda entries: entries[1].update(source="DAVIS", fps=24))
    items = tgi_bench(tree, 25).items
    assert items[1].extra == {"source": "DAVIS", "fps": 24} and items[0].extra == {}


def test_other_files_and_a_byte_order_mark_do_no_harm(tree):
    (frame(tree, 0, 0).parent / "thumbs.db").touch()
    (frame(tree, 0, 0).parent / "00099.jpg").mkdir()
    path = tgi_tree.captions(tree)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(tgi_bench(tree, 25).items) == 8


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".JPG"])
def test_frames_of_other_kinds(tree, suffix):
    expected = tgi_bench(tree, 25).items[0].read()
    for index in range(33):
        path = frame(tree, 0, index)
        if suffix == ".png":
            Image.open(path).save(path.with_suffix(".png"))
            path.unlink()
        else:
            path.rename(path.with_suffix(suffix))
    np.testing.assert_array_equal(tgi_bench(tree, 25).items[0].read(), expected)


def test_frames_turned_by_exif_come_upright(tree):
    turned = Image.Exif()
    turned[0x0112] = 6
    for index in range(33):
        path = frame(tree, 0, index)
        # Every other frame is stored lying on its side.
        if index % 2:
            Image.new("RGB", (32, 16), "red").save(path, exif=turned)
        else:
            Image.new("RGB", (16, 32), "red").save(path)
    for length in (25, 33):
        assert tgi_bench(tree, length).items[0].read().shape == (length, 32, 16, 3)
    tgi_tree.captions(tree, 33).rename(tgi_tree.captions(tree, 32))  # the last frame is a turned one
    assert tgi_bench(tree, 32).items[0].read().shape == (32, 32, 16, 3)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("Dynamic-Motion", "large motion"),
        ("dynamic", "large motion"),
        (" LARGE ", "large motion"),
        ("LargeMotion", "large motion"),
        ("linear_motion", "linear motion"),
        ("Linear", "linear motion"),
        ("Occluded", "occlusion"),
        ("static", "near-static"),
        ("Near Static", "near-static"),
        ("near_static", "near-static"),
        ("appearance_change", "appearance change"),
        ("scene-change", "scene transition"),
        ("SCENE  TRANSITION", "scene transition"),
        (" Camera-Shake", "camera-shake"),
        ("", ""),
    ],
)
def test_categories(name, wanted):
    assert canonical(name) == wanted


def test_categories_are_those_of_the_procedural_clips():
    assert [canonical(name.upper()) for name in CATEGORIES] == list(CATEGORIES)


def test_not_the_folder(tree, tmp_path):
    refused(tmp_path, str(tmp_path), "no folder TGI-Dataset")
    refused(tmp_path / "nowhere", "no folder TGI-Dataset")
    refused(tree / "TGI-Dataset", "no folder TGI-Dataset", "unpacked into")


def test_length_without_captions(tree):
    refused(tree, "no captions for 81 frames", "25, 33", length=81)
    for length in (25, 33):
        tgi_tree.captions(tree, length).unlink()
    refused(tree, "no <length>_dataset_caption.json")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ('[{"folder": ', "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"clips": []}', "holds dict, not a list"),
        ("[]", "empty list"),
    ],
)
def test_broken_json(tree, text, wanted):
    tgi_tree.captions(tree).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(tree, "25_dataset_caption.json", wanted)
    assert "\n" not in message


def test_json_that_cannot_be_opened(tree):
    path = tgi_tree.captions(tree)
    path.unlink()
    path.mkdir()
    refused(tree, "25_dataset_caption.json", "cannot be read")


def test_missing_fields(tree):
    tgi_tree.edit(tree, lambda entries: (entries[2].pop("caption"), entries[2].update(challenge=3)))
    message = refused(tree, "clip 2 (folder 'clip_02')", "no text under challenge, caption")
    assert "\n" not in message
    tgi_tree.edit(tree, lambda entries: entries.__setitem__(4, "clip_04"))
    refused(tree, "2 problems", "clip 4 (folder None)", "no text under folder, first_image_desc")


@pytest.mark.parametrize("name", ["../clip_00", "a/b", "", ".", "..", "C:\\x", " clip", "clip ", "a\0b", ".hidden"])
def test_folders_that_are_no_names(tree, name):
    tgi_tree.edit(tree, lambda entries: entries[5].update(folder=name))
    refused(tree, "clip 5", repr(name), "not the name of a folder")


def test_folder_named_twice(tree):
    tgi_tree.edit(tree, lambda entries: entries.append(entries[1]))
    refused(tree, "'clip_01' is named 2 times")


def test_missing_folder(tree):
    shutil.rmtree(frame(tree, 6, 0).parent)
    refused(tree, "folder clip_06", "No such file")
    frame(tree, 6, 0).parent.write_text("a file")
    refused(tree, "folder clip_06", "Not a directory")


def test_short_and_gapped_folders(tree):
    for index in range(20, 33):
        frame(tree, 1, index).unlink()
    frame(tree, 2, 3).unlink()
    frame(tree, 3, 0).unlink()
    frame(tree, 3, 7).unlink()
    frame(tree, 4, 29).unlink()
    refused(tree, "3 problems", "folder clip_01: 20 frames, 25 are needed", "folder clip_02: 00003.jpg is missing",
            "folder clip_03: 00000.jpg and 1 more are missing")  # fmt: skip
    refused(tree, "4 problems", "folder clip_04: 00029.jpg is missing", length=33)


def test_folder_without_frames_or_with_two_kinds(tree):
    for index in range(33):
        frame(tree, 0, index).unlink()
    Image.new("RGB", (32, 32)).save(frame(tree, 1, 3, ".png"))
    refused(tree, "folder clip_00: holds no 00000.jpg", "folder clip_01: holds both .jpg and .png frames")


def test_empty_and_unreadable_frames(tree):
    frame(tree, 0, 12).write_bytes(b"")
    frame(tree, 1, 24).write_bytes(b"no image")
    frame(tree, 2, 0).write_bytes(frame(tree, 2, 0).read_bytes()[:20])
    refused(tree, "folder clip_00: 00012.jpg is empty", "folder clip_01: 00024.jpg is no readable image",
            "folder clip_02: 00000.jpg is no readable image")  # fmt: skip


def test_other_sizes_at_the_end_are_found_at_once(tree):
    Image.new("RGB", (48, 32)).save(frame(tree, 5, 24))
    refused(tree, "folder clip_05: 00024.jpg is 32x48, 00000.jpg 32x32")
    assert len(tgi_bench(tree, 33).items) == 8  # there it lies in between


def test_what_only_reading_tells(tree):
    Image.new("RGB", (48, 32)).save(frame(tree, 5, 11))
    damaged = frame(tree, 6, 4)
    damaged.write_bytes(damaged.read_bytes()[:400])
    items = tgi_bench(tree, 25).items
    with pytest.raises(DataError, match=r"folder clip_05: 00011\.jpg is 32x48, 00000\.jpg 32x32"):
        items[5].read()
    with pytest.raises(DataError, match=r"folder clip_06: .*00004\.jpg: truncated"):
        stretched(items[6].read(), (32, 32))
    os.remove(frame(tree, 7, 2))
    with pytest.raises(DataError, match=r"folder clip_07: .*00002\.jpg: no such file"):
        items[7].read()


def test_all_problems_of_fields_and_folders_come_together(tree):
    tgi_tree.edit(tree, lambda entries: (entries[0].pop("caption"), entries.append(dict(entries[1], folder="gone"))))
    frame(tree, 0, 5).unlink()
    frame(tree, 4, 5).unlink()
    message = refused(tree, "4 problems:", "clip 0", "folder gone", "folder clip_00: 00005.jpg", "folder clip_04")
    assert len(message.splitlines()) == 5


def test_ten_problems_are_named_and_the_rest_counted():
    refuse([])
    with pytest.raises(DataError) as caught:
        refuse([f"problem {number}" for number in range(13)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "13 problems:" and lines[10] == "problem 9" and lines[11:] == ["and 3 more"]
    with pytest.raises(DataError, match=r"\Aone\Z"):
        refuse(["one"])
