"""Scores on real tasks from random weights, own pretraining and MiniLM, against transformers' Trainer on the same examples.

    python -m bench.learning.tasks --run                      # every arm, three seeds; resumable: two and a half hours on one thread
    python -m bench.learning.tasks --run --only sarcasm ner   # some tasks; --limit 3 stops after three new runs
    python -m bench.learning.tasks --table                    # markdown for docs/results/index.md
    python -m bench.learning.tasks --run --quick              # a check: one seed, four steps

    sarcasm, reviews       two classes of one sentence         accuracy
    vitaminc               three classes of a pair (bigbench)  accuracy; whole pages held out
    ner, speech            tags of words                       F1 of names; accuracy (whole documents of Brown held out)
    conll                  names (CoNLL-2003, of --conll DIR)  F1; its own test file
    squad                  spans, new domains to SQuAD's dev   exact match and F1 (bigbench)
    quartz, logiqa         two or four options                 accuracy
    lee                    similarity of news, no training     Pearson's correlation of `embed` with human judgments
    translate              English reviews into Spanish        chrF, BLEU, held-out loss (bigbench, machine translations)

The arms: "scratch" and "own" have four blocks of hidden size 192 with 4,096 subwords of the Brown corpus, "own" after 1,600
steps of `roberta` on it (its raw text contains the sentences of `speech`, without tags); "minilm" starts from MiniLM-L6 with
the recipe's defaults, packed where possible; "trainer" is transformers' Trainer from MiniLM with its defaults (fp32, dynamic
padding) and the same records, steps, rows, learning rate, schedule and weight decay, and the head of transformers for the
task (`bench.learning.tasks_peers`). `translate` has an encoder-decoder instead: no MiniLM, "own" after span corruption of the Brown
corpus, and "trainer" is transformers' T5 from random weights (`bench.learning.tasks_translate`). firth runs in the precision that
"auto" selects. Seconds are of training alone; tokens are without padding. At most TESTED records are in the test, the same
in every arm. The learning rates of "scratch" and "own" are the best of 1e-3, 2e-3 and 4e-3 for `sarcasm` at another seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.harness import describe, machine
from bench.learning import tasks_peers, tasks_translate
from bench.learning.tasks_peers import Lesson, Row
from firth.corpora import catalog, tables
from firth.corpora import readers as text
from firth.data.split import place as hash_fraction
from firth.evaluate import metrics
from firth.evaluate.evaluate import evaluate
from firth.generate.embeddings import embed
from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer

RESULTS = Path("runs/learn_tasks")
SEEDS = (0, 1, 2)
TESTED = 1000
ARMS = ("scratch", "own", "minilm", "trainer")
RATES = {"scratch": 1e-3, "own": 2e-3, "minilm": 1e-4, "trainer": 1e-4}
DECAY, BETA2, WARMUP = 0.01, 0.98, 0.1


def pretrained_encoder(_: Path, quick: bool) -> Path:
    """Return the directory of our own pretrained encoder, trained once."""
    steps = 4 if quick else 1600
    settings = [
        "data.corpus=brown",
        f"max_steps={steps}",
        "evaluation.every=0",
        f"checkpoint.every={steps}",
        "sample_prompts=[]",
    ]
    return run(load("roberta", settings), RESULTS / "own", silent).model


def score_run(directory: Path, test: Path, done: RunResult) -> Row:
    """Return the scores of a run of firth."""
    return evaluate(directory, [str(test)])


@dataclass(frozen=True)
class Job:
    """Task of the benchmark.

    Args:
        corpus: Corpus of the catalog, and its file.
        recipe: Recipe to train.
        scores: Metrics to record.
        steps: Optimizer steps.
        rows: Rows per step.
        settings: Settings of the recipe.
        group: Maps an index and a record to its group; groups are held out whole.
        arms: Arms to run.
        tested: Corpus and file of the test records; "" to hold out a tenth of the groups.
        keep: Whether a record is used.
        disjoint_fields: Fields whose values must not occur in both training and test records.
        rates: Learning rate by arm.
        pretrained: Returns the directory of our pretrained model.
        score_run: Scores a run of firth.
    """

    corpus: str
    recipe: str
    scores: tuple[str, ...]
    steps: int
    rows: int
    settings: tuple[str, ...] = ()
    group: Callable[[int, Row], str] = lambda i, row: str(i)
    arms: tuple[str, ...] = ARMS
    tested: str = ""
    keep: Callable[[Row], bool] = lambda row: True
    disjoint_fields: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    pretrained: Callable[[Path, bool], Path] = pretrained_encoder
    score_run: Callable[[Path, Path, RunResult], Row] = score_run


JOBS = {
    "sarcasm": Job("sarcasm/sarcasm.jsonl", "classification", ("accuracy",), 120, 32, ("examples.max_length=48",)),
    "reviews": Job("sentiment/sentiment.jsonl", "classification", ("accuracy",), 120, 32, ("examples.max_length=64",)),
    "vitaminc": Job(
        "vitaminc/vitaminc.jsonl", "classification", ("accuracy", "macro_f1"), 120, 24,
        ("examples.text_field=evidence", "examples.text_pair_field=claim", "examples.max_length=128"), lambda i, row: row["page"],
    ),
    "ner": Job("ner_finance/ner_finance.jsonl", "token_classification", ("f1", "accuracy"), 160, 16, ("examples.max_length=96",)),
    "speech": Job(
        "brown/tagged.jsonl", "token_classification", ("accuracy",), 120, 24, ("examples.max_length=64",),
        lambda i, row: row["document"],
        rates=RATES | {"minilm": 5e-4, "trainer": 5e-4},  # 470 tags: at 1e-4 both are far from converged
    ),
    "squad": Job(
        "squad/train.jsonl", "question_answering", ("exact_match", "f1"), 80, 12,
        ("examples.max_length=256", "examples.doc_stride=96", "examples.max_question_length=48"), tested="squad/test.jsonl",
    ),
    "conll": Job(
        "", "token_classification", ("f1", "accuracy"), 120, 32, ("examples.max_length=64",),
        rates=RATES | {"minilm": 5e-4, "trainer": 5e-4},
    ),
    "quartz": Job("quartz/quartz.jsonl", "multiple_choice", ("accuracy",), 120, 12, ("examples.max_length=96",)),
    "logiqa": Job("logiqa/logiqa.jsonl", "multiple_choice", ("accuracy",), 30, 4, ("examples.max_length=192",)),
    "translate": Job(
        "multiemo/multiemo.jsonl", "text_to_text", ("chrf", "bleu", "loss"), 240, 48,
        (f"examples.max_length={tasks_translate.LENGTH}", f"examples.max_target_length={tasks_translate.LENGTH}",
         "examples.prompt_template='{en}'", "examples.completion_template='{es}'"), lambda i, row: row["en"], ("scratch", "own", "trainer"),
        keep=tasks_translate.short, disjoint_fields=tasks_translate.LANGUAGES, rates={"scratch": 2e-3, "own": 2e-3, "trainer": 2e-3},
        pretrained=lambda train, quick: tasks_translate.pretrained(RESULTS, train, quick), score_run=tasks_translate.score_run,
    ),
}  # fmt: skip


def train_test_files(name: str, job: Job, quick: bool) -> tuple[Path, Path]:
    """Return the files of training and test records, written once."""
    folder = RESULTS / "data" / name
    parts = folder / "train.jsonl", folder / "test.jsonl"
    if not all(path.exists() for path in parts):
        folder.mkdir(parents=True, exist_ok=True)
        train, test = split_rows(list(read(job.corpus)), job)
        test = list(read(job.tested)) if job.tested else test
        train = train[:3000] if quick else train
        picks = np.unique(np.linspace(0, len(test) - 1, 50 if quick else TESTED).round().astype(int))
        for path, some in zip(parts, (train, [test[i] for i in picks]), strict=True):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), "utf-8")
    return parts


def split_rows(rows: list[Row], job: Job) -> tuple[list[Row], list[Row]]:
    """Split records into training records and a tenth of the groups held out (none if the test is another file).

    >>> job = Job("", "", (), 0, 0, group=lambda i, row: row["en"], disjoint_fields=("en", "es"))
    >>> rows = [{"en": word, "es": "Casa. " if i < 40 else word} for i, word in enumerate(map(str, range(80)))]
    >>> train, test = split_rows(rows, job)
    >>> {row["es"] for row in train} & {row["es"] for row in test}, len(train) < 40 < len(train) + len(test)
    (set(), True)
    """
    rows = [row for row in rows if job.keep(row)]
    held_out = [not job.tested and hash_fraction(job.group(i, row)) < 0.1 for i, row in enumerate(rows)]
    test = [row for row, is_held_out in zip(rows, held_out, strict=True) if is_held_out]
    test_texts = {name: {normalize_text(row[name]) for row in test} for name in job.disjoint_fields}
    train = [row for row, is_held_out in zip(rows, held_out, strict=True) if not is_held_out]
    return [
        row for row in train if not any(normalize_text(row[name]) in test_texts[name] for name in job.disjoint_fields)
    ], test


def normalize_text(text: str) -> str:
    """Return a sentence in lower case with single spaces."""
    return " ".join(text.casefold().split())


def conll(folder: Path) -> None:
    """Write the training and test records of CoNLL-2003 from its two files, which firth does not fetch."""
    (RESULTS / "data" / "conll").mkdir(parents=True, exist_ok=True)
    for name, most in (("train", 10**6), ("test", TESTED)):
        rows = [row for _, row in text.records([str(folder / f"{name}.txt")], text=tables.sentences)]
        picks = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
        lines = (json.dumps({"tokens": rows[i]["tokens"], "tags": rows[i]["tags"]}) + "\n" for i in picks)
        (RESULTS / "data" / "conll" / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def read(name: str) -> Iterator[Row]:
    """Yield the records of a file of a corpus."""
    corpus, _, file = name.partition("/")
    for line in (catalog.fetch(corpus, silent) / file).open(encoding="utf-8"):
        yield json.loads(line)


def silent(_: str) -> None:
    """Drop the progress lines of a run."""


CLASS_NAMES: Mapping[str, Callable[[Row], list[str]]] = {
    "classification": lambda row: [str(row["label"])], "token_classification": lambda row: row["tags"],
}  # fmt: skip


def classes(job: Job, parts: tuple[Path, Path]) -> tuple[str, ...]:
    """Return the names of labels or tags in both files: a rare tag of Brown may occur in the test records alone."""
    if job.recipe not in CLASS_NAMES:
        return ()
    rows = (json.loads(line) for path in parts for line in path.open(encoding="utf-8"))
    return tuple(sorted({name for row in rows for name in CLASS_NAMES[job.recipe](row)}))


def ours(name: str, job: Job, arm: str, seed: int, quick: bool) -> Row:
    """Run a recipe; return its scores on the test records."""
    train, test = train_test_files(name, job, quick)
    start = str(catalog.fetch("minilm", silent) if arm == "minilm" else job.pretrained(train, quick))
    settings = [
        *job.settings, f"data={train}", "data.validation_fraction=0", f"batch.size={job.rows}", f"seed={seed}",
        f"max_steps={4 if quick else job.steps}", f"optimizer.lr={job.rates[arm]}", f"optimizer.weight_decay={DECAY}",
        f"optimizer.beta2={BETA2}", f"schedule.warmup_ratio={WARMUP}", "checkpoint.every=0",
    ]  # fmt: skip
    if job.recipe == "token_classification":
        settings.append(f"objective.class_names={json.dumps(classes(job, (train, test)))}")
    if "loss" in job.scores:
        settings += [f"data.validation_path=[{test}]", "evaluation.every=0", f"evaluation.max_examples={TESTED}"]
    if arm == "scratch":  # the config and the tokenizer of our own, and none of its weights
        config = json.loads((Path(start) / "firth.json").read_text("utf-8"))["config"]
        settings += [f"tokenizer.path={start}", f"model={json.dumps(config | {'vocab_size': None})}"]
    else:
        settings.append(f"init_from={start}")
    directory = RESULTS / "runs" / f"{name}-{arm}-{seed}"
    done = run(load(job.recipe, settings), directory, silent)
    found = job.score_run(directory, test, done)
    return {score: found[score] for score in job.scores} | {
        "seconds": done.seconds, "tokens": done.tokens, "tested": found["items"], "majority_accuracy": found.get("majority_accuracy"),
    }  # fmt: skip


def trainer(name: str, job: Job, seed: int, quick: bool) -> Row:
    """Run transformers' Trainer on the same records; return its scores."""
    train, test = train_test_files(name, job, quick)
    lesson = Lesson(
        train, test, load(job.recipe, list(job.settings)).examples, classes(job, (train, test)),
        steps=4 if quick else job.steps, rows=job.rows, rate=job.rates["trainer"], seed=seed, decay=DECAY, beta2=BETA2,
        warmup=WARMUP,
    )  # fmt: skip
    out = str(RESULTS / "trainer")
    if job.recipe == "text_to_text":
        found = tasks_translate.train_and_score(lesson, str(job.pretrained(train, quick)), out)
    else:
        found = tasks_peers.train_and_score(job.recipe, lesson, str(catalog.fetch("minilm", silent)), out)
    return {score: found[score] for score in (*job.scores, "seconds", "tokens", "tested")}


def lee(quick: bool) -> dict[str, float]:
    """Return Pearson's correlation of the cosine of `embed` with human judgments, without training."""
    rows = list(read("lee/lee.jsonl"))
    texts = sorted({text for row in rows for text in (row["text"], row["other"])})
    at = {text: i for i, text in enumerate(texts)}
    out = {}
    for arm, start in (("own", pretrained_encoder(Path(), quick)), ("minilm", catalog.fetch("minilm", silent))):
        found, _ = embed(load_model(start), Tokenizer.load(start), texts, length=256)
        cosines = [float(found[at[row["text"]]] @ found[at[row["other"]]]) for row in rows]
        out[arm] = metrics.pearson([row["label"] for row in rows], cosines)
    return out


def table() -> str:
    """Return a Markdown table: mean and half the range over seeds, seconds and useful tokens per second."""
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
                cells = f"{seconds:.0f} | {speed:,.0f} | {rows[0]['tested']} ({len(rows)} seeds)"
                lines.append(f"| {name} | {arm} | {', '.join(scores)} | {cells} |")
    file = RESULTS / "lee.json"
    if file.exists():
        for arm, value in json.loads(file.read_text()).items():
            lines.append(f"| lee | {arm}, no training | pearson {value:.3f} | | | 1225 pairs |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing arms, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*JOBS, "lee"])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--conll", type=Path, help="directory with train.txt and test.txt of CoNLL-2003")
    parser.add_argument("--limit", type=int, default=10**6, help="maximum number of new runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed and four steps, in a directory of its own")
    args = parser.parse_args()
    global RESULTS
    RESULTS = Path("runs/learn_tasks-quick") if args.quick else RESULTS
    torch.set_num_threads(args.threads)
    if args.conll:
        conll(args.conll)
    args.only = args.only or [name for name in (*JOBS, "lee") if name != "conll" or args.conll]
    if args.run:
        RESULTS.mkdir(parents=True, exist_ok=True)
        print(describe(machine()), flush=True)
        left = args.limit
        for seed in SEEDS[:1] if args.quick else SEEDS:  # one seed of all tasks before the next seed
            for name in (n for n in args.only if n in JOBS):
                for arm in (a for a in JOBS[name].arms if a in args.arms):
                    path = RESULTS / f"{name}-{arm}-{seed}.json"
                    if path.exists() or left <= 0:
                        continue
                    job = JOBS[name]
                    found = (
                        trainer(name, job, seed, args.quick)
                        if arm == "trainer"
                        else ours(name, job, arm, seed, args.quick)
                    )
                    path.write_text(json.dumps(found, indent=1))
                    left -= 1
                    cells = "  ".join(f"{key} {value:.3g}" for key, value in found.items() if value is not None)
                    print(f"{name} {arm} seed {seed}: {cells}", flush=True)
        if "lee" in args.only and not (RESULTS / "lee.json").exists() and left > 0:
            (RESULTS / "lee.json").write_text(json.dumps(lee(args.quick)))
    if args.table or not args.run:
        print(table())


if __name__ == "__main__":
    main()
