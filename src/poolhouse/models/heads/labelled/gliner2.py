"""GLiNER2: spans of words that fit labels, behind a schema of them; its files as the gliner2 library writes them.

Source: the library, release 2.1.0 (Zaratiana et al. 2025, "GLiNER2"). Of its tasks the entities are served.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.extraction import SchemaRules
from poolhouse.models.heads.labelled.files import HeadTensors, LabelledFiles
from poolhouse.models.heads.labelled.gliner import two_layers
from poolhouse.pooling.extraction import Among, Counted, SpanScores, TwoLayers, Vectors
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.tasks import Task


def read_gliner2(folder: Folder) -> LabelledFiles | None:
    """What a folder says whose config.json is of an extractor; None for any other.

    Raises:
        CheckpointError: an architecture or an option that is not served, naming it.
    """
    config = folder.json("config.json", needed=False)
    if config.get("model_type") != "extractor":
        return None
    where = folder.path / "config.json"
    if config.get("architecture") not in (None, "span"):
        raise CheckpointError(f"{where}: architecture={config['architecture']!r} is not served; 'span' is.")
    settings = {"max_width": config.get("max_width") or 8, **(config.get("span_head") or {})}
    served = {
        "span_mode": (settings.get("span_mode", "markerV0"), ("markerV0",)),
        "counting_layer": (config.get("counting_layer") or "count_lstm", ("count_lstm", "count_lstm_v2")),
        "token_pooling": (config.get("token_pooling", "first"), ("first", "mean", "max")),
    }
    for key, (value, possible) in served.items():
        if value not in possible:
            raise CheckpointError(f"{where}: {key}={value!r} is not served; {list(possible)} are.")
    encoder = folder.path / "encoder_config" / "config.json"
    if not encoder.is_file():
        raise CheckpointError(f"{folder} has no {encoder.relative_to(folder.path)}, the config of its encoder.")
    width = int(settings["max_width"])
    return LabelledFiles(
        name="GLiNER2, entities",
        encoder={**Folder.of(encoder.parent).json("config.json"), "architectures": ["GLiNER2"]},
        reader=SchemaRules(words(), int(config.get("max_len") or 2**20), width),
        head=_Head(str(served["token_pooling"][0]), width, served["counting_layer"][0] == "count_lstm_v2").read,
        own=r"(span_rep|count_pred|count_embed|classifier)\..+",
    )


@dataclass(frozen=True, slots=True)
class _Head:
    """How the head is read. among: whether labels see each other."""

    subtokens: str
    max_width: int
    among: bool

    def read(self, tensors: Mapping[str, Tensor], hidden_size: int) -> dict[Task, Pipeline]:
        """The pipeline of `extract`.

        Raises:
            CheckpointError: tensors that are missing, left over, or do not fit.
        """
        own, spans, width = HeadTensors(tensors, "GLiNER2"), "span_rep.span_rep_layer.", hidden_size
        starts, ends = (two_layers(own, f"{spans}project_{side}", width) for side in ("start", "end"))
        both = two_layers(own, f"{spans}out_project", 2 * width)
        vectors = Vectors(self.subtokens)
        step = SpanScores(vectors, starts, ends, both, _counted(own, width, self.among), self.max_width)
        # The classifier is of tasks that are not served.
        own.check_all_read(r"(span_rep|count_pred|count_embed)\..+")
        return {"extract": Pipeline((step,), 4)}


def _counted(own: HeadTensors, width: int, among: bool) -> Counted:
    """What makes vectors of labels where the model counts any. The GRU takes one step, from each label's own vector."""
    gru = "count_embed.gru."
    first, again = (own.take(f"{gru}{name}_l0", (3 * width, width)) for name in ("weight_ih", "weight_hh"))
    bias, state_bias = (own.take(f"{gru}{name}_l0", (3 * width,)) for name in ("bias_ih", "bias_hh"))
    places = own.take("count_embed.pos_embedding.weight", (None, width))
    return Counted(
        counts=_layers(own, "count_pred", width),
        step=first @ places[0] + bias,
        state=again,
        state_bias=state_bias,
        labels=_among(own, width) if among else _layers(own, "count_embed.projector", 2 * width),
    )


def _among(own: HeadTensors, width: int) -> Among:
    """A Transformer of four heads and two layers over the labels of a prompt."""
    name = "count_embed.transformer."
    into, into_bias = own.linear(f"{name}in_projector", width)
    narrow = len(into)
    layer = nn.TransformerEncoderLayer(narrow, 4, 2 * narrow, batch_first=True, device="meta")
    transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to_empty(device="cpu")
    transformer.eval().requires_grad_(False)
    for key, parameter in transformer.named_parameters():
        parameter.copy_(own.take(f"{name}transformer.{key}", tuple(parameter.shape)))
    takes = (narrow + width, width, width)
    out = tuple(own.linear(f"{name}out_projector.{2 * number}", taken) for number, taken in enumerate(takes))
    return Among(into, into_bias, transformer, out)


@cache
def words() -> re.Pattern[str]:
    """What a word is: an address of a page, a mail address, a name with @; else as in GLiNER, with combining marks and joiners.

    Made when the first model is loaded, since Python's patterns know no marks.
    """
    marks = (chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    letter = rf"[\w\u200c\u200d{''.join(marks)}]"
    kinds = (
        r"https?://\S+|www\.\S+",
        r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}",
        r"@[a-z0-9_]+",
        rf"{letter}+(?:[-_]{letter}+)*",
        r"\S",
    )
    return re.compile("|".join(kinds), re.IGNORECASE)


def _layers(own: HeadTensors, name: str, width: int) -> TwoLayers:
    """Two linear layers called 0 and 2."""
    first, first_bias = own.linear(f"{name}.0", width)
    return TwoLayers(first, first_bias, *own.linear(f"{name}.2", len(first)))
