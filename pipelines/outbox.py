"""Calls to a server that may be away for a while: they are kept in order and made when it is back.

This module knows nothing of MLflow: the caller says which errors mean that the server is away.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.durations import minutes_and_seconds

T = TypeVar("T")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0

log = logging.getLogger("rediffuse")


@dataclass(frozen=True)
class _Kept:
    call: Callable[[], Any]
    future: Future[Any] | None
    """Gets the result or the error of the call; None if nobody waits for it."""


class Outbox:
    """Makes calls in the order in which they come, each until it has succeeded once.

    While the server answers, a call is made in the caller's thread. If the server is away, the calls are kept and a thread makes
    them as soon as it is back. A call may be made twice if its answer was lost, so it must give the same result twice.

    ``server``: the name for log lines and errors. ``is_away``: whether an error means that the server is away. ``limit_s``: how long
    `ask` and `wait` wait for a server that is away.
    """

    def __init__(self, server: str, is_away: Callable[[Exception], bool], limit_s: float) -> None:
        self.server, self.is_away, self.limit_s = server, is_away, limit_s
        self._kept: deque[_Kept] = deque()
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._error: Exception | None = None
        self._away_since: float | None = None

    @property
    def away(self) -> bool:
        """Whether calls are kept because the server is away."""
        return bool(self._kept)

    def send(self, call: Callable[[], Any]) -> None:
        """Make the call now, or keep it if the server is away. Raises the error of an earlier kept call that failed."""
        self._raise_error()
        self._put(_Kept(call, None))

    def ask(self, call: Callable[[], T]) -> T:
        """Make the call and return its result. Waits for a server that is away; raises ValueError at the limit."""
        self._raise_error()
        future: Future[T] = Future()
        self._put(_Kept(call, future))
        self._wait(future.done, self.limit_s)
        return future.result()

    def wait(self, limit_s: float | None = None) -> None:
        """Return as soon as no call is kept. Raises ValueError at the limit."""
        self._wait(lambda: not self._kept, self.limit_s if limit_s is None else limit_s)
        self._raise_error()

    def _put(self, item: _Kept) -> None:
        with self._sending:  # the calls of two threads stay in order
            if not self._kept:
                try:
                    self._make(item)
                    return
                except Exception as error:
                    if not self.is_away(error):
                        raise
                    self._begin_outage(error)
            with self._changed:
                self._kept.append(item)
                if len(self._kept) == 1:
                    threading.Thread(target=self._deliver, name="outbox", daemon=True).start()

    def _begin_outage(self, error: Exception) -> None:
        if self._away_since is not None:
            return
        self._away_since = time.monotonic()
        reason = " ".join(str(error).split())[-200:]
        log.warning("%s is away: work goes on, and what is logged is kept until it is back (%s)", self.server, reason)

    def _deliver(self) -> None:
        """Make the kept calls. Runs in a thread of its own until none is left."""
        pause = FIRST_PAUSE_S
        while True:
            item = self._kept[0]
            try:
                self._make(item)
            except Exception as error:
                if self.is_away(error):
                    self._begin_outage(error)
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
                if self._error is None:
                    self._error = error
            if self._away_since is not None:
                away, self._away_since = self._away(), None
                log.info("%s is back after %s: what was kept is logged now", self.server, away)
            pause = FIRST_PAUSE_S
            with self._changed:
                self._kept.popleft()
                self._changed.notify_all()
                if not self._kept:
                    return

    def _make(self, item: _Kept) -> None:
        """Make a call. An error other than an outage goes to the one who waits for it, if there is one."""
        try:
            result = item.call()
        except Exception as error:
            if item.future is None or self.is_away(error):
                raise
            item.future.set_exception(error)
        else:
            if item.future is not None:
                item.future.set_result(result)

    def _wait(self, condition: Callable[[], bool], limit_s: float) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, limit_s):
                raise ValueError(
                    f"{self.server} has been away for {self._away()}, and what was logged meanwhile is not stored: start it and run the "
                    "same command again, which resumes and logs what is missing; tracking.wait_minutes sets how long a stage waits"
                )

    def _away(self) -> str:
        return minutes_and_seconds(time.monotonic() - (self._away_since or time.monotonic()))

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
