"""Loading: read the files of a folder, decide (see `plan`), build the Model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.pictures import PictureReader, plain_prompts
from poolhouse.models.adapters.adapters import with_heads
from poolhouse.models.adapters.peft import read_peft
from poolhouse.models.files.checkpoint import Checkpoint
from poolhouse.models.files.config import architecture, longest_prompt
from poolhouse.models.files.model_card import matryoshka_of
from poolhouse.models.files.module_steps import LayerMean
from poolhouse.models.files.routes import Routes
from poolhouse.models.heads.heads import Head, HeadModule, LoadedHead
from poolhouse.models.heads.late_interaction import LateInteractionFiles
from poolhouse.models.heads.rerankers import listwise_pipelines, token_head
from poolhouse.models.load_native import load_native
from poolhouse.models.model import Facts, Model, Served, Sizes
from poolhouse.models.native.static import StaticFiles, StaticVectors, Table, read_table
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.pipelines import (
    about_activation,
    embed_pipelines,
    labels_of,
    late_interaction_pipelines,
    pipelines_of,
    refuse_steps,
)
from poolhouse.models.plan import LoadOptions, LoadPlan, decide
from poolhouse.models.roles import RAW_LOGITS
from poolhouse.params import PoolingParams
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.steps import AdaptedDense, Dense, Step
from poolhouse.tasks import Task

if TYPE_CHECKING:
    from poolhouse.models.vision.picture_model import PictureModel

# How sentence-transformers compares two vectors; `poolhouse.plans.scoring` computes them.
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def load(folder: Path | Folder, options: LoadOptions) -> Model:
    """The model in `folder`.

    Raises:
        CheckpointError: files missing, corrupt or not understood. ConfigError: an option that cannot be honoured.
    """
    return build(decide(folder, options))


def build(plan: LoadPlan) -> Model:
    """The model of a plan: reads its tensors, builds its backbone and its pipelines.

    Raises:
        CheckpointError: tensors that are missing, corrupt or do not fit. ConfigError: an option that does not fit them.
    """
    options, files, config, reranker = plan.options, plan.files, plan.config, plan.reranker
    checkpoint = Checkpoint(plan.weights, options.variant, plan.quantised)
    reader = _reader(plan)
    served = _served(plan, checkpoint, reader)
    if files.layers is not None:
        _mix_layers(served, files.layers)
    pipelines = _pipelines(plan, served, checkpoint)
    width = next(iter(pipelines.values())).width
    labels, about_labels = labels_of(plan, served)
    stated = {"matryoshka_dimensions": files.matryoshka, **config} if files.matryoshka else config
    matryoshka, about_sizes = matryoshka_of(stated, options.matryoshka_dimensions, width, plan.folder.path)
    similarity, about_scores = _similarity(plan, pipelines)
    return Model(
        backbone=served.backbone,
        pipelines=_on_device(pipelines, plan),
        facts=Facts(
            name=options.name,
            path=str(plan.folder),
            architecture=", ".join(config.get("architectures") or [str(config.get("model_type"))]),
            served_by=served.served_by,
            sizes=served.sizes,
            max_tokens=_longest(plan, served),
            width=width,
            dtype=plan.dtype,
            device=plan.device,
            matryoshka=matryoshka,
            prompts={
                **({} if served.adapters is None else served.adapters.prompts),
                **({} if plan.plain_texts else files.prompts),
            },
            default_prompt_name=None if plan.plain_texts else files.default_prompt_name,
            labels=labels,
            plugin=config.get("io_processor_plugin"),
            score_template=reranker.template,
            listwise=reranker.listwise,
            late_interaction=None if plan.late is None or plan.plain_texts else plan.late.rules,
            add_special_tokens=plan.static is None and files.add_special_tokens,
            takes_nothing=plan.static is not None,
            similarity=similarity,
            pictures=reader,
            labelled=None if plan.labelled is None else plan.labelled.reader,
            longest_shared=served.backbone.longest_shared,
            picks=served.backbone.picks,
            notes=(
                *reranker.notes,
                *plan.picture_notes,
                *served.notes,
                *about_labels,
                *about_sizes,
                *about_scores,
                *about_activation(plan, served),
                *files.notes,
            ),
        ),
        plan=plan,
        adapters=served.adapters,
        routes=_routes(plan, width),
        by_route=_by_route(plan, served, width),
    )


def _served(plan: LoadPlan, checkpoint: Checkpoint, reader: PictureReader | None) -> Served:
    """The backbone and head, by whoever serves them."""
    if plan.static is not None:
        return _table(plan, plan.static)
    if plan.native is not None:
        return load_native(plan, plan.native, checkpoint)
    if plan.pictures is not None and reader is not None:
        return _hosted(plan, plan.pictures, checkpoint, reader)
    return _by_transformers(plan, checkpoint)


def _table(plan: LoadPlan, static: StaticFiles) -> Served:
    """A table as a backbone; see `poolhouse.models.native.static`."""
    table = Table(read_table(plan.weights, plan.dtype).rows.to(plan.device))
    count, features = table.rows.shape
    return Served(
        backbone=table,
        served_by=f"{static.layout}, {count} x {features}",
        sizes=Sizes(hidden_size=features, vocabulary_size=count, parameters=count * features),
        pooling="MEAN",
        notes=static.notes,
    )


def _by_transformers(plan: LoadPlan, checkpoint: Checkpoint) -> Served:
    from poolhouse.models.fallback.load import load_hugging_face

    score = plan.reranker.tokens
    served = load_hugging_face(
        checkpoint,
        plan.config,
        plan.dtype,
        plan.device,
        # A reranker reads its score off the vocabulary, behind a model without a head.
        role=plan.role if score is None else "embed",
        trust_remote_code=plan.options.trust_remote_code,
        used=frozenset() if plan.late is None else plan.late.used(checkpoint.tensors),
    )
    head: LoadedHead | None = served.head
    if score is not None:
        head = token_head(score, checkpoint.tensors, plan.config)
    elif head is not None and architecture(plan.config) in RAW_LOGITS:
        head = replace(head, head=replace(head.head, use_activation=False))
    return replace(served, head=head, notes=(*plan.notes, *served.notes))


def _hosted(plan: LoadPlan, row: PictureModel, checkpoint: Checkpoint, reader: PictureReader) -> Served:
    """A model that reads pictures, run by transformers."""
    if row.hosted is None:
        raise CheckpointError(f"{plan.folder}: {row.name} is served natively alone; {plan.why}.")
    from poolhouse.models.fallback.pictures import load_hosted

    adapters = [read_peft(folder, str(folder)) for folder in plan.adapters.merged_folders]
    served = load_hosted(row, row.hosted, reader, checkpoint, plan.config, plan.dtype, plan.device, adapters)
    return replace(served, notes=(*plan.notes, *served.notes))


def _mix_layers(served: Served, layers: LayerMean) -> None:
    """Let the backbone give a mean of several hidden states instead of its last.

    Raises:
        CheckpointError: it does not have them, or another number of them.
    """
    if not isinstance(served.backbone, Transformer):
        raise CheckpointError(
            f"sentence-transformers' files take hidden states of inner layers (WeightedLayerPooling, modality_config), "
            f"which are served of native families alone; this model is served by {served.served_by}."
        )
    served.backbone.mix_layers(layers.start, layers.shares())


def _pipelines(plan: LoadPlan, served: Served, checkpoint: Checkpoint) -> dict[Task, Pipeline]:
    """What the model answers, by task, the first one first."""
    if plan.labelled is not None:
        return plan.labelled.head(checkpoint.tensors, served.sizes.hidden_size)
    if plan.late is not None:
        heads = _projection(plan, plan.late, served, checkpoint)
        late = late_interaction_pipelines(heads, served.sizes.hidden_size, plan.late.unit, plan.options.pooler)
        return late if plan.late.rules is not None else {**pipelines_of(plan, served), **late}
    if plan.reranker.listwise is not None:
        refuse_steps(plan.options.pooler)
        return listwise_pipelines(plan.reranker, checkpoint.tensors)
    return pipelines_of(plan, served)


def _projection(plan: LoadPlan, late: LateInteractionFiles, served: Served, checkpoint: Checkpoint) -> tuple[Step, ...]:
    """The steps from a hidden state to the vector of a token, as adapters have changed them.

    Raises:
        CheckpointError: a projection that is missing or of another width than stated.
    """
    name = late.projection(checkpoint.tensors)
    names = late.projections if name is None else (name,)
    head = Head(tuple(HeadModule(name, also=(name.rpartition(".")[2],)) for name in names))
    steps = late.read(with_heads(head, checkpoint.tensors, "", served.merged), plan.config, plan.weights)
    if late.heads is not None or served.adapters is None or not isinstance(dense := steps[-1], Dense):
        return steps
    return (*steps[:-1], AdaptedDense(dense.weight, dense.bias, changes=served.adapters.of_head(names[0])))


def _on_device(pipelines: Mapping[Task, Pipeline], plan: LoadPlan) -> dict[Task, Pipeline]:
    return {task: pipeline.to(plan.device) for task, pipeline in pipelines.items()}


def _longest(plan: LoadPlan, served: Served) -> int:
    """Tokens of the longest prompt."""
    if plan.static is not None:
        return plan.static.longest(plan.max_tokens)
    longest_side = None if plan.late is None else plan.late.longest_side
    # What counts distances reads texts of any length; labelled ones have a limit in words.
    positions = None if plan.labelled is not None and served.endless else served.sizes.positions
    return longest_prompt(positions, plan.weights, plan.files, plan.max_tokens, longest_side, served.endless)


def _reader(plan: LoadPlan) -> PictureReader | None:
    """How the model reads pictures, if it does."""
    if plan.pictures is None:
        return None
    reader = plan.pictures.reader(plan.config, plan.picture_folder)
    return replace(reader, prompts=plain_prompts(reader.placeholder)) if plan.plain_texts else reader


def _similarity(plan: LoadPlan, pipelines: Mapping[Task, Pipeline]) -> tuple[str, tuple[str, ...]]:
    """How scores compare vectors, and a note where the files state it otherwise."""
    stated = plan.files.similarity
    if stated not in SIMILARITIES or "embed" not in pipelines:
        return "cosine", ()
    if plan.options.score_compat == "files":
        return stated, ()
    if stated == "cosine" or (stated == "dot" and pipelines["embed"].activates(PoolingParams())):
        return "cosine", ()
    note = (
        f"config_sentence_transformers.json compares vectors by '{stated}'; scores here are cosines, as vLLM's are. "
        "score_compat='files' takes the files' word."
    )
    return "cosine", (note,)


def _routes(plan: LoadPlan, width: int) -> Routes:
    """The ways that texts go, with the table of the one that is looked up.

    Raises:
        CheckpointError: a table whose vectors are of another width.
    """
    files = plan.files
    if files.weights is not None:
        return replace(files.routes, static=files.weights.read())
    if files.looked_up is None:
        return files.routes
    folder = files.looked_up.transformer_folder
    table = read_table(folder)
    pipeline = embed_pipelines(table.rows.shape[1], plan.options.pooler, files.looked_up, "MEAN")["embed"]
    _check_width(pipeline.width, width)
    return replace(files.routes, static=StaticVectors(table, pipeline, folder))


def _by_route(plan: LoadPlan, served: Served, width: int) -> dict[str, dict[Task, Pipeline]]:
    """The pipelines of each route of an embedder, where routes differ.

    Raises:
        CheckpointError: routes of another kind of model, or vectors of another width.
    """
    routes = plan.files.by_route
    if routes and (plan.role != "embed" or plan.files.of_tokens):
        alike = {(route.splade, route.heads, route.normalize) for route in routes.values()}
        if plan.role == "splade" and len(alike) == 1:
            return {}
        raise CheckpointError("Routes with modules of their own are served of dense embedders alone.")
    pooling = plan.default_pooling or served.pooling
    found: dict[str, dict[Task, Pipeline]] = {}
    for name, route in routes.items():
        if name == plan.files.routes.main and route.pooling == plan.files.pooling:
            continue  # the model's own pipelines
        pipelines = embed_pipelines(served.sizes.hidden_size, plan.options.pooler, route, pooling)
        _check_width(pipelines["embed"].width, width)
        found[name] = _on_device(pipelines, plan)
    return found


def _check_width(width: int, other: int) -> None:
    if width != other:
        raise CheckpointError(f"One route of the model gives vectors of {width} features, another of {other}.")
