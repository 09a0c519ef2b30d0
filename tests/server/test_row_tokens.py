"""What each row of token tasks stands for (`return_tokens` of /pooling): entries, characters, cells of pictures."""

from __future__ import annotations

import base64
import io
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.bench.made_up import write_colqwen3
from poolhouse.models.files.hub import embedded_model
from poolhouse.server.app import create_app
from poolhouse.testing import FakeEngine
from tests.models import colbert_layouts
from tests.models.test_hosted_pictures import idefics3, paligemma
from tests.server.engines import every_kind

TEXTS = ["The sea, the moon.", "naïve 🙂🙃 end", "潮はなぜ満ちるのか", "لماذا المد والجزر؟", "", "  blanks  "]


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


def asked(llm: LLM, items: list[Any], **fields: Any) -> list[dict[str, Any]]:
    # Without its lifespan, which would close the engine.
    reply = TestClient(create_app([llm.engine])).post(
        "/pooling", json={"input": items, "task": "token_embed", "return_tokens": True, **fields}
    )
    assert reply.status_code == 200, reply.text
    data: list[dict[str, Any]] = reply.json()["data"]
    return data


def test_rows_of_texts_are_those_of_their_tokenizer(minilm: LLM) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(embedded_model())
    plain = minilm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    for text, item, output in zip(TEXTS, asked(minilm, TEXTS), plain, strict=True):
        expected = reference(text, return_offsets_mapping=True)
        assert item["tokens"]["strings"] == reference.convert_ids_to_tokens(expected["input_ids"])
        assert item["tokens"]["spans"] == [list(span) for span in expected["offset_mapping"]]
        assert item["tokens"]["pictures"] == []
        assert np.allclose(item["data"], output.outputs.data, atol=1e-6)


def test_a_cut_text_has_the_tokens_that_were_read(minilm: LLM) -> None:
    (item,) = asked(minilm, ["one two three four five six"], truncate_prompt_tokens=5)
    assert item["tokens"]["strings"] == ["[CLS]", "one", "two", "three", "[SEP]"]
    assert (item["truncated"], item["original_tokens"]) == (True, 8)


def test_base64_has_them_too(minilm: LLM) -> None:
    (item,) = asked(minilm, ["the sea"], encoding_format="base64")
    assert item["shape"][0] == len(item["tokens"]["strings"]) == 4


def test_queries_and_documents_of_late_interaction(tmp_path: Path) -> None:
    name = next(name for name in colbert_layouts.ROWS if "colbertv2.0" in name)
    colbert_layouts.write(colbert_layouts.ROWS[name], tmp_path)
    text = "Open settings, and choose: reset!"
    with LLM(str(tmp_path), device="cpu") as llm:
        (query,) = asked(llm, ["how do i reset it?"], input_type="query")
        (document,) = asked(llm, [text], input_type="document")
    strings, spans = query["tokens"]["strings"], query["tokens"]["spans"]
    assert len(strings) == len(spans) == len(query["data"]) == colbert_layouts.QUERY_LENGTH
    assert set(strings[9:]) == {"[MASK]"}
    assert [span for span in spans if span != [0, 0]] == [[0, 3], [4, 6], [7, 8], [9, 14], [15, 17], [17, 18]]
    # The marker is read and has no characters; punctuation has no row.
    parts = [text[start:end] for start, end in document["tokens"]["spans"]]
    assert len(parts) == len(document["data"])
    assert [part for part in parts if part] == ["Open", "settings", "and", "choose", "reset"]
    assert not set(document["tokens"]["strings"]) & set(string.punctuation)


def page(width: int, height: int) -> dict[str, Any]:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"content": [{"type": "image_url", "image_url": {"url": uri}}]}


def test_pictures_of_any_shape_are_grids_of_cells(tmp_path: Path) -> None:
    write_colqwen3(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    sides = [(300, 200), (160, 260)]
    with LLM(str(tmp_path), device="cpu") as llm:
        wide, tall, text = asked(llm, [*(page(*one) for one in sides), "blue"], input_type="document")
    for item, (width, height) in zip((wide, tall), sides, strict=True):
        (place,) = item["tokens"]["pictures"]
        _, rows, columns = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0]
        assert place["grid"] == [rows // processor.merge_size, columns // processor.merge_size]
        start, end = place["rows"]
        assert end - start == place["grid"][0] * place["grid"][1]
        shown = item["tokens"]["strings"]
        assert set(shown[start:end]) == {"<|image_pad|>"}
        assert "<|image_pad|>" not in shown[:start] + shown[end:]
        assert len(shown) == len(item["data"])
    assert text["tokens"]["pictures"] == []


def test_squares_are_grids(tmp_path: Path) -> None:
    paligemma("engine").save(tmp_path)
    with LLM(str(tmp_path), device="cpu", dtype="float32") as llm:
        (item,) = asked(llm, [page(40, 30)], input_type="document")
    (place,) = item["tokens"]["pictures"]
    start, end = place["rows"]
    assert 0 <= start < end <= len(item["data"])
    assert place["grid"][0] == place["grid"][1] == (end - start) ** 0.5
    assert place["cells"] is None


def test_cells_of_tiles_lie_where_their_marks_and_patches_do(tmp_path: Path) -> None:
    tiny = idefics3("ColIdefics3")
    tiny.save(tmp_path)
    # transformers' own shuffle says which patches, of four lines of four, each row of a tile is made of.
    patches = tiny.model.connector.pixel_shuffle(torch.arange(16.0).reshape(1, 16, 1), 2)[0].int().tolist()
    with LLM(str(tmp_path), device="cpu", dtype="float32") as llm:
        (tiled,) = asked(llm, [page(40, 30)], input_type="document")
        small = {"size": {"longest_edge": 16}}
        (alone,) = asked(llm, [page(40, 30)], input_type="document", mm_processor_kwargs=small)
    for item, shape in ((tiled, (4, 4)), (alone, (2, 2))):
        strings, (place,) = item["tokens"]["strings"], item["tokens"]["pictures"]
        cells = np.array(place["cells"])
        assert (cells.shape, place["grid"]) == (shape, None)
        assert len(set(cells.flat)) == cells.size
        for (line, column), row in np.ndenumerate(cells):
            begin = max(index for index in range(row) if strings[index].startswith(("<row_", "<global")))
            wanted = "<global-img>" if item is alone else f"<row_{line // 2 + 1}_col_{column // 2 + 1}>"
            assert strings[begin] == wanted
            top = 4 * 2 * (line % 2) + 2 * (column % 2)
            assert sorted(patches[row - begin - 1]) == [top, top + 1, top + 4, top + 5]
        start, end = place["rows"]
        assert start <= cells.min() < cells.max() < end


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "embed"}, "token_embed"),
        ({"task": "sparse"}, "token_embed"),
        ({"tasks": ["token_embed"]}, "token_embed"),
        ({"task": "token_embed", "encoding_format": "bytes"}, "float or base64"),
        ({"task": "token_embed", "late_chunking_params": {"chunk_size": 2}}, "row per token"),
        ({"task": "token_embed", "token_pooling_factor": 2, "input_type": "document"}, "row per token"),
    ],
)
def test_what_has_no_row_per_token_is_refused(fields: dict[str, Any], words: str) -> None:
    with TestClient(create_app(every_kind())) as http:
        reply = http.post("/pooling", json={"input": "a b", "return_tokens": True, **fields})
    assert (reply.status_code, reply.json()["param"]) == (400, "return_tokens")
    assert words in reply.json()["message"]


def test_models_list_what_a_page_has_to_know() -> None:
    with TestClient(create_app([*every_kind(), FakeEngine("plain")])) as http:
        models = {model["id"]: (model["labels"], model["sparse"]) for model in http.get("/v1/models").json()["data"]}
    assert models["classifier"] == (["calm", "angry", "glad"], None)
    assert models["reranker"] == (["fits"], None)
    assert (models["embedder"], models["splade"], models["plain"]) == (([], "token"), ([], "vocabulary"), ([], None))


def test_models_tell_whether_requests_may_bring_labels() -> None:
    """As their routes do: those that say so answer, the others refuse."""
    with TestClient(create_app(every_kind())) as http:
        models = http.get("/v1/models").json()["data"]
        for model in models:
            path = "/v1/extract" if "extract" in model["tasks"] else "/classify"
            reply = http.post(path, json={"model": model["id"], "input": "a b", "labels": ["one", "two"]})
            assert (reply.status_code == 200) == model["takes_labels"], (model["id"], reply.text)
    assert {model["takes_labels"] for model in models} == {True, False}
