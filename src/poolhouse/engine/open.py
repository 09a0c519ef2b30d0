"""Settings -> a running engine, for `LLM` and for the server alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch

from poolhouse.engine.engine import Engine
from poolhouse.engine.options import EngineOptions
from poolhouse.engine.process import keep_freed_memory, limit_threads_to_quota
from poolhouse.engine.workers import worker_count
from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest, UnsupportedDimensions
from poolhouse.files import Folder
from poolhouse.inputs.conversations import ContentFormat, Conversations
from poolhouse.inputs.templates.score import ScoreTemplate, built_in, score_template
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.adapters.adapters import AdapterOptions
from poolhouse.models.files import hub
from poolhouse.models.files.hub import locate
from poolhouse.models.files.routes import StaticWeights
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions
from poolhouse.params import PoolerConfig, PoolingParams
from poolhouse.plugins import load_plugin
from poolhouse.settings import Settings
from poolhouse.tasks import parse_task
from poolhouse.vectors.precision import Calibration

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("poolhouse")

# Tokens of one pack. Small packs stay in a CPU's caches; a GPU wants enough work per launch.
_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 32768


def open_engine(settings: Settings) -> Engine:
    """Load what `settings` name and start its engine.

    Raises:
        ConfigError, CheckpointError: in words for the user.
    """
    if settings.runner in ("generate", "draft"):
        raise ConfigError(f"runner={settings.runner!r}: Poolhouse runs pooling models only; use 'pooling' or 'auto'.")
    limit_threads_to_quota()
    if settings.model is None:
        folder, name = hub.embedded_model(), hub.NAME
        log.warning("No model was named: using the embedded default, %s.", name)
    else:
        name = settings.model
        folder = locate(
            name,
            revision=settings.revision,
            download_dir=settings.download_dir,
            token=settings.hf_token,
            variant=settings.variant,
        )
    torch.manual_seed(settings.seed)
    pooler = PoolerConfig.parse(settings.pooler_config)
    calibration = None if settings.int8_calibration is None else Calibration.load(settings.int8_calibration)
    model = _in_a_passing_thread(
        load,
        folder,
        LoadOptions(
            name=settings.names[0] if settings.names else name,
            variant=settings.variant,
            dtype=settings.dtype,
            device=settings.device,
            implementation=settings.model_impl,
            trust_remote_code=settings.trust_remote_code,
            max_tokens=settings.max_model_len,
            overrides=settings.hf_overrides,
            convert=settings.convert,
            pooler=pooler,
            matryoshka_dimensions=tuple(settings.matryoshka_dimensions or ()),
            adapters=_adapters(settings),
            colbert_compat=settings.colbert_compat,
            score_compat=settings.score_compat,
        ),
    )
    model = _preferring(pooler.task, model)
    files, tokenizer_folder = model.plan.files, model.plan.tokenizer
    if settings.tokenizer is not None:
        named = locate(
            settings.tokenizer,
            revision=settings.tokenizer_revision,
            download_dir=settings.download_dir,
            token=settings.hf_token,
        )
        tokenizer_folder = Folder(named)
    tokenizer = Tokenizer.from_folder(
        tokenizer_folder,
        lower_case=files.do_lower_case,
        trust_remote_code=settings.trust_remote_code,
        vocabulary_size=model.facts.sizes.vocabulary_size,
        model_types=model.facts.sizes.token_types,
    )
    model = replace(model, facts=replace(model.facts, notes=(*model.facts.notes, *tokenizer.notes)))
    given = _given_template(settings.chat_template)
    model, static_tokenizer = _static(model, settings)
    plugin = settings.io_processor_plugin or model.facts.plugin
    default_params = _default_params(pooler, files.truncate_dim, model.facts.width)
    if calibration is not None:
        _check_calibration(calibration, model, default_params.dimensions)
    on_cpu = model.facts.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    default_tokens = _CPU_BATCH_TOKENS if on_cpu else _CUDA_BATCH_TOKENS
    return Engine(
        model,
        tokenizer,
        EngineOptions(
            max_batch_tokens=settings.max_num_batched_tokens or default_tokens,
            overflow=_overflow(settings, pooler),
            max_prompt_tokens=pooler.max_embed_len,
            tokenizer_threads=settings.tokenizer_workers,
            workers=worker_count(settings.lanes, model),
            default_params=default_params,
            score_template=_score_template(given, model),
            conversations=_conversations(given, tokenizer_folder, settings.chat_template_content_format),
            aliases=settings.names[1:],
            unlisted_names=() if settings.names else hub.other_names(name, folder),
            truncation_side=tokenizer.truncation_side,
            calibration=calibration,
        ),
        None if plugin is None else load_plugin(plugin, settings, tokenizer),
        static_tokenizer,
    )


def _static(model: Model, settings: Settings) -> tuple[Model, Tokenizer | None]:
    """The model, and the tokenizer of its side that is looked up, if it has one.

    Raises:
        CheckpointError: a table of more tokens than the other side has.
    """
    static = model.routes.static
    if static is None:
        return model, None
    if not isinstance(static, StaticWeights):
        return model, Tokenizer.from_folder(static.tokenizer_folder, trust_remote_code=settings.trust_remote_code)
    width = model.facts.width
    size = width if static.by_token is not None else len(static.weights)
    tokenizer = Tokenizer.from_folder(
        static.tokenizer_folder, trust_remote_code=settings.trust_remote_code, vocabulary_size=size
    )
    if size > width:
        raise CheckpointError(
            f"{static.tokenizer_folder} weighs {size} tokens, but the other side of the model has {width}."
        )
    static = static.with_ids(width, tokenizer.id_of)
    return replace(model, routes=replace(model.routes, static=static)), tokenizer


def _found(settings: Settings, name: str) -> Path:
    """The folder of an adapter, or of an adapter's base: a path or a hub id, looked up as the model is."""
    return locate(name, download_dir=settings.download_dir, token=settings.hf_token, variant=settings.variant)


def _preferring(word: str | None, model: Model) -> Model:
    """The model with this task as its first.

    Raises:
        ConfigError: it has no such task.
    """
    if word is None:
        return model
    try:
        task = parse_task(word, model.tasks)
    except InvalidRequest as error:
        raise ConfigError(f"pooler_config: task: {error}") from None
    return replace(model, pipelines={task: model.pipelines[task], **model.pipelines})


def _adapters(settings: Settings) -> AdapterOptions:
    """What the settings say of adapters."""
    find = partial(_found, settings)
    modules = {name: find(source) for name, source in (settings.lora_modules or {}).items()}
    merge = settings.merge_adapter
    if merge is not None and merge not in modules and "/" in merge:
        modules[merge] = find(merge)
    return AdapterOptions(modules, merge, (), settings.max_lora_rank, settings.enable_lora, find)


def _overflow(settings: Settings, pooler: PoolerConfig) -> Literal["error", "truncate", "chunk"]:
    """What to do with over-long prompts, of the two options that may say it."""
    if not pooler.enable_chunked_processing:
        return settings.overflow
    if settings.overflow == "truncate":
        raise ConfigError(
            "overflow='truncate' cuts over-long prompts, enable_chunked_processing splits them: choose one."
        )
    return "chunk"


def _given_template(words: str | None) -> ScoreTemplate | None:
    """The user's template, by what they wrote.

    Raises:
        ConfigError: none, or one that does not compile.
    """
    if words is None:
        return None
    from poolhouse.inputs.templates import sandbox  # draws in jinja2, which most models do without

    try:
        given = score_template(words)
        sandbox.syntax_tree(given.text, f"template of chat_template ({given.name})")
        return given
    except InvalidRequest as error:
        raise ConfigError(str(error)) from error


def _conversations(given: ScoreTemplate | None, folder: Folder, content_format: ContentFormat) -> Conversations:
    """The user's template, else those of the tokenizer; the built-in ones are for pairs alone."""
    text = None if given is None or given.name in built_in() else given.text
    return Conversations.of(folder, text, content_format)


def _score_template(given: ScoreTemplate | None, model: Model) -> ScoreTemplate | None:
    """The user's template, else the model's own.

    Raises:
        ConfigError: a template that does not work.
    """
    own = model.facts.score_template
    try:
        if given is not None:
            return given.bind()
        return None if own is None else own.bind()
    except InvalidRequest as error:
        if own is not None:
            raise ConfigError(f"{error} Another one can be set by chat_template.") from error
        log.info("chat_template serves messages alone, not pairs of texts: %s", error)
        return None


def _default_params(pooler: PoolerConfig, truncate_dim: int | None, width: int) -> PoolingParams:
    """What holds where a request says nothing: the user's words, else those of sentence-transformers' files."""
    try:
        params = PoolingParams(dimensions=pooler.dimensions, use_activation=pooler.use_activation)
    except InvalidRequest as error:
        raise ConfigError(f"pooler_config: {error}.") from None
    if params.dimensions is None:
        return replace(params, dimensions=truncate_dim)
    if not 1 <= params.dimensions <= width:
        raise ConfigError(f"pooler_config: dimensions must be from 1 to {width}, got {params.dimensions}.")
    return params


def _check_calibration(calibration: Calibration, model: Model, dimensions: int | None) -> None:
    """Refuse ranges of vectors that the model never answers with.

    Raises:
        ConfigError: naming both widths.
    """
    pipeline = model.pipelines.get("embed") or model.pipelines.get("token_embed")
    if pipeline is None:
        raise ConfigError(f"int8_calibration: the model makes no vectors; its tasks are {list(model.tasks)}.")
    if calibration.width in (pipeline.width, dimensions):
        return
    try:
        model.facts.matryoshka.check(calibration.width, model.facts.name)
    except UnsupportedDimensions:
        raise ConfigError(
            f"int8_calibration: the ranges are those of {calibration.width} dimensions, and the model's vectors have "
            f"{dimensions or pipeline.width}; make them anew with `poolhouse calibrate`."
        ) from None


def _in_a_passing_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call in a thread that ends with it, and its pool of OpenMP workers too.

    While a second pool lives beside the device thread's, libgomp lets workers sleep between operations instead of
    spinning, and a short query takes twice as long.
    """
    with ThreadPoolExecutor(1, "poolhouse-load") as thread:
        return thread.submit(call, *args, **kwargs).result()
