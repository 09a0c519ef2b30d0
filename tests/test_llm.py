"""The LLM class on the embedded model and on tiny checkpoints."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from poolhouse import LLM, ConfigError, InvalidRequest, PoolingParams, UnsupportedDimensions, UnsupportedTask


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


def test_matryoshka_of_any_size() -> None:
    with LLM(hf_overrides={"is_matryoshka": True}) as small:
        assert small.embed_array("x", pooling_params=PoolingParams(dimensions=7)).shape == (1, 7)
        for wrong in (0, 385):
            with pytest.raises(UnsupportedDimensions):
                small.embed("x", pooling_params=PoolingParams(dimensions=wrong))


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


def test_importing_poolhouse_draws_in_neither_torch_nor_transformers() -> None:
    code = "import sys, poolhouse; assert not {'torch', 'transformers', 'fastapi'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_serving_a_native_family_draws_in_no_transformers() -> None:
    code = (
        "import sys; from poolhouse import LLM; llm = LLM(); llm.embed('x'); llm.close(); "
        "assert not {'transformers', 'sentence_transformers', 'scipy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
