"""GLiClass: classifiers whose labels come with each request, read in one pass with the text.

Source: Stepanov et al. 2025 (arXiv 2508.07662), and the names and defaults of its authors' gliclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject
from poolhouse.inputs.label_prompts import LabelPrompts
from poolhouse.layers.feed_forward import ACTIVATIONS
from poolhouse.models.heads.heads import activation_of
from poolhouse.models.heads.labelled.files import HeadTensors, LabelledFiles
from poolhouse.pooling.label_scores import Dot, Hopfield, OneEach, Projector, TextAndLabels, WeightedDot
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.steps import Activation, Dense, Step
from poolhouse.tasks import Task

# What is served of each key, the first where a file does not have it.
_SERVED: Mapping[str, tuple[object, ...]] = {
    "architecture_type": ("uni-encoder",),
    "scorer_type": ("simple", "weighted-dot", "mlp", "hopfield"),
    "pooling_strategy": ("first", "avg", "max", "last"),
    "class_token_pooling": ("first", "average"),
    "encoder_layer_id": (-1,),
    **dict.fromkeys(("use_lstm", "squeeze_layers", "use_segment_embeddings", "use_calibrator", "multimodal"), (False,)),
}
# Whether a label is the mean of all its tokens.
_WHOLE = {"first": False, "average": True}
_REDUCTIONS = {"first": "CLS", "avg": "MEAN", "max": "MAX", "last": "LAST"}
# Decoders that gliclass makes look both ways where llm2vec is installed, and else does not.
_EITHER_WAY = ("llama", "mistral", "gemma", "qwen2")
_OWN = r"model\.(logit_scale|(text|classes)_projector\..+|scorer\..+)"
_RELU = Activation("relu", torch.relu)


def read_gliclass(folder: Folder) -> LabelledFiles | None:
    """What config.json says of GLiClass; None for all other models.

    Raises:
        CheckpointError: a key that is not served, naming it and what is.
    """
    config = folder.json("config.json", needed=False)
    if config.get("model_type") != "GLiClass":
        return None
    config = {**{key: values[0] for key, values in _SERVED.items()}, **config}
    for key, values in _SERVED.items():
        if config[key] not in values:
            shown = ", ".join(map(repr, values))
            raise CheckpointError(f"{folder}: GLiClass with {key}={config[key]!r} is not served; {shown} is.")
    encoder = config.get("encoder_config")
    if not isinstance(encoder, dict):
        raise CheckpointError(f"{folder}: config.json has no encoder_config, which says what the encoder is.")
    named = config.get("architectures") or ["GLiClassModel"]
    encoder = {"model_type": "deberta-v2", **encoder, "architectures": named}
    if encoder["model_type"] in _EITHER_WAY:
        raise CheckpointError(
            f"{folder}: GLiClass over {encoder['model_type']} is not served: its files do not say whether tokens see what "
            "is behind them."
        )
    alone = bool(config.get("extract_text_features"))
    if alone and config["pooling_strategy"] in ("max", "last"):
        raise CheckpointError(
            f"{folder}: GLiClass with extract_text_features and pooling_strategy={config['pooling_strategy']!r} is not "
            "served; 'first' and 'avg' are."
        )
    return LabelledFiles(
        name=f"GLiClass, {config['scorer_type']}",
        encoder=encoder,
        reader=_reader(config, alone),
        head=partial(_pipelines, config),
        own=_OWN,
    )


def _reader(config: JsonObject, alone: bool) -> LabelPrompts:
    """How texts and labels are written. The marks are added behind the encoder's vocabulary, where no key says otherwise."""
    words = config.get("vocab_size") or config["encoder_config"].get("vocab_size", 0)
    label, separator = (config.get(f"{name}_token_index", -1) for name in ("class", "text"))
    return LabelPrompts(
        labels_first=bool(config.get("prompt_first", False)),
        whole=_WHOLE[config["class_token_pooling"]],
        mark=bool(config.get("embed_class_token", True)),
        text_alone=alone,
        label_id=words if label == -1 else label,
        separator_id=words + 1 if separator == -1 else separator,
    )


def _pipelines(config: JsonObject, tensors: Mapping[str, Tensor], width: int) -> dict[Task, Pipeline]:
    """`classify`: a logit for each label of the request. width: of the encoder's hidden states.

    Raises:
        CheckpointError: a tensor that is missing or of another shape.
    """
    name = str(config.get("projector_hidden_act", "gelu"))
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: projector_hidden_act {name!r} is not one of {sorted(ACTIVATIONS)}.")
    own, unit = HeadTensors(tensors, "GLiClass"), bool(config.get("normalize_features"))
    features = TextAndLabels(
        pooling=_REDUCTIONS[config["pooling_strategy"]],
        average=_WHOLE[config["class_token_pooling"]],
        unit=unit,
        over_all=config["pooling_strategy"] == "avg",
        text=_projector(own, "text", width, activation_of(name)),
        label=_projector(own, "classes", width, activation_of(name)),
    )
    # It is there in any case.
    scale = float(own.take("model.logit_scale", ()))
    scorer = _scorer(config["scorer_type"], own, width)
    own.check_all_read(_OWN)
    return {"classify": Pipeline((features, *scorer, OneEach(scale if unit else 1.0)), 0)}


def _projector(own: HeadTensors, side: str, width: int, activation: Activation | None) -> Projector:
    first = _dense(own, f"{side}_projector.linear_1", width, activation)
    second = _dense(own, f"{side}_projector.linear_2", len(first.weight))
    if len(second.weight) != width:
        raise CheckpointError(f"{side}_projector.linear_2 gives {len(second.weight)} features; there must be {width}.")
    return Projector(first, second)


def _scorer(kind: str, own: HeadTensors, width: int) -> tuple[Step, ...]:
    """From rows of two vectors of this width to a number each."""
    if kind == "simple":
        return (Dot(),)
    if kind == "weighted-dot":
        text, label = (_dense(own, f"scorer.proj_{side}", width) for side in ("text", "label"))
        up = _dense(own, "scorer.out_mlp.0", 3 * width, _RELU)
        return (WeightedDot(text, label), up, _dense(own, "scorer.out_mlp.3", len(up.weight)))
    steps: list[Step] = []
    if kind == "hopfield":
        query, key, value = (own.take(f"model.scorer.{name}_proj.weight", (width, width)) for name in "qkv")
        steps.append(Hopfield(query, key, value))
    first = _dense(own, "scorer.mlp.0", width if steps else 2 * width, _RELU)
    second = _dense(own, "scorer.mlp.2", len(first.weight), _RELU)
    return (*steps, first, second, _dense(own, "scorer.mlp.4", len(second.weight)))


def _dense(own: HeadTensors, name: str, width: int, activation: Activation | None = None) -> Dense:
    return Dense(*own.linear(f"model.{name}", width), activation)
