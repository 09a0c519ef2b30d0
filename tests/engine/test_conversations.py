"""Conversations and tokens at the engine: what an engine does with messages equals what it does with their text."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers

from poolhouse import LLM
from poolhouse.engine.request import Request
from poolhouse.errors import ConfigError, InvalidRequest
from poolhouse.inputs.conversations import Conversations
from poolhouse.inputs.prompts import Conversation, Prompt
from poolhouse.testing import FakeEngine
from tests.checkpoints import save_checkpoint
from tests.inputs.test_conversations import ALONE, LLAMA, MISTRAL, TURNS
from tests.models.tiny_rerankers import save as save_reranker

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


SHORT = [{"role": "system", "content": "sing"}, {"role": "user", "content": "the moon"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "roberta, byte bpe")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as llm:
        yield llm


def test_messages_are_embedded_as_their_rendered_text(llm: LLM, folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    plain, chat, turns = llm.embed(["the moon", {"messages": ALONE}, {"messages": SHORT}], use_tqdm=False)
    for output, messages in ((chat, ALONE), (turns, SHORT)):
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert output.prompt_token_ids == ids
        (alone,) = llm.embed([ids], use_tqdm=False)
        assert np.abs(alone.outputs.array - output.outputs.array).max() < 1e-5
    assert plain.prompt_token_ids == theirs("the moon")["input_ids"]


def test_a_template_never_holds_up_the_thread_that_submits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noted(self: Conversations, conversation: Conversation) -> Prompt:
        threads.append(threading.current_thread())
        return rendered(self, conversation)

    rendered = Conversations.rendered
    monkeypatch.setattr(Conversations, "rendered", noted)
    (future,) = llm.engine.submit([Request(Prompt(None, conversation=Conversation(ALONE)), "embed")])
    assert future.result(60).array.shape
    assert threads
    assert threading.current_thread() not in threads


def test_a_conversation_takes_special_tokens_where_they_are_asked(llm: LLM) -> None:
    (without,) = llm.engine.tokenize([Request(llm.engine.conversation(ALONE), "embed")])
    rendered = llm.engine.conversation(ALONE, add_special_tokens=True)
    waiting = Prompt(None, conversation=Conversation(ALONE, add_special_tokens=True))
    for tokens in llm.engine.tokenize([Request(rendered, "embed"), Request(waiting, "embed")]):
        assert tokens.ids.tolist() == [0, *without.ids.tolist(), 2]


def test_a_request_brings_its_own_template(llm: LLM) -> None:
    waiting = Prompt(None, conversation=Conversation(ALONE, chat_template="{{ messages[0].role }}"))
    (tokens,) = llm.engine.tokenize([Request(waiting, "embed")])
    assert llm.engine.detokenize(tokens.ids) == "user"


def test_messages_take_no_named_prompt(llm: LLM, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"q": "find "}, "default_prompt_name": "q"}'
    )
    with LLM(str(tmp_path)) as prompted:
        (output,) = prompted.embed({"messages": ALONE}, use_tqdm=False)
        assert output.prompt_token_ids == llm.embed({"messages": ALONE}, use_tqdm=False)[0].prompt_token_ids
        with pytest.raises(InvalidRequest, match="as a system message"):
            prompted.embed({"messages": ALONE}, prompt_name="q", use_tqdm=False)


def test_a_conversation_that_fails_fails_alone(llm: LLM) -> None:
    bad = Request(Prompt(None, conversation=Conversation([{"content": "no role"}])), "embed")
    good = Request(llm.engine.conversation(ALONE), "embed")
    failed, answered = llm.engine.submit([bad, good])
    assert answered.result(60).array.shape == (llm.model.facts.width,)
    assert "'role'" in str(failed.exception(60))
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[0\] is 'image_url'"):
        llm.embed({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, use_tqdm=False)


def test_places_are_for_texts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="messages have none of their own"):
        llm.engine.tokenize([Request(Prompt(None, conversation=Conversation(ALONE)), "embed", offsets=True)])
    with pytest.raises(InvalidRequest, match="messages have none of their own"):
        llm.embed_chunks([{"messages": ALONE}], chunk_size=4)  # type: ignore[list-item]
    prompt = llm.engine.conversation(ALONE)
    (tokens,) = llm.engine.tokenize([Request(prompt, "embed", offsets=True)])
    assert tokens.offsets is not None
    assert tokens.offsets.bounds[0].tolist() == [0, 3]
    assert not tokens.offsets.special.any()


def test_the_users_template_serves_messages_and_pairs(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    with LLM(str(folder), chat_template=str(file)) as own:
        assert own.engine.conversation(TURNS[:1]).text == "[user]" + TURNS[0]["content"]
        assert own.engine.facts.score_template is not None
        assert own.engine.facts.score_template.render("a", "b") == "[query]a[document]b"
    # A template of turns that must alternate joins no pair; messages are what it is for.
    with LLM(str(folder), chat_template=MISTRAL) as alternating:
        assert alternating.engine.facts.score_template is None
        assert alternating.engine.conversation(ALONE).text == f"<s>[INST] {ALONE[0]['content']} [/INST]\n"
    with pytest.raises(ConfigError, match="does not compile"):
        LLM(str(folder), chat_template="{% for %}")


def test_a_built_in_template_is_for_pairs_alone(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-Reranker"
    save_reranker(folder, "Qwen3")
    (folder / "chat_template.jinja").write_text(LLAMA)
    with LLM(str(folder), chat_template="qwen3_reranker") as llm:
        assert llm.engine.conversation(ALONE).text.startswith("<|start_header_id|>")  # type: ignore[union-attr]


def test_contents_may_be_told_to_be_parts(folder: Path) -> None:
    with LLM(str(folder), chat_template_content_format="openai") as llm:
        assert "[{'type': 'text'" in str(llm.engine.conversation(ALONE).text)


def test_a_model_without_a_template_says_so() -> None:
    with LLM() as llm, pytest.raises(InvalidRequest, match="you must provide a chat template"):
        llm.embed({"messages": ALONE}, use_tqdm=False)


def test_tokens_become_text_again(llm: LLM, folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs("the moon, naïve")["input_ids"]
    assert llm.engine.detokenize(ids) == theirs.decode(ids)
    assert llm.engine.detokenize(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert llm.engine.token_strings(ids) == theirs.convert_ids_to_tokens(ids)
    assert llm.engine.special_ids == {token for token, added in theirs.added_tokens_decoder.items() if added.special}
    with pytest.raises(InvalidRequest, match="Token id 999999 is out of vocabulary"):
        llm.engine.detokenize([999999])


def test_the_double_does_the_same_with_words() -> None:
    engine = FakeEngine(prompts={"q": "find "})
    request = Request(Prompt("the  moon"), "embed", prompt_name="q", offsets=True)
    (tokens,) = engine.tokenize([request])
    assert engine.token_strings(tokens.ids.tolist()) == ["find", "the", "moon"]
    assert engine.detokenize(tokens.ids.tolist()) == "find the moon"
    assert tokens.offsets is not None
    assert tokens.offsets.bounds.tolist() == [[0, 0], [0, 3], [5, 9]]
    with pytest.raises(InvalidRequest, match="out of vocabulary"):
        engine.detokenize([1])
    chat = engine.conversation([{"role": "user", "content": "hello"}])
    assert chat.text == "user: hello\n"
    (rendered,) = engine.tokenize([Request(Prompt(None, conversation=chat.conversation), "embed")])
    assert rendered.ids.tolist() == engine.tokenize([Request(chat, "embed")])[0].ids.tolist()
    engine.close()
