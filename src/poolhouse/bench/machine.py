"""Machine: the CPU and its features, cores and quota, memory, GPU and versions: what figures depend on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from poolhouse.version import __version__

# Features that decide which kernels run, by the flags of /proc/cpuinfo.
_FEATURES = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX VNNI": "avx_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AVX-512 FP16": "avx512_fp16",
    "AMX BF16": "amx_bf16",
    "AMX INT8": "amx_int8",
    "NEON": "asimd",
    "SVE": "sve",
    "BF16": "bf16",
    "I8MM": "i8mm",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured on.

    cores: that this process may use, by its affinity. quota: CPUs' worth of time by cgroups; None without a limit.
    memory_gib: of the machine. gpu: its name; None without one.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    quota: float | None
    memory_gib: float
    gpu: str | None
    system: str
    python: str
    torch: str
    poolhouse: str

    @property
    def processor(self) -> str:
        """The CPU, and how much of it there was."""
        return f"{self.cpu}, {self.cores} cores" + ("" if self.quota is None else f", quota {self.quota:g}")

    @property
    def abilities(self) -> str:
        """The features of the CPU."""
        return ", ".join(self.features) or "no features known"

    @property
    def versions(self) -> str:
        """What ran on it."""
        return f"Poolhouse {self.poolhouse}, torch {self.torch}, Python {self.python}, {self.system}"

    def lines(self) -> list[str]:
        """The machine in words, a line for each half."""
        gpu = "" if self.gpu is None else f"; {self.gpu}"
        return [f"{self.processor}, {self.memory_gib:.0f} GiB{gpu}; {self.abilities}.", f"{self.versions}."]


def this_machine(gpu: bool = False) -> Machine:
    """The machine that runs this. gpu: whether to ask torch for one, which imports it."""
    from poolhouse.engine.process import cpu_quota

    model, flags = _cpu()
    name = None
    if gpu:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Machine(
        cpu=model,
        features=tuple(feature for feature, flag in _FEATURES.items() if flag in flags),
        cores=len(cores()),
        quota=cpu_quota(),
        memory_gib=_memory_gib(),
        gpu=name,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=metadata.version("torch"),
        poolhouse=__version__,
    )


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu() -> tuple[str, set[str]]:
    """The CPU's name, and the flags of its features."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine(), set()
    first = path.read_text(errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    model = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        # A hypervisor may shorten the name; these tell the generation.
        model += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return model, set((facts.get("flags") or facts.get("Features") or "").split())


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0
