"""The page in a real Chromium, with a real server: what a person does, by mouse, keyboard and phone.

Needs Debian's package `chromium` and the extra `browser`; .ci/run installs both.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from tests.loose import Field

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Route

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed")
expect = playwright.expect

PHONE = {"width": 375, "height": 740}
DESKTOP = {"width": 1280, "height": 800}
PATIENCE = 30_000  # milliseconds
ON, OFF = 0, 1  # columns of the figures


class Page:
    """A page with what it complained of."""

    def __init__(self, browser: "Browser", url: str, **options: Field) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP, **options})
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []  # violations of the policy are among them
        self.outside: list[str] = []
        self.tab.on("console", self._note)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self._look(request.url, httpx.URL(url).host))
        self.tab.goto(url)

    def _note(self, message: "ConsoleMessage") -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def _look(self, address: str, host: str) -> None:
        if not address.startswith("data:") and httpx.URL(address).host != host:
            self.outside.append(address)

    def ready(self) -> "Page":
        expect(self.tab.locator("#health")).to_have_text("ready", timeout=PATIENCE)
        return self

    def choose(self, label: str) -> None:
        self.tab.get_by_role("radio", name=label, exact=True).check(force=True)

    def set(self, **fields: str) -> None:
        """Fills settings by the names of their fields."""
        self.tab.locator("#settings").evaluate("settings => (settings.open = true)")
        for name, value in fields.items():
            if name == "draft_policy":
                self.tab.locator("#draft_policy").select_option(value)
            else:
                self.tab.locator(f"#{name}").fill(value)

    def send(self, text: str) -> None:
        self.tab.get_by_label("Your message").or_(self.tab.get_by_label("Text to go on with")).fill(text)
        self.tab.get_by_role("button", name="Send").click()

    def ignore_ends(self) -> None:
        """From now on the model's noise goes on until the limit of tokens."""

        def send(route: "Route") -> None:
            route.continue_(post_data=route.request.post_data_json | {"ignore_eos": True})

        self.tab.route(
            "**/v1/**", lambda route: send(route) if route.request.post_data else route.continue_()
        )

    def start_long_answer(self) -> None:
        """Two thousand tokens, each of which takes four passes."""
        self.ignore_ends()
        self.set(max_tokens="2000", temperature="0", repetition_penalty="1")
        self.choose("Completion")
        self.choose("Off")
        self.send("One, two,")

    def read_slowly(self) -> None:
        """Answers come by 30 kB/s from now on: none is over before it can be stopped."""
        session = self.context.new_cdp_session(self.tab)
        session.send("Network.enable")
        speeds = {"latency": 0, "downloadThroughput": 30_000, "uploadThroughput": -1}
        session.send("Network.emulateNetworkConditions", {"offline": False, **speeds})

    def done(self) -> None:
        expect(self.tab.locator("#status")).to_contain_text("Done", timeout=PATIENCE)

    def number(self, row: str, column: int = ON) -> str:
        text: str = self.tab.locator(f'[data-row="{row}"] td').nth(column).inner_text()
        return text

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        width: int = self.tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return width


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: "Browser", url: str, **options: Field) -> Iterator[Page]:
    """A page that must have asked nobody else, and have nothing to complain of."""
    page = Page(browser, url, **options)
    try:
        yield page
        assert page.complaints == []
        assert page.outside == []
    finally:
        page.context.close()


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    """It speculates whatever the machine's other work does to the prices of passes."""
    with ServerProcess(str(checkpoint), "--row-budget", "64") as running:
        yield running


@pytest.fixture
def page(browser: "Browser", server: ServerProcess) -> Iterator[Page]:
    with opened(browser, server.url) as one:
        yield one.ready()


def test_a_conversation_is_typed_streamed_and_remembered(page: Page) -> None:
    page.ignore_ends()
    page.set(max_tokens="12", temperature="0")
    page.tab.get_by_label("Your message").fill("Hello!")
    page.tab.get_by_label("Your message").press("Enter")
    page.done()
    first = page.tab.locator(".text").text_content() or ""
    assert first.strip()
    assert page.number("tokens") == "12"
    assert page.number("end") == "at the limit of tokens"
    with page.tab.expect_request("**/v1/chat/completions") as asked:
        page.send("And you?")
    body = asked.value.post_data_json
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == first
    page.done()
    assert page.tab.locator(".turn").count() == 2
    page.tab.get_by_role("button", name="New conversation").click()
    assert page.tab.locator(".turn").count() == 0


def test_an_empty_field_is_not_sent(page: Page) -> None:
    page.ignore_ends()
    page.set(max_tokens="", temperature="")
    page.choose("Completion")
    with page.tab.expect_request("**/v1/completions") as asked:
        page.send("The house has")
    assert set(asked.value.post_data_json) - {"ignore_eos"} == {  # that is this test's own
        *("model", "prompt", "speculation", "stream", "stream_options", "return_token_ids")
    }
    page.done()
    assert page.number("tokens") == "16"  # the server's own default


def test_both_ways_side_by_side_say_the_same_and_the_gain_is_computed(page: Page) -> None:
    page.set(max_tokens="40", seed="3")
    page.choose("Side by side")
    page.send("Tell me about the river.")
    page.done()
    on, off = page.tab.locator(".text").all_inner_texts()
    assert on == off
    rates = [float(page.number("rate", column)) for column in (ON, OFF)]
    gain = page.tab.locator("#gain").inner_text()
    said = float(re.findall(r"([\d.]+)×", gain)[0])
    assert said == pytest.approx(rates[0] / rates[1], rel=0.02, abs=0.006)  # it has two decimals
    assert "the text is the same" in gain
    assert float(page.number("passes", OFF)) == 4.0  # one for each loop
    assert float(page.number("passes", ON)) <= 4.0
    assert page.tab.locator(".wave").count() == 2


def test_the_wave_is_seen_settles_and_is_replayed(page: Page) -> None:
    page.ignore_ends()
    # At most 4 passes for a token and one for the prompt: fewer than a chunk holds, however late it is sent.
    page.set(max_tokens="15", temperature="0", draft_policy="recheck")
    page.send("What is your name?")
    page.done()
    columns = page.tab.locator(".column")
    assert columns.first.locator(".cell").count() == 4
    assert page.number("tokens") == "15"
    assert page.tab.locator(".column.final").count() == 15
    assert page.tab.locator(".column.open").count() == 0
    assert page.tab.locator(".text span[class^=g]").count() > 5  # some share a character, or a chunk
    assert page.tab.locator("#pass_number").inner_text().startswith("pass ")
    # Replayed pass by pass: tokens in flight at depths that don't rise, and some wrong guess flushed.
    passes = int(page.tab.locator("#pass").get_attribute("max") or "0")
    page.tab.locator("#pass").fill("0")
    flying, flashed = 0, 0
    for number in range(1, passes + 1):
        page.tab.get_by_role("button", name="One pass on").click()
        assert page.tab.locator("#pass_number").inner_text() == f"pass {number} of {passes}"
        heights = page.tab.locator(".column.open").evaluate_all(
            "columns => columns.map((one) => one.querySelectorAll('.cell:not(.empty)').length)"
        )
        assert heights == sorted(heights, reverse=True)
        flying += sum(heights)
        flashed += page.tab.locator(".column.lost").count()
    assert flying > 0
    assert flashed > 0
    assert page.tab.locator(".column.final").count() == 15


def test_passes_that_came_too_fast_are_told_and_not_counted_as_none(page: Page) -> None:
    caption = page.tab.evaluate(
        """async () => {
            const { Wave } = await import("/playground/wave.js");
            const { Towers } = await import("/playground/towers.js");
            const token = (id) => ({ token_id: id, agreed: 1, guesses: [[4, id]] });
            const pass = (position) => (
                { runs: [], position, committed: [token(1), token(2)], drafts: [], flushed: null });
            const wave = new Wave();
            wave.add({ num_loops: 4, passes: [pass(3), pass(5)], omitted: 7, texts: { 1: "a", 2: "b" } });
            const towers = new Towers("here", () => {});
            wave.show(2);
            towers.draw(wave);
            return towers.caption.textContent;
        }"""
    )
    assert caption == "here: 4 tokens; 7 passes came too fast to be shown"


@pytest.mark.parametrize(
    ("omitted", "counted"), [([0, 0], 2), ([0, 70], 72), ([1, 0], None), ([1, 70], None)]
)
def test_passes_left_out_after_the_first_token_are_counted(
    page: Page, omitted: list[int], counted: int | None
) -> None:
    """Before it, some of them may have read the prompt: then there is no figure."""
    passes = page.tab.evaluate(
        """async (omitted) => {
            const { Wave } = await import("/playground/wave.js");
            const token = (id) => ({ token_id: id, agreed: 1, guesses: [[4, id]] });
            const pass = (position) => (
                { runs: [], position, committed: [token(1)], drafts: [], flushed: null });
            const wave = new Wave();
            wave.add({ num_loops: 4, passes: [pass(3), pass(4)], omitted: omitted[0], texts: { 1: "a" } });
            wave.add({ num_loops: 4, passes: [pass(75)], omitted: omitted[1], texts: {} });
            return wave.decodePasses;
        }""",
        omitted,
    )
    assert passes == counted


def test_what_each_loop_said_is_told_by_keyboard_and_by_pointing(page: Page) -> None:
    page.set(max_tokens="8", temperature="0")
    page.send("Hello!")
    page.done()
    wave, detail = page.tab.get_by_role("listbox"), page.tab.locator("#detail")
    wave.focus()
    wave.press("Home")
    first = detail.inner_text()
    assert re.match(r"“.*”: (\d of \d loops that were asked agree|said by the last loop)", first, re.DOTALL)
    active = wave.get_attribute("aria-activedescendant")
    assert page.tab.locator(f"#{active}").get_attribute("aria-label") == first
    wave.press("End")
    assert wave.get_attribute("aria-activedescendant") != active
    page.tab.locator(".text span").first.hover()
    assert detail.inner_text() == first


def test_stop_ends_the_answer_and_keeps_the_figures(page: Page, server: ServerProcess) -> None:
    page.read_slowly()
    page.start_long_answer()
    expect(page.tab.locator(".text span").nth(5)).to_be_attached()
    page.tab.get_by_role("button", name="Stop").click()
    expect(page.tab.locator("#status")).to_contain_text("Stopped")
    assert page.number("end", OFF) == "by you"
    assert int(page.number("tokens", OFF)) >= 5
    assert float(page.number("rate", OFF)) > 0
    passes = page.number("passes", OFF)  # counted by the page itself, unless the first chunk left some out
    assert passes == "–" or float(passes) == pytest.approx(4, abs=0.5)
    assert page.tab.get_by_role("button", name="Send").is_enabled()
    assert page.tab.locator(".column.final").count() > 0


def test_a_refusal_is_shown_in_the_servers_words(browser: "Browser", server: ServerProcess) -> None:
    page = Page(browser, server.url).ready()
    page.tab.locator("#num_loops").evaluate("field => field.removeAttribute('max')")
    page.set(num_loops="99")
    page.send("Hello!")
    expect(page.tab.get_by_role("alert")).to_contain_text("num_loops")
    assert page.tab.get_by_label("Your message").input_value() == "Hello!"  # to be sent again
    assert [text for text in page.complaints if "400" not in text] == []  # what Chromium says of a status
    page.context.close()


def test_a_server_that_goes_away_is_told_and_its_return_is_seen(browser: "Browser", checkpoint: Path) -> None:
    with ServerProcess(str(checkpoint), "--shutdown-timeout", "0") as running:
        page = Page(browser, running.url).ready()
        page.start_long_answer()
        expect(page.tab.locator(".text span").nth(5)).to_be_attached()
        running.process.kill()
        expect(page.tab.get_by_role("alert")).to_have_text(re.compile("connection|went away"))
        expect(page.tab.locator("#health")).to_have_text("the server can't be reached")
        assert page.tab.locator(".text").inner_text().strip()  # what came is kept
        assert page.number("end", OFF) == "by an error"
        page.send("One, two,")
        expect(page.tab.get_by_role("alert")).to_contain_text("can't be reached")
        again = ServerProcess(str(checkpoint), port=running.port)
        with again:
            page.ready()
            page.set(max_tokens="5")
            page.send("One, two,")
            page.done()
            expect(page.tab.get_by_role("alert")).to_have_text("")
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_phone_shows_the_pages_without_scrolling_sideways(
    browser: "Browser", server: ServerProcess, path: str, scheme: str
) -> None:
    with opened(browser, server.url + path, viewport=PHONE, color_scheme=scheme, has_touch=True) as page:
        if path == "/":
            page.ready().set(max_tokens="40")
            page.choose("Side by side")
            page.send("W" * 200)
            page.done()
        else:
            expect(page.tab.locator("article#ChatRequest")).to_be_attached()
            for summary in page.tab.locator("summary").all():
                summary.click()
        assert page.overflow <= 0


def test_reduced_motion_is_respected(browser: "Browser", server: ServerProcess) -> None:
    with opened(browser, server.url, reduced_motion="reduce") as page:
        page.ready().set(max_tokens="5")
        page.send("Hello!")
        page.done()
        moving = """[...document.querySelectorAll('*')]
                    .filter((e) => getComputedStyle(e).animationName !== 'none').length"""
        assert page.tab.evaluate(moving) == 0


def test_everything_is_reached_by_tab_and_has_a_name(page: Page) -> None:
    page.tab.get_by_text("Settings").click()
    nameless = page.tab.evaluate(
        """[...document.querySelectorAll('input, select, textarea, button, [role=listbox]')]
           .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.id)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(40):
        page.tab.keyboard.press("Tab")
        reached.add(page.tab.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"prompt", "send", "key", "model", "max_tokens", "columns"} <= reached
    page.tab.locator("input[name=speculation]").first.focus()
    page.tab.keyboard.press("ArrowRight")
    assert page.tab.locator("input[value=off]").is_checked()


def test_the_api_is_described_and_tried_offline(browser: "Browser", server: ServerProcess) -> None:
    with opened(browser, f"{server.url}/docs") as page:
        chat = page.tab.locator("article#post-v1-chat-completions")
        chat.get_by_text("Try it").click()
        chat.get_by_role("button", name="Send").click()
        expect(chat.locator("pre")).to_contain_text("200 OK", timeout=PATIENCE)
        fields = page.tab.locator("article#CompletionRequest code").all_inner_texts()
        assert {"prompt", "speculation", "stream_options"} <= set(fields)
        broken = """[...document.querySelectorAll('a[href^="#"]')]
                    .filter((a) => !document.getElementById(a.getAttribute('href').slice(1))).length"""
        assert page.tab.evaluate(broken) == 0
