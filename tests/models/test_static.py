"""Static embeddings, against sentence-transformers' StaticEmbedding, model2vec, and the formula by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model2vec import StaticModel
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from starlette.testclient import TestClient

from poolhouse import LLM, CheckpointError, ConfigError, EngineClosed, InputTooLong, InvalidRequest, PoolingParams
from poolhouse.engine.runner import Runner
from poolhouse.jobs.job import Job
from poolhouse.jobs.run import run
from poolhouse.server.app import create_app
from tests.inputs.test_tokenizer import byte_bpe, unigram, wordpiece

# Empty texts, one of unknown tokens alone, and one with unknown tokens in between.
TEXTS = ["The moon  falls", "bread and ships", "", "東京", "the moon 東京 falls over 京 water", "a " * 60]
WIDTH = 24
# Sums of 60 numbers of about 2 in float32, in another order.
TOLERANCE = 1e-5


def vectors(count: int, width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).normal(size=(count, width)).astype(np.float32)


def save_described(folder: Path, modules: list[Any] = [], **options: Any) -> SentenceTransformer:  # noqa: B006
    tokenizer = wordpiece()
    table = StaticEmbedding(tokenizer, embedding_weights=vectors(tokenizer.get_vocab_size()))
    model = SentenceTransformer(modules=[table, *modules], device="cpu", **options)
    model.save_pretrained(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


def save_model2vec(folder: Path, tokenizer: Any, dtype: str = "float32", **options: Any) -> StaticModel:
    table = vectors(tokenizer.get_vocab_size())
    if dtype == "int8":
        table = table * 40
    StaticModel(table.astype(dtype), tokenizer, **options).save_pretrained(str(folder))
    return StaticModel.from_pretrained(str(folder), force_download=False)


@pytest.mark.parametrize(
    "modules", [[], [Normalize()], [Dense(WIDTH, 16)], [Normalize(), Dense(WIDTH, 8, bias=False)]], ids=len
)
def test_a_table_answers_as_sentence_transformers_does(modules: list[Any], tmp_path: Path) -> None:
    theirs = save_described(tmp_path, modules, prompts={"query": "moon water "})
    with LLM(str(tmp_path)) as llm:
        assert np.abs(llm.embed_array(TEXTS) - theirs.encode(TEXTS)).max() < TOLERANCE
        # Alone as in company.
        alone = np.concatenate([llm.embed_array(text) for text in TEXTS])
        assert np.abs(alone - theirs.encode(TEXTS)).max() < TOLERANCE
        prompted = llm.embed_array(TEXTS, prompt_name="query")
        assert np.abs(prompted - theirs.encode(TEXTS, prompt_name="query")).max() < TOLERANCE
        assert llm.model.facts.served_by.startswith("table of StaticEmbedding")
        (output,) = llm.embed("the moon falls")
        tokenizer = theirs[0].tokenizer
        assert output.prompt_token_ids == tokenizer.encode("the moon falls", add_special_tokens=False).ids


def test_tokens_chunks_and_cuts_of_a_table(tmp_path: Path) -> None:
    theirs = save_described(tmp_path, [Normalize()], truncate_dim=8)
    table = theirs[0].embedding.weight.detach().numpy()
    with LLM(str(tmp_path), max_model_len=20) as llm:
        cut = theirs.encode(TEXTS[:2])
        # Cut vectors have unit length here, as in vLLM.
        unit = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        assert np.abs(llm.embed_array(TEXTS[:2]) - unit).max() < TOLERANCE
        rows = llm.encode("the moon", pooling_task="token_embed", pooling_params=PoolingParams(use_activation=False))
        assert np.allclose(rows[0].outputs.data, table[rows[0].prompt_token_ids][:, :8], atol=TOLERANCE)
        assert llm.encode("", pooling_task="token_embed")[0].outputs.data.shape == (0, 8)
        with pytest.raises(InputTooLong, match="20 tokens"):
            llm.embed("a " * 21)
        (output,) = llm.embed("a " * 21, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        assert (output.truncated, len(output.prompt_token_ids)) == (True, 20)
        scores = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS[:2])]
        expected = theirs.similarity(theirs.encode(TEXTS[:1]), theirs.encode(TEXTS[:2]))[0].tolist()
        assert scores == pytest.approx(expected, abs=1e-5)
    with LLM(str(tmp_path)) as llm:
        assert np.isfinite(llm.embed_array("moon " * 20000)).all()


def test_the_length_at_which_the_tokenizer_cuts_is_the_longest_prompt(tmp_path: Path) -> None:
    save_described(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(tokenizer))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    with LLM(str(tmp_path), overflow="truncate") as llm:
        assert llm.model.facts.max_tokens == 5
        assert np.abs(llm.embed_array(TEXTS) - theirs.encode(TEXTS)).max() < TOLERANCE


@pytest.mark.parametrize("tokenizer", [wordpiece, byte_bpe, unigram], ids=lambda make: make.__name__)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_folder_of_model2vec_answers_as_model2vec_does(tokenizer: Any, normalize: bool, tmp_path: Path) -> None:
    theirs = save_model2vec(tmp_path, tokenizer(), normalize=normalize, max_length=50)
    (tmp_path / "modules.json").unlink(missing_ok=True)
    with LLM(str(tmp_path), overflow="truncate") as llm:
        assert np.abs(llm.embed_array(TEXTS) - theirs.encode(TEXTS)).max() < TOLERANCE
        assert llm.model.facts.max_tokens == 50
        # A text is cut by characters first, at 50 times the median length of a vocabulary entry: within a word too.
        most = 50 * theirs.median_token_length
        texts = [("falls water " * 50)[: most + more] for more in range(-1, 4)] + ["falls" * most, "\u6771" * most]
        assert np.abs(llm.embed_array(texts) - theirs.encode(texts)).max() < TOLERANCE
        assert all(output.truncated for output, text in zip(llm.embed(texts), texts, strict=True) if len(text) > most)
        kept = PoolingParams(truncate_prompt_tokens=7)
        assert (
            np.abs(llm.embed_array(texts, pooling_params=kept) - theirs.encode(texts, max_length=7)).max() < TOLERANCE
        )
        with pytest.raises(InputTooLong, match=f"{most + 1} characters"):
            llm.embed("a" * (most + 1), pooling_params=PoolingParams(overflow="error"))
    with LLM(str(tmp_path), overflow="truncate", max_model_len=600) as llm:
        assert np.abs(llm.embed_array(TEXTS) - theirs.encode(TEXTS, max_length=600)).max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8"])
@pytest.mark.parametrize("described", [True, False])
def test_tensors_of_model2vec_are_the_mean_of_mapped_and_weighed_rows(
    dtype: str, described: bool, tmp_path: Path
) -> None:
    tokenizer = wordpiece()
    count = tokenizer.get_vocab_size()
    rows = (vectors(9) * (40 if dtype == "int8" else 1)).astype(dtype)
    mapping = np.random.default_rng(1).integers(0, 9, count)
    weights = np.random.default_rng(2).random(count)
    save_file({"embeddings": rows, "mapping": mapping, "weights": weights}, tmp_path / "model.safetensors")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": False, "max_length": 512})
    )
    if described:
        kind = "sentence_transformers.models.StaticEmbedding"
        modules = [{"idx": 0, "name": "0", "path": ".", "type": kind}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))

    def by_hand(text: str) -> np.ndarray[Any, Any]:
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=int)
        if not described:
            ids = ids[ids != tokenizer.token_to_id("[UNK]")]
        chosen = rows[mapping[ids]].astype(np.float64) * weights[ids][:, None]
        return chosen.mean(0) if len(ids) else np.zeros(WIDTH)

    with LLM(str(tmp_path)) as llm:
        found = llm.embed_array(TEXTS)
        told = [note for note in llm.model.facts.notes if "unknown tokens" in note]
    expected = np.stack([by_hand(text) for text in TEXTS])
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert bool(told) is described


def test_files_of_a_table_that_make_no_sense_are_named(tmp_path: Path) -> None:
    save_described(tmp_path)
    path = tmp_path / "model.safetensors"
    count = wordpiece().get_vocab_size()
    for tensors, words in (
        ({"weight": vectors(5)}, "`embedding.weight` or `embeddings`"),
        ({"embeddings": vectors(5), "mapping": np.full(count, 5)}, "`mapping` must hold a row"),
        ({"embeddings": vectors(count), "weights": np.ones(3)}, r"`weights` has \[3\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=words):
            LLM(str(tmp_path))
    # A table with too few rows for the tokenizer fails in the text that needs one.
    save_file({"embedding.weight": vectors(40)}, path)
    with LLM(str(tmp_path)) as llm, pytest.raises(InvalidRequest, match="vocabulary"):
        llm.embed("moon falls over water bread ships")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(str(tmp_path))


def test_options_that_a_table_cannot_honour_are_refused(tmp_path: Path) -> None:
    save_described(tmp_path)
    for options in (
        {"convert": "classify"},
        {"merge_adapter": "x"},
        {"hf_overrides": {"a": 1}},
        {"model_impl": "transformers"},
        {"max_model_len": 0},
        {"pooler_config": {"pooling_type": "CLS"}},
    ):
        with pytest.raises((ConfigError, CheckpointError)):
            LLM(str(tmp_path), **options)  # type: ignore[arg-type]


def test_a_table_answers_over_http_and_counts_its_tokens(tmp_path: Path) -> None:
    theirs = save_described(tmp_path, [Normalize()])
    with LLM(str(tmp_path), max_model_len=20) as llm:
        # Without its lifespan, which would close the engine.
        client = TestClient(create_app([llm.engine]))
        body = client.post("/v1/embeddings", json={"input": TEXTS[:3]}).json()
        found = np.array([item["embedding"] for item in body["data"]])
        assert np.abs(found - theirs.encode(TEXTS[:3])).max() < TOLERANCE
        count = sum(len(theirs[0].tokenizer.encode(text, add_special_tokens=False).ids) for text in TEXTS[:3])
        assert body["usage"]["prompt_tokens"] == count
        vectors = client.post("/embed", json={"inputs": TEXTS[:2]}).json()
        assert np.abs(np.array(vectors) - theirs.encode(TEXTS[:2])).max() < TOLERANCE
        cut = {"input": "a " * 30, "truncate_prompt_tokens": -1}
        assert client.post("/v1/embeddings", json=cut).json()["usage"]["prompt_tokens"] == 20
        assert client.post("/v1/embeddings", json={"input": "a " * 30}).status_code == 400


@pytest.mark.parametrize("quantized", [{"dimensionality": 8}, {"quantize_to": "int8"}, {"vocabulary_quantization": 9}])
def test_tables_that_model2vec_made_smaller_answer_as_there(quantized: dict[str, Any], tmp_path: Path) -> None:
    save_model2vec(tmp_path / "whole", wordpiece(), normalize=True)
    smaller = StaticModel.from_pretrained(str(tmp_path / "whole"), force_download=False, **quantized)
    smaller.save_pretrained(str(tmp_path / "smaller"))
    theirs = StaticModel.from_pretrained(str(tmp_path / "smaller"), force_download=False)
    (tmp_path / "smaller" / "modules.json").unlink(missing_ok=True)
    with LLM(str(tmp_path / "smaller")) as llm:
        assert np.abs(llm.embed_array(TEXTS) - theirs.encode(TEXTS)).max() < TOLERANCE


def many(count: int) -> list[str]:
    words = ["the", "moon", "falls", "over", "water", "bread", "and", "ships", "東"]
    return [" ".join(words[(number * step) % 9] for step in range(number % 7)) for number in range(count)]


@pytest.mark.parametrize("normalize", [True, False])
def test_many_texts_are_looked_up_at_once_and_are_as_each_alone(normalize: bool, tmp_path: Path) -> None:
    theirs = save_model2vec(tmp_path, wordpiece(), normalize=normalize)
    (tmp_path / "modules.json").unlink(missing_ok=True)
    texts, drawn = many(3000), []

    def progress(answered: Any, total: int, desc: str) -> Iterator[Any]:
        for one in answered:
            drawn.append((total, desc))
            yield one

    with LLM(str(tmp_path), matryoshka_dimensions=(8,)) as llm:
        submitted = count_submitted(llm)
        found = llm.embed_array(texts, use_tqdm=progress)
        assert submitted == []
        assert drawn == [(3000, "embed")] * 3000
        assert np.abs(found - theirs.encode(texts)).max() < TOLERANCE
        assert np.abs(found[::100] - np.concatenate([llm.embed_array(text) for text in texts[::100]])).max() < TOLERANCE
        cut = llm.embed_array(texts, pooling_params=PoolingParams(dimensions=8))
        assert cut.shape == (3000, 8)
        assert llm.embed_array(texts, precision="float16").dtype == np.float16
        # What a text of its own needs, the texts around it get too.
        submitted.clear()
        with pytest.raises(InputTooLong, match=r"prompts\[2500\]") as refused:
            llm.embed_array([*texts[:2500], "moon " * 600, *texts])
        assert refused.value.parameter is not None
        assert sum(submitted) == 1
        short = llm.embed_array(
            [*texts, "moon " * 600], pooling_params=PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False
        )
        assert np.abs(short[:-1] - found).max() < TOLERANCE
        # A sum of 512 numbers of about 2.
        assert np.abs(short[-1] - theirs.encode("moon " * 600)).max() < 10 * TOLERANCE
        with pytest.raises(InvalidRequest, match="no prompt named"):
            llm.embed_array(texts, prompt_name="none")
        with pytest.raises(InvalidRequest, match="Unicode"):
            llm.embed_array([*texts, "\ud800"])
    with pytest.raises(EngineClosed):
        llm.embed_array(texts)


def count_submitted(llm: LLM) -> list[int]:
    """How many requests each `submit` from now on takes."""
    counts: list[int] = []
    submit = llm.engine.submit

    def counted(requests: Any, *more: Any) -> Any:
        counts.append(len(requests))
        return submit(requests, *more)

    llm.engine.submit = counted  # type: ignore[method-assign]
    return counts


Road = Callable[[LLM, list[str], Path], Any]


def plain(outputs: Any) -> list[Any]:
    """Outputs, or errors in their place, as what can be compared."""
    return [
        (type(one), str(one))
        if isinstance(one, Exception)
        else (
            np.asarray(one.outputs.data).tobytes(),
            one.prompt_token_ids,
            one.truncated,
            one.original_tokens,
            one.chunks,
        )
        for one in outputs
    ]


def over_http(llm: LLM, texts: list[str], folder: Path) -> Any:
    body = {"input": texts, "truncate_prompt_tokens": -1, "encoding_format": "base64"}
    reply = TestClient(create_app([llm.engine])).post("/v1/embeddings", json=body)
    return reply.json()["data"], reply.json()["usage"], reply.headers["X-Poolhouse-Truncated"]


def as_a_job(llm: LLM, texts: list[str], folder: Path) -> Any:
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, None]), encoding="utf-8")
    out = folder / f"out-{len(list(folder.iterdir()))}"
    progress = run(Job((str(source),), out, form="jsonl"), lambda: llm)
    assert progress.errors == 3
    return [path.read_bytes() for path in [*sorted(out.glob("part-*")), out / "errors.jsonl"]], progress.tokens


CUT, SPLIT = PoolingParams(truncate_prompt_tokens=-1), PoolingParams(overflow="chunk")
# Each with how many texts, or parts of one, are run all the same.
ROADS: dict[str, tuple[Road, int]] = {
    "embed": (lambda llm, texts, _: plain(llm.encode(texts, pooling_task="embed", pooling_params=CUT)), 1),
    "a coroutine": (
        lambda llm, texts, _: plain(
            asyncio.run(llm.encode_async(texts[-200:], pooling_task="embed", pooling_params=CUT))
        ),
        1,
    ),
    "embed_array": (lambda llm, texts, _: llm.embed_array(texts, pooling_params=CUT).tobytes(), 1),
    "embed in chunks": (lambda llm, texts, _: plain(llm.encode(texts, pooling_task="embed", pooling_params=SPLIT)), 27),
    "stream of tokens": (lambda llm, texts, _: plain(llm.stream(texts, "token_embed", on_error="return")), 1198),
    "stream": (
        lambda llm, texts, _: [
            str(one) if isinstance(one, Exception) else (one.outputs.embedding, one.prompt_token_ids)
            for one in llm.stream([*texts, "\ud800"], on_error="return")
        ],
        0,
    ),
    "HTTP": (over_http, 1),
    "a job": (as_a_job, 0),
}


@pytest.mark.parametrize("road", ROADS)
def test_on_each_road_texts_are_looked_up_as_they_are_run(
    road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model2vec(tmp_path / "table", wordpiece(), normalize=True)
    # Two are cut, refused or split: one of 30 tokens, and one of 600 that is cut by characters first.
    texts = [*many(1100), "東 " * 30, "moon water " * 300, *many(98)]
    ran, launch = list[int](), Runner.launch

    def counted(runner: Runner, batch: Any) -> Any:
        ran.append(len(batch))
        return launch(runner, batch)

    monkeypatch.setattr(Runner, "launch", counted)
    take, run_all_the_same = ROADS[road]
    answers, counts = [], []
    for looks_up in (True, False):
        with LLM(str(tmp_path / "table"), max_model_len=24) as llm:
            llm.engine._is_table = looks_up  # type: ignore[attr-defined]
            ran.clear()
            answers.append(take(llm, texts, tmp_path))
            counts.append(sum(ran))
    assert answers[0] == answers[1]
    assert counts[0] == run_all_the_same
    assert counts[1] >= 200


def test_prompts_of_a_table_stand_before_many_texts_too(tmp_path: Path) -> None:
    theirs = save_described(tmp_path, [Normalize()], prompts={"query": "moon water "})
    texts = many(1500)
    with LLM(str(tmp_path)) as llm:
        found = llm.embed_array(texts, prompt_name="query")
        assert np.abs(found - theirs.encode(texts, prompt_name="query")).max() < TOLERANCE


BODIES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "/v1/embeddings": ({"input": TEXTS[:2]}, lambda reply: [one["embedding"] for one in reply["data"]]),
    "/openai/v1/embeddings": ({"input": TEXTS[:2]}, lambda reply: [one["embedding"] for one in reply["data"]]),
    "/pooling": ({"input": TEXTS[:2]}, lambda reply: [one["data"] for one in reply["data"]]),
    "/embed": ({"inputs": TEXTS[:2]}, lambda reply: reply),
    "/tei/v1/embeddings": ({"input": TEXTS[:2]}, lambda reply: [one["embedding"] for one in reply["data"]]),
    "/v1/embed": ({"texts": TEXTS[:2], "input_type": "search_document"}, lambda reply: reply["embeddings"]),
    "/v2/embed": (
        {"texts": TEXTS[:2], "input_type": "search_document", "embedding_types": ["float"]},
        lambda reply: reply["embeddings"]["float"],
    ),
    "/jina/v1/embeddings": ({"input": TEXTS[:2]}, lambda reply: [one["embedding"] for one in reply["data"]]),
    "/voyage/v1/embeddings": ({"input": TEXTS[:2]}, lambda reply: [one["embedding"] for one in reply["data"]]),
    "/infinity/embeddings": ({"input": TEXTS[:2]}, lambda reply: [one["embedding"] for one in reply["data"]]),
    "/api/embed": ({"input": TEXTS[:2]}, lambda reply: reply["embeddings"]),
    "/embedding": ({"content": TEXTS[:2]}, lambda reply: [one["embedding"][0] for one in reply]),
    "/v1/encode/table": (
        {"items": [{"text": text} for text in TEXTS[:2]]},
        lambda reply: [one["dense"]["values"] for one in reply["items"]],
    ),
    "/vectors": ({"text": TEXTS[0]}, lambda reply: [reply["vector"]]),
    "/vectorize": ({"texts": TEXTS[:2]}, lambda reply: reply["textVectors"]),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("table")
    save_described(folder, [Normalize()])
    with LLM(str(folder), served_model_name="table") as llm:
        yield TestClient(create_app([llm.engine]))


@pytest.mark.parametrize("path", BODIES)
def test_all_routes_for_embeddings_serve_a_table(path: str, client: TestClient) -> None:
    body, vectors_of = BODIES[path]
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    expected = client.post("/embed", json={"inputs": TEXTS[:2]}).json()
    found = vectors_of(reply.json())
    assert np.abs(np.array(found) - np.array(expected)[: len(found)]).max() < TOLERANCE
