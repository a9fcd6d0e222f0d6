"""Finetuning speed on texts of varied lengths: MiniLM-L6 told the classes of real sets, beside transformers' Trainer.

    python -m bench.finetune sarcasm            # headlines, 15 tokens on average, 32 a step
    python -m bench.finetune reviews            # sentences of film reviews, 27 tokens, 32 a step
    python -m bench.finetune vitaminc           # evidence and claim in one row, 57 tokens of at most 128, 24 a step
    python -m bench.finetune vitaminc --floor   # what the arithmetic allows; no timing but of a product
    python -m bench.finetune vitaminc --check   # equal ids, states and losses; no timing

The peer is the Trainer on `AutoModelForSequenceClassification` as it comes: fp32, DataCollatorWithPadding, padded to the
longest of the step; and the same with bf16=True, which a user of a CPU with bf16 instructions would set. MiniLM's own config
has dropout 0.1, and firth, which starts from it, has that too. Since torch's dropout is slow on a CPU and ours is not, both
run without it as well; and the peer with its rows grouped by length. Ours are `classify`'s own objective, weights, AdamW and
loop, in the precision that a run chooses by itself on this machine: with rows padded, with rows of like length, and packed, as
the recipe has them. All have as many examples a step; units are the useful tokens of training steps, [CLS] and [SEP] with them
and padding not.

The floor. A token passes 12 width^2 weights a block, at 6 FLOPs each; the peer's padding does too. Ours need the last
block's states where the class is read alone, so keys and values are all that the other tokens pay for there. Attention's own
products are counted on both sides. Norms, GELU, dropout and AdamW come on top: AdamW reads and writes 28 bytes of a parameter
a step, and half of MiniLM's 22.7 M parameters are word vectors, of which ours visit those that were read.
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

from bench.causal import firth_run
from bench.harness import Candidate, EndSample, arguments, command, gemm_rate, memory_rate
from bench.masked import GROUP, end_sample_callback

PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS_PER_SAMPLE = 2  # steps in a turn, where every step is like another


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
    from firth.corpora import catalog

    return catalog.fetch(corpus, lambda _: None)


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
    from firth.data.labeled import LabeledTexts, TextFields
    from firth.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(fetched("minilm"))
    return LabeledTexts([str(records(task))], tokenizer, task.length, TextFields(task.text, text_pair_field=task.pair))


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


def trainer(end_sample: EndSample, name: str, dropout: bool = True, share: int = STEPS_PER_SAMPLE, **chosen: Any) -> None:
    """transformers' Trainer; useful tokens are counted where the model reads them. A turn is `share` steps."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    task = TASKS[name]
    coder, rows = hf_rows(task)
    model = hf_model(len({row["labels"] for row in rows}), dropout)

    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            directory, per_device_train_batch_size=task.rows, max_steps=1_000_000, use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no", report_to=[], **chosen,
        )  # fmt: skip
        Trainer(
            model, settings, train_dataset=rows, data_collator=DataCollatorWithPadding(coder), callbacks=[end_sample_callback(model, share, end_sample)]
        ).train()  # fmt: skip


# ------------------------------------------------------------------------------- firth


def firth_setup(name: str, dropout: bool = True, **batch: Any) -> tuple[Any, Any, Any]:
    """(model, objective, batches): what `firth train classification init_from=MINILM` builds; batch: how its rows are laid."""
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.classification import Classification
    from firth.pretrained.load_save import init_from, load_model

    task, start = TASKS[name], fetched("minilm")
    examples = source(task)
    config = load_model(start).config
    objective = Classification(class_names=examples.classes).for_model(config)
    config = config if dropout else dataclasses.replace(config, dropout=0.0)
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    init_from(model, start)
    return (
        model,
        objective,
        Batches(examples, objective, examples.tokenizer.vocab, batch_size=task.rows, seed=0, **batch),
    )


def firth(end_sample: EndSample, name: str, dropout: bool = True, share: int = STEPS_PER_SAMPLE, **batch: Any) -> None:
    model, objective, batches = firth_setup(name, dropout, **batch)

    tokens = lengths(batches.source)

    def useful(step: int) -> int:
        """Tokens of the examples of the last `share` steps."""
        steps = [batches.positions(number) for number in range(step - share, step)]
        return int(tokens[batches.source.order(batches.seed, np.concatenate(steps))[1]].sum())

    firth_run(end_sample, "adamw", useful, (model, objective, batches), share)


def candidates(name: str) -> dict[str, Candidate]:
    """Everybody who is told the classes of this set."""
    arm, length = functools.partial, TASKS[name].length
    alike: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "share": GROUP}
    return {
        "Trainer as it comes": arm(trainer, name=name),
        "Trainer, rows of like length": arm(trainer, name=name, **alike),
        "Trainer, dropout 0": arm(trainer, name=name, dropout=False),
        "Trainer, bf16": arm(trainer, name=name, bf16=True),
        "Trainer, bf16, rows of like length": arm(trainer, name=name, bf16=True, **alike),
        "Trainer, bf16, dropout 0": arm(trainer, name=name, dropout=False, bf16=True),
        "firth, padded": arm(firth, name=name),
        "firth, rows of like length": arm(firth, name=name, sort=GROUP, share=GROUP),
        "firth, packed, dropout 0": arm(firth, name=name, dropout=False, pack=length),
        "firth, packed": arm(firth, name=name, pack=length),
    }


# ------------------------------------------------------------------------------- what is fair, and what can be had


def check(name: str) -> None:
    """What makes the comparison fair, asserted: ids, states, examples a step; packed and padded are told the same."""
    from transformers import AutoModel

    from firth.train.step import count_targets, step

    coder, rows = hf_rows(TASKS[name])
    model, objective, packed = firth_setup(name, dropout=False, pack=TASKS[name].length)
    examples = packed.source
    assert [row["input_ids"] for row in rows] == [examples[i]["tokens"].tolist() for i in range(len(rows))]
    assert [row["labels"] for row in rows] == [int(examples[i]["label"]) for i in range(len(rows))]
    theirs = AutoModel.from_pretrained(fetched("minilm")).eval()
    padded = firth_setup(name, dropout=False)[2]
    [batch] = padded.batches(0)
    there = batch["key_time"] == 0
    given = coder.pad(
        [{k: v for k, v in rows[i].items() if k != "labels"} for i in padded.source.order(0, padded.positions(0))[1]],
        return_tensors="pt",
    )
    with torch.no_grad():
        apart = (model(batch) - theirs(**given).last_hidden_state).abs()[there].max().item()
    assert apart < 1e-4, f"the states differ by {apart:.2g}"
    sizes = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in hf_model(3).parameters())
    found = []
    for batches in (packed, padded):
        model.zero_grad()
        made = batches.batches(0)
        assert count_targets(objective, made)["class"] == TASKS[name].rows
        found.append((step(model, objective, made)["class"], model.trunk.blocks[0].attention.q.weight.grad.clone()))
    (loss, grad), (other, same) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, same, rtol=1e-4, atol=1e-5)
    print(f"{len(rows):,} equal examples; states apart by {apart:.1g}; parameters {sizes} (the peer's pooler is more)")
    print(f"a step of {TASKS[name].rows} examples: loss {loss:.6f} packed, {other:.6f} padded")


def floor(name: str) -> None:
    """FLOPs of products, and bytes that AdamW moves, of both: what they allow at this machine's rates."""
    from firth.model.flops import Work, stack_flops
    from firth.train.precision import choose

    task, steps = TASKS[name], 50
    model, objective, packed = firth_setup(name, pack=task.length)
    tokens = lengths(packed.source)
    mine = [batch for number in range(steps) for batch in packed.batches(number)]
    drawn = [tokens[packed.source.order(0, packed.positions(number))[1]] for number in range(steps)]
    useful, widths = sum(int(n.sum()) for n in drawn), [int(n.max()) for n in drawn]
    slots = task.rows * sum(widths)
    peer = stack_flops(model.config, Work(slots, task.rows * sum(w * w for w in widths)))
    ours = sum(objective.forward_flops(model, batch) for batch in mine)
    cells = sum(batch["tokens"].numel() for batch in mine)
    rate, memory = gemm_rate(PRODUCTS[choose("auto", torch.device("cpu"))]), memory_rate()
    words = np.unique(np.concatenate([batch["tokens"].numpy().ravel() for batch in mine]))
    whole = sum(p.numel() for p in model.parameters())
    table = model.tokens.weight.numel()
    read = whole - table + len(words) * model.config.width
    print(
        f"{useful / steps:,.0f} useful tokens a step; slots for each: {slots / useful:.2f} padded, {cells / useful:.2f} packed"
    )
    for who, work, moved in (("Trainer", peer, whole), ("firth, packed", ours, read)):
        seconds, extra = work / rate / steps, 28 * moved / memory
        print(
            f"{who:14} {work / useful / 1e6:6.1f} MFLOP a useful token; a step takes {seconds * 1e3:,.0f} ms at "
            f"{rate / 1e9:.0f} GFLOP/s and AdamW {extra * 1e3:.0f} ms at {memory / 1e9:.1f} GB/s at least: "
            f"{useful / steps / (seconds + extra):,.0f} useful tokens/s at most"
        )
    print(f"the products alone make {peer / ours:.2f}x")


def main() -> None:
    parser = arguments(__doc__, candidates("sarcasm"))
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--floor", action="store_true", help="what the arithmetic allows")
    given = parser.parse_args()
    if given.check:
        check(given.task)
    elif given.floor:
        floor(given.task)
    else:
        command(given, candidates(given.task), unit="useful tokens")


if __name__ == "__main__":
    main()
