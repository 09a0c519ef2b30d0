"""jina-reranker-v3: all documents of a query in one prompt, against its own code written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from poolhouse import LLM, PoolingParams
from poolhouse.errors import CheckpointError, ConfigError, InputTooLong, InvalidRequest
from tests.models.parity import Parity, Record, change_tensors
from tests.models.tiny_rerankers import DOCUMENTS, QUERIES, save, tokenizer

SYSTEM = (
    "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are to the "
    "query. If the query is a question, how relevant a passage is depends on how well it answers the question. If not, try "
    "to analyze the intent of the query and assess how well each passage satisfies the intent. If an instruction is "
    "provided, you should follow the instruction when determining the ranking."
)
QUERY = QUERIES[0]


def prompt(query: str, documents: list[str], instruction: str | None = None) -> str:
    count = f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier."
    lines = [f"{count} Rank the passages based on their relevance to query: {query}"]
    if instruction:
        lines += ["<instruct>", instruction, "</instruct>"]
    for number, document in enumerate(documents):
        lines += [f'<passage id="{number}">', f"{document}<|embed_token|>", "</passage>"]
    lines += ["<query>", f"{query}<|rerank_token|>", "</query>"]
    body = "\n".join(lines)
    turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
    return turns + "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("jina")
    save(place, "Qwen3", tie_word_embeddings=True)
    torch.manual_seed(1)
    projector = {"projector.0.weight": torch.randn(16, 32), "projector.2.weight": torch.randn(24, 16)}
    change_tensors(place, add=projector)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"architectures": ["JinaForRanking"]}))
    return place


class Theirs:
    """The reference: vectors of one prompt, and the score of several."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.model = transformers.Qwen3Model.from_pretrained(folder).eval()
        tensors = load_file(folder / "model.safetensors")
        self.first, self.second = (tensors[f"projector.{place}.weight"] for place in (0, 2))
        self.tokenizer = tokenizer()

    def vectors(self, query: str, documents: list[str], instruction: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.tokenizer(prompt(query, documents, instruction), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = self.model(input_ids=ids).last_hidden_state[0]
        projected = torch.relu(hidden @ self.first.T) @ self.second.T
        document, asked = (
            projected[ids[0] == self.tokenizer.convert_tokens_to_ids(token)]
            for token in ("<|embed_token|>", "<|rerank_token|>")
        )
        return asked, document

    def scores(self, query: str, blocks: list[list[str]], instruction: str | None = None) -> list[float]:
        cosine = torch.nn.functional.cosine_similarity
        found = [self.vectors(query, block, instruction) for block in blocks]
        weights = torch.stack([((1 + cosine(asked, documents)) / 2).max() for asked, documents in found])
        merged = sum(weight * asked for weight, (asked, _) in zip(weights, found, strict=True)) / weights.sum()
        return torch.cat([cosine(merged, documents) for _, documents in found]).tolist()


def scores(llm: LLM, *sides: Any, **options: Any) -> list[float]:
    return [output.outputs.score for output in llm.score(*sides, use_tqdm=False, **options)]


@pytest.mark.parametrize("instruction", [None, "Find cats"])
def test_one_prompt_holds_all_documents(instruction: str | None, folder: Path, record_parity: Record) -> None:
    expected = Theirs(folder).scores(QUERY, [DOCUMENTS], instruction)
    with LLM(str(folder)) as llm:
        assert llm.model.tasks == ("token_embed",)
        got = scores(llm, QUERY, DOCUMENTS, instruction=instruction)
        again = [scores(llm, QUERY, DOCUMENTS, instruction=instruction) for _ in range(2)]
    error = float(np.abs(np.array(got) - expected).max())
    if instruction is None:
        packing = float(np.abs(np.array(again) - got).max())
        examples, tasks = "jinaai/jina-reranker-v3", ("token_embed", "score")
        reference = "its own code, written out"
        record_parity(
            Parity("jina-reranker-v3", "native", reference, error, packing, "JinaForRanking", tasks, examples)
        )
    assert np.std(expected) > 0.01
    assert error < 2e-5


def test_pairs_have_a_prompt_each(folder: Path) -> None:
    theirs = Theirs(folder)
    expected = [theirs.scores(query, [[document]])[0] for query, document in zip(QUERIES, DOCUMENTS, strict=True)]
    with LLM(str(folder)) as llm:
        assert scores(llm, QUERIES, DOCUMENTS) == pytest.approx(expected, abs=2e-5)
        outputs = llm.score(QUERIES, DOCUMENTS)
        assert outputs[0].prompt_token_ids == tokenizer()(prompt(QUERIES[0], [DOCUMENTS[0]]))["input_ids"]


def test_documents_that_do_not_fit_go_to_further_prompts(folder: Path) -> None:
    documents = [f"{document} {number}" for number in range(3) for document in DOCUMENTS]
    theirs = Theirs(folder)
    with LLM(str(folder), max_model_len=700) as llm:
        outputs = llm.score(QUERY, documents)
        prompts = list(dict.fromkeys(tuple(output.prompt_token_ids) for output in outputs))
        embed = tokenizer().convert_tokens_to_ids("<|embed_token|>")
        sizes = [ids.count(embed) for ids in prompts]
        assert len(sizes) > 1
        assert sum(sizes) == len(documents)
        rest = iter(documents)
        blocks = [[next(rest) for _ in range(size)] for size in sizes]
        got = [output.outputs.score for output in outputs]
    assert got == pytest.approx(theirs.scores(QUERY, blocks), abs=2e-5)
    assert got != pytest.approx(theirs.scores(QUERY, [documents]), abs=1e-3)


def test_a_prompt_holds_at_most_125_documents(folder: Path) -> None:
    documents = [f"d{number}" for number in range(130)]
    with LLM(str(folder)) as llm:
        outputs = llm.score("q", documents, use_tqdm=False)
        embed = tokenizer().convert_tokens_to_ids("<|embed_token|>")
        assert [output.prompt_token_ids.count(embed) for output in outputs] == [125] * 125 + [5] * 5


def test_a_query_that_leaves_no_room_is_the_side_to_shorten(folder: Path) -> None:
    with (
        LLM(str(folder), max_model_len=600) as llm,
        pytest.raises(InputTooLong, match=r"query \(800 tokens, twice\).* Shorten the query"),
    ):
        llm.score("x " * 400, ["short"])


def test_replicas_write_the_same_prompts(folder: Path) -> None:
    with LLM(str(folder)) as one, LLM(str(folder), replicas=2) as two:
        expected = scores(one, QUERY, DOCUMENTS * 40, instruction="Find cats")
        np.testing.assert_allclose(scores(two, QUERY, DOCUMENTS * 40, instruction="Find cats"), expected, atol=1e-5)


def test_special_tokens_in_texts_are_taken_out(folder: Path) -> None:
    with LLM(str(folder)) as llm:
        clean = scores(llm, "q", ["one", "two"])
        assert scores(llm, "q<|rerank_token|>", ["o<|embed_token|>ne", "t<|rerank_token|>wo"]) == clean


def test_long_documents_are_refused_or_cut_alone(folder: Path) -> None:
    long = "!?" * 400
    cut = PoolingParams(truncate_prompt_tokens=-1)
    for options in ({}, {"overflow": "chunk"}):
        with LLM(str(folder), max_model_len=700, **options) as llm:
            with pytest.raises(InputTooLong, match=r"document 1 \(800 tokens\).* Shorten the document"):
                llm.score("q", ["one", long])
            outputs = llm.score("q", ["one", long], pooling_params=cut)
            assert [output.truncated for output in outputs] == [False, True]
            assert outputs[0].prompt_token_ids[-4:] == outputs[1].prompt_token_ids[-4:]
            (sided,) = llm.score("q", long, pooling_params=PoolingParams(max_tokens_per_doc=4))
            assert sided.outputs.score == pytest.approx(scores(llm, "q", "!?!?")[0], abs=1e-6)
            assert sided.truncated
            with pytest.raises(InputTooLong):
                llm.score(long, "d", pooling_params=cut)
    with LLM(str(folder), max_model_len=700, overflow="truncate") as llm:
        assert llm.score("q", long)[0].truncated


def test_what_it_does_not_do_is_refused(folder: Path) -> None:
    with LLM(str(folder)) as llm:
        with pytest.raises(InvalidRequest, match="one prompt of its own"):
            llm.score("q", "d", chat_template="qwen3_reranker")
        with pytest.raises(InvalidRequest, match="or other token that the model answers at"):
            llm.encode("a plain text", pooling_task="token_embed")
        (rows,) = llm.encode(prompt("q", ["a", "b"]), pooling_task="token_embed")
        assert rows.outputs.array.shape == (3, 24)


def test_a_missing_projector_is_named(folder: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "broken"
    shutil.copytree(folder, place)
    change_tensors(place, drop="projector.2.weight")
    with pytest.raises(CheckpointError, match=r"projector\.2\.weight"):
        LLM(str(place))


def test_steps_are_refused_of_a_listwise_reranker(folder: Path) -> None:
    with pytest.raises(ConfigError, match="STEP pooling belongs to token_classify"):
        LLM(str(folder), pooler_config={"tok_pooling_type": "STEP"})
