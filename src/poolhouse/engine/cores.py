"""Cores: how many this process may use, and how OpenMP's threads wait for each other.

torch counts the cores of the machine. A container has often less: an affinity, which libgomp knows of, or a quota of
CPU time of its cgroup or of one above it, which it does not.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("poolhouse")

# What users set to choose the number of threads themselves, and how threads wait.
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Rounds of spinning before a thread of libgomp that waits at a barrier sleeps: about a millisecond, which lasts from one
# query to the next. Its own default is six times that, at each of dozens of barriers, while the thread that it waits for
# may want this very core.
_SPINS = "50000"


def let_threads_wait_shortly() -> None:
    """Let OpenMP's threads sleep soon when they wait; before torch is imported, since libgomp looks then and never again.

    What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
        # Of our own: not for the programs that this process starts.
        _set_by_us.append("GOMP_SPINCOUNT")


_set_by_us: list[str] = []


def use_no_more_than_given() -> None:
    """Lower torch's number of threads to the CPU time that this process gets, unless the user chose a number."""
    import torch

    while _set_by_us:
        os.environ.pop(_set_by_us.pop(), None)
    quota = cpu_quota()
    if quota is None or any(name in os.environ for name in _COUNTS):
        return
    cores = max(1, math.ceil(quota))
    if cores < torch.get_num_threads():
        log.info("This process may use %g CPUs: torch gets %d threads, not %d.", quota, cores, torch.get_num_threads())
        torch.set_num_threads(cores)


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """CPUs' worth of time that cgroups allow this process, by the narrowest of its own and those above; None: no limit.

    process: its folder in /proc.
    """
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return None  # another system than Linux
    quotas = [quota for folder in _folders(memberships, mounts) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(memberships: list[str], mounts: list[str]) -> Iterator[Path]:
    """The folders of the process's cgroups that may limit CPU time, each followed by those above it."""
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root, point in _mounted(mounts, controllers):
            # A container often sees only the part of the tree below its own cgroup.
            inside = os.path.relpath(path, root)
            folder = point if inside.startswith("..") else point / inside
            while True:
                yield folder
                if folder in (point, folder.parent):
                    break
                folder = folder.parent


def _mounted(mounts: list[str], controllers: str) -> Iterator[tuple[str, Path]]:
    """(root within the tree, where it is mounted) of trees of cgroups: version 2 where no controllers are named, else 1."""
    for line in mounts:
        places, _, kind = line.partition(" - ")
        root, point = places.split(" ")[3:5]
        words = kind.split(" ")
        if words[0] == ("cgroup" if controllers else "cgroup2") and (not controllers or "cpu" in words[-1].split(",")):
            yield root, Path(point)


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time of one cgroup; None where it has no limit."""
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        microseconds = -1.0 if allowed == "max" else float(allowed)
        return microseconds / float(period) if microseconds > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
