"""Late chunking equals hidden states of transformers, pooled by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from poolhouse import LLM, InputTooLong, InvalidRequest, LateChunkingParams, PoolingParams
from tests.checkpoints import KINDS, save_checkpoint

TEXT = "The moon falls under the water. Bread and ships! Größe naïve 東京, songs of sailors? The end."
SENTENCES = re.compile(r"(?<=[.!?])\s+")


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("chunks")
    save_checkpoint(folder, request.param, tokens=180)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Any:
    with LLM(str(folder), pooler_config={"pooling_type": "MEAN"}) as llm:
        yield llm


def by_transformers(folder: Path, text: str, spans: list[tuple[int, int]]) -> np.ndarray:
    """Hidden states of one pass over the text; each span is the mean of the tokens that begin in it, of unit length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = model(made["input_ids"]).last_hidden_state[0].numpy()
    starts = [
        start + len(text[start:end]) - len(text[start:end].lstrip()) if text[start:end].strip() else start
        for start, end in made["offset_mapping"][0].tolist()
    ]
    special = made["special_tokens_mask"][0].numpy() == 1
    rows = []
    for first, last in spans:
        inside = [not mask and first <= start < last for mask, start in zip(special, starts, strict=True)]
        mean = hidden[inside].mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


WAYS: dict[str, dict[str, Any]] = {
    "tokens": {"chunk_size": 7},
    "characters": {"chunks": [(0, 31), (32, 48), (20, 70)]},
    "text between chunks": {"separator": "the"},
    "sentences": {"separator": SENTENCES},
}


@pytest.mark.parametrize("way", WAYS)
def test_chunks_equal_pooled_hidden_states(llm: LLM, folder: Path, way: str) -> None:
    (output,) = llm.embed_chunks(TEXT, **WAYS[way])
    chunks = output.outputs
    assert len(chunks) > 1
    assert all(chunk.text == TEXT[chunk.start : chunk.end] for chunk in chunks)
    expected = by_transformers(folder, TEXT, [(chunk.start, chunk.end) for chunk in chunks])
    # Both sides add the same float32 numbers in another order.
    assert np.abs(np.stack([chunk.array for chunk in chunks]) - expected).max() < 1e-5
    assert output.chunks == 1


def test_chunks_of_tokens_hold_the_whole_text(llm: LLM) -> None:
    (output,) = llm.embed_chunks(TEXT, chunk_size=5)
    chunks = output.outputs
    assert max(chunk.tokens for chunk in chunks) <= 5
    special = llm.engine.tokenizer.special_tokens
    assert sum(chunk.tokens for chunk in chunks) == len(output.prompt_token_ids) - special
    gaps = [TEXT[one.end : two.start] for one, two in itertools.pairwise(chunks)]
    assert "".join(gaps).strip() == ""
    assert all(one.end <= two.start for one, two in itertools.pairwise(chunks))


def test_a_chunk_of_the_whole_text_is_its_mean_without_special_tokens(llm: LLM) -> None:
    (output,) = llm.embed_chunks(TEXT, chunks=[(0, len(TEXT))])
    (rows,) = llm.encode(TEXT, PoolingParams(use_activation=False), pooling_task="token_embed")
    mean = rows.outputs.array[1:-1].mean(axis=0)
    assert output.outputs[0].array == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_many_texts_and_params_and_async(llm: LLM) -> None:
    texts = [TEXT, "moon", "", TEXT[:40]]
    raw = PoolingParams(use_activation=False)
    outputs = llm.embed_chunks(texts, chunk_size=6, pooling_params=raw)
    assert [len(output.outputs) for output in outputs][2] == 0
    twins = asyncio.run(llm.embed_chunks_async(texts, chunk_size=6, pooling_params=raw))
    for text, output, twin in zip(texts, outputs, twins, strict=True):
        (alone,) = llm.embed_chunks(text, chunk_size=6, pooling_params=raw)
        for chunk, same, other in zip(output.outputs, alone.outputs, twin.outputs, strict=True):
            assert np.abs(chunk.array - same.array).max() < 1e-5
            assert np.abs(chunk.array - other.array).max() < 1e-5
    assert abs(np.linalg.norm(outputs[0].outputs[0].array) - 1) > 1e-2


def test_a_text_over_the_limit_is_read_in_windows_of_whole_chunks(folder: Path) -> None:
    text, limit, overlap = TEXT * 3, 40, 8
    with LLM(str(folder), pooler_config={"pooling_type": "MEAN"}, max_model_len=limit) as llm:
        (output,) = llm.embed_chunks(text, chunk_size=10, overlap=overlap)
        room = limit - llm.engine.tokenizer.special_tokens
        first, *inner, last = output.prompt_token_ids
        base = start = 0
        windows = {0}
        for chunk in output.outputs:
            end = start + chunk.tokens
            if end > base + room:
                base = min(max(start - overlap, end - room), len(inner) - room)
                windows.add(base)
            (rows,) = llm.encode(
                [[first, *inner[base : base + room], last]],
                PoolingParams(use_activation=False),
                pooling_task="token_embed",
            )
            mean = rows.outputs.array[1 + start - base : 1 + end - base].mean(axis=0)
            assert chunk.array == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
            start = end
        assert output.chunks == len(windows) > 2
        with pytest.raises(InvalidRequest, match=f"reads at most {room} at once"):
            llm.embed_chunks(text, chunk_size=room + 1)


def test_heads_and_prefix_of_the_model_are_used(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", tokens=180)
    with LLM(str(tmp_path), pooler_config={"pooling_type": "MEAN"}, hf_overrides={"is_matryoshka": True}) as llm:
        short = PoolingParams(dimensions=7)
        (full,), (cut,) = (
            llm.embed_chunks(TEXT, chunk_size=9),
            llm.embed_chunks(TEXT, chunk_size=9, pooling_params=short),
        )
        for one, two in zip(full.outputs, cut.outputs, strict=True):
            assert two.array == pytest.approx(one.array[:7] / np.linalg.norm(one.array[:7]), abs=1e-5)
    (tmp_path / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"document": "bread and "}}))
    with LLM(str(tmp_path)) as llm:
        (output,) = llm.embed_chunks(TEXT, chunks=[(0, 8)], prompt_name="document")
        (chunk,) = llm.embed_chunks("bread and " + TEXT, chunks=[(10, 18)])
        assert output.outputs[0].text == chunk.outputs[0].text == "The moon"
        assert output.outputs[0].array == pytest.approx(chunk.outputs[0].array, abs=1e-5)
        assert abs(np.linalg.norm(chunk.outputs[0].array) - 1) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of"),
        ({"chunk_size": 3, "separator": "."}, "Give one of"),
        ({"chunk_size": 0}, "at least 1"),
        ({"chunks": [(3, 2)]}, "0 <= start < end"),
        ({"chunks": [(0, 10**4)]}, "0 <= start < end"),
        ({"chunks": ["ab"]}, "0 <= start < end"),
        ({"chunks": [(3, 4)]}, "holds no token"),
        ({"separator": ""}, "not be empty"),
        ({"chunk_size": 3, "overlap": -1}, "not be negative"),
    ],
)
def test_wrong_chunks_are_refused(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.embed_chunks(TEXT, **options)


def test_ids_and_lists_that_do_not_fit_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="token ids have none"):
        llm.embed_chunks([[1, 2, 3]], chunk_size=2)
    with pytest.raises(InvalidRequest, match="1 lists for 2 texts"):
        llm.embed_chunks([TEXT, TEXT], chunks=[[(0, 3)]])
    with pytest.raises(InputTooLong):
        llm.embed(TEXT * 9)


def test_poolings_with_heads_made_for_them_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", "ForSequenceClassification")
    with LLM(str(tmp_path)) as llm, pytest.raises(InvalidRequest, match="not supported"):
        llm.embed_chunks(TEXT, chunk_size=3)


def of_size(size: int, **more: Any) -> PoolingParams:
    return PoolingParams(late_chunking_params=LateChunkingParams(chunk_size=size), **more)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_fixed_chunks_are_means_of_all_tokens_with_their_places(llm: LLM, folder: Path, size: int) -> None:
    (output,) = llm.encode(TEXT, of_size(size), pooling_task="token_embed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = tokenizer(TEXT, return_offsets_mapping=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = model(made["input_ids"]).last_hidden_state[0]
    means = torch.stack([part.mean(0) for part in hidden.split(size)])
    expected = torch.nn.functional.normalize(means, dim=-1).numpy()
    # Both sides add the same float32 numbers in another order.
    assert np.abs(output.outputs.array - expected).max() < 1e-5
    told = output.late_chunking
    assert told is not None
    assert (told.chunk_size, told.input_tokens, told.strategy) == (size, len(hidden), "fixed_tokens")
    offsets = made["offset_mapping"][0].tolist()
    for chunk, first in zip(told.chunks, range(0, len(hidden), size), strict=True):
        last = min(first + size, len(hidden))
        places = [(start, end) for start, end in offsets[first:last] if start < end]
        assert chunk.token_range == (first, last)
        assert chunk.char_range == ((places[0][0], max(end for _, end in places)) if places else None)
    if size == 1:
        assert told.chunks[0].char_range is None  # a special token


def test_fixed_chunks_go_with_other_requests_and_parameters(llm: LLM) -> None:
    asked = [
        of_size(4),
        of_size(9, use_activation=False),
        PoolingParams(),
        of_size(2, dimensions=llm.engine.model.facts.matryoshka.width),
    ]
    together = llm.encode([TEXT] * 4, asked, pooling_task="token_embed")
    alone = [llm.encode(TEXT, one, pooling_task="token_embed")[0] for one in asked]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.outputs.array - other.outputs.array).max() < 1e-5
        assert one.late_chunking == other.late_chunking
    assert together[2].late_chunking is None
    assert abs(np.linalg.norm(together[1].outputs.array[0]) - 1) > 1e-2
    (twin,) = asyncio.run(llm.encode_async(TEXT, asked[0], pooling_task="token_embed"))
    assert twin.late_chunking == together[0].late_chunking


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "2", None])
def test_a_size_of_chunks_is_a_positive_integer(size: Any) -> None:
    with pytest.raises(InvalidRequest, match="chunk_size must be a positive integer"):
        of_size(size)


def test_fixed_chunks_are_refused_where_they_cannot_be_made(llm: LLM) -> None:
    for task in ("embed", "classify"):
        if task in llm.engine.facts.tasks:
            with pytest.raises(InvalidRequest, match=r"does not support \['late_chunking_params'\]"):
                llm.encode(TEXT, of_size(2), pooling_task=task)
    for prompt in ("", [3, 4], {"prompt_token_ids": [3, 4]}):
        with pytest.raises(InvalidRequest, match="takes plain texts that are not empty"):
            llm.encode(prompt, of_size(2), pooling_task="token_embed")
    for options in ({"truncate_prompt_tokens": 5}, {"truncation": True}, {"do_lower_case": True}):
        with pytest.raises(InvalidRequest, match="leave out what cuts it or lowers its case"):
            llm.encode(TEXT, of_size(2), pooling_task="token_embed", tokenization_kwargs=options)
    with pytest.raises(InputTooLong):
        llm.encode(TEXT * 20, of_size(2), pooling_task="token_embed")
    with pytest.raises(InvalidRequest, match="late chunking makes vectors"):
        llm.score("a", "b", pooling_params=of_size(2))
    with pytest.raises(InvalidRequest, match="LateChunkingParams"):
        PoolingParams(late_chunking_params={"chunk_size": 2})  # type: ignore[arg-type]


def test_embed_answers_with_matrices_where_token_vectors_are_the_models_task(folder: Path, llm: LLM) -> None:
    with LLM(str(folder), pooler_config={"pooling_type": "MEAN", "task": "token_embed"}) as tokens:
        (output,) = tokens.embed(TEXT)
        (chunked,) = asyncio.run(tokens.embed_async(TEXT, pooling_params=of_size(4)))
        (expected,) = llm.encode(TEXT, pooling_task="token_embed")
        assert np.abs(output.outputs.array - expected.outputs.array).max() < 1e-5
        assert len(chunked.outputs.array) == len(chunked.late_chunking.chunks)
