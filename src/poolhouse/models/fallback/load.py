"""The fallback: any encoder or decoder that transformers can build -> Served, packed where a probe allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.tokenizer_files import padding_of
from poolhouse.models.fallback import attention
from poolhouse.models.fallback.backbones import Forward, Packed, Padding, Unpacked, hidden_states, logits, text_features
from poolhouse.models.fallback.probe import Verdict, may_pack, reads_ahead, take_head
from poolhouse.models.files.checkpoint import Checkpoint, Config, reason
from poolhouse.models.files.own_classes import names_of_code, own_class_of
from poolhouse.models.files.quantised import method_of
from poolhouse.models.heads.heads import Head, LoadedHead
from poolhouse.models.model import Served, Sizes
from poolhouse.models.roles import Role

# transformers' classes of models with a head.
AUTO_CLASSES: dict[Role, str] = {
    "classify": "AutoModelForSequenceClassification",
    "token_classify": "AutoModelForTokenClassification",
    "splade": "AutoModelForMaskedLM",
}
# Text towers that stand alone, with the projection into the shared space.
_PROJECTED = "TextModelWithProjection"
_OTHER_TOWERS = ("vision", "visual", "image", "audio", "video")
# Names in errors and notes; the rest is counted.
_NAMED = 5


def load_hugging_face(
    checkpoint: Checkpoint,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    role: Role = "embed",
    trust_remote_code: bool = False,
    used: frozenset[str] = frozenset(),
) -> Served:
    """The model of `checkpoint` as transformers builds it.

    config: config.json with the user's changes. role: which head it has; that of a plain masked language model is
    left aside. used: names of tensors that others read.

    Raises:
        CheckpointError: an unknown type, code that is not trusted, weights that are missing or of another shape.
    """
    head, verdict = None, None
    with quiet_transformers():
        forward, notes = _build(checkpoint, config, dtype, role, trust_remote_code, used)
        whole = forward.model.requires_grad_(False).to(device)
        pools_itself = role not in AUTO_CLASSES and _is_dual_encoder(whole)
        text_tower = _text_tower(whole)
        vocabulary_size = _vocabulary_size(text_tower)
        ids = plain_ids(text_tower.config, vocabulary_size)
        width = _width(forward, ids, device)
        if pools_itself:
            verdict = Verdict(None, "unpacked: the model itself makes one vector of each text")
        elif role in AUTO_CLASSES:
            taken = take_head(forward, role, ids, device)
            if taken is None:
                # What such a head looks at is not known.
                verdict = Verdict(None, "unpacked: its head is more than one linear layer")
                head = _kept_head(forward, role, width)
            else:
                forward, head = taken
                width = _width(forward, ids, device)
        causal = verdict is None and not reads_ahead(forward, ids, device)
        if causal:
            _check_both_sides(whole, config, checkpoint.folder)
        if verdict is None:
            register_attention()
            verdict = may_pack(forward, ids, _pad_id(whole.config), device)
    offset = verdict.position_offset
    return Served(
        backbone=Unpacked(forward, width) if offset is None else Packed(forward, offset),
        served_by=f"transformers, {verdict.why}",
        sizes=Sizes(
            hidden_size=width,
            vocabulary_size=vocabulary_size,
            parameters=sum(parameter.numel() for parameter in whole.parameters()),
            positions=max_tokens(text_tower),
            token_types=0 if pools_itself else _token_types(whole),
        ),
        pooling="LAST" if causal else "CLS",
        head=head,
        pools_itself=pools_itself,
        notes=notes,
    )


def _check_both_sides(model: Any, config: Config, folder: Folder) -> None:
    """Refuse a model whose tokens see those before them alone, where its class says that they see both sides.

    Raises:
        CheckpointError: naming the class, and what is possible.
    """
    if own_class_of(config) is not None:
        raise CheckpointError(
            f"{folder} names {', '.join(names_of_code(config))}, whose tokens see both sides. transformers' "
            f"{type(model).__name__} would run instead, whose tokens see only those before them. If the repository has "
            "code of its own, read it, then use trust_remote_code=True to run it."
        )


def _kept_head(forward: Forward, role: Role, labels: int) -> LoadedHead:
    """The head of a model that answers with logits already: nothing is left to compute."""
    config = forward.model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        # transformers takes several texts at a time only where padding is defined; none of ours is padded.
        config.pad_token_id = -1
    whole = role == "classify"
    return LoadedHead(Head((), pooling="CLS" if whole else None, fixed=whole, tokens=not whole), (), labels)


def _build(
    checkpoint: Checkpoint,
    config: Config,
    dtype: torch.dtype,
    role: Role,
    trust_remote_code: bool,
    used: frozenset[str],
) -> tuple[Forward, tuple[str, ...]]:
    """The part of the model that answers with hidden states, logits or vectors, and what was odd about it.

    It is filled strictly.
    """
    notes = []
    code, auto_name = config.get("auto_map") or {}, AUTO_CLASSES.get(role, "AutoModel")
    own_code = trust_remote_code and auto_name in code
    if auto_name in code and not own_code:
        notes.append(
            f"{checkpoint.folder} brings code of its own for this model ({code[auto_name]}), which was not run; "
            "transformers' own was. Use trust_remote_code=True to run it."
        )
    checkpoint.check_weights()
    settings = config_of(checkpoint, config, trust_remote_code)
    encoder_only = role not in AUTO_CLASSES and _has_encoder(settings)
    model_class = _remote(code[auto_name], checkpoint) if own_code else auto_class(settings, auto_name)
    if model_class.__name__ == "AutoModelForTextEncoding":
        # T5Gemma's encoder must be told that it stands alone.
        settings.is_encoder_decoder = False
    try:
        whole, info = model_class.from_pretrained(
            str(checkpoint.folder),
            config=settings,
            dtype=dtype,
            variant=checkpoint.variant,
            local_files_only=True,
            output_loading_info=True,
            # Not to accept them, but to learn their names.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        failed = (
            f"transformers cannot load {checkpoint.folder} (model_type {config.get('model_type')!r}): {reason(error)}"
        )
        if method := method_of(config):
            failed += f" Its weights are quantised by {method!r}, which transformers reads with that method's packages."
        raise CheckpointError(failed) from error
    whole.eval()
    info["unexpected_keys"] = set(info["unexpected_keys"]) - used
    if role not in AUTO_CLASSES and _is_dual_encoder(whole):
        forward = _of_texts(whole, checkpoint.folder, dtype)
        notes.append(f"Of {type(whole).__name__} only the text side is used; pictures and sounds are not read yet.")
        ids = plain_ids(_text_tower(whole).config, _vocabulary_size(_text_tower(whole)))
        return forward, (*notes, *check_weights(whole, forward, info, ids, checkpoint.folder))
    if getattr(settings, "vision_config", None) is not None:
        notes.append(f"Texts alone are read: {type(whole).__name__} is not served with pictures.")
    model = whole.get_encoder() if encoder_only else whole
    if model is not whole:
        notes.append("Of this encoder-decoder model only the encoder is used.")
    ids = plain_ids(settings, _vocabulary_size(model))
    forward = Forward(model, dtype, logits if role in AUTO_CLASSES else hidden_states)
    notes += check_weights(whole, forward, info, ids, checkpoint.folder)
    return forward, tuple(notes)


def _is_dual_encoder(model: Any) -> bool:
    """Whether texts have a tower of their own, which makes one vector of each (CLIP and models like it)."""
    return hasattr(model, "text_model") and (
        hasattr(model, "get_text_features") or type(model).__name__.endswith(_PROJECTED)
    )


def _text_tower(model: Any) -> Any:
    return model.text_model if _is_dual_encoder(model) else model


def _of_texts(model: Any, folder: Folder, dtype: torch.dtype) -> Forward:
    """The text tower with its projection; the other one is dropped."""
    if type(model).__name__.endswith(_PROJECTED):
        return Forward(model, dtype, text_features)
    for name, _ in list(model.named_children()):
        if name.startswith(_OTHER_TOWERS):
            setattr(model, name, None)
    padding = None
    if model.config.model_type.startswith("siglip"):
        # Trained on padding without a mask, so that every text is as long; the config's pad id is not the tokenizer's.
        padding = Padding(model.text_model.config.max_position_embeddings, *padding_of(folder))
    return Forward(model, dtype, text_features, "get_text_features", padding)


def config_of(checkpoint: Checkpoint, config: Config, trust_remote_code: bool) -> Any:
    """transformers' config object, of its own class or of the repository's."""
    import transformers

    model_type = str(config.get("model_type") or "")
    code = config.get("auto_map") or {}
    known = model_type in transformers.CONFIG_MAPPING
    if trust_remote_code and "AutoConfig" in code:
        config_class = _remote(code["AutoConfig"], checkpoint)
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


def auto_class(settings: Any, name: str) -> Any:
    """transformers' class of that name, which builds the model; of its encoder alone, where it has a class for that (T5)."""
    import transformers

    if name != "AutoModel":
        auto_class = getattr(transformers, name)
        if type(settings) not in auto_class._model_mapping:  # noqa: SLF001 - transformers has no public name for it
            kind = name.removeprefix("AutoModel")
            raise CheckpointError(f"transformers has no model {kind} of model_type {settings.model_type!r}.")
        return auto_class
    stated = next(iter(settings.architectures or ()), "")
    if stated.endswith(_PROJECTED) and hasattr(transformers, stated):
        return getattr(transformers, stated)
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    if _has_encoder(settings) and type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if type(settings) not in MODEL_MAPPING:
        raise CheckpointError(f"transformers has no model without a head for model_type {settings.model_type!r}.")
    return transformers.AutoModel


def _has_encoder(settings: Any) -> bool:
    """Whether the model has an encoder beside a decoder; files of an encoder alone may deny that of their whole kind."""
    return bool(getattr(settings, "is_encoder_decoder", False) or getattr(type(settings), "is_encoder_decoder", False))


def _remote(reference: str, checkpoint: Checkpoint) -> Any:
    """A class from Python files of the checkpoint, or of the repository that `reference` names."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(reference, str(checkpoint.folder))
    except Exception as error:
        raise CheckpointError(f"The code {reference!r} of {checkpoint.folder} cannot be used: {error}") from error


def _width(forward: Forward, ids: list[int], device: torch.device) -> int:
    """The width of an answer, seen by asking for one.

    Raises:
        CheckpointError: the model does not run on token ids alone (it needs pictures, sounds or a language).
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


def plain_ids(config: Any, vocabulary_size: int) -> list[int]:
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


def max_tokens(model: nn.Module) -> int | None:
    """Positions that a text may use: RoBERTa and models like it lose those up to the padding id's."""
    for name, module in model.named_modules():
        table = getattr(module, "weight", None)
        if "position" in name and table is not None and getattr(module, "padding_idx", None) is not None:
            return int(table.shape[0] - module.padding_idx - 1)
    if getattr(model.config, "alibi", False):
        # Falcon's config has a limit all the same, by default.
        return None
    # MPT's table of distances ends too; LED's encoder and decoder have tables of their own.
    names = ("max_position_embeddings", "max_seq_len", "max_encoder_position_embeddings")
    limits = (getattr(model.config, name, None) for name in names)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def register_attention() -> None:
    """Make our attention known to transformers; doing so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(attention.RUN, attention.packed_attention)
    AttentionInterface.register(attention.PROBE, attention.packed_attention)
    # RUN has no entry here, and so transformers makes no mask at all.
    AttentionMaskInterface.register(attention.PROBE, attention.watched_mask)


@contextmanager
def quiet_transformers() -> Iterator[None]:
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


def check_weights(
    whole: nn.Module, forward: Forward, info: Mapping[str, Any], ids: Sequence[int], folder: Folder
) -> list[str]:
    """Refuse a model with random weights in what it answers; notes about the rest.

    whole: what was loaded, of which `forward` runs all or the encoder. info: transformers' account of the loading.
    ids: token ids that are safe to try.

    Raises:
        CheckpointError: naming tensors that are missing or of another shape.
    """
    model = forward.model
    used = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    names = {name for name, tensor in _tensors(whole) if id(tensor) in used}
    shapes = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in info["mismatched_keys"] if name in names}
    if shapes:
        listed = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in sorted(shapes.items())]
        raise CheckpointError(f"{folder} has tensors of other shapes than its config asks for: {short(listed)}.")
    notes = []
    missing = sorted(names & set(info["missing_keys"]))
    if missing:
        if _matters([tensor for name, tensor in _tensors(whole) if name in missing], forward, ids):
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors, some of which {type(model).__name__} needs: "
                f"{short(missing)}. It holds others that nobody claimed: {short(sorted(info['unexpected_keys'])) or 'none'}."
            )
        notes.append(f"Not in the checkpoint, and not needed: {short(missing)}.")
    if info["unexpected_keys"]:
        notes.append(f"Tensors left out: {short(sorted(info['unexpected_keys']))}.")
    return notes


def _matters(tensors: Sequence[Tensor], forward: Forward, ids: Sequence[int]) -> bool:
    """Whether hidden states depend on these tensors: they are spoilt for one short run.

    They are random numbers of the initialisation (a pooler that a checkpoint lacks), so nothing is lost.
    """
    suspects = [tensor for tensor in tensors if tensor.is_floating_point()]
    kept = [tensor.detach().clone() for tensor in suspects]
    with torch.no_grad():
        for tensor in suspects:
            tensor.fill_(torch.nan)
        try:
            answer = forward(torch.tensor([ids[:5]]))
        except Exception:  # noqa: BLE001 - a model that does not run is not trusted
            return True
        finally:
            for tensor, before in zip(suspects, kept, strict=True):
                tensor.copy_(before)
    return bool(answer.isnan().any())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def short(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
