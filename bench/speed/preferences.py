"""Training speed on preference pairs: a reward model and DPO, against TRL's trainers.

    python -m bench.speed.preferences reward
    python -m bench.speed.preferences dpo
    python -m bench.speed.preferences dpo --check     # equal tokens, first losses of ln 2; no timing

All train the same Llama with random weights (6 layers, hidden size 384, vocabulary 8192) with AdamW on the same sampled
pairs, 8 per step: prompts of about 36 tokens and answers of about 48, lengths log-normal, no dropout. A unit is a pair.
TRL's trainer runs with its defaults (bf16, gradient checkpointing), and without checkpointing in fp32, with bf16 autocast, and with
weights in bf16. firth
computes the reference log-probabilities of DPO once before training; TRL computes them in every step by default, and once
before training (`precompute_ref_log_probs`) in the others. Work before training is not timed on either side.

firth runs its own loop, with its log and counts, in the precision that it chooses on this machine.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.harness import Candidate, EndSample, arguments, command
from bench.speed.causal import HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS, VOCAB_SIZE, firth_run

Task = Literal["reward", "dpo"]
COMPARISONS, ROWS, STEPS_PER_SAMPLE = 256, 8, 4
PAD, UNK, EOS, FIRST = 0, 1, 2, 3
MAX_LENGTH = 128


@functools.cache
def comparisons() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return triples of prompt, preferred and rejected answer; an answer ends with EOS."""
    rng = np.random.default_rng(0)
    probabilities = 1 / np.arange(1, VOCAB_SIZE - FIRST + 1)
    probabilities /= probabilities.sum()

    def sample(median: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(math.log(median), 0.6), 2, MAX_LENGTH - 1))
        return rng.choice(np.arange(FIRST, VOCAB_SIZE), length, p=probabilities)

    return [(sample(30), *(np.append(sample(40), EOS) for _ in range(2))) for _ in range(COMPARISONS)]  # type: ignore[misc]


def llama(task: Task) -> Any:
    """Return the model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=1024, num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS,
        max_position_embeddings=2 * MAX_LENGTH, tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=None,
        eos_token_id=EOS, num_labels=1,
    )  # fmt: skip
    return (LlamaForCausalLM if task == "dpo" else LlamaForSequenceClassification)(config)


# ------------------------------------------------------------------------------- TRL


NAMES = ("<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(FIRST, VOCAB_SIZE)))


def text_of(ids: np.ndarray) -> str:
    """Return the text of some ids, without stop tokens."""
    return " ".join(NAMES[i] for i in ids if i != EOS)


def word_tokenizer() -> Any:
    """Return a tokenizer of transformers with a word for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    engine = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@contextmanager
def trainer(
    task: Task, end_sample: EndSample | None, dtype: torch.dtype = torch.float32, **options: Any
) -> Iterator[Any]:
    """Build TRL's trainer on the pairs; a sample is STEPS_PER_SAMPLE steps."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    rows = [
        {"prompt": text_of(prompt), "chosen": f" {text_of(one)}", "rejected": f" {text_of(other)}"}
        for prompt, one, other in comparisons()
    ]
    if task == "reward":
        rows = [
            {f"{k}_ids": [*prompt.tolist(), *answer.tolist()] for k, answer in (("chosen", one), ("rejected", other))}
            for prompt, one, other in comparisons()
        ]

    class EndSampleCallback(TrainerCallback):
        def on_step_end(self, args: object, state: Any, control: object, **rest: object) -> None:
            if end_sample is not None and state.global_step % STEPS_PER_SAMPLE == 0:
                end_sample(STEPS_PER_SAMPLE * ROWS)

    kind = "DPO" if task == "dpo" else "Reward"
    with tempfile.TemporaryDirectory() as directory:
        settings = getattr(trl, f"{kind}Config")(
            output_dir=directory, per_device_train_batch_size=ROWS, max_steps=1_000_000, use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", report_to=[], **options,
        )  # fmt: skip
        model = llama(task).to(dtype)
        if task == "dpo":  # TRL loads the reference model from the directory of the model
            model.save_pretrained(f"{directory}/start")
            model = type(model).from_pretrained(f"{directory}/start", dtype=dtype)
        yield getattr(trl, f"{kind}Trainer")(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(),
            callbacks=[EndSampleCallback()],
        )  # fmt: skip


def theirs(end_sample: EndSample, task: Task, **options: Any) -> None:
    with trainer(task, end_sample, **options) as loop:
        loop.train()


# ------------------------------------------------------------------------------- firth


def firth_setup(task: Task) -> tuple[Any, Any, Any]:
    """Return (model, objective, batches) as `firth train reward_model` and `firth train dpo` build them."""
    from firth.align.precompute import precompute
    from firth.align.rewards import PreferencePair, PreferencePairs, Rollout
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.preferences import DPO, build_comparison, ref_logprobs
    from firth.objectives.reward_model import RewardModeling
    from firth.pretrained.load_save import init_from, load_model
    from firth.tokenizer.vocab import Vocab
    from firth.training.device import casts, choose_precision

    cpu = torch.device("cpu")
    source: Any = PreferencePairs(
        [
            PreferencePair(Rollout(prompt, one, "", True), Rollout(prompt, other, "", True), 1.0)
            for prompt, one, other in comparisons()
        ]
    )
    objective: Any = DPO() if task == "dpo" else RewardModeling()
    with tempfile.TemporaryDirectory() as directory:
        llama("dpo").save_pretrained(directory)
        config = load_model(Path(directory)).config
        torch.manual_seed(0)
        model = LM(config, objective.heads(config))
        init_from(model, Path(directory))
    if task == "dpo":
        with casts(choose_precision("auto", cpu), cpu)():
            source = precompute(source, model, build_comparison, ref_logprobs)
    roles = {"pad": PAD, "unk": UNK, "eos": EOS}
    return (
        model,
        objective,
        Batches(source, objective, Vocab(VOCAB_SIZE, roles, np.arange(VOCAB_SIZE) < FIRST), batch_size=ROWS, seed=0),
    )


def firth(end_sample: EndSample, task: Task) -> None:
    firth_run(end_sample, "adamw", lambda _: STEPS_PER_SAMPLE * ROWS, firth_setup(task), STEPS_PER_SAMPLE)


def candidates(task: Task) -> dict[str, Candidate]:
    """Return the candidates for a task."""
    plain: dict[str, Any] = {"gradient_checkpointing": False}
    if task == "dpo":
        plain["precompute_ref_log_probs"] = True
    bind = functools.partial
    return {
        "TRL, defaults": bind(theirs, task=task),
        "TRL, fp32": bind(theirs, task=task, bf16=False, **plain),
        "TRL, bf16": bind(theirs, task=task, bf16=True, **plain),
        "TRL, bf16 weights": bind(theirs, task=task, bf16=False, dtype=torch.bfloat16, **plain),
        "firth": bind(firth, task=task),
    }


def check(task: Task) -> None:
    """Assert that both sides read the same tokens, and that their first losses are near ln 2."""
    from firth.training.step import step

    model, objective, batches = firth_setup(task)
    [batch] = batches.batches(0)
    ours = float(step(model, objective, [batch])[task])
    with trainer(task, None, bf16=False, gradient_checkpointing=False) as loop:
        rows = [loop.train_dataset[i] for i in range(COMPARISONS)]
        for row, (prompt, one, other) in zip(rows, comparisons(), strict=True):
            prefix = row.get("prompt_ids", [])
            assert prefix + row["chosen_ids"] == [*prompt.tolist(), *one.tolist()]
            assert prefix + row["rejected_ids"] == [*prompt.tolist(), *other.tolist()]
        loss = float(loop.compute_loss(loop.model, loop.data_collator(rows[:ROWS])).detach())
    for value in (ours, loss):
        assert abs(value - math.log(2)) < (1e-3 if task == "dpo" else 0.5), (ours, loss)
    tokens = np.mean([len(prompt) * 2 + len(one) + len(other) for prompt, one, other in comparisons()])
    print(f"{COMPARISONS} equal comparisons of {tokens:.0f} tokens; first losses {ours:.4f} and {loss:.4f}")


def main() -> None:
    parser = arguments(__doc__, candidates("dpo"))
    parser.add_argument("task", choices=("reward", "dpo"))
    args = parser.parse_args()
    if args.check:
        check(args.task)
    else:
        command(args, candidates(args.task), unit="comparisons")


if __name__ == "__main__":
    main()
