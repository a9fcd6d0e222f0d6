"""Real tasks from nothing, from our own pretraining and from MiniLM, beside transformers' Trainer on the same examples.

    python -m bench.learn_tasks --run                      # every arm, three seeds; resumable: two and a half hours on one thread
    python -m bench.learn_tasks --run --only sarcasm ner   # some tasks; --limit 3 stops after three new runs
    python -m bench.learn_tasks --table                    # markdown for docs/results/index.md
    python -m bench.learn_tasks --run --quick              # a check: one seed, four steps

    sarcasm, reviews       two classes of one sentence         accuracy
    vitaminc               three classes of a pair (bigbench)  accuracy; whole pages held out
    ner, speech            tags of words                       F1 of names; accuracy (whole documents of Brown held out)
    conll                  names (CoNLL-2003, of --conll DIR)  F1; its own test file
    squad                  spans, new domains to SQuAD's dev   exact match and F1 (bigbench)
    quartz, logiqa         two or four options                 accuracy
    lee                    likeness of news, nothing learnt    Pearson's correlation of `embed` with people's
    translate              English reviews in Spanish          chrF, BLEU, held-out loss (bigbench, translated by machine)

The arms: "scratch" and "own" are four blocks of width 192 with 4,096 subwords of the Brown corpus, "own" after 1,600 steps of
`roberta` on it (its raw text holds the sentences of `speech`, without tags); "minilm" starts from MiniLM-L6, packed where rows
can be, as the recipes come; "trainer" is transformers' Trainer from MiniLM, as it comes (fp32, dynamic padding), with the same
records, steps, rows, rate, schedule and decay, and the head that transformers has for the task (`bench.tasks_peers`). An
encoder does not translate: there is no MiniLM in `translate`, whose arms have an encoder-decoder, "own" after span corruption
of the Brown corpus and "trainer" transformers' T5 from nothing (`bench.tasks_translate`). Ours runs in the precision that
"auto" finds. Seconds are of training alone; tokens are those that are no padding. At most TESTED records are tested on, the
same in every arm. The rates of "scratch" and "own" are the best of 1e-3, 2e-3 and 4e-3 for `sarcasm` at another seed.
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

from bench import tasks_peers, tasks_translate
from bench.harness import describe, machine
from bench.tasks_peers import Lesson, Row
from firth.corpora import catalog, tables
from firth.corpora import readers as text
from firth.data.split import place
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


def own(_: Path, quick: bool) -> Path:
    """Our own pretrained encoder, made once."""
    steps = 4 if quick else 1600
    settings = [
        "data.corpus=brown",
        f"max_steps={steps}",
        "evaluation.every=0",
        f"checkpoint.every={steps}",
        "sample_prompts=[]",
    ]
    return run(load("roberta", settings), RESULTS / "own", say).model


def measured(directory: Path, test: Path, done: RunResult) -> Row:
    """What a run of ours scores."""
    found = evaluate(directory, [str(test)])
    return found | {"commonest": found.get("majority_accuracy")}


@dataclass(frozen=True)
class Job:
    """corpus: of the catalogue, and its file. recipe: what is trained. family: what is held out together. settings: of the
    recipe. steps, rows: of a run. scores: what is kept of all that is measured. kept: which records are asked at all. apart:
    fields of which no value may stand on both sides. own: makes our pretrained model. measured: scores a run of ours."""

    corpus: str
    recipe: str
    scores: tuple[str, ...]
    steps: int
    rows: int
    settings: tuple[str, ...] = ()
    family: Callable[[int, Row], str] = lambda i, row: str(i)
    arms: tuple[str, ...] = ARMS
    tested: str = ""
    kept: Callable[[Row], bool] = lambda row: True
    apart: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    own: Callable[[Path, bool], Path] = own
    measured: Callable[[Path, Path, RunResult], Row] = measured


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
        lambda i, row: row["document_ids"],
        rates=RATES | {"minilm": 5e-4, "trainer": 5e-4},  # 470 tags: at 1e-4 both stop half-way
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
        kept=tasks_translate.short, apart=tasks_translate.LANGUAGES, rates={"scratch": 2e-3, "own": 2e-3, "trainer": 2e-3},
        own=lambda train, quick: tasks_translate.pretrained(RESULTS, train, quick), measured=tasks_translate.measured,
    ),
}  # fmt: skip


def halves(name: str, job: Job, quick: bool) -> tuple[Path, Path]:
    """What is learnt from and what is tested on, written once."""
    folder = RESULTS / "data" / name
    parts = folder / "train.jsonl", folder / "test.jsonl"
    if not all(path.exists() for path in parts):
        folder.mkdir(parents=True, exist_ok=True)
        train, test = divided(list(read(job.corpus)), job)
        test = list(read(job.tested)) if job.tested else test
        train = train[:3000] if quick else train
        picks = np.unique(np.linspace(0, len(test) - 1, 50 if quick else TESTED).round().astype(int))
        for path, some in zip(parts, (train, [test[i] for i in picks]), strict=True):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), "utf-8")
    return parts


def divided(rows: list[Row], job: Job) -> tuple[list[Row], list[Row]]:
    """What may be learnt from, and a tenth of the families held out; all is learnt from if the test is another file.

    >>> job = Job("", "", (), 0, 0, family=lambda i, row: row["en"], apart=("en", "es"))
    >>> rows = [{"en": word, "es": "Casa. " if i < 40 else word} for i, word in enumerate(map(str, range(80)))]
    >>> train, test = divided(rows, job)
    >>> {row["es"] for row in train} & {row["es"] for row in test}, len(train) < 40 < len(train) + len(test)
    (set(), True)
    """
    rows = [row for row in rows if job.kept(row)]
    held = [not job.tested and place(job.family(i, row)) < 0.1 for i, row in enumerate(rows)]
    test = [row for row, apart in zip(rows, held, strict=True) if apart]
    asked = {name: {bare(row[name]) for row in test} for name in job.apart}
    train = [row for row, apart in zip(rows, held, strict=True) if not apart]
    return [row for row in train if not any(bare(row[name]) in asked[name] for name in job.apart)], test


def bare(text: str) -> str:
    """A sentence without case and runs of blanks."""
    return " ".join(text.casefold().split())


def conll(folder: Path) -> None:
    """CoNLL-2003's two files as the halves of a job; who has them has them from Reuters, and firth does not fetch them."""
    (RESULTS / "data" / "conll").mkdir(parents=True, exist_ok=True)
    for name, most in (("train", 10**6), ("test", TESTED)):
        rows = [row for _, row in text.records([str(folder / f"{name}.txt")], text=tables.sentences)]
        picks = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
        lines = (json.dumps({"tokens": rows[i]["tokens"], "tags": rows[i]["tags"]}) + "\n" for i in picks)
        (RESULTS / "data" / "conll" / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def read(name: str) -> Iterator[Row]:
    """The records of a corpus's file."""
    corpus, _, file = name.partition("/")
    for line in (catalog.fetch(corpus, say) / file).open(encoding="utf-8"):
        yield json.loads(line)


def say(_: str) -> None:
    """What a run tells on its way, which nobody waits for here."""


NAMED: Mapping[str, Callable[[Row], list[str]]] = {
    "classification": lambda row: [str(row["label"])], "token_classification": lambda row: row["tags"],
}  # fmt: skip


def classes(job: Job, parts: tuple[Path, Path]) -> tuple[str, ...]:
    """The names of labels or tags; those of both parts, for a tag of Brown's may be so rare that nobody can learn it."""
    if job.recipe not in NAMED:
        return ()
    rows = (json.loads(line) for path in parts for line in path.open(encoding="utf-8"))
    return tuple(sorted({name for row in rows for name in NAMED[job.recipe](row)}))


def ours(name: str, job: Job, arm: str, seed: int, quick: bool) -> Row:
    """One run of a recipe, and its score on the test."""
    train, test = halves(name, job, quick)
    start = str(catalog.fetch("minilm", say) if arm == "minilm" else job.own(train, quick))
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
    place_ = RESULTS / "runs" / f"{name}-{arm}-{seed}"
    done = run(load(job.recipe, settings), place_, say)
    found = job.measured(place_, test, done)
    return {score: found[score] for score in job.scores} | {
        "seconds": done.seconds, "tokens": done.tokens, "tested": found["items"], "commonest": found.get("commonest"),
    }  # fmt: skip


def trainer(name: str, job: Job, seed: int, quick: bool) -> Row:
    """transformers' Trainer on the same records."""
    train, test = halves(name, job, quick)
    lesson = Lesson(
        train, test, load(job.recipe, list(job.settings)).examples, classes(job, (train, test)),
        steps=4 if quick else job.steps, rows=job.rows, rate=job.rates["trainer"], seed=seed, decay=DECAY, beta2=BETA2,
        warmup=WARMUP,
    )  # fmt: skip
    out = str(RESULTS / "trainer")
    if job.recipe == "text_to_text":
        found = tasks_translate.taught(lesson, str(job.own(train, quick)), out)
    else:
        found = tasks_peers.taught(job.recipe, lesson, str(catalog.fetch("minilm", say)), out)
    return {score: found[score] for score in (*job.scores, "seconds", "tokens", "tested")}


def lee(quick: bool) -> dict[str, float]:
    """Pearson's correlation of the cosine of `embed` with people's judgement, before anything is learnt of it."""
    rows = list(read("lee/lee.jsonl"))
    texts = sorted({text for row in rows for text in (row["text"], row["other"])})
    at = {text: i for i, text in enumerate(texts)}
    out = {}
    for arm, start in (("own", own(Path(), quick)), ("minilm", catalog.fetch("minilm", say))):
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
    parser.add_argument("--only", nargs="*", choices=[*JOBS, "lee"])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--conll", type=Path, help="a folder with CoNLL-2003's train.txt and test.txt")
    parser.add_argument("--limit", type=int, default=10**6, help="stop after so many new runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one seed and four steps, in a folder of its own")
    given = parser.parse_args()
    global RESULTS
    RESULTS = Path("runs/learn_tasks-quick") if given.quick else RESULTS
    torch.set_num_threads(given.threads)
    if given.conll:
        conll(given.conll)
    given.only = given.only or [name for name in (*JOBS, "lee") if name != "conll" or given.conll]
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
