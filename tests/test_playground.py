"""The playground: what the route answers, and what the page does with one server and with two."""

import asyncio
import base64
import hashlib
import re

import httpx
import pytest
from browsers import Compressed, ask, browser, engine, opened, says
from images_fakes import MODEL, SIZE, WIDTH, http_client, make_app, served

from vllm_kvcompress.serving.playground import PATH, origin, page

__all__ = ["browser"]
PROMPT = "a <b>star</b>"


async def get(**options) -> httpx.Response:
    async with http_client(await make_app(engine(**options), api_key="secret")) as client:
        return await client.get(PATH)


async def test_off_unless_wanted():
    answer = await get(playground=False)
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


async def test_the_policy_names_what_the_page_runs_and_nothing_else():
    answer = await get()
    assert answer.status_code == 200
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, source in (("script", "script-src"), ("style", "style-src")):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[source] == f"'sha256-{digest}'"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", answer.text)
    assert not re.findall(r" on\w+=| style=", re.sub(r"<script>.*?</script>", "", answer.text, flags=re.S))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://host:8001/v1", "http://host:8001"), ("https://EXAMPLE.org", "https://example.org"),
        ("http://[::1]:80/", "http://[::1]:80"), ("http://u:p@host/", "http://host"),
        ("javascript:alert(1)", None), ("data:text/html,x", None), ("http://host:99999", None),
        ("http://a; script-src *", None),
        ("localhost:8001", "http://localhost:8001"), ("[::1]:8001/v1", "http://[::1]:8001"), ("", None),
        ("http://a' *", None), ("//host", None), ("http://a\r\nX-Y: z", None),
    ],
)  # fmt: skip
def test_a_second_server_is_an_origin_or_nothing(url, found):
    assert origin(url) == found
    policy = page({"model": "m"}, url).headers["content-security-policy"]
    assert f"connect-src 'self'{f' {found}' if found else ''};" in policy


def test_facts_can_not_break_out():
    text = page({"model": "</script><b>"}).body.decode()
    assert "</script><b>" not in text


async def test_draws_and_streams(browser):
    engine, half = Compressed(), asyncio.Event()

    async def step(position: int) -> None:
        if position == MODEL.raster.tokens // 2:
            await half.wait()

    engine.step = step
    async with served(await make_app(engine)) as url:
        tab, said = await opened(browser, url)
        assert await tab.inner_text("#about") == f"janus, {SIZE}, compressed cache, preset fitted, budget 0.2"
        await ask(tab, prompt=PROMPT, seed="7", n="2")
        await tab.wait_for_selector("figure .kept canvas")
        assert "10 of 30 tokens" in await tab.inner_text("figcaption >> nth=0")
        kept = (
            await tab.locator("figure >> nth=0")
            .locator(".kept canvas")
            .evaluate_all("all => all.map(c => [c.width, c.height, c.getAttribute('aria-label')])")
        )
        assert kept == [
            [5, 6, "ring 5, 8 heads: 5 of 10 tokens kept"], [5, 6, "scored 9, 2 heads: 5 of 10 tokens kept"]
        ]  # fmt: skip
        half.set()
        await says(tab, "#status", "Done: 2 of 2.")
        shown = await tab.locator("figure > img").evaluate_all("all => all.map(i => [i.naturalWidth, i.alt])")
        assert shown == [[WIDTH, "picture of seed 7"], [WIDTH, "picture of seed 8"]]
        assert {params.seed for params in engine.params.values()} == {7, 8}
        await tab.click("#history button")
        await tab.wait_for_selector("#history li:nth-child(2)")
        assert sorted(params.seed for params in engine.params.values()) == [7, 7, 8, 8]
        assert await tab.inner_text("#history span >> nth=0") == f"{PROMPT}\nseed 7, 2 pictures"
        assert not said


async def test_shows_the_apis_own_sentence(browser):
    async with served(await make_app(engine(), api_key="secret")) as url:
        tab, _ = await opened(browser, url)
        await ask(tab, prompt="a cat")
        await says(tab, "#error", re.compile("Unauthorized"))
        assert await tab.evaluate("document.activeElement.id") == "key"
        await ask(tab, key="secret", guidance="1", negative="blurry")
        await says(tab, "#error", "negative_prompt has no effect with guidance_scale 1 (none)")
        await ask(tab, negative="", seed="3")
        await says(tab, "#status", "Done: 1 of 1.")
        assert await tab.inner_text("#error") == ""


async def test_survives_a_servers_restart(browser):
    made = engine()
    made.step = lambda position: asyncio.sleep(3600 if position == 12 else 0)
    async with served(await make_app(made)) as url:
        tab, _ = await opened(browser, url)
        await ask(tab, prompt="a cat")
        await says(tab, "figcaption", re.compile("drawing"))
    await says(tab, "#error", re.compile("connection ended|can't be reached"))
    assert await tab.is_enabled("#draw")
    app = await make_app(engine())
    app.add_api_route("/health", lambda: {})  # vLLM's
    async with served(app, port=int(url.rpartition(":")[2])):
        await says(tab, "#status", "The server is back.")
        await ask(tab, prompt="a cat")
        await says(tab, "#status", "Done: 1 of 1.")


async def test_two_servers_side_by_side(browser):
    first, second = engine(), engine(False)
    async with served(await make_app(first)) as url, served(await make_app(second, origins=["*"])) as other:
        tab, said = await opened(browser, url)
        await tab.click("summary")
        await tab.fill("#prompt", "a cat")
        await tab.fill("#compare", other)
        await tab.click("#connect")
        await tab.wait_for_url(f"**{PATH}?compare=*")
        assert await tab.input_value("#prompt") == "a cat"
        await ask(tab, seed="5")
        await says(tab, "#status", "Done: 2 of 2.")
        assert await tab.locator("figure h2").all_inner_texts() == ["this server", other]
        for asked in (first, second):
            assert [params.seed for params in asked.params.values()] == [5]
        assert not said


async def test_fits_a_phone(browser):
    async with served(await make_app(engine())) as url:
        tab, _ = await opened(browser, url)
        for width in (320, 390, 1280):
            await tab.set_viewport_size({"width": width, "height": 800})
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width
