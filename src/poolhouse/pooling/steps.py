"""Steps: the parts of a pipeline, each a callable `(rows, params) -> rows`, and their activations.

Sums and heads are computed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import REDUCTIONS, Rows, unit


@dataclass(frozen=True, slots=True, eq=False)
class Step(ABC):
    """One stage of a pipeline: a frozen dataclass of its settings, its tensors and the steps that it holds."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it does, for people: "dense 384 tanh"."""

    @abstractmethod
    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        """The rows that the next step gets."""

    def to(self, device: torch.device) -> Self:
        """The same step with its tensors on a device."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor | Step)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Reduce(Step):
    """One row per prompt. names: keys of REDUCTIONS, concatenated in this order."""

    names: tuple[str, ...]
    include_prompt: bool = True

    @property
    def description(self) -> str:
        names = " + ".join(name.lower() for name in self.names)
        return names if self.include_prompt else f"{names} without prompt"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        if self.include_prompt and rows.skip is not None:
            rows = Rows(rows.values, rows.segments, rows.ids)
        parts = [REDUCTIONS[name](rows) for name in self.names]
        return rows.one_each(parts[0] if len(parts) == 1 else torch.cat(parts, -1))


@dataclass(frozen=True, slots=True)
class Every(Step):
    """A row per token, in float32."""

    description = "all"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(rows.values.float())


@dataclass(frozen=True, slots=True)
class Kept(Step):
    """The rows of tokens that the model keeps: late interaction skips a document's punctuation."""

    description = "without skipped tokens"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows if rows.kept is None else rows.select(rows.kept)


@dataclass(frozen=True, slots=True)
class WithoutToken(Step):
    """All rows but those of one token."""

    token: int

    @property
    def description(self) -> str:
        return f"without token {self.token}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        kept = rows.ids != self.token
        # On a GPU this test would make the host wait for the device.
        return rows if not kept.is_cuda and bool(kept.all()) else rows.select(kept)


@dataclass(frozen=True, slots=True)
class OfPictures(Step):
    """Of prompts that show pictures the rows from each token `start` to its token `end`; of other prompts all rows."""

    start: int
    end: int
    description = "rows of pictures, where there are any"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        begins, ends = rows.ids == self.start, rows.ids == self.end
        if not begins.any():
            return rows
        owner, first = rows.segments.owner, rows.segments.starts_tensor
        steps = begins.long() - ends.long()
        open_ = steps.cumsum(0)
        open_ -= (open_ - steps)[first][owner]  # counted within each prompt
        shows = torch.zeros(len(rows.segments), dtype=torch.bool, device=owner.device)
        shows[owner[begins]] = True
        # The token `end` still belongs to its picture.
        return rows.select((open_ > 0) | ends | ~shows[owner])


@dataclass(frozen=True, slots=True)
class WithoutEnds(Step):
    """All rows but a first one of token `bos` and a last one of token `eos`; None keeps that end."""

    bos: int | None
    eos: int | None

    @property
    def description(self) -> str:
        return "without BOS" + ("" if self.eos is None else " and EOS")

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        kept = torch.ones_like(rows.ids, dtype=torch.bool)
        for token, ends in ((self.bos, rows.segments.starts_tensor), (self.eos, rows.segments.last_tensor)):
            if token is not None:
                kept[ends] &= rows.ids[ends] != token
        return rows.select(kept)


@dataclass(frozen=True, slots=True)
class Activation:
    """A function of each number, and what it is called."""

    name: str
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Dense(Step):
    """activation(values @ weight.T + bias), plus the input where the module has a residual.

    activation: None applies none.
    residual: None for none; else the matrix the input passes first, or an empty tensor where it is added as it is.
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: Activation | None = None
    residual: Tensor | None = None

    @property
    def description(self) -> str:
        return f"dense {self.weight.shape[0]}" + ("" if self.activation is None else f" {self.activation.name}")

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        out = F.linear(rows.values, self.weight, self.bias)
        if self.activation is not None:
            out = self.activation.function(out)
        if self.residual is not None:
            out = out + (F.linear(rows.values, self.residual) if self.residual.numel() else rows.values)
        return rows.with_values(out)


class Change(Protocol):
    """The change `up @ down` of a weight; `layers.adapted.LowRank` is one."""

    @property
    def up(self) -> Tensor: ...

    @property
    def down(self) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedDense(Dense):
    """A dense layer with another weight for the rows of adapters.

    changes: of the weight, by the name of the adapter; adapters that are added later appear in it.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        out = F.linear(rows.values, self.weight, self.bias)
        for name, start, end in rows.segments.adapter_rows:
            change = self.changes.get(name)
            if change is not None:
                out[start:end].addmm_(F.linear(rows.values[start:end], change.down), change.up.T)
        return rows.with_values(out)


@dataclass(frozen=True, slots=True, eq=False)
class Norm(Step):
    """Layer normalisation of each row."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5
    description = "layer norm"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(F.layer_norm(rows.values, self.weight.shape, self.weight, self.bias, self.eps))


@dataclass(frozen=True, slots=True)
class Unit(Step):
    """Unit length, whatever the request wants: a Normalize module that is not the last module."""

    description = "unit length"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(F.normalize(rows.values, dim=-1))


@dataclass(frozen=True, slots=True)
class TanhInt8(Step):
    """Whole numbers from -127 to 127, as Perplexity's quantiser makes them; floats still, which have no unit length."""

    description = "tanh to int8"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values((rows.values.tanh() * 127).round())


@dataclass(frozen=True, slots=True)
class Truncate(Step):
    """The first `params.dimensions` features (Matryoshka)."""

    description = "truncate"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        if params.dimensions is None:
            return rows
        return rows.with_values(rows.values[:, : params.dimensions])


@dataclass(frozen=True, slots=True)
class Normalize(Step):
    """Unit length where the request asks for it; `default` where it says nothing."""

    default: bool

    @property
    def description(self) -> str:
        return "normalize" if self.default else "normalize on request"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        wanted = self.default if params.use_activation is None else params.use_activation
        if not wanted:
            return rows
        return rows.with_values(unit(rows.values))


@dataclass(frozen=True, slots=True)
class Probabilities(Step):
    """Logits to probabilities where the request asks for them; `default` where it says nothing.

    activation: over the labels of a row. mean, sigma: logits are calibrated by these in any case.
    """

    activation: Activation
    default: bool
    mean: float | None = None
    sigma: float | None = None

    @property
    def description(self) -> str:
        calibrated = "" if self.mean is None and self.sigma is None else "calibrate > "
        return calibrated + (self.activation.name if self.default else f"{self.activation.name} on request")

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        values = rows.values
        if self.mean is not None:
            values = values - self.mean
        if self.sigma is not None:
            values = values / self.sigma
        wanted = self.default if params.use_activation is None else params.use_activation
        return rows.with_values(self.activation.function(values) if wanted else values)


@dataclass(frozen=True, slots=True)
class StepTags(Step):
    """STEP pooling: some columns, then the rows of the token `step_tag_id`; the request may choose others.

    columns: the name of each column, a token id or a label. kept: the columns to keep, None for all.
    Source: process reward models (Wang et al. 2024, Math-Shepherd).
    """

    step_tag_id: int | None
    columns: tuple[int, ...]
    kept: tuple[int, ...] | None = None

    @property
    def description(self) -> str:
        kept = "" if self.kept is None else f"columns {list(self.kept)} > "
        return kept + ("all" if self.step_tag_id is None else f"rows of token {self.step_tag_id}")

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        kept = params.returned_token_ids or self.kept
        tag = self.step_tag_id if params.step_tag_id is None else params.step_tag_id
        if kept is not None:
            rows = rows.with_values(rows.values[:, [self.columns.index(column) for column in kept]])
        return rows if tag is None else rows.select(rows.ids == tag)

    def check(self, params: PoolingParams) -> None:
        """Raise InvalidRequest for an unknown column."""
        for column in params.returned_token_ids or ():
            if column not in self.columns:
                raise InvalidRequest(
                    f"returned_token_ids: {column} is not one of {list(self.columns)}.", "returned_token_ids", column
                )


@dataclass(frozen=True, slots=True)
class AtTokens(Step):
    """The rows of these tokens only, in their order (listwise rerankers)."""

    tokens: tuple[int, ...]

    @property
    def description(self) -> str:
        return f"rows of tokens {', '.join(map(str, self.tokens))}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.select(torch.isin(rows.ids, torch.tensor(self.tokens, device=rows.ids.device)))


_MODULES = (
    *(nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Softplus),
    *(nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.ReLU6, nn.SELU, nn.CELU, nn.Softsign, nn.Tanhshrink),
)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


RAW = Activation("raw", lambda logits: logits)
SIGMOID = Activation("sigmoid", torch.sigmoid)
SOFTMAX = Activation("softmax", _softmax)


def named_activation(path: str, source: str) -> Activation | None:
    """The activation of a dotted path such as "torch.nn.modules.activation.Tanh"; None for the identity.

    source: the file and key of the path, for messages.

    Raises:
        CheckpointError: code that is not torch's own, or a module without its default arguments.
    """
    if not path.startswith("torch.nn."):
        raise CheckpointError(
            f"{source} {path!r}: activations are restricted to torch.nn.modules for security reasons."
        )
    for kind in _MODULES:
        if path.rsplit(".", 1)[-1] == kind.__name__:
            return None if kind is nn.Identity else Activation(kind.__name__.lower(), kind())
    raise CheckpointError(f"{source} {path!r} is not one of {[kind.__name__ for kind in _MODULES]}.")


def probabilities(labels: int) -> Activation:
    """The default: sigmoid of a single label, softmax of several."""
    return SIGMOID if labels < 2 else SOFTMAX


def classifier_activation(config: Mapping[str, object], labels: int, from_files: str | None) -> Activation:
    """The activation of a classifier with so many labels.

    config: config.json, which may hold `problem_type` or sentence-transformers' older keys.
    from_files: `activation_fn` of config_sentence_transformers.json.

    Raises:
        CheckpointError: an activation outside torch.nn.
    """
    problem = config.get("problem_type")
    if problem == "regression":
        return RAW
    if problem == "single_label_classification":
        return probabilities(labels)
    if problem == "multi_label_classification":
        return SIGMOID
    stated = stated_activation(config, from_files)
    return probabilities(labels) if stated is None or stated in (SIGMOID, SOFTMAX) else stated


def stated_activation(config: Mapping[str, object], from_files: str | None) -> Activation | None:
    """The activation that the files name, even where vLLM would use another; None where they name none.

    Raises:
        CheckpointError: an activation outside torch.nn.
    """
    nested = config.get("sentence_transformers")
    stated = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    path = str(from_files or stated or config.get("sbert_ce_default_activation_function") or "")
    if not path:
        return None
    if path.startswith("torch.nn."):
        known = {"Sigmoid": SIGMOID, "Softmax": SOFTMAX}.get(path.rsplit(".", 1)[-1])
        if known is not None:
            return known
    return named_activation(path, "activation_fn") or RAW
