"""A tokenizer's own chat template (Jinja, chat_template.jinja), taken apart: what it writes itself, and what was said.

A template is a program of strangers that mixes control tokens with what users write. It is rendered in Jinja's
sandbox, twice: with a private sign in place of each content, which shows where the contents stand, and as it is, which
shows that they stand there as they were written. So control tokens are read in the template's own pieces alone.

>>> chatty = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}</s>{% endfor %}"
>>> parts(chatty, [{"role": "user", "content": " hi </s> "}], {"bos_token": "<s>"}, open=False)
(['<s>[user] ', '</s>'], ['hi </s>'])
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firth.types import UserError

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
    rest, whole = (_render(template, some, names, open) for some in (marked, messages))
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


def _render(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str], open: bool) -> str:
    import jinja2

    try:
        return _compiled(template)(
            messages=list(messages), add_generation_prompt=open, tools=None, documents=None, **names
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template cannot write this dialogue: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # a fault in its expressions
        raise UserError(f"the tokenizer's chat template has a fault: {type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Callable[..., str]:
    """The template's render function, in the environment that transformers gives to templates."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for transformers; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - Jinja reads it from the class

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template).render
