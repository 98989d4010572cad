"""Small SentencePiece models, trained as UMT5's was: unigram, pad 0, </s> 1, bytes for unknown characters."""

import functools
import io
from pathlib import Path

import sentencepiece

LINES = (
    "a red circle moves to the right, over the blue square",
    "A cat jumps onto the table; the camera moves slowly.",
    "In a sunlit forest, leaves fall while two children run (4K, 24 fps).",
    "the quick brown fox jumps over the lazy dog 0123456789",
    "镜头切换，镜头晃动，色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止",
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部",
    "Ein schöner Tag für naïve Gäste im Café, déjà vu.",
    "движение камеры медленно вправо",
    "桜の花びらが舞う、カメラが動く。",
)


@functools.cache
def trained(vocabulary: int = 700, **options) -> bytes:
    """The bytes of a model."""
    stream = io.BytesIO()
    own = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8").splitlines()
    settings = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="nmt_nfkc",
                    hard_vocab_limit=False, minloglevel=2, num_threads=1)  # fmt: skip
    texts = [*LINES * 4, *own] if vocabulary > 100 else ["a red circle moves to the right", "a blue square"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stream, vocab_size=vocabulary, **settings | options
    )
    return stream.getvalue()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own reader."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)
