"""Semi-supervised and multi-annotator losses against their formulas, and their data sources."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firth.align.precompute import precompute
from firth.data.collate import collate, pack
from firth.data.examples import DataConfig
from firth.data.labeled import LabeledConfig
from firth.data.records import Records
from firth.data.semi_supervised import (
    MultiAnnotatorConfig,
    PartiallyLabeledConfig,
    SimulatedAnnotators,
    SimulatedAnnotatorsConfig,
    choose_labeled,
    majority,
)
from firth.data.source import MixtureSource, Source, SubsetSource, UnlabeledSource
from firth.model.config import ModelConfig
from firth.model.config_groups import InitConfig
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.objective import Objective
from firth.objectives.semi_supervised import (
    Consistency,
    MultiAnnotator,
    PseudoLabels,
    WeightPenalty,
    teacher_probabilities,
    unlabeled_example,
)
from firth.runs.prepare import RunData
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import IGNORE, Example, UserError
from tests.support.objective_cases import gradient, label_fields
from tests.support.tiny_corpus import tokenizer

VOCAB = Vocab(size=60, roles={"pad": 0, "cls": 2, "sep": 3, "mask": 4}, special=np.arange(60) < 5)
CONFIG = ModelConfig(
    vocab_size=60, hidden_size=32, num_layers=1, num_heads=2, max_positions=64, causal=False, init=InitConfig(std=0.3)
)
CLASSES = ("a", "b", "c")


def example(seed: int) -> Example:
    rng = np.random.default_rng(seed)
    known = seed % 3 == 0
    probabilities = rng.dirichlet([0.3] * 3)
    tokens = VOCAB.add_special_tokens(rng.integers(5, 60, int(rng.integers(3, 12))))
    return {"tokens": tokens, "label": int(rng.integers(3)) if known else IGNORE, "taught": probabilities}


def annotated(seed: int) -> Example:
    rng = np.random.default_rng(seed)
    votes = np.where(rng.random(4) < 0.2, IGNORE, rng.integers(0, 3, 4))
    votes[0] = rng.integers(3)
    return {
        "tokens": VOCAB.add_special_tokens(rng.integers(5, 60, int(rng.integers(3, 12)))),
        "votes": votes,
        "label": majority(votes),
    }


def build_model(objective: Objective, config: ModelConfig = CONFIG) -> LM:
    torch.manual_seed(0)
    return LM(config, objective.heads(config))


def build_examples(objective: Objective, make, count: int) -> list[Example]:
    return [objective.build_example(make(seed), VOCAB, np.random.default_rng(seed)) for seed in range(count)]


def scores(model: LM, tokens: np.ndarray) -> torch.Tensor:
    """Logits of one text at [CLS], without padding."""
    with torch.no_grad():
        return model.heads["classes"](model({"tokens": torch.tensor(tokens)[None]})[0, 0])


def test_pseudo_labels_are_their_formula() -> None:
    objective = PseudoLabels(class_names=CLASSES, confidence=0.7, unlabeled_weight=0.5) + WeightPenalty(weight=1e-3)
    model = build_model(objective)
    terms = step(model, objective, [collate(build_examples(objective, example, 20), label_fields(objective))])
    known, others = [], []
    for e in map(example, range(20)):
        losses = -scores(model, e["tokens"]).log_softmax(-1)
        if e["label"] != IGNORE:
            known.append(float(losses[e["label"]]))
        else:
            others.append(float(losses[int(e["taught"].argmax())]) * (e["taught"].max() >= 0.7))
    assert len(known) > 3 and 0 < others.count(0.0) < len(others)
    assert float(terms["class"]) == pytest.approx(np.mean(known), abs=1e-5)
    assert float(terms["relation"]) == pytest.approx(0.5 * np.mean(others), abs=1e-5)
    omega = sum(float(p.square().sum()) for p in model.parameters() if p.ndim > 1)
    assert float(terms["penalty"]) == pytest.approx(1e-3 * omega, rel=1e-5)


def test_consistency_is_its_formula() -> None:
    objective = Consistency(class_names=CLASSES, mlm_probability=0.4, temperature=0.5, unlabeled_weight=2.0)
    model = build_model(objective, replace(CONFIG, dropout=0.0))
    rows = build_examples(objective, example, 12)
    terms = step(model, objective, [collate(rows, label_fields(objective))])
    expected, moved = [], 0
    for e, row in zip(map(example, range(12)), rows, strict=True):
        if e["label"] != IGNORE:
            assert np.array_equal(row["tokens"], e["tokens"])
            continue
        moved += int((row["tokens"] != e["tokens"]).sum())
        assert np.array_equal(row["clean"], e["tokens"]) and set(row["tokens"][row["tokens"] != e["tokens"]]) <= {4}
        target = (scores(model, e["tokens"]) / 0.5).softmax(-1)
        expected.append(float(-(target * scores(model, row["tokens"]).log_softmax(-1)).sum()))
    assert moved > 10
    assert float(terms["relation"]) == pytest.approx(2 * np.mean(expected), abs=1e-5)
    model.zero_grad()
    unlabeled = [row for row, e in zip(rows, map(example, range(12)), strict=True) if e["label"] == IGNORE]
    outputs = objective.forward(model, collate(unlabeled, label_fields(objective)))
    assert not outputs["target"].requires_grad and model.training


def test_consistency_counts_both_passes() -> None:
    objective, plain = Consistency(class_names=CLASSES), Classification(class_names=CLASSES)
    model = build_model(objective)
    batch = collate(build_examples(objective, example, 6), label_fields(objective))
    clean = plain.flops(model, batch | {"class": batch["relation"]})
    both = batch | {"class": torch.where(batch["class"] == IGNORE, batch["relation"], batch["class"])}
    assert objective.flops(model, batch) == pytest.approx(plain.flops(model, both) + clean / 3)


def test_weight_ramps_up_with_the_step() -> None:
    objective = Consistency(class_names=CLASSES, unlabeled_weight=2.0, ramp_steps=10) + WeightPenalty()
    model = build_model(objective, replace(CONFIG, dropout=0.0))
    batch = collate(build_examples(objective, example, 6), label_fields(objective))
    outputs = objective.forward(model, batch)
    plain = objective.loss(model, outputs, batch)  # without a step: held-out text
    for at, weight in ((0, math.exp(-5)), (5, math.exp(-1.25)), (10, 1.0), (99, 1.0)):
        terms = objective.loss(model, outputs, batch | {"step": torch.tensor(at)})
        assert float(terms["relation"]) == pytest.approx(weight * float(plain["relation"]))
        assert terms["class"] == plain["class"] and terms["penalty"] == plain["penalty"]


def test_multi_annotator_is_its_formula() -> None:
    objective = MultiAnnotator(class_names=CLASSES)
    model = build_model(objective)
    rows = [annotated(seed) for seed in range(10)]
    terms = step(model, objective, [collate(build_examples(objective, annotated, 10), label_fields(objective))])
    losses, correct = [], []
    for e in rows:
        f = scores(model, e["tokens"])
        for vote in e["votes"][e["votes"] != IGNORE]:
            losses.append(sum(float(F.softplus(-f[c] if c == vote else f[c])) for c in range(3)))
        correct.append(int(f.argmax()) == e["label"])
    assert float(terms["votes"]) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float(terms["accuracy"]) == pytest.approx(np.mean(correct), abs=1e-6)


CASES = {
    "pseudo labels": (PseudoLabels(class_names=CLASSES, confidence=0.5), example),
    "consistency": (Consistency(class_names=CLASSES), example),
    "consistency + penalty": (Consistency(class_names=CLASSES) + WeightPenalty(weight=1e-3), example),
    "multi annotator": (MultiAnnotator(class_names=CLASSES), annotated),
}


@pytest.mark.parametrize("name", CASES)
def test_split_and_packed_batches_have_the_same_gradient(name: str) -> None:
    objective, make = CASES[name]
    model, rows, fields = build_model(objective), build_examples(objective, make, 12), label_fields(objective)
    full = gradient(model, objective, [collate(rows, fields)])
    parts = gradient(model, objective, [collate(rows[:3], fields), collate(rows[3:], fields)])
    torch.testing.assert_close(parts, full, rtol=1e-4, atol=1e-6)
    if make is annotated:
        with pytest.raises(UserError, match="'votes' has no token axis"):
            pack(rows, 40, fields)
    else:
        torch.testing.assert_close(gradient(model, objective, [pack(rows, 40, fields)]), full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_lower_every_term(name: str) -> None:
    objective, make = CASES[name]
    model = build_model(objective)
    batch = collate(build_examples(objective, make, 12), label_fields(objective))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    found = []
    for _ in range(10):
        found.append(step(model, objective, [batch]))
        optimizer.step()
        optimizer.zero_grad()
    for term in objective.labels.keys() - {"penalty"}:  # weights grow in training, and the penalty with them
        assert float(found[-1][term]) < float(found[0][term]), term


def test_penalty_gradient_is_the_weight() -> None:
    objective = WeightPenalty(weight=0.5)
    model = LM(CONFIG, {})
    step(model, objective, [collate(build_examples(objective, example, 3), {"penalty"})])
    torch.testing.assert_close(model.tokens.weight.grad, model.tokens.weight.detach())


def test_held_out_records_need_no_teacher_or_votes() -> None:
    held = {"tokens": VOCAB.add_special_tokens(np.array([9, 10])), "label": 2}
    for objective in (
        PseudoLabels(class_names=CLASSES),
        Consistency(class_names=CLASSES),
        MultiAnnotator(class_names=CLASSES),
    ):
        batch = collate([objective.build_example(held, VOCAB, np.random.default_rng(0))], label_fields(objective))
        terms = objective.loss(build_model(objective), objective.forward(build_model(objective), batch), batch)
        assert all(bool(torch.isfinite(value)) for value in terms.values())
        assert batch["class"][0, 0] == 2


def records(tmp_path: Path, rows: list[dict]) -> list[str]:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_few_labels_are_balanced_and_the_rest_hidden(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "abc"[i % 7 % 3]} for i in range(70)]
    source = Records(LabeledConfig(max_length=32), records(tmp_path, rows), tokenizer())
    known, others = choose_labeled(source, 10, seed=1)
    assert np.array_equal(np.sort(np.concatenate((known, others))), np.arange(70))
    counts = np.bincount([source[int(i)]["label"] for i in known])
    assert sorted(counts.tolist()) == [3, 3, 4]
    assert not np.array_equal(known, choose_labeled(source, 10, seed=2)[0])
    both = MixtureSource([SubsetSource(source, known), UnlabeledSource(SubsetSource(source, others))], [1, 3])
    _, index = both.order(0, np.arange(400))
    hidden = sum(int(both[int(i)]["label"]) == IGNORE for i in index)
    assert abs(hidden - 300) <= 1
    with pytest.raises(UserError, match="class 1 has only 20 of its 23"):
        choose_labeled(source, 69, seed=0)


def test_simulated_annotators_have_the_stated_accuracy(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(1200)]
    source = Records(LabeledConfig(max_length=32), records(tmp_path, rows), tokenizer())
    simulated = SimulatedAnnotatorsConfig(annotator_accuracy=0.6)
    drawn = SimulatedAnnotators(source, simulated, classes=3, seed=4)
    votes = np.stack([drawn[i]["votes"] for i in range(1200)])
    truth = np.array([source[i]["label"] for i in range(1200)])[:, None]
    assert abs((votes == truth).mean() - 0.6) < 4.5 * (0.24 / 6000) ** 0.5
    others = np.bincount((votes - truth)[votes != truth] % 3, minlength=3)
    assert others[0] == 0 and abs(others[1] - others[2]) < 4.5 * (others.sum()) ** 0.5
    assert np.array_equal(drawn[7]["votes"], SimulatedAnnotators(source, simulated, classes=3, seed=4)[7]["votes"])
    assert (
        votes != np.stack([SimulatedAnnotators(source, simulated, classes=3)[i]["votes"] for i in range(1200)])
    ).any()
    share = np.mean([majority(v) == t for v, t in zip(votes, truth[:, 0], strict=True)])
    assert share > 0.65
    with pytest.raises(UserError, match="two or more"):
        SimulatedAnnotators(source, SimulatedAnnotatorsConfig(), classes=1)


def test_records_with_a_list_of_labels(tmp_path: Path) -> None:
    rows = [{"text": "one", "labels": ["good", "bad", "good"]}, {"text": "two", "labels": ["bad"]}]
    source = Records(MultiAnnotatorConfig(max_length=32), records(tmp_path, rows), tokenizer())
    assert source.classes == ("bad", "good")
    assert [source[i]["votes"].tolist() for i in range(2)] == [[1, 0, 1], [0, IGNORE, IGNORE]]
    assert [source[i]["label"] for i in range(2)] == [1, 0]
    with pytest.raises(UserError, match=r"records.jsonl.*'labels' must be a list"):
        Records(
            MultiAnnotatorConfig(max_length=32), records(tmp_path, [{"text": "one", "labels": "good"}]), tokenizer()
        )


def test_teacher_probabilities_of_texts_of_any_length() -> None:
    class Texts(Source):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Example:
            return {"tokens": example(index)["tokens"], "label": IGNORE}

    objective = PseudoLabels(class_names=CLASSES) + WeightPenalty()
    model = build_model(objective).eval()
    known = precompute(Texts(), model, lambda e: unlabeled_example(objective, e, VOCAB), teacher_probabilities)
    for i in (0, 7, 19):
        expected = scores(model, known[i]["tokens"]).softmax(-1).numpy()
        np.testing.assert_allclose(known[i]["taught"], expected, atol=1e-5)


def test_unlabeled_texts_join_the_labeled_ones(tmp_path: Path) -> None:
    labeled = records(tmp_path, [{"review": f"text {i}", "label": "ab"[i % 2]} for i in range(60)])
    more = tmp_path / "more.csv"
    more.write_text("id,review\n" + "".join(f"{i},another {i}\n" for i in range(30)))
    data = RunData(
        config=DataConfig(path=tuple(labeled), validation_fraction=0.2),
        tokenizer=tokenizer(),
        directory=tmp_path,
        seed=0,
        log=print,
    )
    examples = PartiallyLabeledConfig(
        base=LabeledConfig(text_field="review", max_length=32),
        unlabeled_path=(str(more),),
        unlabeled_ratio=2.0,
    )
    objective = Consistency().configure(lambda: examples.stats(data), CONFIG)
    assert objective.constraints.class_names == ("a", "b")
    splits = examples.build(data, objective)
    hidden = [int(splits.train[i]["label"]) == IGNORE for i in range(len(splits.train))]
    assert sum(hidden) == 30 and splits.train.counts["unlabeled"] == 30
    assert len(hidden) - 30 + len(splits.validation or ()) == 60
    _, index = splits.train.order(0, np.arange(300))
    assert abs(sum(hidden[int(i)] for i in index) - 200) <= 1

    lines = tmp_path / "more.txt"
    lines.write_text("one\n\n  two \n")
    plain = LabeledConfig(max_length=32).unlabeled([str(lines)], data)
    assert [tokenizer().decode(plain[i]["tokens"]).strip() for i in range(len(plain))] == ["one", "two"]
    with pytest.raises(UserError, match="no field 'review'"):
        PartiallyLabeledConfig(base=LabeledConfig(text_field="review"), unlabeled_path=(str(lines),)).build(
            data, objective
        )
