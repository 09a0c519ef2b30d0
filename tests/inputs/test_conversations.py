"""Conversations render as transformers renders them, and a template that does not work harms nobody."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.conversations import Conversations
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import parse_prompts
from poolhouse.inputs.templates import sandbox
from poolhouse.inputs.templates.sandbox import Contents, contents_of
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from tests.inputs.test_tokenizer import byte_bpe

CHATML = """\
{%- set start = '<|im_start|>' %}
{%- if tools %}
    {{- start ~ 'system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- start + 'system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- start + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
PARTS = """\
{% for message in messages %}<|{{ message['role'] }}|>
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{% for part in message['content'] %}
{% if part['type'] == 'image' or 'image_url' in part %}<image>{% elif 'text' in part %}{{ part['text'] }}{% endif %}
{% endfor %}{% endif %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "parts": PARTS, "mistral": MISTRAL}

ALONE = [{"role": "user", "content": "the moon <b>falls</b>\n under  the water "}]
TURNS = [
    *ALONE,
    {"role": "assistant", "content": "<think>bread</think>\nand ships", "tool_calls": None},
    {"role": "user", "content": "naïve 東京?"},
]
TOLD = [{"role": "system", "content": " sing\n"}, *TURNS]
TEXTS = [{"role": "user", "content": [{"type": "text", "text": "the moon"}, {"type": "text", "text": " falls"}]}]
TOOL = {"type": "function", "function": {"name": "songs", "description": "Größe <&>"}}


def saved(folder: Path, template: Any) -> Any:
    """transformers' tokenizer with a chat template, saved in a folder."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


ROWS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "chatml, one turn": ("chatml", ALONE, {}),
    "chatml, system and turns": ("chatml", TOLD, {}),
    "chatml, generation prompt": ("chatml", TURNS, {"add_generation_prompt": True}),
    "chatml, variable": ("chatml", TURNS, {"add_generation_prompt": True, "enable_thinking": False}),
    "chatml, tools": ("chatml", TOLD, {"tools": [TOOL]}),
    "chatml, final message open": ("chatml", TURNS[:2], {"continue_final_message": True}),
    "llama, date": ("llama", TOLD, {}),
    "llama, trims what it continues": ("llama", ALONE, {"continue_final_message": True}),
    "llama, a special token by variable": ("llama", ALONE, {"bos_token": "", "date_string": "1 Jan"}),
    "parts, texts": ("parts", TOLD, {"add_generation_prompt": True}),
    "parts, parts": ("parts", TEXTS, {}),
    "parts, final message open": ("parts", TEXTS, {"continue_final_message": True}),
    "mistral, special tokens and generation tags": ("mistral", TURNS, {}),
}


@pytest.mark.parametrize("row", ROWS)
def test_text_and_ids_are_those_of_transformers(row: str, tmp_path: Path) -> None:
    name, messages, options = ROWS[row]
    theirs = saved(tmp_path, TEMPLATES[name])
    asked = {key: options[key] for key in ("add_generation_prompt", "continue_final_message") if key in options}
    variables = {key: value for key, value in options.items() if key not in asked}
    prompt = Conversations.of(tmp_path).prompt(messages, variables=variables, **asked)
    assert prompt.text == theirs.apply_chat_template(messages, tokenize=False, **options)
    (tokens,) = Tokenizer.from_folder(tmp_path).encode([prompt], [Limit(512, add_special_tokens=False)])
    assert isinstance(tokens, Tokens)
    assert tokens.ids.tolist() == theirs.apply_chat_template(messages, return_dict=False, **options)


PLAIN = "{{ messages[0].content }}%s"


def test_templates_are_found_where_transformers_keeps_them(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert not Conversations.of(tmp_path).templates
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN % "oldest"}))
    assert Conversations.of(tmp_path).templates == {"default": PLAIN % "oldest"}
    config.write_text(json.dumps({"chat_template": PLAIN % "old"}))
    assert Conversations.of(tmp_path).templates == {"default": PLAIN % "old"}
    several = [{"name": name, "template": PLAIN % name} for name in ("default", "tool_use", "rag")]
    config.write_text(json.dumps({"chat_template": several}))
    named = Conversations.of(tmp_path)
    assert named.prompt(ALONE).text == ALONE[0]["content"] + "default"
    assert named.prompt(ALONE, variables={"tools": [TOOL]}).text == ALONE[0]["content"] + "tool_use"
    assert named.prompt(ALONE, chat_template="rag").text == ALONE[0]["content"] + "rag"
    (tmp_path / "chat_template.jinja").write_text(PLAIN % "new")
    assert Conversations.of(tmp_path).templates == {"default": PLAIN % "new"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(PLAIN % "newer")
    assert Conversations.of(tmp_path).templates == {"default": PLAIN % "new", "rag": PLAIN % "newer"}
    own = Conversations.of(tmp_path, PLAIN % "own")
    assert own.prompt(ALONE).text == ALONE[0]["content"] + "own"
    assert own.prompt(ALONE, chat_template=PLAIN % "asked").text == ALONE[0]["content"] + "asked"


def test_several_saved_templates_come_back(tmp_path: Path) -> None:
    theirs = saved(tmp_path, {"default": CHATML, "rag": MISTRAL})
    ours = Conversations.of(tmp_path)
    for name in (None, "rag"):
        expected = theirs.apply_chat_template(ALONE, chat_template=name, tokenize=False)
        assert ours.prompt(ALONE, chat_template=name).text == expected


REST = (
    "{% set rest = messages[1:] %}{% for m in rest %}{% set c = m['content'] %}"
    "{% for part in c | list %}{{ part.text }}{% endfor %}{% endfor %}"
)
MACRO = (
    "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ part.text }}{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}"
)
NAMESPACE = (
    "{% set ns = namespace() %}{% set ns.all = messages %}"
    "{% for m in ns.all %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "parts", "wrapped"),
    [
        (CHATML, False, True),
        (LLAMA, False, True),
        (MISTRAL, False, True),
        (PARTS, True, False),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True, True),
        ("{% for part in messages[0]['content'] %}{{ part.text }}{% endfor %}", True, True),
        (REST, True, True),
        (MACRO, True, False),
        (NAMESPACE, True, True),
        (
            "{% for m in messages %}{% for line in m.content.split('.') %}{{ line }}{% endfor %}{% endfor %}",
            False,
            True,
        ),
        ("{% for d in documents %}{% for part in d.content %}{{ part }}{% endfor %}{% endfor %}", False, True),
    ],
)
def test_what_a_template_reads_is_seen_in_its_loops(template: str, parts: bool, wrapped: bool) -> None:
    assert contents_of(template, "template") == Contents(parts, wrapped)


def test_contents_take_the_form_that_the_template_reads() -> None:
    loop = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    parts, texts = Conversations({"default": loop}), Conversations({"default": PLAIN % ""})
    assert parts.prompt([{"role": "user", "content": "one"}]).text == "[one]"
    assert parts.prompt(TEXTS).text == "[the moon][ falls]"
    assert texts.prompt(TEXTS).text == "the moon\n falls"
    told = Conversations({"default": PLAIN % ""}, content_format="openai")
    assert told.prompt(ALONE).text == str([{"type": "text", "text": ALONE[0]["content"]}])
    assert Conversations({"default": loop}, content_format="string").prompt(TEXTS).text.count("[") == 15  # type: ignore[union-attr]


def test_a_template_cannot_change_what_the_caller_holds() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "more": {"deep": [1]}}]
    before = json.dumps(messages)
    ours = Conversations(
        {"default": "{% for p in messages[0].content %}{{ p.text }}{% endfor %}{{ messages[0].more.deep[0] }}"}
    )
    assert ours.prompt(messages, continue_final_message=True).text == "a"
    assert json.dumps(messages) == before


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "at least one message"),
        ("hello", {}, "must be a list"),
        (None, {}, "must be a list"),
        ([{"content": "x"}], {}, r"messages\[0\] must be an object with 'role'"),
        ([*ALONE, "x"], {}, r"messages\[1\] must be an object"),
        (user(3), {}, r"messages\[0\].content must be a text or a list"),
        (user([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]), {},
         r"messages\[0\].content\[1\] is 'image_url' and needs 'image_url'"),
        (user([{"type": "video_url", "video_url": {}}]), {}, "is 'video_url'"),
        (user([{"type": "input_audio", "text": "x"}]), {}, "is 'input_audio'"),
        ([{"role": "user", "content": "x", "more": object()}], {}, "plain data"),
        (ALONE, {"variables": {"call": print}}, "plain data"),
        (ALONE, {"variables": {"chat_template": "x"}}, "'chat_template' is reserved"),
        (ALONE, {"variables": {"tokenize": False}}, "'tokenize' is reserved"),
        (ALONE, {"add_generation_prompt": True, "continue_final_message": True}, "Cannot set both"),
        ([{"role": "user"}], {"continue_final_message": True}, "no text to continue"),
        (ALONE, {"continue_final_message": True, "chat_template": "{{ bos_token }}"}, "does not show the end"),
        (TURNS[1:], {}, "chat template failed: Conversation roles must alternate"),
        (ALONE, {"chat_template": "{% for %}"}, r"given chat template does not compile \(line 1\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_rendered_is_refused(messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Conversations({"default": MISTRAL}, {"bos_token": "<s>", "eos_token": "</s>"}).prompt(messages, **options)


def test_without_a_template_there_are_no_conversations() -> None:
    with pytest.raises(InvalidRequest) as raised:
        Conversations().prompt(ALONE)
    assert str(raised.value) == (
        "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if "
        "the tokenizer does not define one."
    )
    with pytest.raises(InvalidRequest, match=r"choose one of \['rag', 'sing'\]"):
        Conversations({"rag": PLAIN, "sing": PLAIN}).prompt(ALONE)


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}%s{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED.replace("%s", ""), "more than 0.2 seconds"),
        (NESTED.replace("%s", "x"), "more than"),
        ("{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}", "0.2 seconds"),
        ("{% for x in [1] recursive %}{{ loop(range(9)) }}{{ loop(range(9)) }}{% endfor %}", "recursion"),
        ("{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", "recursion"),
        ("{{ range(100000000)|length }}", "too big"),
        ("{{ 'x' * 100000000 }}", "characters"),
        ("{{ 100000000 * [1] }}", "characters"),
        ("{{ 9 ** 9999999999 }}", "power"),
        ("{{ '%999999999d' % 1 }}", "wide"),
        ("{{ '%(a)-999999999d' % {'a': 1} }}", "wide"),
        ("{{ '%2.999999999f' % 1 }}", "wide"),
        ("{{ '%.*f' % (999999999, 1) }}", "wide"),
        (
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "characters",
        ),
        ("{% set x = 'x' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}", "characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
        ("{{ lipsum(n=100000) }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% set n = namespace() %}{% set n.__html__ = 1 %}", "cannot hold"),
        ("{{ namespace(__html__=1) }}", "cannot hold"),
        ("{{ dict.__globals__.x }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_without_end_or_manners_is_stopped(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if message in ("more than", "more than 0.2 seconds", "0.2 seconds"):
        # The others are stopped for their size, however slow the memory is.
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(InvalidRequest, match=f"failed: .*{message}"):
        Conversations({"default": template}).prompt(ALONE)
    assert time.monotonic() - begun < 3


def test_the_bounds_change_no_operator() -> None:
    template = (
        "{{ 2 * 3 }} {{ 'ab' * 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7 % 4 }} {{ '%05.1f|**%s** %d%%' % (2.5, 'x', 9) }} {{ 1 ~ 'a' ~ none }} "
        "{{ [1] + [2] }} {{ 1 + 2.5 }} {{ dict(a=1) }} {% for i in [1, 2, 3] if i != 2 %}{{ loop.index }}{{ i }}"
        "{% else %}none{% endfor %}{% for i in [] %}{% else %} none{% endfor %}"
    )
    expected = "6 abab 1024 0.5 3 002.5|**x** 9% 1aNone [1, 2] 3.5 {'a': 1} 1123 none"
    assert Conversations({"default": template}).prompt(ALONE).text == expected


def test_messages_stand_where_prompts_stand() -> None:
    text, chat = parse_prompts(
        ["x", {"messages": ALONE, "add_generation_prompt": True, "chat_template_kwargs": {"a": 1}}]
    )
    assert text.conversation is None
    assert chat.text is None
    assert chat.conversation is not None
    assert Conversations({"default": PLAIN % "{{ add_generation_prompt }}{{ a }}"}).rendered(
        chat.conversation
    ).text == (ALONE[0]["content"] + "True1")
    with pytest.raises(InvalidRequest, match="unknown key 'chat_template' beside 'messages'"):
        parse_prompts({"messages": ALONE, "chat_template": "x"})
    with pytest.raises(InvalidRequest, match="add_generation_prompt must be true or false, got 'no'"):
        parse_prompts({"messages": ALONE, "add_generation_prompt": "no"})
