"""Ctrl-C between two steps instead of in the middle of one, where half an update would be lost."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from rich.console import Console

STOPPING = "Stopping after this step, to report what was reached. Another Ctrl-C quits without a report."


@contextlib.contextmanager
def stop_on_ctrl_c(console: Console | None = None) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises KeyboardInterrupt.

    The console prints a message at once, even while a program is compiled and Python's own signal handlers
    wait. Outside the main thread Ctrl-C is left alone, and the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        with _at_once(lambda: console and console.print(STOPPING)):
            yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _at_once(say: Callable[[], None]) -> Iterator[None]:
    """Call `say` in another thread at the first SIGINT, even while the main thread is busy."""
    listening, heard = socket.socketpair()
    heard.setblocking(False)

    def listen():
        while number := listening.recv(1):
            if number[0] == signal.SIGINT:
                return say()

    thread = threading.Thread(target=listen, daemon=True)
    before = signal.set_wakeup_fd(heard.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        heard.close()
        thread.join()
        listening.close()
