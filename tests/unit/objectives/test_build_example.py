"""Inputs and labels of the pretraining and classification objectives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from firth.data.collate import Batches, collate, counted_fields, pack
from firth.data.source import Source
from firth.data.windows import Documents, SegmentPairsConfig
from firth.model.config import ModelConfig
from firth.model.config_groups import EmbeddingConfig, EncoderConfig
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective
from firth.objectives.sentence_pairs import NSP, SOP
from firth.objectives.seq2seq import SpanCorruption, replace_spans
from firth.training.step import step
from firth.types import IGNORE, NEVER, Example, UserError
from tests.support import tiny_corpus
from tests.support.objective_cases import CASES, VOCAB, pairs, some_text, special_tokens_text


@pytest.mark.parametrize("name", CASES)
def test_build_example_is_a_pure_function(name: str) -> None:
    objective, source = CASES[name]
    for seed in range(50):
        example = source(np.random.default_rng(seed))
        kept = {k: np.copy(v) for k, v in example.items()}
        shown, again = (objective.build_example(example, VOCAB, np.random.default_rng(seed)) for _ in range(2))
        assert shown.keys() == again.keys()
        assert all(np.array_equal(shown[k], again[k]) for k in shown)
        assert all(np.array_equal(example[k], kept[k]) for k in kept)
        n = len(shown["tokens"])
        fields = {*counted_fields(objective).values()}
        assert fields <= shown.keys()
        for field in fields | {"query_time", "key_time"} & shown.keys():
            assert shown[field].shape == (n,)


@pytest.mark.parametrize("name", CASES)
def test_packed_and_padded_batches_have_one_loss(name: str) -> None:
    objective, source = CASES[name]
    rng = np.random.default_rng(0)
    shown = [objective.build_example(source(rng), VOCAB, rng) for _ in range(8)]
    fields = {*counted_fields(objective).values()}
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=100, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_positions=128,
                  encoder=EncoderConfig(num_layers=int("source_tokens" in shown[0])),
                  embedding=EmbeddingConfig(type_vocab_size=2))  # fmt: skip
    model = LM(config, objective.heads(config))
    found, gradient = [], []
    for batches in (
        [collate(shown, fields)],
        [pack(shown, 72, fields)],
        [collate(shown[:3], fields), pack(shown[3:], 90, fields)],
    ):
        model.zero_grad()
        found.append({k: float(v) for k, v in step(model, objective, batches).items()})
        gradient.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other, g in zip(found[1:], gradient[1:], strict=True):
        assert other == pytest.approx(found[0], rel=1e-5)
        torch.testing.assert_close(g, gradient[0], rtol=1e-4, atol=1e-6)


def share_within(count: int, total: int, p: float, cluster: float = 1) -> bool:
    """Within 4.5 standard deviations of a binomial whose trials come in clusters of size `cluster`."""
    return abs(count - total * p) < 4.5 * (cluster * total * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("settings", [{}, {"noise": "words"}, {"num_maskings": 10}, {"noise": "geometric"}])
def test_the_three_shares_of_mlm(settings: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    selected = masked = kept = total = 0
    drawn = np.zeros(100, np.int64)
    for _ in range(3000):
        tokens = VOCAB.add_special_tokens(some_text(rng, 50))
        seen = MLM(**settings).build_example({"tokens": tokens}, VOCAB, rng)
        at = seen["labels"] != IGNORE
        assert np.array_equal(seen["labels"][at], tokens[at])
        assert np.array_equal(seen["tokens"][~at], tokens[~at])
        assert not at[[0, -1]].any()
        shown = seen["tokens"][at]
        total += 50
        selected += int(at.sum())
        masked += int((shown == VOCAB.mask).sum())
        kept += int((shown == tokens[at]).sum())
        drawn += np.bincount(shown[(shown != VOCAB.mask) & (shown != tokens[at])], minlength=100)
    if settings.get("noise") != "geometric":  # which has an exact total
        # Words of geometric length, 3 on average: their tokens are selected together, which multiplies the variance by E[n^2] / E[n] = 5.
        assert share_within(selected, total, 0.15, cluster=5 if settings.get("noise") == "words" else 1)
    random = selected - masked - kept
    assert share_within(masked, selected, 0.8)
    assert share_within(kept, selected, 0.1 + 0.1 / 75)  # a random token is the same one now and then
    assert share_within(random, selected, 0.1 * 74 / 75)
    assert drawn[:25].sum() == 0  # special tokens are never drawn
    assert ((drawn[25:] - random / 75) ** 2 / (random / 75)).sum() < 140  # 74 degrees of freedom, p = 5e-6


def test_number_of_static_and_dynamic_maskings() -> None:
    class Texts(Source):
        """Three long texts, two of them equal."""

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Example:
            return {"tokens": VOCAB.add_special_tokens(some_text(np.random.default_rng(index // 2), 60))}

    def maskings(objective: Objective) -> list[int]:
        """Number of maskings of each text in a hundred epochs, and of all texts together."""
        batches = Batches(Texts(), objective, VOCAB, batch_size=3, seed=0)
        seen: list[set[bytes]] = [set(), set(), set()]
        for epoch in range(100):
            for i, shown in enumerate(batches.shown(np.full(3, epoch), np.arange(3))):
                seen[i].add(shown["tokens"].tobytes())
        return [*map(len, seen), len(set.union(*seen))]

    assert maskings(MLM(num_maskings=10)) == [10, 10, 10, 30], "equal texts are masked differently"
    assert maskings(MLM(num_maskings=1)) == [1, 1, 1, 3]
    assert maskings(MLM()) == [100, 100, 100, 300]
    assert maskings(MLM(num_maskings=2) + SBO()) == [2, 2, 2, 6]
    with pytest.raises(UserError, match="num_maskings=-1"):
        MLM(num_maskings=-1)


def test_whole_spans_are_replaced_in_one_way() -> None:
    rng = np.random.default_rng(0)
    mixed = 0
    for objective in (MLM(noise="geometric", whole_span_replacement=True), MLM(noise="geometric")):
        mixed = 0
        for _ in range(200):
            tokens = some_text(rng, 80)
            seen = objective.build_example({"tokens": tokens}, VOCAB, rng)
            selected = seen["labels"] != IGNORE
            edges = np.flatnonzero(np.diff(selected.astype(int), prepend=0, append=0))
            for a, b in zip(edges[::2], edges[1::2], strict=True):
                masked = seen["tokens"][a:b] == VOCAB.mask
                mixed += masked.any() and not masked.all()
        assert (mixed == 0) == objective.whole_span_replacement
    assert mixed


def test_the_example_of_the_t5_paper() -> None:
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week."]
    names = [*words, "<X>", "<Y>", "<Z>"]
    gone = np.isin(words, ["for", "inviting", "last"])
    shown, target = replace_spans(np.arange(len(words)), gone, np.array([10, 11, 12]))
    assert " ".join(names[i] for i in shown) == "Thank you <X> me to your party <Y> week."
    assert " ".join(names[i] for i in target) == "<X> for inviting <Y> last <Z>"


@pytest.mark.parametrize("mask", ["#..", "..#", "###", "...", "#.#.#", ".##.##", "##..", ""])
def test_dropped_spans_can_be_put_back(mask: str) -> None:
    tokens, dropped = np.arange(25, 25 + len(mask)), np.array([c == "#" for c in mask], bool)
    shown, target = replace_spans(tokens, dropped, VOCAB.sentinels)
    answer: dict[int, list[int]] = {}
    for t in target.tolist():
        if t in VOCAB.sentinels:
            last = answer.setdefault(t, [])
        else:
            last.append(t)
    restored = [x for t in shown.tolist() for x in (answer[t] if t in VOCAB.sentinels else [t])]
    assert restored == tokens.tolist()
    assert target[-1] == VOCAB.sentinels[len(answer) - 1]
    assert answer[int(target[-1])] == []


def test_span_corruption_has_the_rows_of_t5() -> None:
    rng = np.random.default_rng(0)
    seen = SpanCorruption().build_example({"tokens": some_text(rng, 100)}, VOCAB, rng)
    # 15 tokens in 5 spans: 85 + 5 + stop; 15 + 5 + the last sentinel + stop.
    assert len(seen["source_tokens"]) == 91
    assert len(seen["labels"]) == 22
    assert seen["source_tokens"][-1] == seen["labels"][-1] == VOCAB.eos
    assert seen["tokens"][0] == VOCAB.pad
    assert np.array_equal(seen["tokens"][1:], seen["labels"][:-1])
    with pytest.raises(UserError, match=r"need 55 sentinels .*, and the tokenizer has 20"):
        SpanCorruption(noise="iid", noise_density=0.5).build_example({"tokens": some_text(rng, 200)}, VOCAB, rng)


def test_next_sentence_label_is_at_cls_and_balanced() -> None:
    rng = np.random.default_rng(0)
    num_random = 0
    for _ in range(2000):
        example = pairs(rng)
        seen = NSP().build_example(example, VOCAB, rng)
        is_random = int(seen["next"][0])
        num_random += is_random
        assert (seen["next"][1:] == IGNORE).all()
        tail = example["other" if is_random else "second"]
        assert seen["tokens"].tolist() == [2, *example["first"].tolist(), 3, *tail.tolist(), 3]
        assert seen["token_type_ids"].sum() == len(tail) + 1
    assert share_within(num_random, 2000, 0.5)


def test_bert_is_nsp_and_mlm() -> None:
    rng = np.random.default_rng(0)
    bert: Objective = NSP() + MLM()
    seen = bert.build_example(pairs(rng), VOCAB, rng)
    assert set(seen) == {"tokens", "token_type_ids", "next", "labels"}
    assert bert.labels == {"next": "next", "tokens": "labels"}
    assert seen["tokens"][0] == VOCAB.cls


def test_a_text_has_one_class_label() -> None:
    example = {"tokens": VOCAB.add_special_tokens(np.arange(30, 35)), "label": 2, "record": 5}
    first = Classification(class_names=("a", "b", "c")).build_example(example, VOCAB, np.random.default_rng(0))
    assert first["class"].tolist() == [2] + [IGNORE] * 6
    assert set(first) == {"tokens", "class"}
    last = Classification(class_names=("a", "b", "c"), position="last").build_example(
        example, VOCAB, np.random.default_rng(0)
    )
    assert last["class"].tolist() == [IGNORE] * 6 + [2]
    assert last["query_time"].tolist() == list(range(7))


def test_accuracy_counts_correct_predictions() -> None:
    objective = Classification(class_names=("a", "b"))
    config = ModelConfig(
        vocab_size=100, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8, max_positions=16
    )
    model = LM(config, objective.heads(config))
    with torch.no_grad():
        model.heads["classes"].weight.zero_()
        model.heads["classes"].bias.copy_(torch.tensor([1.0, 0.0]))
    shown = [
        objective.build_example({"tokens": np.arange(30, 34), "label": k}, VOCAB, np.random.default_rng(0))
        for k in (0, 0, 1, 0)
    ]
    assert float(step(model, objective, [collate(shown, {"class"})])["accuracy"]) == pytest.approx(0.75)


def test_invalid_settings_of_mlm_are_rejected() -> None:
    for bad in (
        {"mlm_probability": 0.0},
        {"mlm_probability": 1.0},
        {"mask_fraction": 0.95, "random_fraction": 0.1},
        {"mask_fraction": -0.1},
    ):
        with pytest.raises(
            UserError,
            match=r"(mlm_probability|mask_fraction)=\S+ (should be|and random_fraction=0.1 add up to more than 1)",
        ):
            MLM(**bad)


def test_padding_is_masked() -> None:
    rng = np.random.default_rng(0)
    shown = [MLM().build_example(special_tokens_text(rng), VOCAB, rng) for _ in range(5)]
    batch = collate(shown)
    lengths = [len(s["tokens"]) for s in shown]
    for row, n in zip(batch["key_time"], lengths, strict=True):
        assert (row[:n] == 0).all()
        assert (row[n:] == NEVER).all()


@pytest.mark.parametrize("objective", [NSP(), SOP()], ids=["nsp", "sop"])
def test_segment_lengths_do_not_reveal_the_label(objective: Objective, tmp_path: Path) -> None:
    """The source splits and the objective swaps: with one random stream for both, the lengths would reveal the label."""
    vocab = tiny_corpus.tokenizer().vocab
    source = Documents(SegmentPairsConfig(max_length=40, whole_sentences=False), tiny_corpus.store(tmp_path), vocab)
    assert len(source) > 300
    [batch] = Batches(source, objective, vocab, batch_size=len(source), seed=0).batches(0)
    ends = (batch["tokens"] == vocab.sep).int().argmax(-1)
    answers = batch[next(iter(objective.labels.values()))][:, 0]
    assert 0.4 < answers.float().mean() < 0.6
    assert abs(np.corrcoef(ends.numpy(), answers.numpy())[0, 1]) < 0.15
