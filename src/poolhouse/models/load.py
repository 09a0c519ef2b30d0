"""A folder of model files -> Model; the only place that decides who serves it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from poolhouse.errors import ConfigError
from poolhouse.models.adapters import AdapterOptions, Adapters
from poolhouse.models.backbone import Backbone
from poolhouse.models.checkpoint import Checkpoint, read_json
from poolhouse.models.families import Family, family_of
from poolhouse.models.families._config import NotNative
from poolhouse.models.heads import LoadedHead, check_head, read_head, step_head
from poolhouse.models.model import Facts, Model
from poolhouse.models.native import load_transformer
from poolhouse.models.published import published_pooling, published_sizes, repository
from poolhouse.models.rerankers import Reranker, listwise_vectors, read_reranker, token_head
from poolhouse.models.roles import Convert, Role, architecture, head_of, judges_steps, role_of
from poolhouse.params import Matryoshka, PoolerConfig
from poolhouse.pooling.activations import classifier_activation
from poolhouse.pooling.pipelines import Pipeline, classify_pipelines, embed_pipelines
from poolhouse.pooling.sentence_transformers import SentenceTransformersFiles, read_sentence_transformers
from poolhouse.tasks import Task

log = logging.getLogger("poolhouse")

Overrides = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]] | None

# Where neither the config nor the tokenizer states a limit.
_DEFAULT_MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a user may decide about loading; see `Settings` for the words."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    implementation: Literal["auto", "native", "transformers"] = "auto"
    trust_remote_code: bool = False
    max_tokens: int | None = None
    overrides: Overrides = None
    convert: Convert = "auto"
    pooler: PoolerConfig = PoolerConfig()
    matryoshka_dimensions: tuple[int, ...] = ()
    # Where config.json and weights lie, if not where the folder's own files say.
    weights_folder: Path | None = None
    adapters: AdapterOptions = AdapterOptions()


@dataclass(frozen=True, slots=True)
class _Served:
    """A backbone, what the loader must know of it, and the head of a classifier."""

    backbone: Backbone
    words: str
    hidden_size: int
    vocabulary_size: int
    parameters: int
    max_tokens: int | None
    pooling: str
    head: LoadedHead | None = None
    notes: tuple[str, ...] = ()
    stated_pooling: str | None = None
    adapters: Adapters | None = None


def load(folder: Path, options: LoadOptions) -> Model:
    """The model in `folder`.

    Raises:
        CheckpointError: files missing, corrupt or not understood. ConfigError: an option that cannot be honoured.
    """
    files = read_sentence_transformers(folder)
    checkpoint = Checkpoint(options.weights_folder or (folder if files is None else files.transformer_folder))
    config = _overridden(checkpoint.config, options.overrides)
    device = _device(options.device)
    reranker = Reranker()
    if options.convert != "embed" and not judges_steps(config, options.pooler):
        reranker = read_reranker(checkpoint, folder, config, files, options.name)
    most = reranker.max_tokens if options.max_tokens is None else options.max_tokens
    options = replace(options, dtype=reranker.dtype(options.dtype, device), max_tokens=most)
    role: Role = "classify"
    if reranker.tokens is None:
        role = role_of(config, options.convert, files is not None and files.pooling is not None, options.pooler)
    served = _serve(checkpoint, config, role, device, options, reranker)
    task_prompts = {} if served.adapters is None else served.adapters.prompts
    default_pooling = served.stated_pooling or published_pooling(folder) or served.pooling
    if files is not None and served.stated_pooling is not None:
        files = replace(files, pooling=(served.stated_pooling,))
    found = _pipelines(served, config, files, default_pooling, options)
    if reranker.listwise is not None:
        found = listwise_vectors(reranker, checkpoint.tensors)
    pipelines = {task: pipeline.to(device) for task, pipeline in found.items()}
    width = next(iter(pipelines.values())).width
    labels, about_labels = _labels(config, served.head)
    matryoshka, about_sizes = _matryoshka(config, options.matryoshka_dimensions, width, folder)
    backbone_dtype = _dtype(options.dtype, config, family_of(config), device)
    return Model(
        backbone=served.backbone,
        pipelines=pipelines,
        facts=Facts(
            name=options.name,
            path=str(folder),
            architecture=", ".join(config.get("architectures") or [str(config.get("model_type"))]),
            served_by=served.words,
            max_tokens=_max_tokens(served.max_tokens, checkpoint.folder, files, options.max_tokens),
            vocabulary_size=served.vocabulary_size,
            hidden_size=served.hidden_size,
            width=width,
            parameters=served.parameters,
            dtype=backbone_dtype,
            device=device,
            matryoshka=matryoshka,
            prompts={**task_prompts, **({} if files is None else files.prompts)},
            default_prompt_name=None if files is None else files.default_prompt_name,
            labels=labels,
            plugin=config.get("io_processor_plugin"),
            recipe=reranker.recipe,
            listwise=reranker.listwise,
            notes=(*reranker.notes, *served.notes, *about_labels, *about_sizes),
        ),
        adapters=served.adapters,
    )


def _pipelines(
    served: _Served,
    config: Mapping[str, Any],
    files: SentenceTransformersFiles | None,
    default_pooling: str,
    options: LoadOptions,
) -> dict[Task, Pipeline]:
    """What the model answers: vectors, or labels where it has a head for them."""
    if served.head is None:
        return embed_pipelines(served.hidden_size, options.pooler, files, default_pooling)
    head = served.head.head
    return classify_pipelines(
        served.head.steps,
        served.head.labels,
        options.pooler,
        classifier_activation(config, served.head.labels, None if files is None else files.activation),
        pooling=head.pooling,
        fixed=head.fixed,
        late=head.late,
        use_activation=head.use_activation,
        step_tag_id=head.step_tag_id,
        columns=served.head.columns,
    )


def _labels(config: Mapping[str, Any], head: LoadedHead | None) -> tuple[dict[int, str], tuple[str, ...]]:
    """The names of a classifier's labels, and a note where the config names another number of them."""
    if head is None:
        return {}, ()
    names = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    if names and len(names) != head.labels:
        return {}, (f"The config names {len(names)} labels, but the head has {head.labels}: they are left unnamed.",)
    return names, ()


def _serve(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    device: torch.device,
    options: LoadOptions,
    reranker: Reranker,
) -> _Served:
    """Our Transformer where a family knows the checkpoint, else transformers."""
    model_type = str(config.get("model_type", ""))
    family = family_of(config)
    if options.implementation == "native" and family is None:
        raise ConfigError(f"model_impl='native': no native family serves model_type {model_type!r}.")
    if family is None or options.implementation == "transformers":
        return _transformers(checkpoint, config, role, device, options, (), reranker)
    try:
        return _native(family, checkpoint, config, role, device, options, reranker)
    except NotNative as reason:
        if options.implementation == "native":
            raise
        return _transformers(checkpoint, config, role, device, options, (f"Not served natively: {reason}",), reranker)


def _native(
    family: Family,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    device: torch.device,
    options: LoadOptions,
    reranker: Reranker,
) -> _Served:
    dtype = _dtype(options.dtype, config, family, device)
    loaded = load_transformer(family, config, checkpoint, dtype, device, options.adapters)
    head = None
    if judges_steps(config, options.pooler):
        head = step_head(checkpoint.tensors, loaded.token_table, options.pooler)
    elif reranker.tokens is not None:
        head = token_head(reranker.tokens, checkpoint.tensors, config)
    elif role != "embed":
        head = read_head(head_of(family, config, role), checkpoint.tensors, loaded.prefix, architecture(config))
    if head is not None:
        check_head(head, loaded.hidden_size, architecture(config))
    left = tuple(name for name in loaded.aside if head is None or name not in head.used)
    notes = [f"Tensors left out: {_short(left)}."] if left else []
    if config.get("is_causal") is False and any("CausalLM" in name for name in config.get("architectures") or ()):
        notes.append(
            "config.json says is_causal: false, so tokens see both sides, as in transformers, although the model is "
            "named after a decoder. hf_overrides={'is_causal': True} makes it one."
        )
    merged = [str(folder) for folder in options.adapters.base_merge] + [options.adapters.merge or ""]
    notes += [f"Merged into the weights: the adapter {name}." for name in merged if name]
    if loaded.adapters.names:
        notes.append(f"Adapters: {_short(loaded.adapters.names)}.")
    return _Served(
        backbone=loaded.transformer,
        words=f"native {config['model_type']}, packed",
        hidden_size=loaded.hidden_size,
        vocabulary_size=loaded.vocabulary_size,
        parameters=loaded.parameters,
        max_tokens=loaded.max_tokens,
        pooling=family.pooling,
        head=head,
        notes=tuple(notes),
        stated_pooling=family.stated_pooling(config),
        adapters=loaded.adapters,
    )


def _transformers(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    device: torch.device,
    options: LoadOptions,
    notes: tuple[str, ...],
    reranker: Reranker,
) -> _Served:
    if role != "embed" and reranker.tokens is None:
        raise ConfigError(f"{architecture(config)} is not served natively, and its head is not read yet.")
    from poolhouse.models.hugging_face import load_hugging_face

    if options.adapters.asked:
        raise ConfigError("Adapters are for models of the native families; transformers serves this one.")
    fallback = load_hugging_face(
        checkpoint,
        config,
        _dtype(options.dtype, config, None, device),
        device,
        trust_remote_code=options.trust_remote_code,
    )
    return _Served(
        backbone=fallback.backbone,
        words=f"transformers, {fallback.why}",
        hidden_size=fallback.hidden_size,
        vocabulary_size=fallback.vocabulary_size,
        parameters=fallback.parameters,
        max_tokens=fallback.max_tokens,
        pooling=fallback.pooling,
        head=None if reranker.tokens is None else token_head(reranker.tokens, checkpoint.tensors, config),
        notes=(*notes, *fallback.notes),
    )


def _overridden(config: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """config.json with the user's changes; nested objects are merged key by key."""
    if overrides is None:
        return config
    if callable(overrides):
        changed = overrides(dict(config))
        if not isinstance(changed, Mapping):
            raise ConfigError(f"hf_overrides must return the changed config, a mapping; it returned {changed!r}.")
        return dict(changed)
    merged = dict(config)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _device(word: str) -> torch.device:
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError as error:
        raise ConfigError(f"device={word!r} is not a device; try 'auto', 'cpu', 'cuda' or 'cuda:0'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={word!r}, but this process sees no CUDA device.")
    return device


_DTYPES = {
    **dict.fromkeys(("float32", "float"), torch.float32),
    **dict.fromkeys(("float16", "half"), torch.float16),
    "bfloat16": torch.bfloat16,
}


def _dtype(word: str, config: Mapping[str, Any], family: Family | None, device: torch.device) -> torch.dtype:
    """float32 on CPUs, whose half types are slow; on CUDA as stored, float32 cut to a half type that is safe."""
    if word != "auto":
        if word not in _DTYPES:
            raise ConfigError(f"dtype={word!r} is not one of {['auto', *_DTYPES]}.")
        return _DTYPES[word]
    if device.type != "cuda":
        return torch.float32
    stored = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    if stored != torch.float32:
        return stored
    return torch.float16 if family is not None and family.float16 else torch.bfloat16


def _max_tokens(
    by_config: int | None, folder: Path, files: SentenceTransformersFiles | None, wanted: int | None
) -> int:
    """The longest prompt: sentence-transformers' max_seq_length, else the lesser of config and tokenizer.

    Raises:
        ConfigError: the user wants more.
    """
    limit = by_config
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file():
        by_tokenizer = read_json(tokenizer_config).get("model_max_length")
        # transformers writes 1e30 for "no limit".
        if isinstance(by_tokenizer, int | float) and 0 < by_tokenizer < 1e9:
            limit = min(limit or int(by_tokenizer), int(by_tokenizer))
    if files is not None and files.max_seq_length is not None:
        limit = files.max_seq_length if by_config is None else min(files.max_seq_length, by_config)
    limit = limit or _DEFAULT_MAX_TOKENS
    if wanted is None or wanted == -1:
        return limit
    if wanted < 1:
        raise ConfigError(f"max_model_len must be at least 1, or -1 for the model's own limit, got {wanted}.")
    if wanted > (by_config or limit):
        raise ConfigError(
            f"max_model_len={wanted} is more than the {by_config or limit} positions that the model was made for."
        )
    return wanted


def _matryoshka(
    config: Mapping[str, Any], switched_on: tuple[int, ...], width: int, folder: Path
) -> tuple[Matryoshka, tuple[str, ...]]:
    """Sizes by the user's switch, else by config.json, else by what the model card of a known repository states."""
    stated = switched_on or config.get("matryoshka_dimensions") or ()
    listed = tuple(stated) if isinstance(stated, list | tuple) else (stated,)
    for size in listed:
        if not isinstance(size, int) or not 1 <= size <= width:
            raise ConfigError(f"matryoshka_dimensions: {size!r} is not a whole number from 1 to {width}.")
    if listed or "is_matryoshka" in config:
        return Matryoshka(width, bool(listed) or bool(config.get("is_matryoshka")), listed), ()
    sizes = published_sizes(folder, width)
    if sizes is None:
        return Matryoshka(width), ()
    words = f"{list(sizes)}" if sizes else f"any length up to {width}"
    return Matryoshka(width, True, sizes), (f"Matryoshka sizes by the model card of {repository(folder)}: {words}.",)


def _short(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
