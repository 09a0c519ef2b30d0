"""Shapes of bodies, by dialect, as each dialect's own reference names their fields.

A shape is a type, a set of allowed values, `[shape]` for a list that is not empty, `{field: shape}` with exactly these
fields ("field?" may be absent), or a tuple of several shapes. The names are written out here, apart
from the code that makes them: a field that is renamed there fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Shape = Any

_NUMBERS = [float]
_PROBLEM = {"message": str, "type": str, "param": (str, None), "code": int}
_ERROR = {"object": {"error"}, **_PROBLEM, "error": _PROBLEM}
_USAGE_OF_VLLM = {
    "prompt_tokens": int,
    "total_tokens": int,
    "completion_tokens": {0},
    "prompt_tokens_details": None,
    "truncated?": int,
}
_PAIR_USAGE = {"prompt_tokens": int, "total_tokens": int}
_MULTIMODAL = dict.fromkeys(("text_tokens", "image_pixels", "video_pixels", "total_tokens"), int)
_META = {"api_version": {"version": str}, "billed_units": dict, "warnings?": [str]}


def _listed(item: Shape, usage: Shape, **head: Shape) -> Shape:
    return {**head, "object": {"list"}, "model": str, "data": [item], "usage": usage}


def _of_vllm(item: Shape) -> Shape:
    return _listed(item, _USAGE_OF_VLLM, id=str, created={"<time>"})


def _embedding(vector: Shape, name: str = "embedding") -> Shape:
    return {"object": {name}, "index": int, name: vector}


def _ranked(**more: Shape) -> Shape:
    return [{"index": int, "relevance_score": float, **more}]


def _info(kind: Shape) -> Shape:
    # What this server adds stands behind the question marks.
    return {
        **dict.fromkeys(("model_id", "model_dtype", "served_model_name", "version"), str),
        **dict.fromkeys(("model_sha", "sha", "docker_label", "max_batch_requests"), None),
        **dict.fromkeys(("max_concurrent_requests", "max_input_length", "max_batch_tokens"), int),
        **dict.fromkeys(("max_client_batch_size", "tokenization_workers"), int),
        "auto_truncate": bool,
        "model_type": kind,
        "tasks?": [str],
        "max_body_bytes?": int,
        "request_timeout_seconds?": float,
    }


_LABELS = {"id2label": dict, "label2id": dict}
_LABEL = {"score": float, "label": str}
_TOKEN = {"id": int, "text": str, "special": bool, "start": (int, None), "stop": (int, None)}
_TEI_USAGE = {**_PAIR_USAGE, "completion_tokens?": int, "prompt_tokens_details?": None}
_BEYOND_TEI = {"id?": str, "created?": {"<time>"}}
_SPARSE = [{"token_id": int, "token": str, "weight": float}]
_DOCUMENT = {"text": str, "multi_modal": None}
_INFINITY = {"model": str, "usage": _PAIR_USAGE, "id": str, "created": {"<time>"}}


def _pooled(data: Shape, **more: Shape) -> Shape:
    return _of_vllm({"index": int, "object": {"pooling"}, "data": data, **more})


_STATS = {"queue_fraction": float, "queue_absolute": int, "results_pending": int, "batch_size": int}

_MODEL = {
    "id": str,
    "object": {"model"},
    "created": {"<time>"},
    "owned_by": str,
    "root": str,
    "parent": (str, None),
    "max_model_len": int,
    "permission": list,
    "model_type?": {"embedding", "rerank", "classifier"},
    "tasks?": [str],
    "modalities?": [str],
    "prompts?": list,
    "state?": {"loaded"},
    **dict.fromkeys(("reason?", "expires?"), None),
    **dict.fromkeys(("weight_bytes?", "memory_bytes?"), int),
    "last_used?": {"<time>"},
    "labels?": list,
    "takes_labels?": bool,
    "sparse?": (str, None),
    "limits?": dict,
}
_COHERE_MODEL = {
    "name": str,
    "endpoints": [{"embed", "rerank", "classify"}],
    "finetuned": bool,
    "context_length": int,
    "tokenizer_url": None,
    "default_endpoints": list,
}
_DETAILS = {
    **dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), str),
    "families": [str],
}
_LISTED = {
    **dict.fromkeys(("name", "model", "digest"), str),
    "modified_at": {"<time>"},
    "size": int,
    "details": _DETAILS,
}
_TIMING = {f"{part}_ms": {"<time>"} for part in ("total", "queue", "tokenization", "inference")}


def _encoded(kind: str, number: type, **more: Shape) -> Shape:
    values = {"dtype": {kind}, "values": [number]}
    of_tokens = {"token_dims": int, "num_tokens": int, "dtype": {kind}, "values": [[number]]}
    entries = {"dims": (int, None), "dtype": {"float32"}, "indices": [int], "values": _NUMBERS}
    item = {"id?": str, "dense?": {"dims": int, **values}, "sparse?": entries, "multivector?": of_tokens, **more}
    return {"model": str, "items": [item], "timing": _TIMING, "usage": {"input_tokens": int}}


SHAPES: dict[str, dict[str, Shape]] = {
    "tei": {
        "vectors": [_NUMBERS],
        "matrices": [[_NUMBERS]],
        "numbers": _NUMBERS,
        "entries": [[{"index": int, "value": float}]],
        "ranks": [{"index": int, "score": float}],
        "ranks_with_text": [{"index": int, "score": float, "text": str}],
        "labels": [_LABEL],
        "label_lists": [[_LABEL]],
        "tokens": [[_TOKEN]],
        "texts": [str],
        "info_of_embedder": _info({"embedding": {"pooling": str}}),
        "info_of_reranker": _info({"reranker": _LABELS}),
        "info_of_classifier": _info({"classifier": _LABELS}),
        "openai": {**_listed(_embedding(_NUMBERS), _TEI_USAGE), **_BEYOND_TEI},
        "openai_base64": {**_listed(_embedding(str), _TEI_USAGE), **_BEYOND_TEI},
        "vertex": {"predictions": [[_NUMBERS]]},
        "error": {"error": str, "error_type": {"Validation", "Backend", "Empty", "Overloaded", "Unhealthy"}},
        "openai_error": {"message": str, "code": int, "type": {"Validation", "Backend", "Empty"}},
    },
    "vllm": {
        "embeddings": _of_vllm(_embedding(_NUMBERS)),
        "embeddings_base64": _of_vllm(_embedding(str)),
        "embeddings_cut": _of_vllm({**_embedding(_NUMBERS), "truncated": {True}, "original_tokens": int}),
        "octets": str,
        "pooling": _pooled(_NUMBERS),
        "pooling_matrix": _pooled([_NUMBERS]),
        "pooling_matrix_base64": _pooled(str, shape=[int]),
        "pooling_sparse": _pooled(_SPARSE),
        "pooling_of_several": _pooled({"embed": _NUMBERS, "token_embed": [_NUMBERS], "sparse": _SPARSE}),
        "classes": _of_vllm({"index": int, "label": str, "probs": _NUMBERS, "num_classes": int}),
        "scores": _of_vllm({"index": int, "object": {"score"}, "score": float}),
        "rerank": {
            "id": str,
            "model": str,
            "usage": _PAIR_USAGE,
            "results": _ranked(document=_DOCUMENT),
            "meta?": _META,
        },
        "rerank_of_pictures": {
            "id": str,
            "model": str,
            "usage": _PAIR_USAGE,
            "results": _ranked(document={"text": (str, None), "multi_modal": ([dict], None)}),
        },
        "rerank_for_weaviate_too": {
            "id": str,
            "model": str,
            "usage": _PAIR_USAGE,
            "results": _ranked(document=_DOCUMENT),
            "query": str,
            "scores": [{"document": str, "score": float}],
        },
        "model": _MODEL,
        "tokenize": {"count": int, "max_model_len": int, "tokens": [int], "token_strs": None},
        "tokenize_with_strings": {"count": int, "max_model_len": int, "tokens": [int], "token_strs": [str]},
        "detokenize": {"prompt": str},
        "models": {
            "object": {"list"},
            "data": [_MODEL],
        },
        "version": {"version": str},
        "load": {"server_load": int},
        "error": _ERROR,
    },
    "cohere_v1": {
        "embed_floats": {
            "id": str,
            "embeddings": [_NUMBERS],
            "texts": [str],
            "meta": _META,
            "response_type": {"embeddings_floats"},
        },
        "embed_by_type": {
            "id": str,
            "embeddings": {"float": [_NUMBERS], "ubinary": [[int]]},
            "texts": [str],
            "meta": _META,
            "response_type": {"embeddings_by_type"},
        },
        "rerank": {"id": str, "results": _ranked(), "meta": _META},
        "rerank_with_documents": {"id": str, "results": _ranked(document={"text": str, "title?": str}), "meta": _META},
        "models": {"models": [_COHERE_MODEL]},
        "model": _COHERE_MODEL,
        "error": {"message": str},
    },
    "cohere_v2": {
        "embed_pictures": {
            "id": str,
            "embeddings": {"float": [_NUMBERS]},
            "meta": {"api_version": {"version": str}, "billed_units": {"input_tokens": int, "image_tokens": int}},
            "response_type": {"embeddings_by_type"},
        },
        "embed_by_type": {
            "id": str,
            "embeddings": {
                "float?": [_NUMBERS],
                **{kind: [[int]] for kind in ("int8?", "uint8?", "binary?", "ubinary?")},
                "base64?": [str],
            },
            "texts": [str],
            "meta": _META,
            "response_type": {"embeddings_by_type"},
        },
        "rerank": {"id": str, "results": _ranked(), "meta": _META},
        "error": {"message": str},
    },
    "jina": {
        "embeddings": _listed(_embedding(_NUMBERS), _PAIR_USAGE),
        "embeddings_base64": _listed(_embedding(str), _PAIR_USAGE),
        "embeddings_by_kind": _listed(_embedding({"float": _NUMBERS, "ubinary": [int]}), _PAIR_USAGE),
        "multi_vector": _listed(_embedding([_NUMBERS], "embeddings"), _PAIR_USAGE),
        "rerank": {"model": str, "object": {"list"}, "usage": _PAIR_USAGE, "results": _ranked()},
        "rerank_with_documents": {
            "model": str,
            "object": {"list"},
            "usage": _PAIR_USAGE,
            "results": _ranked(document={"text": str}),
        },
        "rerank_of_pictures": {
            "model": str,
            "object": {"list"},
            "usage": _PAIR_USAGE,
            "results": _ranked(document={"text?": str, "image?": str}),
        },
        "error": {"detail": str},
    },
    "voyage": {
        "embeddings": _listed(_embedding(_NUMBERS), {"total_tokens": int}),
        "embeddings_base64": _listed(_embedding(str), {"total_tokens": int}),
        "multimodal": _listed(_embedding(_NUMBERS), _MULTIMODAL),
        "multimodal_base64": _listed(_embedding(str), _MULTIMODAL),
        "rerank": _listed(_ranked()[0], {"total_tokens": int}),
        "rerank_with_documents": _listed(_ranked(document=str)[0], {"total_tokens": int}),
        "error": {"detail": str},
    },
    "infinity": {
        "embeddings": {"object": {"list"}, "data": [_embedding(_NUMBERS)], **_INFINITY},
        "embeddings_base64": {"object": {"list"}, "data": [_embedding(str)], **_INFINITY},
        "rerank": {"object": {"rerank"}, "results": _ranked(document=None), **_INFINITY},
        "rerank_with_documents": {"object": {"rerank"}, "results": _ranked(document=str), **_INFINITY},
        "classify": {"object": {"classify"}, "data": [[_LABEL]], **_INFINITY},
        "models": {
            "object": {"list"},
            "data": [
                {
                    "id": str,
                    "stats": _STATS,
                    "object": {"model"},
                    "owned_by": {"infinity"},
                    "created": {"<time>"},
                    "backend": str,
                    "capabilities": [str],
                }
            ],
        },
        "health": {"unix": {"<time>"}},
        "error": {"error": {"message": str, "type": None, "param": (str, None), "code": int}},
    },
    "nvidia": {
        "ranking": {"rankings": [{"index": int, "logit": float}]},
        "embeddings": _of_vllm(_embedding(_NUMBERS)),
        "error": _ERROR,
    },
    "ollama": {
        "embed": {
            "model": str,
            "embeddings": [_NUMBERS],
            "total_duration": {"<time>"},
            "load_duration": int,
            "prompt_eval_count": int,
        },
        "embed_nothing": {
            "model": str,
            "embeddings": list,
            "total_duration": {"<time>"},
            "load_duration": int,
            "prompt_eval_count": {0},
        },
        "embeddings": {"embedding": _NUMBERS},
        "tags": {"models": [_LISTED]},
        "ps": {"models": [{**_LISTED, "expires_at": str, "size_vram": int, "context_length": int}]},
        "show": {
            **dict.fromkeys(("modelfile", "parameters", "template"), str),
            "details": _DETAILS,
            "model_info": {
                "general.architecture": {"poolhouse"},
                "poolhouse.context_length": int,
                "poolhouse.embedding_length?": int,
            },
            "capabilities": list,
            "modified_at": {"<time>"},
        },
        "version": {"version": str},
        "error": {"error": str},
    },
    "llama_cpp": {
        "embedding": [{"index": int, "embedding": [_NUMBERS]}],
        "rerank": {"model": str, "object": {"list"}, "usage": _PAIR_USAGE, "results": _ranked()},
        "ranks": [{"index": int, "score": float}],
        "ranks_with_text": [{"index": int, "score": float, "text": str}],
        "error": {"error": {"code": int, "message": str, "type": str}},
    },
    "azure": {
        "embeddings": _of_vllm(_embedding(_NUMBERS)),
        "embeddings_base64": _of_vllm(_embedding(str)),
        "models": {"object": {"list"}, "data": [_MODEL]},
        "model": _MODEL,
        "error": {"error": {"message": str, "type": str, "param": (str, None), "code": int}},
    },
    "weaviate": {
        "vector": {"text": str, "vector": _NUMBERS, "dim": int},
        "vectors": {"textVectors": [_NUMBERS], "imageVectors": [_NUMBERS]},
        "scores": {"query": str, "scores": [{"document": str, "score": float}]},
        "score": {"query": str, "property": str, "score": float},
        "meta": _MODEL,
        "error": {"error": str},
    },
    "sie": {
        "encode": _encoded("float32", float),
        "encode_cut": _encoded("float32", float, **{"truncated?": bool, "original_tokens?": int}),
        "encode_int8": _encoded("int8", int),
        "encode_binary": _encoded("binary", int),
        "score": {
            "model": str,
            "query_id": (str, None),
            "scores": [{"item_id": str, "score": float, "rank": int}],
            "usage": {"input_tokens": int},
        },
        "error": {"detail": {"code": str, "message": str}},
    },
}


def misfits(shape: Shape, value: Any, place: str = "body") -> Iterator[str]:
    """Where a value is not of a shape."""
    if isinstance(shape, dict):
        yield from _misfits_of_fields(shape, value, place)
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{place}: {value!r} is no list of something"
            return
        for index, item in enumerate(value):
            yield from misfits(shape[0], item, f"{place}[{index}]")
    elif isinstance(shape, tuple):
        if all(any(misfits(one, value)) for one in shape):
            yield f"{place}: {value!r} is none of {shape}"
    elif isinstance(shape, set):
        if value not in shape:
            yield f"{place}: {value!r} is none of {shape}"
    elif shape is None:
        if value is not None:
            yield f"{place}: {value!r} is not null"
    elif not _is(shape, value):
        yield f"{place}: {value!r} is no {shape.__name__}"


def _misfits_of_fields(shape: dict[str, Shape], value: Any, place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place}: {value!r} is no object"
        return
    known = {name.removesuffix("?") for name in shape}
    demanded = {name for name in shape if not name.endswith("?")}
    if not demanded <= set(value) <= known:
        yield f"{place}: lacks {sorted(demanded - set(value))}, has {sorted(set(value) - known)} beside"
    for name, inner in shape.items():
        field = name.removesuffix("?")
        if field in value:
            yield from misfits(inner, value[field], f"{place}.{field}")


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        # JSON writes some numbers without a point.
        return isinstance(value, float | int) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
