"""The command line of `python -m samplers.inbetween`. No logic lives here."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from samplers import flags
from samplers.options import Parser, parser, renamed

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Task:
    """What a command line asks for, checked.

    Attributes:
      notes: lines that the user should see.
      digest: what the hosts of a run must have in common.
      make: does it, given whether bars are drawn and the folder of compiled programs; gives lines for the user, and
        whether all went well.
      stopped: what to say when it is interrupted.
    """

    notes: Sequence[str]
    digest: str
    make: Callable[[bool, Path | None], tuple[str, bool]]
    stopped: Callable[[], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 1 for a failed run, 130 after Ctrl-C, SIGTERM."""
    p, arguments = parser(), list(sys.argv[1:] if arguments is None else arguments)
    options = vars(p.parse_args(renamed(arguments)))
    progress = not options["quiet"]
    note = flags.settle(distributed=options["distributed"] is not None)
    # Here, as they take a second: not for --help or a mistyped option.
    from samplers import cache
    from wanjax import hosts
    from wanjax.writing import terminate_as_interrupt

    with terminate_as_interrupt(), hosts.Company(p.prog) as company:
        try:
            if options["distributed"] is not None:
                company.join(options["distributed"])
                if options["devices"] is None and not options["mesh"]:
                    p.set_defaults(devices="all")
            place = cache.enable() if options["compile_cache"] else None
            programs = None if place is None else cache.programs(place)
            _check_devices()
            task = _task(p, arguments)
            company.agree("keyframes, settings, model or versions", task.digest)
        except KeyboardInterrupt:
            return company.fail(INTERRUPTED, "interrupted; nothing was written")
        except (ValueError, OSError) as error:
            return company.fail(BAD_INPUT, error)
        for line in (*task.notes, *([note] if note else [])) if hosts.is_first() else ():
            print(f"note: {line}", file=sys.stderr)
        return _make(company, task, progress and hosts.is_first(), programs)


def _task(p: Parser, arguments: Sequence[str]) -> Task:
    """ValueError for whatever is wrong."""
    from samplers import asked, files, jobs, latents, resume, storyboard

    options = asked.parse(p, arguments)
    if options["decode"] is not None:
        decoding = latents.prepare(options["decode"], **asked.decoding(options))
        return Task(decoding.notes, decoding.digest, partial(_decode, decoding), lambda: "nothing was written")
    if options["jobs"] is not None or options["seeds"] is not None or options["count"] is not None:
        several = jobs.read(options["jobs"], p, arguments) if options["jobs"] is not None else jobs.variants(options)
        return Task(several.notes, several.digest, partial(_several, several), lambda: "run it again to go on")
    if options["storyboard"] is not None:
        board = storyboard.prepare(**asked.board(options))
        return Task(board.notes, board.digest, partial(_film, board), partial(resume.left, board.kept, board.steps))
    job = files.prepare(**asked.one(options))
    return Task(job.notes, job.digest, partial(_one, job), partial(resume.left, job.kept, job.settings.steps))


def _decode(decoding: Any, progress: bool, programs: Path | None) -> tuple[str, bool]:
    from samplers import latents

    seconds = latents.make(decoding)
    return _paths(decoding.outputs, seconds), True


def _several(several: Any, progress: bool, programs: Path | None) -> tuple[str, bool]:
    from samplers import jobs
    from wanjax import hosts

    well = jobs.make(several, progress, programs, _say if hosts.is_first() else lambda line: None)
    return "" if several.report is None else str(several.report), well


def _one(job: Any, progress: bool, programs: Path | None) -> tuple[str, bool]:
    from samplers import files

    return _paths(job.outputs, files.make(job, progress, programs).get("seconds", {})), True


def _film(board: Any, progress: bool, programs: Path | None) -> tuple[str, bool]:
    from samplers import storyboard

    return _paths(board.outputs, storyboard.make(board, progress)["seconds"]), True


def _paths(outputs: Any, seconds: dict[str, float]) -> str:
    told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return f"{outputs.video}  ({told})\n{outputs.sheet}\n{outputs.settings}"


def _make(company: Any, task: Task, progress: bool, programs: Path | None) -> int:
    """Does a task, of several `hosts.Company` together; returns the exit code."""
    import jax

    from samplers.preview import PreviewWarning
    from wanjax import hosts
    from wanjax.tokenizer import PromptCut

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCut)  # said above, in one line
            warnings.simplefilter("always", PreviewWarning)
            warnings.showwarning = _note
            told, well = task.make(progress, programs)
        company.done()
    except KeyboardInterrupt:
        return company.fail(INTERRUPTED, f"interrupted; {task.stopped()}")
    except OSError as error:
        return company.fail(FAILED, f"{reason(error)}; {task.stopped()}")
    except (ValueError, FloatingPointError) as error:
        return company.fail(FAILED, error)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        return company.fail(FAILED, f"{reason(error)}; {task.stopped()}")
    if hosts.is_first() and told:
        _say(told)
    return 0 if well else FAILED


def reason(error: Exception) -> str:
    """What ended a run, in one line with the mend."""
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        return f"{error}{'; free some space' if error.errno == errno.ENOSPC else ''}"
    if isinstance(error, ValueError | FloatingPointError):
        return str(error)
    mend = "if memory ran out, try --memory stage or stream, --weights int8, --vae-memory, a smaller size, or bfloat16"
    return f"{(str(error).splitlines() or ['out of memory'])[0]}; {mend}"


def _note(message: Warning | str, *_: Any) -> None:
    """A warning as a line for the user, without the code that it came from."""
    print(f"note: {' '.join(str(message).split())}", file=sys.stderr)


def _say(text: str) -> None:
    """Prints to whoever still listens: the files are written, and a closed pipe changes nothing of that."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:  # a closed pipe, a full disk behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at the end


def _check_devices() -> None:
    """Raises ValueError, in one line, where JAX has none of the platforms that were asked for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter of a platform whose library finds no device
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"devices: JAX has none of JAX_PLATFORMS={asked}{reason and f' ({reason})'}; install wanjax[cuda12], "
            "[cuda13] or [tpu] on such a machine, or unset JAX_PLATFORMS"
        ) from error
