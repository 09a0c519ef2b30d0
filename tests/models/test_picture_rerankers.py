"""Rerankers on Qwen-VL, found without flags, against transformers' models and the formulas of their own code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from poolhouse import LLM, PoolingParams
from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.inputs.content import Content
from poolhouse.inputs.content import Image as Shown
from poolhouse.models.model import Model
from poolhouse.packing.tokens import Pictures, Tokens
from tests.models.parity import Record, worst
from tests.models.qwen_vl import MIDDLE, OLD, SLOT, QwenVL, pictures, prefixed, tokenizer
from tests.models.test_colqwen2 import adapted, answers, compare, opened
from tests.models.test_colqwen3 import tokens_of

Side = list[str | int]
PAIRS: list[tuple[Side, Side]] = [
    (["who?"], ["a text"]),
    (["who?"], [0]),
    ([1], ["a text"]),
    (["like this ", 2, 3], [0, "and this", 1]),
    ([2], []),
]
TURN = "<|im_end|>\n<|im_start|>assistant\n"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SCORE_TOKEN = 100


def content(side: Side) -> Content:
    return Content(tuple(part if isinstance(part, str) else Shown(part, "") for part in side))


def prepared(model: Model, query: Side, document: Side, instruction: str | None = None) -> tuple[str, Tokens]:
    """The prompt that the model's reader writes of a pair, and its tokens."""
    reader = model.facts.pictures
    assert reader is not None
    assert reader.pair is not None
    one, other = content(query), content(document)
    wrote = reader.pair(one, other, instruction)
    images = (*one.images, *other.images) if wrote.images is None else wrote.images
    shown = [pictures()[image.source] for image in images if isinstance(image.source, int)]
    text = wrote.text + wrote.tail
    tokens = tokens_of(model, text, shown)
    for token in wrote.tail_ids:
        shows = tokens.pictures
        if shows is not None:
            assert shows.axes is not None
            shows = Pictures(shows.pictures, np.append(shows.filled, False), np.c_[shows.axes, shows.axes[:, -1] + 1])
        tokens = Tokens(np.append(tokens.ids, token), pictures=shows)
    return text, tokens


def scores(model: Model, pairs: Sequence[Tokens], **params: Any) -> list[Tensor]:
    return answers(model, pairs, "classify", **params)


def joined(side: Side) -> str:
    return "".join(part if isinstance(part, str) else SLOT for part in side)


def first(side: Side) -> str:
    """Pictures before texts, NULL for nothing."""
    text = "".join(part for part in side if isinstance(part, str))
    return SLOT * sum(isinstance(part, int) for part in side) + text or "NULL"


def images_of(*sides: Side) -> list[Image.Image]:
    return [pictures()[part] for side in sides for part in side if isinstance(part, int)]


def allow(tiny: QwenVL, most: int) -> None:
    """Let the reference's pictures have from 4 to so many tokens, whatever the files say."""
    tiny.settings = {**tiny.settings, "size": {"shortest_edge": 4 * 64, "longest_edge": most * 64}}


def check(
    name: str,
    model: Model,
    pairs: Sequence[Tokens],
    expected: Sequence[Tensor],
    record: Record,
    reference: str,
    examples: str,
) -> None:
    """Scores in one pack, and alone, against those expected."""
    wanted = [score.view(1, 1) for score in expected]
    # Scores must differ from pair to pair, or any prompt would do.
    assert torch.cat(wanted).std() > 0.01
    compare(record, f"reranker: {name}", model, "classify", pairs, wanted, reference, examples)


@pytest.mark.parametrize(("names", "flat"), [(OLD, True), (MIDDLE, False)], ids=["4.x", "5.x"])
def test_m0_equals_its_own_code(names: Any, flat: bool, tmp_path: Path, record_parity: Record) -> None:
    modules = {"score.0": nn.Linear(32, 32), "score.2": nn.Linear(32, 1)}
    tiny = QwenVL.make("qwen2_vl", **modules)
    with torch.no_grad():
        modules["score.2"].weight.mul_(5)
    folder = tiny.save(tmp_path, names, flat=flat, architectures=["JinaVLForRanking"])
    allow(tiny, 768)
    model = opened(folder)
    assert model.tasks == ("classify", "token_classify")
    pairs, expected = [], []
    for query, document in PAIRS:
        text, tokens = prepared(model, query, document)
        assert text == f"**Document**:\n{joined(document)}\n**Query**:\n{joined(query)}"
        assert tokens.ids[-1] == SCORE_TOKEN
        with torch.no_grad():
            state = tiny.hidden(text, images_of(document, query), [SCORE_TOKEN])[-1]
            logit = modules["score.2"](modules["score.0"](state).relu())
        pairs.append(tokens)
        expected.append(torch.sigmoid(logit - 2.65))
    name = f"jina-reranker-m0, {'4.x' if flat else '5.x'}"
    check(
        name,
        model,
        pairs,
        expected,
        record_parity,
        "Qwen2VLModel and its own code's formula",
        "jinaai/jina-reranker-m0",
    )
    raw = scores(model, pairs, use_activation=False)
    assert worst(raw, [torch.logit(wanted).view(1, 1) for wanted in expected]) < 1e-4
    line, _ = prepared(model, *PAIRS[0], "Find it.")
    assert line.startswith("Find it.\n**Document**:\n")
    reader = model.facts.pictures
    assert reader is not None
    assert len(reader.processor(Image.new("RGB", (3, 3)), {}).ids) == 4
    assert len(reader.processor(Image.new("RGB", (1500, 1500)), {}).ids) == 27 * 27


@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_vl_reranker_equals_its_own_code(tied: bool, tmp_path: Path, record_parity: Record) -> None:
    tiny = QwenVL.make("qwen3_vl", tied=tied)
    folder = tiny.save(
        tmp_path / "Qwen3-VL-Reranker-2B",
        prefixed("model.language_model.", "model.visual.", "lm_head.weight"),
        architectures=["Qwen3VLForConditionalGeneration"],
    )
    model = opened(folder)
    assert model.tasks == ("classify", "token_classify")
    allow(tiny, 1800)
    default = "Given a search query, retrieve relevant candidates that answer the query."
    check_judged(
        "Qwen3-VL-Reranker" + ", tied" * tied, tiny, model, default, record_parity, "Qwen/Qwen3-VL-Reranker-2B, -8B"
    )


def check_judged(name: str, tiny: QwenVL, model: Model, default: str, record: Record, examples: str) -> None:
    words = {text: tiny_id(text) for text in ("no", "yes")}
    pairs, expected = [], []
    for instruction, (query, document) in zip((None, None, "Find it.", None, None), PAIRS, strict=True):
        text, tokens = prepared(model, query, document, instruction)
        asked = f"<Instruct>: {instruction or default}<Query>:{first(query)}\n<Document>:{first(document)}"
        assert text == f"{JUDGE}{asked}{TURN}"
        logits = tiny.logits(text, images_of(query, document))
        pairs.append(tokens)
        expected.append(torch.softmax(logits[[words["no"], words["yes"]]], 0)[1])
    check(name, model, pairs, expected, record, "transformers' logits of yes and no, softmax", examples)


def tiny_id(text: str) -> int:
    return int(tokenizer().convert_tokens_to_ids(text))  # type: ignore[arg-type]


def test_flags_of_vllm_change_nothing(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen3_vl")
    names = prefixed("model.language_model.", "model.visual.", "lm_head.weight")
    folder = tiny.save(tmp_path / "Qwen3-VL-Reranker-2B", names, architectures=["Qwen3VLForConditionalGeneration"])
    flags = {
        "architectures": ["Qwen3VLForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    pairs = [prepared(opened(folder), *pair)[1] for pair in PAIRS]
    plain = scores(opened(folder), pairs)
    # Under another name the flags alone tell.
    (tmp_path / "model").symlink_to(folder)
    assert worst(scores(opened(tmp_path / "model", overrides=flags), pairs), plain) < 1e-6
    assert worst(scores(opened(folder, overrides=flags), pairs), plain) < 1e-6
    embedder = opened(folder, convert="embed")
    assert embedder.tasks == ("embed", "token_embed")


def test_lychee_is_read_as_others_run_it_and_says_so(tmp_path: Path, record_parity: Record) -> None:
    tiny = QwenVL.make("qwen2_5_vl")
    folder = tiny.save(
        tmp_path / "lychee-rerank-mm",
        prefixed("model.", "visual.", "lm_head.weight"),
        flat=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    model = opened(folder)
    assert any("assumed" in note for note in model.facts.notes)
    default = "Given a web search query, retrieve relevant passages that answer the query"
    allow(tiny, 1280)
    check_judged("lychee-rerank-mm", tiny, model, default, record_parity, "vec-ai/lychee-rerank-mm")


def test_monoqwen_equals_its_card(tmp_path: Path, record_parity: Record) -> None:
    tiny = QwenVL.make("qwen2_vl")
    base = tiny.save(
        tmp_path / "Qwen2-VL-2B-Instruct",
        prefixed("model.", "visual.", "lm_head.weight"),
        flat=True,
        architectures=["Qwen2VLForConditionalGeneration"],
    )
    folder = tmp_path / "MonoQwen2-VL-v0.1"
    merged = adapted(tiny, base, folder, OLD, task_type="CAUSAL_LM")
    model = opened(folder)
    pairs, expected = [], []
    for query, document in ((["who?"], [0]), (["who?"], [1]), (["what is it"], [2, 3])):
        text, tokens = prepared(model, query, document)
        assert text == (
            f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{SLOT * len(document)}"
            "Assert the relevance of the previous image document to the following query, answer True or False. "
            f"The query is: {query[0]}{TURN}"
        )
        logits = merged.logits(text, images_of(document))
        pairs.append(tokens)
        expected.append(torch.softmax(logits[[tiny_id("False"), tiny_id("True")]], 0)[1])
    reference = "transformers' logits of True and False with peft's merge, softmax"
    check("MonoQwen2-VL, an adapter", model, pairs, expected, record_parity, reference, "lightonai/MonoQwen2-VL-v0.1")
    with pytest.raises(InvalidRequest, match="the query must be a text, the document a picture"):
        prepared(model, ["who?"], ["a text"])


def test_mm_r5_is_refused_by_name(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen2_5_vl")
    folder = tiny.save(tmp_path / "MM-R5", OLD, architectures=["Qwen2_5_VLForConditionalGeneration"])
    with pytest.raises(CheckpointError, match=r"MM-R5, which is not served: it writes its reasoning"):
        opened(folder)


def test_a_copy_is_found_by_the_base_or_the_tag_of_its_card(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen3_vl")
    names = prefixed("model.language_model.", "model.visual.", "lm_head.weight")
    folder = tiny.save(tmp_path / "own", names, architectures=["Qwen3VLForConditionalGeneration"])
    (folder / "README.md").write_text("---\nbase_model:\n- Qwen/Qwen3-VL-Reranker-2B\n---\n")
    assert opened(folder).tasks == ("classify", "token_classify")
    (folder / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n# Ours\n")
    assert opened(folder).tasks == ("classify", "token_classify")
    (folder / "README.md").write_text("---\nbase_model:\n- Qwen/Qwen3-VL-2B-Instruct\n---\n")
    assert "embed" in opened(folder).tasks


def test_the_longest_pair_is_that_of_its_own_code(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen3_vl")
    names = prefixed("model.language_model.", "model.visual.", "lm_head.weight")
    folder = tiny.save(tmp_path / "Qwen3-VL-Reranker-2B", names, architectures=["Qwen3VLForConditionalGeneration"])
    assert opened(folder).facts.max_tokens == 2048
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 262144
    (folder / "config.json").write_text(json.dumps(config))
    assert opened(folder).facts.max_tokens == 10240
    assert opened(folder, max_tokens=20000).facts.max_tokens == 20000


def test_scores_are_asked_for_as_of_any_reranker(tmp_path: Path) -> None:
    modules = {"score.0": nn.Linear(32, 32), "score.2": nn.Linear(32, 1)}
    tiny = QwenVL.make("qwen2_vl", **modules)
    with torch.no_grad():
        modules["score.2"].weight.mul_(5)
    folder = tiny.save(tmp_path, OLD, flat=True, architectures=["JinaVLForRanking"])
    allow(tiny, 768)

    def given(side: Side) -> Any:
        """A side as a caller of `score` gives it."""
        if len(side) == 1 and isinstance(side[0], str):
            return side[0]
        return {"content": [part if isinstance(part, str) else pictures()[part] for part in side]}

    def wanted(query: Side, document: Side, line: str = "", cut: int = 0) -> float:
        text = f"{line}**Document**:\n{joined(document)}\n**Query**:\n{joined(query)}"
        with torch.no_grad():
            state = tiny.hidden(text[: len(text) - cut], images_of(document, query), [SCORE_TOKEN])[-1]
            return float(torch.sigmoid(modules["score.2"](modules["score.0"](state).relu()) - 2.65))

    pairs = [pair for pair in PAIRS if pair[1]]
    with LLM(str(folder), dtype="float32") as llm:
        got = llm.score(
            [given(query) for query, _ in pairs], [given(document) for _, document in pairs], use_tqdm=False
        )
        assert [one.outputs.score for one in got] == pytest.approx([wanted(*pair) for pair in pairs], abs=1e-5)
        (one,) = llm.score("who?", given([0]), instruction="Find it.", use_tqdm=False)
        assert one.outputs.score == pytest.approx(wanted(["who?"], [0], "Find it.\n"), abs=1e-5)
        assert one.prompt_token_ids[-1] == SCORE_TOKEN
        # What is cut is text; the token that is scored stays.
        limit = len(one.prompt_token_ids) - 4
        params = PoolingParams(truncate_prompt_tokens=limit)
        (cut,) = llm.score("who?", given([0]), pooling_params=params, instruction="Find it.", use_tqdm=False)
        assert len(cut.prompt_token_ids) == limit
        assert cut.outputs.score == pytest.approx(wanted(["who?"], [0], "Find it.\n", cut=4), abs=1e-5)
