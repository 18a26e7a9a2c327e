"""Print the arguments of one experiment of a file, each followed by a NUL byte: ``read_experiment.py FILE NUMBER``, counted from 1."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def read_experiment(text: str, number: int, name: str) -> list[str]:
    """Return the arguments in the line of this number. Empty lines and lines that begin with # do not count.

    Raises ValueError if there is no such line, or if a quote is not closed.
    """
    lines = [(at, line.strip()) for at, line in enumerate(text.splitlines(), 1)]
    experiments = [(at, line) for at, line in lines if line and not line.startswith("#")]
    if not 1 <= number <= len(experiments):
        raise ValueError(
            f"{name} has {len(experiments)} experiments and no number {number}: submit with --array=1-{max(len(experiments), 1)}"
        )
    at, line = experiments[number - 1]
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ValueError(f"line {at} of {name}: {error}; close the quote") from None


if __name__ == "__main__":
    path = Path(sys.argv[1])
    try:
        arguments = read_experiment(path.read_text(encoding="utf-8"), int(sys.argv[2]), path.name)
    except ValueError as problem:
        sys.exit(f"error: {problem}")
    sys.stdout.write("".join(f"{argument}\0" for argument in arguments))
