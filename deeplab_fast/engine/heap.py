"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = -1
_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed, for whatever is allocated next.

    glibc gives blocks of more than 32 MiB, and the end of its heap, back to the system as soon as
    they are free, and the system zeroes every page of the next tensor when it is first written. A
    training step on a CPU frees and allocates all of its maps: that was a quarter to a third of its
    time (bench/NOTES.md, 2026-11-28).

    For the whole process and until its end, so it is for programs that train, not for libraries.
    Changes no values. Where variables of the environment say what malloc shall do they count.

    Returns:
        Whether the C library took that; False where it is another, or the environment says what it
        shall do. An allocator that a program brings along is none of its affair.

    Source: mallopt(3).
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _PAD))
    return all([library.mallopt(*setting) == 1 for setting in settings])
