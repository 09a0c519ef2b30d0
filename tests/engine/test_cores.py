"""How many cores a container gives, and how OpenMP's threads wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from poolhouse.engine import process
from poolhouse.engine.process import cpu_quota, limit_threads_to_quota

V1 = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}


def limited(microseconds: int) -> dict[str, str]:
    return {**V1, "cpu.cfs_quota_us": f"{microseconds}\n"}


def process_in(
    tmp_path: Path, membership: str, root: str, kind: str, groups: dict[str, dict[str, str]], point: str = "cpu"
) -> Path:
    """A process's folder in /proc, and the cgroups that it names, by their path below the mount."""
    mount = tmp_path / point
    for name, files in groups.items():
        folder = mount / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    process = tmp_path / "self"
    process.mkdir()
    (process / "cgroup").write_text(membership)
    (process / "mountinfo").write_text(
        f"22 1 0:20 / /proc rw - proc proc rw\n33 31 0:30 {root} {mount} rw,relatime shared:1 - {kind}\n"
    )
    return process


@pytest.mark.parametrize(
    ("membership", "root", "kind", "groups", "expected"),
    [
        ("0::/\n", "/", "cgroup2 cgroup rw", {"": {"cpu.max": "150000 100000\n"}}, 1.5),
        ("0::/\n", "/", "cgroup2 cgroup rw", {"": {"cpu.max": "max 100000\n"}}, None),
        ("0::/\n", "/", "cgroup2 cgroup rw", {"": {}}, None),
        (
            "0::/pod/box\n",
            "/",
            "cgroup2 cgroup rw",
            {"pod": {"cpu.max": "200000 100000\n"}, "pod/box": {"cpu.max": "max 100000\n"}},
            2.0,
        ),
        (
            "0::/pod/box\n",
            "/",
            "cgroup2 cgroup rw",
            {"pod": {"cpu.max": "400000 100000\n"}, "pod/box": {"cpu.max": "50000 100000\n"}},
            0.5,
        ),
        ("5:memory:/box\n4:cpu,cpuacct:/box\n", "/", "cgroup cgroup rw,cpu,cpuacct", {"box": limited(300_000)}, 3.0),
        ("4:cpu,cpuacct:/box\n", "/", "cgroup cgroup rw,cpu,cpuacct", {"": limited(100_000), "box": V1}, 1.0),
        ("4:cpu:/docker/ab\n", "/docker/ab", "cgroup cgroup rw,cpu", {"": limited(200_000)}, 2.0),
        ("4:cpu:/elsewhere\n", "/docker/ab", "cgroup cgroup rw,cpu", {"": limited(200_000)}, 2.0),
        ("4:cpuset:/box\n", "/", "cgroup cgroup rw,cpuset", {"box": limited(200_000)}, None),
        ("0::/\n", "/", "cgroup2 cgroup rw", {"": {"cpu.max": "broken\n"}}, None),
    ],
    ids=[
        "v2",
        "v2 without a limit",
        "v2 of the whole machine",
        "v2, above",
        "v2, the narrowest",
        "v1",
        "v1, above",
        "v1, a container's own part of the tree",
        "v1, a path outside the part",
        "another controller",
        "broken",
    ],
)
def test_the_narrowest_quota_of_all_groups_counts(
    tmp_path: Path, membership: str, root: str, kind: str, groups: dict[str, dict[str, str]], expected: float | None
) -> None:
    assert cpu_quota(process_in(tmp_path, membership, root, kind, groups)) == expected


def test_a_system_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "chosen", "expected"),
    [(0.5, None, 1), (1.2, None, 2), (64.0, None, 4), (None, None, 4), (1.0, "4", 4)],
    ids=["half a core", "rounded up", "more than there are", "none", "the user's own number"],
)
def test_a_quota_lowers_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, chosen: str | None, expected: int
) -> None:
    monkeypatch.setattr(process, "cpu_quota", lambda: quota)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        limit_threads_to_quota()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


SHOWN = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("environment", "first", "expected"),
    [
        ({}, "", "5000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "", "7 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "", "None ACTIVE"),
        ({}, "import sys; sys.modules['torch'] = None", "None None"),
    ],
    ids=["ours", "the user's count", "the user's policy", "torch is there already"],
)
def test_threads_wait_shortly_unless_the_user_says_otherwise(
    environment: dict[str, str], first: str, expected: str
) -> None:
    """Said before torch is imported, when libgomp reads it, and only to this process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP"))}
    lines = [first, "import poolhouse.engine.request", SHOWN]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=clean | environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == expected


def test_the_programs_that_this_process_starts_do_not_inherit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    process.let_threads_wait_shortly()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"
    monkeypatch.undo()  # torch is back
    os.environ["GOMP_SPINCOUNT"] = "5000"
    limit_threads_to_quota()
    assert "GOMP_SPINCOUNT" not in os.environ
