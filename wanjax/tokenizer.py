"""Prompts to token ids, as the published models were trained on them."""

import html
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

CLOSE = "</s>"
PAD = "<pad>"


class PromptCut(UserWarning):
    """A prompt had more tokens than the model takes, and lost its end."""


def clean(text: str) -> str:
    """Repairs broken Unicode, resolves HTML entities (twice) and folds whitespace into single spaces."""
    # Imported here: everything but cleaning a prompt (benchmarks, training on latents) does without it.
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """A `tokenizer.json` of the `tokenizers` library with `</s>` and `<pad>` in its vocabulary.

    Args:
      path: the file, or the folder that holds a `tokenizer.json`.

    Raises:
      ValueError: no such file, not a tokenizer, or one of the two special tokens is missing.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"tokenizer {file}: no such file; give a tokenizer.json or its folder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer {file}: not a readable tokenizer.json ({reason})") from error
        # Lengths are decided by the caller, not by what the file was saved with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._close, self._pad = self._special(file, CLOSE), self._special(file, PAD)

    def _special(self, file: Path, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"tokenizer {file}: the vocabulary has no {token}; use a T5-style one")
        return number

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; the text encoder's vocabulary must be at least this."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cleans, tokenizes, closes with `</s>` and pads.

        Args:
          texts: B prompts; an empty one becomes `</s>` alone.
          length: L, tokens per prompt including `</s>`. Longer prompts are cut, with a `PromptCut` warning.

        Returns:
          ids [B, L] int32, and mask [B, L] int32: 1 at tokens (including `</s>`), 0 at padding.

        Raises:
          ValueError: one string instead of a sequence of them, or length below 1.
        """
        if isinstance(texts, str):
            raise ValueError("prompts: got one string; give a list of strings")
        if length < 1:
            raise ValueError(f"prompts: length {length} leaves no room for {CLOSE}; give at least 1")
        ids = np.full((len(texts), length), self._pad, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            tokens = self._encode(text).ids
            dropped = len(tokens) + 1 - length
            if dropped > 0:
                total = f"prompt {row + 1}: {len(tokens) + 1} tokens, the model takes {length}"
                warnings.warn(PromptCut(f"{total}; the last {dropped} are dropped"), stacklevel=2)
            tokens = [*tokens[: length - 1], self._close]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def tokens(self, text: str) -> list[str]:
        """The vocabulary's pieces of one cleaned prompt, in the order of `encode`, `</s>` last, uncut.

        A piece that begins a word starts with "▁" in SentencePiece vocabularies.
        """
        return [*self._encode(text).tokens, CLOSE]

    def _encode(self, text: str) -> tokenizers.Encoding:
        # One by one: the library's batch call starts threads, which a later fork would inherit.
        return self._tokenizer.encode(clean(text), add_special_tokens=False)
