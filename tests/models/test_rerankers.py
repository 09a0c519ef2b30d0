"""Rerankers that are language models: found without flags, and equal to their cards' own recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

from poolhouse import LLM, PoolingParams
from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest, UnsupportedTask
from poolhouse.models.files.model_card import ModelCard, read_card
from poolhouse.models.heads.rerankers import Reranker, TokenScore
from tests.models.parity import Parity, Record, change_tensors
from tests.models.tiny_rerankers import DOCUMENTS, QUERIES, card, logits, save, tokenizer

TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
QUIET = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def scores(llm: LLM, queries: Any = QUERIES, documents: Any = DOCUMENTS, **options: Any) -> list[float]:
    return [output.outputs.score for output in llm.score(queries, documents, use_tqdm=False, **options)]


def raw(llm: LLM, **options: Any) -> list[float]:
    return scores(llm, pooling_params=PoolingParams(use_activation=False), **options)


def ids(tokenizer: Any, *texts: str) -> list[int]:
    """Texts tokenised apart and put end to end."""
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


EXAMPLES = {
    "Qwen3-Reranker": "Qwen/Qwen3-Reranker-0.6B, -4B, -8B",
    "bge-reranker-v2-gemma": "BAAI/bge-reranker-v2-gemma",
    "mxbai-rerank-v2": "mixedbread-ai/mxbai-rerank-base-v2, -large-v2",
    "zerank-2": "zeroentropy/zerank-2",
    "llama-nemotron-rerank": "nvidia/llama-nemotron-rerank-1b-v2",
}


def compare(name: str, reference: str, llm: LLM, expected: list[float], record: Record) -> None:
    got = scores(llm)
    alone = [scores(llm, query, document)[0] for query, document in zip(QUERIES, DOCUMENTS, strict=True)]
    error = float(np.abs(np.array(got) - expected).max())
    packing = float(np.abs(np.array(got) - alone).max())
    facts, examples = llm.model.facts, EXAMPLES.get(name.removesuffix(", tied"), "")
    record(Parity(name, "native", reference, error, packing, facts.architecture, llm.engine.facts.tasks, examples))
    # Scores must differ from pair to pair, or any prompt would do.
    assert np.std(expected) > 0.01
    # 2e-6 at most was seen, which is float32 summed in another order.
    assert error < 2e-5
    assert packing < 2e-5


@pytest.mark.parametrize("instruction", [None, "Find the cat"])
@pytest.mark.parametrize("tied", [False, True])
def test_qwen3_reranker_equals_its_card(
    tied: bool, instruction: str | None, tmp_path: Path, record_parity: Record
) -> None:
    folder = tmp_path / "Qwen3-Reranker-0.6B"
    words = save(folder, "Qwen3", tie_word_embeddings=tied)
    expected = []
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        body = f"<Instruct>: {instruction or TASK}\n<Query>: {query}\n<Document>: {document}"
        found = logits(folder, ids(words, JUDGE, body, QUIET))
        pair = torch.stack([found[words.convert_tokens_to_ids("no")], found[words.convert_tokens_to_ids("yes")]])
        expected.append(float(torch.log_softmax(pair, 0)[1].exp()))
    with LLM(str(folder)) as llm:
        assert llm.model.tasks == ("classify", "token_classify")
        assert any("Qwen3-Reranker by its name" in note for note in llm.model.facts.notes)
        if instruction is None:
            compare(f"Qwen3-Reranker{', tied' * tied}", "its card, by transformers", llm, expected, record_parity)
        assert scores(llm, instruction=instruction) == pytest.approx(expected, abs=1e-5)


def test_bge_reranker_gemma_equals_flag_embedding(tmp_path: Path, record_parity: Record) -> None:
    folder = tmp_path / "bge-reranker-v2-gemma"
    words = save(folder, "Gemma", bos=True)
    prompt = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    expected = []
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        tokens = ids(words, "<bos>", f"A: {query}", "\n", f"B: {document}", "\n", prompt)
        expected.append(float(logits(folder, tokens)[words.convert_tokens_to_ids("Yes")].sigmoid()))
    with LLM(str(folder)) as llm:
        compare("bge-reranker-v2-gemma", "FlagEmbedding's formula", llm, expected, record_parity)
        assert raw(llm) == pytest.approx(list(np.log(expected) - np.log1p(-np.array(expected))), abs=1e-3)
        assert scores(llm, instruction=prompt) == pytest.approx(expected, abs=1e-5)
        assert scores(llm, instruction="Is it so?") != pytest.approx(expected, abs=1e-3)


def test_mxbai_rerank_equals_its_package(tmp_path: Path, record_parity: Record) -> None:
    folder = tmp_path / "mxbai-rerank-base-v2"
    words = save(folder, "Qwen2")
    head = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
        "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment "
        "(0 for not relevant, 1 for relevant).\nRelevance:"
    )

    def expect(query: str, document: str, wish: str = "") -> float:
        tokens = ids(words, head, f"{wish}query: {query}", "\n", f"document: {document}", "\n", task)
        found = logits(folder, tokens + ids(words, "<|im_end|>\n<|im_start|>assistant\n"))
        return float(found[ids(words, "1")[0]] - found[ids(words, "0")[0]])

    pairs = list(zip(QUERIES, DOCUMENTS, strict=True))
    expected = [expect(*pair) for pair in pairs]
    with LLM(str(folder)) as llm:
        sigmoid = [float(torch.tensor(score).sigmoid()) for score in expected]
        compare("mxbai-rerank-v2", "its package's formula", llm, sigmoid, record_parity)
        assert raw(llm) == pytest.approx(expected, abs=1e-4)
        wished = [expect(*pair, "instruction: Find cats\n") for pair in pairs]
        assert raw(llm, instruction="Find cats") == pytest.approx(wished, abs=1e-4)


def test_zerank_equals_its_own_code(tmp_path: Path, record_parity: Record) -> None:
    folder = tmp_path / "zerank-2"
    words = save(folder, "Qwen3")
    expected = []
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        text = f"<|im_start|>system\n{query}<|im_end|>\n<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n"
        found = logits(folder, ids(words, text))
        expected.append(float((found[words.convert_tokens_to_ids("Yes")] / 5).sigmoid()))
    with LLM(str(folder)) as llm:
        compare("zerank-2", "its card, by transformers", llm, expected, record_parity)


def test_nemotron_rerank_takes_the_mean_of_both_sides(tmp_path: Path, record_parity: Record) -> None:
    own = tokenizer(bos=True)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=len(own), num_labels=1, pad_token_id=0, is_causal=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "llama_bidirec",
        "architectures": ["LlamaBidirectionalForSequenceClassification"],
        "pooling": "avg",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = []
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        inputs = own(f"question:{query} \n \n passage:{document}", return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            # All tokens see all: what its own code makes of the mask.
            both = torch.zeros(1, 1, length, length)
            hidden = model.model(input_ids=inputs["input_ids"], attention_mask=both).last_hidden_state
            expected.append(float(model.score(hidden.mean(1)).sigmoid()))
    with LLM(str(tmp_path)) as llm:
        assert llm.model.facts.score_template is not None
        compare("llama-nemotron-rerank", "its own code, written out", llm, expected, record_parity)
        with pytest.raises(InvalidRequest, match="reads no instruction"):
            llm.score("q", "d", instruction="Find cats")
    # The mean is its own, whether or not the config says so; a temperature is not honoured.
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "pooling"}))
    with LLM(str(tmp_path), pooler_config={"pooling_type": "LAST"}) as llm:
        scores = [output.outputs.score for output in llm.score(QUERIES, DOCUMENTS)]
        assert scores == pytest.approx(expected, abs=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({**config, "temperature": 2.0}))
    with pytest.raises(CheckpointError, match="llama_bidirec"):
        LLM(str(tmp_path))


# --- sentence-transformers -------------------------------------------------------------------------------------------

FLAT = (
    "<|im_start|>system\n{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}<|im_end|>\n"
    "Q {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "D {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "{{ ' loud' if loud is defined else '' }}<|im_end|>\n<|im_start|>assistant\n\n"
)
PARTS = "Q {{ messages[0].content[0].text }}\nD {{ messages[1].content[0].text | trim }}{{ eos_token }}"


def cross_encoder(
    folder: Path,
    template: str | None = None,
    false: str | None = "no",
    options: Any = None,
    bos: bool = False,
    **more: Any,
) -> CrossEncoder:
    """A LogitScore model as sentence-transformers saves it."""
    own = save(folder / "source", "Qwen3", template=template, bos=bos)
    first = Transformer(str(folder / "source"), transformer_task="text-generation", processing_kwargs=options)
    true, wrong = own.convert_tokens_to_ids("yes"), None if false is None else own.convert_tokens_to_ids(false)
    made = CrossEncoder(modules=[first, LogitScore(true, wrong)], device="cpu", **more)
    made.save_pretrained(str(folder / "saved"))
    return made


PAIRS = [list(pair) for pair in zip(QUERIES, DOCUMENTS, strict=True)]
SAVED: dict[str, dict[str, Any]] = {
    "plain pairs": {},
    "one token, raw": {"false": None, "activation_fn": torch.nn.Identity()},
    "a prompt before the query": {"prompts": {"ask": "Task: "}, "default_prompt_name": "ask"},
    "special tokens around both": {"bos": True},
    "a template": {"template": FLAT},
    "a template and no special tokens": {"template": FLAT, "bos": True},
    "a template of parts": {"template": PARTS},
    "a template with options": {"template": FLAT, "options": {"chat_template": {"loud": True}}},
    "a template and a prompt": {"template": FLAT, "prompts": {"ask": "Find cats"}, "default_prompt_name": "ask"},
}


@pytest.mark.parametrize("row", SAVED)
def test_logit_scores_equal_sentence_transformers(row: str, tmp_path: Path, record_parity: Record) -> None:
    theirs = cross_encoder(tmp_path, **SAVED[row])
    expected = theirs.predict(PAIRS).tolist()
    with LLM(str(tmp_path / "saved")) as llm:
        if "raw" in row:
            assert scores(llm) == pytest.approx(expected, abs=1e-4)
        else:
            compare(f"LogitScore, {row}", "sentence-transformers", llm, expected, record_parity)
        if row == "a template and a prompt":
            wished = theirs.predict(PAIRS, prompt="Find dogs").tolist()
            assert wished != pytest.approx(expected, abs=1e-3)
            assert scores(llm, instruction="Find dogs") == pytest.approx(wished, abs=1e-5)


def messages_encoder(folder: Path, templates: Any, options: Any = None) -> CrossEncoder:
    """A classifier of pairs that sentence-transformers renders as messages."""
    own = tokenizer(bos=True, template=templates)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(own), num_labels=1, initializer_range=0.3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "source")
    own.save_pretrained(folder / "source")
    task = "sequence-classification"
    first = Transformer(str(folder / "source"), transformer_task=task, processing_kwargs=options)
    made = CrossEncoder(modules=[first], device="cpu")
    made.save_pretrained(str(folder / "saved"))
    return made


LOUD = "{{ messages[0].content }} ! {{ messages[1].content }}{{ tone }}"
CLASSIFIERS: dict[str, tuple[Any, Any]] = {
    "the default template": (FLAT, None),
    "its options": (FLAT, {"chat_template": {"loud": True}}),
    "a template by its name": (
        {"default": FLAT, "pair": LOUD},
        {"chat_template": {"chat_template": "pair", "tone": "?"}},
    ),
    "a template by its text": (FLAT, {"chat_template": {"chat_template": LOUD, "tone": "?"}}),
}


@pytest.mark.parametrize("row", CLASSIFIERS)
def test_a_classifier_that_reads_messages_equals_sentence_transformers(row: str, tmp_path: Path) -> None:
    theirs = messages_encoder(tmp_path, *CLASSIFIERS[row])
    expected = theirs.predict(PAIRS).tolist()
    with LLM(str(tmp_path / "saved")) as llm:
        assert scores(llm) == pytest.approx(expected, abs=1e-5)
        assert llm.model.facts.score_template is not None
        # The caller's own comes before it, as in vLLM.
        assert scores(llm, chat_template="{{ messages[1].content }} x {{ messages[0].content }}") != pytest.approx(
            expected, abs=1e-4
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chat_template": "nobody"}, r"names the template 'nobody'; there are \['default'\]"),
        ({"tools": [{"name": "f"}]}, "sets tools, which is not honoured"),
        ({"tokenize": False}, "sets tokenize"),
        (["pair"], "must be an object"),
    ],
)
def test_options_of_messages_that_cannot_be_honoured_are_named(options: Any, words: str, tmp_path: Path) -> None:
    messages_encoder(tmp_path, FLAT)
    file = tmp_path / "saved" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processing_kwargs": {"chat_template": options}}))
    with pytest.raises(CheckpointError, match=words):
        LLM(str(tmp_path / "saved"))


def test_a_cut_prompt_keeps_its_end_as_in_sentence_transformers(tmp_path: Path) -> None:
    theirs = cross_encoder(tmp_path, FLAT)
    pairs = [["what?", "x y z " * 100], ["what is it?", "Paris! " * 400]]
    expected = theirs.predict(pairs, processing_kwargs={"text": {"max_length": 60}}).tolist()
    assert expected != pytest.approx(theirs.predict(pairs).tolist(), abs=1e-3)
    with LLM(str(tmp_path / "saved")) as llm:
        cut = PoolingParams(truncate_prompt_tokens=60)
        outputs = llm.score(*map(list, zip(*pairs, strict=True)), pooling_params=cut)
        assert [output.outputs.score for output in outputs] == pytest.approx(expected, abs=1e-5)
        assert all(output.truncated and len(output.prompt_token_ids) == 60 for output in outputs)
        assert outputs[0].original_tokens > 200


def test_the_limit_that_a_recipe_stores_holds(tmp_path: Path) -> None:
    cross_encoder(tmp_path, FLAT, options={"text": {"max_length": 64}})
    with LLM(str(tmp_path / "saved")) as llm:
        assert llm.engine.facts.max_tokens == 64


def test_what_sentence_transformers_wraps_itself_scores_the_same_by_overrides(tmp_path: Path) -> None:
    save(tmp_path, "Qwen3")
    # A space first, so that both texts end to end make the tokens that each makes alone.
    pairs = [[query, " " + document] for query, document in PAIRS]
    expected = CrossEncoder(str(tmp_path), device="cpu").predict(pairs).tolist()
    assert np.std(expected) > 0.01
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "method": "from_2_way_softmax",
    }
    with LLM(str(tmp_path), hf_overrides=overrides) as llm:
        assert llm.model.facts.score_template is not None
        assert llm.model.facts.score_template.name == "concatenation"
        assert scores(llm, *map(list, zip(*pairs, strict=True))) == pytest.approx(expected, abs=1e-5)


# --- which checkpoint is what ----------------------------------------------------------------------------------------


def test_overrides_in_vllms_words_equal_what_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-Reranker-0.6B"
    save(folder, "Qwen3")
    with LLM(str(folder)) as llm:
        expected = scores(llm)
    save(tmp_path / "mine", "Qwen3")
    original = {"architectures": ["Qwen3ForSequenceClassification"], "is_original_qwen3_reranker": True}
    for overrides in (original, original | {"classifier_from_token": ["no", "yes"]}):
        with LLM(str(tmp_path / "mine"), hf_overrides=overrides) as llm:
            assert scores(llm) == pytest.approx(expected, abs=1e-6)
    two = {"classifier_from_token": ["no", "yes"], "method": "no_post_processing"}
    with LLM(str(folder), hf_overrides=two) as llm:
        (output,) = llm.classify("hello")
        words = tokenizer()
        found = logits(folder, ids(words, "hello"))[words.convert_tokens_to_ids(["no", "yes"])]
        assert output.outputs.probs == pytest.approx(found.softmax(0).tolist(), abs=1e-5)
        with pytest.raises(UnsupportedTask, match="num_labels == 1"):
            llm.score("q", "d")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"classifier_from_token": ["no", "yes"]}, "from_2_way_softmax.*no_post_processing"),
        ({"classifier_from_token": ["yes"], "method": "from_2_way_softmax"}, "takes two tokens"),
        ({"classifier_from_token": "yes", "method": "no_post_processing"}, "must be a list"),
        ({"classifier_from_token": ["perhaps", "yes"], "method": "from_2_way_softmax"}, "'perhaps' is not one token"),
        ({"classifier_from_token": ["YES", "no"], "method": "from_2_way_softmax"}, r"It has \['Yes', 'yes'\]"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, "Qwen3")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        LLM(str(tmp_path), hf_overrides=overrides)


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("Qwen3-Reranker-4B", {}, "qwen3_reranker"),
        ("Qwen3-Embedding-0.6B", {}, None),
        ("model", {}, None),
        ("model", {"pipeline_tag": "text-ranking"}, "qwen3_reranker"),
        ("model", {"tags": ["transformers", "text-ranking"]}, "qwen3_reranker"),
        ("model", {"pipeline_tag": "text-ranking", "base_model": "zeroentropy/zerank-1"}, "zerank"),
        ("model", {"base_model": ["Qwen/Qwen3-Reranker-0.6B"]}, "qwen3_reranker"),
        ("qwen3-reranker-turned-embedder", {"pipeline_tag": "feature-extraction"}, None),
        ("models--Qwen--Qwen3-Reranker-0.6B/snapshots/abc", {}, "qwen3_reranker"),
    ],
)
def test_a_causal_model_is_told_apart_by_card_and_name(
    name: str, fields: dict[str, Any], kind: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / name
    save(folder, "Qwen3")
    card(folder, license="apache-2.0", **fields)
    with LLM(str(folder)) as llm:
        template = llm.model.facts.score_template
        assert (template and template.name) == kind
        assert ("embed" in llm.model.tasks) is (kind is None)
    if kind is not None:
        with LLM(str(folder), convert="embed") as llm:
            assert "embed" in llm.model.tasks


def test_a_missing_vocabulary_matrix_is_never_made_up(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-Reranker"
    save(folder, "Qwen3", tie_word_embeddings=False)
    change_tensors(folder, drop="lm_head.weight")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        LLM(str(folder))


def test_a_softcap_of_logits_is_applied(tmp_path: Path) -> None:
    words = save(tmp_path, "Gemma2", bos=True, final_logit_softcapping=0.5)
    overrides = {"classifier_from_token": ["No", "Yes"], "method": "from_2_way_softmax"}
    tokens = words("Paris is the capital")["input_ids"]
    found = logits(tmp_path, tokens)
    expected = float(found[words.convert_tokens_to_ids("Yes")] - found[words.convert_tokens_to_ids("No")])
    with LLM(str(tmp_path), hf_overrides=overrides) as llm:
        assert raw(llm, queries="Paris is", documents=" the capital") == pytest.approx([expected], abs=1e-4)


def test_rerankers_run_in_bfloat16_on_cuda_unless_told() -> None:
    cuda, cpu, reranker = torch.device("cuda"), torch.device("cpu"), Reranker(TokenScore((1,)))
    assert reranker.dtype("auto", cuda) == "bfloat16"
    assert reranker.dtype("auto", cpu) == "auto"
    assert reranker.dtype("float16", cuda) == "float16"
    assert Reranker().dtype("auto", cuda) == "auto"


def test_a_card_is_read_whether_or_not_its_yaml_is_well_formed(tmp_path: Path) -> None:
    assert read_card(tmp_path) == ModelCard()
    text = "---\nlicense: mit\ntags: [a, 'b']\npipeline_tag: \"text-ranking\"\nbase_model:\n  - x/y\n- z\n---\n# pipeline_tag: no\n"
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == ModelCard("text-ranking", ("a", "b"), ("x/y", "z"), "pipeline_tag: no")
    (tmp_path / "README.md").write_text("# A model\n\npipeline_tag: text-ranking\n")
    assert read_card(tmp_path) == ModelCard(title="A model")


@pytest.mark.parametrize("row", ["template", "no separator"])
def test_a_classifier_reads_pairs_by_a_template_where_it_is_told_to(row: str, tmp_path: Path) -> None:
    own = tokenizer(bos=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(own), num_labels=1, initializer_range=0.3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    template, between = ("{{ messages[0].content }} or {{ messages[1].content }}", " or ")
    options: dict[str, Any] = {"chat_template": template}
    if row == "no separator":
        options, between = {"hf_overrides": {"use_sep_token": False}}, ""
    expected = []
    for query, document in PAIRS:
        inputs = own(query + between + document, return_tensors="pt")
        with torch.inference_mode():
            expected.append(float(model(input_ids=inputs["input_ids"]).logits.sigmoid()))
    with LLM(str(tmp_path), **options) as llm:
        assert scores(llm) == pytest.approx(expected, abs=1e-5)
    with LLM(str(tmp_path)) as llm:
        assert scores(llm) != pytest.approx(expected, abs=1e-4)
        with pytest.raises(InvalidRequest, match="has no score template"):
            llm.score("q", "d", chat_template_kwargs={"tone": "!"})
