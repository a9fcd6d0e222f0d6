"""Statistics of collected preferences: progress, agreement of annotators, and scores of the runs.

A judgment of several answers is one decision for each two of them: the first is better, the second, or neither. Agreement is counted
over these decisions. They depend on each other, as do two judgments of a prompt, so the intervals of scores are of samples of prompts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from firth.evaluate.ratings import SCALE, START, Votes, bradley_terry, cohen_kappa, fleiss_kappa
from firth.serve.preferences import Preferences

DRAWS = 400
"""Bootstrap samples of the intervals of scores."""

Judgment = Mapping[str, Any]
Decisions = dict[tuple[str, str], int]
"""Two answers, in alphabetical order -> -1 if the first is better, 1 if the second is, 0 for a tie."""


def statistics(preferences: Preferences, total: int) -> dict[str, Any]:
    """Return what the page shows of the judgments.

    Args:
        preferences: The judgments.
        total: The number of prompts, also of those that are not sampled yet.
    """
    judgments = preferences.judgments()
    events = preferences.journal.active.values()
    judged = Counter(one["item"] for one in judgments)
    items = list(preferences.items)
    return {
        "prompts": total,
        "sampled": len(items),
        "wanted": sum(map(preferences.wanted, items)),
        "done": sum(min(judged[id], preferences.wanted(id)) for id in items),
        "judgments": len(judgments),
        "annotators": dict(Counter(one["annotator"] for one in judgments)),
        "skipped": sum(one["event"] == "skip" for one in events),
        "corrections": sum(one["event"] == "correction" for one in events),
        "agreement": agreement(judgments),
        "runs": run_scores(judgments),
    }


def agreement(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """Return the agreement of annotators on what two or more of them, or one of them twice, decided.

    Returns:
        "decisions", that were made by two or more; "share" of those by two on which they agree; "fleiss", kappa over the decisions that
        the most usual number of annotators made, two or more, of whom each counts once, with the first judgment; "cohen", rows of
        first, second, decisions, kappa. Numbers are None where there are no decisions or kappa is not defined.
    """
    by_item: dict[str, list[tuple[str, Decisions]]] = {}
    for one in judgments:
        by_item.setdefault(one["item"], []).append((one["annotator"], decisions(one)))
    counts: list[list[int]] = []
    repeated = 0
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for found in by_item.values():
        for (name, first), (other, second) in itertools.combinations(found, 2):
            (a, x), (b, y) = sorted(((name, first), (other, second)), key=lambda pair: pair[0])
            pairs.setdefault((a, b), []).extend((x[key], y[key]) for key in x)
        repeated += len(found[0][1]) if len(found) > 1 else 0
        people = dict(reversed(found)).values()  # the first judgment of each
        if len(people) > 1:
            counts += [
                [sum(made[key] == category for made in people) for category in (-1, 0, 1)] for key in found[0][1]
            ]
    usual = Counter(map(sum, counts)).most_common(1)
    same = [x == y for decided in pairs.values() for x, y in decided]
    return {
        "decisions": repeated,
        "share": _known(float(np.mean(same))) if same else None,
        "fleiss": _known(fleiss_kappa(np.array([row for row in counts if sum(row) == usual[0][0]]))) if usual else None,
        "cohen": [
            {"first": a, "second": b, "decisions": len(decided), "kappa": _known(cohen_kappa(*zip(*decided, strict=True)))}
            for (a, b), decided in sorted(pairs.items())
        ],
    }  # fmt: skip


def decisions(judgment: Judgment) -> Decisions:
    """Return the decision of a judgment on each two answers."""
    ranked = sorted(zip(judgment["answers"], judgment["ranks"], strict=True))
    return {
        (first, second): int(np.sign(rank - other))
        for (first, rank), (second, other) in itertools.combinations(ranked, 2)
    }


def run_votes(judgments: Sequence[Judgment]) -> tuple[Votes, np.ndarray] | None:
    """Return the judgments as votes between runs, one for each two answers of two runs; None if there is no such vote.

    Returns:
        The votes, and the number of the prompt of each, (n,).
    """
    found: list[tuple[str, str, float, str, str]] = []
    for one in judgments:
        answers = zip(one["runs"], one["ranks"], strict=True)
        written = [(run, rank) for runs, rank in answers for run in runs]
        for (run, rank), (other, other_rank) in itertools.combinations(written, 2):
            if run != other:
                outcome = 0.5 if rank == other_rank else float(rank < other_rank)
                found.append((run, other, outcome, one["annotator"], one["prompt"]))
    if not found:
        return None
    index = {name: i for i, name in enumerate(sorted({name for vote in found for name in vote[:2]}))}
    votes = Votes(
        tuple(index),
        np.array([index[vote[0]] for vote in found]),
        np.array([index[vote[1]] for vote in found]),
        np.array([vote[2] for vote in found]),
        tuple(vote[3] for vote in found),
    )
    return votes, np.unique([vote[4] for vote in found], return_inverse=True)[1]


def run_scores(judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """Return the Bradley-Terry score of each run in Elo's points, the best first; none of fewer than two runs.

    The 95% interval is of bootstrap samples of prompts, each with all its votes. One prompt has no interval: it is None.
    """
    found = run_votes(judgments)
    if found is None:
        return []
    votes, prompt = found
    count, rng = int(prompt.max()) + 1, np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(count, size=count), minlength=count)[prompt] for _ in range(DRAWS)]
    scores = START + SCALE * bradley_terry(votes)
    samples = START + SCALE * np.array([bradley_terry(votes, weights=one.astype(float)) for one in drawn])
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    played, won = np.zeros(len(scores)), np.zeros(len(scores))
    for side, outcome in ((votes.first, votes.outcome), (votes.second, 1 - votes.outcome)):
        played += np.bincount(side, minlength=len(scores))
        won += np.bincount(side, outcome, len(scores))
    return [
        {"name": votes.names[i], "votes": int(played[i]), "win_rate": float(won[i] / played[i]), "score": float(scores[i]),
         "low": float(low[i]) if count > 1 else None, "high": float(high[i]) if count > 1 else None}
        for i in np.argsort(-scores, kind="stable")
    ]  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
