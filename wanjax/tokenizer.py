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


def read(file: Path) -> str:
    """The text of a `tokenizer.json`.

    Raises:
      ValueError: it cannot be read, or is no text.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise ValueError(f"tokenizer {file}: not a readable tokenizer.json ({reason}); get it again") from error


def _looks(text: str) -> str | None:
    """What a text is that is often found in the place of a tokenizer."""
    if not text.strip():
        return "empty; get it again"
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer; run git lfs pull"
    if text.lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a web page; download the file itself"
    return None


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
        self._build(read(file), f"tokenizer {file}")

    @classmethod
    def parse(cls, text: str, name: str) -> "Tokenizer":
        """From the text of a `tokenizer.json`.

        Args:
          name: of where it came from, for messages.

        Raises:
          ValueError: not a tokenizer, one that cannot encode, or one of the two special tokens is missing.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._build(text, name)
        return tokenizer

    def _build(self, text: str, name: str) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.encode("a \u4e2d", add_special_tokens=False)  # some faults show only in use
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower, and a panic in its Rust is no Exception
            reason = _looks(text) or " ".join(str(error).split())[:200]
            raise ValueError(f"{name}: not a readable tokenizer.json ({reason})") from error
        # Lengths are decided by the caller, not by what the file was saved with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._close, self._pad = self._special(name, CLOSE), self._special(name, PAD)

    def _special(self, name: str, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{name}: the vocabulary has no {token}; use a T5-style one")
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
