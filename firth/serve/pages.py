"""The two pages: what their documents have in common is in `static/page.html`, the rest is here."""

from __future__ import annotations

from pathlib import Path
from string import Template

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

STATIC = Path(__file__).parent / "static"
TEMPLATE = Template((STATIC / "page.html").read_text("utf-8"))

MODELS = TEMPLATE.substitute(
    title="firth", styles="", script="app.js", header='<div id="model"></div>',
    content='<div class="columns">\n<nav aria-label="Views"></nav>\n<main id="main"></main>\n</div>',
)  # fmt: skip
ANNOTATION = TEMPLATE.substitute(
    title="Preferences: firth", styles='<link rel="stylesheet" href="/static/annotate.css">', script="annotate.js",
    header='<div id="who"></div>', content='<main id="main" class="annotate"></main>',
)  # fmt: skip


async def models_page(request: Request) -> Response:
    """Return the page of the models and of the board."""
    return HTMLResponse(MODELS)


async def annotation_page(request: Request) -> Response:
    """Return the page for annotators."""
    return HTMLResponse(ANNOTATION)
