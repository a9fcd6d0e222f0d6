"""Recipes of alignment, run in the test process: precomputed numbers, failing reward functions, prompts that do not fit.

The policy has dropout 0.1 in every test, and LoRA dropout 0.1 in some; no step changes it by more than rounding.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from firth import objectives
from firth.align.rewards import FunctionReward, Rollout, named_function, sample_preference
from firth.align.rollouts import RolloutSource
from firth.model import presets
from firth.model.config import ModelConfig, decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.reward_model import Ranking
from firth.pretrained.load_save import load_model, save_model
from firth.runs.compatibility import check_batching
from firth.runs.inference import evaluate_run
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train as train_tokenizer
from firth.training import trainer
from firth.training.run_lock import Interrupted
from firth.types import PRECOMPUTED_FIELDS, UserError

WORDS = ["the", "otter", "paints", "a", "boat", "while", "every", "heron", "counts", "red", "stones", "near", "their"]
MODELS: dict[str, Callable[[int], ModelConfig]] = {
    "gpt": lambda vocab: presets.gpt(vocab, 32, 2, 2, max_positions=64),
    "gpt2": lambda vocab: presets.gpt2(vocab, 32, 2, 2, max_positions=64),
    "bert": lambda vocab: presets.bert(vocab, 32, 2, 2, max_positions=64),
    "padded": lambda vocab: presets.gpt2(vocab + 64, 32, 2, 2, max_positions=64),  # rows without a token
    "llama": lambda vocab: replace(
        decoder_config(vocab_size=vocab, hidden_size=32, num_layers=2, num_heads=2, max_positions=64), dropout=0.1
    ),
}
ROLLOUTS = (
    "examples.rollout_size=16",
    "examples.num_epochs=1",
    "batch.size=16",
    "examples.max_new_tokens=6",
    "examples.reward_function=builtins:len",
)
SETTINGS: dict[str, tuple[str, ...]] = {
    "dpo": ("batch.size=16", "evaluation.max_examples=8"),
    "kto": ("batch.size=16", "evaluation.max_examples=8"),
    "ppo": ROLLOUTS,
    "reinforce": (*ROLLOUTS, "examples.num_generations=4"),
    "rloo": (*ROLLOUTS, "examples.num_generations=4"),
    "grpo": (*ROLLOUTS, "examples.num_generations=4"),
}
Rows = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write untrained models with dropout 0.1 to start from, and records."""
    out = tmp_path_factory.mktemp("precomputed")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(96)]
    tokenizer = train_tokenizer(iter(texts), "byte-bpe", 420)
    for name, arch in MODELS.items():
        torch.manual_seed(0)
        config = arch(tokenizer.vocab.size)
        model = LM(config, {"lm": LMHead(config)})
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1)
        save_model(model, tokenizer, out / name)
    pairs = [{"prompt": texts[i], "chosen": texts[i + 1], "rejected": texts[i + 2]} for i in range(24)]
    (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    labeled = [{"prompt": texts[i], "completion": texts[i + 1], "label": i % 3 > 0} for i in range(24)]
    (out / "labeled.jsonl").write_text("\n".join(map(json.dumps, labeled)))
    (out / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts[:16]))
    return out


def assignments(workdir: Path, name: str, *more: str, arch: str = "gpt2") -> list[str]:
    records = workdir / {"dpo": "pairs.jsonl", "kto": "labeled.jsonl"}.get(name, "prompts.jsonl")
    plain = (f"init_from={workdir / arch}", f"data.path={records}", "max_steps=1", "optimizer.lr=1e-9")
    return [*plain, *SETTINGS[name], *more]


def first_rows(workdir: Path, out: Path, name: str, *more: str, arch: str = "gpt2") -> Rows:
    """Return the first metrics row of each split, of a run of one step."""
    run(load(name, assignments(workdir, name, *more, arch=arch)), out, lambda line: None)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["split"]: row for row in reversed(rows)}


@pytest.fixture
def old_logprobs(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the mean log-probability of the sampled tokens under the sampling policy, per rollout batch."""
    means: list[float] = []
    store = RolloutSource._store

    def recorded(self: RolloutSource, real: np.ndarray, numbers: dict[str, np.ndarray]) -> None:
        means.append(float(numbers["old"][real].mean()))
        store(self, real, numbers)

    monkeypatch.setattr(RolloutSource, "_store", recorded)
    return means


def deviations(name: str, rows: Rows, old_logprobs: list[float], tolerance: float) -> dict[str, float]:
    """Return the deviations from the values of unchanged weights: first loss ln 2 (KTO: 1/2), first ratio 1, KL 0."""
    train = rows["train"]
    if name == "dpo":  # the sums of an answer's log-ratios, of about eight tokens
        found = {"loss": train["loss"] - log(2), "chosen": train["chosen"] / 8, "rejected": train["rejected"] / 8}
    elif name == "kto":
        answers = {measure: train[measure] / 8 for measure in ("chosen", "rejected", "kl_per_answer")}
        found = answers | {"loss": train["loss"] - 0.5}
    elif name in ("ppo", "grpo", "rloo"):
        found = {measure: train[measure] for measure in ("clipped", "approx_kl", "kl_per_token")}
    else:
        found = {"log-probability": train["surprise"] + old_logprobs[0]}
    if "rollouts" in rows:
        found["kl_per_answer"] = rows["rollouts"]["kl_per_answer"]
    return {measure: value for measure, value in found.items() if not abs(value) <= tolerance}


CASES = [
    (name, precision, layout)
    for name in SETTINGS
    for precision in ("fp32", "bf16")
    for layout in ("padded", "packed")
    if name not in ("dpo", "kto") or layout != "packed"  # groups of rows cannot be packed
]
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Rounding errors of a log-probability between two forward passes with different batches."""


@pytest.mark.parametrize(("name", "precision", "layout"), CASES, ids=lambda x: x)
def test_first_ratio_is_one(
    workdir: Path, tmp_path: Path, old_logprobs: list[float], name: str, precision: str, layout: str
) -> None:
    """First loss ln 2, first ratio 1 and no KL, in both precisions, padded with LoRA and packed without."""
    more = ("batch.pack_to_length=48",) if layout == "packed" else ("peft.kind=lora", "peft.dropout=0.1")
    rows = first_rows(workdir, tmp_path, name, f"precision={precision}", *more)
    assert deviations(name, rows, old_logprobs, TOLERANCE[precision]) == {}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("dpo", "gpt"),
        ("dpo", "bert"),
        ("dpo", "padded"),
        ("kto", "padded"),
        ("ppo", "llama"),
        ("ppo", "bert"),
    ],
)
def test_first_ratio_is_one_on_other_architectures(
    workdir: Path, tmp_path: Path, old_logprobs: list[float], name: str, arch: str
) -> None:
    assert deviations(name, first_rows(workdir, tmp_path, name, arch=arch), old_logprobs, TOLERANCE["bf16"]) == {}


@pytest.mark.parametrize("name", SETTINGS)
def test_dropout_would_be_noticed(
    workdir: Path, tmp_path: Path, old_logprobs: list[float], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The control of the tests above: with dropout, the first numbers differ by more than rounding."""
    monkeypatch.setattr(trainer, "PRECOMPUTED_FIELDS", frozenset())
    rows = first_rows(workdir, tmp_path, name, "precision=fp32")
    assert deviations(name, rows, old_logprobs, TOLERANCE["fp32"]) != {}


def test_every_objective_with_precomputed_fields_is_tested() -> None:
    found = {name for name in objectives.OBJECTIVES if objectives.find(name)().inputs & PRECOMPUTED_FIELDS}
    assert found == set(SETTINGS)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_methods_without_a_reference_compute_none(workdir: Path, tmp_path: Path, name: str) -> None:
    settings = [f"init_from={workdir / 'gpt2'}", f"data.path={workdir / 'pairs.jsonl'}", "max_steps=1", "batch.size=16"]
    run(load(name, settings), tmp_path, log=lambda line: None)
    assert not (tmp_path / "reference").exists()
    [row] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert row["chosen_logprob"] < 0
    assert "chosen" not in row


def test_reference_is_kept_per_precision(workdir: Path, tmp_path: Path) -> None:
    """One directory, two precisions: their numbers are not mixed."""
    for precision in ("fp32", "bf16"):
        out = tmp_path / "run"
        first_rows(workdir, out, "dpo", f"precision={precision}")
        kept = list((out / "reference" / "train").iterdir())
        for name in ("done.json", "metrics.jsonl", "model", "checkpoints", "recipe.yaml"):
            (out / name).rename(tmp_path / f"{precision}-{name}")
    assert len(kept) == 2


# ---- invalid recipes


@pytest.mark.parametrize(
    ("name", "setting", "advice"),
    [
        ("ppo", "examples.advantages=rloo", "examples.advantages=gae"),
        ("ppo", "examples.advantages=grpo", "examples.advantages=gae"),
        ("reinforce", "examples.advantages=gae", "examples.advantages=rloo"),
        ("grpo", "examples.advantages=gae", "examples.advantages=rloo or grpo"),
    ],
)
def test_advantages_must_suit_the_objective(workdir: Path, name: str, setting: str, advice: str) -> None:
    with pytest.raises(UserError, match=f"{setting}.*set {advice}"):
        load(name, assignments(workdir, name, setting))


def test_prompts_cannot_be_mixed_by_weight(workdir: Path, tmp_path: Path) -> None:
    paths = f"data.path=[{workdir / 'prompts.jsonl'}, {workdir / 'pairs.jsonl'}]"
    with pytest.raises(UserError, match=r"data\.weights cannot mix prompts.*: remove data\.weights"):
        run(load("grpo", assignments(workdir, "grpo", paths, "data.weights=[1, 2]")), tmp_path, lambda line: None)


# ---- rewards


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module in the working directory, which is not on the path. Its name is new in every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return tmp_path / f"rewards_{tmp_path.name}.py"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_reward_that_is_not_finite_is_reported(workdir: Path, rewards: Path, value: str) -> None:
    rewards.write_text(f"def brief(text):\n    return float('{value}')\n")
    with pytest.raises(UserError) as error:
        first_rows(workdir, rewards.parent / "run", "ppo", f"examples.reward_function={rewards.stem}:brief")
    assert re.match(rf"the reward returned {value} for the prompt 'user\\n.+' and the answer '", str(error.value))
    assert "rate" not in str(error.value)


def test_a_run_resumes_after_a_reward_that_raises(workdir: Path, rewards: Path) -> None:
    """The reward fails in the second rollout batch, after 8 calls for the report and 16 of the first; fixed, the run resumes."""
    rewards.write_text(
        "def brief(text):\n    global calls\n    calls += 1\n    return 1 / max(0, 30 - calls)\n\n\ncalls = 0\n"
    )
    recipe = load(
        "reinforce",
        assignments(
            workdir, "reinforce", f"examples.reward_function={rewards.stem}:brief", "max_steps=3", "optimizer.lr=1e-3"
        ),
    )
    with pytest.raises(
        UserError, match=r"the reward raised ZeroDivisionError .* for the prompt '.+' and the answer '"
    ) as error:
        run(recipe, rewards.parent / "run", lambda line: None)
    assert f"{rewards.name}:4" in str(error.value)
    assert [path.name for path in (rewards.parent / "run" / "checkpoints").iterdir()] == ["step-000001"]
    importlib.import_module(rewards.stem).brief = len
    rewards.write_text("brief = len\n")
    continued = run(recipe, rewards.parent / "run", lambda line: None)
    assert continued.steps == 3
    rows = [json.loads(line) for line in (rewards.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "rollouts"] == [1, 2, 3]


@pytest.mark.parametrize("field", ["reward_function", "true_reward_function"])
def test_a_changed_reward_function_is_rejected(workdir: Path, rewards: Path, field: str) -> None:
    """Unless it raised and was corrected, the reward function must be the same when a run resumes."""
    rewards.write_text("def brief(text):\n    return -len(text)\n")
    name = f"examples.{field}={rewards.stem}:brief"
    recipe, out = load("reinforce", assignments(workdir, "reinforce", name, "max_steps=2")), rewards.parent / "run"
    run(recipe, out, lambda line: None)
    run(recipe, out, lambda line: None)
    text = rewards.read_text()
    rewards.write_text(text.replace("-", "+"))
    for _ in ("finished", "killed"):
        with pytest.raises(UserError, match=rf"began with another content of examples\.{field}: put back what"):
            run(recipe, out, lambda line: None)
        (out / "done.json").unlink(missing_ok=True)
    rewards.unlink()
    with pytest.raises(UserError, match=rf"began with a examples\.{field} that is not there any more"):
        run(recipe, out, lambda line: None)
    rewards.write_text(text)
    assert run(recipe, out, lambda line: None).steps == 2


def test_a_reward_that_fails_on_a_preference_is_reported(workdir: Path) -> None:
    tokenizer = Tokenizer.load(workdir / "gpt2")
    sample = Rollout(tokenizer.encode("the heron"), tokenizer.encode("counts"), "counts", True)
    for scorer, fault in ((lambda text: float("nan"), "returned nan"), (lambda text: {}[text], "raised KeyError")):
        with pytest.raises(UserError, match=f"{fault}.* for the prompt 'the heron' and the answer 'counts'"):
            sample_preference(
                [sample], [sample], FunctionReward(scorer), tokenizer=tokenizer, rng=np.random.default_rng(0)
            )


def test_reward_functions_are_found_in_the_working_directory(rewards: Path) -> None:
    rewards.write_text("def brief(text):\n    return 1.0\n\n\nlevel = 3\n")
    assert named_function(f"{rewards.stem}:brief")("x") == 1.0
    with pytest.raises(UserError, match="write module:function, of an installed module or of a file in"):
        named_function("rewards_of_nobody:brief")
    with pytest.raises(UserError, match="is of type int: name a function"):
        named_function(f"{rewards.stem}:level")
    broken = rewards.with_name(f"broken_{rewards.name}")
    broken.write_text("def brief(text) return 1\n")
    with pytest.raises(UserError, match=f"'{broken.stem}:brief' cannot be imported: SyntaxError"):
        named_function(f"{broken.stem}:brief")


def test_equal_rewards_do_not_change_the_weights(workdir: Path, rewards: Path) -> None:
    """Advantages and loss are 0; with beta 0 the weights stay bit for bit."""
    rewards.write_text("def constant(text):\n    return 1.0\n")
    out = rewards.parent / "run"
    more = (f"examples.reward_function={rewards.stem}:constant", "examples.kl_coef=0", "optimizer.lr=1e-2")
    rows = first_rows(workdir, out, "reinforce", *more)
    assert rows["train"]["loss"] == 0
    before, after = load_model(workdir / "gpt2").state_dict(), load_model(out / "model").state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# ---- prompts


def test_prompts_leave_room_for_the_answer(workdir: Path, tmp_path: Path) -> None:
    """Of the 64 positions max_new_tokens=40 leaves 24: longer prompts are left out and counted; without any left, it is an error."""
    records = tmp_path / "prompts.jsonl"
    texts = [" ".join(WORDS[:2])] * 4 + [" ".join(WORDS * 2)] * 3
    records.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    lines: list[str] = []
    more = (f"data.path={records}", "examples.max_new_tokens=40")
    run(load("ppo", assignments(workdir, "ppo", *more)), tmp_path / "run", lines.append)
    assert any(
        line == "3 of 7 prompts are left out: longer than 24 tokens (64 positions less examples.max_new_tokens=40)"
        for line in lines
    )
    with pytest.raises(UserError, match="no prompt of at most 2 tokens"):
        first_rows(workdir, tmp_path / "none", "ppo", f"data.path={records}", "examples.max_new_tokens=62")
    with pytest.raises(UserError, match=r"examples\.max_new_tokens=64 leaves no room for a prompt in the 64 positions"):
        first_rows(workdir, tmp_path / "room", "ppo", f"data.path={records}", "examples.max_new_tokens=64")


# ---- held-out prompts, pretraining text, and records with results


def test_held_out_prompts_are_measured_during_training(workdir: Path, rewards: Path) -> None:
    """Records have results, which the reward reads; a prompt of the held-out file is never trained on."""
    rewards.write_text(
        "def right(completion, prompt, result):\n    assert prompt\n    return float(result in completion)\n"
    )
    for name, words in (("train", WORDS[:8]), ("held", WORDS[8:])):
        rows = [{"prompt": f"{word} {i}", "result": word} for word in words for i in range(3)]
        (rewards.parent / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = (
        f"examples.reward_function=[{rewards.stem}:right, builtins:len]", "examples.reward_weights=[1.0, 0.1]",
        f"data.path={rewards.parent / 'train.jsonl'}", f"data.validation_path={rewards.parent / 'held.jsonl'}",
        "evaluation.every=2", "max_steps=4", "evaluation.best_metric=reward",
    )  # fmt: skip
    out = rewards.parent / "run"
    done = run(load("grpo", assignments(workdir, "grpo", *more)), out, lambda line: None)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if row["split"] == "valid"]
    assert [row["step"] for row in held] == [2, 4]
    for row in held:
        assert row["reward"] == pytest.approx(row["reward/right"] + 0.1 * row["reward/len"])
        assert {"kl_per_answer", "finished", "length"} <= row.keys()
    assert "valid/reward" in done.metrics
    rewards.with_name("train.jsonl").write_text(json.dumps({"prompt": "the"}))
    with pytest.raises(
        UserError,
        match=r"train\.jsonl:1: the record has no field 'result', which examples\.reward_function=.*:right names",
    ):
        run(load("grpo", assignments(workdir, "grpo", *more)), rewards.parent / "lacking", lambda line: None)


def test_held_out_answers_get_the_unfinished_score(workdir: Path, rewards: Path) -> None:
    """The reward is 0, so the mean of both splits is the score of unfinished answers times their share."""
    rewards.write_text("def zero(completion):\n    return 0.0\n")
    more = (
        f"examples.reward_function={rewards.stem}:zero", "examples.unfinished_score=-5.0", "evaluation.every=1",
        f"data.validation_path={workdir / 'pairs.jsonl'}",
    )  # fmt: skip
    rows = first_rows(workdir, rewards.parent / "run", "grpo", *more)
    for split in ("rollouts", "valid"):
        assert rows[split]["finished"] < 1
        assert rows[split]["reward"] == pytest.approx(-5 * (1 - rows[split]["finished"]))


def test_ppo_ptx_trains_on_text_in_the_same_steps(workdir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(120)))
    more = ("objective.ptx_coef=0.5", "examples.pretraining_rows=8", f"examples.pretraining_path={text}",
            "examples.pretraining_length=24", "batch.size=24", "max_steps=3", "precision=fp32")  # fmt: skip
    recipe = load("ppo", assignments(workdir, "ppo", *more))
    run(recipe, tmp_path / "run", lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in rows if row["split"] == "rollouts"] == [1, 2, 3]
    assert all(row["loss/ptx"] > 0.5 for row in train)
    assert train[0]["approx_kl"] == pytest.approx(0, abs=1e-5), "rows of text do not change the answers"
    with pytest.raises(UserError, match=r"set objective\.ptx_coef and examples\.pretraining_rows together"):
        load("ppo", assignments(workdir, "ppo", "objective.ptx_coef=0.5"))
    with pytest.raises(UserError, match=r"leaves no row of batch\.size=8 for an answer"):
        run(load("ppo", assignments(workdir, "ppo", *more, "batch.size=8")), tmp_path / "full", lambda line: None)


@pytest.mark.parametrize("stop", [3, 5])
def test_ppo_ptx_resumes_to_the_bit(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Stopped within a rollout phase of four steps: the answers, the rows of text and the moments of both losses go on."""
    rng = np.random.default_rng(3)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(120)))
    recipe = load("ppo", assignments(
        workdir, "ppo", "objective.ptx_coef=0.5", "examples.pretraining_rows=8", f"examples.pretraining_path={text}",
        "examples.pretraining_length=24", "batch.size=16", "examples.num_epochs=2", "max_steps=6", "precision=fp32", "optimizer.lr=1e-3",
    ))  # fmt: skip

    class StopAt:
        """Ctrl-C during a step."""

        steps = 0

        def __enter__(self) -> "StopAt":
            return self

        def __exit__(self, *_: object) -> None: ...

        @property
        def requested(self) -> bool:
            self.steps += 1
            return self.steps >= stop

    whole = run(recipe, tmp_path / "whole", lambda line: None)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "interrupt_handler", lambda _: StopAt())
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "part", lambda line: None)
    [checkpoint] = (tmp_path / "part" / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{stop:06}"
    resumed = run(recipe, tmp_path / "part", lambda line: None)
    assert (whole.steps, whole.metrics) == (resumed.steps, resumed.metrics) and whole.steps == 6
    first, second = (load_model(tmp_path / name / "model").state_dict() for name in ("whole", "part"))
    start = load_model(workdir / "gpt2").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], start[name]) for name in first)
    splits = [
        [(row["split"], row["step"], row.get("loss/ptx"), row.get("reward"))
         for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()) if row["split"] != "valid"]
        for name in ("whole", "part")
    ]  # fmt: skip
    assert splits[0] == splits[1] and [step for split, step, *_ in splits[0] if split == "rollouts"] == [1, 5]


def test_the_page_of_a_reward_model_shows_its_calibration(workdir: Path, tmp_path: Path) -> None:
    """The bins are those of all held-out pairs; their error is what `firth evaluate` computes from the exported model."""
    pairs, out, tokenizer = workdir / "pairs.jsonl", tmp_path / "run", Tokenizer.load(workdir / "gpt2")
    size = tokenizer.vocab.size
    config = decoder_config(vocab_size=size, hidden_size=32, num_layers=1, num_heads=2, max_positions=64)
    model = LM(config, {"lm": LMHead(config)})
    for weight in model.parameters():  # projections start at zero, with which no token changes the last state
        nn.init.normal_(weight, std=0.2)
    save_model(model, tokenizer, tmp_path / "start")
    recipe = load("reward_model", [
        f"init_from={tmp_path / 'start'}", f"data.path={pairs}", f"data.validation_path={pairs}", "max_steps=80", "batch.size=8",
        "optimizer.lr=3e-2", "precision=fp32",
    ])  # fmt: skip
    run(recipe, out, lambda line: None)
    bins = json.loads((out / "held_out.json").read_text())["calibration"]
    found = json.loads(evaluate_run(out, [str(pairs)], task=None, limit=None, as_json=True))
    assert sum(count for *_, count in bins) == 24 and len(bins) > 1
    assert sum(share * count for _, share, count in bins) / 24 == pytest.approx(found["accuracy"])
    error = sum(abs(mean - share) * count for mean, share, count in bins) / 24
    assert error == pytest.approx(found["calibration_error"], abs=1e-5) and error > 0.01
    page = (out / "report.html").read_text()
    assert f"{error:.3f} (expected calibration error)" in page and "Over 24 held-out pairs" in page


def test_kto_needs_whole_batches(workdir: Path, tmp_path: Path) -> None:
    """All answers of a step share one estimate of the KL, so micro-batches and ranks are refused before training."""
    recipe = load("kto", assignments(workdir, "kto", "batch.gradient_accumulation_steps=2"))
    with pytest.raises(
        UserError,
        match=r"compares all examples of a step .* set batch\.gradient_accumulation_steps=1 and train on one rank",
    ):
        run(recipe, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(UserError, match="2 ranks of 1 micro-batches"):
        check_batching(recipe.objective, load_model(workdir / "gpt2").config, pack=0, accumulate=1, ranks=2)


# ---- rankings


def test_rankings_train_a_reward_model_in_one_command(workdir: Path, tmp_path: Path) -> None:
    """Records have two to four answers; the group has the size of the longest, and PPO uses the reward model."""
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(60)]
    rows = [{"prompt": texts[i], "answers": texts[i + 1 : i + 3 + i % 3]} for i in range(40)]
    (tmp_path / "rankings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = [f"init_from={workdir / 'gpt2'}", f"data.path={tmp_path / 'rankings.jsonl'}", "max_steps=3", "batch.size=8"]
    out = tmp_path / "ranking"
    done = run(load("ranking", plain), out, lambda line: None)
    assert load(str(out)).objective == Ranking(num_answers=4)
    assert "reward" in load_model(out / "model").heads and np.isfinite(done.metrics["valid/accuracy"])
    short = load("ranking", [*plain, "objective.num_answers=3"])
    with pytest.raises(UserError, match="a ranking of 4 answers does not fit into a group of 2 to 3"):
        run(short, tmp_path / "short", lambda line: None)
    more = (f"examples.reward_model={out}", "examples.reward_function=[]")
    assert np.isfinite(first_rows(workdir, tmp_path / "ppo", "ppo", *more)["rollouts"]["reward"])
