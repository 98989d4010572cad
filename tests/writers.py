"""Small results of several files, and processes that write them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from wanjax import marks, writing
from wanjax.writing import Target

ROOT = Path(writing.__file__).parents[1]
FRAMES = np.arange(3 * 16 * 16 * 3, dtype=np.uint32).reshape(3, 16, 16, 3).astype(np.uint8)

# `wanjax/__init__.py` imports JAX, which these scripts do not need and which dislikes forks.
LIGHT = f"""
import sys, types
wanjax = types.ModuleType("wanjax")
wanjax.__path__ = [{str(ROOT / "wanjax")!r}]
sys.modules["wanjax"] = wanjax
sys.path.insert(0, {str(ROOT)!r})
import json, os, signal, time
from pathlib import Path
from wanjax import marks, publishing, rooms, writing
from wanjax.writing import OutputError, Target
"""


def start(script: str, *arguments: object, cwd: Path) -> subprocess.Popen:
    code = LIGHT + textwrap.dedent(script)
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def group(folder: Path) -> list[Target]:
    return [Target(folder / "frames", folder=True), Target(folder / "sheet.json"), Target(folder / "clip.json")]


def write_group(parts, who: str) -> None:
    parts[0].mkdir()
    for path in (parts[0] / "0.json", *parts[1:]):
        path.write_text(json.dumps(marks.marked({"by": who})))


def writers(folder: Path) -> list[str]:
    """Whose the three files of a group are."""
    return [json.loads((folder / name).read_text())["by"] for name in ("frames/0.json", "sheet.json", "clip.json")]
