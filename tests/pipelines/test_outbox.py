from __future__ import annotations

import logging
import threading
import time

import pytest

from pipelines.outbox import Outbox

LIMIT_S = 20


class Store:
    """A store that can be away; it keeps what it was given."""

    def __init__(self) -> None:
        self.away = False
        self.got: list[int] = []

    def put(self, value: int) -> int:
        if self.away:
            raise ConnectionError("refused")
        self.got.append(value)
        return len(self.got)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def outbox(store: Store) -> Outbox:
    return Outbox("the server", lambda error: isinstance(error, ConnectionError), LIMIT_S)


def test_calls_of_an_outage_arrive_in_order_and_once(store: Store, outbox: Outbox) -> None:
    for value in range(100):
        store.away = 20 <= value < 70
        outbox.send(lambda value=value: store.put(value))
    outbox.wait()
    assert store.got == list(range(100))


def test_sender_is_not_held_up_while_the_store_is_away(store: Store, outbox: Outbox) -> None:
    store.away = True
    began = time.monotonic()
    for value in range(1000):
        outbox.send(lambda value=value: store.put(value))
    assert time.monotonic() - began < 1
    assert outbox.away and store.got == []
    store.away = False
    outbox.wait()
    assert store.got == list(range(1000)) and not outbox.away


def test_question_waits_for_the_calls_before_it_and_for_the_store(store: Store, outbox: Outbox) -> None:
    store.away = True
    outbox.send(lambda: store.put(1))
    timer = threading.Timer(0.3, lambda: setattr(store, "away", False))
    timer.start()
    assert outbox.ask(lambda: store.put(2)) == 2
    assert store.got == [1, 2]


def test_each_outage_is_two_log_lines(store: Store, outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rediffuse")
    for _ in range(2):
        store.away = True
        for value in range(5):
            outbox.send(lambda value=value: store.put(value))
        time.sleep(1.2)  # several attempts
        store.away = False
        outbox.wait()
    lines = [record.getMessage() for record in caplog.records]
    assert [("is away:" in line, "is back after" in line) for line in lines] == [(True, False), (False, True)] * 2


def test_limit_names_how_to_resume(store: Store, outbox: Outbox) -> None:
    store.away = True
    outbox.send(lambda: store.put(1))
    with pytest.raises(
        ValueError,
        match=r"the server has been away for 0:00, and what was logged meanwhile is not stored.*wait_minutes",
    ):
        outbox.wait(0.2)
    outbox.limit_s = 0.2
    with pytest.raises(ValueError, match="run the same command again"):
        outbox.ask(lambda: store.put(2))


def test_error_that_is_no_outage_is_raised_at_once_and_once(store: Store, outbox: Outbox) -> None:
    def refuse() -> None:
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        outbox.send(refuse)
    with pytest.raises(PermissionError):
        outbox.ask(refuse)
    store.away = True
    outbox.send(lambda: store.put(1))
    outbox.send(refuse)
    outbox.send(lambda: store.put(2))
    store.away = False
    with pytest.raises(PermissionError):
        outbox.wait()
    assert store.got == [1, 2], "later calls are made"
    outbox.send(lambda: store.put(3))
    assert store.got == [1, 2, 3]


def test_calls_of_many_threads_all_arrive(store: Store, outbox: Outbox) -> None:
    def send(first: int) -> None:
        for value in range(first, first + 200):
            outbox.send(lambda value=value: store.put(value))

    threads = [threading.Thread(target=send, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        store.away = not store.away
        time.sleep(0.02)
    store.away = False
    for thread in threads:
        thread.join()
    outbox.wait()
    assert len(store.got) == 1600
    for number in range(8):
        own = [value for value in store.got if value // 1000 == number]
        assert own == sorted(own)
