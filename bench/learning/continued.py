"""Continued pretraining of published models on one's own text: labels, forgetting, and added tokens.

    python -m bench.learning.continued --run              # all missing runs; about an hour on two threads
    python -m bench.learning.continued --run labels       # some of: labels, forget, tokens
    python -m bench.learning.continued --table            # markdown of the existing results

labels    MiniLM is pretrained further on the texts of a data set without their labels (`firth train roberta init_from=minilm`), and a
          classifier is finetuned from it, and from MiniLM itself, on the same 200 and 1,000 labels; 1,000 other records test both.
forget    SmolLM2 with LoRA on French help pages (`firth train gpt init_from=smollm2 peft=lora`): bits per byte of held-out pages,
          and of the Brown corpus, before and after.
tokens    SmolLM2 and MiniLM on the same French text at equal counted FLOPs, with and without tokens added to their tokenizer.

Every run is a run directory under runs/learn_continued, so a stopped command can be repeated. Intervals: of labels, Student's t over
the seeds of the paired differences; of bits per byte, a bootstrap over documents.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from firth.corpora import catalog
from firth.evaluate.perplexity import Likelihood, score, strided, tokenize
from firth.evaluate.tokenizer_match import load_tokenizer
from firth.io.atomic import write_text
from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.runs.start_model import model_directory
from firth.tokenizer.extend import tokens_per_word

OUT = Path("runs/learn_continued")
SETS = ("sarcasm", "sentiment", "brown")
GENRES = {"abc": "press", "def": "popular", "gh": "official", "j": "learned", "klmnpr": "fiction"}
"""Letters of the Brown corpus -> the label of its paragraphs: which kind of text is it?"""
SEEDS = (0, 1, 2)
LABELS = {200: 40, 1000: 80}
"""Number of labels -> steps of finetuning."""
NUM_TEST, NUM_TEXTS, ADAPT_STEPS = 1000, 8000, 400
FRENCH, ENGLISH = "libreoffice-help-fr", "brown"
NUM_DOCUMENTS, DOCUMENT_CHARACTERS = 16, 2000
FORGET_STEPS = 30
ARMS = {"minilm": ("roberta", 1e13, 4000), "smollm2": ("gpt", 2.5e13, 4000)}
"""Model -> recipe, FLOPs of each run, tokens to add."""


def finish(recipe: str, settings: list[str], place: Path) -> None:
    """Run what is missing, and delete the checkpoints, which have three times the size of the model."""
    run(load(recipe, settings), place)
    shutil.rmtree(place / "checkpoints", ignore_errors=True)


def silent(_: str) -> None:
    """Ignore a message."""


def records(name: str) -> list[dict[str, Any]]:
    """Return the records of a data set in a random order, the same each time; those of Brown by document, so that none is divided."""
    folder, order = catalog.fetch(name, silent), random.Random(0)
    if name == "brown":
        files = sorted(folder.glob("*.txt"))
        order.shuffle(files)
        return [row for file in files for row in genre_records(file)]
    (path,) = folder.glob("*.jsonl")
    rows = [json.loads(row) for row in path.read_text("utf-8").splitlines()]
    order.shuffle(rows)
    return rows


def genre_records(file: Path) -> list[dict[str, Any]]:
    """Return the paragraphs of a document with at least eight words, and its genre."""
    (label,) = (genre for letters, genre in GENRES.items() if file.name[1] in letters)
    paragraphs = file.read_text("utf-8").split("\n\n")
    return [{"text": " ".join(text.split()), "label": label} for text in paragraphs if len(text.split()) >= 8]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write records once."""
    if not path.exists():
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run_labels() -> None:
    """Pretrain further on the texts of each set, and finetune with few labels from there and from MiniLM."""
    for name in SETS:
        place, rows = OUT / name, records(name)
        place.mkdir(parents=True, exist_ok=True)
        test = write_rows(place / "test.jsonl", rows[:NUM_TEST])
        texts = [{"text": row["text"]} for row in rows[NUM_TEST : NUM_TEST + NUM_TEXTS]]
        text = write_rows(place / "text.jsonl", texts)
        adapted = place / "adapted"
        on = [
            "init_from=minilm",
            f"data.path={text}",
            f"max_steps={ADAPT_STEPS}",
            "sample_prompts=[]",
        ]
        finish("roberta", on, adapted)
        for seed in SEEDS:
            order = random.Random(seed + 1).sample(rows[NUM_TEST : NUM_TEST + NUM_TEXTS], max(LABELS))
            for count, steps in LABELS.items():
                train = write_rows(place / f"labels-{count}-{seed}.jsonl", order[:count])
                for arm, start in (("minilm", "minilm"), ("adapted", str(adapted))):
                    settings = [
                        f"init_from={start}", f"data.path={train}", f"data.validation_path=[{test}]", f"max_steps={steps}",
                        f"seed={seed}", "examples.max_length=48", "batch.size=32",
                    ]  # fmt: skip
                    finish("classification", settings, place / f"{arm}-{count}-{seed}")


def documents(corpus: str) -> list[str]:
    """Return the texts of the held-out documents that are measured: evenly spaced, shortened."""
    files = sorted(catalog.fetch(corpus, silent).glob("*.txt"))
    texts = [file.read_text("utf-8")[:DOCUMENT_CHARACTERS] for file in files[::-10] if file.stat().st_size > 1500]
    return texts[:: max(1, len(texts) // NUM_DOCUMENTS)][:NUM_DOCUMENTS]


def training_folder() -> str:
    """Return a folder of links to the French pages without every tenth one, of which the held-out ones are taken."""
    folder = OUT / "french"
    if not folder.exists():
        folder.mkdir(parents=True)
        files = sorted(catalog.fetch(FRENCH, silent).glob("*.txt"))
        held = set(files[::-10])
        for file in files:
            if file not in held:
                (folder / file.name).symlink_to(file)
    return str(folder)


def measured(model: Path, texts: list[str], file: Path) -> list[Likelihood]:
    """Return the likelihood of each text under a causal model, computed once."""
    if not file.exists():
        place = model_directory(model)
        lm, tokenizer = load_model(place), load_tokenizer(place)
        lm.restrict_vocab(tokenizer.vocab)
        found = [score(lm, strided(tokenize(tokenizer, text), 256), 2048) for text in texts]
        write_text(file, json.dumps([vars(one) for one in found]))
    return [Likelihood(**one) for one in json.loads(file.read_text("utf-8"))]


def run_forget() -> None:
    """Train SmolLM2 with LoRA on French help pages, and measure both texts before and after."""
    smollm2 = catalog.fetch("smollm2", silent)
    tuned = OUT / "smollm2-lora"
    on = [
        "init_from=smollm2",
        "peft=lora",
        f"data.path={training_folder()}",
        f"max_steps={FORGET_STEPS}",
        "sample_prompts=[]",
    ]
    finish("gpt", [*on, "evaluation.max_examples=16"], tuned)
    for corpus in (FRENCH, ENGLISH):
        for name, place in (("before", smollm2), ("after", tuned)):
            measured(place, documents(corpus), OUT / f"forget-{corpus}-{name}.json")


def run_tokens() -> None:
    """Train SmolLM2 and MiniLM in full on French help pages, with and without added tokens, at equal FLOPs."""
    for model, (recipe, flops, count) in ARMS.items():
        for added in (0, count):
            place = OUT / f"{model}-{added}"
            settings = [
                f"init_from={model}", f"data.path={training_folder()}", f"max_flops={flops}", f"tokenizer.extend={added}",
                "sample_prompts=[]", "evaluation.every=0", "checkpoint.every=0", "evaluation.max_examples=200",
            ]  # fmt: skip
            finish(recipe, settings, place)
            if recipe == "gpt":
                measured(place, documents(FRENCH), OUT / f"tokens-{model}-{added}.json")


def metrics_of(place: Path) -> dict[str, float]:
    """Return the metrics of a finished run."""
    found: dict[str, float] = json.loads((place / "done.json").read_text("utf-8"))["metrics"]
    return found


def t_interval(values: list[float]) -> str:
    """Return mean and 95% interval of Student's t."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def bits(parts: list[Likelihood]) -> float:
    return sum(parts, Likelihood()).bits_per_byte


def bootstrap(before: list[Likelihood], after: list[Likelihood]) -> str:
    """Return the difference of bits per byte with a 95% interval over documents."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(2000):
        some = rng.integers(len(before), size=len(before))
        draws.append(bits([after[i] for i in some]) - bits([before[i] for i in some]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{bits(after) - bits(before):+.3f} [{low:+.3f}, {high:+.3f}]"


def likelihoods(name: str) -> list[Likelihood]:
    return [Likelihood(**one) for one in json.loads((OUT / f"{name}.json").read_text("utf-8"))]


def print_labels() -> None:
    print("| set | labels | seeds | from MiniLM | after further pretraining | difference |\n|---|---|---|---|---|---|")
    for name in SETS:
        for count in LABELS:
            places = [[OUT / name / f"{arm}-{count}-{seed}" for arm in ("minilm", "adapted")] for seed in SEEDS]
            done = [pair for pair in places if all((place / "done.json").exists() for place in pair)]
            if len(done) < 2:
                continue
            pairs = [[metrics_of(place)["valid/accuracy"] for place in pair] for pair in done]
            cells = [f"{np.mean(arm):.3f}" for arm in zip(*pairs, strict=True)]
            difference = t_interval([after - before for before, after in pairs])
            print(f"| {name} | {count:,} | {len(done)} | {' | '.join(cells)} | {difference} |")


def print_forget() -> None:
    print("| text | before | after | difference |\n|---|---|---|---|")
    for corpus in (FRENCH, ENGLISH):
        before, after = (likelihoods(f"forget-{corpus}-{name}") for name in ("before", "after"))
        print(f"| {corpus} | {bits(before):.3f} | {bits(after):.3f} | {bootstrap(before, after)} |")


def print_tokens() -> None:
    print("| model | added | tokens per word | steps | held out | difference |\n|---|---|---|---|---|---|")
    for model, (recipe, _, count) in ARMS.items():
        first: list[Likelihood] = []
        for added in (0, count):
            place = OUT / f"{model}-{added}"
            words = tokens_per_word(load_tokenizer(place / "model"), documents(FRENCH))
            steps = json.loads((place / "done.json").read_text("utf-8"))["steps"]
            difference = ""
            if recipe == "gpt":
                parts = likelihoods(f"tokens-{model}-{added}")
                value, difference = f"{bits(parts):.3f} bits per byte", bootstrap(first, parts) if first else ""
                first = parts
            else:
                value = f"{metrics_of(place)['valid/loss'] * words:.2f} nats per masked word"
            print(f"| {model} | {added:,} | {words:.2f} | {steps} | {value} | {difference} |")


PARTS = {
    "labels": (run_labels, print_labels),
    "forget": (run_forget, print_forget),
    "tokens": (run_tokens, print_tokens),
}


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", nargs="*", choices=PARTS, help="parts to run; all by default")
    parser.add_argument("--table", nargs="*", choices=PARTS, help="parts to print; all by default")
    args = parser.parse_args()
    for name in (args.run or PARTS) if args.run is not None else ():
        PARTS[name][0]()
    for name in (args.table or PARTS) if args.table is not None else ():
        PARTS[name][1]()


if __name__ == "__main__":
    main()
