"""Every error that ranvier raises on purpose.

A message names the stage, the node or file, what was found, what is allowed, and a way out.
"""

from __future__ import annotations


class RanvierError(Exception):
    """Root of all errors that a user can act on; the command line turns it into exit status 2."""


class ShapeError(RanvierError, ValueError):
    """An array or a node has a shape that its place does not allow."""


class RangeError(RanvierError, ValueError):
    """A value lies outside the range that its type or the chip allows."""


class UnsupportedError(RanvierError, NotImplementedError):
    """The target cannot express this; the message says why and what can."""


class CapacityError(RanvierError):
    """The network does not fit the chip."""


class FormatError(RanvierError, ValueError):
    """A file is not what it should be."""


class DataError(RanvierError):
    """A data set is missing or unreadable."""


class LavaError(RanvierError, RuntimeError):
    """Lava failed, hung past its time limit, or is not installed."""


def expect(value: object, kind: type, stage: str, hint: str) -> None:
    """Raises UnsupportedError unless `value` is a `kind`; `hint` says how to make one."""
    if not isinstance(value, kind):
        found = type(value).__name__
        raise UnsupportedError(f"{stage}: {found} is no {kind.__name__}; {hint}")
