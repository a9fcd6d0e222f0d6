"""Finetuning speed on texts of varied lengths: MiniLM-L6 told the classes of real sets, beside transformers' Trainer.

    python -m bench.finetune sarcasm            # headlines, 15 tokens on average, 32 a step
    python -m bench.finetune reviews            # sentences of film reviews, 27 tokens, 32 a step
    python -m bench.finetune vitaminc           # evidence and claim in one row, 57 tokens of at most 128, 24 a step
    python -m bench.finetune vitaminc --floor   # what the arithmetic allows; no timing
    python -m bench.finetune vitaminc --check   # equal weights, rows and tokens; no timing
    python -m bench.finetune vitaminc --profile # where firth's step goes, packed

The peer is the Trainer on `AutoModelForSequenceClassification` as it comes: fp32, DataCollatorWithPadding, padded to the
longest of the step. MiniLM's own config has dropout 0.1, which ours does not (docs/decisions.md), so the same without it
stands beside it, and with rows grouped by length. Ours are `classify`'s own objective, weights, AdamW and loop: with rows
padded, with rows of like length, and packed. All see the same examples a step; units are the useful tokens of training
steps, [CLS] and [SEP] with them and padding not.

The floor. A token passes 12 width^2 weights a block, at 6 FLOPs each; the peer's padding does too. Ours need the last
block's states where the class is read alone, so keys and values are all that the other tokens pay for there. Attention's own
products, norms, GELU, dropout and AdamW come on top on both sides: AdamW moves 28 bytes a parameter and step, and half of
MiniLM's 22.7 M parameters are word vectors.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.causal import firth_run
from bench.harness import Contender, Turn, arguments, command

SHARE = 6  # steps in a turn


@dataclass(frozen=True)
class Task:
    """A corpus whose file has its name, the fields that are read, the longest row, rows a step, and the width packed to."""

    corpus: str
    length: int
    rows: int
    text: str = "text"
    pair: str = ""


TASKS = {
    "sarcasm": Task("sarcasm", 48, 32),
    "reviews": Task("sentiment", 64, 32),
    "vitaminc": Task("vitaminc", 128, 24, "evidence", "claim"),
}


STORE = 6000
"""Examples that everybody goes round: enough for speed, and read in a few seconds."""


def fetched(corpus: str) -> Path:
    from firth.text import corpora

    return corpora.fetch(corpus, lambda _: None)


def records(task: Task) -> Path:
    """A file of STORE records of the set, evenly spaced, written once."""
    path = Path("runs/finetune") / f"{task.corpus}.jsonl"
    if not path.exists():
        lines = (fetched(task.corpus) / f"{task.corpus}.jsonl").read_text("utf-8").split("\n")[:-1]
        picks = np.linspace(0, len(lines) - 1, STORE).round().astype(int)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text("".join(f"{lines[i]}\n" for i in picks), "utf-8")
        partial.replace(path)
    return path


def source(task: Task) -> Any:
    """The set as firth reads it; its token ids are those of the peer too."""
    from firth.data.labelled import Labelled
    from firth.text.tokenizer import Tokenizer

    coder = Tokenizer.load(fetched("minilm"))
    return Labelled([str(records(task))], coder, task.length, text=task.text, pair=task.pair)


def lengths(examples: Any) -> np.ndarray:
    """Tokens of each example: (n,)."""
    return np.array([len(examples[i]["tokens"]) for i in range(len(examples))])


# ------------------------------------------------------------------------------- transformers


def hf_rows(task: Task) -> tuple[Any, list[dict[str, Any]]]:
    """The peer's tokenizer, and what it makes of the set: {"input_ids", ..., "labels"}."""
    from transformers import AutoTokenizer

    coder = AutoTokenizer.from_pretrained(fetched("minilm"))
    rows = [json.loads(line) for line in records(task).read_text("utf-8").split("\n")[:-1]]
    classes = sorted({row["label"] for row in rows})
    texts = [[row[field] for row in rows] for field in (task.text, task.pair) if field]
    found = coder(*texts, truncation=True, max_length=task.length)
    return coder, [
        {key: found[key][i] for key in found} | {"labels": classes.index(row["label"])} for i, row in enumerate(rows)
    ]


def hf_model(classes: int, dropout: bool = True) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    none = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModelForSequenceClassification.from_pretrained(fetched("minilm"), num_labels=classes, **none)


def trainer(turn: Turn, name: str, dropout: bool = True, **chosen: Any) -> None:
    """transformers' Trainer; useful tokens are counted where the model reads them."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    task = TASKS[name]
    coder, rows = hf_rows(task)
    model, useful = hf_model(len({row["labels"] for row in rows}), dropout), [0]

    def count(_: object, __: object, fields: dict[str, Tensor]) -> None:
        useful[0] += int(fields["attention_mask"].sum())

    model.register_forward_pre_hook(count, with_kwargs=True)

    class Turns(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
            if state.global_step % SHARE == 0:  # type: ignore[attr-defined]
                turn(useful[0])
                useful[0] = 0

    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            directory, per_device_train_batch_size=task.rows, max_steps=1_000_000, use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", report_to=[], **chosen,
        )  # fmt: skip
        Trainer(
            model, settings, train_dataset=rows, data_collator=DataCollatorWithPadding(coder), callbacks=[Turns()]
        ).train()  # fmt: skip


# ------------------------------------------------------------------------------- firth


def firth_parts(name: str, **batch: Any) -> tuple[Any, Any, Any]:
    """(model, objective, batches): what `firth train classify start=MINILM` builds; batch: how its rows are laid."""
    from firth.data.batch import Batches
    from firth.model.lm import LM
    from firth.model.weights import load_model, start_from
    from firth.objectives.classification import Classification

    task, start = TASKS[name], fetched("minilm")
    examples = source(task)
    shape = load_model(start).shape
    objective = Classification(classes=examples.classes).fitted(shape)
    torch.manual_seed(0)
    model = LM(shape, objective.parts(shape))
    start_from(model, start)
    return model, objective, Batches(examples, objective, examples.tokenizer.vocab, rows=task.rows, seed=0, **batch)


def firth(turn: Turn, name: str, **batch: Any) -> None:
    model, objective, batches = firth_parts(name, **batch)

    tokens = lengths(batches.source)

    def useful(step: int) -> int:
        """Tokens of the examples of the last SHARE steps."""
        steps = [batches.positions(number) for number in range(step - SHARE, step)]
        return int(tokens[batches.source.order(batches.seed, np.concatenate(steps))[1]].sum())

    firth_run(turn, "adamw", useful, (model, objective, batches), SHARE)


def contenders(name: str) -> dict[str, Contender]:
    """Everybody who is told the classes of this set."""
    arm = functools.partial
    return {
        "Trainer as it comes": arm(trainer, name=name),
        "the same, dropout 0": arm(trainer, name=name, dropout=False),
        "the same, dropout 0, rows grouped by length": arm(
            trainer, name=name, dropout=False, train_sampling_strategy="group_by_length"
        ),
        "firth, padded": arm(firth, name=name),
        "firth, rows of like length": arm(firth, name=name, sort=50),
        "firth, packed": arm(firth, name=name, pack=TASKS[name].length),
    }


def main() -> None:
    parser = arguments(__doc__, contenders("sarcasm"))
    parser.add_argument("task", choices=list(TASKS))
    given = parser.parse_args()
    command(given, contenders(given.task), unit="useful tokens")


if __name__ == "__main__":
    main()
