"""Sentence-transformers files: modules.json of a folder and what it names.

Modules hand each other named vectors, `token_embeddings` and `sentence_embedding` mostly. What a module reads and writes
is followed by these names, and the answer is what stands under `sentence_embedding` in the end. What each key of each
file means stands in `module_keys.py`. No tensor is read: modules that have some are described by a `StoredStep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from poolhouse.errors import CheckpointError, did_you_mean
from poolhouse.files import Folder, JsonObject
from poolhouse.models.files.module_keys import PACKAGES, check_keys, class_of
from poolhouse.models.files.module_steps import LayerMean, StoredStep
from poolhouse.models.files.routes import Routes, StoredWeights, read_routes
from poolhouse.models.files.transformer_module import TransformerModule, read_transformer
from poolhouse.pooling.splade import SpladePooling
from poolhouse.pooling.steps import Step, TanhInt8, Unit

# sentence-transformers' names of poolings -> ours; in the order in which it concatenates them.
_POOLINGS = {
    "cls": "CLS",
    "max": "MAX",
    "mean": "MEAN",
    "mean_sqrt_len_tokens": "MEAN_SQRT_LEN",
    "weightedmean": "WEIGHTEDMEAN",
    "lasttoken": "LAST",
}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TOKENS, _SENTENCE = "token_embeddings", "sentence_embedding"
_CONFIG = "config_sentence_transformers.json"


@dataclass(frozen=True, slots=True)
class SentenceTransformersFiles:
    """What the files of a folder say.

    described: whether there are any: a modules.json. transformer_folder: where config.json and the weights lie. static: whether a table and a tokenizer lie there instead.
    pooling: names of REDUCTIONS, concatenated; None where no Pooling module stands.
    dropped: the id of a token that is taken out of every text (model2vec). before: steps of every token before pooling.
    heads: what comes after it, in order. normalize: whether a Normalize is last.
    pooled: whether the Transformer itself gives one vector per text (CLIP), which nothing pools then.
    layers: the hidden states that token vectors are a mean of; None for the last one.
    config_changes: what config.json is to say besides. add_special_tokens: whether texts get them.
    activation: dotted path of the function over a cross-encoder's logits. similarity: how vectors are compared, if stated.
    splade: how a SparseEncoder pools the logits of its masked language model; None for every other model.
    max_active_dims: how many features a SparseEncoder keeps; None keeps all.
    routes: which way texts go. by_route: what the files say of each route, where routes that run the model differ.
    looked_up: of the route whose texts are looked up in a table of vectors. weights: of one with a table of weights.
    logit_score: ids of the tokens whose logits a language model's score is made of, true and false (or None).
    of_tokens: whether `heads` are for the vector of every token (late interaction), and no pooling stands.
    scored: the config of a MultiVectorMask, which says what tokens late interaction leaves out; None without one.
    matryoshka: lengths to which vectors may be cut; () where none are stated.
    notes: what is left out of the files, a sentence each.
    """

    transformer_folder: Folder
    described: bool = True
    static: bool = False
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    dropped: int | None = None
    before: tuple[Step | StoredStep, ...] = ()
    heads: tuple[Step | StoredStep, ...] = ()
    normalize: bool = False
    pooled: bool = False
    layers: LayerMean | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    add_special_tokens: bool = True
    config_changes: JsonObject = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    activation: str | None = None
    similarity: str | None = None
    splade: SpladePooling | None = None
    max_active_dims: int | None = None
    routes: Routes = Routes()
    by_route: Mapping[str, SentenceTransformersFiles] = field(default_factory=dict)
    looked_up: SentenceTransformersFiles | None = None
    weights: StoredWeights | None = None
    logit_score: tuple[int, int | None] | None = None
    of_tokens: bool = False
    scored: JsonObject | None = None
    matryoshka: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def read_sentence_transformers(folder: Folder) -> SentenceTransformersFiles:
    """The description in `folder`; one that says nothing where it has no modules.json.

    Raises:
        CheckpointError: a file that is corrupt, missing, or says what Poolhouse does not serve.
    """
    if not folder.has("modules.json"):
        return SentenceTransformersFiles(folder, described=False)
    path, modules = folder.path / "modules.json", folder.any_json("modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise CheckpointError(f"{path} is not a list of modules.")
    notes = [note for module in modules for note in check_keys("modules.json", module, path)]
    config = folder.json(_CONFIG, needed=False)
    notes += check_keys(_CONFIG, config, folder.path / _CONFIG)
    of_tokens = is_late_interaction(config, modules)
    files = _by_route(folder, modules, of_tokens)
    for name in ("max_active_dims", "truncate_dim"):
        if config.get(name) is not None and config[name] < 1:
            raise CheckpointError(f"{folder / _CONFIG}: {name} must be at least 1, got {config[name]}.")
    count = config.get("max_active_dims")
    prompts = {str(name): str(text) for name, text in (config.get("prompts") or {}).items()}
    return replace(
        _counting(files, count),
        by_route={name: _counting(route, count) for name, route in files.by_route.items()},
        prompts=prompts,
        default_prompt_name=_default_prompt(config.get("default_prompt_name"), prompts, folder.path / _CONFIG),
        truncate_dim=config.get("truncate_dim"),
        activation=config.get("activation_fn"),
        similarity=config.get("similarity_fn_name"),
        max_active_dims=count,
        matryoshka=tuple(config.get("matryoshka_dims") or ()),
        notes=tuple(dict.fromkeys((*notes, *files.notes))),
    )


def _counting(files: SentenceTransformersFiles, count: int | None) -> SentenceTransformersFiles:
    """The same with autoencoders that keep so many features, where a number is stated."""
    heads = (replace(head, count=count) if isinstance(head, StoredStep) else head for head in files.heads)
    return replace(files, heads=tuple(heads)) if count else files


def is_late_interaction(config: JsonObject, modules: Sequence[JsonObject]) -> bool:
    """Whether these files are of a late-interaction model, as PyLate or sentence-transformers write them."""
    kinds = [str(module["type"]) for module in modules]
    if any(kind.rsplit(".", 1)[-1] == "MultiVectorMask" or kind.startswith("pylate.") for kind in kinds):
        return True
    return config.get("model_type") in ("ColBERT", "MultiVectorEncoder") or "query_prefix" in config


def _default_prompt(name: str | None, prompts: Mapping[str, str], path: Path) -> str | None:
    """The name, which must be that of a prompt; "query" and "document" are there, empty, where nobody states them."""
    if name is None or name in prompts or name in ("query", "document"):
        return name if name in prompts else None
    raise CheckpointError(
        f"{path}: default_prompt_name is '{name}', but the prompts are {sorted(prompts)}.{did_you_mean(name, prompts)}"
    )


def _by_route(folder: Folder, modules: list[JsonObject], of_tokens: bool) -> SentenceTransformersFiles:
    """What the modules say; of a Router, the modules of each route stand where the Router stood.

    Raises:
        CheckpointError: routes that run different models, or more than one table.
    """
    index = next((index for index, module in enumerate(modules) if _is_router(module, folder)), None)
    if index is None:
        return _followed(folder, modules, of_tokens)
    path = Path(str(modules[index].get("path") or ""))
    router = folder / str(path)
    described = read_routes(router)
    chains: dict[str, SentenceTransformersFiles] = {}
    weights: dict[str, StoredWeights] = {}
    for name, own in described.modules.items():
        inner = [{**module, "path": str(path / module["path"])} for module in own]
        chain = [*modules[:index], *inner, *modules[index + 1 :]]
        if any(_is_router(module, folder) for module in chain):
            raise CheckpointError(f"{folder}: a Router within a Router is not served.")
        if class_of(chain[0], folder.path / "modules.json") != "SparseStaticEmbedding":
            chains[name] = _followed(folder, chain, of_tokens)
        elif len(chain) > 1:
            raise CheckpointError(f"{folder}: modules beside a Router with a SparseStaticEmbedding are not served.")
        else:
            module = folder / str(inner[0]["path"])
            check_keys("SparseStaticEmbedding", module.json("config.json", needed=False), module.path / "config.json")
            weights[name] = StoredWeights(module, router)
    running = {name: chain for name, chain in chains.items() if not chain.static} or dict(list(chains.items())[:1])
    tables = {name: chain for name, chain in chains.items() if name not in running}
    folders = {chain.transformer_folder for chain in running.values()}
    looked_up = {chain.transformer_folder for chain in tables.values()} | {one.folder for one in weights.values()}
    if len(folders) != 1 or len(looked_up) > 1 or (tables and weights):
        raise CheckpointError(
            f"{router}: routes {sorted(described.modules)} of {len(folders)} encoders and {len(looked_up)} tables; "
            "Poolhouse serves one encoder, with one table (StaticEmbedding or SparseStaticEmbedding) beside it or none."
        )
    readings = {(one.max_seq_length, one.do_lower_case, one.add_special_tokens, one.layers) for one in running.values()}
    if len(readings) > 1:
        raise CheckpointError(f"{router}: routes {sorted(running)} that read their texts differently are not served.")
    main = running.get(described.routes.main or "", next(iter(running.values())))
    return replace(
        main,
        routes=replace(described.routes, looked_up=frozenset({*weights, *tables})),
        by_route=running if len(running) > 1 else {},
        looked_up=next(iter(tables.values()), None),
        weights=next(iter(weights.values()), None),
    )


def _is_router(module: JsonObject, folder: Folder) -> bool:
    return class_of(module, folder.path / "modules.json", own=True) in ("Router", "Asym")


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Vectors under a name, and the steps that made them of the Transformer's.

    of_tokens: one for each token, as long as no Pooling came. through: the names that they had on the way.
    """

    of_tokens: bool = True
    before: tuple[Step | StoredStep, ...] = ()
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    heads: tuple[Step | StoredStep, ...] = ()
    layers: LayerMean | None = None
    through: frozenset[str] = frozenset()

    def then(self, step: Step | StoredStep) -> _Vectors:
        if self.of_tokens:
            return replace(self, before=(*self.before, step))
        return replace(self, heads=(*self.heads, step))


class _Followed:
    """The vectors that modules hand each other, by name, while one module after the other is read."""

    def __init__(self, path: Path, of_tokens: bool) -> None:
        self.path = path
        self.answer = _TOKENS if of_tokens else _SENTENCE
        self.vectors: dict[str, _Vectors] = {}
        self.notes: list[str] = []

    def read(self, name: str, kind: str) -> _Vectors:
        if name not in self.vectors:
            raise CheckpointError(
                f"{self.path}: the module {kind} reads module_input_name '{name}', but the modules before it write "
                f"{sorted(self.vectors)}."
            )
        return self.vectors[name]

    def write(self, name: str, vectors: _Vectors, kind: str) -> None:
        if name == _SENTENCE and vectors.of_tokens:
            raise CheckpointError(
                f"{self.path}: the module {kind} writes vectors of tokens as module_output_name '{name}'."
            )
        self.vectors[name] = replace(vectors, through=vectors.through | {name})

    def apply(self, step: Step | StoredStep, config: JsonObject, kind: str) -> None:
        """A module with one input and one output, whose config may name them."""
        name = config.get("module_input_name") or self.answer
        self.write(config.get("module_output_name") or name, self.read(name, kind).then(step), kind)

    def answered(self) -> _Vectors:
        """What the answer is made of, with a note where other vectors are made besides."""
        answer = self.vectors.get(self.answer) or self.vectors.get(_TOKENS) or _Vectors()
        left = sorted(set(self.vectors) - answer.through - {_TOKENS, _SENTENCE, "scores", "causal_logits"})
        if left:
            self.notes.append(
                f"modules.json: {', '.join(left)} (module_output_name) is no part of the embedding, and left out."
            )
        return answer


def _followed(folder: Folder, modules: Sequence[JsonObject], of_tokens: bool) -> SentenceTransformersFiles:
    """What a chain of modules says."""
    followed = _Followed(folder.path / "modules.json", of_tokens)
    transformer = TransformerModule(folder)
    splade: SpladePooling | None = None
    logit_score: tuple[int, int | None] | None = None
    scored: JsonObject | None = None
    static = False
    for module in modules:
        own = folder / str(module.get("path") or "")
        kind = class_of(module, followed.path, own=own_code_is_known(module, own))
        config = {} if kind in _OF_ROOT else own.json("config.json", needed=kind in _WITH_CONFIG)
        if kind not in _OF_ROOT:
            if kind not in _KINDS:
                raise CheckpointError(
                    f"{followed.path}: the module {module['type']} is not one that Poolhouse has. "
                    f"It has {', '.join((*_OF_ROOT, *_KINDS))} and Router."
                )
            followed.notes += check_keys(kind, config, own.path / "config.json")
        if kind in ("Transformer", "MLMTransformer", "CLIPModel", "MultiModalTransformer"):
            transformer = read_transformer(own, kind, of_tokens, str(module["type"]).startswith(PACKAGES))
            vectors = _Vectors(of_tokens=transformer.output == _TOKENS, layers=transformer.layers)
            followed.write(transformer.output, vectors, kind)
            if not str(module["type"]).startswith(PACKAGES):
                followed.write(_SENTENCE, replace(vectors, of_tokens=False), kind)
        elif kind == "StaticEmbedding":
            transformer, static = TransformerModule(own), True
            followed.write(_SENTENCE, _Vectors(of_tokens=False, pooling=("MEAN",)), kind)
        elif kind == "WeightedLayerPooling":
            followed.notes += _mean_of_layers(followed, config, own, transformer)
        elif kind == "SpladePooling":
            splade = _splade(config, own)
            followed.write(_SENTENCE, replace(followed.read(_TOKENS, kind), of_tokens=False), kind)
        elif kind == "Pooling":
            pooling, tokens = _pooling(config, own), followed.read(_TOKENS, kind)
            include_prompt = bool(config.get("include_prompt", True))
            pooled = replace(tokens, of_tokens=False, pooling=pooling, include_prompt=include_prompt)
            followed.write(_SENTENCE, pooled, kind)
        elif kind == "Dense":
            of_pylate = str(module["type"]).startswith("pylate.")
            defaults = {"activation_function": "torch.nn.Identity"} if of_pylate else {}
            followed.apply(StoredStep("Dense", own, {**defaults, **config}), config, kind)
        elif kind in ("LayerNorm", "SparseAutoEncoder"):
            followed.apply(StoredStep(kind, own, config), {}, kind)
        elif kind == "Normalize":
            # What is not there is not normalised.
            if (config.get("module_input_name") or followed.answer) in followed.vectors:
                followed.apply(Unit(), config, kind)
        elif kind == "FlexibleQuantizer":
            followed.apply(TanhInt8(), {}, kind)
        elif kind == "MultiVectorMask":
            scored = config
        elif kind == "LogitScore":
            logit_score = _logit_score(config, own)
    _check_task(transformer, splade, logit_score, followed.path)
    answer = followed.answered()
    heads = answer.before if of_tokens else answer.heads
    normalize = bool(heads) and isinstance(heads[-1], Unit)
    return SentenceTransformersFiles(
        transformer_folder=transformer.folder,
        static=static,
        pooling=answer.pooling,
        include_prompt=answer.include_prompt,
        before=() if of_tokens else answer.before,
        heads=heads[:-1] if normalize else heads,
        normalize=normalize,
        pooled=transformer.output == _SENTENCE,
        layers=answer.layers,
        max_seq_length=transformer.max_seq_length,
        do_lower_case=transformer.do_lower_case,
        add_special_tokens=transformer.add_special_tokens,
        config_changes=transformer.config_changes,
        splade=splade,
        logit_score=logit_score,
        of_tokens=of_tokens,
        scored=scored,
        notes=tuple(followed.notes),
    )


# Modules whose folder has a config.json of another meaning, or none: the model's own.
_OF_ROOT = (
    *("Transformer", "MLMTransformer", "CLIPModel", "MultiModalTransformer", "StaticEmbedding", "FlexibleQuantizer"),
)
_WITH_CONFIG = ("Pooling", "Dense", "LogitScore", "SpladePooling", "SparseAutoEncoder", "WeightedLayerPooling")
_KINDS = (
    *("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout", "WeightedLayerPooling", "LogitScore", "SpladePooling"),
    *("SparseAutoEncoder", "MultiVectorMask"),
)


def own_code_is_known(module: JsonObject, folder: Folder) -> bool:
    """Whether a module of the repository's own code does what is done here.

    The Transformer of Jina chooses task adapters. Those of GME and vdr write prompts of texts and pictures. Perplexity's
    quantiser makes whole numbers.
    """
    kind, config = str(module["type"]), folder.json("config.json", needed=False)
    if kind == "st_quantize.FlexibleQuantizer":
        return True
    if kind in ("custom_st.Transformer", "custom_st.MultiModalTransformer") and config.get("model_type") == "qwen2_vl":
        return True
    if kind != "custom_st.Transformer":
        return False
    return bool(config.get("lora_adaptations")) or (folder.path / "adapters").is_dir()


def _check_task(transformer: TransformerModule, splade: SpladePooling | None, logit_score: object, path: Path) -> None:
    """Refuse logits that are taken for hidden states."""
    if transformer.task == "fill-mask" and splade is None:
        raise CheckpointError(f"{path}: transformer_task 'fill-mask' is served with a SpladePooling behind it alone.")
    if transformer.task in ("text-generation", "any-to-any") and logit_score is None:
        raise CheckpointError(
            f"{path}: transformer_task '{transformer.task}' is served with a LogitScore behind it alone."
        )


def _mean_of_layers(
    followed: _Followed, config: JsonObject, folder: Folder, transformer: TransformerModule
) -> tuple[str, ...]:
    """Token vectors that are a weighted mean of those of several layers."""
    if not {**transformer.folder.json("config.json"), **transformer.config_changes}.get("output_hidden_states"):
        note = (
            "WeightedLayerPooling has no effect, there or here: config.json does not say output_hidden_states, so it is "
            "given no layers."
        )
        return (note,)
    start, layers = config.get("layer_start", 4), config.get("num_hidden_layers", 12)
    mean = LayerMean(start, layers + 1 - start, folder)
    followed.write(_TOKENS, _Vectors(layers=mean), "WeightedLayerPooling")
    return ()


def _pooling(config: JsonObject, folder: Folder) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _LEGACY_POOLINGS.items() if config.get(key)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    unknown = [mode for mode in modes if str(mode) not in _POOLINGS]
    if unknown or not modes:
        raise CheckpointError(
            f"{folder / 'config.json'}: unknown pooling_mode {unknown or modes}; known: {list(_POOLINGS)}."
        )
    return tuple(_POOLINGS[mode] for mode in modes)


def _splade(config: JsonObject, folder: Folder) -> SpladePooling:
    strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    logarithms = {"relu": 1, "log1p_relu": 2}.get(activation)
    if strategy not in ("max", "sum") or logarithms is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: unknown SPLADE pooling {strategy!r} of {activation!r}; "
            "known: max and sum, of relu and log1p_relu."
        )
    return SpladePooling(strategy, logarithms)


def _logit_score(config: JsonObject, folder: Folder) -> tuple[int, int | None]:
    true, false = config.get("true_token_id"), config.get("false_token_id")
    if not isinstance(true, int) or not isinstance(false, int | None):
        raise CheckpointError(f"{folder / 'config.json'}: true_token_id and false_token_id must be token ids.")
    return true, false
