"""Real tasks from nothing, from our own pretraining and from MiniLM, beside transformers' Trainer on the same examples.

    python -m bench.learn_tasks --run                      # every arm, three seeds; resumable: about an hour on one thread
    python -m bench.learn_tasks --run --only sarcasm ner   # some tasks; --limit 3 stops after three new runs
    python -m bench.learn_tasks --table                    # markdown for docs/results.md
    python -m bench.learn_tasks --run --quick              # a check: one seed, four steps

    sarcasm, reviews       two classes of one sentence         accuracy
    vitaminc               three classes of a pair (bigbench)  accuracy; whole pages held out
    ner, speech            tags of words                       F1 of names; accuracy (whole documents of Brown held out)
    squad                  spans, new domains to SQuAD's dev   exact match and F1 (bigbench)
    quartz, logiqa         two or four options                 accuracy
    lee                    likeness of news, nothing learnt    Pearson's correlation of `embed` with people's

The arms: "scratch" and "own" are four blocks of width 192 with 4,096 subwords of the Brown corpus, "own" after 600 steps of
`roberta` on it (its raw text holds the sentences of `speech`, without tags); "minilm" starts from MiniLM-L6, "packed" too, with
its rows packed; "trainer" is transformers' Trainer from MiniLM, as it comes (fp32, dynamic padding), with the same records,
steps, rows, rate, schedule and decay, and one linear layer on [CLS] behind BERT's pooler. Ours runs in the precision that
"auto" finds. Seconds are of training alone. At most TESTED records are tested on, the same in every arm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import describe, machine
from firth.data.split import place
from firth.evaluate import metrics
from firth.evaluate.evaluate import evaluate
from firth.generate.embed import embed
from firth.model.weights import load_model
from firth.recipes.recipe import load
from firth.recipes.run import run
from firth.text import corpora
from firth.text.tokenizer import Tokenizer

RESULTS = Path("runs/learn_tasks")
SEEDS = (0, 1, 2)
TESTED = 1000
ARMS = ("scratch", "own", "minilm", "packed", "trainer")
RATES = {"scratch": 1e-3, "own": 5e-4, "minilm": 1e-4, "packed": 1e-4, "trainer": 1e-4}
DECAY, BETA2, WARMUP = 0.01, 0.98, 0.1

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """corpus: of the catalogue, and its file. recipe: what is trained. family: what is held out together. settings: of the
    recipe. steps, rows: of a run. scores: what `evaluate` says that is kept. bytes: of what is to be fetched, roughly."""

    corpus: str
    recipe: str
    scores: tuple[str, ...]
    steps: int
    rows: int
    settings: tuple[str, ...] = ()
    family: Callable[[int, Row], str] = lambda i, row: str(i)
    arms: tuple[str, ...] = ("scratch", "own", "minilm")
    tested: str = ""


TEXTS = ("scratch", "own", "minilm", "packed", "trainer")
JOBS = {
    "sarcasm": Job("sarcasm/sarcasm.jsonl", "classify", ("accuracy",), 120, 32, ("segment.length=48",), arms=TEXTS),
    "reviews": Job("sentiment/sentiment.jsonl", "classify", ("accuracy",), 120, 32, ("segment.length=64",), arms=TEXTS),
    "vitaminc": Job(
        "vitaminc/vitaminc.jsonl", "classify", ("accuracy", "macro_f1"), 120, 24,
        ("segment.text=evidence", "segment.pair=claim", "segment.length=128"), lambda i, row: row["page"], TEXTS,
    ),
    "ner": Job("ner_finance/ner_finance.jsonl", "tag", ("f1", "accuracy"), 80, 16, ("segment.length=96",)),
    "speech": Job("brown/tagged.jsonl", "tag", ("accuracy",), 120, 24, ("segment.length=64",), lambda i, row: row["document"]),
    "squad": Job(
        "squad/train.jsonl", "answer", ("exact_match", "f1"), 150, 12,
        ("segment.length=256", "segment.stride=96", "segment.question=48"), tested="squad/test.jsonl",
    ),
    "quartz": Job("quartz/quartz.jsonl", "choose", ("accuracy",), 120, 12, ("segment.length=96",)),
    "logiqa": Job("logiqa/logiqa.jsonl", "choose", ("accuracy",), 60, 4, ("segment.length=192",)),
}  # fmt: skip


def halves(name: str, job: Job, quick: bool) -> tuple[Path, Path]:
    """What is learnt from and what is tested on, written once."""
    folder = RESULTS / "data" / name
    parts = folder / "train.jsonl", folder / "test.jsonl"
    if not all(path.exists() for path in parts):
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(read(job.corpus))
        apart = [place(job.family(i, row)) < 0.1 for i, row in enumerate(rows)]
        test = list(read(job.tested)) if job.tested else [r for r, held in zip(rows, apart, strict=True) if held]
        train = rows if job.tested else [r for r, held in zip(rows, apart, strict=True) if not held]
        picks = np.unique(np.linspace(0, len(test) - 1, 50 if quick else TESTED).round().astype(int))
        for path, some in zip(parts, (train, [test[i] for i in picks]), strict=True):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), "utf-8")
    return parts


def read(name: str) -> Iterator[Row]:
    """The records of a corpus's file."""
    corpus, _, file = name.partition("/")
    for line in (corpora.fetch(corpus, say) / file).open(encoding="utf-8"):
        yield json.loads(line)


def say(_: str) -> None:
    """What a run tells on its way, which nobody waits for here."""


def own(quick: bool) -> Path:
    """Our own pretrained encoder, made once."""
    steps = 4 if quick else 600
    settings = ["source.corpus=brown", f"length.steps={steps}", "checks.every=0", f"checks.save={steps}", "samples=[]"]
    return run(load("roberta", settings), RESULTS / "own", say).model


def ours(name: str, job: Job, arm: str, seed: int, quick: bool) -> Row:
    """One run of a recipe, and its score on the test."""
    train, test = halves(name, job, quick)
    start = str(corpora.fetch("minilm", say)) if arm in ("minilm", "packed") else str(own(quick))
    settings = [
        *job.settings, f"source={train}", "source.held_out=0", f"batch.rows={job.rows}", f"seed={seed}",
        f"length.steps={4 if quick else job.steps}", f"optimizer.rate={RATES[arm]}", f"optimizer.weight_decay={DECAY}",
        f"optimizer.beta2={BETA2}", f"schedule.warmup={WARMUP}", "checks.save=0",
    ]  # fmt: skip
    if arm == "scratch":  # the shape and the tokenizer of our own, and none of its weights
        shape = json.loads((Path(start) / "firth.json").read_text("utf-8"))["shape"]
        settings += [f"tokenizer.path={start}", f"shape={json.dumps(shape)}"]
    else:
        settings.append(f"start={start}")
    if arm == "packed":
        settings.append(f"batch.pack={max(128, int(job.settings[-1].split('=')[1]))}")
    place_ = RESULTS / "runs" / f"{name}-{arm}-{seed}"
    done = run(load(job.recipe, settings), place_, say)
    found = evaluate(place_, [str(test)])
    return {score: found[score] for score in job.scores} | {
        "seconds": done.seconds, "tokens": done.tokens, "tested": found["items"],
        "commonest": found.get("commonest_accuracy"),
    }  # fmt: skip


def trainer(name: str, job: Job, seed: int, quick: bool) -> Row:
    """transformers' Trainer on the same records."""
    import transformers
    from torch.utils.data import Dataset

    class Records(Dataset):  # type: ignore[type-arg]
        def __init__(self, rows: Sequence[Row]) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> Row:
            return self.rows[index]

    told = dict(setting.removeprefix("segment.").split("=") for setting in job.settings)
    where = str(corpora.fetch("minilm", say))
    coder = transformers.AutoTokenizer.from_pretrained(where)
    halves_ = [[json.loads(line) for line in path.open(encoding="utf-8")] for path in halves(name, job, quick)]
    classes = sorted({str(row["label"]) for row in halves_[0]})

    def encoded(rows: Sequence[Row]) -> Records:
        texts = [[row[told.get("text", "text")] for row in rows]]
        texts += [[row[told["pair"]] for row in rows]] if "pair" in told else []
        found = coder(*texts, truncation=True, max_length=int(told["length"]))
        labels = [classes.index(str(row["label"])) for row in rows]
        return Records([
            {key: found[key][i] for key in found} | {"labels": label} for i, label in enumerate(labels)
        ])  # fmt: skip

    train, test = (encoded(rows) for rows in halves_)
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(classes))
    steps = 4 if quick else job.steps
    arguments = transformers.TrainingArguments(
        output_dir=str(RESULTS / "trainer"), max_steps=steps, per_device_train_batch_size=job.rows, seed=seed,
        learning_rate=RATES["trainer"], weight_decay=DECAY, adam_beta2=BETA2, warmup_steps=int(WARMUP * steps),
        lr_scheduler_type="linear", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    collator = transformers.DataCollatorWithPadding(coder)
    loop = transformers.Trainer(model=model, args=arguments, train_dataset=train, data_collator=collator)
    began = time.perf_counter()
    loop.train()
    seconds = time.perf_counter() - began
    scores = loop.predict(test)  # type: ignore[arg-type]
    right, said = scores.label_ids, scores.predictions.argmax(-1)
    found = {"accuracy": metrics.accuracy(right, said), "macro_f1": metrics.macro_f1(right, said)}
    read_ = float(np.mean([len(row["input_ids"]) for row in train.rows])) * job.rows * steps
    return {score: found[score] for score in job.scores} | {
        "seconds": seconds,
        "tokens": round(read_),
        "tested": len(test),
    }


def lee(quick: bool) -> dict[str, float]:
    """Pearson's correlation of the cosine of `embed` with people's judgement, before anything is learnt of it."""
    rows = list(read("lee/lee.jsonl"))
    texts = sorted({text for row in rows for text in (row["text"], row["other"])})
    at = {text: i for i, text in enumerate(texts)}
    out = {}
    for arm, start in (("own", own(quick)), ("minilm", corpora.fetch("minilm", say))):
        found, _ = embed(load_model(start), Tokenizer.load(start), texts, length=256)
        said = [float(found[at[row["text"]]] @ found[at[row["other"]]]) for row in rows]
        out[arm] = metrics.pearson([row["label"] for row in rows], said)
    return out


def table() -> str:
    """Mean and half the spread over seeds, seconds and useful tokens per second."""
    lines = ["| task | arm | score | seconds | tokens/s | tested |", "|---|---|---|---|---|---|"]
    for name, job in JOBS.items():
        for arm in ARMS:
            rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-{arm}-*.json"))]
            if rows:
                scores = []
                for score in job.scores:
                    values = [row[score] for row in rows]
                    scores.append(f"{score} {statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}")
                seconds = statistics.mean(row["seconds"] for row in rows)
                speed = sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows)
                told = f"{seconds:.0f} | {speed:,.0f} | {rows[0]['tested']} ({len(rows)} seeds)"
                lines.append(f"| {name} | {arm} | {', '.join(scores)} | {told} |")
    file = RESULTS / "lee.json"
    if file.exists():
        for arm, value in json.loads(file.read_text()).items():
            lines.append(f"| lee | {arm}, nothing learnt | pearson {value:.3f} | | | 1225 pairs |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*JOBS, "lee"], default=[*JOBS, "lee"])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--limit", type=int, default=10**6, help="stop after so many new runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed and four steps, in a folder of its own")
    given = parser.parse_args()
    global RESULTS
    RESULTS = Path("runs/learn_tasks-quick") if given.quick else RESULTS
    torch.set_num_threads(given.threads)
    if given.run:
        RESULTS.mkdir(parents=True, exist_ok=True)
        print(describe(machine()), flush=True)
        left = given.limit
        for seed in SEEDS[:1] if given.quick else SEEDS:  # all tasks once, before any twice
            for name in (n for n in given.only if n in JOBS):
                for arm in (a for a in JOBS[name].arms if a in given.arms):
                    path = RESULTS / f"{name}-{arm}-{seed}.json"
                    if path.exists() or left <= 0:
                        continue
                    job = JOBS[name]
                    found = (
                        trainer(name, job, seed, given.quick)
                        if arm == "trainer"
                        else ours(name, job, arm, seed, given.quick)
                    )
                    path.write_text(json.dumps(found, indent=1))
                    left -= 1
                    told = "  ".join(f"{key} {value:.3g}" for key, value in found.items() if value is not None)
                    print(f"{name} {arm} seed {seed}: {told}", flush=True)
        if "lee" in given.only and not (RESULTS / "lee.json").exists() and left > 0:
            (RESULTS / "lee.json").write_text(json.dumps(lee(given.quick)))
    if given.table or not given.run:
        print(table())


if __name__ == "__main__":
    main()
