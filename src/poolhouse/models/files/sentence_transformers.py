"""Reading the files of a sentence-transformers folder: modules.json and what it names.

Modules hand each other named vectors, `token_embeddings` and `sentence_embedding` mostly. What a module reads and writes
is followed by these names, and the answer is what stands under `sentence_embedding` in the end. What each key of each
file means stands in `module_keys.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from poolhouse.errors import CheckpointError, did_you_mean
from poolhouse.files import read_any_json, read_json
from poolhouse.models.files.module_keys import PACKAGES, check_keys, class_of
from poolhouse.models.files.module_tensors import find_tensor, module_tensors
from poolhouse.models.files.routes import Routes, StaticWeights, read_routes, static_weights
from poolhouse.models.files.transformer_module import TransformerModule, read_transformer
from poolhouse.pooling.splade import SparseEncoder, SpladePooling
from poolhouse.pooling.steps import Activation, Dense, Norm, Step, Unit, named_activation

# sentence-transformers' words for poolings -> ours; in the order in which it concatenates them.
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

    transformer_folder: where config.json and the weights lie. static: whether a table and a tokenizer lie there instead.
    pooling: names of REDUCTIONS, concatenated; None where no Pooling module stands.
    dropped: the id of a token that is taken out of every text (model2vec). before: steps of every token before pooling.
    heads: what comes after it, in order. normalize: whether a Normalize is last.
    pooled: whether the Transformer itself gives one vector per text (CLIP), which nothing pools then.
    layers: the first hidden state that is mixed into the token vectors, and the weights from there on; None for the last.
    config_changes: what config.json is to say besides. add_special_tokens: whether texts get them.
    activation: dotted path of the function over a cross-encoder's logits. similarity: how vectors are compared, if stated.
    splade: how a SparseEncoder pools the logits of its masked language model; None for every other model.
    max_active_dims: how many features a SparseEncoder keeps; None keeps all.
    routes: which way texts go. sides: what the files say of each route, where routes that run the model differ.
    looked_up: of the route whose texts are looked up in a table of vectors.
    logit_score: ids of the tokens whose logits a language model's score is made of, true and false (or None).
    of_tokens: whether `heads` are for the vector of every token (late interaction), and no pooling stands.
    scored: the config of a MultiVectorMask, which says what tokens late interaction leaves out; None without one.
    matryoshka: lengths to which vectors may be cut; () where none are stated.
    notes: what is left out of the files, a sentence each.
    """

    transformer_folder: Path
    static: bool = False
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    dropped: int | None = None
    before: tuple[Step, ...] = ()
    heads: tuple[Step, ...] = ()
    normalize: bool = False
    pooled: bool = False
    layers: tuple[int, tuple[float, ...]] | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    add_special_tokens: bool = True
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    activation: str | None = None
    similarity: str | None = None
    splade: SpladePooling | None = None
    max_active_dims: int | None = None
    routes: Routes = Routes()
    sides: Mapping[str, SentenceTransformersFiles] = field(default_factory=dict)
    looked_up: SentenceTransformersFiles | None = None
    logit_score: tuple[int, int | None] | None = None
    of_tokens: bool = False
    scored: Mapping[str, Any] | None = None
    matryoshka: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def read_sentence_transformers(folder: Path) -> SentenceTransformersFiles | None:
    """The description in `folder`, or None where it has no modules.json.

    Raises:
        CheckpointError: a file that is corrupt, missing, or says what Poolhouse does not serve.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_any_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise CheckpointError(f"{path} is not a list of modules.")
    notes = [note for module in modules for note in check_keys("modules.json", module, path)]
    config = read_json(folder / _CONFIG, needed=False)
    notes += check_keys(_CONFIG, config, folder / _CONFIG)
    of_tokens = is_late_interaction(config, modules)
    files = _by_route(folder, modules, of_tokens)
    for name in ("max_active_dims", "truncate_dim"):
        if config.get(name) is not None and config[name] < 1:
            raise CheckpointError(f"{folder / _CONFIG}: {name} must be at least 1, got {config[name]}.")
    most = config.get("max_active_dims")
    prompts = {str(name): str(text) for name, text in (config.get("prompts") or {}).items()}
    return replace(
        _counting(files, most),
        sides={name: _counting(side, most) for name, side in files.sides.items()},
        prompts=prompts,
        default_prompt_name=_default_prompt(config.get("default_prompt_name"), prompts, folder / _CONFIG),
        truncate_dim=config.get("truncate_dim"),
        activation=config.get("activation_fn"),
        similarity=config.get("similarity_fn_name"),
        max_active_dims=most,
        matryoshka=tuple(config.get("matryoshka_dims") or ()),
        notes=tuple(dict.fromkeys((*notes, *files.notes))),
    )


def _counting(files: SentenceTransformersFiles, most: int | None) -> SentenceTransformersFiles:
    """The same with autoencoders that keep at most so many features."""
    heads = (with_count(head, most) if most and isinstance(head, SparseEncoder) else head for head in files.heads)
    return replace(files, heads=tuple(heads))


def is_late_interaction(config: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> bool:
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


def _by_route(folder: Path, modules: list[dict[str, Any]], of_tokens: bool) -> SentenceTransformersFiles:
    """What the modules say, of a Router's routes each in the Router's place.

    Raises:
        CheckpointError: routes that run different models, or more than one table.
    """
    place = next((place for place, module in enumerate(modules) if _is_router(module, folder)), None)
    if place is None:
        return _followed(folder, modules, of_tokens)
    path = Path(str(modules[place].get("path") or ""))
    described = read_routes(folder / path)
    chains: dict[str, SentenceTransformersFiles] = {}
    weights: dict[str, StaticWeights] = {}
    for name, own in described.modules.items():
        inner = [{**module, "path": str(path / module["path"])} for module in own]
        chain = [*modules[:place], *inner, *modules[place + 1 :]]
        if any(_is_router(module, folder) for module in chain):
            raise CheckpointError(f"{folder}: a Router within a Router is not served.")
        if class_of(chain[0], folder / "modules.json") != "SparseStaticEmbedding":
            chains[name] = _followed(folder, chain, of_tokens)
        elif len(chain) > 1:
            raise CheckpointError(f"{folder}: modules beside a Router with a SparseStaticEmbedding are not served.")
        else:
            weights[name] = static_weights(folder / str(inner[0]["path"]), folder / path)
    running = {name: chain for name, chain in chains.items() if not chain.static} or dict(list(chains.items())[:1])
    tables = {name: chain for name, chain in chains.items() if name not in running}
    folders = {chain.transformer_folder for chain in running.values()}
    looked_up = {chain.transformer_folder for chain in tables.values()} | {
        one.tokenizer_folder for one in weights.values()
    }
    if len(folders) != 1 or len(looked_up) > 1 or (tables and weights):
        raise CheckpointError(
            f"{folder / path}: routes {sorted(described.modules)} of {len(folders)} encoders and {len(looked_up)} tables; "
            "Poolhouse serves one encoder, with one table (StaticEmbedding or SparseStaticEmbedding) beside it or none."
        )
    if (
        len({(one.max_seq_length, one.do_lower_case, one.add_special_tokens, one.layers) for one in running.values()})
        > 1
    ):
        raise CheckpointError(
            f"{folder / path}: routes {sorted(running)} that read their texts differently are not served."
        )
    main = running.get(described.routes.main or "", next(iter(running.values())))
    routes = replace(
        described.routes, static=next(iter(weights.values()), None), looked_up=frozenset({*weights, *tables})
    )
    return replace(
        main, routes=routes, sides=running if len(running) > 1 else {}, looked_up=next(iter(tables.values()), None)
    )


def _is_router(module: Mapping[str, Any], folder: Path) -> bool:
    return class_of(module, folder / "modules.json", own=True) in ("Router", "Asym")


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Vectors under a name, and the steps that made them of the Transformer's.

    of_tokens: one for each token, as long as no Pooling came. through: the names that they had on the way.
    """

    of_tokens: bool = True
    before: tuple[Step, ...] = ()
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    heads: tuple[Step, ...] = ()
    layers: tuple[int, tuple[float, ...]] | None = None
    through: frozenset[str] = frozenset()

    def then(self, step: Step) -> _Vectors:
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

    def apply(self, step: Step, words: Mapping[str, Any], kind: str) -> None:
        """A module with one input and one output, whose config may name them."""
        name = words.get("module_input_name") or self.answer
        self.write(words.get("module_output_name") or name, self.read(name, kind).then(step), kind)

    def answered(self) -> _Vectors:
        """What the answer is made of, with a note where other vectors are made besides."""
        answer = self.vectors.get(self.answer) or self.vectors.get(_TOKENS) or _Vectors()
        left = sorted(set(self.vectors) - answer.through - {_TOKENS, _SENTENCE, "scores", "causal_logits"})
        if left:
            self.notes.append(
                f"modules.json: {', '.join(left)} (module_output_name) is no part of the embedding, and left out."
            )
        return answer


def _followed(folder: Path, modules: Sequence[Mapping[str, Any]], of_tokens: bool) -> SentenceTransformersFiles:
    """What a chain of modules says."""
    followed = _Followed(folder / "modules.json", of_tokens)
    transformer = TransformerModule(folder)
    splade: SpladePooling | None = None
    logit_score: tuple[int, int | None] | None = None
    scored: Mapping[str, Any] | None = None
    static = False
    for module in modules:
        place = folder / str(module.get("path") or "")
        kind = class_of(module, followed.path, own=own_code_is_known(module, place))
        words = {} if kind in _OF_ROOT else read_json(place / "config.json", needed=kind in _WITH_CONFIG)
        if kind not in _OF_ROOT:
            if kind not in _KINDS:
                raise CheckpointError(
                    f"{followed.path}: the module {module['type']} is not one that Poolhouse has. "
                    f"It has {', '.join((*_OF_ROOT, *_KINDS))} and Router."
                )
            followed.notes += check_keys(kind, words, place / "config.json")
        if kind in ("Transformer", "MLMTransformer", "CLIPModel"):
            transformer = read_transformer(place, kind, of_tokens, str(module["type"]).startswith(PACKAGES))
            followed.notes += transformer.notes
            own = _Vectors(of_tokens=transformer.output == _TOKENS, layers=transformer.layers)
            followed.write(transformer.output, own, kind)
            if not str(module["type"]).startswith(PACKAGES):
                followed.write(_SENTENCE, replace(own, of_tokens=False), kind)
        elif kind == "StaticEmbedding":
            transformer, static = TransformerModule(place), True
            followed.write(_SENTENCE, _Vectors(of_tokens=False, pooling=("MEAN",)), kind)
        elif kind == "WeightedLayerPooling":
            followed.notes += _weigh_layers(followed, words, place, transformer)
        elif kind == "SpladePooling":
            splade = _splade(words, place)
            followed.write(_SENTENCE, replace(followed.read(_TOKENS, kind), of_tokens=False), kind)
        elif kind == "Pooling":
            pooling, include_prompt = _pooling(words, place)
            pooled = replace(
                followed.read(_TOKENS, kind), of_tokens=False, pooling=pooling, include_prompt=include_prompt
            )
            followed.write(_SENTENCE, pooled, kind)
        elif kind == "Dense":
            followed.apply(_dense(words, place, str(module["type"])), words, kind)
        elif kind == "LayerNorm":
            followed.apply(_layer_norm(place), {}, kind)
        elif kind == "SparseAutoEncoder":
            followed.apply(sparse_autoencoder(words, place), {}, kind)
        elif kind == "Normalize":
            # What is not there is not normalised.
            if (words.get("module_input_name") or followed.answer) in followed.vectors:
                followed.apply(Unit(), words, kind)
        elif kind == "MultiVectorMask":
            scored = words
        elif kind == "LogitScore":
            logit_score = _logit_score(words, place)
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
_OF_ROOT = ("Transformer", "MLMTransformer", "CLIPModel", "StaticEmbedding")
_WITH_CONFIG = ("Pooling", "Dense", "LogitScore", "SpladePooling", "SparseAutoEncoder", "WeightedLayerPooling")
_KINDS = (
    *("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout", "WeightedLayerPooling", "LogitScore", "SpladePooling"),
    *("SparseAutoEncoder", "MultiVectorMask"),
)


def own_code_is_known(module: Mapping[str, Any], place: Path) -> bool:
    """Whether a Transformer of the repository's own code does what is done here: it chooses Jina's task adapters."""
    if str(module["type"]) != "custom_st.Transformer":
        return False
    config = read_json(place / "config.json", needed=False)
    return bool(config.get("lora_adaptations")) or (place / "adapters").is_dir()


def _check_task(transformer: TransformerModule, splade: SpladePooling | None, logit_score: object, path: Path) -> None:
    """Refuse logits that are taken for hidden states."""
    if transformer.task == "fill-mask" and splade is None:
        raise CheckpointError(f"{path}: transformer_task 'fill-mask' is served with a SpladePooling behind it alone.")
    if transformer.task in ("text-generation", "any-to-any") and logit_score is None:
        raise CheckpointError(
            f"{path}: transformer_task '{transformer.task}' is served with a LogitScore behind it alone."
        )


def _weigh_layers(
    followed: _Followed, words: Mapping[str, Any], place: Path, transformer: TransformerModule
) -> tuple[str, ...]:
    """Token vectors that are a weighted mean of those of several layers."""
    if not {**read_json(transformer.folder / "config.json"), **transformer.config_changes}.get("output_hidden_states"):
        note = (
            "WeightedLayerPooling has no effect, there or here: config.json does not say output_hidden_states, so it is "
            "given no layers."
        )
        return (note,)
    weights = module_tensors(place).get("layer_weights")
    start, layers = words.get("layer_start", 4), words.get("num_hidden_layers", 12)
    if weights is None or tuple(weights.shape) != (layers + 1 - start,):
        raise CheckpointError(
            f"{place}: layer_weights must be {layers + 1 - start} numbers, one from layer {start} on."
        )
    shares = (weights.float() / weights.float().sum()).tolist()
    followed.write(_TOKENS, _Vectors(layers=(start, tuple(shares))), "WeightedLayerPooling")
    return ()


def _pooling(config: Mapping[str, Any], place: Path) -> tuple[tuple[str, ...], bool]:
    words = config.get("pooling_mode")
    if words is None:
        words = [word for key, word in _LEGACY_POOLINGS.items() if config.get(key)] or ["mean"]
    elif isinstance(words, str):
        words = [words]
    unknown = [word for word in words if str(word) not in _POOLINGS]
    if unknown or not words:
        raise CheckpointError(
            f"{place / 'config.json'}: unknown pooling_mode {unknown or words}; known: {list(_POOLINGS)}."
        )
    return tuple(_POOLINGS[word] for word in words), bool(config.get("include_prompt", True))


def _splade(config: Mapping[str, Any], place: Path) -> SpladePooling:
    strategy, word = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    logarithms = {"relu": 1, "log1p_relu": 2}.get(word)
    if strategy not in ("max", "sum") or logarithms is None:
        raise CheckpointError(
            f"{place / 'config.json'}: unknown SPLADE pooling {strategy!r} of {word!r}; "
            "known: max and sum, of relu and log1p_relu."
        )
    return SpladePooling(strategy, logarithms)


def _logit_score(config: Mapping[str, Any], place: Path) -> tuple[int, int | None]:
    true, false = config.get("true_token_id"), config.get("false_token_id")
    if not isinstance(true, int) or not isinstance(false, int | None):
        raise CheckpointError(f"{place / 'config.json'}: true_token_id and false_token_id must be token ids.")
    return true, false


def _dense(config: Mapping[str, Any], place: Path, kind: str) -> Dense:
    if kind.startswith("pylate."):
        config = {"activation_function": "torch.nn.Identity", **config}
    tensors = module_tensors(place)
    weight, bias = (
        find_tensor(tensors, "weight", place),
        find_tensor(tensors, "bias", place, needed=bool(config.get("bias", True))),
    )
    shape = (config.get("out_features"), config.get("in_features"))
    if tuple(weight.shape) != shape:
        raise CheckpointError(f"{place}: the weight is {list(weight.shape)}, but config.json says {list(shape)}.")
    residual = None
    if config.get("use_residual"):
        residual = tensors.get("residual.weight", torch.empty(0)).float()
    return Dense(weight.float(), None if bias is None else bias.float(), _activation(config, place), residual)


def _activation(config: Mapping[str, Any], place: Path) -> Activation | None:
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return named_activation(path, f"{place / 'config.json'}: activation_function")


def _layer_norm(place: Path) -> Norm:
    tensors = module_tensors(place)
    weight, bias = find_tensor(tensors, "weight", place), find_tensor(tensors, "bias", place)
    assert bias is not None
    return Norm(weight.float(), bias.float())


def sparse_autoencoder(config: Mapping[str, Any], place: Path) -> SparseEncoder:
    """The encoder of a SparseAutoEncoder module; its decoder serves training only.

    Raises:
        CheckpointError: tensors that are missing or do not fit together.
    """
    tensors = module_tensors(place)
    # The decoder is the encoder transposed, and a file holds one of the two names.
    tensors.setdefault("encoder.weight", tensors.get("decoder.linear.weight", torch.empty(0)))
    names = ("encoder.weight", "latent_bias", "pre_bias")
    missing = [name for name in names if name not in tensors or not tensors[name].numel()]
    if missing:
        raise CheckpointError(f"{place}: a SparseAutoEncoder needs {missing}; there is {sorted(tensors)}.")
    weight, bias, shift = (tensors[name].float() for name in names)
    if weight.shape != (len(bias), len(shift)):
        raise CheckpointError(f"{place}: encoder.weight is {list(weight.shape)}, beside {len(bias)} and {len(shift)}.")
    count = config.get("k", 8)
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{place}: k must be at least 1, got {count!r}.")
    return SparseEncoder(weight, bias, shift, count, bool(config.get("normalize", False)))


def with_count(encode: SparseEncoder, count: int) -> SparseEncoder:
    """The same step with as many features as the whole model is said to give."""
    return replace(encode, count=count)
