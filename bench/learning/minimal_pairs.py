"""Minimal pairs of the Brown corpus (`firth fetch minimal_pairs`): five families at equal FLOPs, and what counts of words decide.

    python -m bench.learning.minimal_pairs --run               # train and score what is missing; seed by seed
    python -m bench.learning.minimal_pairs --run --limit 1     # at most one new run, then stop
    python -m bench.learning.minimal_pairs --run --reference DIR    # also score a model of your own
    python -m bench.learning.minimal_pairs --table             # markdown for docs/results/minimal-pairs.md

gpt, roberta (MLM), xlnet, electra and t5 train on the State of the Union addresses with one tokenizer of 4,096 subwords
(`firth.compare`). Each is scored as its objective allows, without a prompt (`firth.evaluate.prompting.responders`):

    gpt                     log p by the chain rule, after bos
    gpt, after a period     the same with "." as prompt: few training windows begin with bos
    roberta, xlnet          pseudo-log-likelihood: each token given all others (Salazar 2020)
    ..., words              the same with the rest of a word masked too (Kauf and Ivanova 2023)
    t5; t5, words           each token, or word, filled into the gap of a sentinel
    electra, discriminator  sum of log p(original) over the tokens of the sentence as it is, one pass: no likelihood, but what
                            ELECTRA is trained to tell
    electra, generator      pseudo-log-likelihood of the MLM of half the width that trains it
    unigrams, bigrams       word counts of the training text, add-one; bigrams interpolated with unigrams
    word association        sum of the positive PMI of all word pairs at most five words apart: context without order
    untrained               the same models before their first step

An accuracy is the mean over the seeds; its 95% interval resamples the source sentences (bootstrap).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import describe, machine
from firth.compare.compare import ComparisonConfig, ComparisonRun, prepare, train_once, units
from firth.corpora import catalog
from firth.evaluate.perplexity import leading_bos
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.requests import ScoreReply, ScoreRequest
from firth.evaluate.prompting.responders import LocalModel
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_files import load_tasks
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.model.model import LM
from firth.runs.prepare import documents_of
from firth.training.schedule import Budget

RESULTS = Path("runs/learn_minimal_pairs")
FAMILIES = ("gpt", "roberta", "xlnet", "electra", "t5")
FLOPS, SEEDS = 6e12, 3
BODY = (
    "data.corpus=sotu", "data.validation_fraction=0.1", "model.hidden_size=128", "model.num_layers=3", "model.num_heads=2",
    "model.intermediate_size=256", "gpt.model.intermediate_size=512", "t5.model.num_layers=2",
    "t5.model.encoder.num_layers=2", "xlnet.model.attention.memory_length=0",
)  # fmt: skip
"""Two blocks on each side of an encoder-decoder cost as much as three; an ungated MLP is twice as wide as a gated one. The
pairs are single sentences, so XLNet trains without memory."""
WINDOW = 5
"""Most words between two associated words, plus one."""
BIGRAM_WEIGHT = 0.7
DRAWS = 2000

Correct = list[bool]
"""Whether the good sentence scores higher, for each pair; a tie is wrong."""


def load_comparison() -> ComparisonRun:
    """Return the comparison whose runs are trained."""
    config = ComparisonConfig(Budget(max_flops=FLOPS), (1.0,), SEEDS, probe="none")
    return prepare(FAMILIES, BODY, config, RESULTS, lambda _: None)


def run_directory(name: str, seed: int) -> Path:
    return RESULTS / "runs" / name / "share-1" / f"seed-{seed}"


def pairs_file() -> Path:
    return Path(catalog.fetch("minimal_pairs", log=print)) / "pairs.jsonl"


def load_pairs() -> list[dict[str, Any]]:
    return [json.loads(row) for row in pairs_file().read_text("utf-8").splitlines()]


# --------------------------------------------------------------------------- models


def responder(evaluated: EvaluatedModel, within_word: bool = False) -> LocalModel:
    """Return the model as `firth evaluate` opens it."""
    bos, _ = leading_bos(evaluated.model_directory, evaluated.tokenizer)
    return LocalModel(evaluated, within_word=within_word, bos=bos)


def by_likelihood(evaluated: EvaluatedModel, within_word: bool = False) -> Correct:
    """Return what `firth evaluate --task minimal_pairs` finds."""
    tasks = load_tasks("minimal_pairs", [str(pairs_file())])
    [result] = run_tasks(tasks, responder(evaluated, within_word), PromptConfig())
    return [item.metrics["acc"] == 1.0 for item in result.items]


def after_a_period(evaluated: EvaluatedModel) -> Correct:
    """Compare log p of the sentences as continuations of a period, not of a document that begins."""
    requests = [
        ScoreRequest(".", f" {pair[key]}") for pair in load_pairs() for key in ("sentence_good", "sentence_bad")
    ]
    replies = dict(responder(evaluated).reply(requests))
    scores = [reply.logprob for i in range(len(requests)) if isinstance(reply := replies[i], ScoreReply)]
    return [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]


def generator_of(evaluated: EvaluatedModel) -> EvaluatedModel:
    """Return ELECTRA's generator as a masked language model."""
    return EvaluatedModel(
        evaluated.model.language_model, evaluated.tokenizer, evaluated.directory, evaluated.model_directory
    )


def by_discriminator(evaluated: EvaluatedModel) -> Correct:
    """Compare the summed log p(original) of the tokens of each sentence."""
    model, vocab = evaluated.model, evaluated.vocab

    def score(text: str) -> float:
        row = vocab.add_special_tokens(evaluated.tokenizer.encode(text).astype(np.int64))
        hidden = model(rectangle([row], evaluated.device, causal=False))[0, 1:-1]
        return float(-torch.nn.functional.softplus(model.heads["replaced"](hidden)[:, 0].float()).double().sum())

    with inference_mode(model):
        return [score(pair["sentence_good"]) > score(pair["sentence_bad"]) for pair in load_pairs()]


Scorer = Callable[[EvaluatedModel], Correct]
BY_WORD: Scorer = partial(by_likelihood, within_word=True)
SCORERS: dict[str, dict[str, Scorer]] = {
    "gpt": {"gpt": by_likelihood, "gpt, after a period": after_a_period},
    "roberta": {"roberta": by_likelihood, "roberta, words": BY_WORD},
    "xlnet": {"xlnet": by_likelihood, "xlnet, words": BY_WORD},
    "electra": {
        "electra, discriminator": by_discriminator,
        "electra, generator": lambda evaluated: by_likelihood(generator_of(evaluated)),
    },
    "t5": {"t5": by_likelihood, "t5, words": BY_WORD},
}
UNTRAINED = ("gpt", "roberta")


def untrained(comparison: ComparisonRun, name: str, seed: int) -> EvaluatedModel:
    """Return a model of a recipe before its first step."""
    recipe = comparison.recipes[name]
    assert recipe.model is not None
    torch.manual_seed(seed)
    model = LM(recipe.model, recipe.objective.heads(recipe.model)).eval()
    return EvaluatedModel(model, comparison.tokenizer, RESULTS, RESULTS / "tokenizer")


# --------------------------------------------------------------------------- counts of words


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+|[^\w\s]", text.lower())


def association(words: Sequence[str], pairs: Mapping[tuple[str, str], int], counts: Counter[str], total: int) -> float:
    """Return the summed positive PMI of the word pairs of a sentence."""
    found = 0.0
    for i, word in enumerate(words):
        for other in words[i + 1 : i + 1 + WINDOW]:
            joint = pairs.get((word, other) if word < other else (other, word), 0)
            if joint:
                found += max(0.0, math.log(joint * counts.total() ** 2 / (total * counts[word] * counts[other])))
    return found


def counts_of_words(comparison: ComparisonRun) -> dict[str, Correct]:
    """Return the results of unigrams, bigrams and word association, counted in the training text."""
    data = comparison.recipes["gpt"].data
    texts = [words_of(one.text) for one in documents_of(data, data.paths(print), validation=False)]
    sentences = [(words_of(pair["sentence_good"]), words_of(pair["sentence_bad"])) for pair in load_pairs()]
    needed = {word for both in sentences for words in both for word in words}
    counts = Counter(word for words in texts for word in words)
    bigrams = Counter(pair for words in texts for pair in itertools.pairwise(words))
    near: Counter[tuple[str, str]] = Counter()
    for words in texts:
        for i, word in enumerate(words):
            if word in needed:
                near.update(
                    (word, other) if word < other else (other, word)
                    for other in words[i + 1 : i + 1 + WINDOW]
                    if other in needed
                )
    size, total = counts.total() + len(counts) + 1, WINDOW * counts.total()

    def unigram(word: str) -> float:
        return (counts[word] + 1) / size

    def bigram(before: str, word: str) -> float:
        seen = bigrams[before, word] / counts[before] if counts[before] else unigram(word)
        return BIGRAM_WEIGHT * seen + (1 - BIGRAM_WEIGHT) * unigram(word)

    def by_unigrams(words: Sequence[str]) -> float:
        return sum(math.log(unigram(word)) for word in words)

    def by_bigrams(words: Sequence[str]) -> float:
        return sum(math.log(bigram(before, word)) for before, word in zip([".", *words], words, strict=False))

    scores = {
        "unigrams": by_unigrams, "bigrams": by_bigrams,
        "word association": lambda words: association(words, near, counts, total),
    }  # fmt: skip
    return {name: [score(good) > score(bad) for good, bad in sentences] for name, score in scores.items()}


# --------------------------------------------------------------------------- runs and table


def save(name: str, seed: int, correct: Correct) -> None:
    file = RESULTS / "correct" / f"{name}-{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"name": name, "seed": seed, "correct": correct, "machine": describe(machine())}))
    print(f"{name}, seed {seed}: {np.mean(correct):.3f}", flush=True)


def is_saved(name: str, seed: int) -> bool:
    return (RESULTS / "correct" / f"{name}-{seed}.json").exists()


def run(comparison: ComparisonRun, limit: int, reference: Path | None) -> None:
    """Train at most `limit` missing runs and score every run that has ended."""
    for name, share, seed in units(comparison):
        if not (RESULTS / "scores" / name / f"share-{share:g}-seed-{seed}.json").exists():
            if not limit:
                continue
            limit -= 1
            score = train_once(comparison, name, share, seed)
            print(
                f"{name} seed {seed}: {score.steps} steps, {score.tokens:,} tokens, {score.seconds:.0f} s", flush=True
            )
        missing = {label: scorer for label, scorer in SCORERS[name].items() if not is_saved(label, seed)}
        if missing:
            evaluated = load_evaluated_model(run_directory(name, seed))
            for label, scorer in missing.items():
                save(label, seed, scorer(evaluated))
        if name in UNTRAINED and not is_saved(f"untrained {name}", seed):
            save(f"untrained {name}", seed, by_likelihood(untrained(comparison, name, seed)))
    if not is_saved("bigrams", 0):
        for label, correct in counts_of_words(comparison).items():
            save(label, 0, correct)
    if reference is not None and not is_saved("reference", 0):
        save("reference", 0, by_likelihood(load_evaluated_model(reference)))


def interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean over items that are resampled by cluster."""
    _, index = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    picks = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    low, high = np.quantile(sums[picks].sum(1) / sizes[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


def cell(values: np.ndarray, clusters: np.ndarray) -> str:
    low, high = interval(values, clusters)
    mean = f"{values.mean():.3f}"
    return f"**{mean}** ({low:.2f} to {high:.2f})" if low > 0.5 else f"{mean} ({low:.2f} to {high:.2f})"


def labels() -> Iterable[str]:
    """Return the rows of the table in order."""
    yield from ("unigrams", "bigrams", "word association")
    yield from (f"untrained {name}" for name in UNTRAINED)
    yield from (label for scorers in SCORERS.values() for label in scorers)
    yield "reference"


def table() -> str:
    """Return Markdown: accuracy by phenomenon, and by whether the right form is the more frequent one."""
    pairs = load_pairs()
    phenomena = list(dict.fromkeys(pair["UID"] for pair in pairs))
    clusters = np.array([pair["sentence"] for pair in pairs])
    frequent = np.array([json.loads((RESULTS / "correct" / "unigrams-0.json").read_text())["correct"]], bool)[
        0
    ]  # the right form is the more frequent one in the training text
    kinds = {name: np.array([pair["UID"] == name for pair in pairs]) for name in phenomena}
    lines = [
        f"| model | seeds | all | {' | '.join(phenomena)} | right form more frequent | less frequent |",
        "|---" * (len(phenomena) + 5) + "|",
    ]
    for label in labels():
        files = sorted((RESULTS / "correct").glob(f"{label}-[0-9]*.json"))
        if not files:
            continue
        runs = np.array([json.loads(file.read_text())["correct"] for file in files], float)
        values = runs.mean(0)
        cells = [cell(values, clusters), *(cell(values[kind], clusters[kind]) for kind in kinds.values())]
        cells += [f"{values[frequent].mean():.3f}", f"{values[~frequent].mean():.3f}"]
        lines.append(f"| {label} | {len(files)} | {' | '.join(cells)} |")
    counts = ", ".join(f"{int(kind.sum())} {name}" for name, kind in kinds.items())
    return "\n".join([*lines, "", f"{len(pairs)} pairs of {len(np.unique(clusters))} sentences: {counts}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--limit", type=int, default=1000, help="maximum number of new runs; 0 scores the finished ones"
    )
    parser.add_argument("--reference", type=Path, default=None, help="directory of another model to score")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        run(load_comparison(), args.limit, args.reference)
    if args.table:
        print(table())


if __name__ == "__main__":
    main()
