"""Kernels: plain C++ for CPUs, compiled at install where a compiler is; everything works without them, slower.

    *.cpp --build.py--> one library per level of instructions --chosen by this CPU's flags--> `function(name, ...)`

A kernel is a function of the C ABI: addresses and sizes in, nothing kept but sleeping threads. It is called without the
interpreter's lock, from any thread. Who calls one has another way where `function` answers None: another CPU, no compiler,
sources that are newer than the library, or POOLHOUSE_KERNELS=0.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from poolhouse.errors import ConfigError

log = logging.getLogger(__name__)

# Types of arguments: an address, a number of things, a real number.
ADDRESS, COUNT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# The numbers of the activations that kernels know, as activations.h has them.
ACTIVATIONS = {name: number for number, name in enumerate(("none", "relu", "gelu", "gelu_tanh", "silu"))}


class _Helpers(threading.local):
    """How many threads may help this one, beside those of torch: see team.h. Whoever runs kernels says it."""

    count = 0


helpers = _Helpers()

VARIABLE = "POOLHOUSE_KERNELS"


@cache
def level() -> str | None:
    """The instructions that the kernels of this process use; None: there are no kernels.

    POOLHOUSE_KERNELS=0 turns them off, the name of a level takes that one or the next below it.

    Raises:
        ConfigError: POOLHOUSE_KERNELS is something else.
    """
    name, _ = _loaded()
    return name


@cache
def function(name: str, *arguments: type) -> Callable[..., None] | None:
    """A kernel by its name, None where there is none. arguments: ADDRESS, COUNT or REAL each."""
    _, loaded = _loaded()
    if loaded is None:
        return None
    found: Callable[..., None] = getattr(loaded, name)
    found.argtypes, found.restype = list(arguments), None  # type: ignore[attr-defined]
    return found


def forget() -> None:
    """Look again, at the next question, which kernels there are; for tests."""
    for cached in (level, function, _loaded):
        cached.cache_clear()


@cache
def _loaded() -> tuple[str | None, ctypes.CDLL | None]:
    # Here, because `python -m poolhouse.kernels.build` imports this module first.
    from poolhouse.kernels.build import LEVELS, library

    chosen = os.environ.get(VARIABLE, "").strip() or "1"
    names = [one.name for one in LEVELS]
    if chosen not in ("0", "1", *names):
        raise ConfigError(f"{VARIABLE} is {chosen}; possible are 0, 1 and {', '.join(names)}.")
    if chosen == "0":
        log.info("Compiled kernels: none, by %s=0.", VARIABLE)
        return None, None
    flags = cpu_flags()
    first = names.index(chosen) if chosen in names else 0
    for one in LEVELS[first:]:
        if one.needs <= flags and (path := library(one.name)).is_file():
            try:
                loaded = ctypes.CDLL(str(path))
            except OSError as error:
                log.info("Compiled kernels: %s cannot be loaded: %s", path.name, error)
                continue
            log.info("Compiled kernels: %s.", one.name)
            return one.name, loaded
    why = "this CPU has none" if not any(one.needs <= flags for one in LEVELS) else "not built for these sources"
    log.info(
        "Compiled kernels: none; %s. All works without them. `python -m poolhouse.kernels.build` builds them.", why
    )
    return None, None


@cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, as Linux names it; nothing on systems without kernels."""
    from poolhouse.kernels.build import supported

    cpu = Path("/proc/cpuinfo")
    if not supported() or not cpu.is_file():
        return frozenset()
    lines = cpu.read_text(errors="replace").splitlines()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))
