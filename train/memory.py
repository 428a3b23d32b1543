"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Makes glibc's allocator hold on to large blocks that are freed, for the rest of the process.

    A training step frees and asks for the same activations again and again; to fetch them from the
    system each time costs a page fault every 4 KiB. Does nothing where there is no glibc. Called by
    programs, not by functions of the library: it is a setting of the whole process.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt(m_mmap_threshold, 2**31 - 1)
    mallopt(m_trim_threshold, 2**31 - 1)
