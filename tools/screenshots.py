"""Make docs/images/playground-*.png: the page in a browser, with two servers of the demo model.

It needs Playwright (``pip install -e '.[browser]'``) and Debian's Chromium, or ``CHROMIUM=``; two minutes.
"""

import json
import os
import re
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from vllm_kvcompress.testing.server import Server

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
MODEL = ROOT / "examples" / "shapes" / "model"
ARGS = (
    "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", str(2**30), "--enforce-eager",
)  # fmt: skip
COMPRESSED = (
    "--attention-backend", "kvcompress", "--additional-config", '{"kvcompress": {"playground": true}}'
)  # fmt: skip
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PROMPT = "a big blue star on a striped yellow ground"
MIDDLE = re.compile(r"seed 0: [34]\d\d of 576 tokens")
FINISHED = 120_000  # ms


def draw(page: Page, seed: int, n: int, every: str = "1") -> None:
    """Fill the form in and draw."""
    page.fill("#prompt", PROMPT)
    page.fill("#seed", str(seed))
    page.fill("#n", str(n))
    page.select_option("#every", every)
    page.click("#draw")


def finished(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("Done: 2 of 2.", timeout=FINISHED)
    page.wait_for_selector("#history li")


def shoot(browser: Browser, url: str, other: str) -> None:
    """The four pictures."""
    sizes = {"desktop": (1280, 900), "phone": (390, 844)}
    for name, size, scheme, query, n in (
        ("finished", "desktop", "light", "", 2),
        ("dark", "desktop", "dark", "", 2),
        ("phone", "phone", "light", "", 2),
        ("beside", "desktop", "light", f"?compare={other}", 1),
    ):
        width, height = sizes[size]
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1
        )
        page.goto(f"{url}/playground{query}")
        draw(page, seed=0, n=n)
        if name == "dark":  # in the middle of it
            expect(page.locator("figcaption").first).to_have_text(MIDDLE, timeout=FINISHED)
        else:
            finished(page)
        if query:
            page.locator("summary").click()  # closed: its fields are of no interest here
        page.screenshot(path=IMAGES / f"playground-{name}.png", full_page=size == "phone")
        page.close()


def main() -> None:
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    logs = ROOT / "out"
    with (
        Server(MODEL, logs / "screenshots.log", (*ARGS, *COMPRESSED), name="shapes") as server,
        Server(
            MODEL,
            logs / "screenshots-full.log",
            (*ARGS, "--allowed-origins", json.dumps([server.url])),
            name="shapes",
        ) as full,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=found, args=CHROMIUM_ARGS) as browser,
    ):
        shoot(browser, server.url, full.url)


if __name__ == "__main__":
    main()
