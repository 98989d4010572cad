"""A SentencePiece unigram model, such as UMT5's, as a `tokenizer.json` with the same ids for the same text.

The steps are SentencePiece's own, each where the model's options ask for it: its table of normalised characters, spaces
folded and trimmed, one space in front, spaces as "▁"; then the likeliest pieces of the whole text, bytes for characters
that no piece holds. Some rare things are as in the files that transformers makes, not as in SentencePiece: a control
symbol written out in a text ("</s>") is that symbol, so is a byte piece ("<0x41>"), and an accent that composes with
nothing is lost behind a character that the table replaces ("№" with a circumflex).
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from convert.tensors import SourceError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of a piece, in SentencePiece's protocol."""

UNIGRAM = 1
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}

SAMPLES = (
    "",
    "a red circle moves to the right, slowly; 24 fps (4K).",
    " two  spaces ",
    "Ein schöner Tag, naïve café №5 ½ ﬁn",
    "镜头切换，色调艳丽，过曝，静态，细节模糊不清",
    "桜の花びらが舞う。 움직이는 원",
    "движение камеры حركة الكاميرا",
    "\U0001f3ac\U0001f469\u200d\U0001f467 ok",
)
"""Texts that both must encode alike before the result is used."""


def to_json(model: bytes, name: str) -> str:
    """The text of a `tokenizer.json`.

    Args:
      model: the bytes of the SentencePiece file.
      name: of where it came from, for messages.

    Raises:
      SourceError: not a SentencePiece model, or one whose ids the `tokenizers` library cannot give.
    """
    import sentencepiece  # here, as its protocol below: an extra that only this needs
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
        reference = sentencepiece.SentencePieceProcessor(model_proto=model)
        if not any(piece.type == UNKNOWN for piece in proto.pieces):  # such as an empty file
            raise DecodeError("no pieces")
    except (DecodeError, RuntimeError, TypeError) as error:
        raise SourceError(f"{name}: damaged or not a SentencePiece model; get it again") from error
    if proto.trainer_spec.model_type != UNIGRAM:
        kind = KINDS.get(proto.trainer_spec.model_type, "other")
        raise SourceError(f"{name}: a SentencePiece model of the {kind} kind, UMT5's is unigram; give its own")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise SourceError(f"{name}: puts spaces behind words, UMT5's puts them in front; give its own")
    built = _build(proto)
    for text in SAMPLES:
        if built.encode(text, add_special_tokens=False).ids != reference.encode(text):
            raise SourceError(f"{name}: the tokenizers library reads {text!r} otherwise; give a tokenizer.json")
    return built.to_str()


def _build(proto: Any) -> Tokenizer:
    # A piece that is out of use must match nothing: no text has a space once spaces are "▁".
    vocabulary = [
        (f"{piece.piece} unused" if piece.type == UNUSED else piece.piece, piece.score) for piece in proto.pieces
    ]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=fallback))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    front = proto.normalizer_spec.add_dummy_prefix
    steps = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if fallback else []), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if front else [])])
    for piece in proto.pieces:
        if piece.type in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)])
    return tokenizer


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # spaces alone, not what else Unicode calls white
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return steps
