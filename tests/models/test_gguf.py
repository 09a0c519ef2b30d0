"""GGUF files against the checkpoints that they are made of, and against the package gguf, of llama.cpp's authors.

What llama.cpp's own converter writes was compared once by hand, and what llama.cpp answers: see docs/models.md.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import quants
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from poolhouse import LLM
from poolhouse.data import passages, queries, ragged_texts
from poolhouse.errors import CheckpointError
from poolhouse.models.files.gguf import GgufFolder
from poolhouse.models.files.gguf.blocks import KINDS
from poolhouse.models.files.gguf.header import GgufFile
from poolhouse.models.files.hub import embedded_model, locate
from tests.models import tiny_rerankers
from tests.models.embedding_rows import BERT, DECODER, MODERN, PLAIN_DECODER, ROBERTA, ROWS
from tests.models.gguf_files import round_as, write_gguf
from tests.models.hub_layout import TEXTS, Hub, write
from tests.models.test_embedding_models import cosines, difference

# Both sides add the same float32 numbers in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """A repository, and what its GGUF file is called and holds."""

    hub: Hub
    architecture: str
    tokenizer: str = "bert"
    pre: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


MODERN_ROW = Row(
    replace(ROWS["Alibaba-NLP/gte-modernbert-base"], options=MODERN | {"global_attn_every_n_layers": 2}),
    *("modern-bert", "gpt2", "modern-bert"),
    keys={".attention.layer_norm_epsilon": 1e-5, ".hidden_activation": "gelu"},
)
BERT_ROW = Row(Hub("BertModel", "Bert", BERT, tokenizer="wordpiece", pooling="mean"), "bert")
QWEN3_ROW = Row(
    Hub("Qwen3ForCausalLM", "Qwen3", DECODER | {"tie_word_embeddings": True}, tokenizer="qwen"),
    "qwen3",
    "gpt2",
    "qwen2",
)
TABLE = {
    "bert": BERT_ROW,
    "bert, cls": Row(Hub("BertModel", "Bert", BERT, tokenizer="wordpiece", pooling="cls"), "bert"),
    "roberta": Row(
        Hub("RobertaModel", "Roberta", ROBERTA, tokenizer="roberta", pooling="mean"), "bert", "gpt2", "roberta-bpe"
    ),
    "xlm-roberta": Row(Hub("XLMRobertaModel", "XLMRoberta", ROBERTA, tokenizer="unigram", pooling="cls"), "bert", "t5"),
    "nomic-bert": Row(ROWS["nomic-ai/nomic-embed-text-v1.5"], "nomic-bert"),
    "modern-bert": MODERN_ROW,
    "eurobert": Row(
        Hub("EuroBertModel", "EuroBert", DECODER, ends=(True, True), pooling="mean"), "eurobert", "gpt2", "llama-bpe"
    ),
    "qwen2, both sides": Row(
        Hub("Qwen2Model", "Qwen2", PLAIN_DECODER | {"is_causal": False}, tokenizer="qwen"),
        *("qwen2", "gpt2", "qwen2"),
        keys={".attention.causal": False},
    ),
    "qwen3": QWEN3_ROW,
}
NORMALISED = {name: replace(row, hub=replace(row.hub, normalize=True)) for name, row in TABLE.items()}


def write_row(row: Row, folder: Path, path: Path, kind: str = "F32", **options: Any) -> Path:
    """The file of a row, and in `folder` the checkpoint that it was made of, with the numbers that are left; its twin."""
    twin = folder.parent / "twin"
    write(row.hub, folder, twin)
    if kind != "F32":
        for place in (folder, twin):
            round_as(place, row.architecture, kind)
    keys = row.keys | options.pop("keys", {})
    write_gguf(
        path, folder, row.architecture, tokenizer=row.tokenizer, pre=row.pre, pooling=row.hub.pooling, kind=kind, keys=keys,
        **options,
    )  # fmt: skip
    return twin


def put_beside(path: Path, folder: Path) -> None:
    """The tiny tokenizer of pieces, which splits words and joins pairs otherwise than XLM-RoBERTa's."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path.parent / name).write_text((folder / name).read_text())


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "F32") for name in TABLE), ("bert", "F16"), ("bert", "Q8_0"), ("qwen3", "Q8_0"), ("qwen3", "Q4_0")],
)
def test_vectors_are_those_of_sentence_transformers(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    twin = write_row(NORMALISED[name], tmp_path / "folder", path, kind)
    if NORMALISED[name].tokenizer == "t5":
        put_beside(path, tmp_path / "folder")
    expected = SentenceTransformer(str(twin), device="cpu").encode(TEXTS, batch_size=1)
    with LLM(str(path), dtype="float32", device="cpu", overflow="truncate") as llm:
        got = llm.embed_array(TEXTS, use_tqdm=False)
        alone = np.concatenate([llm.embed_array(text, use_tqdm=False) for text in TEXTS])
        assert llm.model.plan.described()["pooling"].endswith("(the GGUF header)")
        assert any(kind in note for note in llm.model.facts.notes)
    assert difference(got, expected) < TOLERANCE
    assert difference(got, alone) < TOLERANCE
    assert cosines(got, expected).min() > 0.9999
    assert cosines(got[:1], got[1:]).max() < 0.999


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("number", [number for number, kind in KINDS.items() if kind.plain is None])
def test_blocks_become_the_floats_of_the_package(number: int) -> None:
    kind, theirs = KINDS[number], gguf.GGMLQuantizationType(number)
    assert (kind.name, kind.numbers, kind.bytes) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])
    # Any bytes are blocks; scales among them may be infinite.
    blocks = np.random.default_rng(number).integers(0, 256, (40_000, kind.bytes), dtype=np.uint8)
    expected = quants.dequantize(blocks, theirs)
    np.testing.assert_array_equal(kind.read(blocks.reshape(-1)).numpy(), expected.reshape(-1))


def test_fused_and_parted_matrices_are_the_same(tmp_path: Path) -> None:
    """Query, key and value of BERT in one, those of ModernBERT in three."""

    def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {name: tensors.pop(name) for name in list(tensors) if re.search(r"attn_[qkv]\.", name)}
        for layer in range(2):
            for kind in ("weight", "bias"):
                three = [parts[f"blk.{layer}.attn_{part}.{kind}"] for part in "qkv"]
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = torch.cat(three)
        return tensors

    def parted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if "attn_qkv" in name]:
            for part, rows in zip("qkv", tensors.pop(name).chunk(3), strict=True):
                tensors[name.replace("qkv", part)] = rows.contiguous()
        return tensors

    for number, (row, change) in enumerate(((BERT_ROW, fused), (MODERN_ROW, parted))):
        folder, path = tmp_path / str(number) / "folder", tmp_path / f"{number}.gguf"
        write_row(row, folder, path, change=change)
        assert same_tensors(path, folder)


def same_tensors(path: Path, folder: Path) -> bool:
    ours, theirs = GgufFolder(path).tensors, load_file(folder / "model.safetensors")
    left = {name for name in theirs if name.startswith(("pooler.", "lm_head"))}
    assert set(ours) == set(theirs) - left
    return all(torch.equal(ours[name], theirs[name]) for name in ours if "position_embeddings" not in name)


@pytest.mark.parametrize("apart", [False, True])
def test_jina_v2_is_its_checkpoint(apart: bool, tmp_path: Path) -> None:
    """The checkpoint itself is compared with the formulas in test_embedding_models.py."""
    write(BERT_ROW.hub, tmp_path / "folder", tmp_path / "twin")
    folder = tmp_path / "folder"
    config = json.loads((folder / "config.json").read_text())
    words = {"position_embedding_type": "alibi", "feed_forward_type": "geglu", "architectures": ["JinaBertModel"]}
    (folder / "config.json").write_text(json.dumps(config | words))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        called = name.replace("intermediate.dense", "mlp.gated_layers").replace("output.LayerNorm", "mlp.layernorm")
        called = called.replace("attention.mlp.layernorm", "attention.output.LayerNorm")
        if ".attention." not in called:
            called = called.replace("output.dense", "mlp.wo")
        if not called.endswith("gated_layers.bias") and "position" not in called:
            gated = called.endswith("gated_layers.weight")
            tensors[called] = torch.cat([tensor, tensor.flip(0)]) if gated else tensor
    save_file(tensors, folder / "model.safetensors")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if apart and "ffn_up" in name]:
            gate, up = tensors.pop(name).chunk(2)
            tensors |= {name: up.contiguous(), name.replace("ffn_up", "ffn_gate"): gate.contiguous()}
        return tensors

    path = tmp_path / "a.gguf"
    write_gguf(path, folder, "jina-bert-v2", pooling="mean", change=change)
    with LLM(str(folder)) as one, LLM(str(path)) as other:
        expected, got = (llm.embed_array(TEXTS[:4], use_tqdm=False) for llm in (one, other))
        assert other.model.facts.served_by == one.model.facts.served_by
    np.testing.assert_array_equal(got, expected)


# --- heads -----------------------------------------------------------------------------------------------------------

PAIRS = [(query, text) for query in ("how tall is it?", "Paris") for text in TEXTS[:4]]


def scores(llm: LLM) -> list[float]:
    queries, documents = map(list, zip(*PAIRS, strict=True))
    return [output.outputs.score for output in llm.score(queries, documents, use_tqdm=False)]


@pytest.mark.parametrize("pooling", ["rank", None])
def test_a_reranker_of_xlm_roberta_scores_as_transformers_does(pooling: str | None, tmp_path: Path) -> None:
    """bge-reranker-v2-m3; files of some releases do not say that they rank."""
    head = Hub(
        "XLMRobertaForSequenceClassification", "XLMRoberta", ROBERTA | {"num_labels": 1},
        head="ForSequenceClassification", tokenizer="unigram", pooling=None,
    )  # fmt: skip
    write(head, tmp_path / "folder", tmp_path / "twin")
    path = tmp_path / "a.gguf"
    write_gguf(path, tmp_path / "folder", "bert", tokenizer="t5", pooling=pooling)
    put_beside(path, tmp_path / "folder")
    with LLM(str(path)) as llm, LLM(str(tmp_path / "folder")) as same:
        got = scores(llm)
        assert got == pytest.approx(scores(same), abs=1e-6)
        assert llm.engine.facts.tasks == same.engine.facts.tasks
    # The tokenizer of the twin puts nothing between the texts of a pair, so single texts are compared.
    twin = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "twin").eval()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "twin")
    with torch.inference_mode():
        expected = [twin(**read(text, return_tensors="pt")).logits.sigmoid().item() for text in TEXTS]
    with LLM(str(path), overflow="truncate") as llm:
        ours = [output.outputs.probs[0] for output in llm.classify(TEXTS, use_tqdm=False)]
    assert ours == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_reranker_of_modernbert_scores_as_its_checkpoint(pooling: str, tmp_path: Path) -> None:
    head = Hub(
        "ModernBertForSequenceClassification", "ModernBert", MODERN | {"num_labels": 2, "classifier_pooling": pooling},
        head="ForSequenceClassification", ends=(True, True), pooling=None,
    )  # fmt: skip
    write(head, tmp_path / "folder", tmp_path / "twin")
    tensors = load_file(tmp_path / "folder" / "model.safetensors")
    path = tmp_path / "a.gguf"
    names = {name: name.replace("classifier.", "classifier.out_proj.").removeprefix("model.") for name in tensors}
    # The package's map knows no norm of a head.
    norm = tensors.pop("head.norm.weight")
    labels = ["bad", "good"]
    keys = MODERN_ROW.keys | {
        ".classifier.output_labels": labels,
        ".classifier.pooling_type": {"cls": 2, "mean": 1}[pooling],
    }
    write_gguf(
        path, tmp_path / "folder", "modern-bert", tokenizer="gpt2", pre="modern-bert", pooling="rank", keys=keys,
        tensors={names[name]: tensor for name, tensor in tensors.items()},
        change=lambda tensors: tensors | {"cls.norm.weight": norm},
    )  # fmt: skip
    with LLM(str(tmp_path / "folder")) as one, LLM(str(path)) as other:
        expected, got = (
            [output.outputs.probs for output in llm.classify(TEXTS[:4], use_tqdm=False)] for llm in (one, other)
        )
        assert list(other.engine.facts.label_names.values()) == labels
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("head", [True, False])
def test_a_qwen3_reranker_scores_as_its_checkpoint(head: bool, tmp_path: Path) -> None:
    """With the two rows of a head, as today's converter writes it, and by its name, as files from before have it."""
    folder = tmp_path / "Qwen3-Reranker-0.6B"
    tiny_rerankers.save(folder, "Qwen3", tie_word_embeddings=True)
    native = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [native.token_to_id(word) for word in ("yes", "no")]
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.pop("lm_head.weight", None)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | ({"cls.output.weight": tensors["token_embd.weight"][rows]} if head else {})

    path = tmp_path / ("a.gguf" if head else "Qwen3-Reranker-0.6B.F32.gguf")
    keys = {".classifier.output_labels": ["yes", "no"]} if head else {}
    write_gguf(
        path, folder, "qwen3", tokenizer="gpt2", pre="qwen2", pooling="rank" if head else None, keys=keys,
        tensors=tensors, change=change,
    )  # fmt: skip
    with LLM(str(folder)) as one, LLM(str(path)) as other:
        assert other.model.facts.score_template is not None
        assert other.model.facts.score_template.name == "qwen3_reranker"
        assert scores(other) == pytest.approx(scores(one), abs=1e-5)


# --- tokenizers ------------------------------------------------------------------------------------------------------

MORE = [
    *passages(),
    *queries(),
    *TEXTS,
    *ragged_texts(20),
    "  two  spaces\n\nand\tlines ",
    "ﬁne ½ ｆｕｌｌ",
    "東京 한국어 العربية",
]


@pytest.mark.parametrize("name", ["bert", "roberta", "modern-bert", "eurobert", "qwen3"])
def test_texts_become_the_tokens_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    write_row(TABLE[name], tmp_path / "folder", tmp_path / "a.gguf")
    same_tokens(tmp_path / "a.gguf", tmp_path / "folder" / "tokenizer.json")


def test_pieces_of_xlm_roberta_are_those_of_transformers(tmp_path: Path) -> None:
    """Trained by sentencepiece, with its map of characters, and read by transformers."""
    folder = tmp_path / "folder"
    write(TABLE["xlm-roberta"].hub, folder, tmp_path / "twin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages()), model_writer=model, vocab_size=400, model_type="unigram", minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    theirs = transformers.XLMRobertaTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder)
    write_gguf(
        tmp_path / "a.gguf", folder, "bert", tokenizer="t5", keys={"tokenizer.ggml.mask_token_id": theirs.mask_token_id}
    )
    same_tokens(tmp_path / "a.gguf", folder / "tokenizer.json")
    read = tokenizers.Tokenizer.from_str(GgufFolder(tmp_path / "a.gguf").text("tokenizer.json"))
    assert read.encode("one text", "another").ids == theirs("one text", "another")["input_ids"]


def same_tokens(path: Path, theirs: Path) -> None:
    expected = tokenizers.Tokenizer.from_file(str(theirs))
    expected.no_truncation()
    expected.no_padding()
    got = tokenizers.Tokenizer.from_str(GgufFolder(path).text("tokenizer.json"))
    special = list(expected.get_added_tokens_decoder().values())
    for text in [*MORE, " ".join(token.content for token in special)]:
        assert got.encode(text).ids == expected.encode(text).ids


def test_the_embedded_model_as_a_file_is_the_embedded_model(tmp_path: Path) -> None:
    """Real weights and a real vocabulary, in eight bits: nearly the vectors of the original."""
    folder, path = embedded_model(), tmp_path / "all-MiniLM-L6-v2-Q8_0.gguf"
    write_gguf(path, folder, "bert", pooling="mean", kind="Q8_0")
    same_tokens(path, folder / "tokenizer.json")
    read = tokenizers.Tokenizer.from_str(GgufFolder(path).text("tokenizer.json"))
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    original.no_truncation()
    original.no_padding()
    pair = ("How tall is it?", "The Tower: 330 m.")
    assert (read.encode(*pair).ids, read.encode(*pair).type_ids) == (
        original.encode(*pair).ids,
        original.encode(*pair).type_ids,
    )
    with LLM(str(folder)) as one, LLM(str(path)) as other:
        expected, got = (llm.embed_array(passages(), use_tqdm=False) for llm in (one, other))
        assert "no words of its vocabulary begin with a capital" in " ".join(other.model.facts.notes)
    assert cosines(got, expected).min() > 0.999


def test_the_case_of_a_wordpiece_is_stated_or_seen(tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf")
    tokens = GgufFile(tmp_path / "a.gguf").fields["tokenizer.ggml.tokens"]
    capital = [token.replace("\u2581paris", "\u2581Paris") for token in tokens]
    for keys, lower, why in (
        ({}, True, "lower-cased, since no words of its vocabulary begin with a capital"),
        ({"tokenizer.ggml.tokens": capital}, False, "cased, since some words of its vocabulary begin with a capital"),
        ({"tokenizer.ggml.normalizer.lowercase": False}, False, "cased, as the header says"),
    ):
        write_gguf(tmp_path / "b.gguf", tmp_path / "folder", "bert", keys=keys)
        file = GgufFolder(tmp_path / "b.gguf")
        assert why in file.notes[1]
        read = tokenizers.Tokenizer.from_str(file.text("tokenizer.json"))
        assert (read.encode("TALL").ids == read.encode("tall").ids) is lower


def test_a_tokenizer_beside_the_file_wins(tmp_path: Path) -> None:
    write_row(QWEN3_ROW, tmp_path / "folder", tmp_path / "a.gguf", keys={"tokenizer.ggml.pre": "some-day"})
    with pytest.raises(CheckpointError, match=r"split as 'some-day'.*qwen2.*tokenizer\.json beside"):
        LLM(str(tmp_path / "a.gguf"))
    (tmp_path / "tokenizer.json").write_text((tmp_path / "folder" / "tokenizer.json").read_text())
    with (
        LLM(str(tmp_path / "a.gguf"), overflow="truncate") as llm,
        LLM(str(tmp_path / "folder"), overflow="truncate") as same,
    ):
        assert any(str(tmp_path / "tokenizer.json") in note for note in llm.model.facts.notes)
        for one, other in zip(llm.embed(TEXTS, use_tqdm=False), same.embed(TEXTS, use_tqdm=False), strict=True):
            assert one.prompt_token_ids == other.prompt_token_ids


# --- files that are refused ------------------------------------------------------------------------------------------


def broken(path: Path, change: Callable[[bytearray], bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:2], "is no GGUF file: it begins with b'GG'"),
        (lambda data: data[:0], "cannot be read"),
        (lambda data: b"PK\3\4" + data[4:], "is no GGUF file: it begins with b'PK"),
        (lambda data: b"tjgg" + data[4:], "from before GGUF; convert the model anew"),
        (lambda data: data[:4] + b"\1\0\0\0" + data[8:], "GGUF version 1; versions 2 and 3 are read"),
        (lambda data: data[:4] + b"\0\0\0\3" + data[8:], "big-endian GGUF file"),
        (lambda data: data[:20], "cut short or damaged: its header goes on"),
        (lambda data: data[:300], "cut short or damaged: its header goes on"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "cut short or damaged|is damaged"),
        (lambda data: data[:-4000], "is cut short: it has .* Fetch it again"),
    ],
)
def test_a_damaged_file_says_what_it_is(change: Callable[[bytearray], bytearray], message: str, tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf")
    broken(tmp_path / "a.gguf", change)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "fields"])
@pytest.mark.parametrize("change", [-1, 1, 2, 100, 2**40, 2**64 - 500])
def test_a_count_that_is_not_that_of_the_file_is_an_error(place: int, change: int, tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf")

    def counted(data: bytearray) -> bytearray:
        count = int.from_bytes(data[place : place + 8], "little") + change
        return data[:place] + count.to_bytes(8, "little") + data[place + 8 :]

    broken(tmp_path / "a.gguf", counted)
    with pytest.raises(CheckpointError, match="damaged"):
        GgufFolder(tmp_path / "a.gguf")


def test_any_cut_of_a_header_is_an_error(tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for length in range(1, 6000, 7):
        (tmp_path / "b.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GgufFolder(tmp_path / "b.gguf")


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {called: tensor for called, tensor in tensors.items() if called != name}


def beside(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: torch.ones(32, 32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {".attention.head_count": None}}, "lacks bert.attention.head_count"),
        ({"keys": {".attention.head_count": [4, 4]}}, "bert.attention.head_count is a list"),
        ({"keys": {".attention.clamp_kqv": 3.0}}, "has bert.attention.clamp_kqv, which is not known here"),
        ({"keys": {".attention.causal": True}}, "bert.attention.causal is True; served is False"),
        ({"keys": {".attention.head_count_kv": 2}}, "head_count_kv differs from the 4 heads"),
        ({"keys": {".rope.scaling.type": "yarn"}}, "bert.rope.scaling.type is 'yarn'; served is 'none'"),
        ({"keys": {".pooling_type": 9}}, "pooling_type is 9, which is none of 0 to 4"),
        ({"keys": {".pooling_type": 4}}, r"the head lacks \['cls', 'cls.output'\]"),
        ({"keys": {"general.type": "adapter"}}, "is a GGUF of type 'adapter', and no model"),
        ({"keys": {"split.count": 2}}, "one of several parts. Merge them"),
        ({"keys": {"general.alignment": 24}}, "general.alignment is 24, which is no power of two"),
        ({"keys": {"tokenizer.ggml.model": "llama"}}, "tokenizer is of the model 'llama'; bert, t5, gpt2 are read"),
        ({"keys": {"tokenizer.ggml.token_type": [1, 1]}}, "tokens, and types of 2"),
        ({"keys": {"tokenizer.ggml.bos_token_id": 10**6}}, "bos_token_id is 1000000, and there are|cls_token_id is 1000000"),
        ({"keys": {"tokenizer.ggml.tokens": None}}, "lacks tokenizer.ggml.tokens"),
        ({"change": without("blk.1.attn_k.weight")}, r"lacks the tensors \['blk.1.attn_k.weight'\]"),
        ({"change": without("blk.1.ffn_up.weight")}, "intermediate.dense"),
        ({"change": without("token_embd.weight")}, "has no token table"),
        ({"change": beside("blk.0.attn_q_norm.weight")}, "blk.0.attn_q_norm.weight is not known to the architecture bert"),
        ({"change": beside("rope_freqs.weight")}, "rope_freqs.weight is not known to the architecture bert"),
        ({"change": beside("cls.output.weight")}, r"the head lacks \['cls'\]. The conversion leaves out BERT's pooler"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf", **options)
    with pytest.raises(CheckpointError, match=message):
        LLM(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("architecture", ["llama", "gemma-embedding", "nomic-bert-moe"])
def test_an_architecture_that_is_not_served_names_those_that_are(architecture: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=f"'{architecture}' is not served from GGUF files; bert, .*qwen3 are"):
        LLM(str(tmp_path / "a.gguf"))


def test_a_kind_of_blocks_that_is_not_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((2, 66), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is of the kind IQ2_XXS, which is not read\. Choose"):
        LLM(str(tmp_path / "a.gguf"))


def test_a_kind_of_blocks_that_nobody_knows_is_damage_or_newer(tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf")
    name = b"token_embd.weight"

    def kind_999(data: bytearray) -> bytearray:
        # Behind the name: how many dimensions, two of them, and the kind.
        kind = data.index(name) + len(name) + 4 + 2 * 8
        return data[:kind] + (999).to_bytes(4, "little") + data[kind + 4 :]

    broken(tmp_path / "a.gguf", kind_999)
    with pytest.raises(CheckpointError, match=r"is damaged, or newer .*token_embd\.weight is of the kind 999\. Choose"):
        LLM(str(tmp_path / "a.gguf"))


def test_transformers_does_not_serve_a_file(tmp_path: Path) -> None:
    write_row(BERT_ROW, tmp_path / "folder", tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="served natively alone: model_impl='transformers'"):
        LLM(str(tmp_path / "a.gguf"), model_impl="transformers")


# --- which file ------------------------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_only_file_and_a_colon_chooses_among_several(tmp_path: Path) -> None:
    one = tmp_path / "MiniLM-Q8_0.gguf"
    one.touch()
    (tmp_path / "mmproj-F16.gguf").touch()
    assert locate(str(tmp_path)) == locate(str(one)) == locate(f"{tmp_path}:q8_0") == one
    other = tmp_path / "MiniLM.Q4_K_M.gguf"
    other.touch()
    with pytest.raises(
        CheckpointError, match=r"several GGUF files; there are MiniLM-Q8_0\.gguf, MiniLM\.Q4_K_M\.gguf.*:Q8_0"
    ):
        locate(str(tmp_path))
    assert locate(f"{tmp_path}:Q4_K_M") == other
    with pytest.raises(CheckpointError, match=r"no GGUF file of the kind Q5_0; there are MiniLM-Q8_0\.gguf"):
        locate(f"{tmp_path}:Q5_0")
    # Weights of a checkpoint come first.
    (tmp_path / "model.safetensors").touch()
    assert locate(str(tmp_path)) == tmp_path
