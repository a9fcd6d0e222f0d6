"""The last block at needed positions only: the same loss and gradients as the whole block, and fewer FLOPs. Dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.data.collate import collate, pack
from firth.model import attention_kernels, flops, transformer
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import EmbeddingConfig, NormConfig
from firth.model.forward_context import ForwardContext
from firth.model.fused import Dropout, dropout_mask
from firth.model.model import LM
from firth.objectives.causal_lm import PrefixLM
from firth.objectives.classification import Classification, MultipleChoice, Regression
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective, label_positions
from firth.objectives.permuted_lm import PLM, MPNet
from firth.objectives.preferences import DPO
from firth.objectives.replaced_tokens import RTD
from firth.objectives.reward_model import RewardModeling
from firth.objectives.semi_supervised import PseudoLabels
from firth.objectives.sentence_pairs import NSP
from firth.objectives.sft import SFT
from firth.runs.peft_options import prefix_of, prompt_of
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, DataStats, Example

VOCAB = Vocab(size=40, roles={"pad": 0, "cls": 1, "sep": 2, "mask": 3}, special=np.arange(40) < 4)
BERT = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    max_positions=32,
    norm=NormConfig(placement="post", embedding=True),
    embedding=EmbeddingConfig(type_vocab_size=2),
    activation="gelu",
    causal=False,
)
CONFIGS = {
    "bert": BERT,
    "encoder": encoder_config(vocab_size=40, hidden_size=64, num_layers=2, num_heads=2, max_positions=32),
    "decoder": decoder_config(vocab_size=40, hidden_size=64, num_layers=2, num_heads=2, max_positions=32),
    "t5": encoder_decoder_config(vocab_size=40, hidden_size=64, num_layers=1, num_heads=2, max_positions=32),
    "mpnet": BERT.with_fields({"position.type": "mpnet"}),
    "xlnet": BERT.with_fields({"position.type": "xlnet", "embedding.mask": True, "attention.memory_length": 8}),
}


def texts(n: int = 7) -> list[Example]:
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(4, 40, rng.integers(2, 12)), "label": i % 3} for i in range(n)]


def batch_of(objective: Objective, how: str, n: int = 7) -> Batch:
    seen = [objective.build_example(text, VOCAB, np.random.default_rng(0)) for text in texts(n)]
    return (
        collate(seen, {"class", "score", "labels"}) if how == "padded" else pack(seen, 24, {"class", "score", "labels"})
    )


def gradients(model: LM, objective: Objective, batch: Batch, needed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    terms = objective.loss(model, {"hidden": model(batch, ForwardContext(needed_positions=needed))}, batch)
    sum(terms[t] for t in objective.labels).backward()  # type: ignore[union-attr]
    return terms | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def build(config: ModelConfig, objective: Objective) -> LM:
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    for p in model.parameters():  # init.zero_output would hide what a block does
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("how", ["padded", "packed"])
@pytest.mark.parametrize(
    ("name", "front"),
    [(n, f) for n in CONFIGS for f in ("", "prefix", "prompt") if n != "xlnet" or not f],  # it has no trained positions
)
def test_loss_and_gradients_match_the_whole_block(name: str, how: str, front: str) -> None:
    config = CONFIGS[name]
    objective = Classification(class_names=("a", "b", "c")).configure(DataStats, config)
    model = build(config, objective)
    if front:
        begin = np.array([5, 6])
        model.heads[front] = prefix_of(model, begin, 0) if front == "prefix" else prompt_of(model, begin)
    batch = batch_of(objective, how)
    needed = label_positions(objective, batch)
    assert needed is not None
    assert needed.sum() == 7
    plain, subset = (gradients(model, objective, batch, w) for w in (None, needed))
    assert plain.keys() == subset.keys()
    for term in plain:
        torch.testing.assert_close(subset[term], plain[term], rtol=1e-5, atol=1e-5, msg=term)
    hidden = model(batch, ForwardContext(needed_positions=needed))
    torch.testing.assert_close(hidden[needed], model(batch)[needed], rtol=1e-5, atol=1e-5)
    if config.supports_subset and how == "padded":
        assert not hidden[~needed].any(), "unneeded states were computed"


def test_subset_with_gradient_checkpointing() -> None:
    objective = Classification(class_names=("a", "b", "c"))
    model, batch = build(BERT, objective), batch_of(objective, "packed")
    needed = label_positions(objective, batch)
    plain = gradients(model, objective, batch, needed)
    model.stack.gradient_checkpointing = True  # type: ignore[assignment]
    again = gradients(model, objective, batch, needed)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def choice(n: int) -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(4, 40, rng.integers(3, 9))} for _ in range(3 * n)]
    return [{"options": rows[3 * i : 3 * i + 3], "label": i % 3} for i in range(n)]


def test_multiple_choice_at_first_tokens() -> None:
    objective = MultipleChoice(max_options=3, position="first")
    model = build(BERT, objective)
    batch = collate([objective.build_example(e, VOCAB, np.random.default_rng(0)) for e in choice(4)], set())
    plain, subset = (gradients(model, objective, batch, w) for w in (None, objective._readout(batch)))
    for term in plain:
        torch.testing.assert_close(subset[term], plain[term], rtol=1e-5, atol=1e-5)


def test_a_sum_of_objectives_needs_the_union_of_positions() -> None:
    one, other = Classification(class_names=("a", "b")), Regression(mean=0.0, std=1.0)
    batch = {"tokens": torch.zeros(1, 3), "class": torch.tensor([[1, IGNORE, IGNORE]]),
             "score": torch.tensor([[IGNORE, IGNORE, 2.0]])}  # fmt: skip
    needed = label_positions(one + other, batch)
    assert needed is not None
    assert needed.tolist() == [[True, False, True]]
    both = batch | {"relation": torch.tensor([[IGNORE, 0, IGNORE]])}
    pseudo = label_positions(PseudoLabels(class_names=("a", "b")), both)
    assert pseudo is not None
    assert pseudo.tolist() == [[True, True, False]]
    rows = batch | {"choice": torch.tensor([1])}
    assert label_positions(one + MultipleChoice(), rows) is None, "a label of a row does not say what its loss reads"


def test_span_boundaries_are_not_skipped() -> None:
    """The masked tokens alone would be less than half of the row, so that the last block skipped the others."""
    objective = MLM(mlm_probability=0.1) + SBO()
    model = build(BERT, objective)
    [example] = [objective.build_example({"tokens": np.arange(4, 36)}, VOCAB, np.random.default_rng(0))]
    batch = collate([example], {"labels", "boundary"})
    torch.testing.assert_close(objective.forward(model, batch)["hidden"], model(batch))
    assert (MLM().forward(model, batch)["hidden"] == 0).any()


PAIRS = [{"first": t["tokens"], "second": t["tokens"][::-1], "other": t["tokens"] + 0} for t in texts()]
PROMPTED = [{"tokens": t["tokens"], "mask": np.arange(len(t["tokens"])) >= len(t["tokens"]) // 2} for t in texts()]
PREFERENCES = [
    {"chosen_tokens": a["tokens"], "chosen_mask": a["mask"], "rejected_tokens": b["tokens"], "rejected_mask": b["mask"],
     "reference": np.array([-3.0, -4.0])}
    for a, b in zip(PROMPTED[:3], PROMPTED[3:6], strict=True)
]  # fmt: skip
OBJECTIVES: dict[str, tuple[Objective, str, list[Example], set[str]]] = {
    "mlm": (MLM(mlm_probability=0.3), "bert", texts(), {"labels"}),
    "nsp and mlm": (NSP() + MLM(), "bert", PAIRS, {"labels", "next"}),
    "rtd": (RTD(mlm_probability=0.3), "bert", texts(), {"labels", "real"}),
    "mpnet": (MPNet(mlm_probability=0.3), "mpnet", texts(), {"labels"}),
    "xlnet": (
        PLM(k=3),
        "xlnet",
        [t | {"memory_tokens": np.arange(4, 4 + i)} for i, t in enumerate(texts())],
        {"labels"},
    ),
    "prefix_lm": (PrefixLM(min_prefix=0.5, max_prefix=0.5), "decoder", texts(), {"labels"}),
    "sft": (SFT(), "decoder", PROMPTED, {"labels"}),
    "dpo": (DPO(), "decoder", PREFERENCES, {"labels"}),
    "reward": (RewardModeling(), "decoder", PREFERENCES, set()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_subset_saves_flops_for_each_objective(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and gradients with fewer FLOPs, by torch's counter; our count is never above it."""
    objective, config, examples, labels = OBJECTIVES[name]
    model = build(CONFIGS[config], objective)
    batch = collate(
        [objective.build_example(e, VOCAB, np.random.default_rng(i)) for i, e in enumerate(examples)], labels
    )
    found: dict[float, dict[str, torch.Tensor]] = {}
    ran: dict[float, float] = {}
    for share in (0.0, transformer.MAX_SUBSET_SHARE):
        monkeypatch.setattr(transformer, "MAX_SUBSET_SHARE", share)
        model.zero_grad()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            terms = objective.loss(model, objective.forward(model, batch), batch)
            sum(terms[t] for t in objective.labels).backward()  # type: ignore[union-attr]
        found[share] = terms | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        ran[share] = counter.get_total_flops()
        # Padding and heads of a few rows are run but not counted: our count is at most what is run.
        assert 0 < objective.flops(model, batch) <= ran[share]
    whole, subset = found.values()
    assert whole.keys() == subset.keys()
    for term in whole:
        torch.testing.assert_close(subset[term], whole[term], rtol=1e-4, atol=1e-5, msg=term)
    assert ran[transformer.MAX_SUBSET_SHARE] < ran[0.0]


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_flops_of_the_subset(how: str) -> None:
    """By hand: keys and values of every token in the last block, the rest where a class is read. Rows with fewer texts than
    others run as many other tokens."""
    objective = Classification(class_names=("a", "b", "c"))
    batch, n = batch_of(objective, how), [len(text["tokens"]) for text in texts()]
    width, hidden = BERT.hidden_size, BERT.intermediate_size
    whole = 4 * width**2 + 2 * width * hidden
    run = list(n)  # for each position of the last block: visible keys
    if how == "packed":
        rows = [[int((row == d).sum()) for d in row.unique() if d] for row in batch["document_ids"]]
        most = max(map(len, rows))
        assert {len(row) for row in rows} != {most}, "all rows have equally many texts: nothing is tested"
        run += [row[0] for row in rows for _ in range(most - len(row))]  # the first text's second token, its third, ...
    last = sum(n) * 2 * width**2 + len(run) * (2 * width**2 + 2 * width * hidden) + sum(run) * 2 * width
    first = sum(n) * whole + sum(k * k for k in n) * 2 * width
    assert objective.flops(build(BERT, objective), batch) == 6 * (first + last)
    model = build(CONFIGS["t5"], Classification(class_names=("a", "b", "c")).configure(DataStats, CONFIGS["t5"]))
    seen = batch_of(Classification(class_names=("a", "b", "c"), position="answer"), how)
    assert Classification(position="answer").flops(model, seen) == flops.stack_flops(model.config, flops.work(seen))


def test_dropout_keeps_the_mean_and_the_share() -> None:
    torch.manual_seed(0)
    drop, x = Dropout(0.1), torch.ones(333, 1001)
    y = drop(x)
    gone = (y == 0).float().mean().item()
    assert abs(gone - 0.1) < 6 * (0.09 / x.numel()) ** 0.5, "the share of zeros is six standard deviations off"
    assert abs(y.mean().item() - 1) < 4e-3
    kept = 65536 / (65536 - round(0.1 * 65536))
    assert y.unique().tolist() == pytest.approx([0, kept])
    # Neighbors share one random number: they must not be correlated.
    lost = (y.flatten()[: 4 * 80_000] == 0).float().view(-1, 4)
    assert torch.corrcoef(lost.T).sub(torch.eye(4)).abs().max() < 0.02
    torch.manual_seed(0)
    assert torch.equal(drop(x), y)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("length", [5, 130])
def test_attention_dropout_and_its_gradient(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the formula with the same dropout mask: in blocks of rows, with an attention mask."""
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, length, length) < 0.7
    mask |= torch.eye(length, dtype=torch.bool)
    drawn: list[torch.Tensor] = []

    def recorded(like: torch.Tensor, p: float) -> torch.Tensor:
        drawn.append(dropout_mask(like, p))
        return drawn[-1]

    monkeypatch.setattr(attention_kernels, "dropout_mask", recorded)
    out = attention_kernels.attend(q, k, v, 0.3, False, False, mask, None, 0.4)
    dropped = torch.cat([d.view(2, 3, -1, length) for d in drawn], 2)
    weights = (q @ k.mT * 0.3).masked_fill(~mask, float("-inf")).softmax(-1) * dropped
    torch.testing.assert_close(out, weights @ v)
    assert 0.3 < (dropped == 0).double().mean() < 0.5 or length == 5
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(mine, torch.autograd.grad(weights @ v, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, other)
