"""`poolhouse check`: what a model is, who serves it, and how far it is from published numbers and a reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poolhouse import kernels
from poolhouse.cli import own_code
from poolhouse.cli.options import Model, with_options
from poolhouse.data import passages, queries
from poolhouse.engine.request import Request
from poolhouse.errors import CheckpointError, InvalidRequest, PoolhouseError
from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.pictures import PictureReader
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.templates.score import SEAM
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings
from poolhouse.tasks import Task

if TYPE_CHECKING:
    from poolhouse.llm import LLM

# Below this cosine to the reference a model must not be trusted.
_LEAST_COSINE = 0.9999
# Relative to the largest logit.
_LARGEST_LOGIT_DIFFERENCE = 1e-3
# Published numbers were computed in half precision and rounded; both in the score's own unit and relative.
_RELATIVE, _ABSOLUTE = 0.01, 1e-3
_REFERENCE = "the reference, sentence-transformers"
_OWN_CODE = "the model's own code"
# Of int8 to float32: the lowest cosine of texts, and the largest difference of scores from 0 to 1. Of single tokens the
# mean is judged: some are further off, and what is made of them are sums over many.
_LEAST_INT8_COSINE, _LARGEST_INT8_DIFFERENCE = 0.99, 0.1
_FLOAT32 = "float32"


@with_options(Settings)
def check(
    model: Model = None,
    reference: Annotated[
        bool, typer.Option(help="Compare with published numbers, and sentence-transformers where it is installed.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    *,
    options: dict[str, object],
) -> None:
    """Print a model's facts and pipelines, compare it with the reference library, and say whether all is well.

    With --trust-remote-code, the code that the checkpoint brings for its model is the reference. It runs in a process of
    its own. Exits with status 0 only if the model loads, answers, and differs from no reference that there is.
    """
    if not as_json:
        console = Console(soft_wrap=True)
        _, report = _checked(model, reference, options, console.print)
        console.print(report.verdict)
    else:
        facts: dict[str, Any] = {}
        try:
            facts, report = _checked(model, reference, options, lambda _: None)
        except (PoolhouseError, OSError) as error:
            _print_json({"ok": False, "verdict": str(error), "error": str(error)})
            raise
        outcome = {"ok": report.ok, "verdict": report.verdict, "not_compared": report.not_compared}
        compared = [{"with": one.reference, "close": one.close, "words": one.summary} for one in report.comparisons]
        _print_json({**outcome, "comparisons": compared, **facts})
    if not report.ok:
        raise CheckpointError(report.verdict)


@dataclass(frozen=True, slots=True)
class _Report:
    """What a check found. not_compared: why something was not, where it was not."""

    comparisons: list[Compared]
    not_compared: str | None

    @property
    def ok(self) -> bool:
        return all(one.close for one in self.comparisons)

    @property
    def verdict(self) -> str:
        """In one line, whether all is well."""
        far = [one for one in self.comparisons if not one.close]
        if far:
            return " ".join(f"The answers differ from {one.reference}. {one.summary}" for one in far)
        if not self.comparisons:
            return f"OK: the model loads and answers. It was compared with nothing: {self.not_compared}"
        return f"OK: the model loads, and answers as {' and '.join(one.reference for one in self.comparisons)}."


def _checked(
    model: str | None, reference: bool, options: dict[str, object], show: Callable[[str | Table], None]
) -> tuple[dict[str, Any], _Report]:
    """The facts of a model and what comparing it found; `show` gets them as they come.

    Raises:
        PoolhouseError: it does not load, or does not answer.
    """
    from poolhouse.llm import LLM

    options.setdefault("overflow", "truncate")
    # What is looked at must be in this process.
    options["replicas"] = 1
    comparisons: list[Compared] = []

    def found(compared: Compared) -> None:
        comparisons.append(compared)
        show(compared.summary)

    with LLM(model, **options) as llm:
        facts = _facts(llm)
        show(_table(facts))
        _answer_something(llm)
        if not reference:
            return facts, _Report(comparisons, "--no-reference was asked for.")
        if llm.settings.quantization == "int8":
            # What remains to be compared is float32 and the reference: without the option.
            with LLM(model, **{**options, "quantization": None}) as plain:
                compared = _compare_int8(llm, plain)
            why: str | None = compared if isinstance(compared, str) else None
            if isinstance(compared, Compared):
                found(compared)
            return facts, _Report(comparisons, why)
        values = golden_values(llm.settings.model, llm.model.facts.path)
        if values:
            found(compare(values, measure(llm, values)))
        if llm.settings.trust_remote_code and _has_own_code(llm):
            distance = own_code.compare(llm)
            why = None
            found(Compared(distance.summary, distance.lowest >= _LEAST_COSINE, _OWN_CODE))
        elif find_spec("sentence_transformers") is None:
            why = "sentence-transformers is not installed."
        else:
            compared = _compare(llm)
            why = compared if isinstance(compared, str) else None
            if isinstance(compared, Compared):
                found(compared)
    if why is not None:
        show(f"No reference: {why}")
    return facts, _Report(comparisons, why)


def _has_own_code(llm: LLM) -> bool:
    """Whether a model of vectors brings code that can be compared with."""
    plan = llm.model.plan
    return "embed" in llm.engine.facts.tasks and any(map(own_code.brings_code, (plan.folder, plan.weights)))


def _answer_something(llm: LLM) -> None:
    """Raise EngineError where an answer is not finite."""
    prompts: list[Any] = [passages()[0]]
    if llm.model.facts.pictures is not None and find_spec("PIL") is not None:
        from PIL.Image import new

        prompts.append({"content": [{"type": "image_pil", "image_pil": new("RGB", (448, 640), "white")}]})
    for task in llm.engine.facts.tasks:
        for prompt in prompts:
            # Some tasks take only prompts of their own form.
            with contextlib.suppress(InvalidRequest):
                llm.encode(prompt, pooling_task=task, use_tqdm=False)


def _print_json(content: dict[str, object]) -> None:
    print(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())


def _facts(llm: LLM) -> dict[str, Any]:
    """What a model is, by words that the table and JSON share."""
    facts, sizes = llm.model.facts, llm.model.facts.matryoshka
    told: dict[str, Any] = {
        "model": facts.name,
        "architecture": facts.architecture,
        "served_by": facts.served_by,
        "parameters": facts.sizes.parameters,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "device": str(facts.device),
        "compiled_kernels": kernels.level() or "none",
        "max_tokens": facts.max_tokens,
    }
    if "embed" in llm.engine.facts.tasks:
        any_size = f"any up to {sizes.width}"
        told["width"] = facts.width
        told["matryoshka"] = (list(sizes.dimensions) or any_size) if sizes.supported else None
    if llm.engine.facts.labels or llm.engine.facts.label_names:
        told["labels"] = list(llm.engine.facts.label_names.values()) or llm.engine.facts.labels
    told["prompts"] = list(facts.prompts)
    if facts.longest_shared:
        told["prefix_sharing"] = _sharing(llm)
    template = llm.engine.facts.score_template
    if template is not None:
        told["score_template"] = template.name
        told["a_pair_becomes"] = template.render("QUERY", "DOCUMENT").replace(SEAM, "")
    if facts.pictures is not None:
        told |= _written(facts.pictures)
    told["decision"] = llm.model.plan.described()
    told["tasks"] = {task: pipeline.description for task, pipeline in llm.model.pipelines.items()}
    told["notes"] = list(facts.notes)
    return told


def _sharing(llm: LLM) -> str:
    """Of which prompts a beginning runs once for all that begin so."""
    longest = llm.model.facts.longest_shared
    if not llm.settings.prefix_sharing:
        return "switched off"
    return "all prompts" if longest >= llm.model.facts.max_tokens else f"prompts of up to {longest} tokens"


def _written(reader: PictureReader) -> dict[str, str]:
    """What a model that reads pictures makes of them."""
    query, picture = Content(("QUERY",)), Content((Image(None, "picture"),))
    if reader.pair is not None:
        return {"a_pair_becomes": reader.pair(query, picture, None).whole}
    written = {"a_query_becomes": reader.prompts(query, "query", None).whole}
    return written if reader.alone else written | {"a_picture_becomes": reader.prompts(picture, None, None).whole}


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        match name, value:
            case ("tasks", _):
                rows = list(value.items())
            case ("decision", _):
                # What facts say again stands there.
                rows = [
                    (key.replace("_", " "), ", ".join(one) if isinstance(one, list) else one)
                    for key, one in value.items()
                    if key not in facts
                ]
            case ("notes", _):
                rows = [(f"note {number}", note) for number, note in enumerate(value, start=1)]
            case ("max_tokens", _):
                rows = [("longest prompt", f"{value} tokens")]
            case ("width", _):
                rows = [("vector", f"{value} numbers")]
            case ("parameters", _):
                rows = [(name, f"{value:,}")]
            case ("labels", int()):
                rows = [(name, f"{value}, unnamed")]
            case ("a_pair_becomes" | "a_query_becomes" | "a_picture_becomes", _):
                rows = [(name.replace("_", " "), repr(value))]
            case (_, list()):
                rows = [(name, ", ".join(map(str, value)) or "none")]
            case _:
                rows = [(name.replace("_", " "), "no" if value is None else str(value))]
        for title, words in rows:
            table.add_row(f"{title}:", Text(words, overflow="fold"))
    return table


def _compare(llm: LLM) -> Compared | str:
    """The difference to sentence-transformers, or why there is nothing to compare with."""
    if llm.model.facts.path.endswith(".gguf"):
        return "sentence-transformers reads no GGUF files."
    if "embed" in llm.engine.facts.tasks:
        if not (Path(llm.model.facts.path) / "modules.json").is_file():
            return "the checkpoint has no modules.json, so sentence-transformers would guess its pooling."
        return _with_reference(_compare_vectors, llm)
    template = llm.engine.facts.score_template
    if template is not None and not template.instruction_as_system:
        return f"sentence-transformers does not know the prompt of this model ({template.name})."
    if llm.model.facts.pictures is not None:
        return "sentence-transformers does not know the prompts of this model."
    if llm.engine.facts.reads_labels:
        return "sentence-transformers reads no labels with texts."
    if llm.engine.facts.pruning is not None:
        return "sentence-transformers does not know the two heads of a pruner."
    if "classify" in llm.engine.facts.tasks:
        return _with_reference(_compare_pairs, llm)
    return f"sentence-transformers has no {' or '.join(llm.engine.facts.tasks)}."


def _with_reference(compare_with: Callable[[LLM], Compared], llm: LLM) -> Compared | str:
    try:
        return compare_with(llm)
    except Exception as error:  # noqa: BLE001 - of whatever kind another library raises
        message = " ".join(str(error).split())[:200]
        return f"sentence-transformers cannot run it: {type(error).__name__}: {message}"


def _compare_vectors(llm: LLM) -> Compared:
    from sentence_transformers import SentenceTransformer

    texts = [*queries(), *passages()]
    theirs = SentenceTransformer(**_loading(llm)).encode(texts, show_progress_bar=False)
    ours = llm.embed_array(texts, use_tqdm=False)
    cosines = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    lowest, largest = float(cosines.min()), float(np.abs(ours - theirs).max())
    summary = (
        f"Against sentence-transformers on {len(texts)} texts: lowest cosine {lowest:.7f}, "
        f"largest difference {largest:.1e}."
    )
    return Compared(summary, lowest >= _LEAST_COSINE, _REFERENCE)


def _compare_pairs(llm: LLM) -> Compared:
    """Logits of pairs beside those of a CrossEncoder."""
    import torch
    from sentence_transformers import CrossEncoder

    pairs = [(question, passage) for question in queries()[:4] for passage in passages()[:12]]
    theirs = CrossEncoder(**_loading(llm)).predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    raw = PoolingParams(use_activation=False)
    futures = llm.engine.submit([Request(prompt, "classify", raw) for prompt in _pairs(llm)])
    ours = np.stack([future.result().array for future in futures])
    largest = float(np.abs(ours - theirs.reshape(ours.shape)).max())
    summary = f"Against sentence-transformers on {len(pairs)} pairs: largest difference of a logit {largest:.1e}."
    close = largest <= _LARGEST_LOGIT_DIFFERENCE * max(1.0, float(np.abs(theirs).max()))
    return Compared(summary, close, _REFERENCE)


def _compare_int8(llm: LLM, plain: LLM) -> Compared | str:
    """How far int8 is from float32, by the first task, or why nothing was compared."""
    task = llm.engine.facts.tasks[0]
    prompts = _pairs(llm) if task == "classify" else [Prompt(text) for text in (*queries(), *passages())]
    try:
        got, expected = (_answers(one, task, prompts) for one in (llm, plain))
    except InvalidRequest as error:
        return f"it takes prompts of its own form alone: {error}"
    if task in ("embed", "token_embed"):
        ours, theirs = np.concatenate(got), np.concatenate(expected)
        sizes = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        if not sizes.any():
            return "it has no vectors for texts alone."
        cosines = (ours * theirs).sum(1)[sizes > 0] / sizes[sizes > 0]
        what = f"{len(prompts)} texts" if task == "embed" else f"{len(cosines)} tokens of {len(prompts)} texts"
        summary = f"Int8 against float32 on {what}: lowest cosine {cosines.min():.4f}, mean {cosines.mean():.4f}."
        judged = cosines.min() if task == "embed" else cosines.mean()
        return Compared(summary, bool(judged >= _LEAST_INT8_COSINE), _FLOAT32)
    apart = np.concatenate([np.abs(one - other).ravel() for one, other in zip(got, expected, strict=True)])
    if not len(apart):
        return "it has no scores for texts alone."
    what = "pairs" if task == "classify" else "texts"
    summary = (
        f"Int8 against float32 on {len(prompts)} {what}: largest difference of a score {apart.max():.4f}, "
        f"mean {apart.mean():.4f}."
    )
    judged = apart.max() if task == "classify" else apart.mean()
    return Compared(summary, bool(judged <= _LARGEST_INT8_DIFFERENCE), _FLOAT32)


def _answers(llm: LLM, task: Task, prompts: Sequence[Prompt]) -> list[np.ndarray[Any, Any]]:
    """[rows, width] of each prompt, one row for a whole text."""
    futures = llm.engine.submit([Request(prompt, task) for prompt in prompts])
    return [np.atleast_2d(future.result().array) for future in futures]


def _pairs(llm: LLM) -> list[Prompt]:
    """Questions with passages, as a classifier of pairs reads them."""
    template = llm.engine.facts.score_template
    pairs = [(question, passage) for question in queries()[:4] for passage in passages()[:12]]
    return [Prompt(question, pair=passage, template=template) for question, passage in pairs]


def _loading(llm: LLM) -> dict[str, Any]:
    facts = llm.model.facts
    return {
        "model_name_or_path": facts.path,
        "device": str(facts.device),
        "trust_remote_code": llm.settings.trust_remote_code,
    }


@dataclass(frozen=True, slots=True)
class Golden:
    """A published number: the score of two texts in a mode, or the sparse weight of a token of one.

    token: its id. mode: see `poolhouse.plans.combined.MODES`.
    """

    value: float
    text: str
    other: str = ""
    mode: str = ""
    token: int | None = None

    @property
    def label(self) -> str:
        if self.token is not None:
            return f"sparse weight of token {self.token} in {self.text!r}"
        return f"{self.mode} score of {self.text!r} and {self.other[:24]!r}"


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison found. close: as close as rounding allows. reference: what the model was compared with."""

    summary: str
    close: bool
    reference: str = "published numbers"


_M3, _BM25 = "What is BGE M3?", "Definition of BM25"
_ABOUT_M3 = "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction."
_ABOUT_BM25 = (
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document"
)
# By hub id. BGE-M3: its model card, and vLLM's test of the same texts.
GOLDEN: Mapping[str, tuple[Golden, ...]] = {
    "BAAI/bge-m3": (
        Golden(0.6259, _M3, _ABOUT_M3, "dense"),
        Golden(0.3474, _M3, _ABOUT_BM25, "dense"),
        Golden(0.3309, _BM25, _ABOUT_M3, "dense"),
        Golden(0.6734, _BM25, _ABOUT_BM25, "dense"),
        Golden(0.19555, _M3, _ABOUT_M3, "sparse"),
        Golden(0.0, _M3, _BM25, "sparse"),
        Golden(0.7797, _M3, _ABOUT_M3, "colbert"),
        Golden(0.4620, _M3, _ABOUT_BM25, "colbert"),
        Golden(0.26711, "Hi", token=2673),
    )
}


def golden_values(model: str | None, path: str) -> tuple[Golden, ...]:
    """Those of a checkpoint; none for a checkpoint without.

    model: a hub id or a folder. path: the folder; within a cache of the hub, a part of it is the id.
    """
    ids = {part.removeprefix("models--").replace("--", "/", 1) for part in PurePath(path).parts}
    return next((values for name, values in GOLDEN.items() if model == name or name in ids), ())


def measure(llm: LLM, values: Sequence[Golden]) -> list[float]:
    """What the model computes for each."""
    return [_measured(llm, value) for value in values]


def compare(values: Sequence[Golden], measured: Sequence[float]) -> Compared:
    """How far the numbers are from the published ones, and which of them too far."""
    gaps = [abs(got - golden.value) for golden, got in zip(values, measured, strict=True)]
    far = [
        f"{golden.label} is {got:.5f}, published as {golden.value}"
        for golden, got, gap in zip(values, measured, gaps, strict=True)
        # Written so that NaN is far.
        if not gap <= max(_ABSOLUTE, _RELATIVE * abs(golden.value))
    ]
    summary = f"Against {len(values)} published numbers: largest difference {max(gaps):.1e}."
    return Compared(" ".join([summary, *(f"{one}." for one in far)]), not far)


def _measured(llm: LLM, golden: Golden) -> float:
    if golden.token is not None:
        (output,) = llm.embed_sparse(golden.text, use_tqdm=False)
        return output.outputs.as_dict().get(golden.token, 0.0)
    (pair,) = llm.score(golden.text, golden.other, mode=golden.mode, use_tqdm=False)
    return pair.outputs.score
