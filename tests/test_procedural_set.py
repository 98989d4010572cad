"""The procedural sets: drawn, compared with the frozen manifest, the same on every machine that can be tried."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tgi import freeze
from benchmarks.tgi.data import DataError, stretched
from benchmarks.tgi.procedural import CLIPS, LENGTHS, MANIFEST, draw, procedural
from benchmarks.tiny.challenges import backwards, challenge

ROOT = Path(__file__).parents[1]
# A new manifest must not slip in unseen: who freezes another test set changes these too.
PINNED = {
    (25, 0): "2c9077e310460f87",
    (25, 3): "24ae6f931a4af464",
    (33, 1): "0d9511e7798b5bab",
    (65, 4): "4fc45c76ccd622a5",
    (81, 143): "eb73448958c0fcc2",
}


@pytest.fixture(scope="module")
def told():
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def refused(*wanted, **arguments):
    with pytest.raises(DataError) as caught:
        procedural(**arguments)
    for text in wanted:
        assert text in str(caught.value), str(caught.value)


def test_the_manifest_is_whole_and_small(told):
    assert MANIFEST.stat().st_size < 150_000
    assert len(told["captions"]) == CLIPS and tuple(map(int, told["hashes"])) == LENGTHS
    for hashes in told["hashes"].values():
        assert len(set(hashes)) == CLIPS and all(len(one) == 16 for one in hashes)


def test_some_hashes_stay_as_they_are(told):
    assert {key: told["hashes"][str(key[0])][key[1]] for key in PINNED} == PINNED


@pytest.mark.parametrize("length", LENGTHS)
def test_the_test_set_is_the_frozen_one(told, length):
    data = procedural("test", length)
    assert data.name == "procedural-test" and data.length == length and len(data.items) == CLIPS
    assert [item.caption for item in data.items] == told["captions"]
    assert set(Counter(item.challenge for item in data.items).values()) == {24}


def test_items_hold_the_clips():
    for seed, item in enumerate(procedural("test", 33, 12).items):
        drawn = challenge(seed, "test", 33)
        assert item.id == f"test-{seed:05d}" and item.length == 33
        assert item.extra == {"ambiguous": drawn.ambiguous, "seed": seed}
        assert (item.challenge, item.caption) == (drawn.category, drawn.caption)
        assert item.backwards == backwards(drawn.story).caption
        assert item.first_image_desc == drawn.story.first_image_desc
        assert item.last_image_desc == drawn.story.last_image_desc
        np.testing.assert_array_equal(item.read(), drawn.video)
    assert stretched(item.read(), (48, 64)).shape == (33, 48, 64, 3)


def test_dev_takes_any_length_count_and_size():
    data = procedural("dev", 9, 7, 48)
    assert data.name == "procedural-dev" and data.items[6].id == "dev-00006"
    assert data.items[0].read().shape == (9, 48, 48, 3)
    assert len(procedural("dev", 2, 200, 16).items) == 200


def test_identity():
    data = procedural("dev", 9, 6)
    assert json.loads(json.dumps(data.identity)) == data.identity
    assert data.identity["ids"][0] == "dev-00000" and data.identity["split"] == "dev" and data.identity["size"] == 32
    others = [procedural("dev", 9, 6), procedural("dev", 9, 12), procedural("dev", 13, 6), procedural("dev", 9, 6, 48)]
    assert [other.identity == data.identity for other in others] == [True, False, False, False]
    assert len({other.identity["sha256"] for other in others}) == 4


def test_the_test_set_at_another_size_is_compared_at_its_own(tmp_path, told):
    assert procedural("test", 25, 6, 64).items[0].read().shape == (25, 64, 64, 3)
    hashes = told["hashes"]["25"]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(told | {"hashes": {"25": [*hashes[:2], "0" * 16, *hashes[3:]]}}))
    refused("test-00002", split="test", length=25, count=6, size=64, manifest=path)


def test_another_generator_is_refused(tmp_path, told):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(told | {"hashes": told["hashes"] | {"25": ["f" * 16] + told["hashes"]["25"][1:]}}))
    refused("1 of 12 clips", "test-00000 first", "all captions agree", "generator changed", "restore",
            split="test", length=25, count=12, manifest=path)  # fmt: skip
    procedural("test", 33, 12, manifest=path)
    path.write_text(json.dumps(told | {"captions": told["captions"][:5] + ["another"] + told["captions"][6:]}))
    refused("test-00005 first", "1 captions differ", split="test", length=25, count=12, manifest=path)
    procedural("test", 25, 5, manifest=path)


@pytest.mark.parametrize(
    "text, wanted",
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "no manifest of 6 clips of 25 frames"),
        ('{"captions": [], "hashes": {}}', "no manifest of 6 clips of 25 frames"),
        ('{"captions": [], "hashes": {"25": ["00"]}}', "no manifest of 6 clips of 25 frames"),
        ('{"captions": {}, "hashes": {"25": 3}}', "no manifest of 6 clips of 25 frames"),
    ],
)
def test_no_manifest(tmp_path, text, wanted):
    path = tmp_path / "manifest.json"
    if text is not None:
        path.write_text(text)
    refused(str(path), wanted, split="test", length=25, count=6, manifest=path)


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ({"split": "train"}, "split 'train': choose dev or test"),
        ({"split": "heldout"}, "split 'heldout'"),
        ({"length": 1}, "frames is 1"),
        ({"size": 8}, "size is 8"),
        ({"count": 0}, "count 0"),
        ({"split": "test", "length": 49}, "length 49: the test set is frozen for 25, 33, 65, 81"),
        ({"split": "test", "count": 145}, "count 145: the test set has 144 clips"),
    ],
)
def test_bad_arguments(arguments, wanted):
    refused(wanted, **({"split": "dev", "length": 25, "count": 6} | arguments))


def test_freezing_again_gives_the_same_file(tmp_path, capsys):
    path = tmp_path / "manifest.json"
    freeze.main([str(path)])
    assert path.read_bytes() == MANIFEST.read_bytes()
    with pytest.raises(SystemExit):
        freeze.main([str(path)])
    assert "pass --force" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_freeze_overwrites_only_if_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(freeze, "LENGTHS", (25,))
    monkeypatch.setattr(freeze, "CLIPS", 6)
    path = tmp_path / "manifest.json"
    path.write_text("old")
    freeze.main([str(path), "--force"])
    assert len(json.loads(path.read_text())["captions"]) == 6
    procedural("test", 25, 6, manifest=path)
    with pytest.raises(SystemExit):
        freeze.main([str(tmp_path / "nowhere" / "manifest.json")])
    assert "no folder" in capsys.readouterr().err


def test_the_instruction_set_does_not_matter():
    """numpy has its own powers and cosines for each; a processor without AVX is played by switching them off."""
    code = (
        "from benchmarks.tgi.procedural import draw\n"
        "print(*draw('test', 25, 48, 32)[1], sep='\\n')\n"
    )  # fmt: skip
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR AVX2 AVX512F"}
    # Names that this numpy or processor does not know are a warning there.
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.split() == draw("test", 25, 48, 32)[1]
