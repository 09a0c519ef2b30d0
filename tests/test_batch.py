"""`poolhouse.batch.Embedder`: batches of every kind come back as that kind, with the answers of `LLM`."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from poolhouse import LLM, ConfigError, InvalidRequest, PoolingParams, UnsupportedDimensions
from poolhouse.batch import Embedder
from poolhouse.jobs.arrow import arrow_array
from poolhouse.jobs.asking import Column
from poolhouse.llm.llm import shared_engine
from poolhouse.vectors.precision import PRECISIONS
from tests.models import tiny_gliclass
from tests.models.tiny import LAYERS, TEXTS, save, save_m3, tokenizer

# Sums of a pack come in another order than those of another pack, in float32.
TOLERANCE = 1e-5
TOO_LONG = "w1 " * 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    tokenizer(folder)
    save(folder, "BertModel", "BertConfig", LAYERS)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(llm: LLM) -> np.ndarray:
    return llm.embed_array(TEXTS)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Embedder]:
    embedder = Embedder(folder)
    yield embedder
    embedder.close()


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("m3")
    save_m3(folder)
    return folder


def close(found: Any, expected: Any) -> bool:
    ours, theirs = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return ours.shape == theirs.shape and bool((np.abs(ours - theirs) < TOLERANCE).all())


IDS = list(range(len(TEXTS)))
INDEX = [number * 3 for number in IDS]
# Batches with columns, and how the vectors of their kind are read.
TABLES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "table": (lambda: pa.table({"id": IDS, "text": TEXTS}), lambda column: column.to_pylist()),
    "record batch": (lambda: pa.record_batch({"id": IDS, "text": TEXTS}), lambda column: column.to_pylist()),
    "frame": (lambda: pd.DataFrame({"id": IDS, "text": TEXTS}, index=INDEX), lambda column: np.stack(column)),
    "numpy": (lambda: {"id": np.array(IDS), "text": np.array(TEXTS)}, lambda column: column),
    "objects": (lambda: {"id": np.array(IDS), "text": np.array(TEXTS, object)}, lambda column: column),
    "lists": (lambda: {"id": IDS, "text": TEXTS}, lambda column: column),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_each_kind_comes_back_with_vectors(kind: str, embedder: Embedder, expected: np.ndarray) -> None:
    make, read = TABLES[kind]
    batch = make()
    result = embedder(batch)
    assert type(result) is type(batch)
    assert close(read(result["embedding"]), expected)
    for name in ("id", "text"):
        assert list(result[name]) == list(batch[name])
    # What was given is as it was.
    assert list(getattr(batch, "column_names", batch)) == ["id", "text"]
    if kind == "frame":
        assert list(result.index) == INDEX


def test_texts_alone_come_back_as_vectors_alone(embedder: Embedder, expected: np.ndarray) -> None:
    array, chunked = embedder(pa.array(TEXTS)), embedder(pa.chunked_array([TEXTS[:2], TEXTS[2:]]))
    assert array.type == chunked.type == pa.list_(pa.float32(), 32)
    assert close(array.to_pylist(), expected)
    assert close(chunked.to_pylist(), expected)
    series = embedder(pd.Series(TEXTS, index=INDEX))
    assert list(series.index) == INDEX
    assert close(np.stack(series), expected)
    for given in (np.array(TEXTS), np.array(TEXTS, object)):
        matrix = embedder(given)
        assert matrix.dtype == np.float32
        assert close(matrix, expected)


def test_vectors_in_arrow_are_the_memory_of_their_matrix() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    for fixed in (True, False):
        array = arrow_array(Column("embedding", matrix), fixed=fixed)
        assert array.to_pylist() == matrix.tolist()
        assert array.values.buffers()[1].address == matrix.ctypes.data


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_and_length(precision: str, folder: Path) -> None:
    options: dict[str, Any] = {"matryoshka_dimensions": [16, 32]}
    embedder = Embedder(folder, dimensions=16, precision=precision, **options)
    with LLM(str(folder), **options) as llm:
        params = PoolingParams(dimensions=16)
        expected = llm.embed_array(TEXTS, pooling_params=params, precision=precision)
    found = embedder({"text": TEXTS})["embedding"]
    assert found.dtype == expected.dtype
    # A sum that comes in another order may be rounded to the next code.
    steps = 0.01 if precision in ("float16", "bfloat16", "fp8_e4m3", "fp8_e5m2") else 1e-5
    if found.dtype.kind == "f":
        assert np.abs(found.astype(np.float32) - expected).max() < steps
    else:
        assert np.mean(found == expected) > 0.98
    empty = embedder(pa.table({"text": pa.array([], pa.string())}))
    assert empty.schema == embedder(pa.table({"text": TEXTS})).schema
    embedder.close()


def test_several_tasks_come_from_one_pass(m3: Path) -> None:
    embedder = Embedder(m3, ["embed", "sparse", "tokens"], output={"embedding": "dense"})
    with LLM(str(m3)) as llm:
        dense, tokens, sparse = llm.embed_array(TEXTS), llm.embed_tokens(TEXTS), llm.embed_sparse(TEXTS)
    table = embedder(pa.table({"text": TEXTS}))
    assert table.column_names == ["text", "dense", "sparse_indices", "sparse_values", "token_embeddings"]
    frame, arrays = embedder(pd.DataFrame({"text": TEXTS})), embedder({"text": TEXTS})
    assert close(arrays["dense"], dense)
    for number, vector in enumerate(sparse):
        for columns in (
            table.slice(number, 1).to_pylist()[0],
            frame.iloc[number],
            {k: v[number] for k, v in arrays.items()},
        ):
            assert list(columns["sparse_indices"]) == vector.outputs.indices
            assert close(columns["sparse_values"], vector.outputs.values)
            assert close(np.array(list(columns["token_embeddings"])), tokens[number])
    # No row is of another type.
    assert embedder(pa.table({"text": pa.array([], pa.string())})).schema == table.schema
    variable = Embedder(m3, ["embed", "tokens"], lists="variable")(pa.table({"text": TEXTS}))
    assert variable.schema.field("embedding").type == pa.list_(pa.float32())
    assert variable.schema.field("token_embeddings").type == pa.list_(pa.list_(pa.float32()))
    assert variable["embedding"].to_pylist() == table["dense"].to_pylist()
    assert variable["token_embeddings"].to_pylist() == table["token_embeddings"].to_pylist()
    embedder.close()


def test_classes_entities_and_scores(tmp_path: Path) -> None:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "classify": ("BertForSequenceClassification", {"id2label": {0: "bad", 1: "good", 2: "odd"}}),
        "score": ("BertForSequenceClassification", {"num_labels": 1}),
        "entities": ("BertForTokenClassification", {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}}),
    }
    queries = TEXTS[::-1]
    for task, (model, config) in kinds.items():
        tokenizer(tmp_path / task)
        save(tmp_path / task, model, "BertConfig", LAYERS, **config)
        embedder = Embedder(tmp_path / task, task, column="body")
        given = {"body": TEXTS, "query": queries}
        table, frame = embedder(pa.table(given)), embedder(pd.DataFrame(given))
        nothing = embedder(pa.table(given).slice(0, 0))
        assert nothing.schema == table.schema
        with LLM(str(tmp_path / task)) as llm:
            if task == "classify":
                outputs = [output.outputs for output in llm.classify(TEXTS)]
                assert table["label"].to_pylist() == list(frame["label"]) == [output.label for output in outputs]
                assert close(table["probabilities"].to_pylist(), [output.probs for output in outputs])
            elif task == "score":
                scores = [output.outputs.score for output in llm.score(queries, TEXTS)]
                assert close(table["score"].to_pylist(), scores)
                assert close(frame["score"], scores)
                assert frame["score"].dtype == np.float32
            else:
                found = [output.outputs.entities for output in llm.token_classify(TEXTS)]
                assert any(found)
                for ours, also, theirs in zip(table["entities"].to_pylist(), frame["entities"], found, strict=True):
                    spans = [(one.label, one.start, one.end, one.text) for one in theirs]
                    for own in (ours, also):
                        assert [(one["label"], one["start"], one["end"], one["text"]) for one in own] == spans
        embedder.close()


def test_labels_of_the_caller(tmp_path: Path) -> None:
    tiny_gliclass.save(tmp_path, "bert, labels by their tokens")
    texts, labels = ["w1 w2", "w3"], ["w4", "w5 w6"]
    embedder = Embedder(tmp_path, "classify", labels=labels, multi_label=True)
    table = embedder(pa.table({"text": texts}))
    wanted = torch.stack([tiny_gliclass.logits(tmp_path, text, labels) for text in texts]).sigmoid()
    assert close(table["probabilities"].to_pylist(), wanted.numpy())
    assert table["label"].to_pylist() == [labels[index] for index in wanted.argmax(1).tolist()]
    assert embedder(pa.table({"text": pa.array([], pa.string())})).schema == table.schema
    embedder.close()


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(None, "'text' is no text but"), (TOO_LONG, "maximum context length"), (7, "'text' is no text but 7")],
    ids=["null", "too long", "number"],
)
def test_a_row_that_cannot_be_answered_is_named(kind: str, wrong: object, reason: str, embedder: Embedder) -> None:
    batch = _with(kind, wrong)
    with pytest.raises(
        InvalidRequest, match=f"Row 2 of the batch, counted from 0: .*{reason}.*errors='null'"
    ) as caught:
        embedder(batch)
    # Workers send their errors to others.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    # What comes after it is answered.
    assert len(embedder({"text": TEXTS})["embedding"]) == len(TEXTS)


@pytest.mark.parametrize("kind", TABLES)
def test_or_is_null_with_the_reason(kind: str, folder: Path, expected: np.ndarray) -> None:
    output = {"embedding": "vector", "error": "why", "truncated": "cut"}
    result = Embedder(folder, errors="null", output=output)(_with(kind, TOO_LONG))
    vectors = result["vector"].to_pylist() if hasattr(result["vector"], "to_pylist") else list(result["vector"])
    good = [number for number in IDS if number != 2]
    assert close(np.stack([np.array(vectors[number]) for number in good]), expected[good])
    if kind in ("numpy", "objects", "lists"):
        assert result["vector"].dtype == np.float32
        assert np.isnan(vectors[2]).all()
    else:
        assert vectors[2] is None
    reasons = [str(one) if isinstance(one, str) else "" for one in map(_plain, result["why"])]
    assert [number for number, one in enumerate(reasons) if one] == [2]
    assert "maximum context length" in reasons[2]
    assert [_plain(one) for one in result["cut"]][:2] == [False, False]


@pytest.mark.parametrize("texts", [[None], [None, 3], ["w1", None] * 1500])
def test_rows_without_an_answer_in_batches_of_any_size(texts: list[Any], m3: Path) -> None:
    embedder = Embedder(m3, ["embed", "tokens", "sparse"], errors="null", precision="int8")
    batch = pd.DataFrame({"text": pd.Series(texts, dtype=object)})
    whole = embedder(
        pa.table({"text": pa.array([text if isinstance(text, str) else None for text in texts], pa.string())})
    )
    frame, arrays = embedder(batch), embedder({"text": texts})
    for number, text in enumerate(texts):
        for name in ("embedding", "token_embeddings", "sparse_indices", "sparse_values"):
            missing = not isinstance(text, str)
            assert (whole[name][number].as_py() is None) == missing
            assert (frame[name][number] is None) == missing
            assert (arrays[name][number] is None) == missing


def test_a_cut_text_is_reported(folder: Path, expected: np.ndarray) -> None:
    embedder = Embedder(folder, overflow="truncate", output={"truncated": "cut"})
    result = embedder({"text": [*TEXTS, TOO_LONG]})
    assert result["cut"].tolist() == [False] * len(TEXTS) + [True]
    assert close(result["embedding"][:-1], expected)


def test_an_empty_batch_is_as_wide_as_others(embedder: Embedder) -> None:
    assert embedder({"text": []})["embedding"].shape == (0, 32)
    assert embedder(np.array([], str)).shape == (0, 32)
    assert embedder(pd.DataFrame({"text": []})).columns.tolist() == ["text", "embedding"]
    assert embedder(pa.array([], pa.string())).type == pa.list_(pa.float32(), 32)


def test_batches_larger_than_a_group_keep_their_order(embedder: Embedder, llm: LLM) -> None:
    texts = [f"w{number % 90} w{number // 90}" for number in range(5000)]
    matrix = embedder(np.array(texts))
    sample = range(0, 5000, 333)
    assert close(matrix[list(sample)], llm.embed_array([texts[number] for number in sample]))


def test_a_stream_of_batches_is_read_one_group_ahead(embedder: Embedder, expected: np.ndarray) -> None:
    read: list[int] = []

    def batches() -> Iterator[dict[str, list[str]]]:
        for number in range(6):
            read.append(number)
            yield {"text": TEXTS[number : number + 1]}

    results = embedder.map(batches())
    assert not read
    for number in range(6):
        result = next(results)
        assert close(result["embedding"], expected[number : number + 1])
        assert len(read) == min(6, number + 2)
    assert next(results, None) is None
    # A stream that is left, or fails, leaves nothing behind.
    broken = embedder.map(iter([{"text": ["w1"]}, {"text": [None]}, {"text": ["w2"]}]))
    next(broken)
    with pytest.raises(InvalidRequest, match="Row 0"):
        next(broken)
    left = embedder.map({"text": ["w1"]} for _ in range(100))
    next(left)
    left.close()
    assert len(embedder({"text": ["w1"]})["embedding"]) == 1


def test_nothing_is_open_before_the_first_batch_and_equal_options_share_an_engine(folder: Path) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 123}
    first, second = Embedder(folder, **options), Embedder(str(folder), prompt_name="", precision="int8", **options)
    other = Embedder(folder, max_num_batched_tokens=124)
    copy = pickle.loads(pickle.dumps(first))
    assert repr(copy) == f"Embedder('{folder}', embed)"
    assert [one._opened for one in (first, second, other, copy)] == [None] * 4
    for one in (first, second, other, copy):
        one({"text": TEXTS})
    engines = [one._opened.engine for one in (first, second, copy)]  # type: ignore[union-attr]
    assert len({*map(id, engines)}) == 1
    assert other._opened is not None
    assert other._opened.engine is not engines[0]
    assert pickle.loads(pickle.dumps(first))._opened is None
    # Closed for all that share it, and opened again when it is needed.
    second.close()
    assert not engines[0].alive
    assert first({"text": TEXTS})["embedding"].shape == (len(TEXTS), 32)
    assert first._opened is not None
    assert shared_engine(first._key, first.settings) is first._opened.engine
    for one in (first, other):
        one.close()


def test_a_model_of_this_folder_is_found_from_another(
    folder: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder.parent)
    embedder = Embedder(folder.name)
    monkeypatch.chdir(tmp_path)
    assert close(embedder({"text": TEXTS})["embedding"], expected)
    embedder.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_open_the_model_for_themselves(method: str, embedder: Embedder, expected: np.ndarray) -> None:
    with ProcessPoolExecutor(2, get_context(method)) as pool:
        parts = list(pool.map(embedder, [{"text": TEXTS[:3]}, {"text": TEXTS[3:]}]))
    assert close(np.concatenate([part["embedding"] for part in parts]), expected)


def test_threads_share_it(embedder: Embedder, expected: np.ndarray) -> None:
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(embedder, [{"text": TEXTS}] * 40):
            assert close(result["embedding"], expected)


def test_datasets_map_it(embedder: Embedder, expected: np.ndarray) -> None:
    mapped = Dataset.from_dict({"id": IDS, "text": TEXTS}).map(embedder, batched=True, batch_size=4)
    assert close(mapped.with_format("numpy")["embedding"], expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"txt": ["a"]}, "The batch has no column 'text'; it has: txt. Did you mean 'txt'?"),
        ({}, "The batch has no column 'text'; it has: none."),
        ({"text": ["a"], "embedding": [1]}, "The batch has a column 'embedding' already; output= names another."),
        ({"text": ["a"], "id": [1, 2]}, "The columns of a batch have one length"),
        (["a"], "A batch is an Arrow table, .*, not builtins.list."),
        (np.zeros((2, 2)), "A batch is an Arrow table, .*, not numpy.ndarray."),
        (None, "A batch is an Arrow table, .*, not builtins.NoneType."),
    ],
)
def test_what_is_no_batch_is_refused_in_words(batch: Any, message: str, embedder: Embedder) -> None:
    with pytest.raises((InvalidRequest, TypeError), match=message):
        embedder(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sprse"}, "^task sprse is not one of embed, .* Did you mean 'sparse'"),
        ({"task": []}, "^task names each task once"),
        ({"task": ["score", "embed"]}, "^task score reads two columns, and stands alone"),
        ({"output": {"vector": "v"}}, "^output: there is no column 'vector', but embedding, truncated, error"),
        ({"output": {"embedding": "v", "error": "v"}}, "^output gives two columns one name: v, v"),
        ({"task": "sparse", "output": "v"}, "^output='v' is one name, and there are several columns"),
        ({"errors": "ignore"}, "^errors must be one of raise, null, got 'ignore'"),
        ({"lists": "list"}, "^lists must be one of fixed, variable, got 'list'"),
        ({"precision": "int9"}, "^precision='int9' is not one of float32"),
        ({"overflw": "truncate"}, "^There is no option 'overflw'. Did you mean 'overflow'"),
        ({"image_column": "picture", "task": "score"}, "^image_column is for embed, sparse, tokens and classify"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises((ConfigError, InvalidRequest), match=message):
        Embedder(folder, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"task": "classify"},
            ConfigError,
            "^task classify: this model does not do that. Its tasks: embed, token_embed",
        ),
        ({"task": "sparse"}, ConfigError, "^task sparse: This model has no sparse vectors"),
        ({"dimensions": 7}, UnsupportedDimensions, "^dimensions: "),
        ({"instruction": "x"}, ConfigError, "^instruction is for task score"),
        ({"prompt_name": "nobody"}, InvalidRequest, "nobody"),
        ({"image_column": "text"}, ConfigError, "reads texts alone, no pictures; leave image_column out"),
        ({"task": "score", "precision": "int8"}, ConfigError, "^precision is for the tasks embed and tokens"),
    ],
)
@pytest.mark.parametrize("errors", ["raise", "null"])
def test_options_that_the_model_lacks_are_refused_at_the_first_batch(
    options: dict[str, Any], error: type[Exception], message: str, errors: Any, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        Embedder(folder, errors=errors, **options)({"text": ["w1"], "query": ["w1"]})


def test_several_columns_have_no_place_beside_texts_alone(m3: Path) -> None:
    for embedder in (Embedder(m3, "sparse"), Embedder(m3, output={"truncated": "cut"}), Embedder(m3, "score")):
        with pytest.raises(InvalidRequest, match=r"Texts alone have no place for the columns .*: give a table"):
            embedder(np.array(["w1"]))


def test_it_is_imported_without_what_is_heavy() -> None:
    script = (
        "import sys; from poolhouse.batch import Embedder; Embedder(output='v'); "
        "print(*{'torch', 'transformers', 'pandas', 'pyarrow', 'ray', 'pyspark', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def _with(kind: str, wrong: object) -> Any:
    """A batch whose third text is another value; Arrow has no numbers among texts."""
    texts: list[Any] = [*TEXTS]
    texts[2] = wrong
    if kind in ("table", "record batch"):
        column = pa.array(texts) if not isinstance(wrong, int) else pa.array([7] * len(texts))
        if isinstance(wrong, int):
            column = pa.UnionArray.from_sparse(
                pa.array([1 if number == 2 else 0 for number in IDS], pa.int8()), [pa.array(TEXTS), column]
            )
        made = pa.table if kind == "table" else pa.record_batch
        return made({"id": pa.array(IDS), "text": column})
    if kind == "frame":
        return pd.DataFrame({"id": IDS, "text": pd.Series(texts, dtype=object)})
    return {"id": IDS, "text": texts if kind == "lists" else np.array(texts, object)}


def _plain(value: Any) -> Any:
    return value.as_py() if hasattr(value, "as_py") else value
