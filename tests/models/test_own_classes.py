"""Checkpoints whose own code does what their type does not: tokens that see both sides, what stands behind, how texts end.

The references are written out from the published code, which was read and not run: the model code
of nvidia/NV-Embed-v2 and perplexity-ai/pplx-embed-v1-0.6b, the package gritlm 1.0.2, the tokenizer class of gte-Qwen2.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import SentenceTransformer

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.outputs import Array
from tests.models.embedding_rows import DECODER, ROWS
from tests.models.hub_layout import TEXTS, Hub, prefixed, random_tensor, write
from tests.models.parity import Parity, Record, change_config, change_tensors, save
from tests.models.test_embedding_models import TOLERANCE, cosines, difference
from tests.models.tiny import tokenizer
from tests.models.written_out import Tensors, latent_attention

PROMPT = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
GTE = "Alibaba-NLP/gte-Qwen2-1.5B-instruct, -7B-instruct"


def check(llm: LLM, row: str, reference: str, expected: Array, record: Record, prompt: str | None = None) -> None:
    """What is answered is what was expected, packed and alone, and is a row of docs/models.md."""
    got = llm.embed_array(TEXTS, prompt_name=prompt, use_tqdm=False)
    alone = np.concatenate([llm.embed_array(text, prompt_name=prompt, use_tqdm=False) for text in TEXTS])
    parity = Parity(
        row, llm.model.facts.served_by, reference, difference(got, expected), difference(got, alone),
        architecture=llm.model.facts.architecture, tasks=llm.model.tasks, examples=row,
    )  # fmt: skip
    record(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE
    assert cosines(got[:1], got[1:]).max() < 0.999


# NV-Embed


NV_EMBED = Hub(
    "NVEmbedModel", "Mistral", DECODER | {"is_causal": False, "sliding_window": None}, ends=(True, False),
    pooling="mean", prompts={"query": PROMPT}, tensors=prefixed("embedding_model."),
)  # fmt: skip
LATENTS = "latent_attention_model."
BLOCKS = LATENTS + "cross_attend_blocks."


def nv_embed(folder: Path, twin: Path) -> Tensors:
    """The repository in `folder`; returns the tensors behind the Mistral, which alone is in `twin`."""
    write(NV_EMBED, folder, twin)
    config = json.loads((folder / "config.json").read_text())
    # A window that no text fits in: the model's own code has none.
    text = {**config, "model_type": "bidir_mistral", "architectures": ["MistralModel"], "sliding_window": 4}
    text.pop("is_causal")
    nested = {"text_config": text, "latent_attention_config": {"model_type": "latent_attention", "num_cross_heads": 2}}
    code = {"AutoConfig": "configuration_nvembed.NVEmbedConfig", "AutoModel": "modeling_nvembed.NVEmbedModel"}
    whole = {"architectures": ["NVEmbedModel"], "model_type": "nvembed", "hidden_size": 32, "auto_map": code, **nested}
    words = {
        "add_eos": True,
        "add_pad_token": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "padding_side": "right",
    }
    (folder / "config.json").write_text(json.dumps(whole | words))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>", "bos_token": "<s>"}))
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"include_prompt": False}))
    shapes = {
        LATENTS + "latents": (6, 32),
        **{f"{BLOCKS}{name}.{kind}": (32,) for name in ("0.norm", "0.norm_context", "1.norm") for kind in ("weight", "bias")},
        BLOCKS + "0.fn.to_q.weight": (16, 32), BLOCKS + "0.fn.to_kv.weight": (32, 32), BLOCKS + "0.fn.to_out.weight": (32, 16),
        BLOCKS + "1.fn.net.0.weight": (48, 32), BLOCKS + "1.fn.net.0.bias": (48,),
        BLOCKS + "1.fn.net.2.weight": (32, 24), BLOCKS + "1.fn.net.2.bias": (32,),
    }  # fmt: skip
    made = {name: random_tensor(name, shape) for name, shape in shapes.items()}
    change_tensors(folder, add=made)
    return {name.removeprefix(LATENTS): tensor for name, tensor in made.items()}


def of_nv_embed(twin: Path, latents: Tensors, ids: list[int], skip: int) -> Array:
    """The vector of one text, by transformers' Mistral and latent attention written out; skip: tokens left out."""
    model = transformers.MistralModel.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    mixed = latent_attention(latents, rows, heads=2)
    return F.normalize(mixed[skip:].mean(0), dim=0).numpy()


@pytest.mark.parametrize("prompt", ["", "query"])
def test_nv_embed_is_written_out(prompt: str, tmp_path: Path, record_parity: Record) -> None:
    folder, twin = tmp_path / "NV-Embed-v2", tmp_path / "twin"
    latents = nv_embed(folder, twin)
    theirs = transformers.AutoTokenizer.from_pretrained(twin)
    text = NV_EMBED.prompts.get(prompt, "")
    skip = len(theirs(text)["input_ids"]) if prompt else 0
    ids = [[*theirs(text + one)["input_ids"], theirs.convert_tokens_to_ids("</s>")] for one in TEXTS]
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        outputs = llm.embed(TEXTS, prompt_name=prompt, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == ids
        expected = np.stack([of_nv_embed(twin, latents, one, skip) for one in ids])
        row = "nvidia/NV-Embed-v2, NV-Embed-v1" + (", with its prompt left out of the mean" if prompt else "")
        check(llm, row, "transformers' Mistral, the rest written out", expected, record_parity, prompt)


def test_nv_embed_needs_no_files_of_sentence_transformers(tmp_path: Path) -> None:
    latents = nv_embed(tmp_path / "NV-Embed-v2", tmp_path / "twin")
    (tmp_path / "NV-Embed-v2" / "modules.json").unlink()
    with LLM(str(tmp_path / "NV-Embed-v2"), dtype="float32", device="cpu") as llm:
        (output,) = llm.embed("a b", use_tqdm=False)
        assert llm.model.pipelines["embed"].description.startswith("mean without prompt")
    expected = of_nv_embed(tmp_path / "twin", latents, output.prompt_token_ids, 0)
    assert np.abs(np.asarray(output.outputs.embedding) - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"drop": LATENTS + "latents"}, "lacks .*latents.* needs"),
        ({"drop": BLOCKS + "1.fn.net.2.weight"}, r"lacks .*net\.2"),
        ({"add": {BLOCKS + "2.norm.weight": torch.ones(32)}}, r"does not know.*cross_attend_blocks\.2\.norm"),
        ({"add": {BLOCKS + "0.fn.to_q.weight": torch.ones(12, 32)}}, "do not fit together"),
    ],
)
def test_a_spoilt_nv_embed_is_refused(spoil: dict[str, Any], message: str, tmp_path: Path) -> None:
    nv_embed(tmp_path / "nv", tmp_path / "twin")
    change_tensors(tmp_path / "nv", **spoil)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(tmp_path / "nv"), device="cpu")


# Code beside a plain type


OWN = {
    "Kingsoft-LLM/QZhou-Embedding": replace(
        ROWS["a bidirectional Qwen2"],
        architecture="QZhouModel",
        config={"is_causal": None, "auto_map": {"AutoModel": "modeling_qzhou.QZhouModel"}},
    ),
    "reasonir/ReasonIR-8B": Hub(
        "ReasonIRModel", "Llama", DECODER | {"is_causal": False}, pooling="mean", ends=(True, False),
        config={"is_causal": None, "auto_map": {"AutoModel": "modeling_reasonir_8b.ReasonIRModel"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", OWN)
def test_a_known_class_of_a_checkpoint_lets_tokens_see_both_sides(
    row: str, tmp_path: Path, record_parity: Record
) -> None:
    write(OWN[row], tmp_path / "own", tmp_path / "twin")
    reference = SentenceTransformer(str(tmp_path / "twin"), device="cpu")
    with LLM(str(tmp_path / "own"), dtype="float32", device="cpu") as llm:
        check(llm, row, "sentence-transformers", reference.encode(TEXTS, batch_size=1), record_parity)
        assert any("brings code of its own" in note and "was not run" in note for note in llm.model.facts.notes)


def test_gritlm_leaves_its_mark_and_instruction_out_of_the_mean(tmp_path: Path, record_parity: Record) -> None:
    """As gritlm's `encode` does: tokens see both sides, and those of the instruction are no part of the mean."""
    hub = Hub(
        "MistralForCausalLM", "Mistral", DECODER | {"is_causal": False, "sliding_window": None}, head="ForCausalLM",
        pooling=None, ends=(True, False),
        config={"is_causal": None, "auto_map": {"AutoModel": "modeling_gritlm7b.MistralModel"}},
    )  # fmt: skip
    folder, twin = tmp_path / "GritLM-7B", tmp_path / "twin"
    write(hub, folder, twin)
    theirs = transformers.AutoTokenizer.from_pretrained(twin)
    model = transformers.MistralModel.from_pretrained(twin, dtype=torch.float32).eval()
    mark = "<|embed|>\n"
    skip = len(theirs(mark)["input_ids"])
    expected = []
    for text in TEXTS:
        with torch.inference_mode():
            rows = model(input_ids=torch.tensor([theirs(mark + text)["input_ids"]])).last_hidden_state[0]
        expected.append(F.normalize(rows[skip:].mean(0), dim=0).numpy())
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        check(
            llm, "GritLM/GritLM-7B", "gritlm's formula over MistralModel", np.stack(expected), record_parity, "document"
        )


def test_perplexitys_vectors_are_whole_numbers(tmp_path: Path, record_parity: Record) -> None:
    hub = replace(
        ROWS["a bidirectional Qwen3"],
        architecture="PPLXQwen3Model",
        normalize=False,
        config={
            "is_causal": None,
            "model_type": "bidirectional_pplx_qwen3",
            "auto_map": {"AutoModel": "modeling.PPLXQwen3Model"},
        },
    )
    folder, twin = tmp_path / "pplx-embed-v1-0.6b", tmp_path / "twin"
    write(hub, folder, twin)
    modules = json.loads((folder / "modules.json").read_text())
    quantiser = {"idx": 2, "name": "2", "path": "", "type": "st_quantize.FlexibleQuantizer", "kwargs": ["quantization"]}
    (folder / "modules.json").write_text(json.dumps([*modules, quantiser]))
    means = SentenceTransformer(str(twin), device="cpu").encode(TEXTS, batch_size=1)
    expected = np.clip(np.round(np.tanh(means) * 127), -128, 127)
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        check(
            llm,
            "perplexity-ai/pplx-embed-v1-0.6b, -4b",
            "sentence-transformers, its quantiser written out",
            expected,
            record_parity,
        )
        assert (llm.embed_array(TEXTS, use_tqdm=False) == expected).all()


def test_a_class_that_transformers_would_run_causally_is_refused(tmp_path: Path) -> None:
    """LFM2's bidirectional kin: transformers' own class looks back alone, and would answer without an error."""
    options = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
        "intermediate_size": 48, "layer_types": ["conv", "full_attention", "conv"], "max_position_embeddings": 96,
    }  # fmt: skip
    save(tmp_path, "Lfm2", options)
    tokenizer(tmp_path, "decoder")
    change_config(tmp_path, architectures=["Lfm2BidirectionalModel"])
    with pytest.raises(CheckpointError, match=r"Lfm2BidirectionalModel, whose tokens see both sides.*Lfm2Model"):
        LLM(str(tmp_path), device="cpu")


# How texts end


@pytest.mark.parametrize("says", [True, False])
def test_a_tokenizer_class_of_its_own_ends_each_text(says: bool, tmp_path: Path, record_parity: Record) -> None:
    """gte-Qwen2's tokenizer.json puts nothing behind a text, its own class does where add_eos_token is true."""
    folder, twin = tmp_path / "gte", tmp_path / "twin"
    write(ROWS[GTE], folder, twin)
    content = json.loads((folder / "tokenizer.json").read_text())
    bare = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": bare}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]
    words = {"eos_token": "</s>", "tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": own}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | words | {"add_eos_token": says}))
    reference = SentenceTransformer(str(twin), device="cpu")
    with LLM(str(folder), dtype="float32", device="cpu") as llm:
        ends = {output.prompt_token_ids[-1] for output in llm.embed(TEXTS, use_tqdm=False)}
        notes = [note for note in llm.model.facts.notes if "Each text ends in </s>" in note]
        assert (ends == {2}) == says
        assert bool(notes) == says
        if says:
            row = "Alibaba-NLP/gte-Qwen2, ended by its own tokenizer class"
            check(llm, row, "sentence-transformers", reference.encode(TEXTS, batch_size=1), record_parity)
