"""Models of transformers that read pictures: built from the tensors of any layout, strictly -> Served.

The model without its head is called on embeddings: those of tokens, and rows of its tower in the places of pictures. So a
picture that stands in several prompts is computed once, and a text that writes a placeholder shifts nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.adapters.low_rank import Adapter
from poolhouse.models.fallback.backbones import Forward, Packed, Shown, Unpacked
from poolhouse.models.fallback.load import (
    auto_class,
    config_of,
    max_tokens,
    plain_ids,
    quiet_transformers,
    register_attention,
    short,
)
from poolhouse.models.fallback.probe import ALONE_TOLERANCE, ProbePictures, may_pack, reads_ahead, relative_error
from poolhouse.models.files.checkpoint import Checkpoint, Config
from poolhouse.models.model import Served, Sizes
from poolhouse.models.vision.picture_model import Hosted, PictureModel
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Picture, Pictures, Tokens

# Words in tensors' names that come and go with versions of transformers, with heads and with adapters.
_PASSING = {"base_model", "model", "vlm", "vision_model"}
# Heads of generators, and buffers that old files store.
_ASIDE = (r"(.*\.)?lm_head\.(weight|bias)", r".*\.rotary_emb\.inv_freq", r".*\.position_ids")
# Sides of the two pictures that the probe shows.
_PROBE_SIZES = ((48, 64), (72, 40))


def load_hosted(
    row: PictureModel,
    hosted: Hosted,
    reader: PictureReader,
    checkpoint: Checkpoint,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    adapters: Sequence[Adapter] = (),
) -> Served:
    """The model of `checkpoint` without its head, as transformers builds it.

    config: config.json with the user's changes. adapters: to merge into its weights.

    Raises:
        CheckpointError: tensors that are missing, not known or of another shape; pictures that do not fit the tower.
    """
    with quiet_transformers():
        model, notes = _build(row, hosted, checkpoint, config, dtype, adapters)
        model = model.requires_grad_(False).to(device)
        text = _text_part(model)
        if hosted.causal is not None:
            _turn(text, hosted.causal(config))
        forward, shown = Forward(model, dtype), Shown(model, hosted.rows, dtype)
        vocabulary_size, width = model.get_input_embeddings().weight.shape
        ids = plain_ids(text.config, vocabulary_size)
        width = forward(shown.embed(torch.tensor([ids[:5]], device=device))).shape[-1]
        if hosted.causal is not None and reads_ahead(forward, ids, device) == hosted.causal(config):
            raise CheckpointError(
                f"{checkpoint.folder}: transformers' {type(model).__name__} does not turn its attention."
            )
        register_attention()
        verdict = may_pack(
            forward, ids, None, device, _probe_pictures(shown, reader, hosted, device, checkpoint.folder)
        )
    offset = verdict.position_offset
    return Served(
        backbone=Unpacked(forward, width, shown) if offset is None else Packed(forward, offset, shown),
        served_by=f"transformers, {verdict.why}",
        sizes=Sizes(
            hidden_size=width,
            vocabulary_size=vocabulary_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            positions=max_tokens(text),
        ),
        pooling=row.pooling or "LAST",
        merged=tuple(adapters),
        notes=notes,
    )


def _build(
    row: PictureModel,
    hosted: Hosted,
    checkpoint: Checkpoint,
    config: Config,
    dtype: torch.dtype,
    adapters: Sequence[Adapter],
) -> tuple[Any, tuple[str, ...]]:
    """The model with its tensors, and what was left out or merged."""
    settings = config_of(checkpoint, hosted.config(config), trust_remote_code=False)
    with torch.device("meta"):
        empty = auto_class(settings, "AutoModel").from_config(settings)
    unused = [re.compile(form) for form in row.aside]
    wanted = {name: tensor for name, tensor in empty.state_dict().items() if not _fits(unused, name)}
    claimed, left = _claimed(wanted, checkpoint)
    for adapter in adapters:
        _merge(claimed, adapter, row.projections)
    others = [re.compile(rf"{re.escape(name)}\.(weight|bias)") for name in row.projections]
    known = [*map(re.compile, (*_ASIDE, *row.aside)), *others]
    unknown = [name for name in left if not (_fits(known, name) or _fits(known, _lasting(name)))]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} has {len(unknown)} tensors that transformers' {type(empty).__name__} does not have: "
            f"{short(unknown)}."
        )
    model, info = type(empty).from_pretrained(
        None, config=settings, state_dict=claimed, dtype=dtype, output_loading_info=True
    )
    made_up = sorted(name for name in info["missing_keys"] if not _fits(unused, name))
    if made_up:
        raise CheckpointError(f"{checkpoint.folder} lacks {short(made_up)}, which is never made up.")
    aside = [name for name in left if not _fits(others, _lasting(name))]
    notes = (f"Tensors left out: {short(aside)}.",) if aside else ()
    return model.eval(), (*notes, *(f"Merged into the weights: the adapter {adapter.name}." for adapter in adapters))


def _claimed(wanted: Mapping[str, Tensor], checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """The checkpoint's tensors by the model's names, and the names of those that it does not have.

    Raises:
        CheckpointError: two tensors for one place, none, or one of another shape.
    """
    places = {_lasting(name): name for name in wanted}
    sources: dict[str, str] = {}
    left = []
    for name in checkpoint.tensors:
        place = places.get(_lasting(name))
        if place is None:
            left.append(name)
        elif place in sources:
            raise CheckpointError(f"{checkpoint.folder} has two tensors for {place}: {sources[place]} and {name}.")
        else:
            sources[place] = name
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that the model needs: {short(missing)}. "
            f"It holds others that nobody claimed: {short(left) or 'none'}."
        )
    claimed = {place: checkpoint.tensors[name] for place, name in sources.items()}
    wrong = [
        f"{name} {list(claimed[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if claimed[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.folder} has tensors of other shapes than its config asks for: {short(wrong)}."
        )
    return claimed, left


def _lasting(name: str) -> str:
    """A tensor's name without the words that come and go."""
    return ".".join(word for word in name.split(".") if word not in _PASSING)


def _fits(forms: Sequence[re.Pattern[str]], name: str) -> bool:
    return any(form.fullmatch(name) for form in forms)


def _merge(claimed: dict[str, Tensor], adapter: Adapter, projections: Sequence[str]) -> None:
    """Merge an adapter into the weights, but for projections, whose reader does so.

    Raises:
        CheckpointError: an adapter that changes what the model does not have.
    """
    places = {_lasting(name).removesuffix(".weight"): name for name in claimed}
    for module, change in adapter.changes.items():
        if _lasting(module) in projections:
            continue
        name = places.get(_lasting(module))
        if name is None or claimed[name].shape != change.shape:
            raise CheckpointError(f"{adapter.source} is an adapter for another base: it changes {module}.")
        claimed[name] = claimed[name].float() + change.delta()
    unknown = [name for name in adapter.saved if _lasting(name).rpartition(".")[0] not in projections]
    if unknown:
        raise CheckpointError(f"{adapter.source} brings whole tensors that are not read: {short(unknown)}.")


def _text_part(model: Any) -> Any:
    return model.language_model if hasattr(model, "language_model") else model.text_model


def _turn(text: Any, causal: bool) -> None:
    """Let tokens see earlier ones only, or both sides; layers without attention go on as they do."""
    for module in text.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal


def _probe_pictures(
    shown: Shown, reader: PictureReader, hosted: Hosted, device: torch.device, folder: Folder
) -> ProbePictures:
    """Two pictures of noise as the model reads them; it takes pictures one at a time where that makes a difference.

    Raises:
        CheckpointError: the tower gives other rows than there are places for.
    """
    from PIL import Image

    noise = np.random.default_rng(0)
    try:
        first, second = (
            reader.processor(Image.fromarray(noise.integers(0, 256, (*sides, 3), np.uint8)), hosted.probe)
            for sides in _PROBE_SIZES
        )
        alone, together = shown.rows(_pack(device, first)), shown.rows(_pack(device, first, second))
    except (InvalidRequest, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: pictures as its processor's files make them cannot be read: {error}"
        ) from error
    if [len(alone), len(together)] != [first.rows, first.rows + second.rows]:
        raise CheckpointError(
            f"{folder}: the tower makes {len(alone)} rows of a picture with {first.rows} places in its prompt, so the "
            "settings of its processor do not fit config.json."
        )
    if relative_error(together[: first.rows], alone) > ALONE_TOLERANCE[shown.dtype]:
        shown.together = False
    return ProbePictures(shown.embed, alone, together[first.rows :])


def _pack(device: torch.device, *pictures: Picture) -> PackedPictures:
    prompts = [Tokens(picture.ids, pictures=Pictures((picture,), picture.filled)) for picture in pictures]
    packed = PackedPictures.of(prompts, device)
    assert packed is not None
    return packed
