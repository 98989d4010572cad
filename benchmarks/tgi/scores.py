"""The results file of a run: JSON lines, one for each (length, clip, arm, seed), and the settings they belong to.

Lines are appended and flushed to disk a batch at a time, so a killed run loses at most the batch that it was on; a
torn last line is cut off and made again. `config.json` binds the folder to one model, data set, settings and metrics:
going on with others is refused, new arms and seeds may join.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from samplers.video import write_json

LINES, CONFIG = "scores.jsonl", "config.json"
GROWING = ("arms", "seeds")  # entries of the config that may gain members in a later run
HASH_LIMIT = 64 * 2**20  # bytes; larger files are known by name and size


class ScoresError(ValueError):
    """A results folder that cannot be gone on with or read; one line naming what and the mend."""


@dataclass(frozen=True)
class Key:
    """What a line is about."""

    length: int
    clip: str
    arm: str
    seed: int


class Scores:
    """A results folder; a context manager, as a run holds a lock on it until it is closed.

    Args:
      folder: made if it is not there.
      config: settings of this run as plain JSON; None only reads.

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
        except ScoresError:
            self.close()
            raise

    def _open(self, config: Mapping[str, Any] | None) -> None:
        found = _read_config(self.folder)
        if config is not None:
            self.config = _join(found, json.loads(json.dumps(config)), self.folder)
        elif found is not None:
            self.config = found
        else:
            raise ScoresError(f"{self.folder}: no {CONFIG} in it; give a folder that `run` wrote")
        self.lines = _read_lines(self._file, mend=config is not None)
        self.done = {key_of(line) for line in self.lines}
        if len(self.done) < len(self.lines):
            raise ScoresError(f"{self._file}: some (length, clip, arm, seed) stands there twice; remove the second")
        if config is not None:
            write_json(self.folder / CONFIG, self.config)

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
        self.done |= {key_of(line) for line in lines}


def _lock(folder: Path) -> IO[str]:
    """Held until the process ends, however it ends."""
    file = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
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
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScoresError(f"{file}: cannot be read ({error}); give another folder") from error


def _join(old: dict[str, Any] | None, new: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config of both runs.

    Raises:
      ScoresError: they differ in more than new arms and seeds.
    """
    if old is None:
        return new
    differing = [name for name in sorted({*old, *new} - set(GROWING)) if old.get(name) != new.get(name)]
    arms = old["arms"] | new["arms"]
    differing += [f"arm {name}" for name in old["arms"] if old["arms"][name] != arms[name]]
    if differing:
        raise ScoresError(f"{folder}: holds a run with other {', '.join(differing)}; give another folder")
    return new | {"arms": arms, "seeds": sorted({*old["seeds"], *new["seeds"]})}


def _read_lines(file: Path, mend: bool) -> list[dict[str, Any]]:
    """All whole lines; with `mend` a torn last one is cut off the file."""
    if not file.exists():
        return []
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if mend and len(whole) < len(data):
        os.truncate(file, len(whole))
    lines = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            key_of(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ScoresError(f"{file}: line {number} is damaged ({error}); remove it to have it made again") from error
        lines.append(line)
    return lines


def model_identity(folder: Path) -> str:
    """sha256, shortened, over the names, sizes and (up to 64 MiB each) contents of a model folder's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        if size <= HASH_LIMIT:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def by_clip(
    lines: Iterable[Mapping[str, Any]], length: int, arm: str, metric: str, challenge: str | None = None
) -> dict[str, float]:
    """One metric of one arm: clip id -> mean over noise seeds; clips without the metric are left out."""
    values: dict[str, list[float]] = {}
    for line in lines:
        if line["length"] == length and line["arm"] == arm and challenge in (None, line["challenge"]):
            value = line["metrics"].get(metric)
            if value is not None:
                values.setdefault(line["clip"], []).append(value)
    return {clip: sum(found) / len(found) for clip, found in values.items()}
