"""Ctrl-C as a request: the update in progress is finished and saved before the run ends."""

from __future__ import annotations

import logging
import signal
import threading

_log = logging.getLogger("arvis")


class Interrupt:
    """Within its `with` block the first SIGINT or SIGTERM sets `asked`, a second one raises KeyboardInterrupt.

    Signals can be handled in the main thread only; elsewhere it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        _log.warning("stopping after this step")
