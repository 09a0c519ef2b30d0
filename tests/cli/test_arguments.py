"""The words behind `serve`, as they come and as the command gets them."""

from __future__ import annotations

import json

import pytest

from poolhouse.cli.options import arranged, join_dotted
from poolhouse.errors import ConfigError


def test_dotted_options_become_one_mapping() -> None:
    joined = join_dotted(["serve", "--pooler-config.pooling-type", "CLS", "m", "--pooler-config.use_activation=false"])
    assert (joined[:2], joined[3:]) == (["serve", "--pooler-config"], ["m"])
    assert json.loads(joined[2]) == {"pooling_type": "CLS", "use_activation": False}
    nested = join_dotted(["--hf-overrides.rope.theta", "1e4", "--pooler-config.task=embed"])
    assert [json.loads(word) for word in nested[1::2]] == [{"rope": {"theta": 1e4}}, {"task": "embed"}]
    with pytest.raises(ConfigError, match=r"--pooler-config\.task needs a value"):
        join_dotted(["--pooler-config.task", "--port", "80"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ""),
        ("m", "-- m"),
        ("a b --port 80", "--port 80 -- a b"),
        ("a --port 80 b", "--port 80 -- a b"),
        ("--port=80 -- --odd", "--port 80 -- --odd"),
        ("m --max_model_len 5", "--max-model-len 5 -- m"),
        ("m --max-model-len -1", "--max-model-len -1 -- m"),
        ("m --enable-lora", "--enable-lora -- m"),
        ("m --no-enable-lora", "--no-enable-lora -- m"),
        ("--enable-lora m", "--enable-lora -- m"),
        ("m --enable-lora=false", "--no-enable-lora -- m"),
        ("m --no-enable-lora=false", "--enable-lora -- m"),
        ("--trust-remote-code m", "--trust-remote-code -- m"),
        ("m --uvicorn-log-level info", "--log-level info -- m"),
        ("--disable-uvicorn-access-log m", "--disable-access-log -- m"),
        ("m --renderer-num-workers 3", "--tokenizer-workers 3 -- m"),
        ("m --enable-prefix-caching", "--prefix-sharing -- m"),
        ("--no-enable-prefix-caching m", "--no-prefix-sharing -- m"),
        ("--enable-prefix-caching=false m", "--no-prefix-sharing -- m"),
        ("m --allowed-media-domains a.test", "--allowed-media-domains a.test -- m"),
        ("--allowed-media-domains a.test b org/m", '--allowed-media-domains ["a.test", "b"] -- org/m'),
        ("m --allowed-media-domains a b --port 1", '--allowed-media-domains ["a", "b"] --port 1 -- m'),
        ("m --lora-modules a=x b=y c", "--lora-modules a=x,b=y -- m c"),
        ("m --lora-modules a=x --port 80", "--lora-modules a=x --port 80 -- m"),
        ("--api-key k m --port 80", "--api-key k --port 80 -- m"),
        ("--config f.yaml", "--config f.yaml"),
        ("m --help", "--help -- m"),
    ],
)
def test_lines_are_arranged(line: str, expected: str) -> None:
    assert " ".join(arranged(line.split())) == expected


@pytest.mark.parametrize(
    ("line", "names", "models"),
    [
        ("m --served-model-name a b", ["a", "b"], ["m"]),
        ("m --served-model-name a b --port 80", ["a", "b"], ["m"]),
        ("m n --served_model_name a b", ["a", "b"], ["m", "n"]),
        ("--port 80 m --served-model-name a b", ["a", "b"], ["m"]),
        ("--enforce-eager m --served-model-name a b", ["a", "b"], ["m"]),
        # Without a model elsewhere, the last word of the line is the model.
        ("--served-model-name a m", ["a"], ["m"]),
        ("--served-model-name a b m", ["a", "b"], ["m"]),
        ("--port 80 --served-model-name a m", ["a"], ["m"]),
        # A file may name the model.
        ("--served-model-name a b --config f", ["a", "b"], []),
        ("--served-model-name a --port 80", ["a"], []),
        ("--served-model-name=a m", ["a"], ["m"]),
        ("--served-model-name a -- m", ["a"], ["m"]),
    ],
)
def test_names_are_told_from_models(line: str, names: list[str], models: list[str]) -> None:
    words = arranged(line.split())
    given = words[words.index("--served-model-name") + 1]
    assert (json.loads(given) if given.startswith("[") else [given]) == names
    assert (words[words.index("--") + 1 :] if "--" in words else []) == models


def test_names_that_may_be_the_model_are_a_question() -> None:
    with pytest.raises(ConfigError, match=r"which of these is the model.*serve MODEL --served-model-name a m"):
        arranged(["--served-model-name", "a", "m", "--port", "80"])


def test_options_that_take_several_values_may_be_repeated() -> None:
    words = arranged(["--api-key", "a,1", "--port", "1", "--api-key=b", "--port", "2"])
    assert words == ["--api-key", '["a,1", "b"]', "--port", "2"]


def test_options_that_mean_nothing_are_gathered_with_their_values() -> None:
    line = "m --max-num-seqs 4 --enforce-eager n --port 80 --load-format=y --no-async-scheduling --swap-space 1.5"
    words = arranged(line.split())
    assert (words[:2], words[4:]) == (["--port", "80"], ["--", "m", "n"])
    assert json.loads(words[3]) == {
        "max_num_seqs": 4, "enforce_eager": True, "load_format": "y", "async_scheduling": False, "swap_space": 1.5,
    }  # fmt: skip


def test_an_option_without_its_value_is_named() -> None:
    for line in ("m --port", "m --port --host x"):
        with pytest.raises(ConfigError, match="--port needs a value"):
            arranged(line.split())
