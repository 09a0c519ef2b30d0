"""The fallback: any encoder or decoder that transformers can build, packed where a probe at load allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from poolhouse.errors import CheckpointError
from poolhouse.models import packed_attention
from poolhouse.models.backbone import Backbone
from poolhouse.models.checkpoint import Checkpoint
from poolhouse.models.heads import LoadedHead
from poolhouse.models.hugging_face_backbones import Forward, Packed, Unpacked, hidden_states
from poolhouse.models.hugging_face_heads import AUTO_CLASSES, kept_head, logits, take_head
from poolhouse.models.hugging_face_weights import check_weights
from poolhouse.models.packing_probe import may_pack, reads_ahead
from poolhouse.models.roles import Role


@dataclass(frozen=True, slots=True)
class Fallback:
    """A backbone of transformers, and what the loader must know of it.

    why: "packed, positions from 0", or "unpacked: " and the reason.
    max_tokens: None where the config states no limit.
    pooling: for models without files of sentence-transformers: LAST for decoders, CLS for encoders.
    token_types: rows of its table of them, or 0.
    head: of a classifier or masked language model; one without steps where the backbone's rows are logits already.
    """

    backbone: Backbone
    packed: bool
    why: str
    hidden_size: int
    vocabulary_size: int
    parameters: int
    max_tokens: int | None
    causal: bool
    pooling: Literal["CLS", "LAST"]
    head: LoadedHead | None = None
    notes: tuple[str, ...] = ()
    token_types: int = 0


def load_hugging_face(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    *,
    role: Role = "embed",
    trust_remote_code: bool = False,
    revision: str | None = None,
    used: frozenset[str] = frozenset(),
) -> Fallback:
    """The model of `checkpoint` as transformers builds it.

    config: config.json with the user's changes. role: which head it has; that of a plain masked language model is
    left aside. revision: of code that lies in another repository. used: names of tensors that others read.

    Raises:
        CheckpointError: an unknown type, code that is not trusted, weights that are missing or of another shape.
    """
    with _quiet_transformers():
        model, notes = _build(checkpoint, config, dtype, role, trust_remote_code, revision, used)
        model = model.eval().requires_grad_(False).to(device)
        forward = Forward(model, dtype, logits if role in AUTO_CLASSES else hidden_states)
        vocabulary_size = _vocabulary_size(model)
        ids = _plain_ids(model.config, vocabulary_size)
        hidden_size = _width(forward, ids, device)
        head = None
        if role in AUTO_CLASSES:
            taken = take_head(forward, role, ids, device)
            if taken is None:
                return _whole(forward, role, hidden_size, vocabulary_size, notes)
            forward, head = taken
            hidden_size = _width(forward, ids, device)
        causal = not reads_ahead(forward, ids, device)
        _register_attention()
        verdict = may_pack(forward, ids, _pad_id(model.config), device)
    offset = verdict.position_offset
    return Fallback(
        backbone=Unpacked(forward, hidden_size) if offset is None else Packed(forward, offset),
        packed=offset is not None,
        why=verdict.why,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_tokens=_max_tokens(model),
        causal=causal,
        pooling="LAST" if causal else "CLS",
        head=head,
        notes=notes,
        token_types=_token_types(model),
    )


def _whole(forward: Forward, role: Role, labels: int, vocabulary_size: int, notes: tuple[str, ...]) -> Fallback:
    """A model that keeps its head, and so is not packed: what such a head looks at is not known."""
    return Fallback(
        backbone=Unpacked(forward, labels),
        packed=False,
        why="unpacked: its head is more than one linear layer",
        hidden_size=labels,
        vocabulary_size=vocabulary_size,
        parameters=sum(parameter.numel() for parameter in forward.model.parameters()),
        max_tokens=_max_tokens(forward.model),
        causal=False,
        pooling="CLS",
        head=kept_head(forward, role, labels),
        notes=notes,
        token_types=_token_types(forward.model),
    )


def _build(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    role: Role,
    trust_remote_code: bool,
    revision: str | None,
    used: frozenset[str],
) -> tuple[Any, tuple[str, ...]]:
    """The part of the model that answers with hidden states or logits, filled strictly, and what was odd about it."""
    notes = []
    code, door = config.get("auto_map") or {}, AUTO_CLASSES.get(role, "AutoModel")
    own_code = trust_remote_code and door in code
    if door in code and not own_code:
        notes.append(
            f"{checkpoint.folder} brings code of its own for this model ({code[door]}), which was not run; "
            "transformers' own was. Use trust_remote_code=True to run it."
        )
    settings = _config(checkpoint, config, trust_remote_code, revision)
    model_class = _remote(code[door], checkpoint, revision) if own_code else _auto_class(settings, door)
    try:
        whole, info = model_class.from_pretrained(
            str(checkpoint.folder),
            config=settings,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            # Not to accept them, but to learn their names.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load {checkpoint.folder} (model_type {config.get('model_type')!r}): {error}"
        ) from error
    whole.eval()
    encoder_only = role not in AUTO_CLASSES and getattr(settings, "is_encoder_decoder", False)
    model = whole.get_encoder() if encoder_only else whole
    if model is not whole:
        notes.append("Of this encoder-decoder model only the encoder is used.")
    ids = _plain_ids(settings, _vocabulary_size(model))
    forward = Forward(model, dtype, logits if role in AUTO_CLASSES else hidden_states)
    info["unexpected_keys"] = set(info["unexpected_keys"]) - used
    notes += check_weights(whole, forward, info, ids, checkpoint.folder)
    return model, tuple(notes)


def _config(checkpoint: Checkpoint, config: Mapping[str, Any], trust_remote_code: bool, revision: str | None) -> Any:
    """transformers' config object, of its own class or of the repository's."""
    import transformers

    model_type = str(config.get("model_type") or "")
    code = config.get("auto_map") or {}
    known = model_type in transformers.CONFIG_MAPPING
    if trust_remote_code and "AutoConfig" in code:
        config_class = _remote(code["AutoConfig"], checkpoint, revision)
    elif known:
        config_class = transformers.CONFIG_MAPPING[model_type]
    elif code and not trust_remote_code:
        raise CheckpointError(
            f"{checkpoint.folder} has model_type {model_type!r}, which transformers {transformers.__version__} does "
            f"not know; the repository brings code of its own for it ({', '.join(map(str, code.values()))}). "
            "Read that code, then use trust_remote_code=True to run it."
        )
    elif not model_type:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} names no model_type, so nobody can tell what model this is. "
            "Add it with hf_overrides={'model_type': ...}."
        )
    else:
        raise CheckpointError(
            f"{checkpoint.folder} has model_type {model_type!r}, which neither Poolhouse nor transformers "
            f"{transformers.__version__} knows. A newer transformers may: pip install --upgrade transformers."
        )
    try:
        settings = config_class.from_dict(dict(config))
    except Exception as error:
        raise CheckpointError(f"transformers refuses the config of {checkpoint.folder}: {error}") from error
    settings.name_or_path = str(checkpoint.folder)
    return settings


def _auto_class(settings: Any, door: str) -> Any:
    """transformers' door to the model; to its encoder alone, where it has a class for that (T5)."""
    import transformers

    if door != "AutoModel":
        auto_class = getattr(transformers, door)
        if type(settings) not in auto_class._model_mapping:  # noqa: SLF001 - transformers has no public name for it
            kind = door.removeprefix("AutoModel")
            raise CheckpointError(f"transformers has no model {kind} of model_type {settings.model_type!r}.")
        return auto_class
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    if getattr(settings, "is_encoder_decoder", False) and type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if type(settings) not in MODEL_MAPPING:
        raise CheckpointError(f"transformers has no model without a head for model_type {settings.model_type!r}.")
    return transformers.AutoModel


def _remote(reference: str, checkpoint: Checkpoint, revision: str | None) -> Any:
    """A class from Python files of the checkpoint, or of the repository that `reference` names."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(reference, str(checkpoint.folder), code_revision=revision)
    except Exception as error:
        raise CheckpointError(f"The code {reference!r} of {checkpoint.folder} cannot be used: {error}") from error


def _width(forward: Forward, ids: list[int], device: torch.device) -> int:
    """The width of an answer, seen by asking for one.

    Raises:
        CheckpointError: the model does not run on token ids alone (it wants pictures, sounds or a language).
    """
    try:
        return forward(torch.tensor([ids[:5]], device=device)).shape[-1]
    except Exception as error:
        raise CheckpointError(
            f"{type(forward.model).__name__} does not turn token ids alone into hidden states or logits "
            f"(dtype {forward.dtype}): {error}"
        ) from error


def _vocabulary_size(model: Any) -> int:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        size = getattr(model.config, "vocab_size", None)
    if not isinstance(size, int):
        raise CheckpointError(f"{type(model).__name__} has no token table, so it is no text model.")
    return size


def _plain_ids(config: Any, vocabulary_size: int) -> list[int]:
    """Up to a thousand token ids that no config key gives a meaning (padding and pictures are treated apart)."""
    special: set[int] = set()
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            # GLM-4 has several tokens that end a text.
            special.update(value if isinstance(value, list) else [value])
    step = max(vocabulary_size // 1000, 1)
    plain = [token for token in range(0, vocabulary_size, step) if token not in special]
    if getattr(config, "is_encoder_decoder", False) and isinstance(config.eos_token_id, int):
        # Bart's classifier looks for the end of a text.
        plain.insert(4, config.eos_token_id)
    return plain


def _pad_id(config: Any) -> int | None:
    pad_id = getattr(config, "pad_token_id", None)
    return pad_id if isinstance(pad_id, int) else None


def _token_types(model: nn.Module) -> int:
    """Rows of its table of token types: by its config, or by the tensors of XLNet, which has a table per layer."""
    rows = getattr(model.config, "type_vocab_size", None)
    if isinstance(rows, int):
        return rows
    # XLNet tells apart whether two tokens are of one type, so any number will do.
    return 3 if any(name.endswith("seg_embed") for name, _ in model.named_parameters()) else 0


def _max_tokens(model: nn.Module) -> int | None:
    """Positions that a text may use: RoBERTa and its kin lose those up to the padding id's."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _register_attention() -> None:
    """Make our attention known to transformers; doing so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(packed_attention.RUN, packed_attention.packed_attention)
    AttentionInterface.register(packed_attention.PROBE, packed_attention.packed_attention)
    # RUN has no entry here, and so transformers makes no mask at all.
    AttentionMaskInterface.register(packed_attention.PROBE, packed_attention.watched_mask)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no log of transformers: what matters is in our errors and notes."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
