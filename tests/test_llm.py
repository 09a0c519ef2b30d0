"""The LLM class on the embedded model and on tiny checkpoints."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from poolhouse import LLM, ConfigError, InvalidRequest, PoolingParams, UnsupportedDimensions, UnsupportedTask
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineClosed


@pytest.fixture(scope="module")
def llm():  # type: ignore[no-untyped-def]
    with LLM(runner="pooling") as llm:
        yield llm


def test_embed_gives_outputs_with_the_attributes_of_vllm(llm: LLM) -> None:
    (output,) = llm.embed("Hello, my name is")
    assert len(output.outputs.embedding) == output.outputs.hidden_size == 384
    assert isinstance(output.outputs.embedding[0], float)
    assert output.prompt_token_ids[0] == 101
    assert output.finished
    assert output.num_cached_tokens == 0
    assert isinstance(output.request_id, str)
    assert (output.truncated, output.original_tokens) == (False, len(output.prompt_token_ids))
    assert repr(output.outputs) == "EmbeddingOutput(hidden_size=384)"


def test_encode_gives_tensors(llm: LLM) -> None:
    (output,) = llm.encode("Hello, my name is", pooling_task="embed")
    assert isinstance(output.outputs.data, torch.Tensor)
    assert output.outputs.data.shape == (384,)
    (output,) = llm.encode("Hello, my name is", pooling_task="token_embed")
    assert output.outputs.data.shape == (len(output.prompt_token_ids), 384)


def test_every_prompt_form_means_the_same(llm: LLM) -> None:
    text = "The capital of France is"
    (expected,) = llm.embed(text)
    ids = expected.prompt_token_ids
    for prompts in (
        [text],
        {"prompt": text},
        [{"prompt": text}],
        {"prompt_token_ids": ids},
        ids,
        [ids],
        [{"prompt_token_ids": ids}],
    ):
        (output,) = llm.embed(prompts)
        assert output.prompt_token_ids == ids
        assert np.allclose(output.outputs.array, expected.outputs.array, atol=1e-6)


def test_order_is_kept(llm: LLM) -> None:
    texts = [f"{n} " * (1 + (n * 7) % 40) for n in range(300)]
    matrix = llm.embed_array(texts, use_tqdm=False)
    for index in (0, 17, 150, 299):
        assert np.allclose(llm.embed(texts[index])[0].outputs.array, matrix[index], atol=1e-6)


def test_over_long_text_is_an_error_by_default_and_cut_on_request(llm: LLM) -> None:
    text = "word " * 600
    with pytest.raises(InvalidRequest, match="maximum context length is 256 tokens"):
        llm.embed(text)
    for options in (
        {"pooling_params": PoolingParams(truncate_prompt_tokens=-1)},
        {"tokenization_kwargs": {"truncate_prompt_tokens": -1}},
        {"tokenization_kwargs": {"truncation": True}},
    ):
        (output,) = llm.embed(text, **options)
        assert output.truncated
        assert len(output.prompt_token_ids) == 256
        assert output.original_tokens == 602
    (output,) = llm.embed(text, tokenization_kwargs={"truncation": True, "max_length": 10})
    assert len(output.prompt_token_ids) == 10


def test_overflow_policies() -> None:
    text = "one two three four five " * 100
    with LLM(overflow="truncate") as llm:
        (output,) = llm.embed(text)
        assert (output.truncated, output.original_tokens, output.chunks) == (True, 502, 1)
    with LLM(overflow="chunk") as llm:
        (output,) = llm.embed(text)
        assert (output.truncated, len(output.prompt_token_ids), output.chunks) == (False, 502, 2)
        assert np.linalg.norm(output.outputs.array) == pytest.approx(1, abs=1e-5)
        ids = output.prompt_token_ids
        one, two = llm.embed_array([ids[:256], ids[256:]])
        mean = one * 256 + two * 246
        assert np.allclose(output.outputs.array, mean / np.linalg.norm(mean), atol=1e-5)
        (tokens,) = llm.encode(text, pooling_task="token_embed")
        assert tokens.outputs.array.shape == (502, 384)


def test_matryoshka_is_refused_unless_the_model_says_so(llm: LLM) -> None:
    with pytest.raises(UnsupportedDimensions) as refused:
        llm.embed("x", pooling_params=PoolingParams(dimensions=32))
    assert str(refused.value) == (
        'Model "all-MiniLM-L6-v2" does not support matryoshka representation, '
        "changing output dimensions will lead to poor results."
    )


@pytest.mark.parametrize(
    "options",
    [{"matryoshka_dimensions": [64, 128]}, {"hf_overrides": {"matryoshka_dimensions": [64, 128]}}],
)
def test_matryoshka_sizes_by_list(llm: LLM, options: dict[str, object]) -> None:
    with LLM(**options) as small:
        (output,) = small.embed("x", pooling_params=PoolingParams(dimensions=64))
        (full,) = llm.embed("x")
        cut = full.outputs.array[:64]
        assert np.allclose(output.outputs.array, cut / np.linalg.norm(cut), atol=1e-6)
        with pytest.raises(UnsupportedDimensions, match=r"only supports \[64, 128\] matryoshka dimensions"):
            small.embed("x", pooling_params=PoolingParams(dimensions=65))


def test_the_own_width_of_a_task_changes_nothing_and_is_taken(llm: LLM) -> None:
    whole = PoolingParams(dimensions=384)
    assert np.array_equal(llm.embed_array("some text", pooling_params=whole), llm.embed_array("some text"))
    tokens = [llm.encode("two words", pooling_task="token_embed", pooling_params=params) for params in (whole, None)]
    assert np.array_equal(tokens[0][0].outputs.array, tokens[1][0].outputs.array)
    (score,), (plain,) = (llm.score("a", "b", pooling_params=params) for params in (whole, None))
    assert score.outputs.score == plain.outputs.score
    with pytest.raises(InvalidRequest, match="is not supported by this model"):
        llm.classify("a", pooling_params=whole)
    # Two poolings side by side are twice as wide as the vectors of tokens.
    with LLM(pooler_config={"seq_pooling_type": "CLS+MEAN"}) as wide:
        for task, own, other in (("embed", 768, 384), ("token_embed", 384, 768)):
            (answer,) = wide.encode("a", pooling_task=task, pooling_params=PoolingParams(dimensions=own))
            assert answer.outputs.array.shape[-1] == own
            with pytest.raises(UnsupportedDimensions):
                wide.encode("a", pooling_task=task, pooling_params=PoolingParams(dimensions=other))


def test_matryoshka_of_any_size() -> None:
    with LLM(hf_overrides={"is_matryoshka": True}) as small:
        assert small.embed_array("x", pooling_params=PoolingParams(dimensions=7)).shape == (1, 7)
        for wrong in (0, 385):
            with pytest.raises(UnsupportedDimensions):
                small.embed("x", pooling_params=PoolingParams(dimensions=wrong))


def test_parameters_may_name_the_task_but_not_another_one(llm: LLM) -> None:
    (named,) = llm.encode("hello", PoolingParams(task="token_embed"))
    assert named.outputs.array.ndim == 2
    assert len(llm.embed("hello", pooling_params=[PoolingParams(task="embed")])) == 1
    with pytest.raises(InvalidRequest, match="You cannot overwrite task='token_embed' of pooling_params with 'embed'"):
        llm.embed("hello", pooling_params=PoolingParams(task="token_embed"))
    with pytest.raises(UnsupportedTask, match="Unsupported task: 'classify'"):
        llm.encode("hello", PoolingParams(task="classify"))


def test_the_pooler_configs_task_is_the_first_of_all_that_are_served() -> None:
    with LLM(pooler_config={"task": "token_embed"}) as llm:
        assert llm.engine.facts.tasks == ("token_embed", "embed")


def test_the_users_pooler_config_wins_over_the_files(llm: LLM) -> None:
    with LLM(pooler_config={"pooling_type": "CLS", "use_activation": False}) as other:
        rows = llm.encode("hello world", PoolingParams(use_activation=False), pooling_task="token_embed")
        assert np.allclose(other.embed("hello world")[0].outputs.array, rows[0].outputs.array[0], atol=1e-5)


def test_wrong_calls_say_what_is_possible(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="You must pass at least one prompt"):
        llm.embed([])
    with pytest.raises(InvalidRequest, match="`pooling_task` is required"):
        llm.encode("x")
    with pytest.raises(UnsupportedTask, match=r"Supported tasks: \['embed', 'token_embed'\]"):
        llm.encode("x", pooling_task="classify")
    with pytest.raises(InvalidRequest, match="Did you mean 'token_embed'"):
        llm.encode("x", pooling_task="token_embeds")
    with pytest.raises(InvalidRequest, match="2 entries for 1 prompts"):
        llm.embed("x", pooling_params=[PoolingParams(), PoolingParams()])
    with pytest.raises(InvalidRequest, match="dimensions must be an integer"):
        PoolingParams(dimensions="many")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'max_model_len'"):
        LLM(max_model_length=3)


def test_async_twins_share_the_engine_with_threads(llm: LLM) -> None:
    texts = [f"question {n}" for n in range(50)]
    expected = llm.embed_array(texts)

    async def ask() -> list[np.ndarray]:
        outputs = await asyncio.gather(*(llm.embed_async(text) for text in texts))
        return [output[0].outputs.array for output in outputs]

    results: list[list[np.ndarray]] = []
    threads = [threading.Thread(target=lambda: results.append(asyncio.run(ask()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 3
    for result in results:
        assert np.allclose(np.stack(result), expected, atol=1e-5)


TWINS = [
    ("embed", 6),
    ("embed_sparse", 7),
    ("embed_tokens", 8),
    ("embed_chunks", 9),
    ("encode", 8),
    ("classify", 7),
    ("token_classify", 6),
    ("score", 10),
]


@pytest.mark.parametrize(("name", "options"), TWINS)
def test_an_async_twin_has_the_options_of_its_method_but_progress(llm: LLM, name: str, options: int) -> None:
    method, twin = getattr(LLM, name), getattr(LLM, f"{name}_async")
    ours = inspect.signature(method)
    known = dict(ours.parameters)
    assert known.pop("use_tqdm").default is True
    assert list(inspect.signature(twin).parameters.values()) == list(known.values())
    assert sum(parameter.default is not inspect.Parameter.empty for parameter in known.values()) == options
    assert ours.return_annotation == inspect.signature(twin).return_annotation
    assert not str(ours.return_annotation).startswith(("Call", "Described"))
    assert (twin.__qualname__, twin.__module__) == (f"LLM.{name}_async", method.__module__)
    assert inspect.iscoroutinefunction(twin)
    assert f"`{name}` for coroutines" in (twin.__doc__ or "")
    texts = ("a", "b") if name == "score" else ("a",)
    with pytest.raises(TypeError, match=rf"LLM\.{name}\(\) got an unexpected keyword argument 'promt_name'"):
        getattr(llm, name)(*texts, promt_name="query")
    for wrong in ("promt_name", "use_tqdm"):
        with pytest.raises(TypeError, match=rf"LLM\.{name}_async\(\) got an unexpected keyword argument '{wrong}'"):
            asyncio.run(getattr(llm, f"{name}_async")(*texts, **{wrong: "query"}))


def test_threads_may_share_several_models(llm: LLM) -> None:
    texts = [f"question {n} " + "word " * (n % 9) for n in range(60)]
    with LLM(pooler_config={"pooling_type": "CLS"}) as other:
        models = (llm, other)
        expected = [model.embed_array(texts) for model in models]
        assert not np.allclose(*expected, atol=1e-2)
        worst: list[float] = []

        def ask(number: int) -> None:
            for index in range(number, len(texts), 6):
                for model, matrix in zip(models, expected, strict=True):
                    worst.append(float(np.abs(model.embed_array(texts[index])[0] - matrix[index]).max()))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(worst) == 120
    assert max(worst) < 1e-5
    assert llm.embed_array("the first still answers").shape == (1, 384)
    with pytest.raises(EngineClosed):
        other.embed("the second is closed")


def test_a_cancelled_coroutine_takes_its_prompts_out_of_the_queue(llm: LLM) -> None:
    submitted: list[Future[Answer]] = []
    submit = llm.engine.submit

    def watched(requests: Sequence[Request]) -> list[Future[Answer]]:
        futures = submit(requests)
        submitted.extend(futures)
        return futures

    async def give_up() -> None:
        asking = asyncio.ensure_future(llm.embed_async(["word " * 200] * 600))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    llm.engine.submit = watched  # type: ignore[method-assign]
    try:
        asyncio.run(give_up())
    finally:
        del llm.engine.submit
    assert sum(future.cancelled() for future in submitted) > 300
    assert llm.embed_array("and on it goes").shape == (1, 384)


def test_progress_is_shown_when_there_is_enough_to_wait_for(llm: LLM) -> None:
    seen: list[object] = []

    def progress(futures: list[object], total: int, desc: str) -> list[object]:
        seen.extend((total, desc))
        return futures

    llm.embed(["a", "b"], use_tqdm=progress)
    llm.encode("a", pooling_task="token_embed", use_tqdm=progress)
    assert seen == [2, "embed", 1, "token_embed"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["word " * 10_000_000, "x" * 50_000_000, " " * 50_000_000, "\0" * 50_000_000])
def test_a_text_of_fifty_megabytes_is_refused_or_cut_at_once(llm: LLM, text: str, side: Any) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match="contains 50000000 characters"):
        llm.embed(text)
    (output,) = llm.embed(text, pooling_params=PoolingParams(truncate_prompt_tokens=-1, truncation_side=side))
    assert output.truncated
    assert output.original_is_estimate
    assert len(output.prompt_token_ids) <= 256
    # Tokenising all of it takes tens of seconds.
    assert time.perf_counter() - started < 8


def test_strange_characters_are_answered_or_refused_by_name(llm: LLM) -> None:
    for text in ("", "\0", "a\0b", "\ufeff\u202e", "e\u0301", "👩‍👩‍👧"):
        assert llm.embed_array(text).shape == (1, 384)
    with pytest.raises(InvalidRequest, match="no valid Unicode"):
        llm.embed(["fine", "a\ud800b"])


def test_a_pooler_config_may_ask_for_pieces_and_limit_their_sum() -> None:
    config = {"enable_chunked_processing": True, "max_embed_len": 600}
    with LLM(pooler_config=config) as llm:
        (output,) = llm.embed("word " * 500)
        assert (output.chunks, len(output.prompt_token_ids), output.truncated) == (2, 502, False)
        for prompt in ("word " * 700, [101] * 601, "word " * 1_000_000):
            with pytest.raises(InvalidRequest, match="maximum context length is 600 tokens"):
                llm.embed(prompt)
    with LLM(pooler_config={"max_embed_len": 20}) as llm, pytest.raises(InvalidRequest, match="length is 20 tokens"):
        llm.embed("word " * 30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling_params": {"dimensions": 3}}, "pooling_params must be PoolingParams"),
        ({"pooling_params": [{"dimensions": 3}]}, "pooling_params must be PoolingParams"),
        ({"prompt_name": 5}, "prompt_name must be a text or None"),
        ({"tokenization_kwargs": {"max_len": 3}}, "Did you mean 'max_length'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(llm: LLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.embed("x", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enforce_eagr": True}, "Did you mean 'enforce_eager'"),
        ({"hf_overrides": lambda config: None}, "hf_overrides must return the changed config"),
        ({"hf_overrides": {"matryoshka_dimensions": "wide"}}, "'wide' is not a whole number from 1 to 384"),
        ({"pooler_config": {"use_activation": "yes"}}, "pooler_config: use_activation must be true, false or null"),
        ({"pooler_config": {"dimensions": 1000}}, "pooler_config: dimensions must be from 1 to 384, got 1000"),
        ({"pooler_config": {"task": "classify"}}, "task: Unsupported task: 'classify' Supported tasks"),
        ({"pooler_config": {"max_embed_len": 0}}, "max_embed_len must be at least 1"),
        ({"pooler_config": {"pooling_typ": "CLS"}}, "Did you mean 'pooling_type'"),
    ],
)
def test_options_that_cannot_be_honoured_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(**options)


def test_importing_poolhouse_draws_in_neither_torch_nor_transformers() -> None:
    code = "import sys, poolhouse; assert not {'torch', 'transformers', 'starlette'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_serving_a_native_family_draws_in_no_transformers() -> None:
    code = (
        "import sys; from poolhouse import LLM; llm = LLM(); llm.embed('x'); llm.close(); "
        "assert not {'transformers', 'sentence_transformers', 'scipy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
