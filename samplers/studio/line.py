"""One thread that computes, for people in the order in which they came.

The device does one thing at a time, so there is one thread for it; whoever waits hears how many are before him, and can
stop while he waits or between two steps.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MOST = 16
"""People that may wait."""
WARMING = "warm-up"
"""Owner of the ticket by which the model is warmed up."""


class Stopped(Exception):
    """Somebody asked for the end of what was computed for him."""


@dataclass(eq=False)
class Ticket:
    """What one person waits for.

    Attributes:
      owner: whose it is.
      work: what is done; it is given the ticket, to tell how far it is (`tell`) and to ask whether to stop (`check`).
      said: what it told, for `Line.follow`; a pair of a kind and a value.
    """

    owner: str
    work: Callable[["Ticket"], Any]
    said: queue.Queue = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)

    def tell(self, value: Any) -> None:
        """Says how far it is."""
        self.said.put(("progress", value))

    def check(self) -> None:
        """Raises Stopped if it is to stop."""
        if self.stop.is_set():
            raise Stopped


class Line:
    """The thread and who waits for it."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._waiting, self._now = most, deque[Ticket](), None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def join(self, owner: str, work: Callable[[Ticket], Any]) -> Ticket:
        """Takes a place at the end. ValueError: too many wait, or the line is closed."""
        ticket = Ticket(owner, work)
        with self._changed:
            if self._closed:
                raise ValueError("the studio is closing; start it again")
            if len(self._waiting) >= self._most:
                raise ValueError(f"{self._most} clips are waiting already; try again in a minute")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def ahead(self, ticket: Ticket) -> int:
        """How many are before it, the one that is computed among them; 0 for that one itself."""
        with self._changed:
            if ticket not in self._waiting:
                return 0
            return self._waiting.index(ticket) + (self._now is not None)

    def warming(self) -> bool:
        """Whether the model is being warmed up now."""
        with self._changed:
            return self._now is not None and self._now.owner == WARMING

    def stop(self, owner: str) -> None:
        """Stops everything of one person: what waits at once, what is computed within a step."""
        with self._changed:
            for ticket in [*self._waiting, *([self._now] if self._now else [])]:
                if ticket.owner == owner:
                    ticket.stop.set()
            gone = [ticket for ticket in self._waiting if ticket.stop.is_set()]
            for ticket in gone:
                self._waiting.remove(ticket)
                ticket.said.put(("error", Stopped()))

    def follow(self, ticket: Ticket, every: float = 0.5) -> Iterator[tuple[str, Any]]:
        """("waiting", how many are before), ("progress", what was told), and at the end ("done", result).

        Raises:
          What the work raised; Stopped.
        """
        last = None
        while True:
            if (ahead := self.ahead(ticket)) and ahead != last:
                last = ahead
                yield "waiting", ahead
            try:
                kind, value = ticket.said.get(timeout=every)
            except queue.Empty:
                continue
            if kind == "error":
                raise value
            yield kind, value
            if kind == "done":
                return

    def close(self, timeout: float = 60.0) -> None:
        """Stops everything and waits for the thread."""
        with self._changed:
            self._closed = True
            owners = {ticket.owner for ticket in [*self._waiting, *([self._now] if self._now else [])]}
            self._changed.notify_all()
        for owner in owners:
            self.stop(owner)
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._now = self._waiting.popleft()
            ticket = self._now
            try:
                ticket.check()
                ticket.said.put(("done", ticket.work(ticket)))
            except Exception as error:  # of whatever kind: it is told to who asked, and the thread goes on
                ticket.said.put(("error", error))
            finally:
                with self._changed:
                    self._now = None
