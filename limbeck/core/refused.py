"""The one exception limbeck raises on purpose, and how what fails in somebody's code becomes one."""

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(ValueError):
    """Bad input, said in one sentence: the thing, what was found, what was expected, the fix."""


@contextmanager
def said(who: str, what: str) -> Iterator[None]:
    """What fails inside is said in one sentence: `who` cannot `what`, and torch's own first line."""
    try:
        yield
    except Refused:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise Refused(f"{who} cannot {what}: {next(iter(str(error).splitlines()), repr(error))}") from error
