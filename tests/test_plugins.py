"""A plugin's data in, its own output out."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, ConfigError, InvalidRequest, PoolingParams, PoolingRequestOutput, UnsupportedTask

CODE = '''
import dataclasses
from poolhouse import PoolingParams

class Pairwise:
    """The cosine of every two neighbouring lines."""

    task = "embed"

    def __init__(self, settings, tokenizer):
        self.model = settings.model

    def parse_data(self, data):
        if not isinstance(data, str):
            raise TypeError(f"lines are a text, not {type(data).__name__}")
        return data.splitlines()

    def merge_pooling_params(self, params=None):
        return dataclasses.replace(params or PoolingParams(), use_activation=True)

    def pre_process(self, prompt, request_id=None, **kwargs):
        return prompt

    def post_process(self, model_output, request_id=None, **kwargs):
        rows = [output.outputs.array for output in model_output]
        return {"cosines": [float(one @ two) for one, two in zip(rows, rows[1:])]}

class Half:
    def __init__(self, settings, tokenizer):
        pass

def name():
    return "poolhouse_test_plugin.Pairwise"
'''

ENTRIES = """[poolhouse.io_processor_plugins]
pairwise = poolhouse_test_plugin:Pairwise
half = poolhouse_test_plugin:Half

[vllm.io_processor_plugins]
by_name = poolhouse_test_plugin:name
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with entry points, as pip would lay it out."""
    (tmp_path / "poolhouse_test_plugin.py").write_text(CODE)
    folder = tmp_path / "poolhouse_test_plugin-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: poolhouse-test-plugin\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("poolhouse_test_plugin", None)


def cosines(llm: LLM, lines: Sequence[str]) -> list[float]:
    rows = llm.embed_array(list(lines))
    return [float(one @ two) for one, two in itertools.pairwise(rows)]


@pytest.mark.parametrize(
    "options",
    [
        {"io_processor_plugin": "pairwise"},
        {"io_processor_plugin": "by_name"},
        {"io_processor_plugin": "pairwise", "replicas": 2},
        {"hf_overrides": {"io_processor_plugin": "pairwise"}},
    ],
)
def test_a_plugin_gets_its_data_and_makes_the_output(options: dict[str, Any]) -> None:
    lines = ["the moon", "the sea", "bread"]
    with LLM(**options) as llm:
        data = {"data": "\n".join(lines)}
        (output,) = llm.encode(data, pooling_task="plugin")
        assert isinstance(output, PoolingRequestOutput)
        assert np.allclose(output.outputs["cosines"], cosines(llm, lines), atol=1e-5)
        raw = PoolingParams(use_activation=False)
        (twin,) = asyncio.run(llm.encode_async(data, raw, pooling_task="plugin"))
        assert np.allclose(twin.outputs["cosines"], cosines(llm, lines), atol=1e-5)
        with pytest.raises(InvalidRequest, match="lines are a text, not int"):
            llm.encode({"data": 3}, pooling_task="plugin")
        with pytest.raises(InvalidRequest, match=r'of the form \{"data"'):
            llm.encode("text", pooling_task="plugin")
        with pytest.raises(InvalidRequest, match='are for pooling_task="plugin"'):
            llm.encode(data, pooling_task="embed")
        with pytest.raises(InvalidRequest, match="one PoolingParams"):
            llm.encode(data, [raw], pooling_task="plugin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairwize", "requires the 'pairwize' IO Processor plugin but it is not installed"),
        ("half", r"lacks \['parse_data', 'pre_process', 'post_process'\]"),
    ],
)
def test_a_plugin_that_is_missing_or_broken_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(io_processor_plugin=name)


def test_without_a_plugin_the_task_is_refused() -> None:
    with LLM() as llm, pytest.raises(UnsupportedTask, match="No IOProcessor plugin installed"):
        llm.encode({"data": "x"}, pooling_task="plugin")
