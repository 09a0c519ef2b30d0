"""Transformer module: what sentence-transformers' files say that it reads of a text, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject
from poolhouse.models.files.module_keys import check_keys
from poolhouse.models.files.module_steps import LayerMean

_FILES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_FORMER_NAMES = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
# Task -> what the model's answer is called, and what the module calls it.
_OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "fill-mask": ("logits", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "text-generation": ("logits", "causal_logits"),
    "any-to-any": ("logits", "causal_logits"),
}
# Models that read pictures, whose prompts are written by their kinds (poolhouse.models.vision.kinds).
_WRITTEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "embedding_gemma2", "llama_nemotron_vl")
# Models with a half for texts and one for pictures, each of which gives one vector of its input.
_DUAL_ENCODERS = ("clip", "siglip", "siglip2")
# Changes to config.json that change no answer.
_NO_CHANGES = ("trust_remote_code", "use_cache", "attn_implementation", "torch_dtype", "dtype", "revision")


@dataclass(frozen=True, slots=True)
class TransformerModule:
    """The module in a folder.

    output: the name of what it gives: `token_embeddings`, or `sentence_embedding` of a model that pools by itself.
    layers: see `SentenceTransformersFiles`.
    """

    folder: Folder
    task: str = "feature-extraction"
    output: str = "token_embeddings"
    layers: LayerMean | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    add_special_tokens: bool = True
    config_changes: JsonObject = field(default_factory=dict)


def read_transformer(folder: Folder, kind: str, late_interaction: bool, known: bool = True) -> TransformerModule:
    """What the first file says that is there.

    kind: the class of the module, of which some are former names. late_interaction: whether queries and documents have lengths of their
    own, which are read elsewhere. known: whether the class is sentence-transformers' own, so that its keys are known.

    Raises:
        CheckpointError: what Poolhouse does not serve.
    """
    names = [f"sentence_{name}_config.json" for name in _FILES]
    name = next((name for name in names if folder.json(name, needed=False)), names[0])
    path, config = folder.path / name, folder.json(name, needed=False)
    if known:
        check_keys("Transformer", config, path)
    config = {_FORMER_NAMES.get(key, key): value for key, value in config.items()}
    task = config.get("transformer_task") or ("fill-mask" if kind == "MLMTransformer" else "feature-extraction")
    if task not in _OUTPUTS:
        raise CheckpointError(f"{path}: transformer_task {task!r} is not served; {list(_OUTPUTS)} are.")
    if not late_interaction:
        for name in ("query_length", "document_length", "query_expansion"):
            if config.get(name) is not None:
                raise CheckpointError(f"{path}: {name} is served of late-interaction models alone.")
    loading = {name: config.get(name) or {} for name in _FORMER_NAMES.values()}
    if known:
        check_keys("model_kwargs", loading["model_kwargs"], path)
        check_keys("processor_kwargs", loading["processor_kwargs"], path)
    output, layers = _output(config, task, kind, folder, path)
    text = _of_texts(config.get("processing_kwargs") or {}, path)
    length = text.get("max_length")
    if length is None:
        length = loading["processor_kwargs"].get("model_max_length", config.get("max_seq_length"))
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(f"{path}: max_seq_length is {length!r}.")
    return TransformerModule(
        folder=folder,
        task=task,
        output=output,
        layers=layers,
        max_seq_length=length,
        do_lower_case=bool(config.get("do_lower_case", False)),
        add_special_tokens=text.get("add_special_tokens") is not False,
        config_changes={key: value for key, value in loading["config_kwargs"].items() if key not in _NO_CHANGES},
    )


def _of_texts(processing: JsonObject, path: Path) -> JsonObject:
    """What the tokenizer is called with; options for all kinds of inputs win over those for texts, as there."""
    check_keys("processing_kwargs", processing, path)
    options = {**(processing.get("text") or {}), **(processing.get("common") or {})}
    check_keys("processing_kwargs text", options, path)
    return options


def _output(config: JsonObject, task: str, kind: str, folder: Folder, path: Path) -> tuple[str, LayerMean | None]:
    """The name of what the module gives of a text, and the hidden state that it is, if not the last.

    Raises:
        CheckpointError: an output of the model that is not served.
    """
    theirs, name = _OUTPUTS[task]
    model_type = folder.json("config.json", needed=False).get("model_type")
    projects = kind == "CLIPModel" or model_type in _DUAL_ENCODERS
    if kind == "CLIPModel" and "modality_config" not in config:
        return "sentence_embedding", None
    modalities: JsonObject = config.get("modality_config") or {
        "text": {"method": "forward", "method_output_name": theirs}
    }
    for modality, params in modalities.items():
        if not isinstance(params, Mapping) or not {"method", "method_output_name"} <= set(params):
            raise CheckpointError(
                f"{path}: modality_config needs a method and a method_output_name for '{modality}', got {params!r}."
            )
    if task == "feature-extraction" and "message" in modalities and model_type not in _WRITTEN:
        raise CheckpointError(
            f"{path}: modality_config has the modality 'message': texts are to be rendered by a chat template before "
            "they are embedded, which is not served."
        )
    if "text" not in modalities and "message" not in modalities:
        raise CheckpointError(f"{path}: modality_config reads {list(modalities)}, and no texts.")
    params = modalities.get("text") or modalities["message"]
    method, output = params.get("method"), params.get("method_output_name")
    written = config.get("module_output_name") or name
    if projects and method == "get_text_features" and written == "sentence_embedding":
        seen = modalities.get("image", {}).get("method", "get_image_features")
        if seen != "get_image_features":
            raise CheckpointError(
                f"{path}: modality_config reads pictures by the method {seen!r}; 'get_image_features' is served."
            )
        return written, None
    inner = isinstance(output, list) and len(output) == 2 and output[0] == "hidden_states" and type(output[1]) is int
    if inner and (method, task, written) == ("forward", "feature-extraction", name):
        return written, LayerMean(output[1])
    if isinstance(output, list) and len(output) == 1:
        output = output[0]
    if (method, output, written) != ("forward", theirs, name):
        raise CheckpointError(
            f"{path}: modality_config takes {output!r} of the method {method!r} as {written!r}, which is not served for "
            f"{task}; {theirs!r} of 'forward' as {name!r} is."
        )
    return written, None
