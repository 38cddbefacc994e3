"""Ctrl-C ends a race between two steps, because in the middle of a step half an update would be lost."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from rich.console import Console

STOPPING = "Stopping after this step, to report what was reached. Another Ctrl-C quits without a report."


@contextlib.contextmanager
def stop_on_ctrl_c(console: Console | None = None) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second Ctrl-C raises KeyboardInterrupt.

    The console prints a message immediately, even during a compilation, when Python's own signal handlers
    have to wait. Only the main thread can handle signals. In any other thread the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        with _call_on_sigint(lambda: console and console.print(STOPPING)):
            yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _call_on_sigint(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` in another thread at the first SIGINT, even while the main thread is busy."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen():
        while number := receiver.recv(1):
            if number[0] == signal.SIGINT:
                return callback()

    thread = threading.Thread(target=listen, daemon=True)
    previous = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        sender.close()
        thread.join()
        receiver.close()
