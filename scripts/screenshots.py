"""Pictures of the page for README and docs, taken of a running server by Chromium.

    speed serve --row-budget 16 &
    python scripts/screenshots.py http://127.0.0.1:8000 docs/images

Needs Debian's package `chromium`, and the extras `browser` and `bench`.
"""

import argparse
import io
import shutil
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

Scheme = Literal["light", "dark"]
PATIENCE = 60_000  # milliseconds
QUESTION = "Why is the sky blue?"


def main() -> None:
    """Takes all pictures."""
    parser = argparse.ArgumentParser(description="Takes pictures of the page for README and docs.")
    parser.add_argument("url", help="a running server")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width, height, scheme in (
            ("page", 1280, 860, "light"),
            ("page_dark", 1280, 860, "dark"),
            ("phone", 375, 1700, "light"),
        ):
            page = opened(browser, options.url, width, height, "dark" if scheme == "dark" else "light")
            ask(page)
            save(page, options.folder / f"{name}.png")
        browser.close()


def opened(browser: Browser, url: str, width: int, height: int, scheme: Scheme) -> Page:
    """A tab that shows a page of the server."""
    viewport = {"width": width, "height": height}
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    return page


def ask(page: Page) -> None:
    """One question, answered both ways, and a pass in the middle of the answer."""
    expect(page.locator("#health")).to_have_text("ready", timeout=PATIENCE)
    page.get_by_text("Settings").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Max tokens").fill("48")
    page.get_by_label("Drafts").select_option("recheck")  # reads every loop out, so that all have a say
    page.get_by_text("Settings").click()
    page.get_by_role("radio", name="Side by side").check(force=True)
    page.get_by_label("Your message").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=PATIENCE)
    page.locator("#pass").fill("22")
    if (differed := page.locator(".column:has(.differed)")).count():
        differed.first.click()


def save(page: Page, path: Path) -> None:
    """The window as a picture of few colours, which takes a third of the bytes."""
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        few = picture.convert("RGB").quantize(
            256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
        few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
