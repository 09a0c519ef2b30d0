"""Reading the files of a sentence-transformers folder: modules.json and what it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from poolhouse.errors import CheckpointError
from poolhouse.json_files import read_any_json, read_json
from poolhouse.pooling.activations import named_activation
from poolhouse.pooling.module_tensors import find_tensor, module_tensors
from poolhouse.pooling.routes import Routes, split_routes
from poolhouse.pooling.sparse_autoencoder import Encode, sparse_autoencoder, with_count
from poolhouse.pooling.splade import SpladePooling
from poolhouse.pooling.steps import Activation, Dense, Norm, Step, Unit

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
_LENGTH_FILES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


@dataclass(frozen=True, slots=True)
class SentenceTransformersFiles:
    """What the files of a folder say.

    transformer_folder: where config.json and the weights lie.
    pooling: names of REDUCTIONS, concatenated; None where no Pooling module stands.
    heads: what comes after it, in order. normalize: whether a Normalize module is last.
    activation: dotted path of the function over a cross-encoder's logits.
    splade: how a SparseEncoder pools the logits of its masked language model; None for every other model.
    max_active_dims: how many features a SparseEncoder keeps; None keeps all. routes: which texts are looked up.
    logit_score: ids of the tokens whose logits a language model's score is made of, true and false (or None).
    of_tokens: whether `heads` are for the vector of every token (late interaction), and no pooling stands.
    scored: the config of a MultiVectorMask, which says what tokens late interaction leaves out; None without one.
    matryoshka: lengths to which vectors may be cut; () where none are stated.
    """

    transformer_folder: Path
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    heads: tuple[Step, ...] = ()
    normalize: bool = False
    max_seq_length: int | None = None
    do_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    activation: str | None = None
    splade: SpladePooling | None = None
    max_active_dims: int | None = None
    routes: Routes = Routes()
    logit_score: tuple[int, int | None] | None = None
    of_tokens: bool = False
    scored: Mapping[str, Any] | None = None
    matryoshka: tuple[int, ...] = ()


def read_sentence_transformers(folder: Path) -> SentenceTransformersFiles | None:
    """The description in `folder`, or None where it has no modules.json.

    Raises:
        CheckpointError: a file that is corrupt, missing, or describes a module that Poolhouse does not have.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = read_any_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) and "type" in module for module in modules):
        raise CheckpointError(f"{path} is not a list of modules.")
    modules, routes = _without_router(modules, folder)
    transformer = folder
    pooling: tuple[str, ...] | None = None
    splade: SpladePooling | None = None
    include_prompt, normalize = True, False
    heads: list[Step] = []
    logit_score: tuple[int, int | None] | None = None
    scored: Mapping[str, Any] | None = None
    config = read_json(folder / "config_sentence_transformers.json", needed=False)
    of_tokens = is_late_interaction(config, modules)
    for module in modules:
        kind, place = str(module["type"]).rsplit(".", 1)[-1], folder / str(module.get("path") or "")
        if normalize and kind != "Dropout":
            heads.append(Unit())
            normalize = False
        if kind in ("Transformer", "MLMTransformer"):
            transformer = place
        elif kind == "SpladePooling":
            splade = _splade(read_json(place / "config.json"), place)
        elif kind == "Pooling":
            pooling, include_prompt = _pooling(read_json(place / "config.json"), place)
        elif kind == "Dense":
            heads.append(_dense(place, of_tokens, str(module["type"])))
        elif kind == "LayerNorm":
            heads.append(_layer_norm(place))
        elif kind == "SparseAutoEncoder":
            heads.append(sparse_autoencoder(read_json(place / "config.json"), place))
        elif kind == "Normalize":
            normalize = True
        elif kind == "MultiVectorMask":
            scored = read_json(place / "config.json", needed=False)
        elif kind == "LogitScore":
            logit_score = _logit_score(read_json(place / "config.json"), place)
        elif kind != "Dropout":
            raise CheckpointError(
                f"{path}: the module {module['type']} is not one that Poolhouse has. "
                "It has Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout, LogitScore, MLMTransformer, "
                "SpladePooling, SparseAutoEncoder, MultiVectorMask and Router."
            )
    length, lower = _length(transformer)
    most = config.get("max_active_dims")
    if most is not None:
        if type(most) is not int or most < 1:
            raise CheckpointError(f"{folder}: max_active_dims must be at least 1, got {most!r}.")
        heads = [with_count(head, most) if isinstance(head, Encode) else head for head in heads]
    return SentenceTransformersFiles(
        transformer_folder=transformer,
        pooling=pooling,
        include_prompt=include_prompt,
        heads=tuple(heads),
        normalize=normalize,
        max_seq_length=length,
        do_lower_case=lower,
        prompts={str(name): str(text) for name, text in (config.get("prompts") or {}).items()},
        default_prompt_name=config.get("default_prompt_name"),
        truncate_dim=config.get("truncate_dim"),
        activation=config.get("activation_fn"),
        splade=splade,
        max_active_dims=most,
        routes=routes,
        logit_score=logit_score,
        of_tokens=of_tokens,
        scored=scored,
        matryoshka=tuple(config.get("matryoshka_dims") or ()),
    )


def is_late_interaction(config: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these files are of a late-interaction model, as PyLate or sentence-transformers write them."""
    kinds = [str(module["type"]) for module in modules]
    if any(kind.rsplit(".", 1)[-1] == "MultiVectorMask" or kind.startswith("pylate.") for kind in kinds):
        return True
    return config.get("model_type") in ("ColBERT", "MultiVectorEncoder") or "query_prefix" in config


def _without_router(modules: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], Routes]:
    """The modules that run, those of a Router's route in its place, and what its other routes look up.

    Raises:
        CheckpointError: modules behind routes of which one is looked up.
    """
    for index, module in enumerate(modules):
        if str(module["type"]).rsplit(".", 1)[-1] in ("Router", "Asym"):
            path = Path(str(module.get("path") or ""))
            inner, routes = split_routes(folder / path)
            if routes.static is not None and len(modules) > 1:
                raise CheckpointError(f"{folder}: modules beside a Router with a SparseStaticEmbedding are not served.")
            inner = [{**one, "path": str(path / one["path"])} for one in inner]
            return [*modules[:index], *inner, *modules[index + 1 :]], routes
    return modules, Routes()


def _pooling(config: Mapping[str, Any], place: Path) -> tuple[tuple[str, ...], bool]:
    words = config.get("pooling_mode")
    if words is None:
        words = [word for key, word in _LEGACY_POOLINGS.items() if config.get(key)] or ["mean"]
    elif isinstance(words, str):
        words = [words]
    unknown = [word for word in words if word not in _POOLINGS]
    if unknown:
        raise CheckpointError(f"{place / 'config.json'}: unknown pooling {unknown}; known: {list(_POOLINGS)}.")
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
    if config.get("module_input_name", "causal_logits") != "causal_logits":
        raise CheckpointError(f"{place / 'config.json'}: a score of {config['module_input_name']} is not supported.")
    return true, false


def _dense(place: Path, of_tokens: bool, kind: str) -> Dense:
    config = read_json(place / "config.json")
    taken = "token_embeddings" if of_tokens else "sentence_embedding"
    if config.get("module_input_name", taken) != taken:
        raise CheckpointError(f"{place / 'config.json'}: a Dense over {config['module_input_name']} is not supported.")
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


def _length(folder: Path) -> tuple[int | None, bool]:
    """max_seq_length and do_lower_case from the first file that has them."""
    for kind in _LENGTH_FILES:
        config = read_json(folder / f"sentence_{kind}_config.json", needed=False)
        if config:
            length = config.get("max_seq_length")
            if length is not None and (not isinstance(length, int) or length < 1):
                raise CheckpointError(f"{folder}/sentence_{kind}_config.json: max_seq_length is {length!r}.")
            return length, bool(config.get("do_lower_case", False))
    return None, False
