"""Advantages, loss and gradients of GRPO and RLOO against TRL's trainers, on one Llama with random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firth import kernel_choice
from firth.align.advantages import AdvantageEstimator, GroupNormalized, LeaveOneOut
from firth.data.collate import collate, label_fields_of, pack
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import GRPO, PER_TOKEN, RLOO
from firth.pretrained.load_save import load_model
from firth.training.step import step
from firth.types import Example
from tests.support.byte_tokenizer import SPECIAL, ByteTokenizer

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="TRL is the oracle: pip install -e .[test]")

V, PROMPTS, GROUP, LONGEST = 64, 3, 4, 16
Tokens = list[list[int]]
Answers = tuple[Tokens, Tokens, list[float]]


def llama(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def near(model: torch.nn.Module, seed: int, std: float) -> torch.nn.Module:
    """Return a copy of a model whose weights are moved a little, so that the clip applies to some tokens and not to others."""
    moved, generator = llama(0), torch.Generator().manual_seed(seed)
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * std)
    return moved


@pytest.fixture(scope="module")
def tokenizer() -> object:
    from tokenizers import Tokenizer, models

    words = {name: i for i, name in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), V))])}
    engine = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Return a prompt for each answer, the answers, of very different lengths, and their rewards."""
    rng = np.random.default_rng(0)

    def row(least: int, most: int) -> list[int]:
        return rng.integers(len(SPECIAL), V, rng.integers(least, most)).tolist()

    prompts = [prompt for prompt in [row(1, 9) for _ in range(PROMPTS)] for _ in range(GROUP)]
    return prompts, [row(1, LONGEST) for _ in prompts], rng.normal(size=len(prompts)).round(2).tolist()


@pytest.fixture(autouse=True)
def one_kernel() -> Iterator[None]:
    with kernel_choice.forced({"attention-fp32": "blocks-64"}):
        yield


def scored(
    kind: str, model: torch.nn.Module, tokenizer: object, answers: Answers, directory: Path, settings: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Return TRL's trainer, and its batch of these answers with its own advantages."""
    from datasets import Dataset

    prompts, completions, rewards = answers
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(directory), use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False, max_completion_length=LONGEST,
        num_generations=GROUP, per_device_train_batch_size=len(prompts), per_device_eval_batch_size=len(prompts), **settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, args=config, train_dataset=Dataset.from_list([{"prompt": "w9"}] * PROMPTS), processing_class=tokenizer,
        reward_funcs=lambda **fields: rewards,
    )  # fmt: skip
    generated = getattr(trainer, "_generate")  # noqa: B009

    def fixed(texts: list[str]) -> tuple[Any, ...]:
        """Put the given answers in place of sampled ones."""
        with torch.no_grad():
            found = list(generated(texts))
        found[0], found[1] = prompts, completions
        return tuple(found)

    trainer._generate = fixed
    model.eval()
    return trainer, trainer._generate_and_score_completions([{"prompt": "w9"}] * len(prompts))


def per_token_logprobs(
    trainer: Any, policy: torch.nn.Module, weights: torch.nn.Module, batch: dict[str, Any]
) -> torch.Tensor:
    """Return the log-probabilities under other weights; TRL has fitted its own LM head into the policy."""
    own = {name: weight.clone() for name, weight in policy.state_dict().items()}
    policy.load_state_dict(weights.state_dict())
    ids, mask = (torch.cat((batch[f"prompt_{x}"], batch[f"completion_{x}"]), 1) for x in ("ids", "mask"))
    with torch.no_grad():
        found: torch.Tensor = trainer._get_per_token_logps_and_entropies(
            policy, ids, mask, batch["completion_ids"].shape[1]
        )[0]
    policy.load_state_dict(own)
    return found


def examples(answers: Answers, old: torch.Tensor, reference: torch.Tensor, advantage: np.ndarray) -> list[Example]:
    """Return firth's examples of the same answers, with the same numbers."""
    found = []
    for i, (prompt, answer) in enumerate(zip(*answers[:2], strict=True)):
        n, m = len(prompt), len(answer)
        numbers = {name: np.zeros(n + m, np.float32) for name in PER_TOKEN}
        numbers["old"][n:], numbers["reference"][n:] = old[i, :m].numpy(), reference[i, :m].numpy()
        numbers["advantage"][n:] = advantage[i, :m]
        found.append({"tokens": np.array(prompt + answer), "mask": np.arange(n + m) >= n} | numbers)
    return found


def advantages(estimator: AdvantageEstimator, answers: Answers) -> np.ndarray:
    lengths = np.array([len(answer) for answer in answers[1]])
    real = np.arange(lengths.max()) < lengths[:, None]
    rewards = np.zeros(real.shape)
    rewards[np.arange(len(lengths)), lengths - 1] = answers[2]
    return estimator(rewards, rewards, real, GROUP)[0]


def compare(
    loss: torch.Tensor, policy: torch.nn.Module, own: LM, objective: Objective, rows: list[Example], clipped: float
) -> None:
    """Compare loss and gradients, with padded rows in two micro-batches and with packed ones."""
    loss.backward()
    built = [objective.build_example(row, ByteTokenizer.vocab, np.random.default_rng(0)) for row in rows]
    fields = label_fields_of(objective)
    for batches in ([collate(built[:5], fields), collate(built[5:], fields)], [pack(built, 40, fields)]):
        own.zero_grad()
        terms = step(own, objective, batches)
        assert abs(float(terms["policy"]) - float(loss)) < 1e-5
        assert torch.allclose(own.tokens.weight.grad, policy.model.embed_tokens.weight.grad, atol=1e-5)
    assert 0 < clipped < 1, "the clip applies to some tokens and not to others"


def imported(model: torch.nn.Module, directory: Path) -> LM:
    model.save_pretrained(directory)
    return load_model(directory)


GRPO_CASES = [
    ("grpo", "token", "group", 0.0, None),
    ("dapo", "token", "batch", 0.0, 0.28),
    ("dr_grpo", "token", "none", 0.0, None),
    ("grpo", "sequence", "group", 0.0, None),
    ("dapo", "token", "group", 0.3, None),
    ("grpo", "sequence", "none", 0.3, 0.28),
]


@pytest.mark.slow
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize(("loss_type", "level", "scale", "beta", "high"), GRPO_CASES)
def test_grpo_equals_trl(
    loss_type: str, level: str, scale: str, beta: float, high: float | None, bias_correction: bool, answers: Any, tokenizer: object,
    tmp_path: Path,
) -> None:  # fmt: skip
    policy = llama(0)
    old, frozen = near(policy, 1, 0.02), near(policy, 2, 0.05)
    own = imported(policy, tmp_path / "a")
    settings = {
        "loss_type": loss_type, "importance_sampling_level": level, "scale_rewards": scale, "epsilon_high": high,
        "use_bias_correction_kl": bias_correction,
    }  # fmt: skip
    trainer, batch = scored("GRPO", policy, tokenizer, answers, tmp_path / "t", settings)
    trainer.beta = beta  # as a setting, it would read the reference from a hub
    ours = advantages(GroupNormalized(scale), answers)  # type: ignore[arg-type]
    assert np.allclose(ours[:, 0], batch["advantages"].numpy(), atol=1e-5)
    batch["old_per_token_logps"], batch["ref_per_token_logps"] = (
        per_token_logprobs(trainer, policy, model, batch) for model in (old, frozen)
    )
    loss = trainer._compute_loss(policy, batch)
    clipped = trainer._metrics["eval"]["clip_ratio/region_mean"][-1]
    objective = GRPO(
        loss_type=loss_type, importance_sampling_level=level, beta=beta, clip_range_high=high, normalizer=LONGEST,
        use_bias_correction_kl=bias_correction,  # type: ignore[arg-type]
    )  # fmt: skip
    rows = examples(answers, batch["old_per_token_logps"], batch["ref_per_token_logps"], ours)
    compare(loss, policy, own, objective, rows, clipped)


@pytest.mark.slow
def test_rloo_equals_trl(answers: Any, tokenizer: object, tmp_path: Path) -> None:
    policy = llama(0)
    old = near(policy, 1, 0.007)
    own = imported(policy, tmp_path / "a")
    trainer, batch = scored("RLOO", policy, tokenizer, answers, tmp_path / "t", {"beta": 0.0})
    ours = advantages(LeaveOneOut(), answers)
    assert np.allclose(ours[:, 0], batch["advantages"].numpy(), atol=1e-5)
    before = per_token_logprobs(trainer, policy, old, batch)
    batch["old_logps"] = (before * batch["completion_mask"]).sum(1)
    loss = trainer._compute_loss(policy, batch)
    clipped = trainer._metrics["eval"]["clip_ratio/region_mean"][-1]
    compare(loss, policy, own, RLOO(), examples(answers, before, torch.zeros_like(before), ours), clipped)
