"""Task heads: losses equal to transformers' on the same input, leaks, packing, class weights and smoothing, units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from firth.data import attention_fields
from firth.data.collate import collate, counted_fields, pack
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, word_vector_config
from firth.model.config_groups import EmbeddingConfig
from firth.model.heads import export_heads
from firth.model.model import LM
from firth.model.presets import bert
from firth.objectives.classification import Classification, MultipleChoice, Regression
from firth.objectives.objective import Objective, choice_loss
from firth.objectives.token_tasks import QuestionAnswering, TokenClassification
from firth.pretrained.load_save import save_model
from firth.training.step import step
from firth.types import IGNORE, DataStats, Example, UserError
from tests.support.objective_cases import VOCAB, labeled, scored, spanned, tagged

TINY = bert(100, 32, 2, 2, max_positions=64)


def question(rng: np.random.Generator) -> Example:
    k = int(rng.integers(2, 5))
    first = rng.integers(25, 100, 4)
    rows = [attention_fields.pair(first, rng.integers(25, 100, int(rng.integers(1, 9))), VOCAB) for _ in range(k)]
    return {"options": rows, "label": int(rng.integers(k))}


CASES: dict[str, tuple[Objective, Any]] = {
    "choice": (MultipleChoice(max_options=4), question),
    "choice by a decoder": (MultipleChoice(max_options=4, position="last"), question),
    "classification": (
        Classification(class_names=("a", "b", "c"), label_smoothing=0.1, class_weights=(1.0, 3.0, 0.5)),
        labeled,
    ),
    "regression": (Regression(mean=2.0, std=3.0), scored),
    "tagging": (TokenClassification(class_names=("a", "b", "c")), tagged),
    "spans": (QuestionAnswering(), spanned),
    "spans by a decoder": (QuestionAnswering(position="last"), spanned),
}


def model_of(objective: Objective) -> LM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=100,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        max_positions=128,
        embedding=EmbeddingConfig(type_vocab_size=2),
    )
    return LM(config, objective.heads(config))


def build_examples(objective: Objective, source: Any, n: int = 8) -> list[Example]:
    rng = np.random.default_rng(0)
    return [objective.build_example(source(rng), VOCAB, rng) for _ in range(n)]


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_lower_the_loss(name: str) -> None:
    objective, source = CASES[name]
    model = model_of(objective)
    batch = collate(build_examples(objective, source), {*counted_fields(objective).values()})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(11):
        optimizer.zero_grad()
        losses.append(float(step(model, objective, [batch])[next(iter(objective.labels))]))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", CASES)
def test_split_batches_have_the_same_gradient(name: str) -> None:
    objective, source = CASES[name]
    fields = {*counted_fields(objective).values()}
    model, examples, found = model_of(objective), build_examples(objective, source), []
    for batches in ([examples], [examples[:3], examples[3:]]):
        model.zero_grad()
        step(model, objective, [collate(some, fields) for some in batches])
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_padding_options_do_not_change_the_loss() -> None:
    objective, rng = MultipleChoice(max_options=4), np.random.default_rng(1)
    model = model_of(objective)
    example = question(rng)
    example = {"options": example["options"][:2], "label": 1}
    wide, narrow = (
        step(model, o, [collate([o.build_example(example, VOCAB, rng)])])
        for o in (objective, MultipleChoice(max_options=2))
    )
    assert float(wide["choice"]) == pytest.approx(float(narrow["choice"]), rel=1e-6)
    with pytest.raises(UserError, match="2 options does not fit into a group of 2 to 1"):
        MultipleChoice(max_options=1).build_example(example, VOCAB, rng)


def test_choice_is_a_softmax_over_the_options() -> None:
    objective, rng = MultipleChoice(max_options=3, position="last"), np.random.default_rng(2)
    model = model_of(objective).eval()
    rows = [{"tokens": VOCAB.add_special_tokens(rng.integers(25, 100, n))} for n in (3, 7, 5)]
    batch = collate([objective.build_example({"options": rows, "label": 2}, VOCAB, rng)])
    with torch.no_grad():
        states = [
            model(
                {k: torch.as_tensor(v)[None] for k, v in (row | attention_fields.causal(len(row["tokens"]))).items()}
            )[0, -1]
            for row in rows
        ]
        scores = model.heads["choice"](torch.stack(states))[:, 0]
        found = objective.loss(model, objective.forward(model, batch), batch)
    assert float(found["choice"]) == pytest.approx(-float(scores.log_softmax(0)[2]), rel=1e-5)


@pytest.mark.parametrize("name", ["choice"])
def test_groups_are_not_packed(name: str) -> None:
    objective, source = CASES[name]
    with pytest.raises(UserError, match="no token axis"):
        pack(build_examples(objective, source), 200)


def test_decoder_is_read_at_its_last_token() -> None:
    """The last token attends to every other, and no token attends to later ones."""
    rng = np.random.default_rng(0)
    for objective in (
        Classification(class_names=("a", "b"), position="last"),
        TokenClassification(class_names=("a", "b"), causal=True),
    ):
        model = model_of(objective).eval()
        tokens = VOCAB.add_special_tokens(rng.integers(25, 100, 8))
        example = {"tokens": tokens, "label": 0, "tags": np.zeros(10, np.int64)}
        changed = example | {"tokens": np.append(tokens[:-2], [30 + tokens[-2] % 7, tokens[-1]])}
        with torch.no_grad():
            a, b = (
                objective.forward(model, collate([objective.build_example(e, VOCAB, rng)]))["hidden"][0]
                for e in (example, changed)
            )
        torch.testing.assert_close(a[:8], b[:8])
        assert (a[9] - b[9]).abs().max() > 1e-3


def both_models(heads: dict[str, torch.nn.Module], cls: str, head: dict[str, str], tmp_path: Any, **config: Any) -> Any:
    """Return our model and transformers' model with the same weights, its head copied from ours."""
    transformers = pytest.importorskip("transformers", reason="the reference; installed with the test extra")
    torch.manual_seed(1)
    model = LM(TINY, heads).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    stack = LM(TINY, {})
    stack.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("heads.")})
    save_model(stack, None, tmp_path)
    other = getattr(transformers, cls).from_pretrained(tmp_path, **config).eval()
    for name, ours in head.items():
        getattr(other, name).load_state_dict(model.heads[ours].state_dict())
    return model, other


@pytest.mark.oracle
def test_spans_equal_bert_for_question_answering(tmp_path: Any) -> None:
    objective, rng = QuestionAnswering(), np.random.default_rng(0)
    model, other = both_models(objective.heads(TINY), "BertForQuestionAnswering", {"qa_outputs": "span"}, tmp_path)
    examples = []
    for start, end in ((3, 5), (-1, -1), (7, 7)):
        tokens = VOCAB.add_special_tokens(rng.integers(25, 100, 10))
        examples.append(
            {"tokens": tokens, "token_type_ids": (np.arange(12) > 4).astype(int), "start": start, "end": end}
        )
    batch = collate([objective.build_example(e, VOCAB, rng) for e in examples], {"starts", "ends"})
    with torch.no_grad():
        found = objective.loss(model, objective.forward(model, batch), batch)
        output = other(
            input_ids=batch["tokens"], token_type_ids=batch["token_type_ids"],
            start_positions=torch.tensor([3, 0, 7]), end_positions=torch.tensor([5, 0, 7]),
        )  # fmt: skip
    assert float(found["span"]) / 3 == pytest.approx(float(output.loss), abs=1e-5)


@pytest.mark.oracle
def test_tags_equal_bert_for_token_classification(tmp_path: Any) -> None:
    objective, rng = TokenClassification(class_names=("a", "b", "c")), np.random.default_rng(0)
    model, other = both_models(
        objective.heads(TINY), "BertForTokenClassification", {"classifier": "tags"}, tmp_path, num_labels=3
    )
    batch = collate([objective.build_example(tagged(rng), VOCAB, rng) for _ in range(4)], {"tags"})
    with torch.no_grad():
        found = objective.loss(model, objective.forward(model, batch), batch)["tags"] / (batch["tags"] != IGNORE).sum()
        output = other(
            input_ids=batch["tokens"], labels=batch["tags"], attention_mask=(batch["key_time"] == 0).long()
        )  # fmt: skip
    assert float(found) == pytest.approx(float(output.loss), abs=1e-5)


def test_smoothing_and_class_weights_equal_torch() -> None:
    scores, targets = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    weights = torch.tensor([1.0, 2.0, 0.5])
    expected = torch.nn.CrossEntropyLoss(weights, label_smoothing=0.2, reduction="sum")(scores, targets)
    torch.testing.assert_close(choice_loss(scores, targets, 0.2, weights), expected)
    smoothed = (1 - 0.2) * -scores.log_softmax(-1).gather(1, targets[:, None]).sum() - 0.2 * scores.log_softmax(
        -1
    ).mean(-1).sum()
    torch.testing.assert_close(choice_loss(scores, targets, 0.2), smoothed)
    balanced = Classification(class_weights="balanced").configure(
        lambda: DataStats(("a", "b", "c"), (60, 30, 0)), encoder_config(vocab_size=9, hidden_size=64, num_layers=1)
    )
    assert isinstance(balanced, Classification)
    assert balanced.class_weights == (0.5, 1.0, 0.0)
    assert sum(n * w for n, w in zip((60, 30, 0), balanced.class_weights, strict=True)) / 90 == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="2 class_weights for 3 classes"):
        Classification(class_names=("a", "b", "c"), class_weights=(1.0, 2.0))
    with pytest.raises(UserError, match="label_smoothing=1"):
        Classification(label_smoothing=1.0)


def test_readout_position_fits_the_model() -> None:
    made = [
        make(vocab_size=9, hidden_size=64, num_layers=1)
        for make in (encoder_config, decoder_config, encoder_decoder_config)
    ]
    assert [Classification().configure(DataStats, config).attention for config in made] == [
        "bidirectional",
        "causal",
        "seq2seq",
    ]
    assert [QuestionAnswering().configure(DataStats, config).attention for config in made[:2]] == [
        "bidirectional",
        "causal",
    ]
    assert [TokenClassification().configure(DataStats, config).attention for config in made[:2]] == ["any", "causal"]
    assert (
        TokenClassification().configure(DataStats, word_vector_config(40, 8)).attention == "any"
    )  # each word by itself
    assert [MultipleChoice().configure(DataStats, config).attention for config in made[:2]] == [
        "bidirectional",
        "causal",
    ]
    for objective in (QuestionAnswering(), TokenClassification(), MultipleChoice()):
        assert objective.configure(DataStats, made[2]).attention not in made[2].supported_patterns
    last = Classification(class_names=("a",), position="last")
    assert last.configure(DataStats, made[0]) == last


def test_exported_head_predicts_in_the_units_of_the_data() -> None:
    objective = Regression(mean=10.0, std=4.0)
    model = model_of(objective).eval()
    batch = collate(
        [objective.build_example({"tokens": VOCAB.add_special_tokens(np.arange(30, 36)), "score": 18.0}, VOCAB, None)],
        {"score"},
    )
    with torch.no_grad():
        before = objective.loss(model, objective.forward(model, batch), batch)
        state = objective.forward(model, batch)["hidden"][0, 0]
        standardized = float(model.heads["score"](state))
        export_heads(model)
        converted = float(model.heads["score"](state))
    assert converted == pytest.approx(10 + 4 * standardized, rel=1e-5)
    assert float(before["score"]) == pytest.approx((standardized - 2) ** 2, rel=1e-5)
    assert float(before["squared_error"]) == pytest.approx((converted - 18) ** 2, rel=1e-4)
