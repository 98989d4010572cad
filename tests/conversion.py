"""What the tests of conversion share: one small model in the original repository's form, and converted once."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from foreign import CONFIG, plain_params, write_original

from convert import __main__ as command

VAE_FILE = "Wan2.1_VAE.pth"


def write_source(folder: Path) -> Path:
    """The original repository's form of a small model, with a tokenizer."""
    folder.mkdir()
    write_original(folder, CONFIG, plain_params())
    return folder


def equal(tree, wanted):
    jax.tree.map(np.testing.assert_array_equal, tree, wanted)


def refused(capsys, *arguments) -> str:
    """Exit code 2 and the message, one line unless it lists."""
    assert command.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error[error.index("error: ") :]


def started(*arguments, code="from convert.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))", **options):
    """`python -m convert` in a process of its own."""
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options,
    )  # fmt: skip
