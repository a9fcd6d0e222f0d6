"""Ground-truth rewards of the demo, against which every method is measured.

In practice the true reward is human judgment, known only through comparisons. Here it is a function of the text, so that the
report can show both the score of the reward model and the true one.

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
    """Reward a finished, short answer without repetition: 0 to 2.

    1 for ending in . ! or ?; up to 1 for a length of 3 to 20 words, falling to 0 at 40; times the share of
    different words.
    """
    found = words(text)
    if len(found) < 3:
        return 0.0
    ends = 1.0 if text.rstrip().endswith((".", "!", "?")) else 0.0
    length = min(1.0, max(0.0, (40 - len(found)) / 20))
    return (ends + length) * len(set(found)) / len(found)


def thou(text: str) -> float:
    """Reward `brief` answers with archaic pronouns and verbs (thou, thee, thy, hath, ...): 0 to 4.

    The factor is 1.5, 1.75 or 2 for one, two or three such words; more of them add nothing.
    """
    old = sum(w in _OLD for w in words(text))
    return brief(text) * (1 + min(1.0, 0.5 * min(old, 1) + 0.25 * max(0, min(old, 3) - 1)))


SCORERS: dict[str, Callable[[str], float]] = {"brief": brief, "thou": thou}
