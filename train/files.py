"""Files that are whole or absent: write to a temporary name, then rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ranvier.train.errors import RanvierError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends without an error.

    The temporary file keeps the suffix of `path`, since some writers choose their format by it.
    Raises RanvierError where the folder cannot be written; the old file then stands untouched.
    """
    final = Path(path)
    part = final.with_name(f".{final.stem}.{os.getpid()}.part{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, final)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RanvierError(f"cannot write '{final}': {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` atomically, in UTF-8."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
