"""A release answers as the one before it: vectors of fixed weights, a family each, as stored in released.json.

Stored indexes hold vectors of earlier versions, so a change here is a change for users and belongs into CHANGELOG.md.
`python -m tests.models.test_releases` stores the vectors of today, of families that are not stored yet; to store another
one anew, remove it from the file first.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models.parity import load, packed, save
from tests.models.test_decoders import ROWS as DECODERS
from tests.models.test_decoders import TINY
from tests.models.test_encoders import ROWS as ENCODERS

STORED = Path(__file__).parent / "released.json"
ROWS = {**ENCODERS, **{row: (family, TINY | options) for row, (family, options) in DECODERS.items()}}
# Of each text's mean row.
NUMBERS = 6


def vectors(row: str, folder: Path) -> np.ndarray:
    """The first numbers of each text's mean row, [texts, NUMBERS]. The weights depend on no generator of a library."""
    save(folder, *ROWS[row])
    path = folder / "model.safetensors"
    save_file({name: _numbers(name, array.shape) for name, array in load_file(path).items()}, path, {"format": "pt"})
    means = [rows.mean(0) for rows in packed(load(folder).transformer)]
    return np.stack([mean.numpy()[:NUMBERS] for mean in means])


def _numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers from -0.5 to 0.5 that only the name and the shape decide."""
    count = int(np.prod(shape, dtype=np.int64))
    data = hashlib.shake_128(name.encode()).digest(2 * count)
    return (np.frombuffer(data, "<u2").astype(np.float32) / 65535 - 0.5).reshape(shape)


@pytest.mark.parametrize("row", ROWS)
def test_vectors_are_those_of_the_release_before(row: str, tmp_path: Path) -> None:
    stored = np.array(json.loads(STORED.read_text())[row])
    # Machines add float32 numbers in another order.
    assert np.allclose(vectors(row, tmp_path), stored, rtol=1e-4, atol=1e-4 * np.abs(stored).max())


def test_only_families_that_there_are_are_stored() -> None:
    assert set(json.loads(STORED.read_text())) == set(ROWS)


if __name__ == "__main__":
    found = json.loads(STORED.read_text()) if STORED.exists() else {}
    for each in ROWS:
        if each not in found:
            with tempfile.TemporaryDirectory() as place:
                found[each] = [[round(float(number), 6) for number in one] for one in vectors(each, Path(place))]
    lines = ",\n".join(f"{json.dumps(each)}: {json.dumps(found[each])}" for each in ROWS)
    STORED.write_text(f"{{\n{lines}\n}}\n")
