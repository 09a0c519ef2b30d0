"""Open: from settings to a running engine, for `LLM` and for the server alike."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch

from poolhouse import kernels
from poolhouse.engine.engine import Engine
from poolhouse.engine.media import MediaOptions
from poolhouse.engine.options import EngineOptions
from poolhouse.engine.process import cpu_quota, keep_freed_memory, limit_threads_to_quota
from poolhouse.engine.workers import one_core_tokens, worker_count
from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest, UnsupportedDimensions
from poolhouse.files import Folder
from poolhouse.inputs.conversations import ContentFormat, Conversations
from poolhouse.inputs.media.fetch import FetchPolicy
from poolhouse.inputs.media.images import ImageLimits
from poolhouse.inputs.pictures import PictureReader
from poolhouse.inputs.templates.score import ScoreTemplate, built_in, score_template
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.adapters.adapters import AdapterOptions
from poolhouse.models.files import hub
from poolhouse.models.files.gguf import folder_of
from poolhouse.models.files.hub import locate
from poolhouse.models.files.quantised import bits_of
from poolhouse.models.files.routes import StaticWeights
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions, device_of, dtype_of
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
        ConfigError, CheckpointError: with a message for the user.
    """
    if settings.runner in ("generate", "draft"):
        raise ConfigError(f"runner={settings.runner!r}: Poolhouse runs pooling models only; use 'pooling' or 'auto'.")
    limit_threads_to_quota()
    torch.manual_seed(settings.seed)
    name, folder = _named_folder(settings)
    pooler = PoolerConfig.parse(settings.pooler_config)
    calibration = None if settings.int8_calibration is None else Calibration.load(settings.int8_calibration)
    # Says which ones there are, or that the environment asks for something else.
    kernels.level()
    model = _in_its_own_thread(load, folder, _load_options(settings, name, pooler))
    model = _with_first_task(pooler.task, model)
    tokenizer_folder, tokenizer = _tokenizer(settings, model)
    model = replace(model, facts=replace(model.facts, notes=(*model.facts.notes, *tokenizer.notes)))
    template = _users_template(settings.chat_template)
    model, static_tokenizer = _with_static(model, settings)
    plugin = settings.io_processor_plugin or model.facts.plugin
    default_params = _default_params(pooler, model)
    if calibration is not None:
        _check_calibration(calibration, model, default_params.dimensions)
    on_cpu = model.facts.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    options = EngineOptions(
        max_batch_tokens=settings.max_num_batched_tokens or (_CPU_BATCH_TOKENS if on_cpu else _CUDA_BATCH_TOKENS),
        overflow=_overflow(settings, pooler),
        max_prompt_tokens=pooler.max_embed_len,
        tokenizer_threads=settings.tokenizer_workers,
        workers=worker_count(settings.lanes, model),
        one_core_tokens=one_core_tokens(model),
        default_params=default_params,
        score_template=_score_template(template, model),
        conversations=_conversations(template, tokenizer_folder, settings.chat_template_content_format, model),
        aliases=settings.names[1:],
        unlisted_names=() if settings.names else hub.other_names(name, folder),
        truncation_side=tokenizer.truncation_side,
        calibration=calibration,
        prefix_sharing=settings.prefix_sharing,
        media=MediaOptions() if model.facts.pictures is None else _media(settings, model.facts.pictures),
    )
    return Engine(
        model,
        tokenizer,
        options,
        None if plugin is None else load_plugin(plugin, settings, tokenizer),
        static_tokenizer,
    )


def memory_of(settings: Settings, config: Mapping[str, object], numbers: int, other_bytes: int) -> tuple[int, int]:
    """Bytes that the weights of a model will take, and packs of prompts beside them, before it is loaded.

    numbers: floating-point numbers of its weights. other_bytes: of its other tensors; those of quantised weights become
    numbers.

    Raises:
        ConfigError: a device, or a type of numbers, that there is none of.
    """
    device = device_of(settings.device)
    width = dtype_of(settings.dtype, config, None, device).itemsize
    tokens = settings.max_num_batched_tokens or (_CPU_BATCH_TOKENS if device.type == "cpu" else _CUDA_BATCH_TOKENS)
    features = next((size for key in _FEATURES if isinstance(size := config.get(key), int)), _MANY_FEATURES)
    if bits := bits_of(config):
        numbers, other_bytes = numbers + other_bytes * 8 // bits, 0
    return numbers * width + other_bytes, tokens * features * width * _NUMBERS_PER_FEATURE


# What configs call the features of a hidden state; where none says it, there are so many.
_FEATURES = ("hidden_size", "d_model", "dim", "n_embd")
_MANY_FEATURES = 1024
# Of one token on its way through a block: the residual, query, key and value, and four times its features within.
_NUMBERS_PER_FEATURE = 16


def _media(settings: Settings, reader: PictureReader) -> MediaOptions:
    """How pictures are loaded.

    Raises:
        ConfigError: a folder that does not exist, a domain that is none, an option that the picture processor lacks.
    """
    folder, options = settings.allowed_local_media_path, settings.mm_processor_kwargs or {}
    policy = FetchPolicy(
        settings.allowed_media_domains,
        None if folder is None else Path(folder),
        settings.max_image_bytes,
        settings.media_connect_seconds,
        settings.media_seconds,
        settings.media_redirects,
    )
    if options:
        from PIL import Image

        try:
            reader.processor(Image.new("RGB", (64, 64)), options)
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
    return MediaOptions(
        policy,
        ImageLimits(settings.max_image_pixels, settings.max_image_ratio),
        settings.media_threads or min(8, max(1, math.ceil(cpu_quota() or os.cpu_count() or 1))),
        (settings.limit_mm_per_prompt or {}).get("image"),
        options,
        settings.media_waiting_bytes,
        settings.media_cache_bytes,
    )


def _named_folder(settings: Settings) -> tuple[str, Path]:
    """The model's name and folder; those of the embedded model where none is named."""
    if settings.model is None:
        log.warning("No model was named: using the embedded default, %s.", hub.NAME)
        return hub.NAME, hub.embedded_model()
    folder = locate(
        settings.model,
        revision=settings.revision,
        download_dir=settings.download_dir,
        token=settings.hf_token,
        variant=settings.variant,
    )
    return settings.model, folder


def _load_options(settings: Settings, name: str, pooler: PoolerConfig) -> LoadOptions:
    return LoadOptions(
        name=settings.names[0] if settings.names else name,
        variant=settings.variant,
        dtype=settings.dtype,
        quantization=settings.quantization,
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
    )


def _tokenizer(settings: Settings, model: Model) -> tuple[Folder, Tokenizer]:
    """The tokenizer that the user names, else the model's, and its folder."""
    folder = model.plan.tokenizer
    if settings.tokenizer is not None:
        folder = folder_of(
            locate(
                settings.tokenizer,
                revision=settings.tokenizer_revision,
                download_dir=settings.download_dir,
                token=settings.hf_token,
            )
        )
    pruner = model.plan.pruner if model.plan.prunes else None
    static = model.plan.static
    return folder, Tokenizer.from_folder(
        folder,
        lower_case=model.plan.files.do_lower_case,
        trust_remote_code=settings.trust_remote_code,
        vocabulary_size=model.facts.sizes.vocabulary_size,
        # Pruners were trained without types.
        model_types=model.facts.sizes.token_types if pruner is None else 1,
        one_separator=pruner is not None and pruner.one_separator,
        by_characters=static is not None and static.cuts_by_characters(model.plan.max_tokens),
    )


def _with_static(model: Model, settings: Settings) -> tuple[Model, Tokenizer | None]:
    """The model, and the tokenizer of the texts that it looks up instead of running them, if there are such.

    Raises:
        CheckpointError: a table of more tokens than the rest of the model knows.
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
            f"{static.tokenizer_folder} has weights of {size} tokens, but the rest of the model knows {width}."
        )
    static = static.with_ids(width, tokenizer.id_of)
    return replace(model, routes=replace(model.routes, static=static)), tokenizer


def _adapter_folder(settings: Settings, name: str) -> Path:
    """The folder of an adapter, or of an adapter's base: a path or a hub id, looked up as the model is."""
    return locate(name, download_dir=settings.download_dir, token=settings.hf_token, variant=settings.variant)


def _with_first_task(name: str | None, model: Model) -> Model:
    """The model with this task as its first.

    Raises:
        ConfigError: it has no such task.
    """
    if name is None:
        return model
    try:
        task = parse_task(name, model.tasks)
    except InvalidRequest as error:
        raise ConfigError(f"pooler_config: task: {error}") from None
    return replace(model, pipelines={task: model.pipelines[task], **model.pipelines})


def _adapters(settings: Settings) -> AdapterOptions:
    find = partial(_adapter_folder, settings)
    modules = {name: Folder(find(source)) for name, source in (settings.lora_modules or {}).items()}
    merge = settings.merge_adapter
    if merge is not None and merge not in modules and "/" in merge:
        modules[merge] = Folder(find(merge))
    return AdapterOptions(modules, merge, (), settings.max_lora_rank, settings.enable_lora, find)


def _overflow(settings: Settings, pooler: PoolerConfig) -> Literal["error", "truncate", "chunk"]:
    """What to do with over-long prompts, by the two options that decide it.

    Raises:
        ConfigError: they contradict each other.
    """
    if not pooler.enable_chunked_processing:
        return settings.overflow
    if settings.overflow == "truncate":
        raise ConfigError(
            "overflow='truncate' cuts over-long prompts, enable_chunked_processing splits them: choose one."
        )
    return "chunk"


def _users_template(source: str | None) -> ScoreTemplate | None:
    """The template that the user names or writes.

    Raises:
        ConfigError: there is none of that name, or it does not compile.
    """
    if source is None:
        return None
    from poolhouse.inputs.templates import sandbox  # draws in jinja2, which most models do without

    try:
        template = score_template(source)
        sandbox.syntax_tree(template.text, f"template of chat_template ({template.name})")
        return template
    except InvalidRequest as error:
        raise ConfigError(str(error)) from error


def _conversations(
    users: ScoreTemplate | None, folder: Folder, content_format: ContentFormat, model: Model
) -> Conversations:
    """The user's template, else those of the tokenizer; the built-in ones are for pairs alone."""
    text = None if users is None or users.name in built_in() else users.text
    reader = model.facts.pictures
    return Conversations.of(folder, text, content_format, "" if reader is None else reader.placeholder)


def _score_template(users: ScoreTemplate | None, model: Model) -> ScoreTemplate | None:
    """The user's template, else the model's own.

    Raises:
        ConfigError: a template that does not work.
    """
    own = model.facts.score_template
    try:
        if users is not None:
            return users.bind()
        return None if own is None else own.bind()
    except InvalidRequest as error:
        if own is not None:
            raise ConfigError(f"{error} Another one can be set by chat_template.") from error
        log.info("chat_template serves messages alone, not pairs of texts: %s", error)
        return None


def _default_params(pooler: PoolerConfig, model: Model) -> PoolingParams:
    """What holds where a request says nothing: the user's choice, else that of sentence-transformers' files."""
    try:
        params = PoolingParams(dimensions=pooler.dimensions, use_activation=pooler.use_activation)
    except InvalidRequest as error:
        raise ConfigError(f"pooler_config: {error}.") from None
    width = model.facts.width
    if params.dimensions is None:
        return replace(params, dimensions=model.plan.files.truncate_dim)
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


def _in_its_own_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call in a thread that ends afterwards, and its pool of OpenMP threads too.

    While a second pool lives beside that of the worker, libgomp lets threads sleep between operations instead of
    spinning, and a short query takes twice as long.
    """
    with ThreadPoolExecutor(1, "poolhouse-load") as thread:
        return thread.submit(call, *args, **kwargs).result()
