"""Split the text of a tokenizer's own chat template (Jinja, chat_template.jinja) from the contents of the messages.

A template is an untrusted program that mixes control tokens with user text. It is rendered in Jinja's sandbox, in a
separate process with limits on time and memory (`firth.tokenizer.template_worker`, started when it is first needed), twice:
with a private sign in place of each content, which shows the positions of the contents, and as it is, which shows that the
contents are unchanged. So control tokens are recognized only in the template's own text.

>>> chatty = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
>>> split_template(chatty, [{"role": "user", "content": " hi </s> "}], {"bos_token": "<s>"}, open=False)
(['<s>[user] ', '</s>'], ['hi </s>'])
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firth.types import UserError

WORKERS: dict[int, subprocess.Popen[str]] = {}
"""Process id -> its rendering process: a fork must not share the pipes of its parent."""
LOCK = threading.Lock()


def send(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the reply of the rendering process to a request, or None if the request exceeds its limits and ended it."""
    with LOCK:
        worker = _worker()
        reply = ""
        with contextlib.suppress(OSError):
            worker.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            reply = worker.stdout.readline()  # type: ignore[union-attr]
        if not reply:
            _end(worker)
            del WORKERS[os.getpid()]
            return None
    found: dict[str, Any] = json.loads(reply)
    return found


def _worker() -> subprocess.Popen[str]:
    """Return the rendering process of this process, started when it is first needed."""
    process = os.getpid()
    if process not in WORKERS:
        file = Path(__file__).with_name("template_worker.py")
        WORKERS[process] = subprocess.Popen(
            [sys.executable, "-I", str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding="utf-8",
        )  # fmt: skip
        atexit.register(_end, WORKERS[process])
    return WORKERS[process]


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]


START, END = "<|im_start|>", "<|im_end|>"
"""ChatML's tokens around a turn (`firth.tokenizer.chat`)."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML in Jinja, saved as chat_template.jinja for other tools. `generation` marks the loss mask for transformers and TRL."""

SIGN = "\ue000"
"""A private-use character; repeated until it occurs in no message."""


def split_template(
    template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], open: bool
) -> tuple[list[str], list[str]]:
    """Split a rendered dialogue into the text of the template and the contents of the messages.

    Args:
        template: A Jinja chat template.
        messages: The dialogue.
        names: Variables of the template: bos_token, eos_token and so on.
        open: Whether to append the start of an assistant turn (a generation prompt).

    Returns:
        The pieces of template text, and between them the contents as rendered (one fewer): as written or stripped.

    Raises:
        UserError: The template leaves a message out, changes it or the order, rejects the dialogue, or is not a template.
    """
    contents = [message["content"] for message in messages]
    sign = SIGN
    while any(sign in content for content in contents):
        sign += SIGN
    signs = [f"{sign}{i}\ue001" for i in range(len(contents))]
    marked = [{**message, "content": s} for message, s in zip(messages, signs, strict=True)]
    rest, whole = _render(template, (marked, messages), names, open)
    pieces, shown = [], []
    for s in signs:
        if rest.count(s) != 1:
            raise _refused(f"shows a message {rest.count(s)} times or out of order")
        piece, _, rest = rest.partition(s)
        pieces.append(piece)
    pieces.append(rest)
    at = len(pieces[0])
    follows = whole.startswith(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        for text in (content, content.strip()):
            if follows and whole.startswith(text + piece, at):
                shown.append(text)
                at += len(text) + len(piece)
                break
        else:
            raise _refused(f"does not show the message {content[:30]!r} as it was written")
    if at != len(whole) or not follows:
        raise _refused("writes text that depends on the contents of the messages")
    return pieces, shown


def _refused(why: str) -> UserError:
    return UserError(
        f"the tokenizer's chat template {why}, so the messages cannot be distinguished from the text of the template"
    )


def _render(
    template: str, dialogues: Sequence[Sequence[Mapping[str, str]]], names: Mapping[str, str], open: bool
) -> list[str]:
    """Render each dialogue in a process with limits (`firth.tokenizer.chat_template`).

    Raises:
        UserError: The template fails or takes too long.
    """
    request = {"template": template, "dialogues": [list(d) for d in dialogues], "names": dict(names), "open": open}
    result = send(request)
    if result is None:
        raise UserError(
            "the tokenizer's chat template takes more time or memory than any dialogue needs, so it is not used"
        )
    if "error" in result:
        raise UserError(f"the tokenizer's chat template {result['error']}")
    texts: list[str] = result["texts"]
    return texts
