"""GLiNER: spans of words that fit labels, which stand before the text; its files as the gliner library writes them.

Source: the library, release 0.2.29 (Zaratiana et al. 2024, "GLiNER: Generalist Model for Named Entity Recognition").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.extraction import GlinerRules
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.labelled.files import HeadTensors, LabelledFiles
from poolhouse.pooling.extraction import SpanScores, TokenScores, TwoLayers, Vectors
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.steps import Step
from poolhouse.tasks import Task

_FILE = "gliner_config.json"
# Runs of letters and digits, which "-" and "_" join; any other character that is not white space.
WORDS = re.compile(r"\w+(?:[-_]\w+)*|\S")
_SPANS, _TOKENS = "markerV0", "token_level"
_MODEL_TYPES = ("gliner", "gliner_uni_encoder_span", "gliner_uni_encoder_token")
# Keys that change numbers, and what is served of each: where a key is absent, or as good as absent.
_NOT_SERVED = {
    "labels_encoder": "labels that an encoder of their own reads (bi-encoder)",
    "labels_decoder": "labels that a decoder writes",
    "decoder_config": "a text that a decoder reads (streaming)",
    "relations_layer": "relations",
    "triples_layer": "relations of three",
    "post_fusion_schema": "attention between labels and words",
    "fuse_layers": "a mean of layers",
    "span_encoder_config": "an encoder before the spans",
    "represent_spans": "vectors of spans beside words that begin and end",
    "precomputed_prompts_mode": "labels that the checkpoint holds",
}


def read_gliner(folder: Folder) -> LabelledFiles | None:
    """What a folder with a gliner_config.json says; None for one without.

    Raises:
        CheckpointError: a kind of GLiNER, or an option, that is not served, naming it.
    """
    if not folder.has(_FILE):
        return None
    config, where = folder.json(_FILE), folder.path / _FILE
    for key, what in _NOT_SERVED.items():
        if config.get(key):
            raise CheckpointError(f"{where}: {key}={config[key]!r} is not served: {what}.")
    _check(where, config, "model_type", _MODEL_TYPES, "gliner")
    mode = _check(where, config, "span_mode", (_SPANS, _TOKENS), _SPANS)
    subtokens = _check(where, config, "subtoken_pooling", ("first", "last", "mean", "max"), "first")
    _check(where, config, "words_splitter_type", ("whitespace",), "whitespace")
    encoder = config.get("encoder_config")
    if not isinstance(encoder, dict):
        raise CheckpointError(
            f"{where} holds no encoder_config, only the name of its encoder ({config.get('model_name')!r}); save the "
            "model again by a gliner of 2025 or later."
        )
    width = int(config.get("max_width", 12))
    index = config.get("class_token_index", -1)
    return LabelledFiles(
        name=f"GLiNER, {'token by token' if mode == _TOKENS else 'span by span'}",
        encoder={"model_type": "deberta-v2", **encoder, "architectures": ["GLiNER"]},
        reader=GlinerRules(
            words=WORDS,
            label_token=str(config.get("ent_token", "<<ENT>>")),
            end_token=str(config.get("sep_token", "<<SEP>>")),
            label_id=None if index == -1 else int(index),
            at_name=config.get("embed_ent_token", True) is False,
            max_words=int(config.get("max_len", 384)),
            widest=None if mode == _TOKENS else width,
        ),
        head=_Head(mode == _TOKENS, subtokens, width, config.get("num_rnn_layers")).read,
        own=r"(token_rep_layer\.projection|rnn|span_rep_layer|prompt_rep_layer|scorer)\..+",
    )


def _check(where: object, config: Config, key: str, served: tuple[str, ...], absent: str) -> str:
    value = config.get(key, absent)
    if value not in served:
        raise CheckpointError(f"{where}: {key}={value!r} is not served; {list(served)} are.")
    return str(value)


@dataclass(frozen=True, slots=True)
class _Head:
    """How the head is read. layers: of the LSTM over words; None where the config does not say."""

    by_token: bool
    subtokens: str
    max_width: int
    layers: int | None

    def read(self, tensors: Mapping[str, Tensor], hidden_size: int) -> dict[Task, Pipeline]:
        """The pipeline of `extract`.

        Raises:
            CheckpointError: tensors that are missing, left over, or do not fit.
        """
        own = HeadTensors(tensors, "GLiNER")
        projection = projection_bias = None
        if "token_rep_layer.projection.weight" in tensors:
            projection, projection_bias = own.linear("token_rep_layer.projection")
        width = hidden_size if projection is None else len(projection)
        vectors = Vectors(self.subtokens, projection, projection_bias, self._recurrent(own, width))
        if self.by_token:
            word, label = own.linear("scorer.proj_token", width), own.linear("scorer.proj_label", width)
            step: Step = TokenScores(vectors, *word, *label, two_layers(own, "scorer.out_mlp", 3 * width))
        else:
            spans = "span_rep_layer.span_rep_layer."
            starts, ends = (two_layers(own, f"{spans}project_{side}", width) for side in ("start", "end"))
            both, labels = two_layers(own, f"{spans}out_project", 2 * width), two_layers(own, "prompt_rep_layer", width)
            step = SpanScores(vectors, starts, ends, both, labels, self.max_width)
        own.check_all_read(r"(rnn|span_rep_layer|prompt_rep_layer|scorer)\..+")
        return {"extract": Pipeline((step,), 4)}

    def _recurrent(self, own: HeadTensors, width: int) -> nn.LSTM | None:
        """The LSTM over words, where the checkpoint has one."""
        names = [name for name in own.tensors if name.startswith("rnn.lstm.")]
        found = len({name.rsplit("_l", 1)[1].partition("_")[0] for name in names})
        if self.layers is not None and self.layers != found:
            raise CheckpointError(f"{_FILE} says num_rnn_layers={self.layers}, but the checkpoint has {found} layers.")
        if not found:
            return None
        # Its own first numbers would be drawn from torch's generator.
        recurrent = nn.LSTM(width, width // 2, found, bidirectional=True, device="meta").to_empty(device="cpu")
        recurrent.eval().requires_grad_(False)
        with torch.no_grad():
            for name, parameter in recurrent.named_parameters():
                parameter.copy_(own.take(f"rnn.lstm.{name}", tuple(parameter.shape)))
        return recurrent


def two_layers(own: HeadTensors, name: str, width: int) -> TwoLayers:
    """Two linear layers of a module `name`, called 0 and 3. width: of what they take."""
    first, first_bias = own.linear(f"{name}.0", width)
    second, second_bias = own.linear(f"{name}.3", len(first))
    return TwoLayers(first, first_bias, second, second_bias)
