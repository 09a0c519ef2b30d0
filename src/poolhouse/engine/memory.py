"""Keep freed memory in the process instead of returning it to the kernel after every operation, but not for ever."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# mallopt's names for its parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # glibc refuses more
# Between two times that scraps are given back.
_SCRAPS_SECONDS = 1.0


def keep_freed_memory() -> None:
    """Raise glibc's thresholds, so that activations of a few megabytes reuse pages that are already mapped.

    A quarter of the CPU time of small models goes into mapping and clearing pages otherwise. What is kept is kept in as
    many arenas as there are cores, not in eight times as many, unless the user says how many. Process-wide.
    """
    if (mallopt := _of_glibc("mallopt")) is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 512 * 1024 * 1024)
    if "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, max(2, os.cpu_count() or 1))


def give_back() -> None:
    """Return what is freed and kept to the kernel, where little work is to come; it takes some milliseconds."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


class Scraps:
    """Freed memory between what is in use; packs of ever other sizes leave ever more of it."""

    def __init__(self) -> None:
        self._trim = _of_glibc("malloc_trim")
        self._next = time.monotonic() + _SCRAPS_SECONDS

    def give_back(self) -> None:
        """Return it to the kernel, where that was not done lately: it takes a few milliseconds."""
        if self._trim is not None and (now := time.monotonic()) >= self._next:
            self._next = now + _SCRAPS_SECONDS
            self._trim(0)


def _of_glibc(name: str) -> Callable[..., Any] | None:
    """A function of glibc; None where another C library is in use."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., Any] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return found
