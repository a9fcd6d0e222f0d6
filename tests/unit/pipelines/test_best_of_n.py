"""Best-of-n: expected rewards against all subsets, ranking, errors that name the record."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.data import attention_fields
from firth.data.dialogues import ranking
from firth.model.config import decoder_config
from firth.model.model import LM
from firth.objectives.reward_model import reward_head
from firth.pipelines.best_of_n import RankAnswers, best_of, kl_bound
from firth.pretrained.load_save import save_model
from firth.tokenizer import chat
from firth.tokenizer.train import train as train_tokenizer
from firth.types import UserError

REWARDS = """
def length(completion): return float(len(completion))
def hits(completion, gold): return float(completion == gold)
def not_a_number(completion): return float("nan") if completion == "bb" else 0.0
"""


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ranking_rewards.py").write_text(REWARDS)
    rows = [
        {"prompt": "p", "gold": "a", "samples": ["a", "ccc", "bb"]},
        {"prompt": "q", "gold": "xx", "samples": ["xx", "yy", "zz"]},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(2, 4, 5))
    subsets = [list(subset) for subset in itertools.combinations(range(5), n)]
    for row, got, other in zip(range(4), best_of(scores, n), best_of(scores, n, values), strict=True):
        assert got == pytest.approx(np.mean([scores[row, subset].max() for subset in subsets]))
        assert other == pytest.approx(np.mean([values[row, s][scores[row, s].argmax()] for s in subsets]))


def test_the_bound_is_the_divergence_of_the_best_of_n() -> None:
    """The density of the best of n of a uniform reward is n u^(n-1)."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(float(np.mean(density * np.log(density))), abs=1e-4)
    assert kl_bound(1) == 0


def test_answers_are_ranked(workdir: Path) -> None:
    summary = RankAnswers(
        data=("answers.jsonl",), reward_function="ranking_rewards:length", true_reward_function="ranking_rewards:hits"
    ).run(workdir)
    [row] = [json.loads(line) for line in (workdir / "ranked.jsonl").read_text().splitlines()]  # q's answers tie
    assert row == {
        "prompt": "p", "answers": ["ccc", "bb", "a"], "scores": [3.0, 2.0, 1.0], "chosen": "ccc", "rejected": "a"
    }  # fmt: skip
    assert summary["prompts"] == 2 and summary["ranked"] == 1 and summary["reward of the best of 1"] == 2.0
    assert summary["reward of the best of 3"] == 2.5 and summary["KL of the best of 3, at most"] == math.log(3) - 2 / 3
    assert summary["truth of the best of 1"] == pytest.approx(1 / 3) and summary["truth of the best of 3"] == 0.0


def test_equal_rewards_are_ties_of_a_ranking(workdir: Path) -> None:
    rows = [{"prompt": "p", "gold": "b", "samples": ["a", "b", "c", "b"]}]
    (workdir / "ties.jsonl").write_text(json.dumps(rows[0]) + "\n")
    RankAnswers(data=("ties.jsonl",), reward_function="ranking_rewards:hits").run(workdir)
    [row] = [json.loads(line) for line in (workdir / "ranked.jsonl").read_text().splitlines()]
    assert ranking(row)[2] == [0, 0, 1, 1]


def test_a_reward_that_is_not_finite_names_the_record(workdir: Path) -> None:
    with pytest.raises(UserError, match=r"answers\.jsonl:1: the reward returned nan for the answer 'bb'"):
        RankAnswers(data=("answers.jsonl",), reward_function="ranking_rewards:not_a_number").run(workdir)


def test_a_missing_field_names_the_record(workdir: Path) -> None:
    rows = [{"prompt": "p", "gold": "a", "samples": ["a"]}, {"prompt": "q", "samples": ["b"]}]
    (workdir / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"few\.jsonl:2: the reward needs the field 'gold'"):
        RankAnswers(data=("few.jsonl",), reward_function="ranking_rewards:hits").run(workdir)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, r"bad\.jsonl:2: there is no list of answers"),
        ({"prompt": "p", "samples": ["a"]}, r"bad\.jsonl:2: 1 answers, and the first record has 2"),
    ],
)
def test_wrong_records(workdir: Path, row: dict[str, object], message: str) -> None:
    rows = [{"prompt": "p", "samples": ["a", "b"]}, row]
    (workdir / "bad.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(UserError, match=message):
        RankAnswers(data=("bad.jsonl",), reward_function="ranking_rewards:length").run(workdir)


def test_settings_need_one_reward() -> None:
    for settings in ({}, {"reward_function": "a:b", "reward_model": "runs/rm"}):
        with pytest.raises(UserError, match="set reward_function or reward_model, one of them"):
            RankAnswers(data=("x",), **settings).check()


def test_a_reward_model_ranks_as_it_scores_rows(workdir: Path) -> None:
    tokenizer = train_tokenizer(iter(["a bb ccc xx yy zz p q"] * 4), "byte-bpe", 300)
    torch.manual_seed(0)
    config = decoder_config(
        vocab_size=tokenizer.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=64
    )
    model = LM(config, {"reward": reward_head(16)})
    for weight in model.parameters():  # projections start at zero, with which all answers score alike
        torch.nn.init.normal_(weight, std=0.3)
    save_model(model, tokenizer, workdir / "rm")
    summary = RankAnswers(data=("answers.jsonl",), reward_model="rm").run(workdir)
    rows = [json.loads(line) for line in (workdir / "ranked.jsonl").read_text().splitlines()]
    model.eval()
    for row in rows:
        for text, score in zip(row["answers"], row["scores"], strict=True):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            tokens, mask = chat.encode(tokenizer, turns)
            tokens = tokens[: np.flatnonzero(mask)[-1] + 1]
            batch = {"tokens": torch.from_numpy(tokens.astype(np.int64))[None]}
            batch |= {
                name: torch.from_numpy(value)[None] for name, value in attention_fields.causal(len(tokens)).items()
            }
            with torch.no_grad():
                expected = model.heads["reward"](model(batch)[0, -1])
            assert score == pytest.approx(float(expected), abs=1e-5)
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert len(rows) == 2 and summary["ranked"] == 2
    config = decoder_config(vocab_size=tokenizer.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=8)
    save_model(LM(config, {"reward": reward_head(16)}), tokenizer, workdir / "short")
    with pytest.raises(
        UserError, match=r"answers\.jsonl:1: prompt and answer have \d+ tokens, and the reward model reads 8"
    ):
        RankAnswers(data=("answers.jsonl",), reward_model="short").run(workdir)
