"""What callers may ask of a pooler, today's and former words."""

from __future__ import annotations

from typing import Any

import pytest

from poolhouse import ConfigError, InvalidRequest, PoolerConfig, PoolingParams, UnsupportedTask
from poolhouse.params import Matryoshka
from poolhouse.settings import Settings
from poolhouse.tasks import TASKS, Task, parse_task

NONE = Matryoshka(8)


@pytest.mark.parametrize("kind", [PoolingParams, PoolerConfig])
@pytest.mark.parametrize("word", ["normalize", "softmax", "activation"])
@pytest.mark.parametrize("value", [True, False])
def test_former_words_for_use_activation_warn(kind: Any, word: str, value: bool) -> None:
    with pytest.warns(DeprecationWarning, match=f"`{word}` was renamed; use `use_activation`"):
        params = kind(**{word: value})
    assert params.use_activation is value


def test_former_words_of_calibration_warn_and_are_converted() -> None:
    with pytest.warns(DeprecationWarning, match="`logit_bias` was renamed; use `logit_mean`"):
        assert PoolerConfig(logit_bias=2.0).logit_mean == 2
    with pytest.warns(DeprecationWarning, match="`logit_scale` was renamed; use `logit_sigma"):
        assert PoolerConfig(logit_scale=4.0).logit_sigma == 0.25


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("given", [{"logit_sigma": 0.0}, {"logit_scale": 0}])
def test_a_division_by_zero_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))} must not be 0"):
        PoolerConfig.parse(given)


@pytest.mark.parametrize(
    ("given", "sequence", "tokens"),
    [
        ({"pooling_type": "mean"}, "MEAN", None),
        ({"pooling_type": "LAST"}, "LAST", None),
        ({"pooling_type": "step"}, None, "STEP"),
        ({"pooling_type": "ALL"}, None, "ALL"),
        ({"seq_pooling_type": "cls + mean", "tok_pooling_type": "all"}, "CLS+MEAN", "ALL"),
        ({}, None, None),
    ],
)
def test_pooling_types(given: dict[str, Any], sequence: str | None, tokens: str | None) -> None:
    config = PoolerConfig.parse(given)
    assert (config.seq_pooling_type, config.tok_pooling_type) == (sequence, tokens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pooling_type": "MEAN", "seq_pooling_type": "CLS"}, "not both"),
        ({"pooling_type": "MEDIAN"}, "unknown pooling type 'MEDIAN'"),
        ({"tok_pooling_type": "MEAN"}, "ALL or STEP, got 'MEAN'"),
        ({"pooling_type": 7}, "pooling_type must be a word, got 7"),
        ({"task": 3}, "task must be a word, got 3"),
        ({"step_tag_id": "x"}, "step_tag_id must be an integer, got 'x'"),
        ({"returned_token_ids": 3}, "returned_token_ids must be a list of integers or null, got 3"),
        ({"logit_sigma": "b"}, "logit_sigma must be a number, got 'b'"),
        ({"logit_scale": "c"}, "logit_scale must be a number, got 'c'"),
        ({"enable_chunked_processing": "yes"}, "enable_chunked_processing must be true or false, got 'yes'"),
        ({"poolingtype": "MEAN"}, "no field 'poolingtype'. Did you mean 'pooling_type'"),
        (7, "must be a PoolerConfig or a mapping, got int"),
    ],
)
def test_pooler_configs_that_make_no_sense_are_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoolerConfig.parse(given)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"dimensions": 2.5}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"use_activation": 1}, "use_activation"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"max_tokens_per_query": 0}, "max_tokens_per_query"),
        ({"max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ({"step_tag_id": "x"}, "step_tag_id"),
        ({"returned_token_ids": 3}, "returned_token_ids"),
        ({"returned_token_ids": "ab"}, "returned_token_ids"),
        ({"returned_token_ids": [1.5]}, "returned_token_ids"),
    ],
)
def test_params_of_the_wrong_kind_are_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as refused:
        PoolingParams(**given)
    assert refused.value.parameter == field


@pytest.mark.parametrize(
    ("task", "given", "wrong"),
    [
        ("classify", {"dimensions": 4}, "dimensions"),
        ("token_classify", {"dimensions": 4}, "dimensions"),
        ("embed", {"step_tag_id": 4}, "step_tag_id"),
        ("token_embed", {"returned_token_ids": [4]}, "returned_token_ids"),
    ],
)
def test_a_field_of_another_task_is_refused(task: Task, given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"Task '{task}' only supports .* does not support \['{wrong}'\]"):
        PoolingParams(**given).check(task, NONE, "tiny")


def test_the_sides_of_a_pair_are_limited_in_vllms_place_too() -> None:
    params = PoolingParams(extra_kwargs={"max_tokens_per_query": 3, "max_tokens_per_doc": 0})
    assert (params.max_tokens_per_query, params.max_tokens_per_doc) == (3, None)
    assert params.for_pooler() == PoolingParams()
    with pytest.raises(
        InvalidRequest, match=r"extra_kwargs has no 'max_tokens_per_dok'. Did you mean 'max_tokens_per_doc'"
    ):
        PoolingParams(extra_kwargs={"max_tokens_per_dok": 3})


def test_equal_poolings_compare_equal_whatever_was_cut() -> None:
    asked = PoolingParams(use_activation=False, truncate_prompt_tokens=5, max_tokens_per_doc=3)
    assert PoolingParams(task="embed").for_pooler() == PoolingParams()
    assert asked.for_pooler() == PoolingParams(use_activation=False)
    assert hash(PoolingParams(returned_token_ids=[1, 2])) == hash(PoolingParams(returned_token_ids=(1, 2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_tasks_by_their_names(task: Task) -> None:
    assert parse_task(task, TASKS) == task


@pytest.mark.parametrize(
    ("word", "supported", "meant"),
    [
        ("score", ("classify", "token_classify"), "classify"),
        ("encode", ("embed", "token_embed"), "token_embed"),
        ("encode", ("token_classify",), "token_classify"),
        ("encode", ("embed", "token_embed", "token_classify"), "token_embed"),
    ],
)
def test_former_tasks_warn(word: str, supported: tuple[Task, ...], meant: Task) -> None:
    with pytest.warns(DeprecationWarning, match=f"`{word}` was removed; use `{meant}`"):
        assert parse_task(word, supported) == meant


def test_tasks_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"Unknown task: 'embedd'.*Did you mean 'embed'"):
        parse_task("embedd", ("embed",))
    with pytest.raises(UnsupportedTask, match=r"Unsupported task: 'classify' Supported tasks: \['embed'\]"):
        parse_task("classify", ("embed",))
    with pytest.raises(UnsupportedTask, match="No IOProcessor plugin installed"):
        parse_task("plugin", ("embed",))


@pytest.mark.parametrize(
    ("task", "convert"),
    [("embed", "embed"), ("embedding", "embed"), ("encode", "embed"), ("classify", "classify"), ("score", "auto"),
     ("reward", "auto"), ("auto", "auto")],
)  # fmt: skip
def test_the_former_option_task_is_understood(task: str, convert: str) -> None:
    with pytest.warns(DeprecationWarning, match="`task` was renamed; use `runner='pooling' and convert`"):
        assert Settings.parse(task=task).convert == convert


def test_other_former_options() -> None:
    with pytest.warns(DeprecationWarning, match="`override_pooler_config` was renamed; use `pooler_config`"):
        assert Settings.parse(override_pooler_config={"pooling_type": "CLS"}).pooler_config == {"pooling_type": "CLS"}
    with pytest.raises(ConfigError, match="task='generate': Poolhouse runs pooling models only"):
        Settings.parse(task="generate")
    assert Settings.parse(model_impl="vllm").model_impl == "native"
    assert Settings.parse(hf_token=True).hf_token is None
    assert Settings.parse(seed=None).seed == 0


@pytest.mark.parametrize("nothing", [None, "", "none", "auto"])
@pytest.mark.parametrize("word", ["quantization", "quantization_config"])
def test_nothing_is_quantised_by_default(word: str, nothing: str | None) -> None:
    assert getattr(Settings.parse(**{word: nothing}), word) is None


@pytest.mark.parametrize(
    ("word", "words"),
    [("quantization", "possible are none, 'int8', .*'int4'"), ("quantization_config", "nothing to configure.*'int4'")],
)
def test_other_quantisation_is_refused_not_ignored(word: str, words: str) -> None:
    assert Settings.parse(quantization="int8").quantization == "int8"
    with pytest.raises(ConfigError, match=f"^{word}: .*{words}"):
        Settings.parse(**{word: "int4"})


def test_options_of_other_engines_warn_once_and_unknown_ones_are_refused() -> None:
    with pytest.warns(UserWarning, match="enforce_eager, gpu_memory_utilization"):
        Settings.parse(gpu_memory_utilization=0.5, enforce_eager=True)
    with pytest.raises(ConfigError, match=r"no option 'runer'. Did you mean 'runner'"):
        Settings.parse(runer="pooling")
    with pytest.raises(ConfigError, match=r"convert: .*'auto', 'none', 'embed' or 'classify'"):
        Settings.parse(convert="both")
