"""What turns a folder of arrays into a model folder: configuration, tokenizer, manifest, and its name."""

import dataclasses
from pathlib import Path

from convert.plan import Plan
from wanjax import checkpoint
from wanjax.config import to_json
from wanjax.manifest import MANIFEST, Manifest, file_digest
from wanjax.publishing import publish, sync, sync_folder

PROGRESS, JOB = "progress.jsonl", "job.json"
"""Which arrays are finished, and of what; both go when the folder has its name."""


def finish(planned: Plan, folder: Path, target: Path, manifest: Manifest) -> None:
    """Adds what makes the folder a model, and gives it its name.

    Raises:
      FileExistsError: something appeared under that name.
    """
    write_synced(folder / checkpoint.CONFIG, to_json(planned.config) + "\n")
    if planned.tokenizer is not None:
        write_synced(folder / checkpoint.TOKENIZER, planned.tokenizer.text)
    files = {name: file_digest(folder / name) for name in (checkpoint.CONFIG, checkpoint.TOKENIZER)
             if (folder / name).is_file()}  # fmt: skip
    write_synced(folder / MANIFEST, dataclasses.replace(manifest, files=files).dumps())
    sync_folder(folder)
    publish(folder, target)  # what an interruption after this leaves is whole, and two small files too many
    sync_folder(target.parent)
    (target / JOB).unlink()
    (target / PROGRESS).unlink()


def write_synced(path: Path, text: str) -> None:
    """Writes a text as it is, and waits until it is on the disk."""
    path.write_text(text, encoding="utf-8", newline="")
    sync(path)
