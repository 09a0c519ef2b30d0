"""A folder of model files -> Model; the only place that decides who serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.adapters.adapters import AdapterOptions, with_heads
from poolhouse.models.adapters.low_rank import tails
from poolhouse.models.adapters.peft import trained_labels, trained_role
from poolhouse.models.files.checkpoint import Checkpoint
from poolhouse.models.files.config import Overrides, architecture, longest_prompt, overridden
from poolhouse.models.files.model_card import matryoshka_of, published_pooling
from poolhouse.models.files.routes import Routes
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles, read_sentence_transformers
from poolhouse.models.heads.heads import VOCABULARY, LoadedHead, check_head, read_head, step_head
from poolhouse.models.heads.late_interaction import PROJECTIONS, Projected, read_late_interaction
from poolhouse.models.heads.rerankers import Reranker, listwise_vectors, read_reranker, token_head
from poolhouse.models.load_native import Loaded, load_transformer
from poolhouse.models.model import Facts, Model
from poolhouse.models.native.families import Family, family_of
from poolhouse.models.native.families._config import NotNative
from poolhouse.models.native.static import StaticModel, Table, read_static, static_side
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.pipelines import (
    Served,
    about_activation,
    embed_pipelines,
    labels_of,
    late_interaction_pipelines,
    pipelines_of,
)
from poolhouse.models.placement import device_of, dtype_of
from poolhouse.models.roles import DEFAULT_POOLINGS, RAW_LOGITS, Convert, Role, head_of, judges_steps, role_of
from poolhouse.params import PoolerConfig, PoolingParams
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.tasks import Task

# How sentence-transformers compares two vectors; `poolhouse.plans.scoring` computes them.
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a user may decide about loading; see `Settings` for the words."""

    name: str
    variant: str | None = None
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
    colbert_compat: Literal["reference", "vllm"] = "reference"
    score_compat: Literal["vllm", "files"] = "vllm"


def load(folder: Path, options: LoadOptions) -> Model:
    """The model in `folder`.

    Raises:
        CheckpointError: files missing, corrupt or not understood. ConfigError: an option that cannot be honoured.
    """
    files = read_sentence_transformers(folder)
    static = read_static(folder, files, options.dtype)
    if static is not None:
        return _load_static(static, folder, options)
    weights_folder = options.weights_folder or (folder if files is None else files.transformer_folder)
    checkpoint = Checkpoint(weights_folder, options.variant)
    trained = trained_role(options.adapters.merged_folders) if options.convert == "auto" else None
    labels_beside = {} if trained is None else trained_labels(options.adapters.merged_folders)
    changes = {} if files is None else files.config_changes
    config = overridden({**checkpoint.config, **changes, **labels_beside}, options.overrides)
    device = device_of(options.device)
    late = None if options.convert == "classify" else read_late_interaction(folder, checkpoint, config, files)
    reranker = Reranker()
    if trained is None and late is None and options.convert != "embed" and not judges_steps(config, options.pooler):
        reranker = read_reranker(checkpoint, folder, config, files, options.name)
    most = reranker.max_tokens if options.max_tokens is None else options.max_tokens
    options = replace(options, dtype=reranker.dtype(options.dtype, device), max_tokens=most)
    role = trained or ("embed" if late is not None else _role(config, files, reranker, options))
    served = _serve(checkpoint, config, role, device, options, reranker, late)
    if files is not None and files.layers is not None:
        _mix_layers(served, files.layers)
    task_prompts = {} if served.adapters is None else served.adapters.prompts
    default_pooling = served.stated_pooling or published_pooling(folder) or served.pooling
    if files is not None and served.stated_pooling is not None:
        files = replace(files, pooling=(served.stated_pooling,))
    if late is not None:
        pipelines = late_interaction_pipelines(late.heads, served.hidden_size, late.unit, options.pooler)
    else:
        literal = options.score_compat == "files"
        pipelines = pipelines_of(served, config, files, default_pooling, options.pooler, checkpoint.folder, literal)
    if reranker.listwise is not None:
        pipelines = listwise_vectors(reranker, checkpoint.tensors)
    width = next(iter(pipelines.values())).width
    labels, about_labels = labels_of(config, served)
    # vLLM reads both sides as plain texts.
    plain = late is not None and options.colbert_compat == "vllm"
    described = None if plain else files
    stated = config if files is None or not files.matryoshka else {"matryoshka_dimensions": files.matryoshka, **config}
    matryoshka, about_sizes = matryoshka_of(stated, options.matryoshka_dimensions, width, folder)
    similarity, about_scores = _similarity(files, pipelines, options)
    about_scores += about_activation(served, config, files, options.score_compat == "files")
    return Model(
        backbone=served.backbone,
        pipelines={task: pipeline.to(device) for task, pipeline in pipelines.items()},
        facts=Facts(
            name=options.name,
            path=str(folder),
            architecture=", ".join(config.get("architectures") or [str(config.get("model_type"))]),
            served_by=served.words,
            max_tokens=longest_prompt(
                served.max_tokens,
                checkpoint.folder,
                files,
                options.max_tokens,
                None if late is None else late.longest_side,
                served.endless,
            ),
            vocabulary_size=served.vocabulary_size,
            hidden_size=served.hidden_size,
            width=width,
            parameters=served.parameters,
            dtype=served.dtype,
            device=device,
            matryoshka=matryoshka,
            prompts={**task_prompts, **({} if described is None else described.prompts)},
            default_prompt_name=None if described is None else described.default_prompt_name,
            token_types=served.token_types,
            labels=labels,
            plugin=config.get("io_processor_plugin"),
            recipe=reranker.recipe,
            listwise=reranker.listwise,
            late_interaction=None if late is None or plain else late.rules,
            add_special_tokens=files is None or files.add_special_tokens,
            similarity=similarity,
            notes=(
                *reranker.notes,
                *served.notes,
                *about_labels,
                *about_sizes,
                *about_scores,
                *(() if files is None else files.notes),
            ),
        ),
        adapters=served.adapters,
        routes=Routes() if files is None else _routes(files, options.pooler, width),
        sides={} if files is None else _sides(files, served, default_pooling, options.pooler, width, device),
    )


def _load_static(static: StaticModel, folder: Path, options: LoadOptions) -> Model:
    """A model that is a table; see `poolhouse.models.native.static`."""
    if options.convert == "classify" or options.adapters.asked or options.overrides is not None:
        raise ConfigError(f"{folder} holds static embeddings: no classifier, no adapters, and no config to override.")
    if options.implementation == "transformers":
        raise ConfigError("model_impl='transformers': static embeddings are no model of transformers.")
    if options.pooler.seq_pooling_type not in (None, "MEAN", "MEAN_SQRT_LEN", "WEIGHTEDMEAN"):
        # Others have no answer to a text without tokens.
        raise ConfigError(
            f"pooler_config: static embeddings are pooled by a mean (MEAN, MEAN_SQRT_LEN, WEIGHTEDMEAN), not by "
            f"{options.pooler.seq_pooling_type}."
        )
    files, table = static.files, static.table
    device = device_of(options.device)
    table = Table(table.rows.to(device))
    count, features = table.rows.shape
    pipelines = embed_pipelines(features, options.pooler, files, "MEAN")
    width = next(iter(pipelines.values())).width
    stated = {"matryoshka_dimensions": files.matryoshka} if files.matryoshka else {}
    matryoshka, about_sizes = matryoshka_of(stated, options.matryoshka_dimensions, width, folder)
    similarity, about_scores = _similarity(files, pipelines, options)
    return Model(
        backbone=table,
        pipelines={task: pipeline.to(device) for task, pipeline in pipelines.items()},
        facts=Facts(
            name=options.name,
            path=str(folder),
            architecture="StaticEmbedding",
            served_by=f"{static.words}, {count} x {features}",
            max_tokens=static.longest(options.max_tokens),
            vocabulary_size=count,
            hidden_size=features,
            width=width,
            parameters=count * features,
            dtype=table.rows.dtype,
            device=device,
            matryoshka=matryoshka,
            prompts=files.prompts,
            default_prompt_name=files.default_prompt_name,
            add_special_tokens=False,
            takes_nothing=True,
            similarity=similarity,
            notes=(*about_sizes, *about_scores, *static.notes, *files.notes),
        ),
        routes=_routes(files, options.pooler, width),
        sides=_sides_of(files, features, "MEAN", options.pooler, width, device),
    )


def _mix_layers(served: Served, layers: tuple[int, tuple[float, ...]]) -> None:
    """Let the backbone give a mean of several hidden states instead of its last.

    Raises:
        CheckpointError: it does not have them, or another number of them.
    """
    if not isinstance(served.backbone, Transformer):
        raise CheckpointError(
            f"sentence-transformers' files take hidden states of inner layers (WeightedLayerPooling, modality_config), "
            f"which are served of native families alone; this model is served by {served.words}."
        )
    served.backbone.mix_layers(*layers)


def _similarity(
    files: SentenceTransformersFiles | None, pipelines: Mapping[Task, Pipeline], options: LoadOptions
) -> tuple[str, tuple[str, ...]]:
    """How scores compare vectors, and a note where the files state it otherwise."""
    stated = None if files is None else files.similarity
    if stated not in SIMILARITIES or "embed" not in pipelines:
        return "cosine", ()
    if options.score_compat == "files":
        return stated, ()
    if stated == "cosine" or (stated == "dot" and pipelines["embed"].activates(PoolingParams())):
        return "cosine", ()
    note = (
        f"config_sentence_transformers.json compares vectors by '{stated}'; scores here are cosines, as vLLM's are. "
        "score_compat='files' takes the files' word."
    )
    return "cosine", (note,)


def _routes(files: SentenceTransformersFiles, user: PoolerConfig, width: int) -> Routes:
    """The ways that texts go, with the table of the one that is looked up.

    Raises:
        CheckpointError: a table whose vectors are of another width.
    """
    if files.looked_up is None:
        return files.routes
    side = static_side(files.looked_up, user)
    _check_width(side.pipeline.width, width)
    return replace(files.routes, static=side)


def _sides(
    files: SentenceTransformersFiles,
    served: Served,
    default_pooling: str,
    user: PoolerConfig,
    width: int,
    device: torch.device,
) -> dict[str, dict[Task, Pipeline]]:
    """The pipelines of each route of an embedder, where routes differ."""
    if files.sides and (served.role != "embed" or files.of_tokens):
        alike = {(side.splade, side.heads, side.normalize) for side in files.sides.values()}
        if served.role == "splade" and len(alike) == 1:
            return {}
        raise CheckpointError("Routes with modules of their own are served of dense embedders alone.")
    return _sides_of(files, served.hidden_size, default_pooling, user, width, device)


def _sides_of(
    files: SentenceTransformersFiles,
    hidden_size: int,
    default_pooling: str,
    user: PoolerConfig,
    width: int,
    device: torch.device,
) -> dict[str, dict[Task, Pipeline]]:
    sides = {name: embed_pipelines(hidden_size, user, side, default_pooling) for name, side in files.sides.items()}
    for pipelines in sides.values():
        _check_width(pipelines["embed"].width, width)
    return {
        name: {task: pipeline.to(device) for task, pipeline in pipelines.items()} for name, pipelines in sides.items()
    }


def _check_width(width: int, other: int) -> None:
    if width != other:
        raise CheckpointError(f"One route of the model gives vectors of {width} features, another of {other}.")


def _role(
    config: dict[str, Any], files: SentenceTransformersFiles | None, reranker: Reranker, options: LoadOptions
) -> Role:
    """What the files make of the model, else its architecture's name."""
    if reranker.tokens is not None:
        return "classify"
    if files is not None and files.splade is not None:
        return "splade"
    return role_of(config, options.convert, files is not None and files.pooling is not None, options.pooler)


def _serve(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    device: torch.device,
    options: LoadOptions,
    reranker: Reranker,
    late: Projected | None,
) -> Served:
    """Our Transformer where a family knows the checkpoint, else transformers."""
    model_type = str(config.get("model_type", ""))
    family = family_of(config)
    if options.implementation == "native" and family is None:
        raise ConfigError(f"model_impl='native': no native family serves model_type {model_type!r}.")
    if family is None or options.implementation == "transformers":
        return _transformers(checkpoint, config, role, device, options, (), reranker, late)
    try:
        return _native(family, checkpoint, config, role, device, options, reranker, late)
    except NotNative as reason:
        if options.implementation == "native":
            raise
        notes = (f"Not served natively: {reason}",)
        return _transformers(checkpoint, config, role, device, options, notes, reranker, late)


def _native(
    family: Family,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    device: torch.device,
    options: LoadOptions,
    reranker: Reranker,
    late: Projected | None,
) -> Served:
    if late is not None and late.fills_unseen and not family.attends_to_part and options.colbert_compat == "reference":
        raise NotNative("queries are filled up with tokens that nobody attends to, which its attention cannot do.")
    dtype = dtype_of(options.dtype, config, family, device)
    adapters = replace(options.adapters, classifier=role in ("classify", "token_classify"))
    loaded = load_transformer(family, config, checkpoint, dtype, device, adapters, () if late is None else PROJECTIONS)
    head, notes = _head(family, checkpoint, config, role, loaded, options.pooler, reranker)
    used = (frozenset() if head is None else head.used) | (frozenset() if late is None else late.used)
    left = tuple(name for name in loaded.aside if used.isdisjoint(tails(name)))
    notes += [f"Tensors left out: {_short(left)}."] if left else []
    if config.get("is_causal") is False and any("CausalLM" in name for name in config.get("architectures") or ()):
        notes.append(
            "config.json says is_causal: false, so tokens see both sides, as in transformers, although the model is "
            "named after a decoder. hf_overrides={'is_causal': True} makes it one."
        )
    merged = [str(folder) for folder in options.adapters.base_merge] + [options.adapters.merge or ""]
    notes += [f"Merged into the weights: the adapter {name}." for name in merged if name]
    if loaded.adapters.names:
        notes.append(f"Adapters: {_short(loaded.adapters.names)}.")
    return Served(
        role=role,
        backbone=loaded.transformer,
        words=f"native {config['model_type']}, packed",
        hidden_size=loaded.hidden_size,
        vocabulary_size=loaded.vocabulary_size,
        parameters=loaded.parameters,
        max_tokens=loaded.max_tokens,
        endless=loaded.endless,
        dtype=dtype,
        pooling=family.pooling,
        head=head,
        notes=tuple(notes),
        stated_pooling=family.stated_pooling(config),
        adapters=loaded.adapters,
        token_types=loaded.token_types,
    )


def _head(
    family: Family,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    loaded: Loaded,
    pooler: PoolerConfig,
    reranker: Reranker,
) -> tuple[LoadedHead | None, list[str]]:
    """The head of a native model, and a note where a masked language model lacks its own."""
    name = architecture(config)
    if judges_steps(config, pooler) or reranker.tokens is not None:
        tensors = with_heads(VOCABULARY, checkpoint.tensors, loaded.prefix, loaded.merged)
        if reranker.tokens is None:
            head = step_head(tensors, config, loaded.token_table, pooler)
        else:
            head = token_head(reranker.tokens, tensors, config)
    else:
        wanted = head_of(family, config, role)
        if wanted is None and role == "splade":
            raise NotNative(f"the native family of {name} has no head to its vocabulary.")
        if wanted is None:
            return None, []
        try:
            tensors = with_heads(wanted, checkpoint.tensors, loaded.prefix, loaded.merged)
            head = read_head(wanted, tensors, loaded.prefix, name, loaded.table)
        except CheckpointError as error:
            if role != "masked_lm":
                raise
            return None, [f"Tokens are not classified by the vocabulary: {error}"]
    check_head(head, loaded.hidden_size, name)
    return head, []


def _transformers(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    role: Role,
    device: torch.device,
    options: LoadOptions,
    notes: tuple[str, ...],
    reranker: Reranker,
    late: Projected | None,
) -> Served:
    from poolhouse.models.fallback.load import load_hugging_face

    if options.adapters.asked:
        raise ConfigError("Adapters are for models of the native families; transformers serves this one.")
    dtype = dtype_of(options.dtype, config, None, device)
    fallback = load_hugging_face(
        checkpoint,
        config,
        dtype,
        device,
        # A reranker reads its score off the vocabulary, behind a model without a head.
        role=role if reranker.tokens is None else "embed",
        trust_remote_code=options.trust_remote_code,
        used=frozenset() if late is None else late.used,
    )
    head = fallback.head
    if reranker.tokens is not None:
        head = token_head(reranker.tokens, checkpoint.tensors, config)
    elif head is not None and architecture(config) in RAW_LOGITS:
        head = replace(head, head=replace(head.head, use_activation=False))
    return Served(
        role=role,
        backbone=fallback.backbone,
        words=f"transformers, {fallback.why}",
        hidden_size=fallback.hidden_size,
        vocabulary_size=fallback.vocabulary_size,
        parameters=fallback.parameters,
        max_tokens=fallback.max_tokens,
        dtype=dtype,
        pooling=DEFAULT_POOLINGS.get(architecture(config), fallback.pooling),
        head=head,
        notes=(*notes, *fallback.notes),
        pools_itself=fallback.pools_itself,
        token_types=fallback.token_types,
    )


def _short(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
