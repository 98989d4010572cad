"""Tokenizer against `transformers`' fast tokenizer, text cleaning against diffusers' Wan pipeline."""

import warnings

import numpy as np
import pytest
import tokenizers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wanjax.tokenizer import PromptCut, Tokenizer, clean

TEXTS = [
    "a red circle moves to the right",
    "",
    "  a   red\n\tcircle ",
    "&amp;lt;red&amp;gt; circle",
    "unseen wörds and 中文字幕",
    "a </s> red <pad> circle",
]
NASTY = [
    *TEXTS,
    "schÃ¶n â€œquotedâ€\x9d text",
    "&amp;amp;amp; &lt;b&gt; &nbsp;&quot;x&quot; &#x27;&#39;",
    "zero\u200bwidth, nbsp\u00a0, ideographic\u3000space, \u2028 line, \x1c\x1d\x1e\x1f\x85 end",
    "ﬁne ｆｕｌｌｗｉｄｔｈ “curly” … \ufeffbom",
    "\x1b[31mred\x1b[0m \x00 null \x07",
    "&nbsp; &#32; \u2003 &ensp;",
    "🎬 👩‍👩‍👧 e\u0301 \ud83d\ude00",
    "<div>&eacute; &amp;eacute;</div> & && &amp",
    "\r\n\r\n",
]


def unigram() -> tokenizers.Tokenizer:
    """A small tokenizer built as the published one: SentencePiece unigram, `</s>` added by a template."""
    words = ["▁a", "▁red", "▁circle", "▁moves", "▁to", "▁the", "▁right", "▁"]
    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(word, -2.0) for word in words] + [(letter, -6.0) for letter in letters]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    """No template, other ids, and a length and padding stored in the file that must not matter."""
    vocab = {"</s>": 5, "<pad>": 3, "<unk>": 0, "a": 1, "red": 2, "circle": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=3, length=9)
    return tokenizer


def saved(path, tokenizer: tokenizers.Tokenizer):
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.mark.parametrize("text", NASTY)
def test_clean_matches_the_reference(text):
    assert clean(text) == prompt_clean(text)


def test_clean_does_all_its_steps():
    assert clean("  schÃ¶n\n &amp;lt;b&amp;gt;\t x ") == "schön <b> x"


@pytest.mark.parametrize("length", [1, 5, 12, 40])
def test_encode_matches_the_reference(tmp_path, length):
    file = saved(tmp_path, unigram())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>")
    wanted = theirs(
        [prompt_clean(text) for text in TEXTS], padding="max_length", max_length=length, truncation=True,
        return_tensors="np",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)
        ids, mask = Tokenizer(file).encode(TEXTS, length)
    assert ids.dtype == mask.dtype == np.int32 and ids.shape == mask.shape == (len(TEXTS), length)
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"])


def test_settings_stored_in_the_file_do_not_matter(tmp_path):
    ids, mask = Tokenizer(saved(tmp_path, word_level())).encode(["a red circle red a", ""], 7)
    assert ids.tolist() == [[1, 2, 4, 2, 1, 5, 3], [5, 3, 3, 3, 3, 3, 3]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]]


def test_long_prompt_is_cut_with_a_warning(tmp_path):
    tokenizer = Tokenizer(saved(tmp_path, word_level()))
    message = r"^prompt 2: 6 tokens, the model takes 4; the last 2 are dropped$"
    with pytest.warns(PromptCut, match=message) as caught:
        ids, mask = tokenizer.encode(["a red circle", "a red circle red a"], 4)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert ids.tolist() == [[1, 2, 4, 5], [1, 2, 4, 5]] and mask.all()


def test_exact_length_does_not_warn(tmp_path):
    ids, _ = Tokenizer(saved(tmp_path, word_level())).encode(["a red circle"], 4)
    assert ids.tolist() == [[1, 2, 4, 5]]


def test_tokens_are_those_of_encode(tmp_path):
    file = saved(tmp_path, unigram())
    tokenizer = Tokenizer(file)
    pieces = tokenizer.tokens("a  red &amp; circle")
    assert pieces == ["▁a", "▁red", "▁", "&", "▁circle", "</s>"]
    ids, mask = tokenizer.encode(["a  red &amp; circle"], 8)
    raw = tokenizers.Tokenizer.from_file(str(file))
    assert [raw.id_to_token(number) for number in ids[0][mask[0] == 1]] == pieces


def test_folder_and_vocab_size(tmp_path):
    saved(tmp_path, word_level())
    assert Tokenizer(tmp_path).vocab_size == 6


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="tokenizer.*: no such file; give a tokenizer.json"):
            Tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"version": "1.0"}', b"[1,\n2]"])
def test_broken_file(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer .*: not a readable tokenizer.json") as caught:
        Tokenizer(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["</s>", "<pad>"])
def test_missing_special_token(tmp_path, missing):
    vocab = {token: n for n, token in enumerate(["<unk>", "</s>", "<pad>"]) if token != missing}
    file = saved(tmp_path, tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>")))
    with pytest.raises(ValueError, match=f"the vocabulary has no {missing}"):
        Tokenizer(file)


def test_bad_arguments(tmp_path):
    tokenizer = Tokenizer(saved(tmp_path, word_level()))
    with pytest.raises(ValueError, match="prompts: got one string; give a list of strings"):
        tokenizer.encode("a red circle", 4)
    with pytest.raises(ValueError, match="prompts: length 0 leaves no room"):
        tokenizer.encode(["a"], 0)
