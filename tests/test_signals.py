"""Signals on a command line: SIGTERM and SIGHUP as Ctrl-C, none of them lost, all handlers back at the end."""

import gc
import signal
import threading
import time

import pytest

from wanjax import writing


def test_signals_become_interrupts_and_come_back():
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        with pytest.raises(KeyboardInterrupt, match=name), writing.terminate_as_interrupt():
            signal.raise_signal(number)
            time.sleep(5)
    seen = []
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with writing.terminate_as_interrupt():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
        with pytest.raises(KeyboardInterrupt), writing.terminate_as_interrupt():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX")
def test_nohup_stays():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with writing.terminate_as_interrupt():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_other_threads_are_left_alone():
    before, errors = signal.getsignal(signal.SIGTERM), []

    def run():
        try:
            with writing.terminate_as_interrupt():
                assert signal.getsignal(signal.SIGTERM) == before
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


def test_an_interrupt_inside_a_collection_is_not_lost():
    """Python drops what is raised in a callback of the garbage collector, and JAX has one."""

    def _xla_gc_callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(_xla_gc_callback)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), writing.terminate_as_interrupt():
        gc.callbacks.append(_xla_gc_callback)
        gc.collect()
        time.sleep(5)
