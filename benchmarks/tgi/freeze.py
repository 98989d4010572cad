"""Write the manifest that holds the procedural test set fast.

    python -m benchmarks.tgi.freeze OUT

Figures that were measured on the set before are of other clips once a new manifest takes the place of
benchmarks/tgi/test_manifest.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.tgi.procedural import CLIPS, DIGITS, LENGTHS, SIZE, draw
from samplers import video
from wanjax import writing


def frozen() -> dict[str, Any]:
    """The manifest as JSON: captions in the order of the clips, and for each length the beginnings of their hashes."""
    drawn = {length: draw("test", length, CLIPS, SIZE) for length in LENGTHS}
    items, _ = drawn[LENGTHS[0]]
    return {
        "about": "sha256 of what each clip of the procedural test set says and of its frames; see procedural.py",
        "split": "test",
        "size": SIZE,
        "captions": [item.caption for item in items],
        "hashes": {str(length): [one[:DIGITS] for one in prints] for length, (_, prints) in drawn.items()},
    }


def main(argv: list[str] | None = None) -> None:
    line = argparse.ArgumentParser(prog="python -m benchmarks.tgi.freeze", description=__doc__.splitlines()[0])
    line.add_argument("out", metavar="OUT", type=Path, help="JSON file")
    line.add_argument("--force", action="store_true", help="overwrite OUT")
    arguments = line.parse_args(argv)
    if arguments.out.exists() and not arguments.force:
        line.error(f"{arguments.out}: exists; pass --force to freeze another set")
    try:
        video.check_folder(arguments.out)
        writing.write_json(arguments.out, frozen(), overwrite=True, anything=arguments.force, mark=False)
    except (OSError, video.OutputError) as error:
        line.error(str(error))


if __name__ == "__main__":
    main()
