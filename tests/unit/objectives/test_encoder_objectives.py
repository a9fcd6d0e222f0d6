"""SOP, SBO, RTD and adversarial RTD: inputs and labels, and heads and losses against the papers' formulas."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firth.data.collate import Batches, collate
from firth.data.noise import NOISES
from firth.data.source import Source
from firth.model.config import ModelConfig, encoder_config
from firth.model.config_groups import EmbeddingConfig, LMHeadConfig, NormConfig
from firth.model.model import LM
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective
from firth.objectives.replaced_tokens import RTD, AdversarialRTD, sample_tokens
from firth.objectives.sentence_pairs import NSP, SOP
from firth.pretrained.load_save import load_model, save_model
from firth.runs.build_model import init_head
from firth.runs.compatibility import check_pattern
from firth.tokenizer.vocab import Vocab
from firth.training.logging import NullReporter
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.schedule import Budget
from firth.training.step import step, validate
from firth.training.trainer import TrainerConfig, train
from firth.types import IGNORE, Batch, Example, UserError
from tests.support.objective_cases import label_fields

VOCAB = Vocab(
    size=60,
    roles={"pad": 0, "cls": 2, "sep": 3, "mask": 4},
    special=np.arange(60) < 5,
    spelling=tuple(b"\n" if i < 5 else b"a" if i % 3 else b" a" for i in range(60)),
)
CONFIG = ModelConfig(
    vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=64,
    causal=False, norm=NormConfig(placement="post", embedding=True), embedding=EmbeddingConfig(type_vocab_size=2, size=20),
    activation="gelu", lm_head=LMHeadConfig("transform", bias=True),
)  # fmt: skip
SPANBERT = MLM(noise="geometric", whole_span_replacement=True) + SBO()


class Chains(Source):
    """Rows of varied length in which each token is the last one plus 3."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        text = (rng.integers(55) + 3 * np.arange(rng.integers(8, 30))) % 55 + 5
        return {"tokens": VOCAB.add_special_tokens(text.astype(np.int32))}


class Pairs(Chains):
    """The same as two text segments, and a random one."""

    def __getitem__(self, index: int) -> Example:
        text = super().__getitem__(index)["tokens"][1:-1]
        half, other = len(text) // 2, np.random.default_rng(index).integers(5, 60, len(text) - len(text) // 2)
        return {"first": text[:half], "second": text[half:], "other": other}


def source_of(objective: Objective) -> Source:
    return Pairs() if {"next", "order"} & objective.labels.keys() else Chains()


def build_examples(objective: Objective, count: int = 8, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [objective.build_example(source_of(objective)[i], VOCAB, rng) for i in range(count)]


def batch_of(objective: Objective, count: int = 8, seed: int = 0) -> Batch:
    return collate(build_examples(objective, count, seed), label_fields(objective))


def model_of(objective: Objective, config: ModelConfig = CONFIG, spread: float = 0.1) -> LM:
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


# SOP


def test_order_label_is_at_cls_and_balanced() -> None:
    rng, swaps = np.random.default_rng(0), 0
    for i in range(1600):
        example = Pairs()[i % 40]
        seen = SOP().build_example(example, VOCAB, rng)
        swapped = int(seen["order"][0])
        swaps += swapped
        a, b = example["first"].tolist(), example["second"].tolist()
        if swapped:
            a, b = b, a
        assert seen["tokens"].tolist() == [2, *a, 3, *b, 3]
        assert (seen["order"][1:] == IGNORE).all()
        assert seen["token_type_ids"].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert abs(swaps - 800) < 4.5 * 20


# Noise


def test_ngrams_have_the_lengths_of_albert() -> None:
    """Words of one token each, long rows and little noise: spans hardly ever touch."""
    vocab = Vocab(size=60, roles={}, special=np.arange(60) < 5, spelling=(b"\n",) * 5 + (b" a",) * 55)
    rng, counts = np.random.default_rng(0), np.zeros(7, int)
    for _ in range(300):
        hidden = NOISES["ngrams"](np.full(2000, 9), vocab, 0.01, rng)
        edges = np.flatnonzero(np.diff(hidden.astype(int), prepend=0, append=0))
        counts += np.bincount((edges[1::2] - edges[::2]).clip(max=6), minlength=7)
        assert hidden.sum() in (20, 21)
    found, total = counts[1:4] / counts.sum(), counts.sum()
    # The last span of a row is cut to the total, and about one in seventy touches another.
    assert np.abs(found - np.array([6, 3, 2]) / 11).max() < 4.5 * (0.25 / total) ** 0.5 + 0.03
    assert counts[4:].sum() < 0.03 * total


# SBO


@pytest.mark.parametrize("noise", ["iid", "geometric", "spans"])
def test_boundaries_are_next_to_their_span(noise: str) -> None:
    rng, supervised, deep = np.random.default_rng(0), 0, 0
    for i in range(400):
        seen = (MLM(noise=noise, mlm_probability=0.4) + SBO(max_span_length=6)).build_example(
            Chains()[i % 40], VOCAB, rng
        )
        hidden = seen["labels"] != IGNORE
        for at in np.flatnonzero(seen["boundary"] != IGNORE):
            left, right = at - seen["before"][at], at + seen["after"][at]
            assert not hidden[left] and not hidden[right] and hidden[left + 1 : right].all()
            assert left < at < right and at - left <= 6
            assert seen["boundary"][at] == seen["labels"][at]
            supervised += 1
        left_out = np.flatnonzero(hidden & (seen["boundary"] == IGNORE))
        assert all(hidden[at - 6 : at].all() for at in left_out)  # [CLS] and [SEP] are at the ends
        deep += len(left_out)
    assert supervised > 1000 and deep > 0


def test_sbo_is_its_formula() -> None:
    """Equations 3 and 4 token by token, with the model's vocabulary matrix."""
    model, batch = model_of(SPANBERT), batch_of(SPANBERT)
    outputs = SPANBERT.forward(model, batch)
    one, two, place = model.heads["boundary"][0], model.heads["boundary"][3], model.heads["place"].weight
    norms = model.heads["boundary"][2], model.heads["boundary"][5]
    total = torch.zeros(())
    for row in range(len(batch["tokens"])):
        hidden = batch["labels"][row] != IGNORE
        for at in hidden.nonzero()[:, 0].tolist():
            s, e = at, at
            while hidden[s - 1]:
                s -= 1
            while hidden[e + 1]:
                e += 1
            h = torch.cat((outputs["hidden"][row, s - 1], outputs["hidden"][row, e + 1], place[at - s]))
            h = norms[0](F.gelu(one(h)))
            h = norms[1](F.gelu(two(h)))
            logits = model.tokens.weight @ h + model.heads["lm"].bias
            total = total - logits.log_softmax(-1)[batch["labels"][row, at]]
    found = SPANBERT.loss(model, outputs, batch)["boundary"]
    assert total > 10
    torch.testing.assert_close(found, total, rtol=1e-5, atol=0)


def test_spanbert_is_saved_and_loaded(tmp_path: Path) -> None:
    model, batch = model_of(SPANBERT).eval(), batch_of(SPANBERT)
    assert save_model(model, None, tmp_path).endswith("ElectraForMaskedLM")
    found, again = (SPANBERT.loss(m, SPANBERT.forward(m, batch), batch) for m in (model, load_model(tmp_path)))
    assert found == again and set(found) == {"tokens", "boundary"}


def test_sbo_alone_is_rejected() -> None:
    with pytest.raises(UserError, match=r"MLM\(\) \+ SBO\(\)"):
        SBO().build_example({"tokens": np.arange(5, 9)}, VOCAB, np.random.default_rng(0))


# RTD


def test_samples_have_the_distribution_of_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9) * 2
    logits[4] = float("-inf")
    chance = torch.from_numpy(np.random.default_rng(0).random(40000, dtype=np.float32))
    counts = torch.bincount(sample_tokens(logits.expand(40000, -1), chance), minlength=9)
    wanted = logits.softmax(-1) * 40000
    assert counts[4] == 0
    assert float(((counts - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()) < 30  # 7 degrees of freedom, p = 1e-4
    ends = sample_tokens(
        torch.tensor([[0.0, 0.0, float("-inf")]] * 2), torch.tensor([0.0, np.nextafter(np.float32(1), 0)])
    )
    assert ends.tolist() == [0, 1]


def bias_generator(model: LM, batch: Batch) -> None:
    """Make the generator predict one token everywhere: the label of the first masked position."""
    generator = model.heads["generator"]
    with torch.no_grad():
        generator.heads["lm"].bias[batch["labels"][batch["labels"] != IGNORE][0]] += 1000


@pytest.mark.parametrize("objective", [RTD(), AdversarialRTD()], ids=["likelihood", "adversarial"])
def test_correct_samples_count_as_original(objective: RTD) -> None:
    model, batch = model_of(objective), batch_of(objective)
    bias_generator(model, batch)
    supervised = batch["labels"] != IGNORE
    token = int(batch["labels"][supervised][0])
    outputs = objective.forward(model, batch)
    assert (outputs["sampled"] == token).all()
    assert torch.equal(outputs["shown"], torch.where(supervised, token, batch["tokens"]))
    real = batch["real"] != IGNORE
    assert torch.equal(real, batch["tokens"] != 0)  # every token has a label, [CLS] and [SEP] too, and no padding
    replaced = (supervised & (batch["labels"] != token)).float()
    scores = model.heads["replaced"](model(batch | {"tokens": outputs["shown"]}))[..., 0]
    wanted = F.binary_cross_entropy_with_logits(scores[real], replaced[real], reduction="sum")
    terms = objective.loss(model, outputs, batch)
    torch.testing.assert_close(terms["replaced"], 50 * wanted, rtol=1e-5, atol=0)
    right = (scores > 0) == (replaced > 0)
    assert (
        terms["replaced_share"] == replaced.sum()
        and terms["guessed"] == (batch["labels"][supervised] == token).sum() > 0
    )
    assert terms["original_share"] == real.sum() - replaced.sum()
    assert (
        terms["caught"] == (right & (replaced > 0)).sum() and terms["passed"] == (right & (replaced == 0) & real).sum()
    )
    found = validate(model, objective, [batch])
    assert found["replaced_accuracy"] == pytest.approx(float(terms["caught"] / replaced.sum()), rel=1e-6)
    assert found["original_accuracy"] == pytest.approx(float(terms["passed"] / terms["original_share"]), rel=1e-6)


def gradients(model: LM, loss: torch.Tensor) -> dict[str, float]:
    model.zero_grad()
    loss.backward()
    return {n: float(p.grad.abs().sum()) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("objective", [RTD(), AdversarialRTD()], ids=["likelihood", "adversarial"])
def test_gradients_stay_within_each_model(objective: RTD) -> None:
    model, batch = model_of(objective), batch_of(objective)
    embeddings = {"tokens.weight", "places.weight", "token_types.weight"}

    def changed(term: str) -> set[str]:
        return set(gradients(model, objective.loss(model, objective.forward(model, batch), batch)[term]))

    assert not any(name.startswith(("heads.generator", "heads.baseline")) for name in changed("replaced"))
    assert {"stack.project.weight", "heads.replaced.2.weight"} <= changed("replaced")
    own = changed("generator")
    assert embeddings <= own
    assert all(name.startswith("heads.generator") for name in own - embeddings)
    if "baseline" in objective.labels:
        assert changed("baseline") == {"heads.baseline.weight", "heads.baseline.bias"}


def test_generator_is_a_masked_language_model() -> None:
    objective = RTD()
    model, batch = model_of(objective), batch_of(objective)
    generator = model.heads["generator"]
    plain = MLM()
    wanted = plain.loss(generator, plain.forward(generator, batch), batch)["tokens"]
    found = objective.loss(model, objective.forward(model, batch), batch)["generator"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert (batch["tokens"][batch["labels"] != IGNORE] == VOCAB.mask).all()


def test_reinforce_gradient_is_that_of_the_expected_reward() -> None:
    """At one masked position, with the discriminator fixed: the mean over samples is the exact gradient."""
    objective = AdversarialRTD(noise="iid")
    model = model_of(objective)
    example = {"tokens": VOCAB.add_special_tokens(np.arange(20, 28))}
    rng = np.random.default_rng(0)
    seen = objective.build_example(example, VOCAB, rng)
    while (seen["labels"] != IGNORE).sum() != 1:
        seen = objective.build_example(example, VOCAB, rng)
    with torch.no_grad():
        model.heads["baseline"].bias.fill_(0.3)
    count = 5000
    each = []
    for i in range(count):  # an even grid of random numbers: only the error of the grid remains
        each.append(seen | {"chance": np.full(len(seen["tokens"]), (i + 0.5) / count, np.float32)})
    batch = collate(each, label_fields(objective))
    outputs = objective.forward(model, batch)
    outputs["logits"].retain_grad()
    terms = objective.loss(model, outputs, batch)
    terms["generator"].backward()
    found = outputs["logits"].grad.sum(0) / count
    # Exactly: -d/dlogits of the sum over tokens of p(token) * reward(token).
    logits = outputs["logits"][0].detach().requires_grad_()
    with torch.no_grad():
        at = int((batch["labels"][0] != IGNORE).nonzero())
        tokens = batch["real"][0].repeat(60, 1)
        tokens[:, at] = torch.arange(60)
        scores = model.heads["replaced"](model({"tokens": tokens}))[:, at, 0]
        replaced = (torch.arange(60) != batch["real"][0, at]).float()
        reward = F.binary_cross_entropy_with_logits(scores, replaced, reduction="none")
    (-(logits.softmax(-1) * reward).sum()).backward()
    assert logits.grad.abs().max() > 1e-3
    assert (found - logits.grad).norm() < 0.02 * logits.grad.norm()
    torch.testing.assert_close(terms["reward"] / count, (logits.softmax(-1) * reward).sum().detach(), rtol=1e-2, atol=0)


def test_baseline_learns_the_expected_reward() -> None:
    objective = AdversarialRTD()
    model, batch = model_of(objective, spread=0.3), batch_of(objective)
    with torch.no_grad():
        model.heads["baseline"].bias.fill_(3.0)
        outputs = objective.forward(model, batch)
    optimizer = Optimizer(OptimizerConfig(name="adamw", lr=0.03, weight_decay=0.0), model.heads["baseline"])
    errors = []
    for _ in range(300):
        terms = objective.loss(model, outputs, batch)
        terms["baseline"].backward()
        errors.append(float(terms["baseline"].detach()))
        optimizer.step(1.0)
    count = int((batch["labels"] != IGNORE).sum())
    reward = float(terms["reward"]) / count
    assert errors[-1] < 0.5 * errors[0] and 0.1 < reward < 10
    expected = F.softplus(model.heads["baseline"](outputs["draft"]))
    assert float(expected.detach().mean()) == pytest.approx(reward, rel=0.1)


def run(directory: Path, steps: int) -> LM:
    objective = RTD()
    model = model_of(objective, replace(CONFIG, dropout=0.1), spread=0.0)
    batches = Batches(Chains(), objective, VOCAB, batch_size=6, seed=3, gradient_accumulation_steps=2)
    held = Batches(Chains(), objective, VOCAB, batch_size=9, seed=4)
    result = train(
        model, objective, batches, directory, budget=Budget(max_steps=steps), optimizer=OptimizerConfig(lr=0.01), recipe="r",
        config=TrainerConfig(save_every=2, eval_every=3, precision="fp32"), reporter=NullReporter(),
        evaluate=lambda m, _: validate(m, objective, held.all_batches()),
    )  # fmt: skip
    assert {"valid/replaced_accuracy", "original_accuracy", "guessed"} <= result.metrics.keys()
    return model


@pytest.mark.slow
def test_electra_resumes_bit_for_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    full = run(tmp_path / "full", 6)
    run(tmp_path / "parts", 6)
    saved = tmp_path / "parts" / "checkpoints"
    shutil.rmtree(saved / "step-000006")
    assert [path.name for path in saved.iterdir()] == ["step-000004"]
    resumed = run(tmp_path / "parts", 6)
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), resumed.parameters(), strict=True))
    assert resumed.heads["generator"].tokens.weight is resumed.tokens.weight


@pytest.mark.slow
def test_generator_head_starts_with_token_frequencies() -> None:
    objective = RTD(mlm_probability=0.5)
    model = LM(config := encoder_config(60, 64, 2, max_positions=64), objective.heads(config))
    batches = Batches(Chains(), objective, VOCAB, batch_size=20, seed=3)
    assert init_head(model, objective, batches) > 10_000
    labels = torch.cat([b["labels"].flatten() for s in range(200) for b in batches.batches(s)])
    found = torch.bincount(labels[labels != IGNORE], minlength=60).double()
    initial = model.heads["generator"].heads["lm"].bias.softmax(-1)
    assert float((initial - found / found.sum()).abs().max().detach()) < 2e-3


def test_validation_does_not_depend_on_the_random_state() -> None:
    objective = RTD()
    model = model_of(objective).eval()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        batches = Batches(Chains(), objective, VOCAB, batch_size=9, seed=4)
        found.append(validate(model, objective, batches.all_batches()))
    assert found[0] == found[1] and found[0]["replaced_share"] > 0.05


# All objectives

ALL = {
    "sop + mlm": SOP() + MLM(noise="ngrams"),
    "nsp + mlm": NSP() + MLM(),
    "mlm + sbo": SPANBERT,
    "rtd": RTD(),
    "sop + rtd": SOP() + RTD(),
    "adversarial rtd": AdversarialRTD(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_ten_steps_lower_every_term(name: str) -> None:
    """Except those of the adversarial generator, which has a reward and no loss, and of its baseline."""
    objective = ALL[name]
    model, batch = model_of(objective, spread=0.0), batch_of(objective)
    optimizer = Optimizer(OptimizerConfig(name="adamw", lr=3e-3), model)
    first = step(model, objective, [batch])
    for _ in range(10):
        optimizer.step(1.0)
        last = step(model, objective, [batch])
    for term in objective.labels.keys() - ({"generator", "baseline"} if name == "adversarial rtd" else set()):
        assert last[term] < first[term], term


@pytest.mark.parametrize("name", ALL)
def test_split_batches_have_the_same_gradient(name: str) -> None:
    objective = ALL[name]
    model, rows = model_of(objective, spread=0.05), build_examples(objective, 9)
    found = []
    fields = label_fields(objective)
    for parts in ([rows], [rows[:2], rows[2:3], rows[3:]]):
        model.zero_grad()
        step(model, objective, [collate(some, fields) for some in parts])
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_masked_tokens_do_not_change_the_states(name: str) -> None:
    """Another token at a masked position: all states are the same, those of a discriminator too for the same samples."""
    changed, moved = 0, 0
    objective = ALL[name]
    if "tokens" in objective.labels:
        objective = type(objective)(
            *(
                replace(o, mask_fraction=1.0, random_fraction=0.0) if type(o) is MLM else o
                for o in (objective.first, objective.second)
            )
        )
    model = model_of(objective).eval()
    for index in range(10):
        example = source_of(objective)[index]
        seen = objective.build_example(example, VOCAB, np.random.default_rng(index))
        at = np.flatnonzero(seen["labels"] != IGNORE)
        if not len(at):
            continue
        other = seen | {"labels": seen["labels"].copy()}
        other["labels"][at] = 5 + (seen["labels"][at] + 4) % 55
        if "real" in seen:
            other["real"] = seen["real"].copy()
            other["real"][at] = other["labels"][at]
        batches = [collate([s]) for s in (seen, other)]
        with torch.no_grad():
            outputs = [objective.forward(model, b) for b in batches]
        for field, value in outputs[0].items():
            assert torch.equal(value, outputs[1][field]), field
        changed += 1
        losses = [objective.loss(model, o, b) for o, b in zip(outputs, batches, strict=True)]
        moved += any(losses[0][term] != losses[1][term] for term in losses[0])
    assert changed > 5 and moved == changed


def test_a_decoder_is_rejected() -> None:
    from firth.model.config import decoder_config

    for objective in ALL.values():
        with pytest.raises(UserError, match="reads a text from both sides"):
            check_pattern(objective, decoder_config(60, 64, 2))
        check_pattern(objective, encoder_config(60, 64, 2))


def test_invalid_settings_are_rejected() -> None:
    for bad in (0.0, 1.5):
        with pytest.raises(
            UserError, match=r"objective.generator_size=.* should be (greater than 0|less than or equal to 1)"
        ):
            RTD(generator_size=bad)
    with pytest.raises(UserError, match=r"objective.max_span_length=0 should be greater than or equal to 1"):
        SBO(max_span_length=0)
