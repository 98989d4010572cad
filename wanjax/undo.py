"""What is to be undone when a process ends while its main thread waits where no exception reaches it.

Context managers undo what they did, in the thread that works. Where that waits inside a collective for a host that is
gone, another thread ends the process (`hosts.Company`), after it has called what is registered here.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Call = Callable[[], None]


class Undoing:
    """Calls of the blocks that are open; `run` may come from any thread, while the working one goes on."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count()

    def run(self) -> None:
        """All of them, the last first; what fails is left as a process that is killed leaves it."""
        for number in sorted(self._calls, reverse=True):
            call = self._calls.get(number)
            with contextlib.suppress(OSError):
                if call is not None:
                    call()

    @contextlib.contextmanager
    def holding(self, call: Call) -> Iterator[None]:
        """Registers a call inside."""
        number = next(self._numbers)
        self._calls[number] = call
        try:
            yield
        finally:
            del self._calls[number]


_HERE: ContextVar[Undoing | None] = ContextVar("undoing", default=None)


@contextlib.contextmanager
def collected() -> Iterator[Undoing]:
    """Inside, `undone` of this thread goes to what is yielded."""
    here = Undoing()
    token = _HERE.set(here)
    try:
        yield here
    finally:
        _HERE.reset(token)


@contextlib.contextmanager
def undone(call: Call) -> Iterator[None]:
    """Inside, a call that a process makes which has to end at once; without `collected` none is made.

    Args:
      call: comes from another thread than this one, which may go on at any moment, and may raise OSError.
    """
    here = _HERE.get()
    with contextlib.nullcontext() if here is None else here.holding(call):
        yield
