"""The room of compiled kernels: built, found by the hash of its sources, chosen by the CPU, and absent without harm."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from poolhouse import kernels
from poolhouse.errors import ConfigError
from poolhouse.kernels import build as building

needs_compiler = pytest.mark.skipif(
    not building.supported() or not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Forgets what was loaded, and again at the end."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)

    kernels.forget()
    yield kernels.forget
    kernels.forget()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sources of its own: the smallest that compile."""
    for name in ("library.cpp", "parallel.h"):
        shutil.copy(building.FOLDER / name, tmp_path)
    monkeypatch.setattr(building, "FOLDER", tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


@needs_compiler
def test_this_checkout_has_its_kernels(fresh: Callable[[], None]) -> None:
    expected = next((one.name for one in building.LEVELS if one.needs <= kernels.cpu_flags()), None)
    assert kernels.level() == expected


@needs_compiler
@pytest.mark.parametrize("level", [one.name for one in building.LEVELS])
def test_each_level_is_built_and_says_its_name(
    level: str, fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not next(one for one in building.LEVELS if one.name == level).needs <= kernels.cpu_flags():
        pytest.skip("another CPU")
    monkeypatch.setenv(kernels.VARIABLE, level)
    assert kernels.level() == level
    room = ctypes.create_string_buffer(32)
    say = kernels.function("poolhouse_level", kernels.ADDRESS)
    assert say is not None
    say(ctypes.addressof(room))
    assert room.value.decode() == level


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_each_turn_runs_once(count: int, threads: int, fresh: Callable[[], None]) -> None:
    run = kernels.function("poolhouse_turns", kernels.ADDRESS, kernels.COUNT, kernels.COUNT)
    assert run is not None
    done = np.zeros(count + 1, np.uint8)
    run(done.ctypes.data, count, threads)
    assert done.tolist() == [1] * count + [0]


@needs_compiler
def test_changed_sources_are_not_served_by_an_old_library(folder: Path, fresh: Callable[[], None]) -> None:
    built = building.build()
    assert sorted(folder.glob("*.so")) == sorted(built)
    times = [path.stat().st_mtime_ns for path in built]
    assert [path.stat().st_mtime_ns for path in building.build()] == times
    assert kernels.level() is not None
    with (folder / "library.cpp").open("a") as source:
        source.write("// changed\n")
    fresh()
    assert kernels.level() is None
    assert kernels.function("poolhouse_level", kernels.ADDRESS) is None
    again = building.build()
    assert not set(again) & set(built)
    # The old ones are gone.
    assert sorted(folder.glob("*.so")) == sorted(again)
    fresh()
    assert kernels.level() is not None


@needs_compiler
def test_a_broken_library_is_none(folder: Path, fresh: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    for one in building.LEVELS:
        building.library(one.name).write_bytes(b"no library")
    with caplog.at_level(logging.INFO):
        assert kernels.level() is None
    assert "cannot be loaded" in caplog.text


def test_without_libraries_there_are_none(
    folder: Path, fresh: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert kernels.level() is None
        assert kernels.level() is None
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_the_environment_turns_them_off(fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert kernels.level() is None
    assert kernels.function("poolhouse_level", kernels.ADDRESS) is None


def test_an_unknown_level_is_refused(fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "sse2")
    with pytest.raises(ConfigError, match="POOLHOUSE_KERNELS is sse2; possible are 0, 1 and avx512_bf16, avx512, avx2"):
        kernels.level()


def test_another_cpu_has_none(
    fresh: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset({"sse2"}))
    with caplog.at_level(logging.INFO):
        assert kernels.level() is None
    assert "this CPU has none" in caplog.text


@pytest.mark.parametrize(
    ("compiler", "words"), [("false", "could not compile"), ("no-such-compiler -O1", "CXX is no-such-compiler")]
)
def test_a_compiler_that_fails_is_said(
    compiler: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "supported", lambda: True)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(building.BuildError, match=words):
        building.build()
    assert not list(folder.glob("*.so"))
    assert not list(folder.glob("*.part"))


def test_no_compiler_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "supported", lambda: True)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(building.BuildError, match="no C\\+\\+ compiler"):
        building.build()


def test_another_system_has_no_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(building.BuildError, match="no kernels for win32"):
        building.build()


@needs_compiler
def test_it_is_built_by_hand() -> None:
    command = [sys.executable, "-W", "error", "-m", "poolhouse.kernels.build"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [Path(line) for line in done.stdout.splitlines()] == [building.library(one.name) for one in building.LEVELS]
    # Nothing is missing now, so no compiler is asked.
    subprocess.run(command, capture_output=True, check=True, env={**os.environ, "CXX": "no-such-compiler"})


class _App:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, words: str) -> None:
        self.warnings.append(words)


class _Interface:
    def __class_getitem__(cls, _: object) -> type:
        return cls


def _hook(monkeypatch: pytest.MonkeyPatch) -> type:
    """The build hook, over a stand-in for hatchling, which only builds of the package have."""
    interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = _Interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    path = Path(__file__).parent.parent / "hatch_build.py"
    spec = importlib.util.spec_from_file_location("hatch_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return type("Hook", (module.KernelsHook,), {"root": str(path.parent), "app": _App()})


@needs_compiler
def test_a_wheel_with_kernels_is_for_its_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    hook, data = _hook(monkeypatch)(), dict[str, object]()
    hook.initialize("standard", data)
    assert data == {"pure_python": False, "tag": "py3-none-linux_x86_64"}
    assert not hook.app.warnings


def test_a_wheel_without_a_compiler_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    hook, data = _hook(monkeypatch)(), dict[str, object]()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    hook.initialize("standard", data)
    assert data == {}
    assert "no kernels for" in hook.app.warnings[0]
