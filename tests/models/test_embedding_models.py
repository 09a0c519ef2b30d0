"""Embedding models of the hub, from text to vector, against sentence-transformers or an independent definition."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.outputs import Array
from tests.models.embedding_rows import DECODER, PLAIN_DECODER, ROWS, STELLA_PROMPTS
from tests.models.hub_layout import TEXTS, Hub, prefixed, random_tensor, write, write_modules, write_tokenizer
from tests.models.parity import Parity, Record, change_config, change_tensors
from tests.models.written_out import jina_v2, nomic_with_experts

# Both sides add the same float32 numbers in another order, over at most four layers.
TOLERANCE = 1e-4


def repository(tmp_path: Path, row: str) -> Path:
    """A folder named after the first example of a row."""
    return tmp_path / re.split(r"[,(]", row, maxsplit=1)[0].strip().rpartition("/")[2]


@pytest.mark.parametrize("row", ROWS)
def test_vectors_are_those_of_sentence_transformers(row: str, tmp_path: Path, record_parity: Record) -> None:
    hub, folder, twin = ROWS[row], repository(tmp_path, row), tmp_path / "twin"
    write(hub, folder, twin)
    reference = SentenceTransformer(str(twin), device="cpu")
    with LLM(str(folder), dtype="float32", device="cpu", overflow="truncate") as llm:
        for name in ("", *hub.prompts):
            # One text at a time: the reference shall not depend on padding.
            expected = reference.encode(TEXTS, batch_size=1, prompt=hub.prompts.get(name, ""))
            got = llm.embed_array(TEXTS, prompt_name=name, use_tqdm=False)
            alone = np.concatenate([llm.embed_array(text, prompt_name=name, use_tqdm=False) for text in TEXTS])
            error, packing_error = difference(got, expected), difference(got, alone)
            assert error < TOLERANCE
            assert packing_error < TOLERANCE
            assert cosines(got, expected).min() > 0.9999
        record_parity(
            Parity(
                row, llm.model.facts.served_by, "sentence-transformers", error, packing_error,
                architecture=hub.architecture, tasks=llm.model.tasks, examples=row if "/" in row else "",
            )
        )  # fmt: skip
    # A model that forgets its text would pass all of the above.
    assert cosines(got[:1], got[1:]).max() < 0.999


def difference(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def cosines(got: Array, expected: Array) -> Array:
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    return np.asarray((got * expected).sum(1) / norms)


def write_random(
    folder: Path, hub: Hub, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """A repository of an architecture that transformers does not have; returns its tensors."""
    vocabulary = write_tokenizer(folder, hub.tokenizer, hub.ends)
    (folder / "config.json").write_text(json.dumps({"architectures": [hub.architecture], **config}))
    torch.manual_seed(0)
    tensors = {name: random_tensor(name, shape or (vocabulary, 32)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    if hub.pooling is not None:
        write_modules(folder, 32, hub)
    return tensors


def check_written_out(folder: Path, row: str, hidden: Callable[[Tensor], Tensor], record_parity: Record) -> LLM:
    """Mean pooling of hidden states that were written out, against the model as it is served."""
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        outputs = llm.embed(TEXTS, use_tqdm=False)
        got = np.array([output.outputs.embedding for output in outputs])
        ids = [torch.tensor(output.prompt_token_ids) for output in outputs]
        expected = np.stack([F.normalize(hidden(text).mean(0), dim=0).numpy() for text in ids])
        alone = np.concatenate([llm.embed_array(text, use_tqdm=False) for text in TEXTS])
    facts = llm.model.facts
    error, packing_error = difference(got, expected), difference(got, alone)
    record_parity(
        Parity(
            row, facts.served_by, "written out in the tests", error, packing_error,
            architecture=facts.architecture, tasks=llm.model.tasks, examples=row,
        )
    )  # fmt: skip
    assert error < TOLERANCE
    assert packing_error < TOLERANCE
    assert cosines(got[:1], got[1:]).max() < 0.999
    return llm


MOE = {
    "model_type": "nomic_bert", "activation_function": "gelu", "rotary_emb_base": 10000, "moe_every_n_layers": 2,
    "num_experts": 8, "moe_top_k": 2, "expert_choice_router": False, "moe_normalize_expert_weights": False,
    "num_shared_experts": 0, "n_embd": 32, "n_head": 4, "n_layer": 4, "n_inner": 48, "n_positions": 2048,
    "max_trained_positions": 2048, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "prenorm": False,
    "layer_norm_epsilon": 1e-12, "type_vocab_size": 1,
}  # fmt: skip


def moe_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (), "embeddings.token_type_embeddings.weight": (1, 32),
        "emb_ln.weight": (32,), "emb_ln.bias": (32,),
    }  # fmt: skip
    for layer in range(4):
        here = f"encoder.layers.{layer}."
        shapes |= {here + "attn.Wqkv.weight": (96, 32), here + "attn.Wqkv.bias": (96,)}
        shapes |= {here + "attn.out_proj.weight": (32, 32), here + "attn.out_proj.bias": (32,)}
        shapes |= {f"{here}norm{n}.{kind}": (32,) for n in (1, 2) for kind in ("weight", "bias")}
        if layer % 2:
            shapes |= {here + "mlp.router.layer.weight": (8, 32), here + "mlp.experts.bias": (32,)}
            shapes |= {f"{here}mlp.experts.mlp.{name}": (8 * 48, 32) for name in ("w1", "w2")}
        else:
            shapes |= {here + "mlp.fc1.weight": (48, 32), here + "mlp.fc1.bias": (48,)}
            shapes |= {here + "mlp.fc2.weight": (32, 48), here + "mlp.fc2.bias": (32,)}
    return shapes


def test_nomics_experts_are_those_of_its_card(tmp_path: Path, record_parity: Record) -> None:
    hub = Hub("NomicBertModel", "", {}, tokenizer="unigram", pooling="mean")
    folder = tmp_path / "nomic-embed-text-v2-moe"
    tensors = write_random(folder, hub, MOE, moe_shapes())

    def hidden(ids: Tensor) -> Tensor:
        return nomic_with_experts(tensors, ids, heads=4, theta=10000.0, chosen=2)

    llm = check_written_out(folder, "nomic-ai/nomic-embed-text-v2-moe", hidden, record_parity)
    assert llm.model.facts.served_by == "native nomic_bert, packed"


@pytest.mark.parametrize("lost", ["mlp.router.layer.weight", "mlp.experts.mlp.w2", "mlp.fc1.weight", "mlp.fc1.bias"])
def test_a_lost_part_of_experts_is_an_error(lost: str, tmp_path: Path) -> None:
    shapes = moe_shapes()
    del shapes[f"encoder.layers.{'1' if 'fc1' not in lost else '2'}.{lost}"]
    write_random(tmp_path, Hub("NomicBertModel", "", {}, tokenizer="unigram"), MOE, shapes)
    with pytest.raises(CheckpointError, match=r"asks for|in some layers but not in"):
        LLM(str(tmp_path), device="cpu")


@pytest.mark.parametrize("heads", [4, 6])
def test_jina_v2_is_written_out(heads: int, tmp_path: Path, record_parity: Record) -> None:
    """The hub's config calls itself bert; without sentence-transformers' files its emb_pooler says how to pool."""
    width = 8 * heads
    config = {
        "model_type": "bert", "position_embedding_type": "alibi", "feed_forward_type": "geglu", "emb_pooler": "mean",
        "hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2, "intermediate_size": 40,
        "max_position_embeddings": 8192, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (300, width), "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width), "pooler.dense.bias": (width,),
        "embeddings.LayerNorm.weight": (width,), "embeddings.LayerNorm.bias": (width,),
    }  # fmt: skip
    for layer in range(2):
        here = f"encoder.layer.{layer}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= {f"{here}attention.{name}.weight": (width, width), f"{here}attention.{name}.bias": (width,)}
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{here}{name}.weight": (width,), f"{here}{name}.bias": (width,)}
        shapes |= {here + "mlp.gated_layers.weight": (80, width)}
        shapes |= {here + "mlp.wo.weight": (width, 40), here + "mlp.wo.bias": (width,)}
    hub = Hub("JinaBertForMaskedLM", "", {}, tokenizer="wordpiece", pooling=None)
    tensors = write_random(tmp_path / "jina", hub, config, shapes)
    row = f"jinaai/jina-embeddings-v2-base-en, {heads} heads"
    llm = check_written_out(tmp_path / "jina", row, lambda ids: jina_v2(tensors, ids, heads), record_parity)
    assert llm.model.facts.max_tokens == 512
    assert llm.model.pipelines["embed"].description.startswith("mean")


@pytest.mark.parametrize("named", ["architectures", "auto_map", "num_labels"])
def test_voyage_projects_every_token(named: str, tmp_path: Path, record_parity: Record) -> None:
    """A matrix before the mean is one after it, and that is how sentence-transformers is told of it."""
    hub = Hub(
        "VoyageQwen3BidirectionalEmbedModel", "Qwen3", DECODER | {"is_causal": False}, pooling="mean",
        dense=((32, 64),), ends=(False, True), tensors=prefixed("model."),
        prompts={"query": "Represent the query for retrieving supporting documents: "},
    )  # fmt: skip
    folder, twin = tmp_path / "voyage-4-nano", tmp_path / "twin"
    write(hub, folder, twin)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([module for module in modules if "Dense" not in module["type"]]))
    weight = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
    change_tensors(folder, add={"linear.weight": weight})
    names = {
        "architectures": {},
        "auto_map": {"architectures": ["Qwen3Model"], "auto_map": {"AutoModel": "modeling.Qwen3BidirectionalModel"}},
        "num_labels": {"architectures": ["Qwen3Model"]},
    }
    change_config(folder, is_causal=None, num_labels=64, **names[named])
    reference = SentenceTransformer(str(twin), device="cpu")
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        expected = reference.encode(TEXTS, batch_size=1, prompt=hub.prompts["query"])
        got = llm.embed_array(TEXTS, prompt_name="query", use_tqdm=False)
        alone = np.concatenate([llm.embed_array(text, prompt_name="query", use_tqdm=False) for text in TEXTS])
        facts = llm.model.facts
    assert (facts.sizes.hidden_size, facts.width) == (64, 64)
    parity = Parity(
        f"voyageai/voyage-4-nano, named by {named}", facts.served_by, "sentence-transformers", difference(got, expected),
        difference(got, alone), architecture=facts.architecture, tasks=llm.model.tasks,
        examples="voyageai/voyage-4-nano",
    )  # fmt: skip
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


def test_the_text_part_of_embedding_gemma_2_is_served(tmp_path: Path, record_parity: Record) -> None:
    """Each token is projected inside the model; without sentence-transformers' files the mean is taken."""
    import transformers

    vocabulary = write_tokenizer(tmp_path, "bpe", (True, True))
    text = transformers.EmbeddingGemma2TextConfig(
        **{key: value for key, value in DECODER.items() if key != "max_position_embeddings"},
        vocab_size=vocabulary, global_head_dim=16, sliding_window=8, sliding_window_pattern=2,
        hidden_size_per_layer_input=8, embedding_dim=24, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    # Tokens of other media have ids of their own, which no text holds.
    media = dict.fromkeys(("image_token_id", "video_token_id", "audio_token_id"), vocabulary)
    model = transformers.EmbeddingGemma2Model(transformers.EmbeddingGemma2Config(text_config=text, **media)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    model.save_pretrained(tmp_path)
    with LLM(str(tmp_path), dtype="float32", device="cpu") as llm:
        outputs = llm.embed(TEXTS, use_tqdm=False)
        got = np.array([output.outputs.embedding for output in outputs])
        alone = np.concatenate([llm.embed_array(text, use_tqdm=False) for text in TEXTS])
        facts = llm.model.facts
        with torch.inference_mode():
            rows = [model(input_ids=torch.tensor([output.prompt_token_ids])).last_hidden_state[0] for output in outputs]
    expected = np.stack([F.normalize(row.mean(0), dim=0).numpy() for row in rows])
    parity = Parity(
        "EmbeddingGemma 2, its text part", facts.served_by, "transformers", difference(got, expected),
        difference(got, alone), architecture=facts.architecture, tasks=llm.model.tasks,
    )  # fmt: skip
    record_parity(parity)
    assert facts.width == 24
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE
    assert cosines(got[:1], got[1:]).max() < 0.999


def test_stellas_dense_is_the_one_that_modules_json_names(tmp_path: Path, record_parity: Record) -> None:
    """The repository has a folder for each width, 2_Dense_256 to 2_Dense_8192; a Qwen2 whose tokens see both sides."""
    hub = Hub(
        "Qwen2ForCausalLM", "Qwen2", PLAIN_DECODER | {"is_causal": False}, head="ForCausalLM", tokenizer="qwen",
        pooling="mean", dense=((32, 48),), normalize=False, prompts=STELLA_PROMPTS,
        config={"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}},
    )  # fmt: skip
    folder, twin = tmp_path / "stella_en_1.5B_v5", tmp_path / "twin"
    write(hub, folder, twin)
    (folder / "2_Dense").rename(folder / "2_Dense_1024")
    (folder / "2_Dense_256").mkdir()
    save_file({"linear.weight": torch.randn(8, 32)}, folder / "2_Dense_256" / "model.safetensors")
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace('"2_Dense"', '"2_Dense_1024"'))
    reference = SentenceTransformer(str(twin), device="cpu")
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        expected = reference.encode(TEXTS, batch_size=1, prompt=STELLA_PROMPTS["s2p_query"])
        got = llm.embed_array(TEXTS, prompt_name="s2p_query", use_tqdm=False)
        alone = np.concatenate([llm.embed_array(text, prompt_name="s2p_query", use_tqdm=False) for text in TEXTS])
        parity = Parity(
            "NovaSearch/stella_en_1.5B_v5", llm.model.facts.served_by, "sentence-transformers",
            difference(got, expected), difference(got, alone), architecture=llm.model.facts.architecture,
            tasks=llm.model.tasks, examples="NovaSearch/stella_en_1.5B_v5",
        )  # fmt: skip
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


def test_vllms_override_for_gte_changes_nothing(tmp_path: Path) -> None:
    row = "Alibaba-NLP/gte-multilingual-base"
    folder = repository(tmp_path, row)
    write(ROWS[row], folder, tmp_path / "twin")
    expected = SentenceTransformer(str(tmp_path / "twin"), device="cpu").encode(TEXTS, batch_size=1)
    with LLM(str(folder), hf_overrides={"architectures": ["GteNewModel"]}, dtype="float32", device="cpu") as llm:
        assert difference(llm.embed_array(TEXTS, use_tqdm=False), expected) < TOLERANCE
