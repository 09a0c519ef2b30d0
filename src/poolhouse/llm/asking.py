"""What a caller of LLM says, turned into requests of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from poolhouse import scoring
from poolhouse.engine.engine import Engine
from poolhouse.engine.request import Request
from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean
from poolhouse.inputs.chat import score_template
from poolhouse.inputs.prompts import parse_prompts, parse_side
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task, parse_task

Params = PoolingParams | Sequence[PoolingParams] | None
Options = Mapping[str, Any] | None

_NO_TASK = """`pooling_task` is required. Choose one of these, or use the method made for it:
- embeddings: `LLM.embed(...)` or `pooling_task="embed"`
- multi-vector retrieval: `pooling_task="token_embed"`
- classification: `LLM.classify(...)` or `pooling_task="classify"`
- rewards and token classification: `pooling_task="token_classify"`"""

_CANNOT: Mapping[Task, str] = {
    "embed": "Embedding API is not supported by this model. Try converting the model using `--convert embed`.",
    "classify": "Classification API is not supported by this model. Try converting the model using `--convert classify`.",
}


def requests_of(
    engine: Engine, prompts: Any, task: Task, params: Params, prompt_name: str | None, tokenization: Options
) -> list[Request]:
    """A request per prompt, in order.

    params: one for all prompts, or one for each. tokenization: vLLM's `tokenization_kwargs`.

    Raises:
        UnsupportedTask: naming what the model can do. InvalidRequest: naming what is wrong.
    """
    if task not in engine.tasks:
        cannot = _CANNOT.get(task, f"This model does not support {task}.")
        raise UnsupportedTask(f"{cannot} Supported tasks: {list(engine.tasks)}")
    parsed = parse_prompts(prompts)
    cut, special_tokens = _tokenization(tokenization)
    _check_types(params, prompt_name)
    if params is None or isinstance(params, PoolingParams):
        one = _with_cut(params or PoolingParams(), cut)
        return [Request(prompt, task, one, prompt_name, special_tokens) for prompt in parsed]
    if len(params) != len(parsed):
        raise InvalidRequest(
            f"pooling_params has {len(params)} entries for {len(parsed)} prompts; give one, or one per prompt.",
            "pooling_params",
        )
    return [
        Request(prompt, task, _with_cut(own, cut), prompt_name, special_tokens)
        for prompt, own in zip(parsed, params, strict=True)
    ]


def score_plan(
    engine: Engine,
    data_1: Any,
    data_2: Any,
    params: PoolingParams | None,
    tokenization: Options,
    instruction: str | None,
    chat_template: str | None = None,
    chat_template_kwargs: Options = None,
) -> scoring.Plan:
    """Requests and composition of `LLM.score`.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.scoring.plan`.
    """
    cut, special_tokens = _tokenization(tokenization)
    if not special_tokens:
        raise InvalidRequest("add_special_tokens=False means nothing to pairs.", "add_special_tokens")
    asked = scoring.Asked(
        _with_cut(params or PoolingParams(), cut),
        instruction,
        None if chat_template is None else score_template(chat_template),
        chat_template_kwargs or {},
    )
    return scoring.plan(engine, parse_side(data_1, "data_1"), parse_side(data_2, "data_2"), asked)


def required_task(word: str | None, engine: Engine) -> Task:
    """The task that `LLM.encode` was told.

    Raises:
        InvalidRequest: none was; the message lists them.
    """
    if word is None:
        raise InvalidRequest(_NO_TASK, "pooling_task")
    return parse_task(word, engine.tasks)


def _check_types(params: object, prompt_name: object) -> None:
    if prompt_name is not None and not isinstance(prompt_name, str):
        raise InvalidRequest(f"prompt_name must be a text or None, got {prompt_name!r}.", "prompt_name", prompt_name)
    several = params if isinstance(params, list | tuple) else (params,)
    for one in several:
        if not isinstance(one, PoolingParams | None):
            raise InvalidRequest(
                f"pooling_params must be PoolingParams, or a list of them with one per prompt, got {one!r}.",
                "pooling_params",
                one,
            )


def _tokenization(options: Mapping[str, Any] | None) -> tuple[PoolingParams | None, bool]:
    """What `tokenization_kwargs` asks: how to cut (None: nothing said), and whether to add special tokens.

    Raises:
        InvalidRequest: an option that means nothing here.
    """
    given = dict(options or {})
    special_tokens = bool(given.pop("add_special_tokens", True))
    side = given.pop("truncation_side", "right")
    keep = given.pop("truncate_prompt_tokens", None)
    longest = given.pop("max_length", None)
    truncation = given.pop("truncation", None)
    known = ("add_special_tokens", "truncate_prompt_tokens", "truncation_side", "max_length", "truncation")
    for name in given:
        raise InvalidRequest(
            f"tokenization_kwargs has no option '{name}'.{did_you_mean(name, known)} Options: {list(known)}.", name
        )
    if keep is None and truncation not in (None, False):
        keep = longest if longest is not None else -1
    if keep is None and side == "right":
        return None, special_tokens
    return PoolingParams(truncate_prompt_tokens=keep, truncation_side=side), special_tokens


def _with_cut(params: PoolingParams, cut: PoolingParams | None) -> PoolingParams:
    if cut is None:
        return params
    return replace(params, truncate_prompt_tokens=cut.truncate_prompt_tokens, truncation_side=cut.truncation_side)
