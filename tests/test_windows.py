"""What Windows lacks is needed nowhere: the packages import without POSIX's modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import wanjax

HIDE = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it raises ImportError
"""


@pytest.mark.parametrize(
    "modules",
    [
        "wanjax, wanjax.writing, wanjax.rooms, wanjax.publishing, wanjax.marks, wanjax.keyframes, wanjax.checkpoint",
        "convert, convert.__main__, convert.inspect",
        "samplers, samplers.inbetween, samplers.files, samplers.video, samplers.explain",
    ],
)
def test_imports_without_posix_modules(modules):
    command = [sys.executable, "-c", f"{HIDE}\nimport {modules}\nprint('imported')"]
    done = subprocess.run(command, cwd=Path(wanjax.__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n", done.stderr


def test_results_are_written_without_posix_modules(tmp_path):
    script = """
import os
from pathlib import Path
from wanjax import writing
here = Path.cwd()
writing.write_json(here / "a.json", {"a": 1})
writing.write_json(here / "a.json", {"a": 2}, overwrite=True)
with writing.terminate_as_interrupt(), writing.beside(here / "b", folder=True) as part:
    part.mkdir()
    writing.write_json(part / "c.json", {})
print(sorted(os.listdir(here)))
"""
    command = [sys.executable, "-c", HIDE + script]
    root = Path(wanjax.__file__).parents[1]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.stdout == "['a.json', 'b']\n", done.stderr
