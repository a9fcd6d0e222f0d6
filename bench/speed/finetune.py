"""Finetuning speed on texts of varied lengths: MiniLM-L6 as a classifier of real data sets, against transformers' Trainer.

    python -m bench.speed.finetune sarcasm            # headlines, 15 tokens on average, 32 a step
    python -m bench.speed.finetune reviews            # sentences of film reviews, 27 tokens, 32 a step
    python -m bench.speed.finetune vitaminc           # evidence and claim in one row, 57 tokens of at most 128, 24 a step
    python -m bench.speed.finetune vitaminc --floor   # lower bound of the time; times one matrix product only
    python -m bench.speed.finetune vitaminc --check   # equal ids, hidden states and losses; no timing

The peer is the Trainer on `AutoModelForSequenceClassification` with its defaults: fp32, DataCollatorWithPadding, padded to
the longest of the step; and the same with bf16=True, the right setting on a CPU with bf16 instructions. MiniLM's config has
dropout 0.1, and so does firth, which starts from it. Since torch's dropout is slow on a CPU and firth's is not, both also
run without it; the peer also runs with rows grouped by length. firth runs the objective, weights, AdamW and loop of the
recipe `classification`, in the precision that a run chooses on this machine: padded, grouped by length, and packed, which is
the recipe's default. All have the same number of examples per step; units are the useful tokens of training steps, with
[CLS] and [SEP] and without padding.

The lower bound (`--floor`). A token passes 12 hidden_size^2 weights per block, at 6 FLOPs each; so does the peer's padding.
firth computes the last block's output only at the position that is classified, so the other tokens cost keys and values
there. The products of attention count on both sides. Norms, GELU, dropout and AdamW come on top: AdamW reads and writes 28
bytes per parameter and step, and half of MiniLM's 22.7 M parameters are word embeddings, of which firth updates those that
occurred.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import Candidate, EndSample, arguments, command, gemm_rate, memory_rate
from bench.speed.causal import firth_run
from bench.speed.masked import GROUPED_STEPS, end_sample_callback
from firth.data.records import Records

PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS_PER_SAMPLE = 2
"""Where rows are not grouped by length."""


@dataclass(frozen=True)
class Task:
    """Data set of a benchmark.

    Args:
        corpus: Name of the corpus; its file has the same name.
        length: Longest row, and length of packed rows, in tokens.
        rows: Examples per step.
        text: Field of the text.
        pair: Field of the second text; "" for none.
    """

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


NUM_EXAMPLES = 6000
"""Examples that all candidates cycle through: enough for speed, and read in a few seconds."""


def fetch(corpus: str) -> Path:
    from firth.corpora import catalog

    return catalog.fetch(corpus, lambda _: None)


def records(task: Task) -> Path:
    """Return a file of NUM_EXAMPLES evenly spaced records of the data set; it is written once."""
    path = Path("runs/finetune") / f"{task.corpus}.jsonl"
    if not path.exists():
        lines = (fetch(task.corpus) / f"{task.corpus}.jsonl").read_text("utf-8").split("\n")[:-1]
        picks = np.linspace(0, len(lines) - 1, NUM_EXAMPLES).round().astype(int)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text("".join(f"{lines[i]}\n" for i in picks), "utf-8")
        partial.replace(path)
    return path


def source(task: Task) -> Any:
    """Return the data set as firth reads it; the peer has the same token ids."""
    from firth.data.labeled import LabeledConfig
    from firth.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(fetch("minilm"))
    return Records(
        LabeledConfig(max_length=task.length, text_field=task.text, text_pair_field=task.pair),
        [str(records(task))],
        tokenizer,
    )


def lengths(examples: Any) -> np.ndarray:
    """Return the tokens of each example: (n,)."""
    return np.array([len(examples[i]["tokens"]) for i in range(len(examples))])


# ------------------------------------------------------------------------------- transformers


def hf_rows(task: Task) -> tuple[Any, list[dict[str, Any]]]:
    """Return the peer's tokenizer and its rows: {"input_ids", ..., "labels"}."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    rows = [json.loads(line) for line in records(task).read_text("utf-8").split("\n")[:-1]]
    classes = sorted({row["label"] for row in rows})
    texts = [[row[field] for row in rows] for field in (task.text, task.pair) if field]
    encoded = tokenizer(*texts, truncation=True, max_length=task.length)
    return tokenizer, [
        {key: encoded[key][i] for key in encoded} | {"labels": classes.index(row["label"])}
        for i, row in enumerate(rows)
    ]


def hf_model(classes: int, dropout: bool = True) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    none = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModelForSequenceClassification.from_pretrained(fetch("minilm"), num_labels=classes, **none)


def trainer(
    end_sample: EndSample, name: str, dropout: bool = True, steps_per_sample: int = STEPS_PER_SAMPLE, **chosen: Any
) -> None:
    """Run transformers' Trainer; useful tokens are counted in the model's input. A sample is `steps_per_sample` steps."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    task = TASKS[name]
    tokenizer, rows = hf_rows(task)
    model = hf_model(len({row["labels"] for row in rows}), dropout)

    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            directory, per_device_train_batch_size=task.rows, max_steps=1_000_000, use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", report_to=[], **chosen,
        )  # fmt: skip
        Trainer(
            model,
            settings,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[end_sample_callback(model, steps_per_sample, end_sample)],
        ).train()


# ------------------------------------------------------------------------------- firth


def firth_setup(name: str, dropout: bool = True, **batch: Any) -> tuple[Any, Any, Any]:
    """Return (model, objective, batches) of `firth train classification init_from=MINILM`; `batch` goes to `Batches`."""
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.classification import Classification
    from firth.pretrained.load_save import init_from, load_model
    from firth.types import DataStats

    task, start = TASKS[name], fetch("minilm")
    examples = source(task)
    config = load_model(start).config
    objective = Classification(class_names=examples.classes).configure(DataStats, config)
    config = config if dropout else dataclasses.replace(config, dropout=0.0)
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    init_from(model, start)
    return (
        model,
        objective,
        Batches(examples, objective, examples.tokenizer.vocab, batch_size=task.rows, seed=0, **batch),
    )


def firth(
    end_sample: EndSample, name: str, dropout: bool = True, steps_per_sample: int = STEPS_PER_SAMPLE, **batch: Any
) -> None:
    model, objective, batches = firth_setup(name, dropout, **batch)

    tokens = lengths(batches.source)

    def useful(step: int) -> int:
        """Return the tokens of the examples of the last `steps_per_sample` steps."""
        steps = [batches.positions(number) for number in range(step - steps_per_sample, step)]
        return int(tokens[batches.source.order(batches.seed, np.concatenate(steps))[1]].sum())

    firth_run(end_sample, "adamw", useful, (model, objective, batches), steps_per_sample)


def candidates(name: str) -> dict[str, Candidate]:
    """Return the candidates on this data set."""
    bind, length = functools.partial, TASKS[name].length
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "share": GROUPED_STEPS}
    return {
        "Trainer, defaults": bind(trainer, name=name),
        "Trainer, grouped by length": bind(trainer, name=name, **grouped),
        "Trainer, dropout 0": bind(trainer, name=name, dropout=False),
        "Trainer, bf16": bind(trainer, name=name, bf16=True),
        "Trainer, bf16, grouped by length": bind(trainer, name=name, bf16=True, **grouped),
        "Trainer, bf16, dropout 0": bind(trainer, name=name, dropout=False, bf16=True),
        "firth, padded": bind(firth, name=name),
        "firth, grouped by length": bind(
            firth, name=name, group_by_length=GROUPED_STEPS, steps_per_sample=GROUPED_STEPS
        ),
        "firth, packed, dropout 0": bind(firth, name=name, dropout=False, pack_to_length=length),
        "firth, packed": bind(firth, name=name, pack_to_length=length),
    }


# ------------------------------------------------------------------------------- fairness and the lower bound


def check(name: str) -> None:
    """Assert that the comparison is fair: equal ids, hidden states and examples per step; packed equals padded."""
    from transformers import AutoModel

    from firth.training.step import count_targets, step

    tokenizer, rows = hf_rows(TASKS[name])
    model, objective, packed = firth_setup(name, dropout=False, pack_to_length=TASKS[name].length)
    examples = packed.source
    assert [row["input_ids"] for row in rows] == [examples[i]["tokens"].tolist() for i in range(len(rows))]
    assert [row["labels"] for row in rows] == [int(examples[i]["label"]) for i in range(len(rows))]
    theirs = AutoModel.from_pretrained(fetch("minilm")).eval()
    padded = firth_setup(name, dropout=False)[2]
    [batch] = padded.batches(0)
    real = batch["key_time"] == 0
    inputs = tokenizer.pad(
        [{k: v for k, v in rows[i].items() if k != "labels"} for i in padded.source.order(0, padded.positions(0))[1]],
        return_tensors="pt",
    )
    with torch.no_grad():
        difference = (model(batch) - theirs(**inputs).last_hidden_state).abs()[real].max().item()
    assert difference < 1e-4, f"the hidden states differ by {difference:.2g}"
    sizes = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in hf_model(3).parameters())
    results = []
    for batches in (packed, padded):
        model.zero_grad()
        step_batches = batches.batches(0)
        assert count_targets(objective, step_batches)["class"] == TASKS[name].rows
        results.append(
            (step(model, objective, step_batches)["class"], model.stack.blocks[0].attention.q.weight.grad.clone())
        )
    (loss, grad), (other, same) = results
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, same, rtol=1e-4, atol=1e-5)
    print(
        f"{len(rows):,} equal examples; hidden states differ by {difference:.1g}; parameters {sizes} (the peer also has a pooler)"
    )
    print(f"a step of {TASKS[name].rows} examples: loss {loss:.6f} packed, {other:.6f} padded")


def lower_bound(name: str) -> None:
    """Print the lower bounds of both: FLOPs of products and bytes that AdamW moves, at this machine's rates."""
    from firth.model.flops import Work, stack_flops
    from firth.training.device import choose_precision

    task, steps = TASKS[name], 50
    model, objective, packed = firth_setup(name, pack_to_length=task.length)
    tokens = lengths(packed.source)
    batches_read = [batch for number in range(steps) for batch in packed.batches(number)]
    drawn = [tokens[packed.source.order(0, packed.positions(number))[1]] for number in range(steps)]
    useful, widths = sum(int(n.sum()) for n in drawn), [int(n.max()) for n in drawn]
    slots = task.rows * sum(widths)
    peer = stack_flops(model.config, Work(slots, task.rows * sum(w * w for w in widths)))
    ours = sum(objective.flops(model, batch) for batch in batches_read)
    packed_slots = sum(batch["tokens"].numel() for batch in batches_read)
    rate, memory = gemm_rate(PRODUCTS[choose_precision("auto", torch.device("cpu"))]), memory_rate()
    words = np.unique(np.concatenate([batch["tokens"].numpy().ravel() for batch in batches_read]))
    whole = sum(p.numel() for p in model.parameters())
    table = model.tokens.weight.numel()
    read = whole - table + len(words) * model.config.hidden_size
    print(
        f"{useful / steps:,.0f} useful tokens per step; slots for each: {slots / useful:.2f} padded, {packed_slots / useful:.2f} packed"
    )
    for name, work, moved in (("Trainer", peer, whole), ("firth, packed", ours, read)):
        seconds, extra = work / rate / steps, 28 * moved / memory
        print(
            f"{name:14} {work / useful / 1e6:6.1f} MFLOP per useful token; a step takes {seconds * 1e3:,.0f} ms at "
            f"{rate / 1e9:.0f} GFLOP/s and AdamW {extra * 1e3:.0f} ms at {memory / 1e9:.1f} GB/s at least: "
            f"{useful / steps / (seconds + extra):,.0f} useful tokens/s at most"
        )
    print(f"the products alone make {peer / ours:.2f}x")


def main() -> None:
    parser = arguments(__doc__, candidates("sarcasm"))
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--floor", action="store_true", help="print the lower bound of the time")
    args = parser.parse_args()
    if args.check:
        check(args.task)
    elif args.floor:
        lower_bound(args.task)
    else:
        command(args, candidates(args.task), unit="useful tokens")


if __name__ == "__main__":
    main()
