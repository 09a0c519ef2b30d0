"""What embedding models of the hub say about themselves, and where: Matryoshka sizes, pooling words, directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolhouse import LLM, PoolingParams, UnsupportedDimensions
from poolhouse.errors import CheckpointError
from poolhouse.models.files.model_card import published_sizes
from tests.models.embedding_rows import ROWS
from tests.models.hub_layout import TEXTS, write
from tests.models.parity import change_config
from tests.models.test_embedding_models import TOLERANCE, difference


def test_known_matryoshka_models_need_no_switch(tmp_path: Path) -> None:
    folder, twin = tmp_path / "Qwen3-Embedding-0.6B", tmp_path / "twin"
    write(ROWS["Qwen/Qwen3-Embedding-0.6B, -4B, -8B"], folder, twin)
    expected = SentenceTransformer(str(twin), device="cpu", truncate_dim=16).encode(
        TEXTS, batch_size=1, normalize_embeddings=True
    )
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        got = llm.embed_array(TEXTS, pooling_params=PoolingParams(dimensions=16), use_tqdm=False)
        assert any("model card of Qwen3-Embedding-0.6B: any length up to 32" in note for note in llm.model.facts.notes)
    assert difference(got, expected) < TOLERANCE
    # The user's word counts more, and a copy under another name is not taken for the original.
    with (
        LLM(str(folder), device="cpu", hf_overrides={"is_matryoshka": False}) as llm,
        pytest.raises(UnsupportedDimensions, match="does not support matryoshka"),
    ):
        llm.embed("a", pooling_params=PoolingParams(dimensions=16))
    with LLM(str(folder.rename(tmp_path / "my-embedder")), device="cpu") as llm:
        assert not llm.model.facts.matryoshka.supported


def test_published_sizes_go_by_the_repositorys_name() -> None:
    cache = Path("hub/models--Snowflake--snowflake-arctic-embed-m-v1.5/snapshots/0123")
    assert published_sizes(cache, 768) == (256, 768)
    assert published_sizes(Path("models/nomic-embed-text-v1.5"), 768) == (64, 128, 256, 512, 768)
    assert published_sizes(Path("models/Qwen3-Embedding-8B"), 4096) == ()
    # A model of another width is not the published one.
    assert published_sizes(Path("models/snowflake-arctic-embed-m-v1.5"), 32) is None
    assert published_sizes(Path("models/my-own"), 768) is None


def test_gte_qwen2_follows_its_config_and_says_so(tmp_path: Path) -> None:
    row = "Alibaba-NLP/gte-Qwen2-1.5B-instruct, -7B-instruct"
    folder, twin = tmp_path / "gte", tmp_path / "twin"
    write(ROWS[row], folder, twin)
    change_config(twin, is_causal=True)
    expected = SentenceTransformer(str(twin), device="cpu").encode(TEXTS, batch_size=1)
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        both_sides = llm.embed_array(TEXTS, use_tqdm=False)
        assert any("is_causal: false, so tokens see both sides" in note for note in llm.model.facts.notes)
    with LLM(str(folder), dtype="float32", device="cpu", hf_overrides={"is_causal": True}) as llm:
        causal = llm.embed_array(TEXTS, use_tqdm=False)
    assert difference(causal, expected) < TOLERANCE
    assert difference(both_sides, expected) > 0.01


def test_a_pooling_word_in_the_config_wins_over_files_but_not_over_the_user(tmp_path: Path) -> None:
    folder, twin = tmp_path / "nemotron", tmp_path / "twin"
    write(ROWS["nvidia/llama-nemotron-embed-1b-v2"], folder, twin)
    change_config(folder, pooling="last")
    with LLM(str(folder), device="cpu") as llm:
        assert llm.model.pipelines["embed"].description.startswith("last")
    with LLM(str(folder), device="cpu", pooler_config={"pooling_type": "CLS"}) as llm:
        assert llm.model.pipelines["embed"].description.startswith("cls")
    change_config(folder, pooling="colbert")
    with pytest.raises(CheckpointError, match=r"pooling is 'colbert', which is not among \['avg', 'cls'"):
        LLM(str(folder), device="cpu")


def test_norms_of_the_oldest_files_are_called_gamma_and_beta(tmp_path: Path) -> None:
    folder, twin = tmp_path / "old", tmp_path / "twin"

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            "bert." + next((name.replace(new, was) for new, was in old.items() if name.endswith(new)), name): tensor
            for name, tensor in tensors.items()
        }

    write(replace(ROWS["BAAI/bge-small-en-v1.5, bge-base-en-v1.5"], tensors=rename), folder, twin)
    assert "bert.embeddings.LayerNorm.gamma" in load_file(folder / "model.safetensors")
    expected = SentenceTransformer(str(twin), device="cpu").encode(TEXTS, batch_size=1)
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        assert difference(llm.embed_array(TEXTS, use_tqdm=False), expected) < TOLERANCE


def test_a_repository_with_broken_files_pools_as_its_card_says(tmp_path: Path) -> None:
    hub = replace(ROWS["ssmits/Qwen2-7B-Instruct-embed-base"], pooling=None)
    write(hub, tmp_path / "Qwen2-7B-Instruct-embed-base", tmp_path / "twin")
    write(hub, tmp_path / "my-own", tmp_path / "other")
    for name, pooling in (("Qwen2-7B-Instruct-embed-base", "mean"), ("my-own", "last")):
        with LLM(str(tmp_path / name), device="cpu") as llm:
            assert llm.model.pipelines["embed"].description.startswith(pooling)
