"""Render untrusted templates of chats and of prompts in a separate process: a template is a program, and may never end or fill the memory.

    python -I template_worker.py        one request per line on standard input, one reply per line on standard output
    {"template": "...", "dialogues": [[{"role": "user", "content": "hi"}]], "names": {"eos_token": "</s>"}, "open": true}
    {"texts": ["..."]}  or  {"error": "..."}
    {"template": "{{question}}\\nAnswer:", "fields": {"question": "Why?"}, "value": false}
    {"value": "Why?\\nAnswer:"}  or  {"error": "..."}

Jinja's sandbox hides the attributes that lead to Python. It bounds neither time nor memory (tests/unit/tokenizer/test_template_worker.py
has templates that write ten characters and take gigabytes or hours), so the kernel's limits on this process do. This file imports
nothing of firth, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MAX_SECONDS, MAX_MEMORY_BYTES, MAX_CHARACTERS = 1, 1 << 30, 1 << 24
"""CPU seconds of one request (rounded up), bytes of address space, characters of a reply."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the loss mask for transformers; it has no effect on the text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads it from the class

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Callable[..., str]:
    """Return the render function of a template, in the environment that transformers gives to templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template).render


@functools.lru_cache(maxsize=64)
def prompt_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return the environment that lm-evaluation-harness gives to the templates of its tasks."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(pattern, repl, text, count=count)
    return environment


@functools.lru_cache(maxsize=256)
def compiled_prompt(template: str) -> jinja2.Template:
    """Return the template of a prompt."""
    return prompt_environment().from_string(template)


def answer_fields(request: dict[str, Any]) -> dict[str, Any]:
    """Return a template filled with fields, or the value of its only expression, or an error."""
    template = inner = request["template"]
    try:
        compiled_prompt(template)
        if request["fields"] is None:  # only check the template
            return {"value": ""}
        single = inner.startswith("{{") and inner.endswith("}}") and "{{" not in inner[2:-2]
        if not request["value"] or not single:
            text = compiled_prompt(template).render(**request["fields"])
            return {"value": text} if len(text) <= MAX_CHARACTERS else {"error": f"it writes {len(text):,} characters"}
        value = prompt_environment().compile_expression(inner[2:-2].strip(), undefined_to_none=False)(
            **request["fields"]
        )
        if isinstance(value, jinja2.Undefined):
            return {"error": f"{inner[2:-2].strip()!r} is undefined"}
        text = json.dumps(value)
        return {"value": value} if len(text) <= MAX_CHARACTERS else {"error": f"it writes {len(text):,} characters"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"it is not valid Jinja: {str(error)[:500]}"}
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        return {"error": str(error)[:500]}
    except (MemoryError, RecursionError):
        return {"error": "it needs more memory than any prompt"}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the rendered dialogues, or an error."""
    if "fields" in request:
        return answer_fields(request)
    try:
        render = compiled(request["template"])
        texts = [
            render(messages=d, add_generation_prompt=request["open"], tools=None, documents=None, **request["names"])
            for d in request["dialogues"]
        ]
    except jinja2.TemplateError as error:
        return {"error": f"cannot write this dialogue: {str(error)[:500]}"}
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # in its expressions
        return {"error": f"has a fault: {type(error).__name__}: {str(error)[:500]}"}
    except (MemoryError, RecursionError):
        return {"error": "asks for more memory than any dialogue needs"}
    longest = max(map(len, texts), default=0)
    return {"texts": texts} if longest <= MAX_CHARACTERS else {"error": f"writes {longest:,} characters"}


def main() -> None:
    """Answer requests until standard input ends; the kernel ends the process if a request takes too long."""
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(
            resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + MAX_SECONDS, resource.RLIM_INFINITY)
        )
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
