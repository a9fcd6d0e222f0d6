"""Loss and gradients of preference optimization and the reward model against TRL's trainers, on one Llama with random weights."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from firth import kernel_choice
from firth.align.precompute import precompute
from firth.align.rewards import PreferencePair, PreferencePairs, Rollout
from firth.data.collate import Batches
from firth.data.source import Source
from firth.model.model import LM
from firth.objectives.preferences import DPO, KTO, ORPO, SimPO, build_comparison, build_mismatched, ref_logprobs
from firth.objectives.reward_model import RewardModeling
from firth.pretrained.load_save import load_model
from firth.training.step import step
from tests.support.byte_tokenizer import SPECIAL, ByteTokenizer

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="TRL is the oracle: pip install -e .[test]")

V = 64
PAIRS = 6


def llama(seed: int, kind: type) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, num_labels=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return kind(config)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from tokenizers import Tokenizer, models

    words = {name: i for i, name in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), V))])}
    engine = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, list[int]]]:
    """Return prompts and two answers each, of very different lengths."""
    rng = np.random.default_rng(0)

    def row(least: int, most: int) -> list[int]:
        return rng.integers(len(SPECIAL), V, rng.integers(least, most)).tolist()

    return [{"prompt_ids": row(1, 12), "chosen_ids": row(1, 20), "rejected_ids": row(1, 20)} for _ in range(PAIRS)]


@pytest.fixture(scope="module")
def source(pairs: list[dict[str, list[int]]]) -> PreferencePairs:
    return pairs_source(pairs)


def trainer(
    kind: str, model: torch.nn.Module, tokenizer: object, directory: Path, settings: dict, **extra: object
) -> object:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "w9", "chosen": "w10", "rejected": "w11"}] * 2)
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(directory), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
        max_length=None, **settings,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, **extra
    )


def imported(model: torch.nn.Module, directory: Path) -> LM:
    model.save_pretrained(directory)
    return load_model(directory)


@pytest.fixture(autouse=True)
def one_kernel() -> Iterator[None]:
    """Fix the order of additions on every CPU: kernels differ in the last bit of sums of about -60, which beta doubles."""
    with kernel_choice.forced({"attention-fp32": "blocks-64"}):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_equals_trl(
    beta: float, loss_type: str, pairs: list, source: PreferencePairs, tokenizer: object, tmp_path: Path
) -> None:
    policy, frozen = (llama(seed, transformers.LlamaForCausalLM) for seed in (0, 1))
    firth_model, firth_frozen = imported(policy, tmp_path / "a"), imported(frozen, tmp_path / "b")
    settings = {"beta": beta, "loss_type": loss_type}
    trl_trainer = trainer("DPO", policy, tokenizer, tmp_path / "t", settings, ref_model=frozen)
    policy.eval()
    loss = trl_trainer.compute_loss(policy, trl_trainer.data_collator(pairs))
    loss.backward()

    precomputed = precompute(source, firth_frozen, build_comparison, ref_logprobs, batch_size=4)
    objective = DPO(beta=beta, loss_type=loss_type)  # type: ignore[arg-type]
    # Two micro-batches of unequal content, which must not change the result.
    batches = Batches(
        precomputed, objective, ByteTokenizer.vocab, batch_size=PAIRS, seed=0, gradient_accumulation_steps=2
    ).batches(0)
    terms = step(firth_model, objective, batches)
    assert abs(float(terms["dpo"]) - float(loss.detach())) < 1e-5
    logged = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert float(terms["margin"]) == pytest.approx(logged["rewards/margins"], abs=1e-5)
    assert beta * float(terms["chosen"]) == pytest.approx(logged["rewards/chosen"], abs=1e-5)
    assert beta * float(terms["rejected"]) == pytest.approx(logged["rewards/rejected"], abs=1e-5)
    assert float(terms["accuracy"]) == pytest.approx(logged["rewards/accuracies"])
    assert torch.allclose(firth_model.tokens.weight.grad, policy.model.embed_tokens.weight.grad, atol=1e-5)


def reference_free_batch(pairs: list) -> dict[str, torch.Tensor]:
    """Return the batch that TRL's ORPO and CPO trainers read: both answers after the prompt, without its labels."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [p["prompt_ids"] + p[f"{side}_ids"] for p in pairs]
        longest = max(map(len, rows))
        tokens, labels = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), -100)
        for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            labels[i, len(pair["prompt_ids"]) : len(row)] = torch.tensor(pair[f"{side}_ids"])
        batch |= {f"{side}_input_ids": tokens, f"{side}_labels": labels}
        batch[f"{side}_attention_mask"] = (torch.arange(longest) < torch.tensor([[len(r)] for r in rows])).long()
    return batch


def reference_free_trainer(kind: str, model: torch.nn.Module, tokenizer: object, directory: Path, **settings: object):
    """Return TRL's ORPO or CPO trainer, which are in `trl.experimental`."""
    import importlib

    from datasets import Dataset

    module = importlib.import_module(f"trl.experimental.{kind.lower()}")
    rows = Dataset.from_list([{"prompt": "w9", "chosen": "w10", "rejected": "w11"}] * 2)
    config = getattr(module, f"{kind}Config")(
        output_dir=str(directory), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False, max_length=64,
        **settings,
    )  # fmt: skip
    return getattr(module, f"{kind}Trainer")(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def pair_step(model: LM, objective: object, source: object) -> dict[str, torch.Tensor]:
    """Return the terms of one step in two micro-batches, with the gradients in the model."""
    batches = Batches(
        source, objective, ByteTokenizer.vocab, batch_size=PAIRS, seed=0, gradient_accumulation_steps=2
    ).batches(0)
    return step(model, objective, batches)


def pairs_source(pairs: list) -> PreferencePairs:
    def rollout(p: dict, side: str) -> Rollout:
        return Rollout(np.array(p["prompt_ids"]), np.array(p[f"{side}_ids"]), "", True)

    return PreferencePairs([PreferencePair(rollout(p, "chosen"), rollout(p, "rejected"), 1.0) for p in pairs])


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trl(smoothing: float, pairs: list, tokenizer: object, tmp_path: Path) -> None:
    policy = llama(0, transformers.LlamaForCausalLM)
    firth_model = imported(policy, tmp_path / "a")
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0, "label_smoothing": smoothing}
    trl_trainer = reference_free_trainer("CPO", policy, tokenizer, tmp_path / "t", **settings)
    policy.eval()
    loss, logged = trl_trainer.get_batch_loss_metrics(policy, reference_free_batch(pairs))
    loss.backward()
    terms = pair_step(firth_model, SimPO(beta=2.0, gamma=0.7, label_smoothing=smoothing), pairs_source(pairs))
    assert abs(float(terms["simpo"]) - float(loss.detach())) < 1e-5
    assert float(terms["margin"]) == pytest.approx(logged["rewards/margins"], abs=1e-5)
    assert float(terms["chosen_logprob"]) == pytest.approx(logged["logps/chosen"], abs=1e-5)
    assert float(terms["accuracy"]) == pytest.approx(logged["rewards/accuracies"])
    assert torch.allclose(firth_model.tokens.weight.grad, policy.model.embed_tokens.weight.grad, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["one token", "long"])
def test_orpo_equals_trl(prompt: str, pairs: list, tokenizer: object, tmp_path: Path) -> None:
    """TRL's cross-entropy covers the prompt too, so the whole loss is equal where a prompt is one token."""
    if prompt == "one token":
        pairs = [p | {"prompt_ids": p["prompt_ids"][:1]} for p in pairs]
    policy = llama(0, transformers.LlamaForCausalLM)
    firth_model = imported(policy, tmp_path / "a")
    trl_trainer = reference_free_trainer("ORPO", policy, tokenizer, tmp_path / "t", beta=0.3)
    policy.eval()
    loss, logged = trl_trainer.get_batch_loss_metrics(policy, reference_free_batch(pairs))
    terms = pair_step(firth_model, ORPO(beta=0.3), pairs_source(pairs))
    assert float(terms["odds"]) == pytest.approx(-0.3 * logged["log_odds_ratio"], abs=1e-5)
    assert float(terms["margin"]) == pytest.approx(logged["rewards/margins"], abs=1e-5)
    assert float(terms["chosen_logprob"]) == pytest.approx(logged["logps/chosen"], abs=1e-5)
    if prompt == "one token":
        loss.backward()
        assert float(terms["tokens"]) == pytest.approx(logged["nll_loss"], abs=1e-5)
        assert abs(float(terms["tokens"] + terms["odds"]) - float(loss.detach())) < 1e-5
        assert torch.allclose(firth_model.tokens.weight.grad, policy.model.embed_tokens.weight.grad, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "clamped"), [((0, 1), False), ((1, 0), True)])
def test_kto_equals_trl(seeds: tuple, clamped: bool, pairs: list, tokenizer: object, tmp_path: Path) -> None:
    """The estimate of the KL has the opposite sign if policy and reference are exchanged: one of the two is clamped to 0."""
    from datasets import Dataset

    policy, frozen = (llama(seed, transformers.LlamaForCausalLM) for seed in seeds)
    firth_model, firth_frozen = imported(policy, tmp_path / "a"), imported(frozen, tmp_path / "b")
    config = trl.KTOConfig(
        output_dir=str(tmp_path / "t"), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
        max_length=None, beta=0.5, desirable_weight=1.3, undesirable_weight=0.8, per_device_train_batch_size=2,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "w9", "completion": "w10", "label": True}] * 2)
    trl_trainer = trl.KTOTrainer(
        model=policy, ref_model=frozen, args=config, train_dataset=rows, processing_class=tokenizer
    )
    policy.eval()
    labels = [True, False, True, True, False, True]
    answers = [p["chosen_ids"] for p in pairs]
    other = [*answers[1:], answers[0]]
    theirs = [
        {"prompt_ids": p["prompt_ids"], "completion_ids": a, "KL_completion_ids": b, "label": label}
        for p, a, b, label in zip(pairs, answers, other, labels, strict=True)
    ]
    loss = trl_trainer.compute_loss(policy, trl_trainer.data_collator(theirs))
    loss.backward()

    def row(prompt: list[int], answer: list[int], prefix: str) -> dict[str, np.ndarray]:
        tokens = np.array(prompt + answer)
        return {f"{prefix}tokens": tokens, f"{prefix}mask": np.arange(len(tokens)) >= len(prompt)}

    examples = [
        row(p["prompt_ids"], a, "") | row(p["prompt_ids"], b, "mismatched_") | {"desirable": np.array([label])}
        for p, a, b, label in zip(pairs, answers, other, labels, strict=True)
    ]
    precomputed = precompute(ListSource(examples), firth_frozen, build_mismatched, ref_logprobs, batch_size=4)
    objective = KTO(beta=0.5, desirable_weight=1.3, undesirable_weight=0.8)
    [batch] = Batches(precomputed, objective, ByteTokenizer.vocab, batch_size=PAIRS, seed=0).batches(0)
    terms = step(firth_model, objective, [batch])
    logged = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert abs(float(terms["kto"]) - float(loss.detach())) < 1e-5
    assert float(terms["kl_per_answer"]) == pytest.approx(logged["kl"], abs=1e-5)
    assert (logged["kl"] == 0) == clamped
    assert 0.5 * float(terms["chosen"]) == pytest.approx(logged["rewards/chosen"], abs=2e-5)
    assert 0.5 * float(terms["rejected"]) == pytest.approx(logged["rewards/rejected"], abs=2e-5)
    assert torch.allclose(firth_model.tokens.weight.grad, policy.model.embed_tokens.weight.grad, atol=1e-5)


class ListSource(Source):
    """Examples in a list."""

    def __init__(self, examples: list) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.examples[index]


@pytest.mark.parametrize(("margin_weight", "center"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.05), (1.0, 0.05)])
def test_reward_loss_equals_trl(
    margin_weight: float, center: float, pairs: list, tokenizer: object, tmp_path: Path
) -> None:
    margins = [0.5, 1.5, 0.0, 2.0, -0.5, 1.0]
    source = PreferencePairs(
        [dataclasses.replace(pair, margin=m) for pair, m in zip(pairs_source(pairs).pairs, margins, strict=True)]
    )
    scorer = llama(2, transformers.LlamaForSequenceClassification)
    causal_lm = llama(3, transformers.LlamaForCausalLM)
    causal_lm.model.load_state_dict(scorer.model.state_dict())
    head = torch.nn.Linear(32, 1, bias=False)
    head.weight.data.copy_(scorer.score.weight)
    firth_model = imported(causal_lm, tmp_path / "a")
    firth_model.heads["reward"] = head
    settings = {"center_rewards_coefficient": center or None}
    trl_trainer = trainer("Reward", scorer, tokenizer, tmp_path / "t", settings)
    scorer.eval()
    whole = [{f"{side}_ids": p["prompt_ids"] + p[f"{side}_ids"] for side in ("chosen", "rejected")} for p in pairs]
    if margin_weight:
        whole = [row | {"margin": margin_weight * m} for row, m in zip(whole, margins, strict=True)]
    loss = trl_trainer.compute_loss(scorer, trl_trainer.data_collator(whole))
    loss.backward()

    objective = RewardModeling(margin_weight=margin_weight, center_rewards_coefficient=center)
    terms = pair_step(firth_model, objective, source)
    assert abs(float(sum(terms[t] for t in objective.labels)) - float(loss.detach())) < 1e-5
    logged = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert float(terms["accuracy"]) == pytest.approx(logged["accuracy"])
    assert float(terms["margin"]) == pytest.approx(logged["margin"], abs=1e-5)
    assert torch.allclose(head.weight.grad, scorer.score.weight.grad, atol=1e-5)
    assert torch.allclose(firth_model.tokens.weight.grad, scorer.model.embed_tokens.weight.grad, atol=1e-5)
