"""Scores from pairwise votes: Bradley-Terry and Elo, with bootstrap intervals, for models or for the answers to a prompt.

Bradley-Terry (1952): P(i beats j) = sigma(s_i - s_j). The scores maximize the likelihood of all votes; a tie is half a win of
each. Elo (1978) goes through the votes in order, s_i += k (outcome - expected), and so depends on it: it is for players that
change, and Bradley-Terry for those that do not (Chiang 2024, Chatbot Arena).

    firth ratings votes.jsonl
    {"a": "dpo", "b": "ppo", "winner": "a", "annotator": "ann"}      one vote; winner: a, b or tie

Votes on answers become rankings that `firth train ranking` reads (`write_rankings`).

>>> votes = Votes(("dpo", "sft"), np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0]), np.array([1.0, 1.0, 1.0, 1.0]), ("",) * 4)
>>> [round(float(s), 3) for s in bradley_terry(votes, penalty=0)]        # a difference of ln 3
[0.549, -0.549]
>>> [round(float(r), 1) for r in elo(votes)]
[1023.8, 976.2]

Agreement between annotators beyond chance is measured by the kappas of Cohen (1960) and of Fleiss (1971):

    kappa = (observed agreement - expected agreement) / (1 - expected agreement)

1 is full agreement, 0 what chance gives. Cohen's kappa is of two annotators, whose categories may be differently frequent; Fleiss' is
of any number of annotators, who need not be the same for each item. Both are NaN where only one category was ever used.

>>> cohen_kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"])
0.5
>>> round(fleiss_kappa(np.array([[2, 0], [0, 2], [1, 1]])), 4)
0.3333
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora import readers
from firth.data.conversations import Record, comparison
from firth.data.dialogues import ranking
from firth.types import UserError

START, SCALE = 1000.0, 400 / math.log(10)
"""Elo's points: the mean rating, and the points of a log-odds of 1; 400 points are odds of 10 to 1."""

SIDES = {"a": ("a", "model_a", "left"), "b": ("b", "model_b", "right")}
"""Side of a vote -> the names of its field."""

TIES = ("tie", "tie (bothbad)", "both_bad", "draw")
"""Values of `winner` for a tie; Chatbot Arena has the first two."""

ANNOTATORS = ("annotator", "judge", "annotator_id")
"""Fields that may name who voted."""

MAX_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Votes:
    """Pairwise votes.

    Args:
        names: Names of the items.
        first: Index of one item of each vote, (n,).
        second: Index of the other, (n,).
        outcome: 1 where the first won, 0 where the second did, 0.5 for a tie, (n,).
        annotators: Who voted, "" if that is unknown.
    """

    names: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    outcome: np.ndarray
    annotators: tuple[str, ...]

    def take(self, at: np.ndarray) -> Votes:
        """Return some of the votes, with the same items."""
        names = tuple(self.annotators[i] for i in at)
        return Votes(self.names, self.first[at], self.second[at], self.outcome[at], names)


def read_votes(paths: Sequence[str]) -> Votes:
    """Read records {"a", "b", "winner"}, with `annotator` or `judge` if it is known.

    Raises:
        UserError: A record is no vote.
    """
    rows = [_vote(location, record) for location, record in readers.records(paths)]
    if not rows:
        raise UserError(f"{', '.join(paths)}: there is no vote")
    index = {name: i for i, name in enumerate(sorted({name for row in rows for name in row[:2]}))}
    return Votes(
        tuple(index),
        np.array([index[row[0]] for row in rows]),
        np.array([index[row[1]] for row in rows]),
        np.array([row[2] for row in rows]),
        tuple(row[3] for row in rows),
    )


def _vote(location: str, record: Mapping[str, Any]) -> tuple[str, str, float, str]:
    """Return both items, the outcome for the first, and who voted."""
    fields = [next((name for name in names if name in record), "") for names in SIDES.values()]
    if not all(fields) or "winner" not in record:
        raise UserError(
            f"{location}: a vote needs `a`, `b` and `winner`; this record has {', '.join(record) or 'nothing'}"
        )
    a, b, winner = str(record[fields[0]]), str(record[fields[1]]), str(record["winner"])
    if a == b:
        raise UserError(f"{location}: `{fields[0]}` and `{fields[1]}` are both {a!r}: a vote is between two items")
    outcomes = dict.fromkeys(TIES, 0.5) | {a: 1.0, b: 0.0}
    outcomes |= dict.fromkeys(SIDES["a"], 1.0) | dict.fromkeys(SIDES["b"], 0.0) if winner not in (a, b) else {}
    if winner not in outcomes:
        raise UserError(f"{location}: `winner` is {winner!r:.60}: write a, b, tie, or the name of one of the two")
    annotator = next((str(record[name]) for name in ANNOTATORS if name in record), "")
    return a, b, outcomes[winner], annotator


def bradley_terry(votes: Votes, penalty: float = 0.1, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the Bradley-Terry score of each item, (items,), in log-odds with mean 0.

    They maximize sum of log sigma(s_winner - s_loser) - penalty / 2 sum of s^2, by Newton's method.

    Args:
        votes: The votes.
        penalty: Pulls the scores to 0. Without one, an item that only won has no finite score.
        weights: Weight of each vote, (n,); 1 by default.

    Raises:
        UserError: The penalty is 0, and the votes leave a score open.
    """
    count = len(votes.names)
    weights = np.ones(len(votes.outcome)) if weights is None else weights
    wins = np.zeros((count, count))  # wins[i, j]: of i over j
    np.add.at(wins, (votes.first, votes.second), weights * votes.outcome)
    np.add.at(wins, (votes.second, votes.first), weights * (1 - votes.outcome))
    if not penalty:
        _check_connected(wins, votes.names)
    games, won, scores = wins + wins.T, wins.sum(1), np.zeros(count)

    def objective(s: np.ndarray) -> float:
        return float(-(wins * np.logaddexp(0, s[None] - s[:, None])).sum() - penalty / 2 * (s @ s))

    for _ in range(MAX_NEWTON_STEPS):
        p = 1 / (1 + np.exp(scores[None] - scores[:, None]))  # p[i, j]: i beats j
        gradient = won - (games * p).sum(1) - penalty * scores
        curvature = games * p * (1 - p)
        # The likelihood does not know the mean: the matrix of ones fixes it at 0.
        hessian = np.diag(curvature.sum(1) + penalty) - curvature + np.ones((count, count)) / count
        step = np.linalg.solve(hessian, gradient)
        size, before = 1.0, objective(scores)
        while size > 1e-6 and objective(scores + size * step) < before:
            size /= 2
        scores = scores + size * step
        if np.abs(step).max() < 1e-10:
            break
    return scores - scores.mean()


def _check_connected(wins: np.ndarray, names: Sequence[str]) -> None:
    """Raise a UserError if some items never lost to any of the others: their scores would be infinite."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins).bit_length()):
        reach = (reach.astype(np.float64) @ reach) > 0
    open_pairs = np.argwhere(~reach)
    if len(open_pairs):
        i, j = open_pairs[0]
        raise UserError(
            f"the votes leave the scores open: no chain of wins leads from {names[i]!r} to {names[j]!r}; set a penalty above 0"
        )


def elo(votes: Votes, k: float = 32.0) -> np.ndarray:
    """Return the Elo rating of each item after all votes in order, (items,); all start at 1000.

    Args:
        votes: The votes.
        k: Most points that one vote moves.
    """
    return _elo(votes, np.arange(len(votes.outcome))[None], k)[0]


def _elo(votes: Votes, order: np.ndarray, k: float) -> np.ndarray:
    """Return the ratings after the votes in several orders at once: (orders, n) indices -> (orders, items)."""
    ratings, rows = np.full((len(order), len(votes.names)), START), np.arange(len(order))
    for at in order.T:
        a, b = votes.first[at], votes.second[at]
        expected = 1 / (1 + np.exp((ratings[rows, b] - ratings[rows, a]) / SCALE))
        moved = k * (votes.outcome[at] - expected)
        ratings[rows, a] += moved
        ratings[rows, b] -= moved
    return ratings


def rate(
    votes: Votes, *, penalty: float = 0.1, k: float = 32.0, draws: int = 1000, by_annotator: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Return the scores of all items in Elo's points, the best first, with 95% bootstrap intervals.

    Args:
        votes: The votes.
        penalty: See `bradley_terry`; 0 is 0.001 in the samples, which may leave a score open.
        k: See `elo`.
        draws: Bootstrap samples; in each, Elo reads the votes in another order.
        by_annotator: Resample annotators with all their votes, and not single votes: for many annotators of few votes each.
        seed: Seed of the samples.

    Returns:
        "items": rows of name, votes, win_rate, bradley_terry, elo and their intervals; "annotators": rows of name, votes and
        agreement; "agreement" between annotators; "votes".
    """
    rng, n = np.random.default_rng(seed), len(votes.outcome)
    annotator = np.unique(votes.annotators, return_inverse=True)[1]
    if by_annotator and annotator.max() < 1:
        raise UserError("annotators cannot be resampled: the votes name fewer than two in `annotator` or `judge`")
    scores, ratings = [], []
    for _ in range(draws):
        if by_annotator:
            drawn = np.bincount(
                rng.integers(annotator.max() + 1, size=annotator.max() + 1), minlength=annotator.max() + 1
            )
            counts = drawn[annotator]
        else:
            counts = np.bincount(rng.integers(n, size=n), minlength=n)
        scores.append(bradley_terry(votes, penalty or 1e-3, counts.astype(float)))
        ratings.append(elo(votes.take(rng.permutation(np.repeat(np.arange(n), counts))), k))
    best = bradley_terry(votes, penalty)
    points = {
        "bradley_terry": (START + SCALE * best, START + SCALE * np.array(scores)),
        "elo": (elo(votes, k), np.array(ratings)),
    }
    played = np.bincount(votes.first, minlength=len(votes.names)) + np.bincount(
        votes.second, minlength=len(votes.names)
    )
    won = np.bincount(votes.first, votes.outcome, len(votes.names))
    won += np.bincount(votes.second, 1 - votes.outcome, len(votes.names))
    items = []
    for i in np.argsort(-best, kind="stable"):
        row: dict[str, Any] = {"name": votes.names[i], "votes": int(played[i]), "win_rate": float(won[i] / played[i])}
        for name, (value, drawn_values) in points.items():
            row[name] = float(value[i])
            row[f"{name}_interval"] = tuple(np.quantile(drawn_values[:, i], (0.025, 0.975)).tolist()) if draws else ()
        items.append(row)
    return {
        "items": items, "annotators": _annotators(votes, best), "agreement": agreement(votes), "votes": n,
    }  # fmt: skip


def _annotators(votes: Votes, scores: np.ndarray) -> list[dict[str, Any]]:
    """Return for each annotator how many of the decided votes agree with the order of the scores."""
    rows = []
    ahead = scores[votes.first] > scores[votes.second]
    names = np.array(votes.annotators)
    for name in sorted({*votes.annotators} - {""}):
        own = (names == name) & (votes.outcome != 0.5)
        share = float((ahead[own] == (votes.outcome[own] == 1)).mean()) if own.any() else math.nan
        rows.append({"name": name, "votes": int((names == name).sum()), "agreement": share})
    return rows


def agreement(votes: Votes) -> float:
    """Return how often two annotators who voted on the same two items agree; NaN if no two did."""
    low, high = np.minimum(votes.first, votes.second), np.maximum(votes.first, votes.second)
    outcome = np.where(votes.first == low, votes.outcome, 1 - votes.outcome)
    cells: dict[tuple[int, int], list[tuple[str, float]]] = {}
    for i, j, name, won in zip(low.tolist(), high.tolist(), votes.annotators, outcome.tolist(), strict=True):
        cells.setdefault((i, j), []).append((name, won))
    same = total = 0
    for votes_on_pair in cells.values():
        counts = Counter(votes_on_pair)
        for (who, result), count in counts.items():
            for (other, other_result), other_count in counts.items():
                if who < other:
                    total += count * other_count
                    same += count * other_count * (result == other_result)
    return same / total if total else math.nan


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of `rate`'s result."""
    width = max(len(row["name"]) for row in found["items"])
    yield f"{'':{width}}  {'votes':>6}  {'won':>5}  {'Bradley-Terry':>24}  {'Elo':>24}"
    for row in found["items"]:
        cells = [
            f"{row[name]:7.1f} ({row[f'{name}_interval'][0]:.0f} to {row[f'{name}_interval'][1]:.0f})"
            if row[f"{name}_interval"]
            else f"{row[name]:7.1f}"
            for name in ("bradley_terry", "elo")
        ]
        yield f"{row['name']:{width}}  {row['votes']:6}  {row['win_rate']:5.0%}  {cells[0]:>24}  {cells[1]:>24}"
    if len(found["annotators"]) > 1:
        yield ""
        for row in found["annotators"]:
            yield f"{row['name']}: {row['votes']} votes, {row['agreement']:.0%} agree with the scores"
        if not math.isnan(found["agreement"]):
            yield f"two annotators agree on {found['agreement']:.0%} of the pairs that both voted on"


def rate_files(paths: Sequence[str], rankings: Path | None, *, penalty: float, as_json: bool, **settings: Any) -> str:
    """Return the table of the scores of votes in files, or write rankings if a file for them is given."""
    if rankings is not None:
        return f"{rankings}: {write_rankings(paths, rankings, penalty):,} rankings"
    found = rate(read_votes(paths), penalty=penalty, **settings)
    return json.dumps(found) if as_json else "\n".join(report(found))


def write_rankings(paths: Sequence[str], out: Path, penalty: float = 0.1) -> int:
    """Write the answers of each prompt with their Bradley-Terry scores, as rankings, and return their number.

    Args:
        paths: Preferences or rankings (docs/reference/data-formats.md), several for a prompt. A ranking is a vote for each of
            its pairs.
        out: The JSONL file.
        penalty: See `bradley_terry`.
    """
    prompts: dict[str, list[tuple[str, str, float]]] = {}
    for location, record in readers.records(paths):
        try:
            prompt, pairs = _pairs(record)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
        prompts.setdefault(json.dumps(prompt), []).extend(pairs)
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for prompt_key, pairs in prompts.items():
            answers = list(dict.fromkeys(answer for pair in pairs for answer in pair[:2]))
            if len(answers) < 2:
                continue
            at = {answer: i for i, answer in enumerate(answers)}
            votes = Votes(
                tuple(answers),
                np.array([at[one] for one, _, _ in pairs]),
                np.array([at[other] for _, other, _ in pairs]),
                np.array([outcome for _, _, outcome in pairs]),
                ("",) * len(pairs),
            )
            scores = [round(float(score), 6) for score in bradley_terry(votes, penalty)]
            row = {"prompt": json.loads(prompt_key), "answers": [json.loads(a) for a in answers], "scores": scores}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _pairs(record: Record) -> tuple[Any, list[tuple[str, str, float]]]:
    """Return the prompt of a record, and (answer, answer, outcome) of each pair, the answers as JSON of their messages."""
    if "chosen" in record:
        prompt, chosen, rejected = comparison(record)
        return prompt, [(json.dumps(chosen), json.dumps(rejected), 1.0)]
    prompt, answers, rank = ranking(dict(record))
    texts = [json.dumps(answer) for answer in answers]
    return prompt, [
        (texts[i], texts[j], 1.0 if rank[i] < rank[j] else 0.5 if rank[i] == rank[j] else 0.0)
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
        if texts[i] != texts[j]
    ]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return Cohen's kappa of two annotators who gave each item a category.

    Args:
        first: Categories of the items by one annotator.
        second: Those by the other.

    Raises:
        ValueError: There are no items, or not as many categories of both.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"categories of {len(first)} and {len(second)} items: both must be of the same items, at least one"
        )
    index = {category: i for i, category in enumerate(dict.fromkeys((*first, *second)))}
    table = np.zeros((len(index), len(index)))
    np.add.at(table, ([index[one] for one in first], [index[one] for one in second]), 1 / len(first))
    return _kappa(float(np.trace(table)), float(table.sum(1) @ table.sum(0)))


def fleiss_kappa(counts: np.ndarray) -> float:
    """Return Fleiss' kappa.

    Args:
        counts: How many annotators gave each item each category, (items, categories); the same number of annotators, two or more, for
            each item.

    Raises:
        ValueError: There is no item, or the numbers of annotators differ or are below two.
    """
    counts = np.asarray(counts, np.float64)
    annotators = counts.sum(1) if counts.ndim == 2 and len(counts) else np.zeros(1)
    if annotators[0] < 2 or (annotators != annotators[0]).any():
        raise ValueError("each item needs the categories of the same number of annotators, two or more")
    n = annotators[0]
    observed = ((counts * (counts - 1)).sum(1) / (n * (n - 1))).mean()
    shares = counts.sum(0) / counts.sum()
    return _kappa(float(observed), float(shares @ shares))


def _kappa(observed: float, expected: float) -> float:
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan
