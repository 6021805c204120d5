"""Signals are remembered while they are caught, and a second SIGINT does not wait."""

import os
import signal
import threading

import pytest

from peftctl import signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_remembered_and_handlers_come_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with signals.caught() as stop:
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == number, "the first one decides the exit code"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert ("a second Ctrl-C leaves at once" in capfd.readouterr().err) == (number == signal.SIGINT)


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), signals.caught():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.fault(10)
def test_second_interrupt_leaves_at_once() -> None:
    child = os.fork()
    if child == 0:
        with signals.caught():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_other_threads_run_without_handlers() -> None:
    found: list[object] = []

    def work() -> None:
        with signals.caught() as stop:
            found.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
