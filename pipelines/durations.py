"""Durations in log lines."""

from __future__ import annotations


def minutes_and_seconds(seconds: float) -> str:
    """Return a duration as m:ss; whole seconds, rounded down."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
