"""The true scorers: what the demo's judge really wants, written down, so that every method can be held to it.

In life the true reward is people's judgement, known only through comparisons. Here it is a function of the text,
so that the report can show both what the reward model believes and what is true.

>>> brief("I will go.") > brief("I will go") > brief("")
True
>>> thou("What wilt thou do?") > thou("What will you do?")
True
"""

from __future__ import annotations

import re
from collections.abc import Callable

_OLD = {"thou", "thee", "thy", "thine", "thyself", "art", "hast", "dost", "wilt", "shalt", "hath", "doth"}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def brief(text: str) -> float:
    """A finished, short answer that does not repeat itself: 0 to 2.

    1 for ending in . ! or ?; up to 1 for a length of 3 to 20 words, falling to 0 at 40; times the share of
    different words.
    """
    said = words(text)
    if len(said) < 3:
        return 0.0
    ends = 1.0 if text.rstrip().endswith((".", "!", "?")) else 0.0
    length = min(1.0, max(0.0, (40 - len(said)) / 20))
    return (ends + length) * len(set(said)) / len(said)


def thou(text: str) -> float:
    """`brief`, times up to 2 for the old second and third person (thou, thee, thy, hath, ...): 0 to 4.

    1.5, 1.75 or 2 times for one, two or three such words, so that a heap of them earns nothing more.
    """
    old = sum(w in _OLD for w in words(text))
    return brief(text) * (1 + min(1.0, 0.5 * min(old, 1) + 0.25 * max(0, min(old, 3) - 1)))


SCORERS: dict[str, Callable[[str], float]] = {"brief": brief, "thou": thou}
