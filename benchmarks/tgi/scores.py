"""The results file of a run: JSON lines, one for each (length, clip, arm, seed), and the settings they belong to.

Lines are appended and flushed to disk a batch at a time, so a killed run loses at most the batch that it was on; a
torn last line is cut off and made again. `config.json` binds the folder to the model, data set, settings and metrics of
its lines: going on with others is refused; new lengths, arms and seeds may join, and what has no line yet may change.
What was asked for so far and every machine, version, commit and command that worked on it are listed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from wanjax import checkpoint, manifest
from wanjax.settings import renamed
from wanjax.writing import write_json

LINES, CONFIG = "scores.jsonl", "config.json"
# Entries of the config that may gain members in a later run; those of a table must stay what they were.
GROWING_TABLES = MappingProxyType({"arms": "arm", "sets": "clips of length"})
GROWING = (*GROWING_TABLES, "planned", "environments")
ENTRIES = (*GROWING, "model", "settings", "batch", "metrics")
OF_A_LINE = MappingProxyType(
    {"length": int, "clip": str, "arm": str, "seed": int | None, "challenge": str, "metrics": dict, "psnr_frames": list}
)


class ScoresError(ValueError):
    """A results folder that cannot be gone on with or read; one line naming what and the mend."""


@dataclass(frozen=True)
class Key:
    """What a line is about; `seed` is None of an arm that no noise enters."""

    length: int
    clip: str
    arm: str
    seed: int | None

    @property
    def name(self) -> str:
        """Clip and seed, as files are called."""
        return self.clip if self.seed is None else f"{self.clip}-{self.seed}"


class Scores:
    """A results folder; a context manager, as a run holds a lock on it until it is closed.

    Args:
      folder: made if it is not there.
      config: settings of this run as plain JSON, with all of ENTRIES; None only reads. "planned" is what the run is to
        make, {length: {arm: seeds}}; "sets" has the "ids" of each length.

    Raises:
      ScoresError: another run's folder, naming what differs; damaged files.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None):
        self.folder, self._file = folder, folder / LINES
        self._lock: IO[str] | None = None
        if config is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        try:
            self._open(config)
        except BaseException:
            self.close()
            raise

    def _open(self, config: Mapping[str, Any] | None) -> None:
        found = _read_config(self.folder)
        if found is None and config is None:
            raise ScoresError(f"{self.folder}: no {CONFIG} in it; give a folder that `run` wrote")
        self.lines = [] if found is None else _read_lines(self._file, found, mend=config is not None)
        self.done = {key_of(line): line for line in self.lines}
        if config is None:
            self.config = found
        else:
            self.config = _join(found, json.loads(json.dumps(config)), self.lines, self.folder)
            write_json(self.folder / CONFIG, self.config, overwrite=True, anything=True, mark=False)

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Scores:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines and waits until they are on the disk."""
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.lines += [dict(line) for line in lines]
        self.done |= {key_of(line): line for line in lines}


def _lock(folder: Path) -> IO[str]:
    """Held until the process ends, however it ends."""
    file = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise ScoresError(f"{folder}: another run is writing there; wait for it, or give another folder") from error
    return file


def key_of(line: Mapping[str, Any]) -> Key:
    return Key(line["length"], line["clip"], line["arm"], line["seed"])


def _read_config(folder: Path) -> dict[str, Any] | None:
    file = folder / CONFIG
    if not file.exists():
        if (folder / LINES).exists():
            raise ScoresError(f"{folder}: has {LINES} but no {CONFIG}; give another folder, or bring the file back")
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ScoresError(f"{file}: cannot be read ({error}); give another folder") from error
    if wrong := _damage(config):
        raise ScoresError(f"{file}: {wrong}, so damaged or not of this version; give another folder")
    return config | {name: renamed(config[name]) for name in ("settings", "arms") if name in config}


def _damage(config: Any) -> str | None:
    """What makes a config unusable, if anything."""
    lacking = [name for name in ENTRIES if not (isinstance(config, dict) and name in config)]
    if lacking:
        return f"no {', '.join(lacking)} in it"
    tables = ("arms", "sets", "planned", "model")
    bad = [name for name in tables if not isinstance(config[name], dict)]
    bad += ["environments"] * (not isinstance(config["environments"], list))
    if bad:
        return f"its {bad[0]} cannot be read"
    if not all(isinstance(one, dict) and isinstance(one.get("ids"), list) for one in config["sets"].values()):
        return "no ids in its sets"
    for length, arms in config["planned"].items():
        if length not in config["sets"] or not isinstance(arms, dict) or arms.keys() - config["arms"].keys():
            return f"planned names a length or an arm at {length} that it does not have"
    return None


def _join(
    old: dict[str, Any] | None, new: dict[str, Any], lines: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """The config of both runs.

    Raises:
      ScoresError: lines of the old one belong to something that is other in the new one.
    """
    if old is None or not lines:
        return new
    differing = [name for name in sorted({*old, *new} - set(GROWING)) if old.get(name) != new.get(name)]
    used = {"arms": {line["arm"] for line in lines}, "sets": {str(line["length"]) for line in lines}}
    if {_source(old["sets"][length]) for length in used["sets"]} != set(map(_source, new["sets"].values())):
        differing.append("data set")
    tables = {table: old[table] | new[table] for table in GROWING_TABLES}
    for table, what in GROWING_TABLES.items():
        differing += [f"{what} {name}" for name in old[table]
                      if name in used[table] and old[table][name] != tables[table][name]]  # fmt: skip
    if differing:
        raise ScoresError(f"{folder}: holds a run with other {', '.join(differing)}; give another folder")
    known = [_undated(one) for one in old["environments"]]
    environments = old["environments"] + [one for one in new["environments"] if _undated(one) not in known]
    return new | tables | {"planned": _both(old["planned"], new["planned"]), "environments": environments}


def _source(one: Mapping[str, Any]) -> tuple[Any, Any]:
    return one.get("name"), one.get("source")


def _both(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What either run is to make."""
    planned = {length: dict(arms) for length, arms in old.items()}
    for length, arms in new.items():
        mine = planned.setdefault(length, {})
        for arm, seeds in arms.items():
            mine[arm] = sorted({*mine.get(arm, ()), *seeds}, key=lambda seed: -1 if seed is None else seed)
    return planned


def _undated(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "date"}


def _read_lines(file: Path, config: Mapping[str, Any], mend: bool) -> list[dict[str, Any]]:
    """All whole lines; with `mend` a torn last one is cut off the file."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        os.truncate(file, len(whole))
    lines: dict[Key, dict[str, Any]] = {}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            wrong = [name for name, kind in OF_A_LINE.items() if not isinstance(line[name], kind)]
            if wrong:
                raise TypeError(f"its {wrong[0]} is {line[wrong[0]]!r}")
            key = key_of(line)
            if key.arm not in config["arms"] or key.clip not in config["sets"][str(key.length)]["ids"]:
                raise ValueError(f"{CONFIG} has no such arm or clip")
            if key in lines:
                raise ValueError("one before is of the same clip, arm and seed")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ScoresError(f"{file}: line {number} is damaged ({error}); remove it to have it made again") from error
        lines[key] = line
    return list(lines.values())


def model_identity(folder: Path) -> str:
    """sha256, shortened, of the config, tokenizer and arrays in a model folder, and of no other files there.

    Of a converted model the manifest's digests of the arrays stand for their contents, as reading them all again would
    take minutes.
    """
    digest = hashlib.sha256()
    names = [checkpoint.CONFIG, checkpoint.TOKENIZER]
    found = manifest.manifest_of(folder)
    if found is not None and found.form == manifest.ORBAX:
        arrays = found.arrays
        digest.update(json.dumps({name: arrays[name]["sha256"] for name in sorted(arrays)}).encode())
    else:
        names += sorted(file.name for file in folder.glob("*.safetensors"))
    for name in names:
        with open(folder / name, "rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _by_seed(
    lines: Iterable[Mapping[str, Any]], length: int, arm: str, metric: str, challenge: str | None
) -> dict[str, dict[int | None, float]]:
    values: dict[str, dict[int | None, float]] = {}
    for line in lines:
        if line["length"] == length and line["arm"] == arm and challenge in (None, line["challenge"]):
            value = line["metrics"].get(metric)
            if value is not None:
                values.setdefault(line["clip"], {})[line["seed"]] = value
    return values


def by_clip(
    lines: Iterable[Mapping[str, Any]], length: int, arm: str, metric: str, challenge: str | None = None
) -> dict[str, float]:
    """One metric of one arm: clip id -> mean over noise seeds; clips without the metric are left out."""
    found = _by_seed(lines, length, arm, metric, challenge)
    return {clip: sum(values.values()) / len(values) for clip, values in found.items()}


def pairs(
    lines: Sequence[Mapping[str, Any]], length: int, arm: str, other: str, metric: str, challenge: str | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """One metric of two arms on the clips and noise seeds that both have: clip id -> mean over those seeds, twice.

    An arm that no noise enters is the same for every seed of the other.
    """
    found = [_by_seed(lines, length, name, metric, challenge) for name in (arm, other)]
    result: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for clip in sorted(found[0].keys() & found[1].keys()):
        a, b = found[0][clip], found[1][clip]
        seeds = b.keys() if None in a else a.keys() if None in b else a.keys() & b.keys()
        for one, values in zip(result, (a, b), strict=True):
            if seeds:
                one[clip] = sum(values.get(seed, values.get(None)) for seed in seeds) / len(seeds)
    return result


def unfinished(config: Mapping[str, Any], done: Container[Key]) -> list[tuple[int, str, int, int]]:
    """(length, arm, clips done, clips of the set) of every arm that lacks some of what was planned; a clip is done with
    all its seeds."""
    lacking = []
    for length, arms in config["planned"].items():
        clips = config["sets"][length]["ids"]
        for arm, planned in arms.items():
            whole = sum(all(Key(int(length), clip, arm, seed) in done for seed in planned) for clip in clips)
            if whole < len(clips):
                lacking.append((int(length), arm, whole, len(clips)))
    return lacking
