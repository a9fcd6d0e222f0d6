"""Benefit of word vectors, a pretrained LSTM and ELMo on held-out data, against the same models without them.

    python -m bench.learning.recurrent              20 minutes on two cores, three seeds
    python -m bench.learning.recurrent --only words some of: headlines tags words kinds
    python -m bench.learning.recurrent --table      markdown for docs/results/index.md
    python -m bench.learning.recurrent --quick      one seed and a twentieth of the steps: a check that it works

headlines   satire or not (`firth fetch sarcasm`): 500 labels, 2,000 headlines to test on, and the rest as plain text to train
            word vectors and an LSTM language model. An LSTM classifier starts from random weights, from the vectors
            (pretrained embeddings), and from the whole language model (Dai and Le 2015).
tags        the main part of speech of each word of the Brown corpus; every tenth document is held out from everything. A
            linear layer on frozen states: of an untrained ELMo, of word vectors, of a mixture of ELMo's layers.
words       whether synonyms (`firth fetch wordnet`) have closer vectors than two words of the same frequencies: area under
            the ROC curve, 0.5 by chance; and if gensim is installed, the rank correlation with human judgments (its copy of
            WordSim-353). Skip-gram and CBOW, of firth and of gensim, on the same words.
kinds       the tiny `lstm` as an RNN, a GRU and an LSTM: held-out bits per byte.

Each run is a run directory under runs/learn_recurrent, so a stopped command can be repeated; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from firth.corpora import catalog
from firth.generate import embeddings
from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer

RESULTS = Path("runs/learn_recurrent")
HIDDEN_SIZE = 128
NUM_LABELS, NUM_TEST = 500, 2000
TOKENIZER = ("tokenizer.algorithm=word", "tokenizer.vocab_size=10000")
LSTM_CONFIG = (
    f"{{hidden_size: {HIDDEN_SIZE}, num_layers: 1, num_heads: 1, norm: {{placement: post}}, position: none, rnn: lstm, "
    "dropout: 0.1}"
)
ELMO_CONFIG = (
    f"{{hidden_size: {2 * HIDDEN_SIZE}, num_layers: 2, num_heads: 1, norm: {{placement: post}}, position: none, "
    "rnn: {type: lstm, separate_directions: true, residual: true}, "
    "causal: false, tie_embeddings: false, lm_head: {bias: true}, "
    "embedding: {characters: {max_length: 16, num_filters: 256}}}"
)


def write_headlines(folder: Path) -> None:
    """Write bare.jsonl, few.jsonl (part of bare) and scored.jsonl (disjoint from both)."""
    lines = next(catalog.fetch("sarcasm", log=print).glob("*.jsonl")).read_text("utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    cuts = {"scored": order[:NUM_TEST], "few": order[NUM_TEST : NUM_TEST + NUM_LABELS], "bare": order[NUM_TEST:]}
    for name, some in cuts.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in some), "utf-8")


def write_brown(folder: Path) -> None:
    """Write text/*.txt without the held-out documents, and tagged.jsonl and scored_tags.jsonl with main tags alone."""
    source = catalog.fetch("brown", log=print)
    names = sorted(path.stem for path in source.glob("*.txt"))
    held_out = set(names[::10])
    (folder / "text").mkdir()
    for name in set(names) - held_out:
        (folder / "text" / f"{name}.txt").write_text((source / f"{name}.txt").read_text("utf-8"), "utf-8")
    rows: dict[bool, list[str]] = {True: [], False: []}
    for line in (source / "tagged.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        row["tags"] = [tag.removeprefix("fw-").split("-")[0].split("+")[0] or tag for tag in row["tags"]]
        rows[row["document"] in held_out].append(json.dumps(row))
    (folder / "tagged.jsonl").write_text("\n".join(rows[False]) + "\n", "utf-8")
    (folder / "scored_tags.jsonl").write_text("\n".join(rows[True]) + "\n", "utf-8")


def run_stage(name: str, recipe: str, seed: int, steps: int, settings: Sequence[str]) -> RunResult:
    """Run a recipe, or continue its run."""
    common = (
        f"seed={seed}",
        f"max_steps={steps}",
        "checkpoint.every=1000",
        "sample_prompts=[]",
        f"evaluation.every={max(steps // 2, 1)}",
    )
    return run(load(recipe, [*common, *settings]), RESULTS / f"{name}-{steps}-{seed}", log=print)


def prepare_data() -> Path:
    """Write the texts and labels of all studies once; return their directory."""
    folder = RESULTS / "data"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_headlines(folder)
        write_brown(folder)
        (folder / "whole").touch()
    return folder


Steps = Callable[[int], int]


def headlines_study(seed: int, steps: Steps) -> dict[str, float]:
    """Score a classifier from random weights, word vectors and the whole language model."""
    text_settings = (f"data.path={prepare_data()}/bare.jsonl",)
    word_vectors_run = run_stage(
        "vectors",
        "word2vec",
        seed,
        steps(600),
        [*text_settings, *TOKENIZER, f"model.hidden_size={HIDDEN_SIZE}", "examples.max_length=256"],
    )
    model_settings = (f"model={LSTM_CONFIG}", f"tokenizer.path={word_vectors_run.directory}")
    lm_run = run_stage(
        "lm", "lstm", seed, steps(800), [*text_settings, *model_settings, "examples.max_length=64", "batch.size=32"]
    )
    found = {"lm, held-out loss": lm_run.metrics["valid/loss"]}
    task = (
        f"data.path={prepare_data()}/few.jsonl",
        f"data.validation_path={prepare_data()}/scored.jsonl",
        "objective.position=last",
        "examples.max_length=48",
    )
    inits = {
        "random weights": [*model_settings, "optimizer.lr=2e-3"],
        "word vectors": [*model_settings, f"init_embeddings_from={word_vectors_run.directory}", "optimizer.lr=2e-3"],
        "the whole LM": [f"init_from={lm_run.directory}"],
    }
    for name, init_settings in inits.items():
        result = run_stage(
            f"headlines-{name.replace(' ', '_')}", "classification", seed, steps(200), [*task, *init_settings]
        )
        found[f"headlines from {name}, accuracy"] = result.metrics["valid/accuracy"]
    return found


def brown_vectors(seed: int, steps: Steps, algorithm: str = "skipgram") -> RunResult:
    settings = (
        f"data.path={prepare_data()}/text",
        *TOKENIZER,
        f"model.hidden_size={HIDDEN_SIZE}",
        f"objective.algorithm={algorithm}",
    )
    return run_stage(f"brown-{algorithm}", "word2vec", seed, steps(1200), settings)


def tags_study(seed: int, steps: Steps) -> dict[str, float]:
    """Score tags predicted from frozen states."""
    found, vectors_run = {}, brown_vectors(seed, steps)
    elmo_settings = (f"model={ELMO_CONFIG}", f"tokenizer.path={vectors_run.directory}")
    text = f"data.path={prepare_data()}/text"
    elmo = run_stage(
        "elmo", "elmo", seed, steps(500), [text, *elmo_settings, "examples.max_length=64", "batch.size=16"]
    )
    for direction in ("forward", "backward"):
        found[f"elmo {direction}, held-out loss"] = elmo.metrics[f"valid/loss/{direction}"]
    task = (
        f"data.path={prepare_data()}/tagged.jsonl",
        f"data.validation_path={prepare_data()}/scored_tags.jsonl",
        "examples.max_length=64",
    )
    inits = {
        "an untrained ELMo": elmo_settings[:2],
        "word vectors": (f"init_from={vectors_run.directory}",),
        "ELMo": (f"init_from={elmo.directory}",),
    }
    for name, init_settings in inits.items():
        result = run_stage(
            f"tags-{name.replace(' ', '_')}", "token_features", seed, steps(300), [*task, *init_settings]
        )
        found[f"tags from {name}, accuracy"] = result.metrics["valid/accuracy"]
    return found


def kinds_study(seed: int, steps: Steps) -> dict[str, float]:
    """Score the tiny `lstm` with each type of RNN on Shakespeare: held-out bits per byte."""
    found = {}
    for kind in ("rnn", "gru", "lstm"):
        result = run_stage(f"kind-{kind}", "lstm", seed, steps(300), [f"model.rnn.type={kind}"])
        found[f"{kind}, bits per byte"] = result.metrics["valid/bits_per_byte"]
    return found


def words_study(seed: int, steps: Steps) -> dict[str, float]:
    """Score vectors of firth and gensim on synonyms and human judgments."""
    found: dict[str, float] = {}
    for algorithm in ("skipgram", "cbow"):
        directory = brown_vectors(seed, steps, algorithm).directory
        words = Words(directory, prepare_data() / "text")
        tables = {"firth": embeddings.table(load_model(directory / "model")).numpy()}
        if importlib.util.find_spec("gensim"):
            tables["gensim"] = words.gensim_vectors(seed, algorithm)
        for library, table in tables.items():
            found[f"{algorithm}, {library}: synonyms"] = words.synonym_auc(table)
            if importlib.util.find_spec("gensim"):
                found[f"{algorithm}, {library}: human judgments"] = words.human_correlation(table)
    return found


class Words:
    """Evaluation of the vectors of frequent words of a text, for the tokenizer of a run."""

    def __init__(self, directory: Path, text: Path) -> None:
        self.tokenizer, self.steps = Tokenizer.load(directory), int(directory.name.split("-")[-2])
        self.rows = [self.tokenizer.encode(path.read_text("utf-8")) for path in sorted(text.glob("*.txt"))]
        self.counts = np.bincount(np.concatenate(self.rows), minlength=self.tokenizer.vocab.size)
        frequent = (i for i in self.tokenizer.vocab.ordinary if self.counts[i] >= 20)
        self.ids = {self.tokenizer.token(i): i for i in frequent}

    def gensim_vectors(self, seed: int, algorithm: str) -> np.ndarray:
        """Return gensim's vectors of the same words after as many epochs; zero for words that it has not seen."""
        from gensim.models import Word2Vec

        special = self.tokenizer.vocab.special
        # A step of firth has 16 rows of 512 words. gensim truncates rows after 1,000 words.
        epochs = max(1, round(self.steps * 16 * 512 / self.counts.sum()))
        rows = [
            [str(w) for w in row[a : a + 1000] if not special[w]] for row in self.rows for a in range(0, len(row), 1000)
        ]
        model = Word2Vec(rows, vector_size=HIDDEN_SIZE, window=5, negative=5, sample=1e-3, min_count=1, sg=int(algorithm == "skipgram"),
                        workers=2, seed=seed + 1, epochs=epochs)  # fmt: skip
        table = np.zeros((len(special), HIDDEN_SIZE), np.float32)
        for word in model.wv.index_to_key:
            table[int(word)] = model.wv[word]
        return table

    def synonym_auc(self, table: np.ndarray) -> float:
        """Return the area under the ROC curve of synonyms against words of the same frequencies."""
        senses: set[tuple[int, int]] = set()
        for path in sorted(catalog.fetch("wordnet", log=print).glob("*.jsonl")):
            for line in path.read_text("utf-8").splitlines():
                same = [self.ids[w] for w in json.loads(line)["text"].partition(": ")[0].split(", ") if w in self.ids]
                senses |= set(itertools.combinations(sorted(set(same)), 2))
        pairs = np.array(sorted(senses))
        others = np.stack((pairs[:, 0], np.random.default_rng(0).permutation(pairs[:, 1])), 1)
        synonym_scores, random_scores = cosines(table, pairs), cosines(table, others)
        rank = np.concatenate((synonym_scores, random_scores)).argsort().argsort()[: len(synonym_scores)]
        return float((rank.mean() - (len(synonym_scores) - 1) / 2) / len(random_scores))

    def human_correlation(self, table: np.ndarray) -> float:
        """Return Spearman's correlation of cosines with WordSim-353 (from gensim's tests), for pairs of known words."""
        from gensim.test.utils import datapath
        from scipy.stats import spearmanr

        lines = [line.split("\t") for line in Path(datapath("wordsim353.tsv")).read_text("utf-8").splitlines()]
        pairs = [(a.lower(), b.lower(), float(c)) for a, b, c in (line for line in lines if line[0][0] != "#")]
        known_pairs = [(self.ids[a], self.ids[b], c) for a, b, c in pairs if a in self.ids and b in self.ids]
        similarities = cosines(table, np.array([pair[:2] for pair in known_pairs]))
        return float(spearmanr(similarities, [c for *_, c in known_pairs]).statistic)


def cosines(table: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the cosines, (n,), of pairs of rows of `table`, (n, 2)."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    found: np.ndarray = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    return found


STUDIES: dict[str, Callable[[int, Steps], dict[str, float]]] = {
    "headlines": headlines_study, "tags": tags_study, "words": words_study, "kinds": kinds_study,
}  # fmt: skip


def results(scale: float) -> str:
    """Return a Markdown table of mean and range over the existing seeds."""
    lines = ["| study | metric | seeds | mean | minimum to maximum |", "|---|---|---|---|---|"]
    for study in STUDIES:
        rows = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{study}-{scale:g}-seed-*.json"))]
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows]
            spread = f"{min(values):.4f} to {max(values):.4f}"
            lines.append(f"| {study} | {name} | {len(values)} | {statistics.mean(values):.4f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Run the missing studies, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--table", action="store_true", help="print the existing results and run nothing")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    scale, seeds = (0.05, args.seeds[:1]) if args.quick else (1.0, args.seeds)
    for study, seed in itertools.product(() if args.table else args.only, seeds):
        file = RESULTS / f"{study}-{scale:g}-seed-{seed}.json"
        if not file.exists():
            found = STUDIES[study](seed, lambda count: max(4, round(count * scale)))
            file.write_text(json.dumps(found, indent=1), "utf-8")
    print(results(scale))


if __name__ == "__main__":
    main()
