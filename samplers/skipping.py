"""Which passes of a run are guessed from the two before instead of run: rules, and schedules found for a model.

Everything here is arithmetic on the host. `wanjax.guidance` guesses; `samplers.calibrate` finds schedules.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wanjax import marks
from wanjax.settings import refuse, whole

if TYPE_CHECKING:
    from samplers.plan import Settings

MOST = 0.6
"""The largest share of steps that may be asked for."""
FILE = "skip.json"
"""Of a schedule in a model's folder."""
COMMAND = "python -m samplers.calibrate"


def plain(value: Any) -> Any:
    """A setting as JSON and comparison need it: a list or array becomes a tuple; what is no such stays as it is."""
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(one.item() if isinstance(one, np.generic) else one for one in value)
    return value.item() if isinstance(value, np.generic) else value


def check(value: Any, steps: int) -> None:
    """Raises ValueError, in one line, for what is neither a share from 0 to `MOST` nor steps that may be skipped.

    Args:
      steps: a number that `schedule.check_steps` passed.
    """
    if isinstance(value, tuple):
        chosen = [whole("skip passes", step, 0, steps - 1) for step in value]
        twice = sorted({step for step in chosen if chosen.count(step) > 1})
        refuse((twice, f"skip passes {', '.join(map(str, twice))}: given twice; give each step once"))
        never = sorted(set(chosen) - set(free(steps)))
        refuse((never, f"skip passes {', '.join(map(str, never))}: the first two steps and the last are always run; "
                       + (f"give steps from 2 to {steps - 2}" if steps > 3 else "take more steps")))  # fmt: skip
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST
        refuse((not good, f"skip passes {value!r}: give a share of the steps from 0 to {MOST:g}, or the steps"))


def free(steps: int, kab: Sequence[int] = ()) -> tuple[int, ...]:
    """Steps that may be skipped: not the first two, not the last, none of `kab`."""
    return tuple(step for step in range(2, steps - 1) if step not in set(kab))


def count(share: float, steps: int, free: Sequence[int]) -> int:
    """How many steps a share is, as far as there are so many."""
    return min(math.floor(share * steps + 0.5), len(free))


def even(number: int, free: Sequence[int]) -> tuple[int, ...]:
    """So many of the steps, spread evenly over them."""
    return tuple(free[math.floor((i + 0.5) * len(free) / number)] for i in range(number))


def chosen(value: float | tuple[int, ...], steps: int, kab: Sequence[int] = ()) -> tuple[int, ...]:
    """The steps that a checked setting skips, ascending.

    Args:
      kab: steps that must not be skipped besides.

    Raises:
      ValueError: a step of those.
    """
    allowed = free(steps, kab)
    if not isinstance(value, tuple):
        return even(count(value, steps, allowed), allowed)
    held = sorted(set(value) - set(allowed))
    refuse((held, f"skip passes {', '.join(map(str, held))}: KAB acts there; give others, or let those be skipped"))
    return tuple(sorted(value))


def flags(skipped: Sequence[int], guidance: np.ndarray, together: bool) -> np.ndarray | None:
    """Skip flags of each step and pass, bool [steps, 2]; None where none is skipped.

    A pass is skipped only where it would run and has run twice before: the second one runs in the first two steps of
    a guidance interval, whatever is asked for.

    Args:
      skipped: steps in which passes are to be skipped.
      guidance: scale of each step [steps].
      together: whether the two passes run as one, so that they skip together or not at all.
    """
    runs = np.stack([np.ones(len(guidance), bool), np.asarray(guidance) != 1], 1)
    found, real = np.zeros(runs.shape, bool), np.zeros(2, int)
    for step in range(len(runs)):
        found[step] = runs[step] & (real >= 2) & (step in skipped)
        if together and runs[step].all():
            found[step] = found[step].all()
        real += runs[step] & ~found[step]
    return found if found.any() else None


def passes(skip: np.ndarray | None, guidance: np.ndarray) -> tuple[int, int]:
    """(passes that are skipped, passes that there are without) of a run, of flags and scales as in `flags`."""
    skipped = 0 if skip is None else int(np.sum(skip[: len(guidance)]))
    return skipped, int(len(guidance) + np.sum(np.asarray(guidance) != 1))


@dataclass(frozen=True)
class Schedule:
    """Steps to skip, and what they were found for; `samplers.calibrate` writes it.

    Attributes:
      skip_passes: steps.
      solver, steps, schedule, shift, method: of the settings; method as plain values.
      error: relative distance of the latents from those of the whole run, root mean square over `clips` clips.
    """

    skip_passes: tuple[int, ...]
    solver: str
    steps: int
    schedule: str
    shift: float
    method: Any
    error: float
    clips: int

    @classmethod
    def of(cls, settings: "Settings", skipped: Sequence[int], error: float, clips: int) -> "Schedule":
        """For settings."""
        return cls(plain(np.asarray(skipped)), **_key(settings), error=error, clips=clips)

    def report(self) -> dict[str, Any]:
        """For JSON, as `read` takes it."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "Schedule":
        """From a file. ValueError, in one line: not there, or nothing that `report` gave."""
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**{name: value for name, value in own.items() if name != marks.KEY})
            check(tuple(found.skip_passes), found.steps)
        except OSError as error:
            raise ValueError(f"skip passes {path}: {error.strerror or error}; {_mend()}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"skip passes {path}: not a schedule of {COMMAND}; {_mend()}") from error
        return replace(found, skip_passes=tuple(found.skip_passes))


def settled(settings: "Settings", folder: Path) -> "Settings":
    """Settings whose `skip_passes` may be "auto", for `FILE` of the model's folder, or the path of such a file.

    Raises:
      ValueError: in one line with the mend: no such file, or one that was made for something else.
    """
    asked = settings.skip_passes
    if not isinstance(asked, str | Path):
        return settings
    path = folder / FILE if str(asked) == "auto" else Path(asked)
    refuse((str(asked) == "auto" and not path.is_file(),
            f"skip passes auto: the model's folder has no {FILE}; {_mend(path)}"))  # fmt: skip
    found = Schedule.read(path)
    wanted = _key(settings)
    other = [name for name, value in wanted.items() if getattr(found, name) != value]
    refuse((other, f"skip passes {path}: made for another {', '.join(other)}; {_mend()}"))
    return replace(settings, skip_passes=found.skip_passes)


def _key(settings: "Settings") -> dict[str, Any]:
    """What a schedule is for, as it comes out of JSON."""
    names = ("solver", "steps", "schedule", "shift")
    own = {name: getattr(settings, name) for name in names} | {"method": asdict(settings.method)}
    return json.loads(json.dumps(own, default=plain))


def _mend(path: Path | None = None) -> str:
    """How to get a schedule."""
    where = "" if path is None else f" --out {path}"
    return f"make one by {COMMAND}{where}, or give a share such as 0.3"
