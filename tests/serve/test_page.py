"""The chat page in a real browser, on the real server."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import Api, certificate, chat_run, served, serving_models

sync_api = pytest.importorskip("playwright.sync_api")
OTHER_NAME = "gpt.example.test"  # not one that browsers trust without HTTPS
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options += [f"--host-resolver-rules=MAP {OTHER_NAME} 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, api: Api) -> Iterator:
    """A fresh profile on the page; anything that the browser complains of fails the test."""
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(20_000)
    page.goto(api.url)
    page.get_by_role("option", name="chat").wait_for(state="attached")
    page.locator("#temperature").evaluate("node => node.value = 0")
    page.locator("#max_tokens").evaluate("node => node.value = 12")
    yield page
    context.close()
    assert complaints == []


def ask(page, text: str) -> None:
    """Send a message, and wait for the end of the reply."""
    page.get_by_label("Message", exact=True).fill(text)
    generates(page, lambda: page.keyboard.press("Enter"))


def press(page, button) -> None:
    """Press a button that has the model write, and wait for the end."""
    generates(page, button.click)


def generates(page, act: Callable[[], None]) -> None:
    """Do what has the model write, and wait until the reply is complete and kept."""
    page.evaluate("document.getElementById('status').textContent = ''")
    act()
    page.locator("#status", has_text="tokens in").wait_for()


def answers(page) -> list[str]:
    return page.locator("article.assistant .content").all_inner_texts()


def expected(api: Api, *messages: tuple[str, str], **more: object) -> str:
    body = [{"role": role, "content": content} for role, content in messages]
    found = api.post(
        "/v1/chat/completions", model="chat", messages=body, temperature=0, max_tokens=12, **more
    )
    return found["choices"][0]["message"]["content"]


def test_a_reply_is_the_servers(page, api: Api) -> None:
    ask(page, "Hello")
    tokens = page.evaluate("document.querySelector('article.assistant .content').textContent")
    assert tokens.split() == expected(api, ("user", "Hello")).split()
    assert page.locator("article.user .content").inner_text() == "Hello"


def test_conversations_outlive_the_tab(page, api: Api) -> None:
    ask(page, "first one")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "second one")
    page.reload()
    names = page.locator("#list li button:first-child")
    names.first.wait_for()
    assert names.all_inner_texts() == ["second one", "first one"]
    names.nth(1).click()
    assert page.locator("article.user .content").inner_text() == "first one"
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete first one").click()
    names.nth(1).wait_for(state="detached")
    assert names.all_inner_texts() == ["second one"]


def test_messages_are_edited_regenerated_and_continued(page, api: Api) -> None:
    ask(page, "Hello")
    user, model = page.locator("article.user"), page.locator("article.assistant")
    user.get_by_role("button", name="Edit").click()
    user.get_by_label("Text of the message").fill("Bye")
    user.get_by_role("button", name="Save").click()
    press(page, model.get_by_role("button", name="Regenerate"))
    assert answers(page)[0].split() == expected(api, ("user", "Bye")).split()
    model.get_by_role("button", name="Edit").click()
    model.get_by_label("Text of the message").fill("It is")
    model.get_by_role("button", name="Save").click()
    press(page, model.get_by_role("button", name="Continue"))
    more = expected(api, ("user", "Bye"), ("assistant", "It is"), continue_final_message=True)
    assert "".join(answers(page)[0].split()) == "".join(f"It is{more}".split())


def test_a_reply_is_continued_twice_after_an_edit(page, api: Api) -> None:
    """What was written and what was generated are both read again, token for token."""
    asked = dict(model="chat", temperature=0, continue_final_message=True, logprobs=True)
    for n in range(100):
        user, begun = f"Say {n}", {"role": "assistant", "content": "It is"}
        body = asked | {"messages": [{"role": "user", "content": user}, begun], "max_tokens": 12}
        [choice] = api.post("/v1/chat/completions", **body)["choices"]
        if choice["finish_reason"] == "length":
            break
    page.locator("#max_tokens").evaluate("node => node.value = 6")
    ask(page, user)
    model = page.locator("article.assistant")
    model.get_by_role("button", name="Edit").press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type("It is")
    page.keyboard.press("Control+Enter")
    for _ in range(2):
        page.evaluate("document.getElementById('status').textContent = ''")
        model.get_by_role("button", name="Continue").press("Enter")
        page.locator("#status", has_text="6 tokens in").wait_for()
    assert page.evaluate("document.activeElement.id") == "input"
    page.get_by_label("Tokens", exact=True).check()
    found = page.locator("article.assistant .tokens button").count()
    assert found == len(choice["logprobs"]["content"]) == 12
    labels = page.locator("article.assistant .tokens button").evaluate_all(
        "nodes => nodes.map(node => node.getAttribute('aria-label'))"
    )
    names = [token["token"] for token in choice["logprobs"]["content"]]
    assert [label.rpartition(", ")[0] for label in labels] == names


@pytest.fixture
def slow(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat model takes its time, so that a reply can be disturbed."""
    engine = api.server.models["chat"].engine
    step = engine.step

    def wait_and_step() -> None:
        time.sleep(0.03)
        step()

    monkeypatch.setattr(engine, "step", wait_and_step)


def begin(page, api: Api) -> None:
    """Send a message that gets a long reply, and wait for its first characters."""
    page.locator("#max_tokens").evaluate("node => node.value = 200")
    prompts = (f"Say {n}" for n in range(100))
    text = next(prompt for prompt in prompts if len(expected(api, ("user", prompt))) > 9)
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("article.assistant .content")).not_to_be_empty(timeout=20_000)


def test_a_reply_outlives_a_look_at_another_conversation(page, api: Api, slow: None) -> None:
    begin(page, api)
    assert page.locator("article .tools button").count() == 0  # nothing to press meanwhile
    page.get_by_role("button", name="New conversation").click()
    page.locator("#status", has_text="stopped after").wait_for()
    api.until_idle()
    page.locator("#list li button:first-child").click()
    assert page.locator("article.assistant .content").evaluate("node => node.textContent")
    assert page.locator("article.assistant").get_by_role("button", name="Continue").count() == 1


def test_a_conversation_that_is_deleted_during_a_reply_is_gone(page, api: Api, slow: None) -> None:
    begin(page, api)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Say").click()
    page.locator("#status", has_text="stopped after").wait_for()
    page.reload()
    page.get_by_role("option", name="chat").wait_for(state="attached")
    page.wait_for_timeout(200)
    assert page.locator("#list li").count() == 0
    api.until_idle()


def test_the_key_is_asked_for_and_kept_in_the_tab(browser, tmp_path: Path) -> None:
    models = {"chat": served(chat_run(tmp_path / "chat"))}
    with serving_models(models, keys=("secret",)) as locked:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(locked.url)
        page.locator("#key").wait_for(state="visible")
        page.keyboard.press("Escape")
        page.locator("#status.error", has_text="needs an API key").wait_for()
        page.reload()
        for key in ("wrong", "secret"):
            page.locator("#key-input").fill(key)
            page.keyboard.press("Enter")
        page.get_by_role("option", name="chat").wait_for(state="attached")
        assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
        assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
        page.close()


def test_a_token_is_replaced_by_an_alternative(page, api: Api) -> None:
    prompts = (f"Say {n}" for n in range(100))
    ask(page, next(prompt for prompt in prompts if len(expected(api, ("user", prompt))) > 6))
    page.get_by_label("Tokens", exact=True).check()
    tokens = page.locator("article.assistant .tokens button")
    before = tokens.all_inner_texts()
    tokens.nth(2).click()
    page.locator("#token").wait_for(state="visible")
    choices = page.locator("#alternatives button:enabled")
    assert choices.count() == 7  # of 8, the one that was taken is not to be chosen
    label = choices.first.inner_text()
    press(page, choices.first)
    after = tokens.all_inner_texts()
    assert after[:2] == before[:2]
    assert label.startswith(after[2].strip())
    assert after[2] != before[2]
    assert len(after) > 3


def test_raw_shows_what_the_model_reads(page, api: Api) -> None:
    ask(page, "Say <|end|>")
    page.get_by_label("Raw", exact=True).check()
    special = page.locator(".tokens .special")
    special.first.wait_for()
    names = special.all_inner_texts()
    assert names[0].startswith("<|")
    assert names.count("<|end|>") == 1  # of the template; the typed one is text
    assert "tokens of at most 256" in page.locator("#messages").inner_text()


def test_the_stop_button_stops(page, api: Api) -> None:
    page.locator("#max_tokens").evaluate("node => node.value = 200")
    page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not come
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    stop = page.get_by_role("button", name="Stop")
    sync_api.expect(stop).to_be_enabled()
    stop.click()
    page.locator("#status", has_text="stopped").wait_for()
    sync_api.expect(stop).to_be_disabled()
    assert answers(page) == []
    assert page.locator("article.user").count() == 1  # nothing of the person's is lost
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Answer").click()
    page.locator("#status", has_text="tokens in").wait_for()


def test_conversations_leave_and_return_as_training_data(page, api: Api, tmp_path: Path) -> None:
    page.locator("summary").click()
    page.get_by_label("System message").fill("Be brief.")
    ask(page, "Hello")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    path = tmp_path / "out.jsonl"
    download.value.save_as(path)
    [line] = path.read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    from gptsmith import cli

    assert (
        cli.main(["inspect", str(path), "--tokenizer", str(api.folder / "chat")]) == 0
    )  # it is a chat data set
    page.locator("#file").set_input_files(path)
    page.locator("#status", has_text="1 conversations imported").wait_for()
    assert page.locator("#list li").count() == 2
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    page.locator("#file").set_input_files(tmp_path / "bad.jsonl")
    page.locator("#status.error", has_text="line 1").wait_for()


def test_a_classifier_gets_bars_and_a_text_model_continues(page, api: Api) -> None:
    page.get_by_label("Model", exact=True).select_option("classifier")
    page.get_by_label("Text to classify").fill("buy now")
    page.get_by_role("button", name="Classify").click()
    page.locator("#bars meter").first.wait_for()
    assert page.locator("#bars .bar").count() == 2
    page.get_by_label("Model", exact=True).select_option("text")
    page.get_by_label("Text to continue").fill("Once")
    page.get_by_role("button", name="Continue").click()
    page.locator("#status", has_text="tokens in").wait_for()
    assert page.locator("article.text .content").inner_text().startswith("Once")


def test_markdown_is_text_and_never_html(page) -> None:
    found = page.evaluate(
        """async () => {
          const { markdown } = await import("/page/markdown.js");
          const node = document.createElement("div");
          node.append(markdown("# T\\n<img src=x onerror=alert(1)> **b** `c`\\n\\n- [x](https://a.b)"
            + "\\n- [y](javascript:alert(1))\\n\\n```\\n<b>\\n```"));
          return node.innerHTML;
        }"""
    )
    assert "<img" not in found
    assert "&lt;img" in found
    assert "<strong>b</strong>" in found
    assert "<code>c</code>" in found
    assert 'href="https://a.b"' in found
    assert "javascript:alert(1)" in found.replace("&amp;", "&")  # as text, not as a link
    assert 'href="javascript' not in found


def test_characters_that_are_spread_over_tokens_are_whole(page) -> None:
    parts = [[0xEF, 0xBB, 0xBF, 0xF0], [0x9F, 0x98], [0x80, 0xF0, 0x9F]]  # the last one is begun
    found = page.evaluate(
        """async (parts) => (await import("/page/message.js")).textOf(
          parts.map((bytes) => ({ bytes })))""",
        parts,
    )
    assert found == "\ufeff\N{GRINNING FACE}"


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (1200, "dark"), (1200, "light")])
def test_the_page_is_accessible_and_fits(page, width: int, scheme: str, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    ask(page, "Hello, " + "how are you? " * 4)
    for view in ("Text", "Tokens", "Raw"):
        page.get_by_label(view, exact=True).check()
        page.wait_for_timeout(200)
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"{width}-{scheme}-{view}.png")


def test_the_page_works_under_another_name_without_https(browser, tmp_path: Path) -> None:
    """Where browsers withhold what they call powerful features."""
    model = served(chat_run(tmp_path / "chat"))
    with serving_models({"chat": model}, allow_host=(OTHER_NAME,)) as api:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(api.url.replace("127.0.0.1", OTHER_NAME))
        assert not page.evaluate("isSecureContext")
        page.get_by_role("option", name="chat").wait_for(state="attached")
        ask(page, "Hello")
        page.reload()
        page.get_by_role("button", name="Hello", exact=True).click()
        assert page.locator("article.user .content").inner_text() == "Hello"
        page.close()


def test_the_page_works_over_https(browser, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    model = served(chat_run(tmp_path / "chat"))
    with serving_models({"chat": model}, tls_cert=cert, tls_key=key) as api:
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.set_default_timeout(20_000)
        page.goto(api.url)
        page.get_by_role("option", name="chat").wait_for(state="attached")
        for name, value in (("temperature", 0), ("max_tokens", 12)):
            page.locator(f"#{name}").evaluate(f"node => node.value = {value}")
        ask(page, "Hello")
        assert answers(page)[0].split() == expected(api, ("user", "Hello")).split()
        page.context.close()
