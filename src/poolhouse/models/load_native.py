"""Native loading: a checkpoint of a native family -> its backbone, mostly a Transformer, and its head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.layers.int8 import described
from poolhouse.models.adapters.adapters import AdapterOptions, Adapters, adapters_of, merged_into, with_heads
from poolhouse.models.adapters.low_rank import Adapter, Target, tails
from poolhouse.models.adapters.task_adapters import plain, read_task_adapters
from poolhouse.models.backbone import Backbone, Tower
from poolhouse.models.files.checkpoint import Checkpoint, Config
from poolhouse.models.files.config import architecture
from poolhouse.models.files.own_classes import own_code_of
from poolhouse.models.files.quantised import Dequantised
from poolhouse.models.heads.heads import VOCABULARY, LoadedHead, check_head, read_head, step_head
from poolhouse.models.heads.pruning import LoadedPruner, read_heads
from poolhouse.models.heads.rerankers import token_head
from poolhouse.models.model import Served, Sizes
from poolhouse.models.native.families import Family
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.native.weights import Claimed, Weights, claim, find_layout, unclaimed
from poolhouse.models.plan import LoadPlan, Native, NativeTower
from poolhouse.models.roles import judges_steps
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Pictures, Tokens

_NO_ADAPTERS = AdapterOptions()
# The weights that `product_of` makes int8.
_OF_BLOCKS = re.compile(r"layers\.\w+\.(attn\.(qkv|out)|ffn\.(expert_)?(up|down))\.weight")
# Makes one backbone of a text half and a tower; see `PictureModel`.
Join = Callable[[Transformer, Tower], Backbone]


def load_native(plan: LoadPlan, native: Native, checkpoint: Checkpoint) -> Served:
    """The backbone and the head of a checkpoint, and notes about what was left out or merged.

    Raises:
        CheckpointError: tensors that are missing, not known, or do not fit.
    """
    family, config = native.family, plan.config
    others = frozenset[str]()
    if plan.labelled is not None:
        others = plan.labelled.used(checkpoint.tensors)
    elif plan.late is not None:
        others = plan.late.used(checkpoint.tensors)
    known = () if plan.pictures is None else plan.pictures.aside
    known += (*map(re.escape, others), *(rf"{name}\.(weight|bias)" for name in plan.adapters.projections))
    if plan.pruner is not None:
        known += plan.pruner.known(family.sequence_head(native.config))
        if plan.prunes and plan.pruner.before_norm:
            family = _without_last_norm(family)
    join = None
    if plan.pictures is not None and plan.pictures.join is not None:
        join = partial(plan.pictures.join, config, plan.tokenizer)
    loaded = load_transformer(
        *(family, native.spec, native.config, checkpoint, plan.dtype, plan.device, plan.adapters),
        *(known, native.tower, join, plan.options.quantization == "int8"),
    )
    pruner = _pruner(plan, native, checkpoint, loaded)
    head, notes = (None, []) if pruner is not None else _head(plan, native, checkpoint, loaded)
    used = others | (head.used if head is not None else pruner.used if pruner is not None else frozenset())
    left = tuple(name for name in loaded.aside if used.isdisjoint(tails(name)))
    notes += [f"Tensors left out: {_short(left)}."] if left else []
    if config.get("is_causal") is False and any("CausalLM" in name for name in config.get("architectures") or ()):
        notes.append(
            "config.json says is_causal: false, so tokens see both sides, as in transformers, although the model is "
            "named after a decoder. hf_overrides={'is_causal': True} makes it one."
        )
    if (own := own_code_of(config)) is not None:
        notes.append(
            f"The checkpoint brings code of its own ({own}), which was not run. "
            "`poolhouse check MODEL --trust-remote-code` compares with it."
        )
    notes += _about_quantised(plan, checkpoint, loaded)
    if loaded.int8:
        notes.append(
            f"Int8: {loaded.int8 / 1e6:.1f} MB of weights instead of {4 * loaded.int8 / 1e6:.1f} MB; tables, norms and "
            f"what else stays in float32 take {4 * (loaded.sizes.parameters - loaded.int8) / 1e6:.1f} MB."
        )
        notes.append(described())
    merged = [str(folder) for folder in plan.adapters.base_merge] + [plan.adapters.merge or ""]
    notes += [f"Merged into the weights: the adapter {name}." for name in merged if name]
    if loaded.adapters.names:
        notes.append(f"Adapters: {_short(loaded.adapters.names)}.")
    return Served(
        backbone=loaded.transformer,
        served_by=f"native {config['model_type']}, packed",
        sizes=loaded.sizes,
        pooling=family.pooling,
        head=head,
        pruner=pruner,
        adapters=loaded.adapters,
        endless=loaded.endless,
        pools_itself=join is not None,
        merged=loaded.merged,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A backbone, its sizes, and the tensors that were left out on purpose.

    prefix: what stands before the backbone's names in the checkpoint. token_table: name of the matrix of its tokens.
    table: that matrix, [vocabulary, features]. endless: whether positions are neither looked up nor turned into angles,
    so that texts longer than `sizes.positions` are read in the same way. merged: the adapters that the weights hold.
    int8: how many numbers of weights are int8. whole: how many weights are the checkpoint's own whole numbers.
    """

    transformer: Backbone
    sizes: Sizes
    aside: tuple[str, ...]
    table: Tensor
    adapters: Adapters
    prefix: str = ""
    token_table: str = ""
    merged: tuple[Adapter, ...] = ()
    endless: bool = False
    int8: int = 0
    whole: int = 0


def load_transformer(
    family: Family,
    spec: TransformerSpec,
    config: Config,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    options: AdapterOptions = _NO_ADAPTERS,
    known: tuple[str, ...] = (),
    tower: NativeTower | None = None,
    join: Join | None = None,
    int8: bool = False,
) -> Loaded:
    """The backbone of a checkpoint, with its tower if it reads pictures, placed and laid out for its device.

    config: the part that the family reads. known: regular expressions of tensors that neither the family nor its heads
    read. join: see `PictureModel`. int8: whether products of blocks are made in int8; not those of a tower.

    Raises:
        CheckpointError: names that nobody claims, slots without tensors, shapes that do not fit.
    """
    tensors = plain(checkpoint.tensors)
    found = find_layout(family.layouts, tensors)
    if found is None:
        wanted = [layout.token_table + ".weight" for layout in family.layouts]
        raise CheckpointError(f"{checkpoint.folder} has no token table. Looked for {wanted}, with any prefix.")
    layout, prefix = found
    family = replace(family, aside=(*family.aside, *known))
    # What is merged needs weights that can be added to.
    whole = int8 and not options.base_merge and options.merge is None
    claimed = claim(layout, prefix, spec, tensors, dtype, device, whole)
    left, shown = claimed.left, dict[str, Tensor]()
    aside: list[str] = []
    if tower is not None:
        seen, own_prefix = _claimed_tower(tower, tensors, checkpoint, dtype, device)
        shown = seen.tensors
        aside, left = unclaimed(sorted({*left} & {*seen.left}), own_prefix, tower.family.aside)
    others, unknown = unclaimed(left, prefix, family.aside)
    aside += others
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} has {len(unknown)} tensors that the {config.get('model_type')} family does not know: "
            f"{unknown[:5]}{' ...' if len(unknown) > 5 else ''}. "
            "Use model_impl='transformers' to load it without the native family."
        )
    tasks = read_task_adapters(checkpoint, config, family.default_adapter)
    target = Target(family, spec, {name: tuple(tensor.shape) for name, tensor in claimed.tensors.items()})
    merged = merged_into(claimed.tensors, target, options, tasks)
    aside += [name for adapter in merged for name in adapter.saved]
    build = partial(family.backbone, config, spec)
    text, hidden_size = _fitting(build, Weights(claimed.tensors, int8=int8), device)
    backbone = text
    if tower is not None:
        assert isinstance(text, Transformer)
        backbone = _with_tower(tower, Weights(shown), text, join, device)
    positions = family.max_tokens(config)
    everything = (*claimed.tensors.items(), *shown.items())
    table = claimed.tensors.get("positions.weight")
    _check_positions(table, spec.position_offset, positions)
    return Loaded(
        transformer=backbone,
        sizes=Sizes(
            hidden_size=hidden_size,
            vocabulary_size=len(claimed.tensors["tokens.weight"]),
            parameters=sum(tensor.numel() for name, tensor in everything if not name.endswith(".steps")),
            positions=positions,
            token_types=len(claimed.tensors.get("types.weight", ())),
        ),
        aside=tuple(aside),
        table=claimed.tensors["tokens.weight"],
        adapters=adapters_of(text, target, options, tasks),
        prefix=prefix,
        token_table=f"{prefix}{layout.token_table}.weight",
        merged=merged,
        endless=table is None and all(layer.rope is None for layer in spec.layers),
        int8=sum(tensor.numel() for name, tensor in claimed.tensors.items() if int8 and _OF_BLOCKS.fullmatch(name)),
        whole=sum(tensor.dtype == torch.int8 for tensor in claimed.tensors.values()),
    )


def _about_quantised(plan: LoadPlan, checkpoint: Checkpoint, loaded: Loaded) -> list[str]:
    """What became of quantised weights."""
    tensors = checkpoint.tensors
    if not isinstance(tensors, Dequantised):
        return []
    quantised, dtype = tensors.quantised, str(plan.dtype).removeprefix("torch.")
    how = (
        f"Its {tensors.count} weights are multiplied out to {dtype} when it is loaded, and take as much memory as those of "
        "one that is not quantised."
    )
    if loaded.whole:
        how = (
            f"The int8 products of blocks ({loaded.whole}) use its whole numbers and scales as they are; its other weights "
            f"are {dtype}."
        )
    notes = [f"The checkpoint is quantised by {quantised.method} ({quantised.what}). {how}"]
    if quantised.activations:
        notes.append(
            "The files quantise activations too; here they "
            + ("are int8 with steps of their own." if loaded.int8 else "are not.")
        )
    notes += [f"Tensors of activations and caches left out: {_short(tensors.unused)}."] if tensors.unused else []
    return notes + list(quantised.notes)


def _fitting(build: Callable[[Weights], Backbone], weights: Weights, device: torch.device) -> tuple[Backbone, int]:
    """The backbone and the width of its answers.

    It is tried on two tokens, so that tensors that do not fit are found now and not by a request.
    """
    try:
        backbone = build(weights)
        with torch.inference_mode():
            hidden = backbone(Batch.pack([Tokens(np.zeros(2, np.int64))], device))
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"The checkpoint's tensors do not fit together: {error}") from error
    return backbone, hidden.shape[-1]


def _claimed_tower(
    tower: NativeTower, tensors: Mapping[str, Tensor], checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[Claimed, str]:
    """The tensors of a tower, and the prefix of their names."""
    found = find_layout(tower.family.layouts, tensors)
    if found is None:
        wanted = [layout.token_table + ".weight" for layout in tower.family.layouts]
        raise CheckpointError(f"{checkpoint.folder} has no vision tower. Looked for {wanted}, with any prefix.")
    layout, prefix = found
    return claim(layout, prefix, tower.spec, tensors, dtype, device), prefix


def _with_tower(
    tower: NativeTower, weights: Weights, text: Transformer, join: Join | None, device: torch.device
) -> Backbone:
    """Both halves, tried on a blank picture in a prompt of its own beside a text, as `_fitting` tries the text half."""
    picture = tower.family.sample(tower.config)
    shown = Tokens(np.zeros(len(picture.ids), np.int64), pictures=Pictures((picture,), picture.filled))
    backbone: Backbone = text
    try:
        built = tower.family.build(tower.config, tower.spec, weights)
        if join is None:
            text.tower = built
        else:
            backbone = join(text, built)
        with torch.inference_mode():
            backbone(Batch.pack([shown, Tokens(np.zeros(2, np.int64))], device))
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"The tensors of the checkpoint's vision tower do not fit together: {error}") from error
    return backbone


def _check_positions(table: Tensor | None, offset: int, positions: int | None) -> None:
    """Refuse a table that ends before the limit: a long request would read behind it, which no CUDA device survives."""
    if table is not None and positions is not None and positions > table.shape[0] - offset:
        raise CheckpointError(
            f"The config allows {positions} positions, but the checkpoint has vectors for {table.shape[0] - offset}."
        )


def _head(
    plan: LoadPlan, native: Native, checkpoint: Checkpoint, loaded: Loaded
) -> tuple[LoadedHead | None, list[str]]:
    """The head of a native model, and a note where a masked language model lacks its own."""
    # Of a model that reads pictures the part about texts may say what the whole does not.
    config, score, name = {**native.config, **plan.config}, plan.reranker.tokens, architecture(plan.config)
    if score is not None or judges_steps(config, plan.options.pooler):
        tensors = with_heads(VOCABULARY, checkpoint.tensors, loaded.prefix, loaded.merged)
        if score is None:
            head = step_head(tensors, config, loaded.token_table, plan.options.pooler)
        else:
            head = token_head(score, tensors, config)
    elif native.head is None:
        return None, []
    else:
        try:
            tensors = with_heads(native.head, checkpoint.tensors, loaded.prefix, loaded.merged)
            head = read_head(native.head, tensors, loaded.prefix, name, loaded.table)
        except CheckpointError as error:
            if plan.role != "masked_lm":
                raise
            return None, [f"Tokens are not classified by the vocabulary: {error}"]
    check_head(head, loaded.sizes.hidden_size, name)
    return head, []


def _pruner(plan: LoadPlan, native: Native, checkpoint: Checkpoint, loaded: Loaded) -> LoadedPruner | None:
    """The two heads of a pruner; None of other models."""
    if plan.pruner is None or native.head is None or not plan.prunes:
        return None
    return read_heads(
        plan.pruner,
        native.head,
        *(checkpoint.tensors, loaded.prefix, native.spec.norm_eps, loaded.sizes.hidden_size),
    )


def _without_last_norm(family: Family) -> Family:
    """The family with a backbone that ends before its last norm."""
    layouts = (
        replace(layout, names={slot: source for slot, source in layout.names.items() if slot != "final_norm"})
        for layout in family.layouts
    )
    return replace(family, layouts=tuple(layouts))


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
