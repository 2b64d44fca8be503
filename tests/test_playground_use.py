"""The playground as people use it: what a picture says of itself, history, keyboard, dark, a phone, keys."""

import asyncio
import base64
from dataclasses import replace
from typing import Any

import pytest
from browsers import Compressed, ask, browser, engine, focused, opened, says, usage
from fastapi import FastAPI
from images_fakes import HEIGHT, MODEL, SIZE, WIDTH, make_app, prompt_ids, served, until

from vllm_kvcompress.models.config import PictureSize
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.serving.playground import PATH

__all__ = ["browser"]
LOW = PictureSize(Raster(lines=4, width=MODEL.raster.width, patch=MODEL.raster.patch), (291,))
SIZES = replace(MODEL, grid_ids=(290,), more_sizes=(LOW,))
CUT = """all => all.filter((select) => {
  const whole = select.cloneNode(true);
  whole.style.width = "max-content";
  select.after(whole);
  const width = whole.offsetWidth;
  whole.remove();
  return width > select.offsetWidth;
}).map((select) => select.id)"""
"""The choices whose longest word does not fit."""
NO_KEY = "it refuses this page: is its API key right?"
FAINT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (...layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
      const part = byte / 255;
      return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  let seen = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!words && !element.matches("input, textarea, select")) continue;
    if (!element.checkVisibility() || element.matches("[aria-disabled=true], :disabled")) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const back = light(...grounds), front = light(...grounds, getComputedStyle(element).color);
    const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    seen++;
    if (ratio < 4.5) faint.push(`${element.tagName} ${element.textContent.slice(0, 40)}: ${ratio}`);
  }
  return [seen, faint];
}"""
"""How many elements bear words, and those whose words are fainter than WCAG's 4.5 : 1."""


async def shown(tab: Any) -> tuple[int, ...]:
    """Width and height of the first picture."""
    size = "image => [image.naturalWidth, image.naturalHeight]"
    return tuple(await tab.locator("figure > img >> nth=0").evaluate(size))


async def test_a_picture_says_what_it_took_and_stays(browser: Any) -> None:
    """Its caption, its download; the history outlives a reload, until it is forgotten."""
    async with served(await make_app(Compressed(), usage_extra=lambda client: usage)) as url:
        tab, said = await opened(browser, url)
        await ask(tab, prompt="a cat", seed="7")
        await says(tab, "#status", "Done: 1 of 1.")
        caption = await tab.inner_text("figcaption")
        assert caption.startswith("seed 7, ")
        assert caption.split(" s, ", 1)[1] == (
            f"30 steps for {MODEL.raster.tokens} tokens, "
            "KV cache 1.5 MiB, 25% of the full cache's 6.0 MiB \N{EN DASH} download"
        )
        async with tab.expect_download() as begun:
            await tab.click("figcaption a")
        download = await begun.value
        assert download.suggested_filename == "seed-7.png"
        source = await tab.get_attribute("figure > img", "src")
        with open(await download.path(), "rb") as file:
            assert file.read() == base64.b64decode(source.partition("base64,")[2])
        await tab.wait_for_selector("#history li")
        await tab.reload()
        assert await tab.inner_text("#history span") == "a cat\nseed 7"
        await tab.locator("#history img").evaluate("image => image.decode()")
        await tab.click("#forget")
        await tab.reload()
        assert (await tab.locator("#history li").count(), await tab.is_visible("#forget")) == (0, False)
        assert not said


async def test_it_sends_what_was_filled_in(browser: Any) -> None:
    """Every field, of a model of two sizes; a picture of the smaller one."""

    def ids(tokenizer: Any, model: Any, text: str) -> list[int]:
        return [*prompt_ids(tokenizer, model, text), *model.grid_ids]

    async with served(await make_app(engine(), image_model=SIZES, prompt_ids=ids)) as url:
        tab, _ = await opened(browser, url)
        names = await tab.locator("#size option").all_inner_texts()
        assert names == list(SIZES.names) == [SIZE, LOW.raster.name]
        await tab.select_option("#size", LOW.raster.name)
        await tab.select_option("#every", "4")
        async with tab.expect_request("**/v1/images/generations") as sent:
            await ask(tab, prompt="a cat", negative="dog", guidance="2.5", seed="7")
        assert (await sent.value).post_data_json == {
            "prompt": "a cat", "negative_prompt": "dog", "guidance_scale": 2.5, "seed": 7,
            "size": LOW.raster.name, "stream": True, "partial_lines": 4, "kept": True,
        }  # fmt: skip
        await says(tab, "#status", "Done: 1 of 1.")
        assert await shown(tab) == LOW.raster.pixel_size
        await tab.select_option("#every", "")
        async with tab.expect_request("**/v1/images/generations") as sent:
            await ask(tab, negative="", guidance="", seed="")
        body = (await sent.value).post_data_json
        assert isinstance(body.pop("seed"), int)
        assert body == {"prompt": "a cat", "size": LOW.raster.name, "stream": True}


async def test_stop_ends_the_pictures_and_the_next_ones_draw(browser: Any) -> None:
    made = engine()
    made.step = lambda position: asyncio.sleep(3600 if position == 12 else 0)
    async with served(await make_app(made)) as url:
        tab, _ = await opened(browser, url)
        await ask(tab, prompt="a cat", n="2")
        await until(lambda: len(made.running) == 2)
        await tab.click("#stop")
        await says(tab, "#status", "Stopped.")
        assert await tab.locator("figcaption").all_inner_texts() == ["stopped"] * 2
        await until(lambda: not made.running)
        assert set(made.aborted) == set(made.params)
        assert len(made.params) == 2
        assert await tab.inner_text("#error") == ""
        made.step = lambda position: asyncio.sleep(0)
        await ask(tab, n="1")
        await says(tab, "#status", "Done: 1 of 1.")


async def test_a_keyboard_is_enough(browser: Any) -> None:
    """The order of Tab; Ctrl+Enter; and the focus stays where it was when a picture begins and ends."""
    made, go = engine(), asyncio.Event()
    made.step = lambda position: go.wait()

    async def drawn(number: int) -> None:
        await until(lambda: len(made.params) == number)
        go.set()
        await says(tab, "#status", "Done: 1 of 1.")
        await tab.wait_for_selector(f"#history li:nth-child({number})")
        go.clear()

    async with served(await make_app(made)) as url:
        tab, _ = await opened(browser, url)
        await tab.wait_for_selector("#prompt:focus")  # a browser sets it once the page is shown
        await tab.keyboard.type("a cat")
        await tab.keyboard.press("Control+Enter")
        await drawn(1)
        assert await focused(tab) == "prompt"
        order = []
        for _ in range(8):
            await tab.keyboard.press("Tab")
            order.append(await focused(tab))
        assert order == ["negative", "n", "seed", "guidance", "size", "every", "draw", "stop"]
        await tab.keyboard.press("Shift+Tab")
        await tab.keyboard.press("Enter")
        await tab.keyboard.press("Enter")  # while it draws, it does nothing
        await drawn(2)
        assert await focused(tab) == "draw"
        for _ in range(4):
            await tab.keyboard.press("Tab")
        assert (await focused(tab)).startswith("Draw again: a cat, seed ")
        await tab.keyboard.press("Enter")
        await drawn(3)
        assert await focused(tab) == "draw"
        seeds = [params.seed for params in made.params.values()]
        assert seeds[2] == seeds[1] != seeds[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_words_stand_out_and_a_phone_shows_all(browser: Any, scheme: str) -> None:
    """After pictures of two servers, with rasters, a history, notes and an error."""
    app = await make_app(Compressed(), usage_extra=lambda client: usage)
    async with served(app) as url, served(await make_app(engine(False), origins=["*"])) as other:
        tab, _ = await opened(browser, url, f"{PATH}?compare={other}", color_scheme=scheme)
        await ask(tab, prompt="a" * 60, seed="7")
        await says(tab, "#status", "Done: 2 of 2.")
        await tab.wait_for_selector("#history li")
        assert await tab.locator(".kept canvas").count() == 2
        await ask(tab, negative="b", guidance="1")
        await says(tab, "#error", "this server: negative_prompt has no effect with guidance_scale 1 (none)")
        ground = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) < 128) == (scheme == "dark")
        await ask(tab, negative="", guidance="")
        await says(tab, "#status", "Done: 2 of 2.")
        seen, faint = await tab.evaluate(FAINT)
        assert (seen > 20, faint) == (True, [])
        for width in (320, 390, 768, 1280):
            await tab.set_viewport_size({"width": width, "height": 800})
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width
            assert await tab.locator("select").evaluate_all(CUT) == []


async def test_a_key_goes_to_the_server_that_it_was_given_for(browser: Any) -> None:
    """A link to the page may name another second server: it gets no key of the one before."""
    asked: dict[str, list[str | None]] = {"one": [], "two": []}
    apps = {name: await make_app(engine(False), api_key="secret", origins=["*"]) for name in asked}
    for name, app in apps.items():
        app.add_api_route("/health", lambda: {})  # vLLM's
        note_keys(app, asked[name])
    drawing = await make_app(engine())
    async with served(drawing) as url, served(apps["one"]) as one, served(apps["two"]) as two:
        tab, _ = await opened(browser, url)
        await tab.click("summary")
        assert await tab.is_disabled("#otherkey")
        await tab.fill("#compare", one.removeprefix("http://"))  # as people type it
        await tab.click("#connect")
        await tab.wait_for_url(f"**{PATH}?compare=*")
        assert await tab.input_value("#compare") == one
        assert await tab.inner_text("#about") == f"janus, {SIZE}, full cache; draws at {one} as well"
        await ask(tab, prompt="a cat")
        await says(tab, "#error", f"{one}: {NO_KEY}")
        assert await focused(tab) == "otherkey"
        await ask(tab, otherkey="secret")
        await says(tab, "#status", "Done: 2 of 2.")
        await tab.goto(f"{url}{PATH}?compare={two}")
        assert await tab.input_value("#otherkey") == ""
        await ask(tab, prompt="a cat")
        await says(tab, "#error", f"{two}: {NO_KEY}")
        await tab.goto(f"{url}{PATH}?compare={one}")
        assert await tab.input_value("#otherkey") == "secret"
        await tab.goto(f"{url}{PATH}?compare=javascript:alert(1)")
        said = "No second server: javascript:alert(1) is no address like http://localhost:8001."
        await says(tab, "#error", said)
    assert set(asked["one"]) >= {None, "Bearer secret"}
    assert set(asked["two"]) == {None}


async def test_a_second_server_says_how_it_must_be_started(browser: Any) -> None:
    """vLLM lets pages of other servers read nothing, unless told so."""
    beside = await make_app(engine(False))
    beside.add_api_route("/health", lambda: {})  # vLLM's
    async with served(await make_app(engine())) as url:
        async with served(beside) as other:
            tab, _ = await opened(browser, url, f"{PATH}?compare={other}")
            await ask(tab, prompt="a cat")
            mend = f"""start it with --allowed-origins '["{url}"]'"""
            await says(tab, "#error", f"{other}: it lets this page read no answer; {mend}")
        await ask(tab)
        await says(tab, "#error", f"{other}: the server can't be reached")
        async with served(beside, port=int(other.rpartition(":")[2])):
            await says(tab, "#status", f"{other} is back.")


def note_keys(app: FastAPI, keys: list[str | None]) -> None:
    """Note the key of every request to draw."""

    @app.middleware("http")
    async def note(request: Any, call: Any) -> Any:
        if request.method == "POST":
            keys.append(request.headers.get("authorization"))
        return await call(request)


async def test_a_proxy_may_put_the_server_under_a_prefix(browser: Any) -> None:
    outside = FastAPI()
    outside.mount("/pictures", await make_app(engine()))
    async with served(outside) as url:
        tab, said = await opened(browser, url, f"/pictures{PATH}")
        await ask(tab, prompt="a cat")
        await says(tab, "#status", "Done: 1 of 1.")
        assert await shown(tab) == (WIDTH, HEIGHT)
        assert not said
