"""Build the tiny model's tokenizer: one piece for every word of the captions, bytes for everything else.

The file has the form of the published tokenizers (SentencePiece unigram, "▁" before a word, byte fallback), so
that the same code reads both. Nothing is estimated at random: pieces and scores follow from counted words.

    python -m benchmarks.tiny.build_tokenizer runs/tokenizer.json
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from benchmarks.tiny.clips import COLOURS, COMMON_SHAPES, caption, scene
from wanjax.writing import write_text

SPECIAL = ("<pad>", "</s>", "<unk>")
MAX_VOCABULARY = 768

# Words that later captions, or people, use beside those of today's generator.
PLANNED = """
a an the and then on in of to with from into by at it its is are while first last two both
move moves moving go goes slides travels straight line arc curve path up down left right over under above below
clockwise counterclockwise turn turns turning rotates rotating quarter half full grows growing shrinks shrinking
bigger smaller large small changes change colour color becomes becoming stays still appears disappears
front behind passes passing through across between towards away top bottom middle centre center side corner
fast slowly quickly speeds slows bounces jumps falls rises circle square triangle diamond ring cross bar star
heart hexagon plus dot box ball shape object background plain light dark bright gray grey
zero one three four five
"""


def vocabulary(captions: int = 4000) -> list[tuple[str, float]]:
    """Pieces and log-probabilities: special tokens, words, characters, bytes; at most 768.

    Args:
      captions: how many rich training captions are counted.
    """
    counts = Counter(PLANNED.split())
    counts.update([*COLOURS, *COMMON_SHAPES])
    for seed in range(captions):
        counts.update(caption(scene(seed, "train", rich=True)).replace(",", "").split())
    total = counts.total()
    words = [(f"▁{word}", math.log(n / total)) for word, n in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    rare = math.log(1 / total) - 2.0  # spelling a word out must never beat its own piece
    letters = ["▁"] + [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    characters = [(letter, -3.0 if letter == "," else rare) for letter in letters]
    octets = [(f"<0x{value:02X}>", 2 * rare) for value in range(256)]
    pieces = [(name, 0.0) for name in SPECIAL] + words + characters + octets
    if len(pieces) > MAX_VOCABULARY:
        raise ValueError(f"vocabulary of {len(pieces)} pieces; the text encoder holds {MAX_VOCABULARY}: plan less")
    return pieces


def build() -> tokenizers.Tokenizer:
    """The tokenizer: NFKC and lower case, words by Metaspace, `$A </s>`."""
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary(), unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Command line: one path to write."""
    parser = argparse.ArgumentParser(description="Build the tokenizer of the tiny model.")
    parser.add_argument("path", type=Path, help="tokenizer.json to write")
    path = parser.parse_args(arguments).path
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build()
    write_text(path, tokenizer.to_str(pretty=True), overwrite=True, anything=True)
    print(f"{path}: {tokenizer.get_vocab_size()} pieces")


if __name__ == "__main__":
    main()
