"""Token routes: vLLM's /tokenize and /detokenize, TEI's /tokenize and /decode, and what they share a path by."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.engine.request import Request
from poolhouse.inputs.conversations import Conversations
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine

TEXT = "Tidal forces, après-ski and 42 unbelievable façades."
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


@pytest.fixture(scope="module")
def http(llm: LLM) -> TestClient:
    # Without its lifespan, which would close the engine.
    return TestClient(create_app([llm.engine]))


@pytest.fixture(scope="module")
def reference(llm: LLM) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_file(str(Path(llm.model.facts.path) / "tokenizer.json"))
    made.no_truncation()
    made.no_padding()
    return made


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine("fake", prompts={"query": "seek: ", "passage": "read: "}, max_tokens=9)
    engine.describe(aliases=("other",))
    yield engine
    engine.close()


@pytest.fixture
def fake(engine: FakeEngine) -> TestClient:
    return TestClient(create_app([engine], ServerSettings(max_client_batch_size=3)))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", [TEXT, "", "tide " * 2000])
def test_tokens_are_those_of_the_library_however_many(
    http: TestClient, reference: tokenizers.Tokenizer, text: str, special: bool
) -> None:
    expected = reference.encode(text, add_special_tokens=special)
    body = {"prompt": text, "add_special_tokens": special}
    plain = http.post("/tokenize", json=body).json()
    assert plain == {"count": len(expected.ids), "max_model_len": 256, "tokens": expected.ids, "token_strs": None}
    named = http.post("/tokenize", json={**body, "return_token_strs": True}).json()
    assert named == {**plain, "token_strs": expected.tokens}
    assert list(named) == ["count", "max_model_len", "tokens", "token_strs"]


def test_text_comes_back_with_its_special_tokens(http: TestClient) -> None:
    tokens = http.post("/tokenize", json={"prompt": "hello world"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "[CLS] hello world [SEP]"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_messages_go_through_the_chat_template(fake: TestClient, engine: FakeEngine) -> None:
    engine.conversations = Conversations({"default": TEMPLATE})
    messages = [{"role": "user", "content": "why tides"}]
    asked = fake.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert asked["token_strs"] == ["user:", "why", "tides", "assistant:"]
    body = {"messages": messages, "return_token_strs": True, "add_generation_prompt": False}
    assert fake.post("/tokenize", json=body).json()["token_strs"] == ["user:", "why", "tides"]


def test_special_tokens_of_messages_are_the_templates_unless_asked_for(http: TestClient, llm: LLM) -> None:
    assert not llm.engine.options.conversations.templates
    http = TestClient(create_app([llm.engine], ServerSettings(trust_request_chat_template=True)))
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template": TEMPLATE, "add_generation_prompt": False}
    counts = [
        http.post("/tokenize", json={**body, **special}).json()["count"]
        for special in ({}, {"add_special_tokens": False}, {"add_special_tokens": True})
    ]
    assert counts == [3, 3, 5]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "parameter", "message"),
    [
        ("/tokenize", {"prompt": "x", "model": "none"}, 404, "NotFoundError", "model", "The model `none` does not exist. Valid aliases: fake, other."),
        ("/detokenize", {"tokens": [], "model": "none"}, 404, "NotFoundError", "model", "The model `none` does not exist. Valid aliases: fake, other."),
        ("/tokenize", {}, 400, "BadRequestError", "prompt", "Give prompt (a text) or messages (a conversation)."),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "BadRequestError", "prompt", "Give prompt (a text) or messages (a conversation)."),
        ("/tokenize", {"prompt": ["x"]}, 400, "Bad Request", "body.prompt", "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template": "y"}, 400, "BadRequestError", "chat_template", "--trust-request-chat-template"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "mm_processor_kwargs": {"a": 1}}, 400, "BadRequestError", "mm_processor_kwargs", "not for requests"),
        ("/tokenize", {"messages": ["x"]}, 400, "BadRequestError", None, "messages"),
        ("/detokenize", {"tokens": [999999999]}, 400, "BadRequestError", None, "Token id 999999999 is out of vocabulary"),
        ("/detokenize", {"tokens": [True]}, 400, "Bad Request", "body.tokens.0", "tokens"),
        ("/detokenize", {}, 400, "Bad Request", "body.tokens", "tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_as_vllm_says_it(
    fake: TestClient, path: str, body: Any, status: int, kind: str, parameter: str | None, message: str
) -> None:
    reply = fake.post(path, json=body)
    assert (reply.status_code, reply.json()["type"]) == (status, kind)
    assert parameter is None or reply.json()["param"] == parameter
    assert message in reply.json()["message"]


def test_both_names_of_a_model_serve(fake: TestClient) -> None:
    replies = [fake.post("/tokenize", json={"prompt": "x y", "model": name}).json() for name in ("fake", "other")]
    assert replies[0] == replies[1]
    assert replies[0]["count"] == 2


@pytest.mark.parametrize("special", [True, False])
def test_tei_says_which_characters_each_token_stands_for(
    http: TestClient, reference: tokenizers.Tokenizer, special: bool
) -> None:
    body = {"inputs": [TEXT, "tide " * 2000], "add_special_tokens": special}
    got = http.post("/tokenize", json=body).json()
    assert got == http.post("/tei/tokenize", json=body).json()
    for text, tokens in zip(body["inputs"], got, strict=True):
        expected = reference.encode(text, add_special_tokens=special)
        assert [token["id"] for token in tokens] == expected.ids
        assert [token["special"] for token in tokens] == [bool(mask) for mask in expected.special_tokens_mask]
        for token, name, (start, stop) in zip(tokens, expected.tokens, expected.offsets, strict=True):
            assert list(token) == ["id", "text", "special", "start", "stop"]
            place = (None, None, name) if token["special"] else (start, stop, text[start:stop])
            assert (token["start"], token["stop"], token["text"]) == place
    assert sum(token["special"] for tokens in got for token in tokens) == (4 if special else 0)
    assert http.post("/tokenize", json={**body, "inputs": TEXT}).json() == got[:1]


def test_a_named_prompt_is_part_of_the_text_and_of_its_places(fake: TestClient, engine: FakeEngine) -> None:
    def words(**body: Any) -> list[Any]:
        (tokens,) = fake.post("/tokenize", json={"inputs": "why tides", **body}).json()
        return [(token["text"], token["start"], token["stop"]) for token in tokens]

    bare = [("why", 0, 3), ("tides", 4, 9)]
    assert words() == bare
    assert words(prompt_name="query") == [("seek:", 0, 5), ("why", 6, 9), ("tides", 10, 15)]
    engine.describe(default_prompt_name="passage")
    assert words() == [("read:", 0, 5), ("why", 6, 9), ("tides", 10, 15)]
    assert words(prompt_name="") == bare
    # vLLM's form knows no prompts.
    assert fake.post("/tokenize", json={"prompt": "why tides"}).json()["count"] == 2


def test_tei_decodes_one_list_or_several(http: TestClient) -> None:
    (tokens,) = http.post("/tokenize", json={"inputs": "hello world"}).json()
    ids = [token["id"] for token in tokens]
    for path in ("/decode", "/tei/decode"):
        assert http.post(path, json={"ids": ids}).json() == ["hello world"]
        assert http.post(path, json={"ids": [ids, ids[1:2]]}).json() == ["hello world", "hello"]
        whole = http.post(path, json={"ids": ids, "skip_special_tokens": False}).json()
        assert whole == ["[CLS] hello world [SEP]"]


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/tokenize", {"inputs": ""}, 400, {"error": "`inputs` cannot be empty", "error_type": "Empty"}),
        ("/tokenize", {"inputs": []}, 400, {"error": "`inputs` cannot be empty", "error_type": "Empty"}),
        ("/tei/tokenize", {"inputs": ["x", ""]}, 400, {"error": "`inputs` cannot be empty", "error_type": "Empty"}),
        ("/decode", {"ids": []}, 400, {"error": "`ids` cannot be empty", "error_type": "Empty"}),
        ("/tokenize", {"inputs": ["x"] * 4}, 422, {"error": "inputs has 4 entries; one request may hold 3 (--max-client-batch-size).", "error_type": "Validation"}),
        ("/tei/decode", {"ids": [[1]] * 4}, 422, {"error": "ids has 4 entries; one request may hold 3 (--max-client-batch-size).", "error_type": "Validation"}),
        ("/tokenize", {"inputs": "x", "prompt_name": "quary"}, 422, {"error": "The model has no prompt named 'quary'.", "error_type": "Validation"}),
        ("/tokenize", {"inputs": "x", "model": "none"}, 404, {"error": "The model `none` does not exist. Served models: fake, other.", "error_type": "Validation"}),
        ("/decode", {"ids": [999999999]}, 422, {"error": "Token id 999999999 is out of vocabulary", "error_type": "Validation"}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_as_tei_says_it(
    fake: TestClient, path: str, body: Any, status: int, error: dict[str, str]
) -> None:
    reply = fake.post(path, json=body)
    assert (reply.status_code, reply.json()) == (status, error)


@pytest.mark.parametrize(
    ("path", "short", "long"),
    [
        ("/tokenize", {"prompt": "x"}, {"prompt": "x" * 200_001}),
        ("/tokenize", {"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"inputs": "x"}, {"inputs": ["x" * 100_001] * 2}),
    ],
)
def test_long_texts_and_templates_leave_the_event_loop_free(
    engine: FakeEngine, fake: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, short: Any, long: Any
) -> None:
    threads: list[str] = []
    tokenize = engine.tokenize

    def watched(requests: list[Request]) -> Any:
        threads.append(threading.current_thread().name)
        return tokenize(requests)

    monkeypatch.setattr(engine, "tokenize", watched)
    for body in (short, long):
        assert fake.post(path, json=body).status_code == 200
    assert [name.startswith("asyncio_") for name in threads] == [False, True]
