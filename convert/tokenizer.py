"""The tokenizer of a source: found, read and tried before any long work, as the text of a `tokenizer.json`."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from convert import spiece
from convert.choose import TOKENIZER_MODELS
from convert.sources import Source
from convert.tensors import SourceError
from wanjax.tokenizer import Tokenizer, read

TENSOR = "spiece_model"
"""The tensor of bytes in which ComfyUI's text encoders carry theirs."""

EXTRA = "pip install 'wanjax[sentencepiece]' reads it"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that works.

    Attributes:
      text: of the tokenizer.json.
      file: that it was read from; None where it lies inside the text encoder's.
    """

    text: str
    file: Path | None


def find(source: Source, vocab_size: int) -> tuple[Vocabulary | None, tuple[str, ...]]:
    """The tokenizer of a source.

    Args:
      vocab_size: of the text encoder.

    Returns:
      (tokenizer, None where there is none that can be read; notes).

    Raises:
      SourceError: not a tokenizer, or one of another text encoder.
    """
    file = source.tokenizer or _model_file(source.path)
    encoder = source.parts.get("umt5")
    inside = encoder.tensors.named.get(TENSOR) if encoder else None
    if file is None and inside is None:
        return None, ()
    name = f"tokenizer {file or f'{encoder.tensors.files[0]} ({TENSOR})'}"
    try:
        if file is not None and file.suffix != ".model":
            text = read(file)
        elif find_spec("sentencepiece") is None:
            return None, (f"{name}: a SentencePiece model; {EXTRA}",)
        else:
            text = spiece.to_json(file.read_bytes() if file is not None else inside.read().tobytes(), name)
        found = Tokenizer.parse(text, name)
        if found.vocab_size > vocab_size:
            raise ValueError(f"{name}: {found.vocab_size} tokens, the text encoder has {vocab_size}; it is another's")
    except (ValueError, OSError) as error:
        if encoder is None:  # nothing that is asked for needs it
            return None, (f"left out: {error}",)
        raise SourceError(str(error)) from error
    return Vocabulary(text, file), ()


def _model_file(path: Path) -> Path | None:
    return next((path / name for name in TOKENIZER_MODELS if (path / name).is_file()), None)
