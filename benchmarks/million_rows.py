"""Run a file job over a million short texts, kill it on its way, and say its rate, its memory and what came out.

python benchmarks/million_rows.py --rows 1000000 --kill 2 -- --quantization int8

Texts are made on the spot: 3 to 16 words of the package's own passages, drawn with a seed. `poolhouse run` reads them as
Parquet, and is killed (SIGKILL) so many times at even distances. What follows `--` are options of `poolhouse run`. Memory
is read from the kernel (the peak, VmHWM) every half second. The exit status is 1 where a row is missing or twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_PIECE = 50_000


def main() -> None:
    """Make the file, run the job to its end, count its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kill", type=int, default=0, help="how many times it is killed on its way")
    parser.add_argument("--folder", type=Path, help="where files are put (a temporary folder)")
    parser.add_argument("job", nargs="*", help="options of poolhouse run")
    options = parser.parse_args()
    with _folder(options.folder) as folder:
        source, out = folder / "texts.parquet", folder / "vectors"
        words = _write(source, options.rows)
        print(f"{options.rows:,} rows, {words:,} words, {source.stat().st_size / 1e6:.0f} MB of Parquet", flush=True)
        command = [sys.executable, "-m", "poolhouse.cli", "run", str(source), "--out", str(out), "--id", "id"]
        marks = [options.rows * part // (options.kill + 1) for part in range(1, options.kill + 1)]
        _run([*command, *options.job], out, [*marks, None])
        sys.exit(_count(out, options.rows))


def _write(path: Path, rows: int) -> int:
    """A Parquet file of texts with ids; returns how many words they have."""
    known = np.array(re.findall(r"[^\W\d_]+", files("poolhouse.data").joinpath("passages.txt").read_text("utf-8")))
    random, total = np.random.default_rng(0), 0
    with pq.ParquetWriter(path, pa.schema({"id": pa.int64(), "text": pa.string()})) as writer:
        for first in range(0, rows, _PIECE):
            lengths = random.integers(3, 17, min(_PIECE, rows - first))
            drawn = np.split(known[random.integers(0, len(known), lengths.sum())], np.cumsum(lengths)[:-1])
            ids = np.arange(first, first + len(lengths))
            writer.write_table(pa.table({"id": ids, "text": [" ".join(one) for one in drawn]}))
            total += int(lengths.sum())
    return total


def _run(command: Sequence[str], out: Path, marks: Sequence[int | None]) -> None:
    """Run it once per mark: until so many rows are written, then it is killed; None lets it end."""
    for mark in marks:
        start, peak, written = time.monotonic(), 0, 0
        before = _written(out)
        process = subprocess.Popen(command)
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            if mark is not None and _written(out) >= mark:
                process.kill()
            time.sleep(0.5)
        seconds, written = time.monotonic() - start, _written(out)
        print(
            f"exit status {process.returncode}, {written - before:,} rows in {seconds:.0f} s ({(written - before) / seconds:.0f} a "
            f"second with its start), at most {peak / 2**20:.0f} MiB",
            flush=True,
        )
        if mark is None and process.returncode:
            sys.exit(process.returncode)


def _written(out: Path) -> int:
    """Rows in the files that are whole."""
    return sum(pq.read_metadata(path).num_rows for path in out.glob("part-*.parquet"))


def _peak(process: int) -> int:
    """Most bytes that it had in memory so far."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text("ascii"))
        return int(found[1]) * 1024 if found else 0
    return 0


def _count(out: Path, rows: int) -> int:
    """Print whether each row came out once; returns the exit status."""
    ids = np.concatenate(
        [pq.read_table(path, columns=["id"])["id"].to_numpy() for path in sorted(out.glob("part-*.parquet"))]
    )
    once = len(ids) == rows and bool((np.sort(ids) == np.arange(rows)).all())
    size = sum(path.stat().st_size for path in out.glob("part-*.parquet"))
    print(
        json.dumps({"rows": len(ids), "each once": once, "files": len(list(out.glob("part-*.parquet"))), "bytes": size})
    )
    return 0 if once else 1


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
