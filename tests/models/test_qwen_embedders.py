"""Embedders on Qwen-VL against transformers' models: their prompts, sizes of pictures, last token, cut vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from poolhouse.inputs.content import Content
from poolhouse.inputs.prompts import Role
from poolhouse.llm import LLM
from poolhouse.models.model import Model
from poolhouse.models.vision.kinds.embedders import whole_cells
from poolhouse.packing.tokens import Picture, Tokens
from tests.models.parity import Parity, Record, worst
from tests.models.qwen_vl import MIDDLE, NEW, OLD, SETTINGS, SLOT, QwenVL, pictures, tokenizer
from tests.models.test_colqwen2 import adapted, answers, opened, shown_in, written
from tests.models.test_colqwen3 import tokens_of

END = "<|endoftext|>"
HELPFUL = "You are a helpful assistant."
BLANK = Image.new("RGB", (56, 56))
TOLERANCE = 1e-5
# One cell of the tiny models is 8 x 8 pixels.
CELL = 64
Parts = list[str | int]


@dataclass(frozen=True)
class Case:
    """A prompt: what a caller gives (numbers are pictures), and the text and pictures that the model is to read."""

    parts: Parts
    text: str
    role: Role | None = None
    instruction: str | None = None
    blank: bool = False

    @property
    def images(self) -> list[Image.Image]:
        return [BLANK] if self.blank else shown_in(self.parts)


@dataclass(frozen=True)
class Kind:
    """One kind of embedder. folder: what the checkpoint is called. tokens: least and most of a picture, in its own code.

    plain_positions: whether pictures take positions like text. resized_before: whether qwen-vl-utils resizes pictures.
    """

    base: str
    architecture: str
    folder: str
    cases: Sequence[Case]
    tokens: tuple[int, int] | None = None
    limit: int = 2048
    plain_positions: bool = False
    resized_before: bool = False
    examples: str = ""


def chat(system: str, user: str, tail: str = "<|im_start|>assistant\n") -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n{tail}"


_DEFAULT = "Represent the user's input."
QWEN3 = (
    Case(["a cat"], chat(_DEFAULT, "a cat")),
    Case([0], chat(_DEFAULT, SLOT)),
    Case(["seen", 1, " beside ", 3], chat(_DEFAULT, f"{SLOT}{SLOT}seen beside ")),
    Case([""], chat(_DEFAULT, "NULL")),
    Case(["a cat"], chat("Find pets.", "a cat"), "query", "Find pets"),
    Case([2], chat("Was it a pet?", SLOT), "document", " Was it a pet? "),
)
_GME_TAIL = f"<|im_start|>assistant\n{END}"
GME = (
    Case(["a cat"], chat(HELPFUL, "a cat", _GME_TAIL)),
    Case([0], chat(HELPFUL, SLOT, _GME_TAIL)),
    Case(["seen", 1], chat(HELPFUL, f"{SLOT}seen", _GME_TAIL)),
    Case(["a cat"], chat("Find pets", "a cat", _GME_TAIL), "query", "Find pets"),
    Case([2], chat(HELPFUL, SLOT, _GME_TAIL), "document", "Find pets"),
)


def dse(tail: str) -> tuple[Case, ...]:
    return (
        Case(["a cat"], chat(HELPFUL, f"{SLOT}Query: a cat", tail), blank=True),
        Case([0], chat(HELPFUL, f"{SLOT}What is shown in this image?", tail), "document"),
        Case(["a dog"], chat(HELPFUL, f"{SLOT}Document: a dog", tail), "document", blank=True),
        Case(["a dog"], chat(HELPFUL, f"{SLOT}Query: a dog", tail), "query", blank=True),
        Case(["a page", 3], chat(HELPFUL, f"{SLOT}a page", tail), "document"),
    )


_PAD = "<|image_pad|>"
VLM2VEC = (
    Case(["a cat and a dog"], "a cat and a dog"),
    Case([0], f"{_PAD} Represent the given image."),
    Case(
        ["What is in the image", 1],
        f"{_PAD} Represent the given image with the following question: What is in the image",
    ),
    Case(["a cat"], "Find me a picture: a cat", "query", "Find me a picture:"),
    Case([3, "redder"], f"{_PAD} Find a similar one: redder", "query", "Find a similar one:"),
)
PLAIN = (
    Case(["a cat"], "a cat"),
    Case([0], SLOT),
    Case(["seen", 1, " beside ", 3], f"{SLOT}{SLOT}seen beside "),
)
Q2, Q2_5, Q3 = (
    partial(Kind, "qwen2_vl", "Qwen2VLForConditionalGeneration"),
    partial(Kind, "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    partial(Kind, "qwen3_vl", "Qwen3VLForConditionalGeneration"),
)
KINDS = {
    "Qwen3-VL-Embedding": Q3("Qwen3-VL-Embedding-2B", QWEN3, (4, 1800), examples="Qwen/Qwen3-VL-Embedding-2B, -8B"),
    "GME-Qwen2-VL": Q2(
        "gme-Qwen2-VL-2B-Instruct",
        GME,
        (256, 1280),
        limit=1800,
        plain_positions=True,
        resized_before=True,
        examples="Alibaba-NLP/gme-Qwen2-VL-2B-Instruct, -7B-Instruct",
    ),
    "DSE-Qwen2": Q2(
        "dse-qwen2-2b-mrl-v1", dse(_GME_TAIL), (1, 2560), resized_before=True, examples="MrLight/dse-qwen2-2b-mrl-v1"
    ),
    "vdr-2b": Q2("vdr-2b-multi-v1", dse(END), (1, 768), examples="llamaindex/vdr-2b-multi-v1"),
    "VLM2Vec-V2": Q2("VLM2Vec-V2.0", VLM2VEC, plain_positions=True, examples="VLM2Vec/VLM2Vec-V2.0"),
    "Qwen2-VL": Q2("model", PLAIN, examples="Qwen/Qwen2-VL-2B-Instruct"),
    "Qwen2.5-VL": Q2_5("model", PLAIN, examples="Qwen/Qwen2.5-VL-3B-Instruct"),
    "Qwen3-VL": Q3("model", PLAIN, examples="Qwen/Qwen3-VL-2B-Instruct"),
}


def made(kind: Kind, folder: Path, names: Callable[[str], str | None] = lambda name: name, **options: Any) -> QwenVL:
    """A checkpoint of this kind, and the model that it was written from, which has the sizes of the kind's own code."""
    size = (
        {} if kind.tokens is None else {"shortest_edge": kind.tokens[0] * CELL, "longest_edge": kind.tokens[1] * CELL}
    )
    tiny = QwenVL.make(kind.base, settings={"size": size} if size else None)
    tiny.save(folder, names, architectures=[kind.architecture], **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return tiny


def expected(tiny: QwenVL, kind: Kind, case: Case) -> Tensor:
    """[1, width]: the last token's state, of length 1."""
    images = case.images
    if kind.resized_before:
        sizes = [smart_resize(image.height, image.width, 8, 4 * CELL, 16384 * CELL)[::-1] for image in images]
        images = [image.resize(size) for image, size in zip(images, sizes, strict=True)]
    inputs = tiny.inputs(case.text, images)
    if kind.plain_positions:
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with torch.inference_mode():
        return F.normalize(tiny.model.model(**inputs).last_hidden_state[0, -1:], dim=-1)


def read(model: Model, kind: Kind, case: Case) -> Tokens:
    tokens = tokens_of(model, case.text, case.images)
    if not kind.plain_positions or tokens.pictures is None:
        return tokens
    return replace(tokens, pictures=replace(tokens.pictures, axes=None))


@pytest.mark.parametrize("name", KINDS)
def test_vectors_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path, record_parity: Record) -> None:
    kind = KINDS[name]
    folder = tmp_path / kind.folder
    tiny = made(kind, folder)
    model = opened(folder, convert="embed")
    assert model.tasks == ("embed", "token_embed")
    assert model.facts.max_tokens == kind.limit
    assert any(note.startswith(f"Read as {name}") for note in model.facts.notes)
    reader = model.facts.pictures
    assert reader is not None
    assert reader.axes is not kind.plain_positions
    for case in kind.cases:
        assert written(model, case.role, case.parts, case.instruction) == case.text
    prompts = [read(model, kind, case) for case in kind.cases]
    got = answers(model, prompts, "embed")
    alone = [answers(model, [own], "embed")[0] for own in prompts]
    parity = Parity(
        f"one vector: {name}",
        model.facts.served_by,
        "transformers' Qwen-VL, its last token",
        worst(got, [expected(tiny, kind, case) for case in kind.cases]),
        worst(got, alone),
        model.facts.architecture,
        model.tasks,
        kind.examples,
    )
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
@pytest.mark.parametrize("layout", ["4.x", "without a head", "flat"])
def test_files_of_each_release_are_read(name: str, layout: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    names = {"4.x": OLD, "without a head": NEW, "flat": MIDDLE}[layout]
    tiny = made(kind, tmp_path, names, flat=layout == "flat" and kind.base != "qwen3_vl")
    model = opened(tmp_path)
    prompts = [read(model, kind, case) for case in kind.cases]
    assert worst(answers(model, prompts, "embed"), [expected(tiny, kind, case) for case in kind.cases]) < TOLERANCE


@pytest.mark.parametrize("name", KINDS)
def test_texts_and_pictures_of_callers_reach_the_model(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    folder = tmp_path / kind.folder
    tiny = made(kind, folder)
    with LLM(str(folder), convert="embed", dtype="float32") as llm:
        for case in kind.cases:
            if case.instruction:
                continue
            parts = [part if isinstance(part, str) else pictures()[part] for part in case.parts]
            prompt: Any = parts[0] if len(parts) == 1 else {"content": parts}
            (got,) = llm.embed_array([prompt], input_type=case.role, use_tqdm=False)
            assert worst([torch.tensor(got)[None]], [expected(tiny, kind, case)]) < TOLERANCE


@pytest.mark.parametrize("name", ["Qwen3-VL-Embedding", "GME-Qwen2-VL", "VLM2Vec-V2"])
def test_a_stored_prompt_is_the_instruction(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    folder = tmp_path / kind.folder
    tiny = made(kind, folder)
    for case in kind.cases:
        if case.instruction and case.role:
            stored = {"prompts": {"own": case.instruction}}
            (folder / "config_sentence_transformers.json").write_text(json.dumps(stored))
            pooled(folder, "lasttoken")
            with LLM(str(folder), dtype="float32") as llm:
                parts = [part if isinstance(part, str) else pictures()[part] for part in case.parts]
                options = {"prompt_name": "own", "input_type": case.role, "use_tqdm": False}
                (got,) = llm.embed_array([{"content": parts}], **options)
            assert worst([torch.tensor(got)[None]], [expected(tiny, kind, case)]) < TOLERANCE


def test_a_vlm2vec_is_found_by_the_name_of_its_adapter(tmp_path: Path) -> None:
    kind = KINDS["VLM2Vec-V2"]
    tiny = made(kind, tmp_path / "base")
    folder = tmp_path / kind.folder
    merged = adapted(tiny, tmp_path / "base", folder, OLD)
    model = opened(folder)
    got = answers(model, [read(model, kind, case) for case in kind.cases], "embed")
    assert worst(got, [expected(merged, kind, case) for case in kind.cases]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "module", "pools"), [("GME-Qwen2-VL", "MultiModalTransformer", True), ("vdr-2b", "Transformer", False)]
)
def test_modules_of_their_own_code_are_read(name: str, module: str, pools: bool, tmp_path: Path) -> None:
    kind = KINDS[name]
    folder = tmp_path / kind.folder
    tiny = made(kind, folder)
    pooled(folder, "lasttoken")
    chain = [{**CHAIN[0], "type": f"custom_st.{module}"}, *(CHAIN[1:] if pools else CHAIN[2:])]
    (folder / "modules.json").write_text(json.dumps(chain))
    model = opened(folder)
    got = answers(model, [read(model, kind, case) for case in kind.cases], "embed")
    assert worst(got, [expected(tiny, kind, case) for case in kind.cases]) < TOLERANCE


@pytest.mark.parametrize("size", [(1240, 1754), (28, 28), (30, 20), (8000, 6000), (42, 70), (1, 1)])
def test_whole_cells_are_those_of_transformers(size: tuple[int, int]) -> None:
    assert whole_cells(size, 28) == smart_resize(size[1], size[0], 28, 4 * 28**2, 16384 * 28**2)[::-1]
    assert whole_cells(size, 28, 1, 1280) == smart_resize(size[1], size[0], 28, 28**2, 1280 * 28**2)[::-1]


def test_thin_pictures_keep_their_longer_side_as_in_qwen_vl_utils() -> None:
    assert whole_cells((9, 700), 28) == (28, 700)


BY_CARD = {
    "title": "---\nlicense: apache-2.0\n---\n# Qwen3-VL-Embedding-2B\n",
    "base": "---\nbase_model:\n- Qwen/Qwen3-VL-Embedding-8B\n---\n# Ours\n",
}


@pytest.mark.parametrize("card", BY_CARD)
def test_a_kind_is_told_by_its_card(card: str, tmp_path: Path) -> None:
    made(KINDS["Qwen3-VL-Embedding"], tmp_path)
    assert any("Read as Qwen3-VL." in note for note in opened(tmp_path).facts.notes)
    (tmp_path / "README.md").write_text(BY_CARD[card])
    assert any("Read as Qwen3-VL-Embedding." in note for note in opened(tmp_path).facts.notes)


def test_a_text_of_dse_shows_a_blank_picture(tmp_path: Path) -> None:
    folder = tmp_path / "dse-qwen2-2b-mrl-v1"
    made(KINDS["DSE-Qwen2"], folder)
    reader = opened(folder).facts.pictures
    assert reader is not None
    (shown,) = reader.prompts(Content(("a cat",)), "query", None).images or ()
    assert isinstance(shown, Picture)
    assert np.array_equal(shown.pixels, reader.processor(BLANK, {}).pixels)


@pytest.mark.parametrize("name", ["Qwen3-VL-Embedding", "DSE-Qwen2"])
def test_vectors_of_models_that_were_trained_so_are_cut(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    tiny = made(kind, tmp_path / kind.folder)
    model = opened(tmp_path / kind.folder)
    assert model.facts.matryoshka.supported
    (got,) = answers(model, [read(model, kind, kind.cases[1])], "embed", dimensions=12)
    whole = expected(tiny, kind, kind.cases[1])
    assert worst([got], [F.normalize(whole[:, :12], dim=-1)]) < TOLERANCE


CHAIN = [
    {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
    for index, (path, kind) in enumerate(
        [
            ("", "base.modules.transformer.Transformer"),
            ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
            ("2_Normalize", "sentence_transformer.modules.normalize.Normalize"),
        ]
    )
]
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif -%}
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def pooled(folder: Path, mode: str) -> None:
    """A chain of modules that pools so."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    (folder / "modules.json").write_text(json.dumps(CHAIN))


def sentence_transformers(folder: Path, **chat: Any) -> None:
    """The files that sentence-transformers 6 writes around a model that reads messages."""
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    module = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            **dict.fromkeys(("text", "image", "video"), forward),
            "message": {**forward, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": chat, "image": {"max_pixels": 320}},
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(module))
    prompts = {"__version__": {}, "prompts": {"query": "Find it."}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    pooled(folder, "mean")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.parametrize("generates", [False, True])
def test_the_chat_template_of_sentence_transformers_files_writes_prompts(generates: bool, tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen2_vl", settings={"size": {"shortest_edge": 128, "longest_edge": 320}})
    tiny.save(tmp_path, MIDDLE, architectures=["Qwen2VLForConditionalGeneration"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    sentence_transformers(tmp_path, add_generation_prompt=generates)
    model = opened(tmp_path)
    tail = "<|im_start|>assistant\n" * generates
    cases = (
        Case(["a cat"], f"<|im_start|>user\na cat<|im_end|>\n{tail}"),
        Case(["seen ", 1, "here"], f"<|im_start|>user\nseen {SLOT}here<|im_end|>\n{tail}"),
        Case([3], chat("Find it.", SLOT, tail), "query", "Find it."),
    )
    for case in cases:
        assert written(model, case.role, case.parts, case.instruction) == case.text
        messages = [{"role": "user", "content": parts_of(case)}]
        if case.instruction:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": case.instruction}]})
        native = tokenizer(TEMPLATE)
        assert native.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates) == case.text
    got = answers(model, [tokens_of(model, case.text, case.images) for case in cases], "embed")
    means = [tiny.hidden(case.text, case.images).mean(0, keepdim=True) for case in cases]
    assert worst(got, [F.normalize(mean, dim=-1) for mean in means]) < TOLERANCE


def parts_of(case: Case) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in case.parts]
