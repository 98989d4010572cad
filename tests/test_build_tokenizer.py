"""The tiny model's tokenizer: whole words for captions, bytes for the rest, stable ids."""

import pytest

from benchmarks.tiny.build_tokenizer import MAX_VOCABULARY, build, main, vocabulary
from benchmarks.tiny.clips import caption, scene
from wanjax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    main([str(path)])
    return Tokenizer(path)


def test_the_file_is_deterministic():
    assert build().to_str() == build().to_str()


def test_special_ids(tokenizer):
    ids, mask = tokenizer.encode(["", "a red circle"], 6)
    assert ids[0].tolist() == [1, 0, 0, 0, 0, 0] and mask[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert ids[1, 3] == 1 and len(set(ids[1, :3])) == 3
    assert [name for name, _ in vocabulary(10)[:3]] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.vocab_size <= MAX_VOCABULARY


@pytest.mark.parametrize("rich", [False, True])
def test_captions_are_one_piece_a_word(tokenizer, rich):
    for seed in range(100):
        text = caption(scene(seed, "heldout", rich))
        pieces = tokenizer.tokens(text)
        words = text.replace(",", " ,").split()
        assert [piece.removeprefix("▁") for piece in pieces] == [*words, "</s>"]
        assert len(pieces) <= 64


def test_capitals_do_not_matter(tokenizer):
    assert tokenizer.tokens("A Red CIRCLE") == tokenizer.tokens("a red circle")


@pytest.mark.parametrize("text", ["zebra", "中文 é 🎬", "a-b_c;d", "12:30", "reddish"])
def test_nothing_is_unknown(tokenizer, text):
    pieces = tokenizer.tokens(text)
    assert "<unk>" not in pieces and len(pieces) > 2
