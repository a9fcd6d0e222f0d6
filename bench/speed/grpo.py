"""Speed of GRPO, rollout and step together, against TRL's trainer.

    python -m bench.speed.grpo
    python -m bench.speed.grpo --check     # equal prompts and lengths of answers; no timing

Both train the same Llama with random weights (6 layers, hidden size 384, vocabulary 8192) with AdamW. A step samples eight
answers of 48 tokens to each of two prompts of about 36 tokens, at temperature 1, scores them by the same function of their text,
and takes one step on them with beta 0.04, which needs the log-probabilities of the frozen start. A unit is an answer. Random
weights give the stop token a probability of 1 in 8,192, so that nearly all answers have the full length.

TRL runs without gradient checkpointing in fp32, with bf16 autocast, and with weights in bf16. firth runs its own loop, with its
log and counts, in the precision that it chooses on this machine.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.harness import Candidate, EndSample, arguments, command
from bench.speed.preferences import EOS, comparisons, llama, text_of, word_tokenizer

PROMPTS, GENERATIONS, LENGTH, STEPS_PER_SAMPLE = 2, 8, 48, 2
BETA = 0.04


def score(text: str) -> float:
    """Return the share of different words in an answer."""
    words = text.split()
    return len(set(words)) / max(1, len(words))


def prompts() -> list[str]:
    return [text_of(prompt) for prompt, _, _ in comparisons()]


@contextmanager
def trainer(end_sample: EndSample | None, dtype: torch.dtype = torch.float32, **options: Any) -> Iterator[Any]:
    """Build TRL's trainer; a sample is STEPS_PER_SAMPLE steps."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class EndSampleCallback(TrainerCallback):
        def on_step_end(self, args: object, state: Any, control: object, **rest: object) -> None:
            if end_sample is not None and state.global_step % STEPS_PER_SAMPLE == 0:
                end_sample(STEPS_PER_SAMPLE * PROMPTS * GENERATIONS)

    def reward(completions: list[str], **_: object) -> list[float]:
        return [score(text) for text in completions]

    with tempfile.TemporaryDirectory() as directory:
        settings = trl.GRPOConfig(
            output_dir=directory, per_device_train_batch_size=PROMPTS * GENERATIONS, num_generations=GENERATIONS,
            max_completion_length=LENGTH, steps_per_generation=1, beta=BETA, temperature=1.0, max_steps=1_000_000, use_cpu=True,
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_strategy="no", report_to=[], **options,
        )  # fmt: skip
        model = llama("dpo")
        model.save_pretrained(f"{directory}/start")
        model = type(model).from_pretrained(f"{directory}/start", dtype=dtype)
        yield trl.GRPOTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list([{"prompt": text} for text in prompts()]),
            reward_funcs=reward, processing_class=word_tokenizer(), callbacks=[EndSampleCallback()],
        )  # fmt: skip


def theirs(end_sample: EndSample, **options: Any) -> None:
    with trainer(end_sample, **options) as loop:
        loop.train()


def firth_setup() -> tuple[Any, Any, Any]:
    """Return (model, objective, batches) as `firth train grpo` builds them."""
    from firth.align.advantages import GroupNormalized
    from firth.align.rewards import FunctionReward
    from firth.align.rollouts import RolloutsConfig, RolloutSource
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.policy_gradient import GRPO
    from firth.pretrained.load_save import init_from, load_model
    from firth.tokenizer.tokenizer import Tokenizer

    objective = GRPO(beta=BETA)
    with tempfile.TemporaryDirectory() as directory:
        llama("dpo").save_pretrained(directory)
        word_tokenizer().save_pretrained(directory)
        reference, tokenizer = load_model(Path(directory)), Tokenizer.load(Path(directory))
        model = LM(reference.config, objective.heads(reference.config))
        init_from(model, Path(directory))
    rows = PROMPTS * GENERATIONS
    config = RolloutsConfig(
        rollout_size=rows,
        num_generations=GENERATIONS,
        num_epochs=1,
        max_new_tokens=LENGTH,
        kl_coef=0.0,
        advantages="grpo",
    )
    source = RolloutSource(
        [tokenizer.encode(text) for text in prompts()], tokenizer, FunctionReward(score), reference, config=config, steps=1,
        advantage_estimator=GroupNormalized(), stops=[EOS],
    )  # fmt: skip
    return model, objective, Batches(source, objective, tokenizer.vocab, batch_size=rows, seed=0)


def firth(end_sample: EndSample) -> None:
    from bench.speed.causal import firth_run

    firth_run(end_sample, "adamw", lambda _: STEPS_PER_SAMPLE * PROMPTS * GENERATIONS, firth_setup(), STEPS_PER_SAMPLE)


CANDIDATES: dict[str, Candidate] = {
    "TRL, fp32": functools.partial(theirs, bf16=False),
    "TRL, bf16": functools.partial(theirs, bf16=True),
    "TRL, bf16 weights": functools.partial(theirs, bf16=False, dtype=torch.bfloat16),
    "firth": firth,
}


def check() -> None:
    """Assert that both sides answer the same prompts with answers of the same length."""
    model, _, batches = firth_setup()
    batches.source.prepare(model, 0)
    ours = batches.source.samples
    assert {len(sample.prompt) for sample in ours} <= {len(text.split()) for text in prompts()}
    lengths = [len(sample.answer) for sample in ours]
    with trainer(None, bf16=False) as loop:
        inputs = [loop.train_dataset[i // GENERATIONS] for i in range(PROMPTS * GENERATIONS)]
        made = loop._generate_and_score_completions(inputs)
        theirs_lengths = made["completion_mask"].sum(1).tolist()
        assert [int(row.sum()) for row in made["prompt_mask"]] == [len(row["prompt"].split()) for row in inputs]
        assert "ref_per_token_logps" in made
    print(f"answers of {sum(lengths) / len(lengths):.1f} and {sum(theirs_lengths) / len(theirs_lengths):.1f} tokens")
    assert abs(sum(lengths) - sum(theirs_lengths)) < 0.1 * sum(lengths)


def main() -> None:
    args = arguments(__doc__, CANDIDATES).parse_args()
    if args.check:
        check()
    else:
        command(args, CANDIDATES, unit="answers")


if __name__ == "__main__":
    main()
