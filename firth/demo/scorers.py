"""Ground-truth rewards of the demo, against which every alignment method is measured.

In practice the true reward is human judgment, known only through comparisons. Here it is a function of the text, so that the
report can show both the score of the reward model and the true reward.

>>> brief("I will go.") > brief("I will go") > brief("")
True
>>> thou("What wilt thou do?") > thou("What will you do?")
True
"""

from __future__ import annotations

import re
from collections.abc import Callable

ARCHAIC_WORDS = {"thou", "thee", "thy", "thine", "thyself", "art", "hast", "dost", "wilt", "shalt", "hath", "doth"}
"""Words that `thou` rewards."""


def words(text: str) -> list[str]:
    """Split a text into lowercase words.

    Args:
        text: The text.

    Returns:
        Its words, without punctuation and digits.
    """
    return re.findall(r"[a-z']+", text.lower())


def brief(text: str) -> float:
    """Compute a reward for a finished, short answer without repetition.

    The reward is 1 for a final . ! or ?, plus up to 1 for a length of 3 to 20 words (falling to 0 at 40 words); the sum is
    multiplied by the share of distinct words.

    Args:
        text: An answer.

    Returns:
        The reward, 0 to 2.
    """
    answer = words(text)
    if len(answer) < 3:
        return 0.0
    finished = 1.0 if text.rstrip().endswith((".", "!", "?")) else 0.0
    length = min(1.0, max(0.0, (40 - len(answer)) / 20))
    return (finished + length) * len(set(answer)) / len(answer)


def thou(text: str) -> float:
    """Compute the `brief` reward, multiplied by a factor for archaic pronouns and verbs (thou, thee, thy, hath, ...).

    The factor is 1.5, 1.75 or 2 for one, two or three such words; more of them add nothing.

    Args:
        text: An answer.

    Returns:
        The reward, 0 to 4.
    """
    count = sum(word in ARCHAIC_WORDS for word in words(text))
    return brief(text) * (1 + min(1.0, 0.5 * min(count, 1) + 0.25 * max(0, min(count, 3) - 1)))


SCORERS: dict[str, Callable[[str], float]] = {"brief": brief, "thou": thou}
"""Ground-truth rewards by name."""
