"""Bradley-Terry scores against scikit-learn's logistic regression, Elo against its definition, and intervals that cover."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from firth.cli import app
from firth.data.dialogues import RankingsConfig
from firth.data.records import Records
from firth.evaluate.ratings import Votes, agreement, bradley_terry, elo, rate, read_votes, write_rankings
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer

NAMES = ("a", "b", "c", "d")


def votes_of(scores: list[float], count: int, seed: int, ties: float = 0.1) -> Votes:
    """Return votes drawn from known Bradley-Terry scores, by five annotators, some of them ties."""
    rng = np.random.default_rng(seed)
    pairs = np.array([rng.choice(len(scores), 2, replace=False) for _ in range(count)])
    values = np.array(scores)
    p = 1 / (1 + np.exp(values[pairs[:, 1]] - values[pairs[:, 0]]))
    outcome = np.where(rng.random(count) < ties, 0.5, (rng.random(count) < p).astype(float))
    names = tuple(f"annotator {i % 5}" for i in range(count))
    return Votes(NAMES[: len(scores)], pairs[:, 0], pairs[:, 1], outcome, names)


def regression(votes: Votes, penalty: float) -> np.ndarray:
    """Return the coefficients of a logistic regression of the outcome on +1 and -1; a tie is half a win and half a loss."""
    design = np.zeros((len(votes.outcome), len(votes.names)))
    design[np.arange(len(design)), votes.first] = 1
    design[np.arange(len(design)), votes.second] = -1
    if not penalty:
        design = design[:, 1:]  # the first item is the reference, or the coefficients are open
    model = LogisticRegression(C=1 / penalty if penalty else np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(
        np.concatenate((design, design)),
        np.repeat((1, 0), len(design)),
        np.concatenate((votes.outcome, 1 - votes.outcome)),
    )
    found = model.coef_[0] if penalty else np.concatenate(([0.0], model.coef_[0]))
    return found - found.mean()


@pytest.mark.parametrize("penalty", [0.0, 0.1, 5.0])
def test_bradley_terry_equals_logistic_regression(penalty: float) -> None:
    votes = votes_of([0.0, 1.0, 0.3, -1.2], 300, seed=1)
    assert np.allclose(bradley_terry(votes, penalty), regression(votes, penalty), atol=1e-5)


def test_two_items_have_the_log_odds_of_their_wins() -> None:
    votes = Votes(("x", "y"), np.zeros(10, int), np.ones(10, int), np.array([1.0] * 7 + [0.0] * 2 + [0.5]), ("",) * 10)
    scores = bradley_terry(votes, 0.0)
    assert scores[0] - scores[1] == pytest.approx(math.log(7.5 / 2.5), abs=1e-8)


def test_weights_are_repetitions() -> None:
    votes = votes_of([0.0, 1.0, 0.3], 60, seed=2)
    counts = np.arange(60) % 3
    assert np.allclose(
        bradley_terry(votes, 0.1, counts.astype(float)),
        bradley_terry(votes.take(np.repeat(np.arange(60), counts)), 0.1),
    )


def test_open_scores_need_a_penalty() -> None:
    votes = Votes(("x", "y", "z"), np.array([0, 1, 2]), np.array([1, 2, 1]), np.array([1.0, 1.0, 1.0]), ("",) * 3)
    with pytest.raises(UserError, match="no chain of wins leads from 'y' to 'x'"):
        bradley_terry(votes, 0.0)
    assert np.argmax(bradley_terry(votes, 0.1)) == 0


def test_elo_is_its_definition() -> None:
    votes = votes_of([0.0, 1.0, 0.3, -1.2], 200, seed=3)
    ratings = dict.fromkeys(range(4), 1000.0)
    for a, b, won in zip(votes.first.tolist(), votes.second.tolist(), votes.outcome.tolist(), strict=True):
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        ratings[a], ratings[b] = ratings[a] + 16 * (won - expected), ratings[b] - 16 * (won - expected)
    assert np.allclose(elo(votes, 16), list(ratings.values()))


@pytest.mark.slow
def test_intervals_cover_the_scores() -> None:
    """95% intervals of differences hold the true difference in most of 40 data sets of 4 items."""
    truth, covered, count = np.array([0.6, 0.1, -0.2, -0.5]), 0, 0
    for seed in range(40):
        found = rate(votes_of(truth.tolist(), 300, seed, ties=0.0), draws=100)
        for row in found["items"]:
            at = NAMES.index(row["name"])
            low, high = row["bradley_terry_interval"]
            assert low <= row["bradley_terry"] <= high
            covered += low <= 1000 + 400 / math.log(10) * truth[at] <= high
            count += 1
    assert 0.88 < covered / count < 0.99


def test_rate_counts_votes_wins_and_agreement() -> None:
    first, second, outcome = np.array([0, 0, 1, 0]), np.array([1, 1, 0, 1]), np.array([1.0, 0.0, 0.0, 0.5])
    votes = Votes(("x", "y"), first, second, outcome, ("ann", "bob", "bob", "cat"))
    found = rate(votes, draws=20)
    assert [(row["name"], row["votes"], row["win_rate"]) for row in found["items"]] == [
        ("x", 4, 0.625),
        ("y", 4, 0.375),
    ]
    # x is ahead: ann and one of bob's two votes say so, and cat's tie says nothing.
    assert [row["agreement"] for row in found["annotators"][:2]] == [1.0, 0.5]
    # ann and bob agree once in two; cat's tie differs from all three others.
    assert agreement(votes) == pytest.approx(1 / 5)
    with pytest.raises(UserError, match="annotators cannot be resampled"):
        rate(Votes(("x", "y"), first, second, outcome, ("",) * 4), by_annotator=True)


@pytest.mark.slow
def test_annotators_are_resampled_with_all_their_votes() -> None:
    """Annotators who contradict each other leave a wide interval, though each has many votes."""
    first, second = np.zeros(400, int), np.ones(400, int)
    outcome = np.repeat((1.0, 0.0, 1.0, 0.0), 100)
    votes = Votes(("x", "y"), first, second, outcome, tuple(np.repeat(list("pqrs"), 100)))
    widths = {}
    for by_annotator in (False, True):
        low, high = rate(votes, draws=200, by_annotator=by_annotator)["items"][0]["bradley_terry_interval"]
        widths[by_annotator] = high - low
    assert widths[True] > 5 * widths[False]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_votes_are_read_in_their_formats(tmp_path: Path) -> None:
    path = write(
        tmp_path / "votes.jsonl",
        {"a": "x", "b": "y", "winner": "a", "annotator": "ann"},
        {"model_a": "y", "model_b": "x", "winner": "model_b", "judge": "bob"},
        {"a": "x", "b": "y", "winner": "tie (bothbad)"},
        {"a": "x", "b": "y", "winner": "y"},
    )
    votes = read_votes([path])
    assert votes.names == ("x", "y")
    assert votes.outcome.tolist() == [1, 0, 0.5, 0]
    assert votes.first.tolist() == [0, 1, 0, 0]
    assert votes.annotators == ("ann", "bob", "", "")


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"a": "x", "b": "y"}, r"votes\.jsonl:1: a vote needs `a`, `b` and `winner`"),
        ({"a": "x", "b": "x", "winner": "a"}, r"votes\.jsonl:1: `a` and `b` are both 'x'"),
        ({"a": "x", "b": "y", "winner": "z"}, r"votes\.jsonl:1: `winner` is 'z': write a, b, tie"),
    ],
)
def test_a_record_that_is_no_vote_is_an_error(tmp_path: Path, row: dict, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        read_votes([write(tmp_path / "votes.jsonl", row)])


def test_the_command_prints_scores(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "winner": "a" if i % 4 else "b", "annotator": "pq"[i % 2]} for i in range(40)]
    path = write(tmp_path / "votes.jsonl", *rows)
    shown = CliRunner().invoke(app, ["ratings", path, "--draws", "50"])
    assert shown.exit_code == 0, shown.output
    assert "two annotators agree on 50% of the pairs" in shown.output
    found = json.loads(CliRunner().invoke(app, ["ratings", path, "--draws", "50", "--json", "--penalty", "0"]).output)
    gap = found["items"][0]["bradley_terry"] - found["items"][1]["bradley_terry"]
    assert gap == pytest.approx(400 * math.log10(3), abs=1e-6)


def test_votes_on_answers_become_rankings(tmp_path: Path) -> None:
    """Preferences of several people, and a ranking of the same prompt, make one ranking that a reward model trains on."""
    path = write(
        tmp_path / "preferences.jsonl",
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Yes"},
        {"prompt": "Hi", "chosen": "No", "rejected": "Yes"},
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "answers": ["Hello", "Yes", "No"]},
        {"prompt": "Bye", "chosen": "See you", "rejected": "What"},
    )
    out = tmp_path / "rankings.jsonl"
    assert write_rankings([path], out) == 2
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    order = [
        answer[0]["content"] for _, answer in sorted(zip(first["scores"], first["answers"], strict=True), reverse=True)
    ]
    assert order == ["Hello", "Yes", "No"]
    assert second["scores"][0] == -second["scores"][1] > 0
    source = Records(RankingsConfig(max_length=64), [str(out)], tokenizer())
    assert [source[0]["rank"].tolist(), source[1]["rank"].tolist()] == [[0, 2, 1], [0, 1]]
