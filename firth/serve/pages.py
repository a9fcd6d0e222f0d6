"""The two pages, and what they show of each model, and why not what they cannot.

    GET /views     {"models": [{"name", "views": {"chat": "", "fill": "It is causal, ..."}, ...}], "compare": bool, "runs": bool}

A view with an empty reason is shown. What the documents of the pages have in common is in `static/page.html`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from firth.model.transformer import TransformerStack
from firth.serve.registry import ModelRegistry, ServedModel

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


NO_HEAD = "It has no LM head, so it gives no token a probability."


def site(models: ModelRegistry | None, runs: bool) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        models: The models of the server; None for none.
        runs: Whether there is a board of runs.
    """
    shown = [describe(served) for served in models.models.values()] if models is not None else []
    writing = [one for one in shown if not one["views"]["complete"]]
    return {"models": shown, "compare": len(writing) > 1, "runs": runs}


def describe(served: ServedModel) -> dict[str, Any]:
    """Return the name, the size and the views of a model."""
    model = served.model.evaluated.model
    return {
        "name": served.name,
        "description": model.config.description,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context": model.context,
        "answers": model.config.encoder.num_layers > 0,
        "views": reasons(served),
        "predict": prediction(served),
    }


def reasons(served: ServedModel) -> dict[str, str]:
    """Return why the page does not show a view of a model; "" where it does."""
    evaluated, able = served.model.evaluated, served.capabilities
    model, config = evaluated.model, evaluated.model.config
    latent = config.encoder.latent_size > 0
    no_text = "It reads in both directions, so it does not continue a text." if model.has_lm_head else NO_HEAD
    if latent:
        no_text = "A variational autoencoder decodes latents: use `firth generate`."
    complete = "" if "completions" in able else no_text
    chat = complete
    if not complete and "chat" not in able:
        chat = "It has no form for dialogues: “Write” gives it a text."
    elif not complete and not evaluated.is_chat_model:
        chat = "It was not trained on dialogues: “Write” continues a text."
    attends = isinstance(model.stack, TransformerStack) and len(model.stack.blocks) > 0
    no_score = "A variational autoencoder gives a text no exact probability." if latent else NO_HEAD
    no_fill = (
        "It is causal, so it does not fill gaps." if config.causal else "It has no LM head, so it does not fill gaps."
    )
    return {
        "chat": chat,
        "complete": complete,
        "fill": "" if "fill" in able else no_fill,
        "tokens": "" if "score" in able else no_score,
        "predict": "" if served.task is not None else "It has no head for classes, tags, answers or rewards.",
        "attention": "" if attends else "It has no attention layers.",
        "similarity": "",
    }


def prediction(served: ServedModel) -> dict[str, Any] | None:
    """Return the route by which a model predicts and the fields of its records; None for a model without a task head."""
    if served.task is None:
        return None
    fields = [asdict(field) for field in served.task.form(served.model.evaluated)]
    return {"route": served.task.route, "inputs": fields}
