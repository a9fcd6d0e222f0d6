"""Loss and gradients of DPO and the reward model against TRL's trainers, on one Llama with random weights."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from firth import kernel_choice
from firth.align.precompute import precompute
from firth.align.rewards import PreferencePair, PreferencePairs, Rollout
from firth.data.collate import Batches
from firth.model.model import LM
from firth.objectives.dpo import DPO, build_comparison, ref_logprobs
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
    def sample(p: dict[str, list[int]], side: str) -> Rollout:
        return Rollout(np.array(p["prompt_ids"]), np.array(p[f"{side}_ids"]), "", True)

    return PreferencePairs([PreferencePair(sample(p, "chosen"), sample(p, "rejected"), 1.0) for p in pairs])


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
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_equals_trl(beta: float, pairs: list, source: PreferencePairs, tokenizer: object, tmp_path: Path) -> None:
    policy, frozen = (llama(seed, transformers.LlamaForCausalLM) for seed in (0, 1))
    firth_model, firth_frozen = imported(policy, tmp_path / "a"), imported(frozen, tmp_path / "b")
    trl_trainer = trainer("DPO", policy, tokenizer, tmp_path / "t", {"beta": beta}, ref_model=frozen)
    policy.eval()
    loss = trl_trainer.compute_loss(policy, trl_trainer.data_collator(pairs))
    loss.backward()

    precomputed = precompute(source, firth_frozen, build_comparison, ref_logprobs, batch_size=4)
    objective = DPO(beta=beta)
    # Two micro-batches of unequal content, which must not change the result.
    batches = Batches(
        precomputed, objective, ByteTokenizer.vocab, batch_size=PAIRS, seed=0, gradient_accumulation_steps=2
    ).batches(0)
    terms = step(firth_model, objective, batches)
    assert abs(float(terms["dpo"]) - float(loss)) < 1e-5
    logged = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert float(terms["margin"]) == pytest.approx(logged["rewards/margins"], abs=1e-5)
    assert beta * float(terms["chosen"]) == pytest.approx(logged["rewards/chosen"], abs=1e-5)
    assert beta * float(terms["rejected"]) == pytest.approx(logged["rewards/rejected"], abs=1e-5)
    assert float(terms["accuracy"]) == pytest.approx(logged["rewards/accuracies"])
    assert torch.allclose(firth_model.tokens.weight.grad, policy.model.embed_tokens.weight.grad, atol=1e-5)


def test_reward_loss_equals_trl(pairs: list, source: PreferencePairs, tokenizer: object, tmp_path: Path) -> None:
    scorer = llama(2, transformers.LlamaForSequenceClassification)
    causal_lm = llama(3, transformers.LlamaForCausalLM)
    causal_lm.model.load_state_dict(scorer.model.state_dict())
    head = torch.nn.Linear(32, 1, bias=False)
    head.weight.data.copy_(scorer.score.weight)
    firth_model = imported(causal_lm, tmp_path / "a")
    firth_model.heads["reward"] = head
    trl_trainer = trainer("Reward", scorer, tokenizer, tmp_path / "t", {})
    scorer.eval()
    whole = [{f"{side}_ids": p["prompt_ids"] + p[f"{side}_ids"] for side in ("chosen", "rejected")} for p in pairs]
    loss = trl_trainer.compute_loss(scorer, trl_trainer.data_collator(whole))
    loss.backward()

    batches = Batches(source, RewardModeling(), ByteTokenizer.vocab, batch_size=PAIRS, seed=0).batches(0)
    terms = step(firth_model, RewardModeling(), batches)
    assert abs(float(terms["reward"]) - float(loss)) < 1e-5
    logged = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
    assert float(terms["accuracy"]) == pytest.approx(logged["accuracy"])
    assert float(terms["margin"]) == pytest.approx(logged["margin"], abs=1e-5)
    assert torch.allclose(head.weight.grad, scorer.score.weight.grad, atol=1e-5)
    assert torch.allclose(firth_model.tokens.weight.grad, scorer.model.embed_tokens.weight.grad, atol=1e-5)
