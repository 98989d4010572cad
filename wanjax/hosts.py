"""Several hosts that compute one thing together: how they join, agree, end; arrays that lie on all of them.

Every host runs the same command. Beside JAX's own collectives they speak through the key-value store of JAX's
coordination service, which works before any device does and while one of them waits for the others: there each says
what it is about to do, the first that fails says why, and host 0 says that all is done. With one host nothing here does
anything.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Sharding

from wanjax import undo

AUTO = "auto"
_END = "wanjax/end"
_FOREVER = 2**31 - 1
"""Milliseconds, 24 days."""
_GRACE = 10.0
"""Seconds that a host has to end by itself once another failed; inside a collective it cannot."""


@dataclass(frozen=True)
class Address:
    """Where host 0 listens, and which of how many this one is."""

    coordinator: str
    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """From HOST:PORT,NUMBER,COUNT. ValueError, one line, for anything else."""
        try:
            coordinator, number, count = text.split(",")
            host, port = coordinator.rsplit(":", 1)
            address = cls(coordinator, int(number), int(count))
            usable = bool(host) and 0 < int(port) < 2**16 and 0 <= address.number < address.count
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"distributed {text!r}: give {AUTO}, or HOST:PORT,NUMBER,COUNT such as 10.0.0.2:1234,0,2 "
                             "with the same address of host 0 everywhere and a NUMBER from 0 for each")  # fmt: skip
        return address


def _join(where: str | Address, timeout: int, lost: Callable[..., None]) -> None:
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    how: dict[str, Any] = {"initialization_timeout": timeout}
    if isinstance(where, Address):
        how |= {"coordinator_address": where.coordinator, "num_processes": where.count, "process_id": where.number,
                "cluster_detection_method": "deactivate"}  # fmt: skip
    pool = ThreadPoolExecutor(1, thread_name_prefix="join")
    try:
        with _told(lost):
            pool.submit(jax.distributed.initialize, **how).result()  # so that Ctrl-C is heard meanwhile
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        if "bad_cast" in reason:  # see `_told`
            reason = f"waited {timeout} s"
        mend = ("give HOST:PORT,NUMBER,COUNT instead" if where == AUTO
                else "check that all hosts were started, with one address and different numbers")  # fmt: skip
        raise ValueError(f"distributed {where if where == AUTO else where.coordinator}: the hosts do not find each "
                         f"other ({reason}); {mend}") from error  # fmt: skip
    finally:
        pool.shutdown(wait=False)


@contextlib.contextmanager
def _told(lost: Callable[..., None]) -> Iterator[None]:
    """Inside, `jax.distributed.initialize` makes a client that calls `lost` when others cannot be reached any more.

    By itself it ends the process with a stack trace, also where they did not come, and JAX has no option for it. (Once
    they came, jaxlib 0.10 fails to call Python and ends the process with a line of its own.)
    """
    from jax._src import distributed

    library = distributed._jax
    own = library.get_distributed_runtime_client
    library.get_distributed_runtime_client = partial(own, missed_heartbeat_callback=lost)
    try:
        yield
    finally:
        library.get_distributed_runtime_client = own


def count() -> int:
    """How many hosts there are. Touches no device."""
    return _state().num_processes


def number() -> int:
    """Of this host, from 0."""
    return _state().process_id


def is_first() -> bool:
    """Whether this is host 0, the one that writes and prints."""
    return number() == 0


def check_mesh(devices: int) -> None:
    """ValueError for a mesh of so many devices that leaves some out, where there are several hosts."""
    if count() > 1 and devices != jax.device_count():
        raise ValueError(f"devices: {count()} hosts have {jax.device_count()} together, {devices} were asked "
                         "for; several hosts share all of them, so leave --devices away or give all")  # fmt: skip


class Company:
    """The hosts of a run, as one of them sees them: this one alone until `join`. As context it tells the others of any
    exception that leaves it.

    A thread listens for the end. Once another host has failed, this one gets a KeyboardInterrupt, and `failure` says
    what it was; a host that does not come to it (it waits for the failed one inside a collective) ends with that
    failure's line and exit code anyway, after what `wanjax.undo` was told inside the context is undone.

    Args:
      program: what messages begin with.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.failure: tuple[int, str] | None = None
        self._left, self._joined = threading.Event(), threading.Event()
        self._undoing, self._stack = undo.Undoing(), contextlib.ExitStack()

    def __enter__(self) -> "Company":
        self._undoing = self._stack.enter_context(undo.collected())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        if error is not None and count() > 1 and not isinstance(error, SystemExit):
            traceback.print_exception(error)
            self.fail(1, f"failed ({kind.__name__})")

    def join(self, where: str, timeout: int = 300) -> None:
        """Joins this process with those of the other hosts; before anything touches a device.

        Args:
          where: `AUTO` on TPU pods, SLURM, Open MPI and Kubernetes, where JAX finds the others, or what `Address.parse`
            takes.
          timeout: seconds to wait for them.

        Raises:
          ValueError: no cluster here, an address that cannot be used, or hosts that did not come; one line.
        """
        _join(where if where == AUTO else Address.parse(where), timeout, self._lost)
        self._joined.set()
        if count() > 1:
            threading.Thread(target=self._listen, name="hosts", daemon=True).start()

    def agree(self, what: str, token: str) -> None:
        """Waits until all hosts are here, with the same token.

        Raises:
          ValueError: another host has another token. KeyboardInterrupt: another host failed meanwhile.
        """
        if count() == 1:
            return
        client = _state().client
        client.key_value_set(f"wanjax/{what}/{number()}", token)
        tokens = [_wait(client, f"wanjax/{what}/{host}") for host in range(count())]
        others = [str(host) for host, other in enumerate(tokens) if other != tokens[0]]
        if others:
            raise ValueError(f"host {', '.join(others)}: {what} that are not those of host 0; run the same "
                             "command on the same files everywhere")  # fmt: skip

    def done(self) -> None:
        """Host 0: says that the results are written. The others wait for that.

        Raises:
          KeyboardInterrupt: another host failed meanwhile.
        """
        if count() == 1:
            return
        if is_first():
            _state().client.key_value_set(_END, "0")
        elif _wait(_state().client, _END) != "0":
            raise KeyboardInterrupt
        self._left.set()

    def fail(self, code: int, message: object) -> int:
        """Prints the message and, where there are other hosts, ends this process with the code and them with both.

        Of several hosts that fail the first is heard: a collective that broke since another host failed says what that
        one said.

        Returns:
          The code; only with one host.
        """
        if count() == 1:
            print(f"{self.program}: error: {message}", file=sys.stderr)
            return code
        if not self._joined.is_set():
            print(f"{self.program}: error: {message}", file=sys.stderr, flush=True)
            os._exit(code)  # JAX's own end would speak of hosts that never came
        self._left.set()
        time.sleep(1 if self.failure is None else 0)
        heard = self.failure
        if heard is None:
            try:
                _state().client.key_value_set(_END, f"{code} host {number()}: {message}")
            except jax.errors.JaxRuntimeError:  # another one was faster, or host 0 is gone
                heard = self.failure
        code, message = heard or (code, message)
        print(f"{self.program}: error: {message}", file=sys.stderr)
        return self._leave(code)

    def _listen(self) -> None:
        try:
            text = _state().client.blocking_key_value_get(_END, _FOREVER)
        except jax.errors.JaxRuntimeError as error:
            text = f"1 host 0: is gone ({' '.join(str(error).split())[:100]})"
        code, _, message = text.partition(" ")
        self.failure = (int(code), message) if int(code) else None
        if self.failure is None or self._left.is_set():
            return
        if hasattr(signal, "pthread_kill"):  # to the main thread, so that it also wakes up
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)
        if not self._left.wait(_GRACE):
            self._undoing.run()
            print(f"{self.program}: error: {message}", file=sys.stderr)
            self._leave(int(code))

    def _lost(self, *status: Any) -> None:
        """Another host ended without a word, or cannot be reached any more."""
        if self._joined.is_set() and not self._left.is_set():
            reason = " ".join(" ".join(map(str, status)).split())[:200]
            self._undoing.run()
            print(f"{self.program}: error: another host is gone ({reason})", file=sys.stderr, flush=True)
            os._exit(1)

    def _leave(self, code: int) -> NoReturn:
        """Ends the process at once: JAX's own end waits for hosts that may not come. Host 0, which the others speak
        through, goes last."""
        client = _state().client
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"wanjax/left/{number()}", "")
            until = time.monotonic() + 2 * _GRACE
            for host in range(1, count() if is_first() else 1):
                client.blocking_key_value_get(f"wanjax/left/{host}", max(1, round(1000 * (until - time.monotonic()))))
        time.sleep(0.5 if is_first() else 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def meet(what: str) -> None:
    """Waits until all hosts are here: before a collective, in which one could not hear that another had failed.

    Args:
      what: names the place. Who meets there again does not wait.

    Raises:
      KeyboardInterrupt: another host failed meanwhile.
    """
    if count() == 1:
        return
    client = _state().client
    client.key_value_set(f"wanjax/met/{what}/{number()}", "", allow_overwrite=True)
    for host in range(count()):
        _wait(client, f"wanjax/met/{what}/{host}")


def put(x: jax.Array | np.ndarray, where: Sharding) -> jax.Array:
    """An array that every host has, on devices of all of them; each keeps its own shards."""
    if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, where, lambda index: own[index])


def fetch(x: jax.Array) -> np.ndarray:
    """All of an array in the memory of every host; all of them must ask for it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def from_first(
    key: str, arrays: dict[str, np.ndarray] | None, like: dict[str, np.ndarray]
) -> dict[str, np.ndarray] | None:
    """What host 0 has, on every host; all of them must ask for it.

    Args:
      key: names it among what is asked for in a run.
      arrays: of host 0; None for nothing.
      like: arrays of the same names, shapes and dtypes.

    Raises:
      KeyboardInterrupt: another host failed meanwhile.
    """
    if count() == 1:
        return arrays
    client, name = _state().client, f"wanjax/there/{key}"
    if is_first():
        client.key_value_set(name, str(arrays is not None), allow_overwrite=True)
    # Told before any collective, in which a host could not hear that another one failed.
    if _wait(client, name) != "True":
        return None
    from jax.experimental import multihost_utils

    given = multihost_utils.broadcast_one_to_all(arrays if is_first() else like)
    return {path: np.asarray(array) for path, array in given.items()}


def _state() -> Any:
    """JAX's own knowledge of its processes, and its client of the coordination service; it has no public name."""
    from jax._src import distributed

    return distributed.global_state


def _wait(client: Any, key: str) -> str:
    """The value of a key, once somebody sets it; Ctrl-C is heard."""
    while True:
        try:
            return client.blocking_key_value_get(key, 500)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
