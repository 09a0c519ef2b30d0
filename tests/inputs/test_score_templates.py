"""Score templates: the caller's own, what is refused, and how pairs are cut that a template joins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from poolhouse import LLM, PoolingParams
from poolhouse.errors import ConfigError, InputTooLong, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from tests.inputs.test_tokenizer import byte_bpe
from tests.models.tiny_rerankers import DOCUMENTS, QUERIES, save, tokenizer

# What Qwen3-Reranker's template ends with.
TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def scores(llm: LLM, **options: Any) -> list[float]:
    return [output.outputs.score for output in llm.score(QUERIES, DOCUMENTS, use_tqdm=False, **options)]


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-Reranker"
    save(folder, "Qwen3")
    return folder


def test_a_template_of_the_callers_own(qwen: Path) -> None:
    text = "{{ messages[0].content }} / {{ messages[1].content }}{{ tone }}\n"
    file = qwen / "own.jinja"
    file.write_text(text)
    with LLM(str(qwen)) as llm:
        expected = [llm.classify(f"{q} / {d}!\n")[0].outputs.probs[0] for q, d in zip(QUERIES, DOCUMENTS, strict=True)]
        for template in (text, str(file)):
            got = scores(llm, chat_template=template, chat_template_kwargs={"tone": "!"})
            assert got == pytest.approx(expected, abs=1e-5)
    with LLM(str(qwen), chat_template=text.replace("{{ tone }}", "!")) as llm:
        assert scores(llm) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }", "does not compile"),
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ messages[7].content.x.y }}", "failed"),
        ("{{ messages[0].content }}", "does not show the document"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed"),
        ("qwen_reranker", "Did you mean 'qwen3_reranker'"),
    ],
)
def test_templates_that_do_not_work_are_refused(template: str, message: str, qwen: Path) -> None:
    with LLM(str(qwen)) as llm, pytest.raises(InvalidRequest, match=message):
        llm.score("q", "d", chat_template=template)
    with pytest.raises(ConfigError, match=message):
        LLM(str(qwen), chat_template=template)


def test_a_template_that_fails_on_one_pair_fails_that_pair_alone(qwen: Path) -> None:
    template = "{% if 'boom' in messages[1].content %}{{ raise_exception('boom') }}{% endif %}" + "".join(
        f"{{{{ messages[{n}].content }}}}" for n in (0, 1)
    )
    with LLM(str(qwen)) as llm:
        with pytest.raises(InvalidRequest, match="failed: boom"):
            llm.score("q", ["fine", "boom"], chat_template=template)
        for name in ("chat_template", "tools", "tokenize"):
            with pytest.raises(InvalidRequest, match="reserved"):
                llm.score("q", "d", chat_template_kwargs={name: 1})


def test_a_pair_that_is_too_long_names_its_longer_side(qwen: Path) -> None:
    with LLM(str(qwen), max_model_len=200) as llm:
        with pytest.raises(InputTooLong, match=r"the query has 1, the document 600, .* cut it with max_tokens_per_doc"):
            llm.score("q", "!?" * 300)
        with pytest.raises(InputTooLong, match="Shorten the query"):
            llm.score("!?" * 300, "d")
        whole = llm.score("q", "!?" * 300, pooling_params=PoolingParams(truncate_prompt_tokens=-1))[0]
        assert (whole.truncated, len(whole.prompt_token_ids)) == (True, 200)
        tail = ids(TAIL)
        assert whole.prompt_token_ids[-len(tail) :] == tail
        left = llm.score(
            "q", "!?" * 300 + "end", pooling_params=PoolingParams(truncate_prompt_tokens=-1, truncation_side="left")
        )[0]
        assert left.prompt_token_ids[-len(tail) - 1] == ids("?end")[-1]
        assert left.prompt_token_ids[:10] == whole.prompt_token_ids[:10]
        with pytest.raises(InputTooLong, match="leave no room for the document"):
            llm.score("!?" * 300, "d", pooling_params=PoolingParams(truncate_prompt_tokens=-1))


def test_sides_are_cut_by_their_own_tokens(qwen: Path) -> None:
    with LLM(str(qwen)) as llm:
        (cut,) = llm.score(
            "!?" * 30, "!?" * 300, pooling_params=PoolingParams(max_tokens_per_query=3, max_tokens_per_doc=5)
        )
        (short,) = llm.score("!?!", "!?!?!")
        assert cut.prompt_token_ids == short.prompt_token_ids
        assert cut.truncated
        assert cut.original_tokens == len(short.prompt_token_ids) + 57 + 595


def test_a_huge_document_is_not_tokenised_whole(qwen: Path) -> None:
    with LLM(str(qwen), max_model_len=300) as llm:
        cut = PoolingParams(truncate_prompt_tokens=-1)
        (output,) = llm.score("q", "!?" * 2_000_000, pooling_params=cut)
        (smaller,) = llm.score("q", "!?" * 1000, pooling_params=cut)
        assert output.prompt_token_ids == smaller.prompt_token_ids
        assert output.original_tokens == pytest.approx(4_000_000, rel=0.01)
        assert output.original_is_estimate


def test_templates_and_instructions_are_for_models_that_read_them() -> None:
    with LLM() as llm:
        with pytest.raises(InvalidRequest, match="encodes query and document apart"):
            llm.score("q", "d", chat_template="qwen3_reranker")
        with pytest.raises(InvalidRequest, match="reads no instruction"):
            llm.score("q", "d", instruction="Find cats")


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("stored", [False, True])
def test_pairs_that_a_template_joins_are_lower_cased_where_it_is_asked(asked: bool | None, stored: bool) -> None:
    native = byte_bpe()
    native.add_special_tokens(["<TURN>"])
    own = Tokenizer(native, lower_case=stored)
    template = ScoreTemplate("own", "<TURN>Query: {{ messages[0].content }}{{ seam }} Then {{ messages[1].content }}")
    pair = Prompt("The MOON", pair="Ships\nAND Bread " * 3, template=template)
    (cut,) = own.encode([pair], [Limit(512, lower_case=asked, max_document_tokens=4)])
    lowers = stored if asked is None else asked
    document = "Ships\nAND Bread " * 3
    document = document.lower() if lowers else document
    kept = document[: native.encode(document, add_special_tokens=False).offsets[3][1]]
    parts = ["query: the moon", " then "] if lowers else ["Query: The MOON", " Then "]
    first, second = (native.encode(text, add_special_tokens=False).ids for text in (parts[0], parts[1] + kept))
    assert isinstance(cut, Tokens)
    assert cut.ids.tolist() == [0, native.token_to_id("<TURN>"), *first, *second, 2]


def test_special_tokens_in_lower_cased_texts_keep_their_case() -> None:
    native = byte_bpe()
    native.add_special_tokens(["<TURN>"])
    (tokens,) = Tokenizer(native, lower_case=True).encode([Prompt("<TURN> The MOON")], [Limit(64, offsets=True)])
    assert isinstance(tokens, Tokens)
    assert tokens.ids.tolist() == native.encode("<TURN> the moon").ids
    assert tokens.offsets is not None
    assert tokens.offsets.bounds[1].tolist() == [0, 6]
