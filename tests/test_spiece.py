"""SentencePiece models as tokenizer.json: the same ids as SentencePiece itself gives."""

import random

import pytest
import spiece_model
import tokenizers
from spiece_model import LINES

from convert import spiece
from convert.tensors import SourceError
from wanjax.tokenizer import Tokenizer, clean

TEXTS = [
    *LINES,
    "",
    " ",
    "   leading and trailing   ",
    "two  spaces,\ttabs\tand\nnew\r\nlines \u3000 ideographic\u00a0no-break \u2028 line",
    "zero\u200bwidth \u200cjoiners\u200d and \ufeffmarks",
    "🎬 👩‍👩‍👧 🇫🇷 👍🏽 ❤️",
    "ｆｕｌｌｗｉｄｔｈ ﬁne № ½ ① ㎏ … “quotes” ‘single’",
    "e\u0301 A\u030a o\u0308 decomposed; é Å ö composed",
    "हिन्दी में एक लाल वृत्त, ภาษาไทย น้ำ, Tiếng Việt có dấu, مُحَمَّد, שָׁלוֹם",
    "한국어 각 나 다 움직이는 원",
    "unknownwordxyz qqqqzzzz ∀∃∑ ♞♘ \U00020000 \x07",
    "<b>tags</b> [brackets] {braces} `code` \\slashes/ a_b-c+d=e @#$%^&*",
    "▁ underscores ▁▁a",
    "a" * 300,
    "镜头" * 100,
]
KINDS = {
    "as UMT5": {},
    "without bytes": {"byte_fallback": False},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "as it stands": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "no space in front": {"add_dummy_prefix": False},
    "pieces across words": {"split_by_whitespace": False},
    "single digits": {"split_digits": True},
}


def both(model):
    """(theirs, ours) as functions from a text to its ids."""
    theirs = spiece_model.processor(model)
    ours = tokenizers.Tokenizer.from_str(spiece.to_json(model, "x"))
    return theirs.encode, lambda text: ours.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces(kind):
    theirs, ours = both(spiece_model.trained(**KINDS[kind]))
    for text in [clean(text) for text in TEXTS]:
        assert ours(text) == theirs(text), text


def test_ids_of_texts_that_are_not_cleaned():
    theirs, ours = both(spiece_model.trained())
    for text in TEXTS:
        assert ours(text) == theirs(text), text


def score(model, ids):
    """Log probability of a text cut into these pieces."""
    processor = spiece_model.processor(model)
    return sum(processor.get_score(one) for one in ids)


def test_ids_of_random_texts():
    model = spiece_model.trained()
    theirs, ours = both(model)
    pool = "abcdefgh THE red circle  .,;'\"é ñ ß ﬁ ½ ｆｕｌｌ が 中文字幕桜舞 한국 🎬👧 \u200b\u3000 ق ث ж д"
    rng = random.Random(0)
    for _ in range(500):
        text = clean("".join(rng.choice(pool) for _ in range(rng.randint(0, 40))))
        if ours(text) != theirs(text):  # only two ways of the same score, of which each library takes its own
            assert score(model, ours(text)) == pytest.approx(score(model, theirs(text)), abs=1e-4), text


def test_the_comparison_can_fail():
    """Another model of the same kind gives other ids."""
    theirs, _ = both(spiece_model.trained())
    _, ours = both(spiece_model.trained(vocabulary=600))
    assert any(ours(text) != theirs(text) for text in TEXTS)


def test_decoding_gives_the_text_back():
    model = spiece_model.trained()
    theirs, ours = spiece_model.processor(model), tokenizers.Tokenizer.from_str(spiece.to_json(model, "x"))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_prompts_are_closed_and_padded(tmp_path):
    model = spiece_model.trained()
    tokenizer = Tokenizer.parse(spiece.to_json(model, "x"), "x")
    ids, mask = tokenizer.encode(["a red circle", ""], 12)
    wanted = spiece_model.processor(model).encode("a red circle") + [1]
    assert ids[0].tolist() == wanted + [0] * (12 - len(wanted)) and mask[0].sum() == len(wanted)
    assert ids[1].tolist() == [1] + [0] * 11
    assert tokenizer.vocab_size == spiece_model.processor(model).get_piece_size()


def test_a_control_symbol_in_a_text_is_itself_as_in_published_files():
    model = spiece_model.trained()
    _, ours = both(model)
    assert 1 in ours("a </s> red") and 1 not in spiece_model.processor(model).encode("a </s> red")


def test_pieces_out_of_use_are_not_used():
    """Of a model with restricted vocabulary, whose dropped pieces SentencePiece leaves out too."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(spiece_model.trained())
    before = spiece_model.processor(spiece_model.trained()).encode("a red circle")
    for number in before[:2]:
        proto.pieces[number].type = spiece.UNUSED
    theirs, ours = both(proto.SerializeToString())
    assert theirs("a red circle") != before
    for text in map(clean, TEXTS):
        assert ours(text) == theirs(text), text


@pytest.mark.parametrize("kind, message", [
    ({"model_type": "bpe"}, "of the BPE kind, UMT5's is unigram"),
    ({"model_type": "char"}, "of the character kind"),
    ({"model_type": "word"}, "of the word kind"),
    ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
])  # fmt: skip
def test_other_kinds_are_named(kind, message):
    byte_fallback = {} if "treat_whitespace_as_suffix" in kind else {"byte_fallback": False}
    with pytest.raises(SourceError, match=message):
        spiece.to_json(spiece_model.trained(**kind, **byte_fallback), "tokenizer x")


@pytest.mark.parametrize("data", [b"", b"nonsense", b"version https://git-lfs", b"\x00" * 64, b"<!DOCTYPE html>"])
def test_what_is_no_model(data):
    with pytest.raises(SourceError, match="tokenizer x: damaged or not a SentencePiece model; get it again"):
        spiece.to_json(data, "tokenizer x")


def test_an_option_that_cannot_be_said_is_found(monkeypatch):
    """The result is tried before it is used."""
    monkeypatch.setattr(spiece, "_normalizers", lambda spec: [tokenizers.normalizers.Lowercase()])
    with pytest.raises(SourceError, match="the tokenizers library reads .* otherwise; give a tokenizer.json"):
        spiece.to_json(spiece_model.trained(), "tokenizer x")
