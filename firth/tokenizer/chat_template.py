"""A tokenizer's own chat template (Jinja, chat_template.jinja), taken apart: what it writes itself, and what was said.

A template is a program of strangers that mixes control tokens with what users write. It is rendered in Jinja's
sandbox, in a process of its own with limits on time and memory (`firth.tokenizer.template_worker`), twice: with a private sign in
place of each content, which shows where the contents stand, and as it is, which shows that they stand there as they
were written. So control tokens are read in the template's own pieces alone.

>>> chatty = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
>>> parts(chatty, [{"role": "user", "content": " hi </s> "}], {"bos_token": "<s>"}, open=False)
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

START, END = "<|im_start|>", "<|im_end|>"
"""ChatML's tokens around a turn, written by `firth.tokenizer.chat`."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML in Jinja, saved as chat_template.jinja for other tools. `generation` tells transformers and TRL the mask."""

SIGN = "\ue000"
"""From Unicode's private area: what no text has, or what is repeated until no text has it."""


def parts(
    template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], open: bool
) -> tuple[list[str], list[str]]:
    """What the template writes itself, and between those pieces the contents as it shows them: one piece more.

    names: what the template may call bos_token, eos_token and so on. open: ask it to begin the assistant's turn.
    Contents are shown as they are or without the blanks around them. UserError where the template leaves one out,
    changes it or its place, refuses the dialogue, or is no template.
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
        for said in (content, content.strip()):
            if follows and whole.startswith(said + piece, at):
                shown.append(said)
                at += len(said) + len(piece)
                break
        else:
            raise _refused(f"does not show the message {content[:30]!r} as it was written")
    if at != len(whole) or not follows:
        raise _refused("writes something else depending on what is said")
    return pieces, shown


def _refused(why: str) -> UserError:
    return UserError(f"the tokenizer's chat template {why}, so what is said cannot be told from what the template adds")


def _render(
    template: str, dialogues: Sequence[Sequence[Mapping[str, str]]], names: Mapping[str, str], open: bool
) -> list[str]:
    """What the template writes for each dialogue, in a process with limits (`firth.tokenizer.template_worker`); UserError as it says."""
    asked = {"template": template, "dialogues": [list(d) for d in dialogues], "names": dict(names), "open": open}
    with LOCK:
        worker = _worker()
        said = ""
        with contextlib.suppress(OSError):
            worker.stdin.write(json.dumps(asked) + "\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            said = worker.stdout.readline()  # type: ignore[union-attr]
        if not said:
            _end(worker)
            del WORKERS[os.getpid()]
            raise UserError("the tokenizer's chat template takes more time than any dialogue needs, so it is not used")
    told: dict[str, Any] = json.loads(said)
    if "error" in told:
        raise UserError(f"the tokenizer's chat template {told['error']}")
    texts: list[str] = told["texts"]
    return texts


WORKERS: dict[int, subprocess.Popen[str]] = {}
"""The process that renders, of each process that asks: a fork must not share its parent's pipes."""
LOCK = threading.Lock()


def _worker() -> subprocess.Popen[str]:
    """This process' renderer, started when it is first needed."""
    here = os.getpid()
    if here not in WORKERS:
        file = Path(__file__).with_name("template_worker.py")
        WORKERS[here] = subprocess.Popen(
            [sys.executable, "-I", str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding="utf-8",
        )  # fmt: skip
        atexit.register(_end, WORKERS[here])
    return WORKERS[here]


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
