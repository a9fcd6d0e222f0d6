"""What Jinja's sandbox holds by itself, and what only the limits of the rendering process hold.

Every template of COSTLY writes a few characters or none, so a bound on the output does not stop it either.
"""

import signal
import tracemalloc

import jinja2
import pytest

from firth.tokenizer.chat_template import split_template
from firth.tokenizer.template_worker import MAX_CHARACTERS, compiled
from firth.types import UserError

MESSAGES = [{"role": "user", "content": "hi"}]

SAFE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os }}",
    "code": "{{ raise_exception.__code__ }}",
    "attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "map attribute": "{{ messages|map(attribute='__class__')|list }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "stored format": "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "mutation": "{{ messages.append(1) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "macro recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
}
"""Templates that the sandbox rejects, or renders without what they ask for."""

SIZE = 20_000_000
MEMORY = {
    "product": "{{ ('a' * SIZE) | length }}",
    "list": "{{ ([0] * SIZE) | length }}",
    "center": "{{ 'a' | center(SIZE) | length }}",
    "percent": "{{ ('%SIZEd' % 1) | length }}",
    "format": "{{ '{:>SIZE}'.format(1) | length }}",
    "ljust": "{{ 'a'.ljust(SIZE) | length }}",
    "replace": "{{ ('a' * 1000).replace('a', 'b' * (SIZE // 1000)) | length }}",
    "indent": "{{ ('a\\n' * 1000) | indent(SIZE // 1000) | length }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(50) %}{% if n.x | length < SIZE %}"
    "{% set n.x = n.x ~ n.x %}{% endif %}{% endfor %}{{ n.x | length }}",
}
TIME = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "sums": "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
}

FOLDED = {"wordwrap": "{{ ('a' * 10**6) | wordwrap(1) | length }}"}
"""Takes half a minute when it is compiled: Jinja computes constants then, and swallows any exception, an alarm's too."""


@pytest.mark.parametrize("name", SAFE)
def test_the_sandbox_holds_access_to_python(name):
    try:
        text = compiled(SAFE[name])(messages=MESSAGES)
    except (jinja2.TemplateError, OverflowError, RecursionError):
        return
    assert "class" not in text and "str" not in text
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", MEMORY)
def test_the_sandbox_alone_bounds_no_memory(name):
    template = MEMORY[name].replace("SIZE", str(SIZE))
    tracemalloc.start()
    try:
        text = compiled(template)(messages=MESSAGES)
        assert len(text) <= 10 and tracemalloc.get_traced_memory()[1] >= SIZE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TIME)
def test_the_sandbox_alone_bounds_no_time(name):
    """The alarm is what a training process cannot use: it reaches the main thread only, between two bytecodes."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            next(compiled(TIME[name]).__self__.generate(messages=MESSAGES))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MEMORY, "macro tree", "wordwrap"])
def test_the_process_limits_hold_what_the_sandbox_does_not(name):
    template = {**MEMORY, **TIME, **FOLDED}[name].replace("SIZE", str(2_000_000_000))
    with pytest.raises(UserError, match=r"more (time|memory)|has a fault"):
        split_template(template, MESSAGES, {}, open=False)


def test_the_output_is_bounded():
    with pytest.raises(UserError, match="writes 20,000,000 characters"):
        split_template("{{ 'a' * 20000000 }}", MESSAGES, {}, open=False)
    assert MAX_CHARACTERS < 20_000_000
