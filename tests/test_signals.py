"""Signals on a command line: SIGTERM and SIGHUP as Ctrl-C, none of them lost, all handlers back at the end."""

import gc
import signal
import sys
import threading
import time
import weakref

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


def in_a_collection():
    def callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(callback)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(callback)
    gc.collect()


def in_a_weak_reference():
    one = Referred()
    reference = weakref.ref(one, lambda _: signal.raise_signal(signal.SIGTERM))
    del one
    assert reference() is None


def in_a_finalizer():
    one = Finalized()
    del one


class Referred:
    """What a weak reference may be of."""


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("place", [in_a_collection, in_a_weak_reference, in_a_finalizer])
def test_an_interrupt_is_not_lost_where_python_drops_exceptions(place):
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), writing.terminate_as_interrupt():
        place()
        time.sleep(30)
    assert sys.unraisablehook is hook


def test_other_dropped_exceptions_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Broken:
        def __del__(self):
            raise KeyError("lost")

    with writing.terminate_as_interrupt():
        one = Broken()
        del one
    assert [type(one.exc_value) for one in told] == [KeyError]
