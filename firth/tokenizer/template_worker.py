"""Renders chat templates of strangers in a process of its own: a template is a program, and may run for ever or fill memory.

    python -I render.py        one request a line on standard input, one answer a line on standard output
    {"template": "...", "dialogues": [[{"role": "user", "content": "hi"}]], "names": {"eos_token": "</s>"}, "open": true}
    {"texts": ["..."]}  or  {"error": "..."}

Jinja's sandbox keeps a template from the attributes by which Python is reached; the limits here keep it from the rest of
the machine. This file imports nothing of firth, so that it starts in a tenth of a second and knows nothing to give away.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS, MEMORY, LONGEST = 1, 1 << 30, 1 << 24
"""Processor time for one request (to the next second), bytes of address space, characters of an answer."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for transformers; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads it from the class

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Callable[..., str]:
    """The template's render function, in the environment that transformers gives to templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template).render


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """The texts of the dialogues, or why there are none."""
    try:
        render = compiled(asked["template"])
        texts = [
            render(messages=d, add_generation_prompt=asked["open"], tools=None, documents=None, **asked["names"])
            for d in asked["dialogues"]
        ]
    except jinja2.TemplateError as error:
        return {"error": f"cannot write this dialogue: {str(error)[:500]}"}
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # in its expressions
        return {"error": f"has a fault: {type(error).__name__}: {str(error)[:500]}"}
    except (MemoryError, RecursionError):
        return {"error": "asks for more memory than any dialogue needs"}
    longest = max(map(len, texts), default=0)
    return {"texts": texts} if longest <= LONGEST else {"error": f"writes {longest:,} characters"}


def main() -> None:
    """Answer until standard input ends; the kernel ends the process where a request takes too long."""
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + SECONDS, resource.RLIM_INFINITY)
        )
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
