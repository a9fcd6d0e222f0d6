"""Training speed on comparisons of answers: a reward model and DPO, against TRL's trainers.

    python -m bench.preferences reward
    python -m bench.preferences dpo
    python -m bench.preferences dpo --check     # equal tokens, first losses of ln 2; no timing

All train the same Llama of random weights (6 layers, width 384, vocabulary 8192) with AdamW on the same drawn comparisons, 16
a step: prompts of about 36 tokens and answers of about 48, lengths log-normal, no dropout. A unit is a comparison. TRL's trainer
runs as it comes (bf16, checkpointed activations), and without checkpointing in fp32 and in bf16. Log-probabilities of DPO's
reference are computed once before training on firth's side; TRL's computes them in every step as it comes, and once before
training (`precompute_ref_log_probs`) in the other two. What is done before training is not timed on either side.

firth runs its own loop, with its log and counts, in the precision that it chooses by itself on this machine.
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

from bench.causal import DEPTH, HEADS, VOCAB, WIDTH, firth_run
from bench.harness import Candidate, EndSample, arguments, command

Task = Literal["reward", "dpo"]
COMPARISONS, ROWS, STEPS_PER_SAMPLE = 256, 16, 4
PAD, UNK, EOS, FIRST = 0, 1, 2, 3
LONGEST = 128


@functools.cache
def comparisons() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prompt, preferred and rejected answer; an answer ends with EOS."""
    rng = np.random.default_rng(0)
    chance = 1 / np.arange(1, VOCAB - FIRST + 1)
    chance /= chance.sum()

    def drawn(middle: int) -> np.ndarray:
        length = int(np.clip(rng.lognormal(math.log(middle), 0.6), 2, LONGEST - 1))
        return rng.choice(np.arange(FIRST, VOCAB), length, p=chance)

    return [(drawn(30), *(np.append(drawn(40), EOS) for _ in range(2))) for _ in range(COMPARISONS)]  # type: ignore[misc]


def llama(task: Task) -> Any:
    """The model in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        max_position_embeddings=2 * LONGEST, tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=None,
        eos_token_id=EOS, num_labels=1,
    )  # fmt: skip
    return (LlamaForCausalLM if task == "dpo" else LlamaForSequenceClassification)(config)


# ------------------------------------------------------------------------------- TRL


@contextmanager
def trainer(task: Task, end_sample: EndSample | None, **chosen: Any) -> Iterator[Any]:
    """TRL's trainer on the comparisons; a turn is SHARE steps."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    names = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(FIRST, VOCAB))]
    engine = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    def text(ids: np.ndarray) -> str:
        return " ".join(names[i] for i in ids if i != EOS)

    rows = [
        {"prompt": text(prompt), "chosen": f" {text(one)}", "rejected": f" {text(other)}"}
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
            disable_tqdm=True, logging_strategy="no", report_to=[], **chosen,
        )  # fmt: skip
        model = llama(task)
        if task == "dpo":  # the reference is read from where the model came from
            model.save_pretrained(f"{directory}/start")
            model = type(model).from_pretrained(f"{directory}/start")
        yield getattr(trl, f"{kind}Trainer")(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[EndSampleCallback()],
        )  # fmt: skip


def theirs(end_sample: EndSample, task: Task, **chosen: Any) -> None:
    with trainer(task, end_sample, **chosen) as made:
        made.train()


# ------------------------------------------------------------------------------- firth


def firth_setup(task: Task) -> tuple[Any, Any, Any]:
    """(model, objective, batches): what `firth train reward_model` and `firth train dpo` build."""
    from firth.align.precompute import precompute
    from firth.align.rewards import PreferencePair, PreferencePairs, Rollout
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.dpo import DPO, build_comparison, ref_logprobs
    from firth.objectives.reward_model import RewardModeling
    from firth.pretrained.load_save import init_from, load_model
    from firth.tokenizer.vocab import Vocab
    from firth.train.precision import casts, choose

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
        with casts(choose("auto", cpu), cpu)():
            source = precompute(source, model, build_comparison, ref_logprobs)
    roles = {"pad": PAD, "unk": UNK, "eos": EOS}
    return (
        model,
        objective,
        Batches(source, objective, Vocab(VOCAB, roles, np.arange(VOCAB) < FIRST), batch_size=ROWS, seed=0),
    )


def firth(end_sample: EndSample, task: Task) -> None:
    firth_run(end_sample, "adamw", lambda _: STEPS_PER_SAMPLE * ROWS, firth_setup(task), STEPS_PER_SAMPLE)


def candidates(task: Task) -> dict[str, Candidate]:
    """Everybody who trains this."""
    plain: dict[str, Any] = {"gradient_checkpointing": False}
    if task == "dpo":
        plain["precompute_ref_log_probs"] = True
    arm = functools.partial
    return {
        "TRL as it comes": arm(theirs, task=task),
        "TRL, fp32": arm(theirs, task=task, bf16=False, **plain),
        "TRL, bf16": arm(theirs, task=task, bf16=True, **plain),
        "firth": arm(firth, task=task),
    }


def check(task: Task) -> None:
    """Both sides read the same tokens, and begin with a loss near ln 2."""
    from firth.train.step import step

    model, objective, batches = firth_setup(task)
    [batch] = batches.batches(0)
    mine = float(step(model, objective, [batch])[task])
    with trainer(task, None, bf16=False, gradient_checkpointing=False) as made:
        rows = [made.train_dataset[i] for i in range(COMPARISONS)]
        for row, (prompt, one, other) in zip(rows, comparisons(), strict=True):
            front = row.get("prompt_ids", [])
            assert front + row["chosen_ids"] == [*prompt.tolist(), *one.tolist()]
            assert front + row["rejected_ids"] == [*prompt.tolist(), *other.tolist()]
        loss = float(made.compute_loss(made.model, made.data_collator(rows[:ROWS])).detach())
    for value in (mine, loss):
        assert abs(value - math.log(2)) < (1e-3 if task == "dpo" else 0.5), (mine, loss)
    tokens = np.mean([len(prompt) * 2 + len(one) + len(other) for prompt, one, other in comparisons()])
    print(f"{COMPARISONS} equal comparisons of {tokens:.0f} tokens; first losses {mine:.4f} and {loss:.4f}")


def main() -> None:
    parser = arguments(__doc__, candidates("dpo"))
    parser.add_argument("task", choices=("reward", "dpo"))
    given = parser.parse_args()
    if given.check:
        check(given.task)
    else:
        command(given, candidates(given.task), unit="comparisons")


if __name__ == "__main__":
    main()
