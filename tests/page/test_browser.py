"""The page as a person has it: a headless Chromium chats, and watches the cache."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from chromium import CHROMIUM

from kvist import AsyncLLM
from kvist.loading.model import Model
from kvist.server.app import create_app
from kvist.server.settings import Settings

playwright = pytest.importorskip("playwright.sync_api")

WIDE = {"width": 1440, "height": 900}
NARROW = {"width": 390, "height": 800}
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(
    model: Model, *, pause: float = 0.0, looks: list[float] | None = None, **settings: Any
) -> Iterator[str]:
    """A server on a thread of its own; its URL.

    It rests between steps, and takes down when its engine was looked at.
    """
    sizes = {"block_size": 4, "max_model_len": 120, "cache_memory": 1 << 19, "max_num_seqs": 8}
    llm = AsyncLLM(model, **sizes)  # type: ignore[arg-type]
    step = llm._engine.runner.step

    def slowly(*arguments: Any) -> Any:
        time.sleep(pause)
        return step(*arguments)

    look = llm.look

    async def noted(*arguments: Any) -> Any:
        if looks is not None:
            looks.append(time.monotonic())
        return await look(*arguments)

    llm.look = noted  # type: ignore[method-assign]
    if pause:
        llm._engine.runner.step = slowly
    app = create_app(llm, Settings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    [port] = {sock.getsockname()[1] for one in server.servers for sock in one.sockets}
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        app.state.served.gate.draining.set()  # sends the pages' streams away
        server.should_exit = True
        thread.join()
        llm.close()


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with served(model) as url:
        yield url


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url) as page:
        yield page


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page that may not complain."""
    context = browser.new_context(**({"viewport": WIDE} | options))
    page = context.new_page()
    page.set_default_timeout(30_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(url)
    yield page
    context.close()
    expected = ("401", "418")  # refusals, which a browser tells as errors
    assert [one for one in complaints if not any(code in one for code in expected)] == []


def ask(page: Any, text: str, *, longest: int = 12, wait: bool = True) -> Any:
    """Ask, and wait for the whole answer; returns its element."""
    limit = page.get_by_label("Longest answer")
    if not limit.is_visible():
        page.get_by_role("button", name="How tokens are chosen").click()
    limit.fill(str(longest))
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant").last
    if wait:
        settles(page, lambda: answer.get_attribute("aria-busy") is None)
    return answer


def legend(page: Any, name: str) -> int:
    return int(page.locator(f".legend .{name} b").inner_text().replace(",", ""))


def settles(page: Any, question: Any) -> None:
    """Wait until something is so; the page's policy lets no script of ours wait in it."""
    for _ in range(300):
        if question():
            return
        page.wait_for_timeout(50)
    raise AssertionError("never became so")


def test_a_chat_fills_the_block_map_and_the_second_time_comes_out_of_the_cache(
    page: Any, tmp_path: Path
) -> None:
    page.locator("#link[data-state=live]").wait_for()
    before = page.locator("canvas.map").screenshot()
    free = legend(page, "free")
    first = ask(page, "What is a twig, and what does it keep for the spring?")
    assert "12 tokens" in first.locator("footer").inner_text()
    settles(page, lambda: legend(page, "published") > 5 and legend(page, "used") == 0)
    assert legend(page, "free") < free
    page.wait_for_timeout(1000)  # what changed has stopped glowing
    assert page.locator("canvas.map").screenshot() != before
    page.get_by_role("button", name="Ask again").click()
    again = page.locator(".message.assistant footer span", has_text="from the cache")
    again.wait_for()
    settles(page, lambda: page.get_by_role("treeitem").count() > 0)
    assert "prompt tokens were already there" in page.locator(".headline").inner_text()
    shot = tmp_path / "page.png"
    page.screenshot(path=shot)
    assert shot.stat().st_size > 20_000


def test_the_model_is_named(page: Any) -> None:
    settles(page, lambda: page.locator("#model").inner_text() == "dense_tied")
    assert page.title() == "dense_tied · kvist"


def test_a_question_asked_before_the_model_is_known_waits_for_it(page: Any) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(status=418, body="{}"), times=1)
    page.reload()
    assert "12 tokens" in ask(page, "hello").locator("footer").inner_text()


def test_a_block_says_what_it_holds_to_pointer_and_keyboard(page: Any) -> None:
    ask(page, "once upon a time there was a twig")
    settles(page, lambda: legend(page, "published") > 5)
    settles(page, lambda: "At rest." in page.locator(".headline").inner_text())
    tip = page.locator(".tip")
    page.locator("canvas.map").hover(position={"x": 5, "y": 5})
    tip.locator(".tokens").wait_for()
    assert "Block 1 " in tip.inner_text()
    page.locator("canvas.map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    settles(page, lambda: "Block 2 " in tip.inner_text() or "Block 3 " in tip.inner_text())
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_an_answer_can_be_stopped_and_its_blocks_are_free_again(browser: Any, model: Model) -> None:
    with served(model, pause=0.1) as url, opened(browser, url) as page:
        answer = ask(page, "go on for ever", longest=90, wait=False)
        settles(page, lambda: legend(page, "used") > 0)
        page.get_by_role("button", name="Stop").click()
        answer.locator("footer", has_text="stopped").wait_for()
        assert page.get_by_role("button", name="Send").is_visible()
        settles(page, lambda: legend(page, "used") == 0)
        assert "At rest." in page.locator(".headline").inner_text()


def test_a_refusal_is_told_in_the_servers_words(page: Any) -> None:
    problem = {"error": {"message": "no room for that", "type": "invalid_request_error"}}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=418, body=json.dumps(problem)),
    )
    assert ask(page, "hello").locator(".problem").inner_text() == "no room for that"
    sent: list[Any] = []

    def take(route: Any) -> None:
        sent.append(route.request.post_data_json["messages"])
        route.fulfill(content_type="text/event-stream", body=stream({"content": "yes"}))

    page.route("**/v1/chat/completions", take)
    page.get_by_role("button", name="Ask again").click()
    settles(page, lambda: page.locator(".prose", has_text="yes").is_visible())
    ask(page, "and now")
    assert [message["content"] for message in sent[0]] == ["hello"]
    assert [message["content"] for message in sent[1]] == ["hello", "yes", "and now"]


def test_a_page_that_is_left_is_looked_at_no_more(browser: Any, model: Model) -> None:
    looks: list[float] = []
    with served(model, looks=looks) as url:
        with opened(browser, url) as page:
            page.locator("#link[data-state=live]").wait_for()
            settles(page, lambda: len(looks) > 3)
        time.sleep(0.5)
        left = len(looks)
        time.sleep(1)
        assert len(looks) == left


def test_tokens_are_coloured_by_probability_and_tell_what_else_might_have_come(page: Any) -> None:
    page.get_by_text("Probabilities").click()
    answer = ask(page, "say something")
    tokens = answer.locator(".token-text > span")
    assert tokens.count() == 12
    assert tokens.first.evaluate("span => span.style.getPropertyValue('--doubt')").endswith("%")
    answer.locator(".token-text").focus()
    page.keyboard.press("ArrowRight")
    rows = page.locator(".tip .likely tr")
    rows.first.wait_for()
    assert rows.count() >= 5
    assert page.locator(".tip .likely .own").count() == 1


def stream(*chunks: dict[str, Any]) -> str:
    lines = [json.dumps({"choices": [{"delta": chunk}]}) for chunk in chunks] + ["[DONE]"]
    return "".join(f"data: {line}\n\n" for line in lines)


def test_what_a_model_says_never_becomes_markup(page: Any) -> None:
    evil = (
        "<img src=x onerror=alert(1)><script>alert(2)</script>\n\n**bold** and `code`\n\n"
        "[here](javascript:alert(3)) [there](https://example.org/a)\n\n- one\n- two\n\n"
        "```html\n<b>not bold</b>\n```\n"
    )
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body=stream({"reasoning_content": "<i>hm</i>"}, {"content": evil}),
        ),
    )
    answer = ask(page, "be evil")
    assert answer.locator(".prose img, .prose script, .prose i, .prose b").count() == 0
    assert answer.locator(".body strong").inner_text() == "bold"
    assert answer.locator(".body pre code").inner_text() == "<b>not bold</b>"
    assert answer.locator(".body li").all_inner_texts() == ["one", "two"]
    assert [a.get_attribute("href") for a in answer.locator("a").all()] == ["https://example.org/a"]
    thought = answer.locator("details.thinking")
    assert thought.get_attribute("open") is None
    thought.locator("summary").click()
    assert thought.locator(".prose").inner_text() == "<i>hm</i>"


def test_a_picture_is_sent_as_a_data_url(page: Any) -> None:
    sent: list[Any] = []

    def take(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=stream({"content": "a cat"}))

    page.route("**/v1/chat/completions", take)
    picture = Path(__file__).parents[1] / "fixtures" / "nanovlm" / "chelsea.png"
    page.locator("input[type=file]").set_input_files(picture)
    page.get_by_role("button", name="Remove picture 1").wait_for()
    ask(page, "What is this?")
    image, text = sent[0]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "What is this?"}


def test_sampling_controls_go_into_the_request_and_empty_ones_do_not(page: Any) -> None:
    sent: list[Any] = []

    def take(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=stream({"content": "yes"}))

    page.route("**/v1/chat/completions", take)
    page.get_by_role("button", name="How tokens are chosen").click()
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Think first").select_option("no")
    ask(page, "hello", longest=9)
    [body] = sent
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.3, 7, 9)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert not {"top_p", "top_k", "min_p", "logprobs"} & body.keys()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_systems_colours_unless_told_otherwise(
    browser: Any, url: str, scheme: str
) -> None:
    def is_dark(page: Any) -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour[4:-1].split(","))) < 3 * 128

    with opened(browser, url, color_scheme=scheme) as page:
        assert is_dark(page) == (scheme == "dark")
        for expected in (False, True, scheme == "dark"):  # light, dark, as the system says
            page.locator("#theme").click()
            assert is_dark(page) == expected


def test_on_a_narrow_screen_chat_and_cache_take_turns(browser: Any, url: str) -> None:
    with opened(browser, url, viewport=NARROW) as page:
        assert page.locator("#chat").is_visible()
        assert not page.locator("#cache").is_visible()
        page.get_by_role("button", name="Cache").click()
        assert not page.locator("#chat").is_visible()
        page.locator("canvas.map").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_everything_can_be_reached_by_keyboard(page: Any) -> None:
    ask(page, "hello")
    page.locator(".top").click()
    names = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
        )
        names.add(name.split(".")[0] if name else "")
    wanted = {"Your message", "Send", "New chat", "Add a picture", "Blocks of the pool"}
    assert wanted | {"Requests over time", "Copy the answer"} <= names


def test_a_server_that_wants_a_key_gets_it_from_this_tab_only(
    browser: Any, model: Model, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    with served(model, api_keys_file=keys) as url, opened(browser, url) as page:
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        dialog.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#link[data-state=live]").wait_for()
        assert page.evaluate("sessionStorage.getItem('kvist.key')") == KEY
        assert page.evaluate("localStorage.getItem('kvist.key')") is None
        assert "12 tokens" in ask(page, "hello").locator("footer").inner_text()
