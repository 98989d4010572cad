"""The models in one set of tensors, each under plain names.

Files put anything in front of every name: `model.diffusion_model.`, `module.`, `_orig_mod.`, `state_dict.`, several at
once; an all-in-one file has a prefix for each model. Whatever stands in front of all marks of a family is its prefix.
"""

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from convert import families, quantised, strangers
from convert.families import FAMILIES, SLOTS, Family
from convert.tensors import SourceError, Tensors, some

BESIDE = ("logit_scale", "text_projection", "spiece_model", "scaled_fp8")
"""Last words of names that stand beside a model's prefix in files of several models."""


def models(tensors: Tensors) -> tuple[list[tuple[Family, Tensors]], list[str]]:
    """Every model that a file (or the shards of one) holds, and notes on what was left out.

    Raises:
      SourceError: none that Wan2.1 uses; two of one kind; tensors of no model beside several.
    """
    tensors = tensors.renamed(lambda name: _embedding(name, tensors.named))
    found = _prefixes(tensors.named)
    if not found:
        quantised.refuse_foreign(tensors)
        raise SourceError(f"{tensors.files[0]}: {_unknown(tensors)}")
    chosen, notes = _chosen(tensors, found)
    whole = [(family, _under(tensors, prefix, found)) for prefix, family in chosen.items()]
    rest = {name for name in tensors.named if _owner(name, found) is None}
    if not rest:
        return whole, notes
    if len(found) == 1:  # they are said to be extra, or known as not read
        (family, own), (prefix,) = whole[0], chosen
        own = tensors.renamed(lambda name: name.rpartition(".")[2] if _beside(name) else name.removeprefix(prefix))
        return [(family, own)], notes
    odd = sorted(name for name in rest if not _beside(name))
    if odd:
        raise SourceError(f"{tensors.files[0]}: tensors of no model that is known: {some(odd, 5)}")
    return [(family, _with_pieces(tensors, own) if family.part == "umt5" else own) for family, own in whole], notes


def _embedding(name: str, names: Mapping[str, object]) -> str:
    """A text encoder's embedding, of which some files hold the second copy alone, under its first name."""
    start, found, end = name.partition("encoder.embed_tokens.weight")
    shared = f"{start}shared.weight"
    return shared if found and not end and shared not in names else name


def _prefixes(names: Mapping[str, object]) -> dict[str, Family]:
    """What stands in front of all marks of a family."""
    found: dict[str, Family] = {}
    for family in FAMILIES:
        mark = family.marks[0]
        for name in names:
            if name != mark and not name.endswith(f".{mark}"):
                continue
            prefix = name.removesuffix(mark)
            if prefix not in found and all(prefix + other in names for other in family.marks):
                found[prefix] = family
    return found


def _chosen(tensors: Tensors, found: Mapping[str, Family]) -> tuple[dict[str, Family], list[str]]:
    """One prefix a part: of a model and its moving average, the average, which is what training codes generate with."""
    chosen, notes = dict(found), []
    for part in SLOTS:
        own = [prefix for prefix in chosen if chosen[prefix].part == part]
        if len(own) < 2:
            continue
        averages = [prefix for prefix in own if "ema" in re.split(r"[._]", prefix)]
        where = some(sorted(repr(prefix) for prefix in own), 5)
        if len(averages) != 1:
            raise SourceError(f"{tensors.files[0]}: holds several of {part}, under {where}; save the one that is meant")
        chosen = {prefix: family for prefix, family in chosen.items() if prefix not in own or prefix in averages}
        notes.append(f"{tensors.files[0]}: holds several of {part}, under {where}; {averages[0]!r} is taken")
    return chosen, notes


def _owner(name: str, found: Collection[str]) -> str | None:
    owner = max((prefix for prefix in found if name.startswith(prefix)), key=len, default=None)
    # A model without a prefix does not own what stands beside the prefix of another.
    return None if owner == "" and len(found) > 1 and _beside(name) and "." in name else owner


def _under(tensors: Tensors, prefix: str, found: Collection[str]) -> Tensors:
    return tensors.renamed(lambda name: name.removeprefix(prefix) if _owner(name, found) == prefix else None)


def _beside(name: str) -> bool:
    return name.rpartition(".")[2] in BESIDE


def _with_pieces(tensors: Tensors, own: Tensors) -> Tensors:
    """The text encoder with the tokenizer that ComfyUI's files hold beside it."""
    pieces = [tensor for name, tensor in tensors.named.items() if name.rpartition(".")[2] == "spiece_model"]
    named = {**own.named, "spiece_model": pieces[0]} if pieces else own.named
    return Tensors(own.files, named, own.formats)


def _unknown(tensors: Tensors) -> str:
    """What tensors of no whole family are."""
    names = tensors.named.keys()
    stranger = strangers.by_name(names)
    if stranger:
        return f"{stranger}; {strangers.KNOWN}"
    near = _nearest(names)
    if near is not None:
        family, prefix = near
        missing = [prefix + mark for mark in family.marks if prefix + mark not in names]
        what = families.title(family)
        return f"{what} in the {family.layout} layout without {some(missing, 5)}; incomplete, get it again"
    return f"not a model that Wan2.1 uses (it holds {some(sorted(names), 3) or 'no tensors'})"


def _nearest(names: Iterable[str]) -> tuple[Family, str] | None:
    """The family (and prefix) of which most kinds of names are there, if half of them are."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    best, most = None, 0.5
    for k, family in enumerate(FAMILIES):
        known, votes = _kinds(k), Counter()
        for kind in kinds:
            starts = [0, *(i + 1 for i, letter in enumerate(kind) if letter == ".")]
            votes.update(kind[:start] for start in starts if kind[start:] in known)
        for prefix, count in votes.most_common(1):
            if count / len(known) > most:
                best, most = (family, prefix), count / len(known)
    return best


@functools.cache
def _kinds(k: int) -> frozenset[str]:
    """Names of the k-th family, without their numbers."""
    family = FAMILIES[k]
    return frozenset(re.sub(r"\{i\}|\d+", "#", rule.theirs) for rule in family.rules(SLOTS[family.part]()))
