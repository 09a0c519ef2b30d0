"""Build: compiles the kernels' sources, once for each level of instructions; run by the package's build and by hand.

`python -m poolhouse.kernels.build` compiles what is missing. It imports nothing of ours, because the build of the package
runs it where nothing is installed yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class Level(NamedTuple):
    """Instructions that a library uses.

    needs: flags of a CPU as Linux names them. flags: what the compiler is told.
    """

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
_AVX512_NEEDS = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})
# The best first.
LEVELS = (
    Level(
        "avx512_bf16",
        _AVX512_NEEDS | {"avx512_bf16"},
        ("-mavx2", "-mfma", *(f"-m{name}" for name in (*_AVX512, "avx512bf16"))),
    ),
    Level("avx512", _AVX512_NEEDS, ("-mavx2", "-mfma", *(f"-m{name}" for name in _AVX512))),
    Level("avx2", frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
)
# Numbers that are not finite keep their meaning, and every operation is rounded as it is written: nothing of -ffast-math.
_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)


class BuildError(Exception):
    """Nothing was compiled; the message says why."""


def supported() -> bool:
    """Whether there are kernels for this system: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def library(level: str) -> Path:
    """Where the library of that level lies. Its name holds a hash of the sources, so an old one is not found."""
    digest = hashlib.sha256(repr((_FLAGS, [(one.name, one.flags) for one in LEVELS])).encode())
    for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return FOLDER / f"{level}-{digest.hexdigest()[:16]}.so"


def build() -> list[Path]:
    """Compile what is missing, and remove what is old; all libraries.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    if not supported():
        raise BuildError(f"There are no kernels for {sys.platform} on {platform.machine()}.")
    libraries = {level: library(level.name) for level in LEVELS}
    for old in set(FOLDER.glob("*.so")) - set(libraries.values()):
        old.unlink(missing_ok=True)
    missing = {level: path for level, path in libraries.items() if not path.is_file()}
    if missing:
        compiler = _compiler()
        sources = [str(path) for path in sorted(FOLDER.glob("*.cpp"))]
        running = []
        for level, path in missing.items():
            # Written beside its place and then moved: nobody reads half a library.
            part = path.with_suffix(f".{os.getpid()}.part")
            command = [*compiler, *_FLAGS, *level.flags, f"-DPOOLHOUSE_LEVEL={level.name}", "-o", str(part), *sources]
            running.append((part, path, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))  # noqa: S603
        said = [(part, path, process.communicate()[1], process.returncode) for part, path, process in running]
        for part, path, words, status in said:
            if status != 0:
                part.unlink(missing_ok=True)
                raise BuildError(f"{shlex.join(compiler)} could not compile {path.name}:\n{words}")
            if words:
                sys.stderr.write(words)
            part.replace(path)
    return list(libraries.values())


def _compiler() -> list[str]:
    """CXX of the environment, else the first that is found."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        found = shutil.which(chosen[0])
        if found is None:
            raise BuildError(f"CXX is {chosen[0]}, which is not found.")
        return [found, *chosen[1:]]
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("There is no C++ compiler (CXX, g++, clang++).")


if __name__ == "__main__":
    try:
        for built in build():
            sys.stdout.write(f"{built}\n")
    except BuildError as error:
        sys.exit(str(error))
