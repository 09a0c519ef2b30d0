"""Process: what engines set for the whole process: torch's threads, freed memory, what happens at a fork.

Threads: torch counts the cores of the machine. A container has often less: an affinity, which libgomp knows of, or a
quota of CPU time of its cgroup or of one above it, which it does not.
Memory: left alone, glibc returns freed pages to the kernel at once, which costs time, or keeps them, which costs memory.
Forks: a child has no threads but the one that forked, and no lock may be held at that moment.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from poolhouse import kernels

log = logging.getLogger("poolhouse")

# --- Threads ---

# What users set to choose the number of threads themselves, and how threads wait.
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Rounds of spinning before a thread of libgomp that waits at a barrier sleeps: a tenth of a millisecond. Its own default is
# sixty times that, at each of dozens of barriers, while the thread that it waits for may want this very core.
_SPINS = "5000"
# Variables of the environment that this module set.
_set_by_us: list[str] = []


def let_threads_wait_shortly() -> None:
    """Let OpenMP's threads sleep soon when they wait; before torch is imported, since libgomp looks then and never again.

    What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAITS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
        # Of our own: not for the programs that this process starts.
        _set_by_us.append("GOMP_SPINCOUNT")


def load_torch_ahead() -> None:
    """Begin to map torch's largest library, in a thread; it takes 0.2 s and needs no interpreter, so other imports go on.

    `import torch` then finds it loaded. Where that cannot be, it loads it itself.
    """
    found = find_spec("torch") if sys.platform.startswith("linux") and "torch" not in sys.modules else None
    if found is None or found.origin is None or (opened := _of_glibc("dlopen")) is None:
        return
    libraries = Path(found.origin).parent / "lib"

    def load() -> None:
        # The first one for all to see, as torch has it: it names the libraries beneath.
        opened(bytes(libraries / "libtorch_global_deps.so"), os.RTLD_NOW | os.RTLD_GLOBAL)
        opened(bytes(libraries / "libtorch_cpu.so"), os.RTLD_NOW)

    # No daemon: a process that ends waits for it.
    threading.Thread(target=load, name="poolhouse-torch").start()


def limit_threads_to_quota() -> None:
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


def environment_of_replicas(threads: str) -> dict[str, str]:
    """The environment of processes that share this one's cores: so many threads each, unless the user chose a number."""
    environment = {name: value for name, value in os.environ.items() if name not in _set_by_us}
    if not any(name in environment for name in _COUNTS):
        environment["OMP_NUM_THREADS"] = threads
    return environment


class _OpenMP:
    """How many threads work for the thread that asks: numbers that OpenMP and MKL keep for each thread by itself.

    torch's own `set_num_threads` also sets what threads get that are new to it.
    """

    def __init__(self) -> None:
        import torch

        self._torch = torch
        library: object = None
        if sys.platform.startswith("linux"):
            with suppress(OSError):
                library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._set = getattr(library, "omp_set_num_threads", None)
        self._set_mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)

    def count(self) -> int:
        # torch gives a thread that is new to it a number now, and not in the middle of its batch.
        return self._torch.get_num_threads()

    def set(self, count: int) -> None:
        if self._set is not None:
            self._set(count)

    def set_mkl(self, count: int) -> int:
        """The number before; 0: MKL's own."""
        return 0 if self._set_mkl is None else int(self._set_mkl(count))


@cache
def _openmp() -> _OpenMP:
    return _OpenMP()


@contextmanager
def one_core() -> Iterator[None]:
    """Let torch compute in this thread alone, without barriers; no other thread's number changes.

    As many threads as torch had besides may help our own kernels, which wait for nobody (`poolhouse.kernels.helpers`).
    Does nothing where another OpenMP library than torch's own takes its place.
    """
    openmp = _openmp()
    before = openmp.count()
    if before == 1:
        yield
        return
    before_mkl = openmp.set_mkl(1)
    try:
        openmp.set(1)
        kernels.helpers.count = before - 1
        yield
    finally:
        kernels.helpers.count = 0
        openmp.set(before)
        openmp.set_mkl(before_mkl)


@cache
def has_one_core() -> bool:
    """Whether `one_core` works here."""
    with one_core():
        return _openmp().count() == 1


def usable_cores() -> int:
    """How many cores this process may keep busy: by its affinity, and by the quota of its cgroup."""
    cores, quota = len(_affinity()), cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _affinity() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares_of_cores(processes: int) -> list[tuple[int, ...]]:
    """The cores of this process divided among so many: neighbours, which share a node and caches, stay together.

    More processes than cores take turns on them.
    """
    cores = sorted(_affinity(), key=_place_of)
    count = len(cores)
    if processes > count:
        return [(cores[number % count],) for number in range(processes)]
    bounds = [number * count // processes for number in range(processes + 1)]
    return [tuple(cores[begin:end]) for begin, end in pairwise(bounds)]


def _place_of(core: int) -> tuple[int, int, int]:
    """Its node of memory, its physical core, itself: two threads of one core are neighbours."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}")
    try:
        node = min((int(path.name[4:]) for path in folder.glob("node[0-9]*")), default=0)
        return node, int((folder / "topology" / "core_id").read_text()), core
    except (OSError, ValueError):
        return 0, core, core


def stay_on(cores: Iterable[int]) -> None:
    """Run on these cores alone, where the system can; to be called before torch counts them."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # a core that was taken away meanwhile
            os.sched_setaffinity(0, cores)


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """CPUs' worth of time that cgroups allow this process, by the narrowest of its own and those above; None: no limit.

    process: its folder in /proc.
    """
    quotas = [quota for folder in _cgroups(process, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _cgroups(process: Path, controller: str) -> list[Path]:
    """The folders of the process's cgroups that may limit what this controller counts; none on other systems than Linux."""
    try:
        memberships = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return []
    return list(_folders(memberships, mounts, controller))


def _folders(memberships: list[str], mounts: list[str], controller: str) -> Iterator[Path]:
    """Those folders, each followed by those above it."""
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root, point in _mounted(mounts, controllers, controller):
            # A container often sees only the part of the tree below its own cgroup.
            inside = os.path.relpath(path, root)
            folder = point if inside.startswith("..") else point / inside
            while True:
                yield folder
                if folder in (point, folder.parent):
                    break
                folder = folder.parent


def _mounted(mounts: list[str], controllers: str, controller: str) -> Iterator[tuple[str, Path]]:
    """(root within the tree, where it is mounted) of trees of cgroups: version 2 where no controllers are named, else 1."""
    for line in mounts:
        where, _, what = line.partition(" - ")
        root, point = where.split(" ")[3:5]
        kind, options = what.split(" ")[0], what.split(" ")[-1]
        if kind == ("cgroup" if controllers else "cgroup2") and (not controllers or controller in options.split(",")):
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


# --- Memory ---

# mallopt's names for its parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # glibc refuses more


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


def release_freed_memory() -> None:
    """Return what is freed and kept to the kernel, where little work is to come; it takes some milliseconds."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def release_memory() -> None:
    """As `release_freed_memory`, and that of CUDA devices too, which torch keeps for tensors to come."""
    release_freed_memory()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resident_memory(pid: int) -> int | None:
    """Bytes of a process that lie in memory; None where that is not known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def spare_memory(process: Path = Path("/proc/self")) -> int | None:
    """Bytes that may still be taken, by the machine and by the narrowest cgroup; None where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        spare = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    return min([spare, *(left for folder in _cgroups(process, "memory") if (left := _left(folder)) is not None)])


def _left(folder: Path) -> int | None:
    """Bytes that a cgroup has left, cached files not counted as used; None where it has no limit."""
    names = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for limit, usage in names:
        try:
            allowed = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the other version of cgroups, or "max"
            continue
        return max(0, allowed - used + int(counts.get("total_inactive_file", counts.get("inactive_file", 0))))
    return None


def _of_glibc(name: str) -> Callable[..., object] | None:
    """A function of glibc; None where another C library is in use."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., object] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return function


# --- Forks ---

# A fork waits for running batches no longer than this. Its child may then hang in the middle of a matrix library.
_LONGEST_WAIT = 20.0


class Forkable(Protocol):
    """What has threads that compute."""

    def hold(self, deadline: float) -> Callable[[], None]:
        """Keep its threads from computing, waiting until `deadline` (by `time.monotonic`); returns what ends it."""
        ...

    def forked(self) -> None:
        """This process is a child of the one that had the threads."""
        ...


_engines: weakref.WeakSet[Forkable] = weakref.WeakSet()
# Of threads that fork at the same time, what each holds.
_held = threading.local()


def prepare_for_forks(engine: Forkable) -> None:
    """Hold its threads while this process forks, and tell it in the child, as long as it lives."""
    _engines.add(engine)


def _before() -> None:
    deadline = time.monotonic() + _LONGEST_WAIT
    _held.releases = [engine.hold(deadline) for engine in list(_engines)]


def _in_parent() -> None:
    for release in _held.__dict__.pop("releases", ()):
        release()


def _in_child() -> None:
    _held.__dict__.clear()
    engines = list(_engines)
    for engine in engines:
        engine.forked()
    if engines and "TOKENIZERS_PARALLELISM" in os.environ:
        # The tokenizers' own threads are gone too. Where the variable is not set, the library sees to it itself.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
