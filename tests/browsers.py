"""The playground in a real browser: Debian's Chromium (or ``CHROMIUM``), driven by Playwright.

Both are optional (``pip install -e '.[browser]'``, ``apt-get install chromium``); a run without says so.
"""

import os
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from images_fakes import MODEL, FakeEngine
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress.serving.playground import PATH

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
USAGE = {"steps": 30, "kv_cache": {"resident_bytes": 3 << 19, "full_bytes": 6 << 20, "evicted_tokens": {}}}


def engine(playground: bool = True) -> FakeEngine:
    made = FakeEngine()
    made.vllm_config.additional_config = {"kvcompress": {"playground": playground}}
    return made


class Compressed(FakeEngine):
    """Says what it keeps: the heads of one type the even tokens, those of the other the odd ones."""

    def __init__(self) -> None:
        super().__init__()
        self.vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
        self.vllm_config.additional_config = {"kvcompress": {"playground": True}}

    async def collective_rpc(self, method: str, timeout=None, args=(), kwargs=None) -> Any:
        if method != "kvcompress_kept":
            return await super().collective_rpc(method, timeout, args, kwargs)
        assert args[0] in self.running
        even = [4 * (token % 2 == 0) for token in range(MODEL.raster.tokens)]
        odd = [token % 2 for token in range(MODEL.raster.tokens)]
        return [(10, [("ring 5", 4, even), ("scored 9", 1, odd)])] * 2


async def usage(outputs: Any) -> dict[str, Any]:
    """What a compressed server adds to a finished request's ``usage``."""
    return USAGE


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    reason = "the page in a browser needs Playwright: pip install -e '.[browser]'"
    driver = pytest.importorskip("playwright.async_api", reason=reason)
    async with driver.async_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path  # the one of `playwright install chromium`
        if not os.path.exists(path):
            pytest.skip("the page in a browser needs one: install Debian's chromium, or set CHROMIUM")
        opened = await playwright.chromium.launch(executable_path=path, args=list(ARGS))
        yield opened
        await opened.close()


async def opened(browser: Any, url: str, path: str = PATH, **context: Any) -> tuple[Any, list[str]]:
    """The page at a server, and what its console has said; ``context`` is the tab's (``color_scheme``)."""
    tab, said = await browser.new_page(**context), list[str]()
    # "verbose" is the browser's advice on forms, not an error.
    tab.on("console", lambda message: message.type == "verbose" or said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    await tab.goto(url + path)
    return tab, said


async def ask(tab: Any, **fields: str) -> None:
    for name, value in fields.items():
        await tab.fill(f"#{name}", value)
    await tab.click("#draw")


async def says(tab: Any, selector: str, text: str | re.Pattern[str]) -> None:
    """Wait for an element's text."""
    from playwright.async_api import expect

    await expect(tab.locator(selector)).to_have_text(text, timeout=20_000)


async def focused(tab: Any) -> str:
    """The focused element: its id, or its label or text where it has none."""
    script = "(e => e.id || e.getAttribute('aria-label') || e.textContent)(document.activeElement)"
    return await tab.evaluate(script)
