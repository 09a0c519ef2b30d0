"""Plan: what a model's files and the user's options decide, before any tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import Folder, JsonObject
from poolhouse.layers.int8 import possible
from poolhouse.models.adapters.adapters import AdapterOptions
from poolhouse.models.adapters.peft import base_of, is_peft_folder, trained_labels, trained_role
from poolhouse.models.files.checkpoint import Checkpoint, Config
from poolhouse.models.files.config import Overrides, architecture, overridden
from poolhouse.models.files.gguf import GgufFolder, folder_of
from poolhouse.models.files.model_card import published_pooling, read_card
from poolhouse.models.files.own_classes import OwnClass, own_class_of
from poolhouse.models.files.quantised import Quantised, method_of, read_quantised, unquantised
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles, read_sentence_transformers
from poolhouse.models.heads.heads import Head
from poolhouse.models.heads.labelled import read_labelled
from poolhouse.models.heads.labelled.files import LabelledFiles
from poolhouse.models.heads.late_interaction import LateInteractionFiles, read_late_interaction
from poolhouse.models.heads.pruning import Pruner, read_pruner
from poolhouse.models.heads.rerankers import Reranker, names_of, read_reranker
from poolhouse.models.native.families import Family, family_of, spec_of
from poolhouse.models.native.families._config import NotNative
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.static import StaticFiles, read_static
from poolhouse.models.roles import DEFAULT_POOLINGS, Convert, Role, head_of, judges_steps, role_of
from poolhouse.params import PoolerConfig

if TYPE_CHECKING:
    from poolhouse.models.vision.picture_model import PictureModel, TowerFamily


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a user may decide about loading; see `Settings` for the names."""

    name: str
    variant: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    implementation: Literal["auto", "native", "transformers"] = "auto"
    trust_remote_code: bool = False
    max_tokens: int | None = None
    overrides: Overrides = None
    convert: Convert = "auto"
    pooler: PoolerConfig = PoolerConfig()
    matryoshka_dimensions: tuple[int, ...] = ()
    adapters: AdapterOptions = AdapterOptions()
    colbert_compat: Literal["reference", "vllm"] = "reference"
    score_compat: Literal["vllm", "files"] = "vllm"


@dataclass(frozen=True, slots=True, eq=False)
class NativeTower:
    """A tower of ours, the part of config.json that describes it, and what that means."""

    family: TowerFamily
    config: Config
    spec: TransformerSpec


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """A family of ours that serves a checkpoint.

    config: the part of config.json that the family reads. head: of a classifier or masked language model, by its own
    tensors. tower: of a model that reads pictures.
    """

    family: Family
    spec: TransformerSpec
    config: Config
    head: Head | None = None
    tower: NativeTower | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadPlan:
    """How a model is built; `poolhouse check` prints it.

    folder: with the model's description and prompts. weights: with config.json and tensors.
    files: what sentence-transformers' files say. config: config.json with all changes. role: what the model is run as.
    native, static: who serves it; where both are None, transformers does, and `why` is the reason.
    max_tokens: the longest prompt, by the user or by a reranker's files; None: by the model.
    default_pooling: where neither the user nor sentence-transformers' files say; None: by what transformers' model turns
    out to be. pooling_from: who says so.
    late: of late interaction. reranker: what is special about scoring. pruner: what the files say of one.
    pictures: the kind of a model that reads them.
    labelled: of a model that reads labels with each text; `config` is then of its encoder.
    quantised: how the weights are stored, where they are quantised and we read them; config does not say so then.
    notes: a sentence each.
    """

    options: LoadOptions
    folder: Folder
    weights: Folder
    tokenizer: Folder
    files: SentenceTransformersFiles
    config: JsonObject
    role: Role
    device: torch.device
    dtype: torch.dtype
    max_tokens: int | None
    adapters: AdapterOptions
    native: Native | None = None
    static: StaticFiles | None = None
    why: str = ""
    default_pooling: str | None = None
    pooling_from: str = ""
    late: LateInteractionFiles | None = None
    reranker: Reranker = field(default_factory=Reranker)
    pruner: Pruner | None = None
    pictures: PictureModel | None = None
    labelled: LabelledFiles | None = None
    quantised: Quantised | None = None
    notes: tuple[str, ...] = ()

    @property
    def prunes(self) -> bool:
        """Whether it is run as a pruner, not as the encoder of one."""
        return self.pruner is not None and self.role == "classify"

    @property
    def picture_notes(self) -> tuple[str, ...]:
        """What is assumed of prompts with pictures."""
        if self.pictures is None:
            return ()
        if self.plain_texts:
            return (f"Read as {self.pictures.name}, with vLLM's plain prompts (colbert_compat='vllm').",)
        return (f"Read as {self.pictures.name}.", *self.pictures.notes)

    @property
    def picture_folder(self) -> Folder:
        """Where the settings of the picture processor lie."""
        return picture_folder(self.tokenizer, self.weights, self.folder)

    @property
    def plain_texts(self) -> bool:
        """Whether a late-interaction model reads queries and documents as plain texts, as vLLM does."""
        return self.late is not None and self.options.colbert_compat == "vllm"

    def described(self) -> dict[str, str | list[str]]:
        """The decision by names for people; what does not apply is left out."""
        files, reranker, head = self.files, self.reranker, None if self.native is None else self.native.head
        late_only = self.late is not None and self.late.rules is not None
        pools = self.role in ("embed", "masked_lm") and not late_only and reranker.listwise is None
        pools = pools and self.labelled is None
        late = "plain texts" if self.plain_texts else "rules of queries and documents"
        rows: dict[str, str | list[str] | None] = {
            "weights": str(self.weights),
            "tokenizer": str(self.tokenizer),
            "runner": f"{self._runner()} ({self.why})" if self.why else self._runner(),
            "role": self.role,
            "pictures": None if self.pictures is None else self.pictures.name,
            "labels": None if self.labelled is None else f"read with each text ({self.labelled.name})",
            "head": None if head is None else " > ".join(module.name for module in head.modules),
            "pooling": self._pooling() if pools else None,
            "late_interaction": late if late_only else None,
            "score": None if reranker.tokens is None else f"logits of the tokens {list(reranker.tokens.tokens)}",
            "pruning": None
            if self.pruner is None or not self.prunes
            else f"{self.pruner.name}, by {self.pruner.head.rule}",
            "listwise": None if reranker.listwise is None else "all documents of a query in one prompt",
            "score_template": None if reranker.template is None else reranker.template.name,
            "limit": None if self.max_tokens in (None, -1) else f"{self.max_tokens} tokens",
            "dtype": str(self.dtype).removeprefix("torch."),
            "checkpoint": None if self.quantised is None else f"{self.quantised.method}, {self.quantised.what}",
            "quantization": _QUANTISED if self.options.quantization == "int8" else None,
            "device": str(self.device),
            "adapters": [*map(str, self.adapters.base_merge), *self.adapters.modules],
            "prompts": list(files.prompts),
            "routes": [f"{task}: {route}" for task, route in files.routes.by_task.items() if route],
            "notes": [*reranker.notes, *self.picture_notes, *self.notes, *files.notes],
        }
        return {name: value for name, value in rows.items() if value}

    def _runner(self) -> str:
        if self.static is not None:
            return self.static.layout
        return "transformers" if self.native is None else f"native family {self.native.family.model_types[0]}"

    def _pooling(self) -> str:
        files, user = self.files, self.options.pooler.seq_pooling_type
        if user is not None:
            return f"{user} (pooler_config)"
        if files.described and files.pooling is not None and self.pooling_from != "config.json":
            return f"{'+'.join(files.pooling)} (sentence-transformers' files)"
        if files.pooled:
            return "by the model itself (sentence-transformers' files)"
        if self.native is not None and self.pictures is not None and self.pictures.join is not None:
            return "by the model itself"
        if self.default_pooling is None:
            return "LAST of a decoder, CLS of an encoder (seen when the model is built)"
        return f"{self.default_pooling} ({self.pooling_from})"


def decide(folder: Path | Folder, options: LoadOptions) -> LoadPlan:
    """How to build the model in `folder`.

    Raises:
        CheckpointError: files missing, corrupt or not understood. ConfigError: an option that cannot be honoured.
    """
    folders = _folders_of(folder_of(folder), options.adapters.find)
    files, weights, device = folders.files, folders.weights, device_of(options.device)
    labelled = read_labelled(weights)
    static = None if labelled is not None else read_static(folders.described, files)
    if static is not None:
        return _static(static, folders, options, device)
    adapters = replace(options.adapters, base_merge=(*options.adapters.base_merge, *folders.adapters))
    trained = trained_role(adapters.merged_folders) if options.convert == "auto" else None
    labels = {} if trained is None else trained_labels(adapters.merged_folders)
    # A copy, which the user's function or transformers may change without changing what the folder has read.
    stored = Checkpoint(weights).config if labelled is None else labelled.encoder
    config = overridden(deepcopy({**stored, **files.config_changes, **labels}), options.overrides)
    special, config = _special(folders, config, labelled, trained, options)
    late, reranker, pictures = special.late, special.reranker, special.pictures
    role = trained or special.role or _role(config, files, reranker, late, special.scored, options)
    native, why, notes = _native(config, role, options, reranker, late, weights, pictures)
    special.check(native, why, options, adapters)
    family = None if native is None else native.family
    if native is None and pictures is not None and pictures.join is not None:
        pictures = None  # transformers runs the text half of such models alone
    hosted = pictures is not None and pictures.hosted is not None
    _check_served(native, why, folders, adapters, pictures)
    method, quantised = method_of(config), None
    if native is not None or hosted:
        quantised, config = read_quantised(config), unquantised(config)
    elif method is not None:
        notes += (f"Its weights are quantised by {method}, which transformers reads by the packages of that method.",)
    _check_quantization(options, native, why, device, method)
    stated = None if family is None else family.stated_pooling(config)
    if files.described and stated is not None:
        files = replace(files, pooling=(stated,))
    if pictures is not None and (dims := pictures.dims(config)) is not None:
        files = replace(files, truncate_dim=files.truncate_dim or dims)
        config = {"is_matryoshka": True, **config}
    longest = reranker.max_tokens or (None if pictures is None else pictures.longest(config))
    own = own_class_of(config)
    if own is not None and files.pooling is None:
        files = replace(files, include_prompt=own.include_prompt, prompts=files.prompts or own.prompts)
    default_pooling, pooling_from = _default_pooling(config, family, stated, own, folders, pictures)
    return LoadPlan(
        options=options,
        folder=folders.described,
        weights=weights,
        tokenizer=folders.tokenizer,
        files=files,
        config=config,
        role=role,
        device=device,
        # The halves of a model that reads pictures may state a type where the whole does not.
        dtype=dtype_of(
            reranker.dtype(options.dtype, device),
            config if pictures is None else {**pictures.text_config(config), **config},
            *(family, device),
        ),
        max_tokens=longest if options.max_tokens is None else options.max_tokens,
        adapters=replace(
            adapters,
            classifier=role in ("classify", "token_classify"),
            projections=() if late is None or late.heads is not None else late.projections,
        ),
        native=native,
        why=why,
        default_pooling=default_pooling,
        pooling_from=pooling_from,
        late=late,
        reranker=reranker,
        pruner=special.pruner,
        pictures=pictures,
        labelled=labelled,
        quantised=quantised,
        notes=notes,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Special:
    """What a model is besides an encoder or a decoder with a head, as `LoadPlan` has it; None and defaults where nothing.

    pruner: also of a pruner whose encoder alone is asked for, which does not prune.
    """

    labelled: LabelledFiles | None = None
    pruner: Pruner | None = None
    prunes: bool = False
    pictures: PictureModel | None = None
    late: LateInteractionFiles | None = None
    reranker: Reranker = field(default_factory=Reranker)

    @property
    def scored(self) -> bool:
        """Whether it reads pictures and scores pairs."""
        return self.pictures is not None and self.pictures.answers == "score"

    @property
    def role(self) -> Role | None:
        """What it is run as, where that follows."""
        return "embed" if self.labelled is not None else "classify" if self.prunes else None

    def check(self, native: Native | None, why: str, options: LoadOptions, adapters: AdapterOptions) -> None:
        """Refuse what models that read labels, and those that prune, cannot be."""
        if self.labelled is not None:
            _check_labelled(self.labelled, native, why, options, adapters)
        if self.pruner is not None and self.prunes:
            _check_pruner(self.pruner, native, why, adapters)


def _special(
    folders: _Folders, config: JsonObject, labelled: LabelledFiles | None, trained: Role | None, options: LoadOptions
) -> tuple[_Special, JsonObject]:
    """What is special about a model, and its config, which a pruner has within its own."""
    if labelled is not None:
        return _Special(labelled), config
    pruner, weights, embeds = read_pruner(config), folders.weights, options.convert == "embed"
    if pruner is not None:
        config = pruner.config
        if not embeds:
            return _Special(pruner=pruner, prunes=True, reranker=Reranker(max_tokens=pruner.max_tokens)), config
    special = _Special(
        pruner=pruner, pictures=None if family_of(config) is not None else _pictures(config, folders, options)
    )
    pictures, late = special.pictures, None
    if special.scored:
        assert pictures is not None
        return replace(special, reranker=pictures.reranker(config, weights)), config
    if options.convert != "classify":
        if pictures is not None:
            late = pictures.late(config, picture_folder(folders.tokenizer, weights, folders.described))
        late = late or read_late_interaction(folders.described, weights, config, folders.files)
    special = replace(special, late=late)
    if trained is None and late is None and not embeds and not judges_steps(config, options.pooler):
        reranker = read_reranker(folders.described, weights, config, folders.files, options.name)
        special = replace(special, reranker=reranker)
    return special, config


def _check_served(
    native: Native | None, why: str, folders: _Folders, adapters: AdapterOptions, pictures: PictureModel | None
) -> None:
    """Refuse files and adapters that whoever serves the model cannot read.

    Raises:
        CheckpointError: a GGUF file of no native family. ConfigError: adapters.
    """
    hosted = pictures is not None and pictures.hosted is not None
    if native is None and isinstance(folders.weights, GgufFolder):
        raise CheckpointError(
            f"{folders.weights} is served natively alone: {why.rstrip('.')}. transformers reads no GGUF here."
        )
    if pictures is not None and pictures.join is not None and adapters.named:
        raise ConfigError(f"Adapters are not served of {pictures.name}, whose halves are two models.")
    if native is None and (adapters.modules or adapters.merge or (adapters.base_merge and not hosted)):
        raise ConfigError("Adapters are for models of the native families; transformers serves this one.")


def _check_labelled(
    labelled: LabelledFiles, native: Native | None, why: str, options: LoadOptions, adapters: AdapterOptions
) -> None:
    """Refuse what a model that reads labels cannot be.

    Raises:
        ConfigError: naming the option. CheckpointError: an encoder of no native family.
    """
    if options.convert not in ("auto", "none") or options.pooler != PoolerConfig():
        raise ConfigError(f"{labelled.name} answers by its own head: no convert and no pooler_config.")
    if adapters.named:
        raise ConfigError(f"Adapters are not served of {labelled.name}.")
    if native is None:
        raise CheckpointError(f"{labelled.name}: its encoder must be of a native family; {why}.")


def picture_folder(*folders: Folder) -> Folder:
    """The first with settings of a picture processor; the first of all where none has some."""
    named = ("processor_config.json", "preprocessor_config.json")
    return next((folder for folder in folders if any(map(folder.has, named))), folders[0])


def _pictures(config: JsonObject, folders: _Folders, options: LoadOptions) -> PictureModel | None:
    """The kind of a model that reads pictures. The table is imported here: models of a text family have no use for it."""
    from poolhouse.models.vision.kinds import picture_model_of

    names = partial(_names, folders, options.name, config)
    return picture_model_of(config, folders.weights, names, rerankers=options.convert != "embed")


def _names(folders: _Folders, name: str, config: Config) -> tuple[str, ...]:
    """What a checkpoint and its adapters are called, by their cards too, the bases that these name, and their tags."""
    own = (folders.described, *folders.adapters)
    cards = [read_card(folder.path) for folder in own]
    bases = (base for card in cards for base in (card.title, *card.base_models))
    tags = (f"tag:{tag}" for card in cards for tag in (card.pipeline_tag, *card.tags))
    return (*(called for folder in own for called in names_of(folder.path, name, config)), *bases, *tags)


@dataclass(frozen=True, slots=True)
class _Folders:
    """Where the parts of a model lie: for most in one folder, for an adapter that stands as a model in two.

    described: sentence-transformers' files and prompts; files: what they say. weights: config.json and tensors.
    adapters: PEFT folders to merge into the weights; two where an adapter was trained on an adapted model.
    """

    described: Folder
    weights: Folder
    tokenizer: Folder
    files: SentenceTransformersFiles
    adapters: tuple[Folder, ...] = ()


def _folders_of(folder: Folder, find: Callable[[str], Path]) -> _Folders:
    """The folders of the model in `folder`. find: the folder of a path or hub id, for an adapter's base.

    An adapter's own description and tokenizer win over its base's, as in sentence-transformers.

    Raises:
        CheckpointError: an adapter whose base is not named or not there.
    """
    if isinstance(folder, GgufFolder):
        files = SentenceTransformersFiles(folder, described=False, notes=folder.notes)
        return _Folders(folder, folder, folder.tokenizer, files)
    files = read_sentence_transformers(folder)
    transformer = files.transformer_folder
    if not is_peft_folder(transformer):
        return _Folders(folder, transformer, transformer, files)
    base_folder = find(_near(base_of(transformer), transformer.path))
    if base_folder.resolve() == folder.path.resolve():
        raise CheckpointError(f"{transformer} holds an adapter that names itself as its base.")
    base = _folders_of(folder_of(base_folder), find)
    own_tokenizer = transformer.has("tokenizer_config.json") or transformer.has("tokenizer.json")
    return _Folders(
        described=folder if files.described else base.described,
        weights=base.weights,
        tokenizer=transformer if own_tokenizer else base.tokenizer,
        files=files if files.described else base.files,
        adapters=(*base.adapters, transformer),
    )


def _near(base: str, adapter: Path) -> str:
    """A relative path that is nothing from here may be one from beside the adapter."""
    beside = adapter.parent / base
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base


def _static(static: StaticFiles, folders: _Folders, options: LoadOptions, device: torch.device) -> LoadPlan:
    """The plan of a model that is a table; see `poolhouse.models.native.static`."""
    folder, pooling = folders.described, options.pooler.seq_pooling_type
    if options.quantization is not None:
        raise ConfigError(
            f"quantization={options.quantization!r}: {folder} holds static embeddings, which have no products; leave it "
            "out."
        )
    if options.convert == "classify" or options.adapters.named or folders.adapters or options.overrides is not None:
        raise ConfigError(f"{folder} holds static embeddings: no classifier, no adapters, and no config to override.")
    if options.implementation == "transformers":
        raise ConfigError("model_impl='transformers': static embeddings are no model of transformers.")
    if pooling not in (None, "MEAN", "MEAN_SQRT_LEN", "WEIGHTEDMEAN"):
        # Others have no answer to a text without tokens.
        raise ConfigError(
            f"pooler_config: static embeddings are pooled by a mean (MEAN, MEAN_SQRT_LEN, WEIGHTEDMEAN), not by "
            f"{pooling}."
        )
    return LoadPlan(
        options=options,
        folder=folder,
        weights=static.files.transformer_folder,
        tokenizer=folders.tokenizer,
        files=static.files,
        config={"architectures": ["StaticEmbedding"]},
        role="embed",
        device=device,
        dtype=dtype_of(options.dtype, {}, None, torch.device("cpu")),
        max_tokens=options.max_tokens,
        adapters=options.adapters,
        static=static,
        default_pooling="MEAN",
        pooling_from="static embeddings",
    )


def _role(
    config: JsonObject,
    files: SentenceTransformersFiles,
    reranker: Reranker,
    late: LateInteractionFiles | None,
    scored: bool,
    options: LoadOptions,
) -> Role:
    """What the files make of the model, else its architecture's name."""
    if late is not None:
        return "embed"
    if reranker.tokens is not None or scored:
        return "classify"
    if files.splade is not None:
        return "splade"
    return role_of(config, options.convert, files.pooling is not None, options.pooler)


def _native(
    config: JsonObject,
    role: Role,
    options: LoadOptions,
    reranker: Reranker,
    late: LateInteractionFiles | None,
    weights: Folder,
    pictures: PictureModel | None,
) -> tuple[Native | None, str, tuple[str, ...]]:
    """The family that serves a checkpoint, or None and why transformers does; a note where a family refuses.

    Raises:
        ConfigError: model_impl='native' without a family. CheckpointError: a config that is not understood.
    """
    model_type = str(config.get("model_type", ""))
    family = family_of(config) if pictures is None else pictures.text
    native, why, notes = None, "", tuple[str, ...]()
    if family is None:
        what = f"model_type {model_type!r}" if pictures is None else pictures.name
        why = f"no native family serves {what}"
        if options.implementation == "native":
            raise ConfigError(f"model_impl='native': {why}.")
    elif options.implementation == "transformers":
        why = "model_impl='transformers'"
    else:
        try:
            native = _served_by(family, config, role, options, reranker, late, weights, pictures)
        except NotNative as reason:
            if options.implementation == "native":
                raise
            why, notes = str(reason), (f"Not served natively: {reason}",)
    return native, why, notes


def _served_by(
    family: Family,
    config: JsonObject,
    role: Role,
    options: LoadOptions,
    reranker: Reranker,
    late: LateInteractionFiles | None,
    weights: Folder,
    pictures: PictureModel | None,
) -> Native:
    """How a family serves a checkpoint.

    Raises:
        NotNative: it does not. CheckpointError: a config that cannot be understood.
    """
    if late is not None and late.fills_unseen and not family.attends_to_part and options.colbert_compat == "reference":
        raise NotNative("queries are filled up with tokens that nobody attends to, which its attention cannot do.")
    own, tower = config if pictures is None else pictures.text_config(config), None
    if pictures is not None and pictures.tower is not None:
        tower = _tower(pictures.tower, config, weights)
    spec = spec_of(family, own, weights)
    if judges_steps(config, options.pooler) or reranker.tokens is not None:
        return Native(family, spec, own, tower=tower)
    head = head_of(family, config, role)
    if head is None and role == "splade":
        raise NotNative(f"the native family of {architecture(config)} has no head to its vocabulary.")
    return Native(family, spec, own, head, tower)


def _tower(family: TowerFamily, config: Config, weights: Folder) -> NativeTower:
    own = family.config(config)
    return NativeTower(family, own, spec_of(family, own, weights))


def _check_pruner(pruner: Pruner, native: Native | None, why: str, adapters: AdapterOptions) -> None:
    """Refuse what a pruner cannot be run with.

    Raises:
        ConfigError: naming what is possible.
    """
    if native is None:
        raise ConfigError(
            f"{pruner.name} is served by the native families alone: {why}. convert='embed' runs its encoder alone."
        )
    if adapters.modules or adapters.merge or adapters.base_merge:
        raise ConfigError(f"Adapters are not served of {pruner.name}, which has two heads.")


def _default_pooling(
    config: JsonObject,
    family: Family | None,
    stated: str | None,
    own: OwnClass | None,
    folders: _Folders,
    pictures: PictureModel | None,
) -> tuple[str | None, str]:
    """How an embedder pools where neither the user nor sentence-transformers' files say, and who says so.

    None: by what transformers' model turns out to be. stated: by config.json. own: the class of the checkpoint's code.
    """
    by = {
        "config.json": stated,
        "the GGUF header": folders.weights.pooling if isinstance(folders.weights, GgufFolder) else None,
        "its kind of model": None if pictures is None else pictures.pooling,
        "its own code": None if own is None else own.pooling,
        "its model card": published_pooling(folders.described.path),
        "its family": None if family is None else family.pooling,
        "its architecture": DEFAULT_POOLINGS.get(architecture(config)),
    }
    return next(((name, source) for source, name in by.items() if name is not None), (None, ""))


_QUANTISED = "int8: products of blocks, weights per output and rows as they come; all else float32"


def _check_quantization(
    options: LoadOptions, native: Native | None, why: str, device: torch.device, method: str | None
) -> None:
    """Refuse int8 where it cannot be, and a method that is not the checkpoint's.

    method: what the checkpoint is quantised by.

    Raises:
        ConfigError: naming the option, and what is possible.
    """
    if options.quantization in (None, method):
        return
    if options.quantization != "int8":
        stored = "is not quantised" if method is None else f"is quantised by {method!r}"
        raise ConfigError(f"quantization={options.quantization!r}, but the checkpoint {stored}; leave it out.")
    if native is None:
        raise ConfigError(
            f"quantization='int8' is for models of the native families; transformers would serve this one: {why}. "
            "Leave it out, or save memory by dtype='bfloat16'."
        )
    if device.type != "cpu":
        raise ConfigError(
            f"quantization='int8' is for CPUs, and the device is {device}. "
            "There use dtype='bfloat16' or 'float16', or device='cpu'."
        )
    if _DTYPES.get(options.dtype, torch.float32) != torch.float32:
        raise ConfigError(
            f"dtype={options.dtype!r} beside quantization='int8': what is not int8 is float32; use 'auto' or 'float32'."
        )
    if not possible():
        raise ConfigError(
            "quantization='int8': this machine has neither compiled kernels nor a torch with oneDNN; leave it out."
        )


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: none that models run on, or one that this machine or this torch lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device; {_POSSIBLE}.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={name!r} is not served; {_POSSIBLE}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but this process sees no CUDA device.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but the CUDA devices are 0 to {torch.cuda.device_count() - 1}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"device={name!r}, but this torch sees no Metal device (mps); it needs macOS on Apple silicon."
        )
    return device


_POSSIBLE = "try 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'"
_DTYPES = {
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


def dtype_of(name: str, config: Config, family: Family | None, device: torch.device) -> torch.dtype:
    """The type of that name; for "auto" one that suits the device.

    That is float32 on CPUs, whose half types are slow; on CUDA as stored, float32 cut to a half type that is safe.

    Raises:
        ConfigError: a name of none that models run in.
    """
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"dtype={name!r} is not one of {['auto', *_DTYPES]}.")
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    stored = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    if stored != torch.float32:
        return stored
    return torch.float16 if family is not None and family.float16 else torch.bfloat16
