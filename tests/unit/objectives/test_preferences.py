"""Preference optimization: what DPO is derived from, the losses by their formulas, and the mismatched answers of KTO."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from firth.align.precompute import MismatchedAnswers, UnpairedPreferencesConfig
from firth.data.collate import collate, label_fields_of
from firth.data.dialogues import PreferencesConfig
from firth.data.examples import BuildContext, DataConfig
from firth.data.records import Records
from firth.model.config import ModelConfig
from firth.model.config_groups import LMHeadConfig
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.preferences import DPO, KTO, ORPO, PairObjective, SimPO, answer_logprobs, build_comparison
from firth.objectives.reward_model import RewardModeling
from firth.training.step import step
from firth.types import Batch, Example, UserError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.tiny_corpus import tokenizer

V = ByteTokenizer.vocab.size
CONFIG = ModelConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
VOCAB = ByteTokenizer.vocab


def model_for(objective: Objective, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(CONFIG, objective.heads(CONFIG))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def comparisons(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        prompt = int(rng.integers(2, 6))
        example: Example = {"reference": rng.normal(-40, 5, 2)}
        for side in ("chosen", "rejected"):
            n = prompt + int(rng.integers(1, 9))
            example |= {f"{side}_tokens": rng.integers(7, V, n), f"{side}_mask": np.arange(n) >= prompt}
        examples.append(example)
    return examples


def batch_of(objective: Objective, examples: list[Example]) -> Batch:
    built = [objective.build_example(e, VOCAB, np.random.default_rng(0)) for e in examples]
    return collate(built, label_fields_of(objective))


def gradient(model: LM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_dpo_gradient_is_that_of_the_reward_model() -> None:
    """A reward model whose reward is beta log p/p_ref has DPO's loss and gradient (Rafailov 2023, equation 7)."""
    objective, examples = DPO(beta=0.3), comparisons(5)
    model = model_for(objective)
    terms = step(model, objective, [batch_of(objective, examples)])
    expected = gradient(model)

    # The reward model is given the implied rewards as the only channel of its last hidden states.
    judge = LM(CONFIG, {"reward": nn.Linear(1, 1, bias=False)})
    nn.init.ones_(judge.heads["reward"].weight)
    model.zero_grad()
    total = 0.0
    for example in examples:  # one pair at a time, without padding
        rows = {name: torch.as_tensor(x)[None] for name, x in build_comparison(example).items()}
        implied = objective.beta * (answer_logprobs(model, rows) - torch.tensor(example["reference"]))[0]
        seen = batch_of(RewardModeling(), [example])
        hidden = implied.float()[None, :, None, None].expand(1, 2, seen["tokens"].shape[-1], 1)
        loss = RewardModeling().loss(judge, {"hidden": hidden}, seen)["reward"] / len(examples)
        loss.backward()
        total += float(loss.detach())
    assert float(terms["dpo"]) == pytest.approx(total, abs=1e-5)
    assert torch.allclose(gradient(model), expected, atol=1e-5)
    assert float(expected.norm()) > 0.1


def test_the_partition_term_cancels() -> None:
    """beta log Z(x) is added to the rewards of both answers to a prompt: DPO's loss and gradient do not change."""
    objective, examples = DPO(beta=0.3), comparisons(5)
    model = model_for(objective)
    terms = step(model, objective, [batch_of(objective, examples)])
    expected = gradient(model)
    shifted = [
        e | {"reference": e["reference"] - z} for e, z in zip(examples, (3.0, -7.0, 0.5, 20.0, 1.0), strict=True)
    ]
    model.zero_grad()
    other = step(model, objective, [batch_of(objective, shifted)])
    assert float(other["dpo"]) == pytest.approx(float(terms["dpo"]), abs=1e-5)
    assert torch.allclose(gradient(model), expected, atol=1e-5)
    assert abs(float(other["chosen"]) - float(terms["chosen"])) > 1, "the log-ratios themselves are shifted"


def test_label_smoothing_is_the_loss_of_flipped_labels() -> None:
    examples = comparisons(5)
    flipped = [
        {"reference": e["reference"][::-1]}
        | {f"{a}_{name}": e[f"{b}_{name}"] for a, b in (("chosen", "rejected"), ("rejected", "chosen")) for name in ("tokens", "mask")}
        for e in examples
    ]  # fmt: skip
    model = model_for(DPO())
    plain, other = (float(step(model, DPO(), [batch_of(DPO(), e)])["dpo"]) for e in (examples, flipped))
    smoothed = DPO(label_smoothing=0.2)
    found = float(step(model, smoothed, [batch_of(smoothed, examples)])["dpo"])
    assert found == pytest.approx(0.8 * plain + 0.2 * other, abs=1e-5)
    with pytest.raises(UserError, match=r"label_smoothing=0\.2 needs objective\.loss_type=sigmoid"):
        DPO(loss_type="ipo", label_smoothing=0.2)


@pytest.mark.parametrize("objective", [SimPO(), ORPO()], ids=lambda o: type(o).__name__)
def test_objectives_without_reference_read_none(objective: PairObjective) -> None:
    assert "reference" not in objective.inputs
    examples = [{k: v for k, v in e.items() if k != "reference"} for e in comparisons(4)]
    model = model_for(objective)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    log = []
    for _ in range(30):
        optimizer.zero_grad()
        log.append(step(model, objective, [batch_of(objective, examples)]))
        optimizer.step()
    assert float(log[-1]["margin"]) > float(log[0]["margin"]) + 0.1
    assert float(log[-1]["accuracy"]) == 1


def labeled_answers(count: int) -> list[Example]:
    rng = np.random.default_rng(1)
    examples = []
    for i in range(count):
        prompt = int(rng.integers(2, 6))
        example: Example = {"desirable": np.array([i % 3 > 0])}
        for prefix in ("", "mismatched_"):
            n = prompt + int(rng.integers(1, 9))
            example |= {f"{prefix}tokens": rng.integers(7, V, n), f"{prefix}mask": np.arange(n) >= prompt}
        examples.append(example)
    return examples


def test_the_first_loss_of_kto_is_one_half_of_each_weight() -> None:
    objective = KTO(desirable_weight=1.5, undesirable_weight=0.5)
    examples = labeled_answers(6)
    model = model_for(objective)
    batch = batch_of(objective, [e | {"reference": np.zeros(2)} for e in examples])
    with torch.no_grad():
        batch["reference"] = answer_logprobs(model, batch)
    terms = step(model, objective, [batch])
    assert float(terms["kto"]) == pytest.approx((4 * 1.5 + 2 * 0.5) / 6 / 2, abs=1e-5)
    assert [float(terms[name]) for name in ("chosen", "rejected", "kl_per_answer")] == pytest.approx([0] * 3, abs=1e-4)


def test_mismatched_answers_have_no_gradient() -> None:
    """The gradient of KTO is that of its answers alone, with z as a number."""
    objective, examples = KTO(beta=0.2), labeled_answers(6)
    model = model_for(objective)
    batch = batch_of(objective, [e | {"reference": np.full(2, -60.0)} for e in examples])
    terms = step(model, objective, [batch])
    found, z = gradient(model), float(terms["kl_per_answer"])
    assert z > 1
    model.zero_grad()
    total = torch.zeros(())
    for i, example in enumerate(examples):
        own = {name: field[i : i + 1, 0] for name, field in batch.items() if field.ndim == 3}
        sign = 1 if example["desirable"][0] else -1
        total = total + (1 - torch.sigmoid(0.2 * sign * (answer_logprobs(model, own)[0] + 60 - z))) / len(examples)
    total.backward()
    assert float(terms["kto"]) == pytest.approx(float(total), abs=1e-5)
    assert torch.allclose(gradient(model), found, atol=1e-5)


def records(tmp_path: Path, prompts: list[str]) -> Records:
    rows = [{"prompt": p, "completion": f"answer {i}", "label": i % 2 == 0} for i, p in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Records(UnpairedPreferencesConfig(max_length=64), [str(tmp_path / "rows.jsonl")], tokenizer())


def test_a_mismatched_answer_is_of_another_prompt(tmp_path: Path) -> None:
    """Each answer is used once, after a prompt that it does not answer, even if a prompt has several records in a row."""
    prompts = [f"question {i // 3}" for i in range(24)]
    source = records(tmp_path, prompts)
    assert [bool(source[i]["desirable"][0]) for i in range(4)] == [True, False, True, False]
    paired, decode = MismatchedAnswers(source, 64), tokenizer().decode
    seen = []
    for i in range(24):
        example = paired[i]
        start = int(np.flatnonzero(example["mismatched_mask"])[0])
        assert start == int(np.flatnonzero(example["mask"])[0])
        assert np.array_equal(example["mismatched_tokens"][:start], example["tokens"][:start])
        number = int(decode(example["mismatched_tokens"][example["mismatched_mask"]]).split()[1])
        assert prompts[number] != prompts[i]
        seen.append(number)
    assert sorted(seen) == list(range(24))


def test_a_labeled_answer_is_held_out_with_its_prompt(tmp_path: Path) -> None:
    """A prompt has one key in dialogues, preferences and labeled answers, so it is on one side in every stage."""
    labeled = records(tmp_path, ["one", "two", "one"])
    rows = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in ("one", "two")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = Records(PreferencesConfig(max_length=64), [str(tmp_path / "pairs.jsonl")], tokenizer())
    assert labeled.group_ids.tolist() == [pairs.group_ids[i] for i in (0, 1, 0)]
    assert MismatchedAnswers(labeled, 64).group_ids.tolist() == labeled.group_ids.tolist()


def test_mismatched_answers_are_cut_to_the_length(tmp_path: Path) -> None:
    source = records(tmp_path, ["a rather long question about otters", "b"])
    longest = max(len(source[i]["tokens"]) for i in range(2))
    paired = MismatchedAnswers(source, longest)
    assert max(len(paired[i]["mismatched_tokens"]) for i in range(2)) <= longest
    assert all(paired[i]["mismatched_mask"].any() for i in range(2))


def test_ipo_loss_is_least_at_its_margin() -> None:
    """The loss is 0 where the difference of the log-ratios per token is 1 / (2 beta)."""
    objective = DPO(beta=0.25, loss_type="ipo")
    [example] = comparisons(1)
    model = model_for(objective)
    with torch.no_grad():
        rows = {name: torch.as_tensor(x)[None] for name, x in build_comparison(example).items()}
        logprobs = answer_logprobs(model, rows)[0].numpy()
    lengths = [example[f"{side}_mask"].sum() for side in ("chosen", "rejected")]
    reference = logprobs - np.array([1.5 * lengths[0], -0.5 * lengths[1]])
    found = step(model, objective, [batch_of(objective, [example | {"reference": reference}])])
    assert float(found["dpo"]) == pytest.approx(0, abs=1e-6)
    first = step(model, objective, [batch_of(objective, [example | {"reference": logprobs}])])
    assert float(first["dpo"]) == pytest.approx(4, abs=1e-4)
    assert math.isclose(float(first["margin"]), 0, abs_tol=1e-4)


@pytest.mark.parametrize("memorized", ["chosen", "rejected"])
def test_orpo_is_finite_for_a_memorized_answer(memorized: str) -> None:
    """The tokens of one answer have probability 1, up to rounding; those of the other e^-1000."""
    config = replace(CONFIG, lm_head=LMHeadConfig(bias=True), tie_embeddings=False)
    torch.manual_seed(0)
    model = LM(config, ORPO().heads(config))
    with torch.no_grad():
        model.heads["lm"].bias[20] = 1000.0
    example: Example = {}
    for side in ("chosen", "rejected"):
        tokens = np.array([9, 20, 20] if side == memorized else [9, 30, 30])
        example |= {f"{side}_tokens": tokens, f"{side}_mask": np.arange(3) >= 1}
    found = step(model, ORPO(beta=0.1), [batch_of(ORPO(), [example])])
    assert float(found[f"{memorized}_logprob"]) == pytest.approx(0, abs=1e-6)
    # The log-odds are those of the float32 below 1, and -1000.
    expected = 0 if memorized == "chosen" else 0.1 * (1000 + math.log(2**23))
    assert float(found["odds"]) == pytest.approx(expected, rel=1e-3)
    assert torch.isfinite(gradient(model)).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_a_preference_without_a_margin_is_named(tmp_path: Path, held_out: bool) -> None:
    """A line without a usable pair precedes it; without a weight no margin is needed."""
    rows: list[dict[str, object]] = [
        {"prompt": f"question {i}", "chosen": "yes", "rejected": "no", "margin": 1.0} for i in range(6)
    ]
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[2]["rejected"] = "yes"
    del rows[4]["margin"], rows[5]["margin"]
    (tmp_path / "lacking.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, lacking = (str(tmp_path / f"{name}.jsonl") for name in ("whole", "lacking"))
    config = DataConfig(path=(whole,), validation_path=(lacking,)) if held_out else DataConfig(path=(lacking,))
    data = BuildContext(config, tokenizer(), tmp_path, log=lambda line: None)
    with pytest.raises(UserError, match=r"lacking\.jsonl:5: the preference has no `margin`.* \(2 of 5 have none\)"):
        PreferencesConfig().build(data, RewardModeling(margin_weight=1.0))
    assert len(PreferencesConfig().build(data, RewardModeling()).train) > 3
    splits = PreferencesConfig().build(
        replace(data, config=DataConfig(path=(whole,))), RewardModeling(margin_weight=1.0)
    )
    assert len(splits.train) == 6
