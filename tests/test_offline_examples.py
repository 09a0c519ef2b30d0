"""The offline examples that users of vLLM's pooling models know, with its import replaced, on tiny checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

from poolhouse import LLM, PoolingParams, UnsupportedDimensions, UnsupportedTask
from tests.inputs.test_tokenizer import train_sentencepiece
from tests.models.embedding_rows import DECODER, PLAIN_DECODER, ROBERTA, ROWS
from tests.models.hub_layout import Hub, write, write_modules, write_tokenizer
from tests.models.parity import change_config, texts
from tests.models.test_internlm import save_internlm2
from tests.models.test_task_adapters import save_v3

# Both sides add the same float32 numbers in another order.
TOLERANCE = 1e-4
HELLO = "Hello, my name is"
E5 = ROWS["intfloat/e5-small-v2, e5-base"]
CLASSIFIER = Hub(
    "Qwen2ForSequenceClassification",
    "Qwen2",
    PLAIN_DECODER | {"num_labels": 2},
    head="ForSequenceClassification",
    ends=(False, False),
    tokenizer="qwen",
    pooling=None,
)
RERANKER = Hub(
    "XLMRobertaForSequenceClassification",
    "XLMRoberta",
    ROBERTA | {"num_labels": 1},
    head="ForSequenceClassification",
    tokenizer="unigram",
    pooling=None,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models lie under the working folder by their names on the hub."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_embed() -> None:
    write(E5, Path("intfloat/e5-small"), Path("twin"))
    llm = LLM(model="intfloat/e5-small", runner="pooling")
    (output,) = llm.embed("Hello, my name is")
    embeds = output.outputs.embedding
    assert f"Embeddings: {embeds!r} (size={len(embeds)})".endswith("(size=32)")
    assert embeds == pytest.approx(SentenceTransformer("twin", device="cpu").encode(HELLO).tolist(), abs=TOLERANCE)
    llm.close()


def test_classify() -> None:
    write(CLASSIFIER, Path("jason9693/Qwen2.5-1.5B-apeach"), Path("twin"))
    llm = LLM(model="jason9693/Qwen2.5-1.5B-apeach", runner="pooling")
    (output,) = llm.classify("Hello, my name is")
    probs = output.outputs.probs
    assert f"Class Probabilities: {probs!r} (size={len(probs)})".endswith("(size=2)")
    model = transformers.Qwen2ForSequenceClassification.from_pretrained("twin").eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([output.prompt_token_ids])).logits[0]
    # A converted classifier takes the last token and gives probabilities.
    assert probs == pytest.approx(logits.softmax(-1).tolist(), abs=TOLERANCE)
    assert llm.engine.facts.tasks == ("classify", "token_classify")
    llm.close()


def test_score() -> None:
    write(RERANKER, Path("BAAI/bge-reranker-v2-m3"), Path("twin"))
    llm = LLM(model="BAAI/bge-reranker-v2-m3", runner="pooling")
    (output,) = llm.score("What is the capital of France?", "The capital of Brazil is Brasilia.")
    score = output.outputs.score
    pair = ("What is the capital of France?", "The capital of Brazil is Brasilia.")
    expected = float(CrossEncoder("twin", device="cpu").predict([pair])[0])
    assert score == pytest.approx(expected, abs=TOLERANCE)
    assert 0.001 < score < 0.999
    llm.close()


def test_reward(here: Path) -> None:
    llama, internlm2 = save_internlm2(here, {"vocab_size": 400})
    train_sentencepiece(internlm2 / "tokenizer", 400, model_type="bpe", byte_fallback=True)
    (internlm2 / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", null]}, "bos_token": "<s>", '
        '"tokenizer_class": "InternLM2Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": true}'
    )
    (here / "internlm").mkdir()
    internlm2.rename(here / "internlm/internlm2-1_8b-reward")
    llm = LLM(model="internlm/internlm2-1_8b-reward", runner="pooling", trust_remote_code=True)
    (output,) = llm.reward("Hello, my name is")
    data = output.outputs.data
    assert f"Data: {data!r}".startswith("Data: tensor([[")
    model = transformers.LlamaModel.from_pretrained(llama).eval()
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
    # The checkpoint's v_head is a row of ones.
    expected = hidden.sum(1, keepdim=True)
    assert data.shape == expected.shape
    assert float((data - expected.sigmoid()).abs().max()) < TOLERANCE
    (logits,) = llm.reward("Hello, my name is", pooling_params=PoolingParams(use_activation=False))
    assert float((logits.outputs.data - expected).abs().max()) < TOLERANCE * float(expected.abs().max())
    llm.close()


def test_encode() -> None:
    write(E5, Path("intfloat/e5-small"), Path("twin"))
    llm = LLM(model="intfloat/e5-small", runner="pooling")
    (output,) = llm.encode("Hello, my name is", pooling_task="embed")
    data = output.outputs.data
    assert f"Data: {data!r}".startswith("Data: tensor([")
    assert np.abs(data.numpy() - SentenceTransformer("twin", device="cpu").encode(HELLO)).max() < TOLERANCE
    llm.close()


def test_the_former_task_encode_means_a_row_per_token() -> None:
    write(E5, Path("intfloat/e5-small"), Path("twin"))
    write(CLASSIFIER, Path("classifier"), Path("other"))
    for model, meant in (("intfloat/e5-small", "token_embed"), ("classifier", "token_classify")):
        with LLM(model=model, runner="pooling") as llm:
            with pytest.warns(DeprecationWarning, match=f"use `{meant}`"):
                (former,) = llm.encode(HELLO, pooling_task="encode")
            (today,) = llm.encode(HELLO, pooling_task=meant)
            assert torch.equal(former.outputs.data, today.outputs.data)
            assert len(today.outputs.data) == len(today.prompt_token_ids)


def test_matryoshka(here: Path) -> None:
    answers = save_v3(here, hidden_size=64, vocab_size=300)
    (here / "jinaai").mkdir()
    folder = (here / "v3").rename(here / "jinaai/jina-embeddings-v3")
    change_config(folder, matryoshka_dimensions=[32, 64], auto_map={"AutoModel": "elsewhere--modeling.XLMRobertaLoRA"})
    write_tokenizer(folder, "unigram", (True, True))
    write_modules(folder, 64, Hub("", "", {}, pooling="mean"))
    llm = LLM(model="jinaai/jina-embeddings-v3", runner="pooling", trust_remote_code=True)
    outputs = llm.embed(["Follow the white rabbit."], pooling_params=PoolingParams(dimensions=32))
    assert str(outputs[0].outputs) == "EmbeddingOutput(hidden_size=32)"
    for task, prompts in answers.items():
        got = llm.embed_array(
            [text.ids.tolist() for text in texts()],
            pooling_params=PoolingParams(dimensions=32),
            lora_request=task,
        )
        expected = torch.stack([F.normalize(rows.mean(0)[:32], dim=0) for rows in prompts])
        assert float(np.abs(got - expected.numpy()).max()) < TOLERANCE
    with pytest.raises(UnsupportedDimensions, match=r"only supports \[32, 64\]"):
        llm.embed("x", pooling_params=PoolingParams(dimensions=33))
    llm.close()


def test_matryoshka_by_hand(here: Path) -> None:
    snowflake = ROWS["Snowflake/snowflake-arctic-embed-m-v1.5"]
    wide = dataclasses.replace(snowflake, options={**snowflake.options, "hidden_size": 512})
    write(wide, Path("Snowflake/snowflake-arctic-embed-m-v1.5"), Path("twin"))
    whole = SentenceTransformer("twin", device="cpu").encode(HELLO)
    name = "Snowflake/snowflake-arctic-embed-m-v1.5"
    with LLM(model=name, hf_overrides={"matryoshka_dimensions": [256]}) as llm:
        (output,) = llm.embed(HELLO, pooling_params=PoolingParams(dimensions=256))
        assert np.abs(output.outputs.array - whole[:256] / np.linalg.norm(whole[:256])).max() < TOLERANCE
        with pytest.raises(UnsupportedDimensions, match=r"only supports \[256\]"):
            llm.embed(HELLO, pooling_params=PoolingParams(dimensions=128))
    with LLM(model=name, hf_overrides={"is_matryoshka": True}) as llm:
        (output,) = llm.embed(HELLO, pooling_params=PoolingParams(dimensions=100))
        assert np.abs(output.outputs.array - whole[:100] / np.linalg.norm(whole[:100])).max() < TOLERANCE


@pytest.mark.parametrize("override", [None, {"architectures": ["BgeM3EmbeddingModel"]}])
def test_bge_m3_answers_with_and_without_its_override(override: Any, here: Path) -> None:
    write(ROWS["BAAI/bge-m3 (dense)"], Path("BAAI/bge-m3"), Path("twin"))
    torch.manual_seed(0)
    sparse, vectors = (torch.nn.Linear(32, width).state_dict() for width in (1, 32))
    torch.save(sparse, here / "BAAI/bge-m3/sparse_linear.pt")
    torch.save(vectors, here / "BAAI/bge-m3/colbert_linear.pt")
    llm = LLM(model="BAAI/bge-m3", runner="pooling", hf_overrides=override)
    reference = SentenceTransformer("twin", device="cpu")
    hidden = reference.encode(HELLO, output_value="token_embeddings")
    (output,) = llm.embed(HELLO)
    assert output.outputs.embedding == pytest.approx(reference.encode(HELLO).tolist(), abs=TOLERANCE)
    (weights,) = llm.encode(HELLO, pooling_task="token_classify")
    expected = F.linear(hidden[1:-1], sparse["weight"], sparse["bias"]).relu()[:, 0]
    assert torch.allclose(weights.outputs.data, expected, atol=TOLERANCE)
    (many,) = llm.encode(HELLO, pooling_task="token_embed")
    expected = F.normalize(F.linear(hidden[1:], vectors["weight"], vectors["bias"]), dim=-1)
    assert torch.allclose(many.outputs.data, expected, atol=TOLERANCE)
    with pytest.raises(UnsupportedDimensions) as refused:
        llm.embed(HELLO, pooling_params=PoolingParams(dimensions=16))
    assert str(refused.value) == (
        'Model "BAAI/bge-m3" does not support matryoshka representation, '
        "changing output dimensions will lead to poor results."
    )
    llm.close()


EMBEDS, CLASSIFIES = ("embed", "token_embed"), ("classify", "token_classify")


@pytest.mark.parametrize(
    ("architecture", "tasks"),
    [
        *((f"Llama{ending}", EMBEDS) for ending in ("ForTextEncoding", "EmbeddingModel", "Model")),
        *((f"Llama{ending}", EMBEDS) for ending in ("ForRewardModeling", "RewardModel")),
        *((f"Llama{ending}", CLASSIFIES) for ending in ("ForSequenceClassification", "ClassificationModel")),
        *((f"LlamaFor{medium}Classification", CLASSIFIES) for medium in ("Audio", "Image", "Video")),
        ("LlamaForTokenClassification", ("token_classify",)),
    ],
)
def test_the_architectures_name_tells_how_a_model_is_converted(
    architecture: str, tasks: tuple[str, ...], here: Path
) -> None:
    options = DECODER | {"num_labels": 3}
    write(Hub(architecture, "Llama", options, head="ForSequenceClassification", pooling=None), here / "m", here / "t")
    model = transformers.LlamaForSequenceClassification.from_pretrained(here / "t").eval()
    with LLM(model="m", runner="pooling") as llm:
        assert llm.engine.facts.tasks == tasks
        if tasks == EMBEDS:
            (embedded,) = llm.embed(HELLO)
            with torch.inference_mode():
                last = model.model(input_ids=torch.tensor([embedded.prompt_token_ids])).last_hidden_state[0, -1]
            assert embedded.outputs.embedding == pytest.approx(F.normalize(last, dim=0).tolist(), abs=TOLERANCE)
            with pytest.raises(UnsupportedTask, match=r"\['embed', 'token_embed'\]"):
                llm.encode(HELLO, pooling_task="classify")
            return
        (rows,) = llm.encode(HELLO, pooling_task="token_classify")
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.tensor([rows.prompt_token_ids])).last_hidden_state[0]
            expected = model.score(hidden).softmax(-1)
        assert torch.allclose(rows.outputs.data, expected, atol=TOLERANCE)
        if "classify" in tasks:
            assert llm.classify(HELLO)[0].outputs.probs == pytest.approx(expected[-1].tolist(), abs=TOLERANCE)
