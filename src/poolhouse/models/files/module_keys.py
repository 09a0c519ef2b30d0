"""Module keys: what each key of sentence-transformers' files does here, in one table, and the check against it.

A key of a new version of that library is not in the table, so a test fails until somebody decides about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from poolhouse.errors import CheckpointError, did_you_mean
from poolhouse.files import JsonObject

# READ: it changes our answer as it changes theirs. IGNORED: it changes no answer, there or here. A tuple holds the only
# values that are served; any other is refused by name.
READ: Literal["read"] = "read"
IGNORED: Literal["ignored"] = "ignored"
Use = Literal["read", "ignored"] | tuple[object, ...]

# The packages whose modules are known; a class of any other is code of the repository's own, whatever it is called.
PACKAGES = ("sentence_transformers.", "pylate.")

_NAMES: Mapping[str, Use] = {"module_input_name": READ, "module_output_name": READ}
_LOADING: Mapping[str, Use] = {
    "model_kwargs": READ,
    "processor_kwargs": READ,
    "config_kwargs": READ,
    # Their former names.
    "model_args": READ,
    "tokenizer_args": READ,
    "config_args": READ,
}

# By the file, or by the class of the module whose config it is. The former names of a key stand beside it.
KEYS: Mapping[str, Mapping[str, Use]] = {
    "modules.json": {"idx": IGNORED, "name": IGNORED, "path": READ, "type": READ, "kwargs": IGNORED},
    "config_sentence_transformers.json": {
        "model_type": READ,
        "__version__": IGNORED,
        "requirements": IGNORED,
        "prompts": READ,
        "default_prompt_name": READ,
        "similarity_fn_name": READ,
        "truncate_dim": READ,
        "matryoshka_dims": READ,
        "max_active_dims": READ,
        "activation_fn": READ,
        # The type of numbers is `dtype` here.
        "keep_in_fp32_modules": IGNORED,
        # Of late interaction, as PyLate writes it; other models do not read them, there or here.
        "query_prefix": READ,
        "document_prefix": READ,
        "query_length": READ,
        "document_length": READ,
        "query_expansion": READ,
        "do_query_expansion": READ,
        "attend_to_expansion_tokens": READ,
        "attend_to_mask_tokens": READ,
        "skiplist_words": READ,
    },
    "Transformer": {
        "max_seq_length": READ,
        "do_lower_case": READ,
        "transformer_task": READ,
        "modality_config": READ,
        "module_output_name": READ,
        "processing_kwargs": READ,
        "query_length": READ,
        "document_length": READ,
        "query_expansion": READ,
        # Nothing is padded here, and torch runs the model.
        "unpad_inputs": IGNORED,
        "backend": IGNORED,
        "tokenizer_name_or_path": (None,),
        **_LOADING,
    },
    "Pooling": {
        "pooling_mode": READ,
        "pooling_mode_cls_token": READ,
        "pooling_mode_max_tokens": READ,
        "pooling_mode_mean_tokens": READ,
        "pooling_mode_mean_sqrt_len_tokens": READ,
        "pooling_mode_weightedmean_tokens": READ,
        "pooling_mode_lasttoken": READ,
        "include_prompt": READ,
        # The tensors say it.
        "embedding_dimension": IGNORED,
        "word_embedding_dimension": IGNORED,
    },
    "Dense": {
        "in_features": READ,
        "out_features": READ,
        "bias": READ,
        "activation_function": READ,
        "use_residual": READ,
        **_NAMES,
    },
    "LayerNorm": {"dimension": IGNORED},
    "Normalize": _NAMES,
    "Dropout": {"dropout": IGNORED},
    "WeightedLayerPooling": {
        "layer_start": READ,
        "num_hidden_layers": READ,
        "embedding_dimension": IGNORED,
        "word_embedding_dimension": IGNORED,
    },
    "StaticEmbedding": {},
    "Router": {"types": READ, "structure": READ, "parameters": READ},
    "Router parameters": {"default_route": READ, "allow_empty_key": READ, "route_mappings": READ},
    "SpladePooling": {
        "pooling_strategy": READ,
        "activation_function": READ,
        "embedding_dimension": IGNORED,
        "word_embedding_dimension": IGNORED,
        "chunk_size": IGNORED,
    },
    "SparseAutoEncoder": {
        "k": READ,
        "normalize": READ,
        "input_dim": IGNORED,
        "hidden_dim": IGNORED,
        # Of training.
        "k_aux": IGNORED,
        "dead_threshold": IGNORED,
    },
    "SparseStaticEmbedding": {"path": READ, "frozen": IGNORED},
    "LogitScore": {"true_token_id": READ, "false_token_id": READ, "module_input_name": ("causal_logits",)},
    "MultiVectorMask": {"skiplist_words": READ, "skiplist_tasks": READ, "keep_only_token_ids": READ},
    # What is handed to the tokenizer, the model and the config of the module Transformer.
    "processing_kwargs": {
        "text": READ,
        "common": READ,
        "chat_template": READ,
        "audio": IGNORED,
        "image": IGNORED,
        "video": IGNORED,
    },
    "processing_kwargs text": {
        "add_special_tokens": READ,
        "max_length": READ,
        "truncation": (None, True, "longest_first"),
        # Nothing is padded, and what a tokenizer returns beside the ids is not used.
        "padding": IGNORED,
        "padding_side": IGNORED,
        "pad_to_multiple_of": IGNORED,
        "stride": IGNORED,
        "verbose": IGNORED,
        "logits_to_keep": IGNORED,
        "return_tensors": IGNORED,
        "return_length": IGNORED,
        "return_special_tokens_mask": IGNORED,
        "return_mm_token_type_ids": IGNORED,
        "return_text_replacement_offsets": IGNORED,
        "return_token_type_ids": (None, True),
        "return_attention_mask": (None, True),
        "return_overflowing_tokens": (None, False),
        "return_offsets_mapping": (None, False),
        "is_split_into_words": (None, False),
        "split_special_tokens": (None, False),
        "sanitize_control_tokens": (None, False),
        "text_pair": (None,),
        "text_target": (None,),
        "text_pair_target": (None,),
    },
    "model_kwargs": {
        # The type of numbers, the device and the attention are options here.
        "torch_dtype": IGNORED,
        "dtype": IGNORED,
        "attn_implementation": IGNORED,
        "device_map": IGNORED,
        "low_cpu_mem_usage": IGNORED,
        "use_safetensors": IGNORED,
        "add_pooling_layer": IGNORED,
        "trust_remote_code": IGNORED,
    },
    "processor_kwargs": {
        "model_max_length": READ,
        "padding_side": IGNORED,
        "use_fast": IGNORED,
        "clean_up_tokenization_spaces": IGNORED,
        "trust_remote_code": IGNORED,
    },
}

# Of what kind the value of a key is, wherever it stands; null is a key left out.
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("path", "type", "model_type", "default_prompt_name", "similarity_fn_name", "activation_fn"), str),
    **dict.fromkeys(("transformer_task", "module_input_name", "module_output_name", "default_route"), str),
    **dict.fromkeys(("pooling_strategy", "activation_function", "query_prefix", "document_prefix"), str),
    **dict.fromkeys(("prompts", "modality_config", "processing_kwargs", "query_expansion", *_LOADING), dict),
    **dict.fromkeys(("types", "structure", "parameters", "route_mappings", "text", "common", "chat_template"), dict),
    **dict.fromkeys(("truncate_dim", "max_active_dims", "max_seq_length", "query_length", "document_length"), int),
    **dict.fromkeys(("in_features", "out_features", "layer_start", "num_hidden_layers", "k", "max_length"), int),
    **dict.fromkeys(("true_token_id", "false_token_id"), int),
    **dict.fromkeys(("do_lower_case", "include_prompt", "bias", "use_residual", "add_special_tokens"), bool),
    **dict.fromkeys(("allow_empty_key", "do_query_expansion", "attend_to_expansion_tokens"), bool),
    **dict.fromkeys(("attend_to_mask_tokens", "normalize"), bool),
    **dict.fromkeys(("matryoshka_dims", "skiplist_words", "keep_only_token_ids"), list),
    **dict.fromkeys(("pooling_mode", "skiplist_tasks"), (str, list)),
}

# Kinds whose unknown keys sentence-transformers drops with a warning; of all others they are errors there too.
_DROPPED = ("config_sentence_transformers.json", "modules.json", "Dense", "Normalize")


def check_keys(kind: str, config: JsonObject, path: Path) -> tuple[str, ...]:
    """A sentence about the keys of `config` that are left out, if there are any. path: where they stand.

    Raises:
        CheckpointError: a key, or a value of one, that Poolhouse does not serve.
    """
    known = KEYS[kind]
    unknown = [key for key in config if key not in known]
    for key, value in config.items():
        use = known.get(key, IGNORED)
        kind_of_value = _TYPES.get(key, object)
        right = isinstance(value, kind_of_value) and (kind_of_value is not int or not isinstance(value, bool))
        if use == READ and value is not None and not right:
            raise CheckpointError(f"{path}: {key} must be {_name_of(kind_of_value)}, got {value!r}.")
        if isinstance(use, tuple) and value not in use:
            served = " or ".join(repr(one) for one in use)
            raise CheckpointError(f"{path}: {key} {value!r} is not served; {served} is.")
    if not unknown:
        return ()
    if kind in _DROPPED:
        return (f"{path.name}: {', '.join(unknown)}: not known, and left out as sentence-transformers does.",)
    raise CheckpointError(
        f"{path}: {unknown[0]} is not a key that Poolhouse serves.{did_you_mean(unknown[0], known)} It serves "
        f"{list(known)}."
    )


def _name_of(kind: type | tuple[type, ...]) -> str:
    names = {str: "a text", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}
    return " or ".join(names[one] for one in (kind if isinstance(kind, tuple) else (kind,)))


def class_of(module: JsonObject, path: Path, own: bool = False) -> str:
    """The name of a module's class. own: whether it may be of the repository's own code.

    Raises:
        CheckpointError: a class of a package whose modules are not known, whatever it is called.
    """
    kind = str(module["type"])
    if not own and not kind.startswith(PACKAGES):
        raise CheckpointError(
            f"{path}: the module {kind} is code of the repository's own, or of another package, which is not run here. "
            f"Known are the modules of {' and '.join(package.rstrip('.') for package in PACKAGES)}."
        )
    return kind.rsplit(".", 1)[-1]
