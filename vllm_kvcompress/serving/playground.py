"""``GET /playground``: a page to draw with, for operators who switch it on.

The page is one answer without anything from elsewhere. It draws through ``POST /v1/images/generations`` as
any client does, with the key that its user gives; it holds no secret itself, and vLLM guards ``/v1`` alone.
"""

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import HTMLResponse

PATH = "/playground"


@cache
def _parts() -> tuple[str, str, str]:
    folder = files("vllm_kvcompress.serving") / "page"
    page, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("playground.html", "style.css", "page.js")
    )
    return page, style, script


def origin(url: str) -> str | None:
    """Scheme, host and port of an http(s) URL, or of a host alone; else None: it goes into a header."""
    url = url.strip()
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[a-z0-9.-]+|[0-9a-f:.]+", host):
        return None
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def page(facts: dict[str, Any], compare: str = "") -> HTMLResponse:
    """The page.

    Parameters
    ----------
    facts : dict
        Of the server, for the page to show: ``model``, ``sizes``, ``guidance_scale``, ``cache``.
    compare : str
        URL of a second server to draw with as well; what is no http(s) URL counts as none, and the page says
        so. It and this server are all that the page may connect to.
    """
    other = origin(compare)
    markup, style, script = _parts()
    data = json.dumps({**facts, "compare": other}).replace("<", "\\u003c")
    answer = markup.replace("/*style*/", style).replace("/*script*/", script).replace("/*facts*/", data)
    answer = answer.replace("{{model}}", html.escape(str(facts["model"])))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        f"connect-src 'self'{f' {other}' if other else ''}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }  # fmt: skip
    return HTMLResponse(answer, headers=headers)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
