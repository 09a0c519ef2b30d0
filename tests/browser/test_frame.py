"""The frame of the page: what it trusts, keys, prefixes, loading, errors, keyboards, small windows, colours."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
from typing import Any

import httpx
import pytest

from tests.browser.conftest import MODELS, TASKS, Opened, Opener
from tests.browser.test_tasks import LANGUAGES, execute
from tests.server.running import Running, running
from tests.server.sockets import wait_until

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
MARKUP = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>&amp;</b>\'"`${1}'
REFUSED = "Failed to load resource: the server responded with a status of"

# An embedder, a classifier and a tagger whose names are markup.
HOSTILE = f"""engines = [
        FakeEngine({MARKUP!r}, tasks=("embed", "token_embed"), prompts={{{MARKUP!r}: "x"}}),
        FakeEngine("labels " + {MARKUP!r}, tasks=("classify",), label_names={{0: {MARKUP!r}, 1: "javascript:alert(1)"}}),
        FakeEngine("tags/of#any?kind", tasks=("token_classify",), width=2, label_names={{0: {MARKUP!r}, 1: "__proto__"}}),
    ]"""


def test_texts_labels_and_names_of_models_are_never_markup(opened: Opener) -> None:
    with made_up(HOSTILE) as server:
        shown = opened(server.url)
        shown.page.goto(server.url)
        for index in range(3):
            shown.page.locator("#model").select_option(index=index)
            for link in shown.page.locator("nav a").all()[:-1]:
                link.click()
                for area in shown.page.locator("textarea").all():
                    area.fill("\n".join([MARKUP, f"{MARKUP} again", "plain"]))
                shown.run()
                assert shown.texts(".result .problem") == []
                assert MARKUP[:60] in shown.page.inner_text("main")
                for language in LANGUAGES:
                    shown.page.get_by_role("button", name=language, exact=True).click()
                for summary in shown.page.locator("summary").all():
                    summary.click()
                assert (
                    shown.page.locator("main script, main b:has-text('&amp;'), main img:not([src^='data:'])").count()
                    == 0
                )
            shown.page.locator("nav a").last.click()
            shown.page.locator(".server").wait_for()
        assert shown.page.evaluate("window.hacked") is None


class made_up:
    """A server of made-up engines, which ends well."""

    def __init__(self, load: str, **settings: Any) -> None:
        self.server = Running(load, **settings)

    def __enter__(self) -> Running:
        return self.server.ready()

    def __exit__(self, *_: object) -> None:
        status, log = self.server.stop()
        assert (status, "Traceback" in log) == (0, False), log


def test_the_browser_itself_lets_nothing_go_elsewhere(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    shown.allowed = ["Content Security Policy", "violates the following"]
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        blocked = shown.page.evaluate(
            """async (elsewhere) => {
                const found = [];
                document.addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
                await fetch(elsewhere).catch(() => 0);
                document.body.append(Object.assign(new Image(), { src: `${elsewhere}x.png` }));
                document.body.append(Object.assign(document.createElement("script"), { textContent: "window.hacked = 1" }));
                document.body.append(Object.assign(document.createElement("form"), { id: "away", action: elsewhere }));
                document.getElementById("away").submit();
                await new Promise((done) => setTimeout(done, 300));
                return found;
            }""",
            f"http://127.0.0.1:{elsewhere.getsockname()[1]}/",
        )
        assert received(elsewhere) == b""
    assert {"connect-src", "img-src", "script-src-elem", "form-action"} <= set(blocked)
    assert shown.page.evaluate("window.hacked") is None
    # The list of requests holds those that were blocked.
    shown.asked.clear()


def received(listener: socket.socket) -> bytes:
    """What came; a browser may connect before it knows that it must not send a form."""
    listener.settimeout(0.2)
    found = b""
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return found
        with connection:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                found += connection.recv(1000)


def test_a_key_is_asked_for_and_stays_in_its_tab(opened: Opener, tmp_path: Any) -> None:
    with running(api_key="right-key") as server:
        shown = opened(server.url)
        shown.allowed = [f"{REFUSED} 401"]
        shown.page.goto(server.url)
        shown.page.get_by_role("heading", name="The server wants a key").wait_for()
        field = shown.page.get_by_label("Key of this server")
        assert field.evaluate("(one) => one === document.activeElement")
        for key in ("wrong-key", "right-key"):
            field.fill(key)
            field.press("Enter")
            if key == "wrong-key":
                wait_until(
                    lambda: len([one for one in shown.asked if one.url.endswith("/v1/models")]) == 2, "a refusal"
                )
                field.wait_for()
        shown.page.get_by_role("heading", name="Similarity").wait_for()
        shown.run()
        assert shown.page.locator(".heatmap td.heat").count() == 56
        assert (
            shown.page.evaluate(
                "[Object.values({...localStorage}).join(), location.href, document.cookie].join()"
            ).count("key")
            == 0
        )
        assert shown.page.evaluate("sessionStorage.getItem('poolhouse-key')") == "right-key"
        assert "right-key" not in shown.page.content()
        assert all("right-key" not in one.url for one in shown.asked)
        # Programs take it from the environment.
        for language in LANGUAGES:
            shown.page.get_by_role("button", name=language, exact=True).click()
            program = shown.page.locator(".calls pre").text_content() or ""
            assert "right-key" not in program
            output = execute(program, language, tmp_path, POOLHOUSE_API_KEY="right-key")
            assert len(json.loads(output)["data"]) == 8
        # Another tab has none.
        other = shown.page.context.new_page()
        other.goto(server.url)
        other.get_by_role("heading", name="The server wants a key").wait_for()
        # Forgotten, calls are refused, and say so.
        shown.page.get_by_role("button", name="Key ✓").click()
        shown.page.get_by_role("button", name="Forget").click()
        shown.page.get_by_role("button", name="Run").click()
        assert "Unauthorized" in shown.page.locator(".result .problem").inner_text()
        assert shown.page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("path", ["/pool", "/pool/", "/"])
def test_it_works_behind_a_prefix(opened: Opener, path: str) -> None:
    with running(root_path="/pool") as server:
        shown = opened(server.url)
        shown.page.goto(f"{server.url}{path}")
        shown.page.get_by_role("heading", name="Similarity").wait_for()
        shown.run()
        prefix = "" if path == "/" else "/pool"
        assert f"{server.url}{prefix}/v1/embeddings" in (shown.page.locator(".calls pre").text_content() or "")
        assert {one.url.removeprefix(server.url).startswith(f"{prefix}/") for one in shown.asked[1:]} == {True}


def test_it_waits_for_models_that_load(opened: Opener) -> None:
    server = Running("sys.stdin.readline()\n    engines = [FakeEngine('held')]", stdin=True).listening()
    shown = opened(server.url)
    shown.allowed = [f"{REFUSED} 503"]
    shown.page.goto(server.url)
    shown.page.get_by_role("heading", name="Not ready yet").wait_for()
    assert "The model is being loaded; ask again soon." in shown.page.inner_text("main")
    assert server.process.stdin is not None
    server.process.stdin.write("now\n")
    server.process.stdin.flush()
    shown.page.get_by_role("heading", name="Similarity").wait_for()
    server.process.send_signal(signal.SIGTERM)
    assert server.ended()[0] == 0


def test_errors_are_shown_as_the_server_words_them(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    shown.allowed = [f"{REFUSED} 400"]
    long = "word " * 400
    shown.page.get_by_label("Texts", exact=True).fill(f"{long}\nshort")
    shown.page.get_by_label("Cut texts that are too long").uncheck()
    shown.run()
    body = {"model": "all-MiniLM-L6-v2", "input": [long.strip(), "short"]}
    expected = httpx.post(f"{url}/v1/embeddings", json=body, trust_env=False).json()["message"]
    assert (shown.texts(".result .problem b"), shown.texts(".result .problem p")) == (["400 Bad Request"], [expected])
    shown.page.get_by_label("Cut texts that are too long").check()
    shown.page.get_by_role("button", name="Run").click()
    shown.page.locator(".heatmap").wait_for()
    assert "1 cut" in shown.page.inner_text(".status")
    assert "cut: it has 402 tokens" in shown.page.inner_text(".cuts")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("", "Give at least 2 texts."),
        ("   \n\n  ", "Give at least 2 texts."),
        ("one alone", "Give at least 2 texts."),
        ("text\n" * 1001, "Here are 1\u202f001 texts; at most 400 can be drawn."),
    ],
    ids=["empty", "blank", "one", "many"],
)
def test_what_cannot_be_drawn_is_not_sent(opened: Opener, url: str, texts: str, words: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    shown.page.get_by_label("Texts", exact=True).fill(texts)
    shown.run()
    assert shown.texts(".result .problem p") == [words]
    assert not [one for one in shown.asked if one.method == "POST"]


def test_a_call_can_be_stopped_and_leaves_the_queue(opened: Opener) -> None:
    with made_up("engines = [FakeEngine('slow')]; engines[0].open.clear()") as server:
        shown = opened(server.url).task("similarity", "slow")
        shown.page.get_by_role("button", name="Run").click()
        wait_until(lambda: httpx.get(f"{server.url}/load", trust_env=False).json()["server_load"] == 8, "the call")
        shown.page.get_by_role("button", name="Stop").click()
        wait_until(lambda: shown.page.inner_text(".status") == "Stopped.", "the stop")
        wait_until(
            lambda: httpx.get(f"{server.url}/load", trust_env=False).json()["server_load"] == 0, "an empty queue"
        )


def test_a_server_that_is_gone_is_an_error_and_not_a_hang(opened: Opener) -> None:
    server = Running().ready()
    shown = opened(server.url).task("similarity", "fake")
    shown.allowed = ["ERR_CONNECTION_REFUSED"]
    server.process.kill()
    server.process.communicate()
    shown.page.get_by_role("button", name="Run").click()
    assert "No answer" in shown.page.locator(".result .problem").inner_text()


def test_a_hundred_texts_and_long_ones(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    texts = [f"text {number} " + "long " * (200 if number % 10 == 0 else number % 7) for number in range(100)]
    shown.page.get_by_label("Texts", exact=True).fill("\n".join(texts))
    assert shown.page.locator(".amount").inner_text() == "100 texts"
    shown.run()
    assert shown.page.locator(".heatmap td[data-left]").count() == 100 * 100
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.page.locator("nav a", has_text="Rerank").click()
    shown.page.get_by_label("Documents", exact=True).fill("\n".join(texts))
    shown.run()
    assert shown.page.locator(".ranked li").count() == 100


def test_texts_may_have_lines_where_blank_lines_divide_them(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    shown.page.get_by_label("Texts", exact=True).fill("a\nb\r\n\n  \n\nc\n\n\nd")
    assert shown.page.locator(".amount").inner_text() == "4 texts"
    shown.page.get_by_label("Texts: what divides them").select_option("blank")
    assert shown.page.locator(".amount").inner_text() == "3 texts"
    shown.run()
    (sent,) = (json.loads(str(one.post_data))["input"] for one in shown.asked if one.method == "POST")
    assert sent == ["a\nb", "c", "d"]


def test_what_is_written_stays_when_the_task_or_the_model_changes(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    shown.page.get_by_label("Texts", exact=True).fill("mine\nyours")
    shown.run()
    shown.page.locator("nav a", has_text="Rerank").click()
    shown.page.get_by_role("heading", name="Rerank").wait_for()
    shown.page.locator("nav a", has_text="Similarity").click()
    assert shown.page.locator(".heatmap td[data-left]").count() == 4
    shown.page.locator("#model").select_option("splade")
    wait_until(lambda: "splade" in shown.page.title(), "the model")
    assert shown.page.get_by_label("Texts", exact=True).input_value() == "mine\nyours"
    shown.page.go_back()
    wait_until(lambda: "all-MiniLM-L6-v2" in shown.page.title(), "the model before")


def test_everything_is_done_by_keyboard(opened: Opener, url: str) -> None:
    shown = opened(url).task("similarity", "all-MiniLM-L6-v2")
    keys = shown.page.keyboard
    focused = "document.activeElement.textContent || document.activeElement.id"
    keys.press("Tab")
    assert shown.page.evaluate(focused) == "Skip to the task"
    reached = []
    for _ in range(14):
        keys.press("Tab")
        reached.append(shown.page.evaluate(focused))
    assert {"Key", "Auto", "Similarity", "Rerank", "Server", "Run"} <= set(reached)
    shown.page.get_by_label("Texts", exact=True).focus()
    keys.press("Control+Enter")
    shown.done()
    shown.page.locator(".scroll").focus()
    keys.press("Tab")
    walked = []
    for key in ("ArrowRight", "ArrowDown", "Home", "End", "ArrowUp", "ArrowLeft"):
        keys.press(key)
        walked.append(tuple(map(int, re.findall(r" (\d+) “", shown.page.inner_text(".detail")))))
    assert walked == [(1, 2), (2, 2), (1, 1), (8, 8), (7, 8), (7, 7)]
    # One cell at a time is in the order of tabs.
    assert shown.page.locator(".heatmap td[tabindex='0']").count() == 1
    shown.page.get_by_role("button", name="Key").focus()
    keys.press("Enter")
    keys.press("Escape")
    assert shown.page.evaluate(focused) == "Key"


def test_the_theme_can_be_chosen_and_is_kept(opened: Opener, url: str) -> None:
    shown = opened(url, color_scheme="dark").task("similarity", "all-MiniLM-L6-v2")

    def paper() -> str:
        return str(shown.page.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = paper()
    button = shown.page.locator("#theme")
    button.click()
    light = paper()
    assert (button.inner_text(), light != dark) == ("Light", True)
    shown.page.reload()
    shown.page.locator("nav a").first.wait_for()
    assert (button.inner_text(), paper()) == ("Light", light)
    button.click()
    assert (button.inner_text(), paper()) == ("Dark", dark)


@pytest.mark.parametrize(("task", "model"), TASKS)
def test_it_fits_a_small_window(opened: Opener, url: str, task: str, model: str) -> None:
    shown = opened(url, **PHONE).task(task, model)
    if task != "server":
        shown.run()
    for summary in shown.page.locator("summary").all():
        summary.click()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = shown.page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((one) => !one.closest(".scroll, pre, .plot, .ranked .text")
            && one.getBoundingClientRect().right > 361 && one.getBoundingClientRect().width > 1).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert wide == []


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
@pytest.mark.parametrize(("task", "model"), TASKS)
def test_it_can_be_read_by_everybody(opened: Opener, url: str, task: str, model: str, look: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    options = PHONE if look == "phone" else {"color_scheme": look}
    shown = opened(url, reduced_motion="reduce", **options).task(task, model)
    check(Axe(), shown)
    if task != "server":
        shown.run()
    shown.page.locator("#key-button").click()
    for summary in shown.page.locator("summary").all():
        summary.click()
    check(Axe(), shown)


def check(axe: Any, shown: Opened) -> None:
    """No rule of WCAG 2.2 AA, nor a best practice, is broken."""
    found = axe.run(shown.page)
    assert found.violations_count == 0, found.generate_report()


def test_all_served_models_are_offered(opened: Opener, url: str) -> None:
    shown = opened(url)
    shown.page.goto(url)
    shown.page.locator("nav a").first.wait_for()
    assert shown.texts("#model option") == list(MODELS)
