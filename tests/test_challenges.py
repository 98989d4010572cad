"""Challenge clips: determinism, categories, and that the caption alone decides what the keyframes leave open."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import wanjax
from benchmarks.tiny import latents
from benchmarks.tiny.challenges import CATEGORIES, WIPES, ChallengeClip, backwards, challenge, draw, takeover
from benchmarks.tiny.clips import SPLITS, background_words, clip, noun
from wanjax.tokenizer import Tokenizer

SEEDS = range(240)
OPPOSITE = {"over": "under", "under": "over", "early": "late", "late": "early", "even": "late",
            "first half": "second half", "second half": "first half"}  # fmt: skip


@pytest.fixture(scope="module")
def clips():
    return [challenge(seed, "heldout") for seed in SEEDS]


@pytest.fixture(scope="module")
def ambiguous(clips):
    return [one for one in clips if one.ambiguous]


def with_sprites(story, *sprites):
    """The story with other sprites, told in its own way."""
    return dataclasses.replace(story, scene=dataclasses.replace(story.scene, sprites=sprites))


def varied(sprite, **changes):
    return dataclasses.replace(sprite, **changes)


def large_motion(story):
    (sprite,) = story.scene.sprites
    if sprite.arc != "straight":
        yield with_sprites(story, varied(sprite, arc=OPPOSITE[sprite.arc]))
    if sprite.angle[1]:
        yield with_sprites(story, varied(sprite, angle=(0.0, -sprite.angle[1])))


def linear_motion(story):
    if len(story.scene.sprites) == 1:
        (sprite,) = story.scene.sprites
        yield with_sprites(story, varied(sprite, pace=OPPOSITE[sprite.pace]))
        return
    one, two = (varied(sprite, pace=OPPOSITE[sprite.pace]) for sprite in story.scene.sprites)
    yield with_sprites(story, two, one)


def occlusion(story):
    back, front = story.scene.sprites
    yield with_sprites(story, front, back)


def near_static(story):
    *rest, bounce = story.scene.sprites
    other = varied(bounce, arc=OPPOSITE[bounce.arc])
    if not rest:
        yield with_sprites(story, other)
        return
    yield with_sprites(story, rest[0], other)
    jumps = varied(rest[0], arc=bounce.arc, arc_height=bounce.arc_height)
    still = varied(bounce, arc="straight")
    yield with_sprites(story, still, jumps)


def appearance_change(story):
    (sprite,) = story.scene.sprites
    yield with_sprites(story, varied(sprite, pace=OPPOSITE[sprite.pace]))


def scene_transition(story):
    for wipe in WIPES:
        if wipe != story.wipe:
            yield dataclasses.replace(story, wipe=wipe)


COUNTERPARTS = {
    "large motion": large_motion,
    "linear motion": linear_motion,
    "occlusion": occlusion,
    "near-static": near_static,
    "appearance change": appearance_change,
    "scene transition": scene_transition,
}


def drawn(story, frames=25, size=32):
    return draw(story, frames, size)[0]


def test_the_same_seed_gives_the_same_clip(clips):
    for seed in range(12):
        again = challenge(seed, "heldout")
        np.testing.assert_array_equal(again.video, clips[seed].video)
        assert again.story == clips[seed].story
        assert again.video.dtype == np.uint8 and again.video.shape == (25, 32, 32, 3)
        np.testing.assert_array_equal(again.video, drawn(again.story))


def test_a_story_told_backwards_is_the_video_in_reversed_time(clips):
    """So its caption is true of what a model sees that denoises from the last keyframe to the first."""
    for one in clips:
        told = backwards(one.story)
        levels = np.abs(drawn(told).astype(int) - one.video[::-1])
        assert levels.max() <= 1, one.caption
        ends = zip((told.first_image_desc, told.last_image_desc),
                   (one.story.last_image_desc, one.story.first_image_desc), strict=True)  # fmt: skip
        assert all(sorted(a.split()) == sorted(b.split()) for a, b in ends)  # of two, the other may be named first
        assert backwards(told) == one.story


@pytest.mark.parametrize("seed, words", [
    (1, "a red diamond moves down in a straight line and slows down, on a grey and white background"),
    (4, "a brown bar moves left in a straight line and shrinks and turns orange, on a white background"),
    (6, "a brown triangle moves left in an arc over and makes a half turn counterclockwise, on a purple and green "
        "background"),
    (7, "first a cyan ring moves up in a straight line, then a purple triangle moves up in a straight line, on a green "
        "background"),
    (10, "a white cross stays still and grows and turns black at last, on a brown background"),
    (11, "a black triangle on a brown background changes to a white bar on a grey and orange background, from the "
         "right"),
])  # fmt: skip
def test_captions_of_reversed_time(seed, words):
    assert backwards(challenge(seed, "test").story).caption == words


def test_the_seed_tells_the_category_and_all_are_balanced(clips):
    names = tuple(CATEGORIES)
    assert [one.category for one in clips] == [names[seed % 6] for seed in SEEDS]
    assert set(Counter(one.category for one in clips).values()) == {len(SEEDS) // 6}


def test_splits_share_no_clip():
    seen = [{challenge(seed, split).video.tobytes() for seed in range(48)} for split in SPLITS]
    assert all(len(one) == 48 for one in seen)
    assert len(set.union(*seen)) == 48 * len(SPLITS)
    stories = [{challenge(seed, split, 2).caption for seed in range(120)} for split in ("dev", "test")]
    assert len(stories[0] & stories[1]) < 12  # the words are few; the pictures of one caption still differ


def betrayed(one, story):
    """Pixels of the first and last frame that tell the two stories apart, by more than a level of rounding."""
    return int((np.abs(one.video[[0, -1]].astype(int) - drawn(story)[[0, -1]]).max(-1) > 1).sum())


@pytest.mark.parametrize("category", COUNTERPARTS)
def test_only_the_caption_decides_in_the_test_set(category):
    seeds = range(tuple(CATEGORIES).index(category), 144, 6)
    chosen = [one for one in (challenge(seed, "test") for seed in seeds) if one.ambiguous]
    assert len(chosen) >= 12
    for one in chosen:
        made = list(COUNTERPARTS[category](one.story))
        assert made
        assert len({one.caption, *(story.caption for story in made)}) == len(made) + 1
        for story in made:
            told = f"{one.caption} / {story.caption}"
            assert betrayed(one, story) == 0, told
            clearly = np.abs(one.video[1:-1].astype(int) - drawn(story)[1:-1]).max(-1) > 25
            assert clearly.mean(axis=(1, 2)).max() >= 0.01, told


def test_keyframes_betray_next_to_nothing_anywhere(ambiguous):
    """One that rests and one that comes may touch at the ends, where a few pixels then show which is in front."""
    told = [(one, betrayed(one, story)) for one in ambiguous for story in COUNTERPARTS[one.category](one.story)]
    telling = [(one, pixels) for one, pixels in told if pixels]
    assert all(one.category == "occlusion" and pixels <= 8 for one, pixels in telling)
    assert len(telling) <= 0.05 * sum(one.category == "occlusion" for one in ambiguous)


def test_counterparts_keep_the_words_for_the_keyframes(ambiguous):
    for one in ambiguous:
        for story in COUNTERPARTS[one.category](one.story):
            if story.after is None:
                sprites = sorted(story.scene.sprites, key=str), sorted(one.story.scene.sprites, key=str)
                nouns = [[sorted(noun(s, when) for s in some) for when in (0, 1)] for some in sprites]
                assert nouns[0] == nouns[1]
            else:
                assert story.first_image_desc in story.caption and story.last_image_desc in story.caption


def test_every_category_leaves_most_paths_open(clips):
    share = {name: np.mean([one.ambiguous for one in clips if one.category == name]) for name in CATEGORIES}
    assert min(share.values()) > 0.5, share


def test_clips_without_a_choice_move_at_an_even_pace(clips):
    plain = [one for one in clips if not one.ambiguous]
    assert plain
    for one in plain:
        (sprite,) = one.story.scene.sprites
        assert sprite.pace == "even" and sprite.arc == "straight" and sprite.angle == (0.0, 0.0)
        assert sprite.start != sprite.end


@pytest.mark.parametrize("frames, longer", [(25, 49), (33, 65), (41, 81)])
def test_other_lengths_tell_the_same_story(frames, longer):
    for seed in range(12):
        short, long = challenge(seed, "dev", frames), challenge(seed, "dev", longer)
        assert short.story == long.story
        np.testing.assert_array_equal(short.video, long.video[::2])
        assert not (short.motion_mask & ~long.motion_mask).any()


def test_larger_frames_show_the_same_story():
    for seed in range(12):
        small, large = challenge(seed, "dev", 9), challenge(seed, "dev", 9, 64)
        assert small.story == large.story
        pooled = large.video.reshape(9, 32, 2, 32, 2, 3).mean(axis=(2, 4))
        assert np.abs(pooled - small.video).mean() < 2


def test_the_motion_mask_holds_everything_that_changes(clips):
    for one in clips:
        changes = (one.video != one.video[:1]).any(axis=(0, 3))
        assert not (changes & ~one.motion_mask).any(), one.caption
        if one.category == "scene transition":
            assert one.motion_mask.all()
        else:
            assert 0.02 < one.motion_mask.mean() < 0.8, one.caption


@pytest.mark.parametrize("wipe", WIPES)
def test_a_new_scene_comes_in_whole_and_from_its_side(wipe):
    share = takeover(wipe, 25, 32)
    assert share.shape == (25, 32, 32)
    assert (share[0] == 0).all() and (share[-1] == 1).all() and (np.diff(share, axis=0) >= 0).all()
    near, far = {"left": (share[:, :, :16], share[:, :, 16:]), "right": (share[:, :, 16:], share[:, :, :16]),
                 "top": (share[:, :16], share[:, 16:]), "bottom": (share[:, 16:], share[:, :16]),
                 "fade": (share, share)}[wipe]  # fmt: skip
    if wipe == "fade":
        assert (share[12] == 0.5).all()
    else:
        assert (near[12] == 1).all() and (far[12] == 0).all()


def test_no_clip_stands_still(clips):
    for one in clips:
        assert (one.video != one.video[:1]).any(), one.caption


def test_captions_are_one_piece_a_word():
    tokenizer = Tokenizer(Path(wanjax.__file__).parent / "assets" / "tiny")
    for seed in range(360):
        story = challenge(seed, "test", 2, 16).story
        for text in (story.caption, story.first_image_desc, story.last_image_desc):
            pieces = tokenizer.tokens(text)
            assert [piece.removeprefix("▁") for piece in pieces] == [*text.replace(",", " ,").split(), "</s>"]
            assert len(pieces) <= 64


def test_descriptions_name_what_the_keyframes_show(clips):
    for one in clips:
        story = one.story
        for when, text in enumerate((story.first_image_desc, story.last_image_desc)):
            scene = story.scene if when == 0 or story.after is None else story.after
            assert background_words(scene.background) in text
            assert all(noun(sprite, when) in text for sprite in scene.sprites)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0, "split": "validation"}, "split is 'validation'"),
        ({"seed": 0, "frames": 1}, "frames is 1"),
        ({"seed": 0, "size": 15}, "size is 15"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        challenge(**arguments)


def test_training_clips_are_of_their_variety():
    plain = [latents.training_clip(n, "plain", 25) for n in range(3)]
    assert [one.caption for one in plain] == [clip(n, "train").caption for n in range(3)]
    mixed = [latents.training_clip(n, "challenges", 25) for n in range(210)]
    told = [one for one in mixed if isinstance(one, ChallengeClip)]
    assert len(told) == 150
    counts = {category: sum(one.category == category for one in told) for category in CATEGORIES}
    assert set(counts.values()) == {25}
    other = [latents.training_clip(n, "challenges", 33).caption for n in range(20)]
    assert other != [one.caption for one in mixed[:20]], "another length tells other stories"
