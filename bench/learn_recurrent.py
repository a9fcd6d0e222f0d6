"""What word vectors, a pretrained LSTM and ELMo are worth, on held-out data, beside the same model without them.

    python -m bench.learn_recurrent              20 minutes on two cores, three seeds
    python -m bench.learn_recurrent --only words some of: headlines tags words kinds
    python -m bench.learn_recurrent --table      markdown for docs/results/index.md
    python -m bench.learn_recurrent --quick      one seed and a twentieth of the steps: a check that it works

headlines   is it satire? (`firth fetch sarcasm`) 500 labels, 2,000 others to be scored on, and the rest as bare text, on which
            word vectors and an LSTM language model are trained. An LSTM classifier begins from nothing, from the vectors
            (pretrained embeddings), from the whole language model (Dai and Le 2015).
tags        the main part of speech of each word of the Brown corpus; every tenth document is held out from everything. A
            linear reading of frozen states: of an untrained ELMo, of word vectors, of ELMo's layers mixed.
words       do synonyms (`firth fetch wordnet`) have nearer vectors than two words of the same frequencies? The area under
            the curve, 0.5 by chance; and where gensim is installed, the rank correlation with people's judgement (the
            WordSim-353 that it carries). Skip-gram and CBOW, of firth and of gensim, on the same words.
kinds       the tiny `lstm` as an RNN, a GRU and an LSTM: held-out bits a byte.

Each run is a run directory under runs/learn_recurrent: stopped and begun again, it goes on; what is done is not done again.
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
from firth.generate import word_vectors
from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer

RESULTS = Path("runs/learn_recurrent")
WIDTH = 128
LABELS, SCORED = 500, 2000
TOKENIZER = ("tokenizer.algorithm=word", "tokenizer.vocab_size=10000")
READER = f"{{width: {WIDTH}, depth: 1, heads: 1, norm_at: post, position: none, recurrent: lstm, dropout: 0.1}}"
SPELLER = (
    f"{{width: {2 * WIDTH}, depth: 2, heads: 1, norm_at: post, position: none, recurrent: lstm, causal: false, "
    "apart: true, skip: true, tied: false, head_bias: true, characters: 16, filters: 256}"
)


def headlines(folder: Path) -> None:
    """bare.jsonl, few.jsonl and scored.jsonl; what is scored is in no other, and the few are read as bare text too."""
    lines = next(catalog.fetch("sarcasm", echo=print).glob("*.jsonl")).read_text("utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    cuts = {"scored": order[:SCORED], "few": order[SCORED : SCORED + LABELS], "bare": order[SCORED:]}
    for name, some in cuts.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in some), "utf-8")


def brown(folder: Path) -> None:
    """text/*.txt without the held-out documents; tagged.jsonl and scored_tags.jsonl with main tags alone."""
    source = catalog.fetch("brown", echo=print)
    names = sorted(path.stem for path in source.glob("*.txt"))
    apart = set(names[::10])
    (folder / "text").mkdir()
    for name in set(names) - apart:
        (folder / "text" / f"{name}.txt").write_text((source / f"{name}.txt").read_text("utf-8"), "utf-8")
    rows: dict[bool, list[str]] = {True: [], False: []}
    for line in (source / "tagged.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        row["tags"] = [tag.removeprefix("fw-").split("-")[0].split("+")[0] or tag for tag in row["tags"]]
        rows[row["document_ids"] in apart].append(json.dumps(row))
    (folder / "tagged.jsonl").write_text("\n".join(rows[False]) + "\n", "utf-8")
    (folder / "scored_tags.jsonl").write_text("\n".join(rows[True]) + "\n", "utf-8")


def stage(name: str, recipe: str, seed: int, steps: int, settings: Sequence[str]) -> RunResult:
    """One run, or what there is of it."""
    common = (
        f"seed={seed}",
        f"max_steps={steps}",
        "checkpoint.every=1000",
        "sample_prompts=[]",
        f"evaluation.every={max(steps // 2, 1)}",
    )
    return run(load(recipe, [*common, *settings]), RESULTS / f"{name}-{steps}-{seed}", log=print)


def data() -> Path:
    """The texts and labels of all studies, written once."""
    folder = RESULTS / "data"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        headlines(folder)
        brown(folder)
        (folder / "whole").touch()
    return folder


Steps = Callable[[int], int]


def headlines_study(seed: int, steps: Steps) -> dict[str, float]:
    """A classifier from nothing, from vectors, from the whole language model."""
    bare = (f"data.path={data()}/bare.jsonl",)
    w2v = stage(
        "vectors",
        "word2vec",
        seed,
        steps(600),
        [*bare, *TOKENIZER, f"model.hidden_size={WIDTH}", "examples.max_length=256"],
    )
    shape = (f"model={READER}", f"tokenizer.path={w2v.directory}")
    lm = stage("lm", "lstm", seed, steps(800), [*bare, *shape, "examples.max_length=64", "batch.size=32"])
    found = {"lm, held-out loss": lm.metrics["valid/loss"]}
    task = (
        f"data.path={data()}/few.jsonl",
        f"data.validation_path={data()}/scored.jsonl",
        "objective.position=last",
        "examples.max_length=48",
    )
    begins = {
        "nothing": [*shape, "optimizer.lr=2e-3"],
        "word vectors": [*shape, f"init_embeddings_from={w2v.directory}", "optimizer.lr=2e-3"],
        "the whole LM": [f"init_from={lm.directory}"],
    }
    for name, start in begins.items():
        done = stage(f"headlines-{name.replace(' ', '_')}", "classification", seed, steps(200), [*task, *start])
        found[f"headlines from {name}, accuracy"] = done.metrics["valid/accuracy"]
    return found


def brown_vectors(seed: int, steps: Steps, algorithm: str = "skipgram") -> RunResult:
    settings = (
        f"data.path={data()}/text",
        *TOKENIZER,
        f"model.hidden_size={WIDTH}",
        f"objective.algorithm={algorithm}",
    )
    return stage(f"brown-{algorithm}", "word2vec", seed, steps(1200), settings)


def tags_study(seed: int, steps: Steps) -> dict[str, float]:
    """Tags read off frozen states."""
    found, words = {}, brown_vectors(seed, steps)
    spelled = (f"model={SPELLER}", f"tokenizer.path={words.directory}")
    text = f"data.path={data()}/text"
    elmo = stage("elmo", "elmo", seed, steps(500), [text, *spelled, "examples.max_length=64", "batch.size=16"])
    for way in ("forward", "backward"):
        found[f"elmo {way}, held-out loss"] = elmo.metrics[f"valid/loss/{way}"]
    task = (
        f"data.path={data()}/tagged.jsonl",
        f"data.validation_path={data()}/scored_tags.jsonl",
        "examples.max_length=64",
    )
    for name, start in (("an untrained ELMo", spelled[:2]), ("word vectors", (f"init_from={words.directory}",)),
                        ("ELMo", (f"init_from={elmo.directory}",))):  # fmt: skip
        done = stage(f"tags-{name.replace(' ', '_')}", "token_features", seed, steps(300), [*task, *start])
        found[f"tags from {name}, accuracy"] = done.metrics["valid/accuracy"]
    return found


def kinds_study(seed: int, steps: Steps) -> dict[str, float]:
    """The tiny `lstm` with each recurrence, on Shakespeare: held-out bits a byte."""
    found = {}
    for kind in ("rnn", "gru", "lstm"):
        done = stage(f"kind-{kind}", "lstm", seed, steps(300), [f"model.rnn_type={kind}"])
        found[f"{kind}, bits a byte"] = done.metrics["valid/bits_per_byte"]
    return found


def words_study(seed: int, steps: Steps) -> dict[str, float]:
    """Vectors of the same text by firth and by gensim, as synonyms and people judge them."""
    found: dict[str, float] = {}
    for algorithm in ("skipgram", "cbow"):
        directory = brown_vectors(seed, steps, algorithm).directory
        words = Words(directory, data() / "text")
        tables = {"firth": word_vectors.table(load_model(directory / "model")).numpy()}
        if importlib.util.find_spec("gensim"):
            tables["gensim"] = words.theirs(seed, algorithm)
        for whose, table in tables.items():
            found[f"{algorithm}, {whose}: synonyms"] = words.synonyms(table)
            if importlib.util.find_spec("gensim"):
                found[f"{algorithm}, {whose}: people's judgement"] = words.judged(table)
    return found


class Words:
    """The words of a run's tokenizer in a text, and what their vectors are worth."""

    def __init__(self, directory: Path, text: Path) -> None:
        self.tokenizer, self.steps = Tokenizer.load(directory), int(directory.name.split("-")[-2])
        self.rows = [self.tokenizer.encode(path.read_text("utf-8")) for path in sorted(text.glob("*.txt"))]
        self.counts = np.bincount(np.concatenate(self.rows), minlength=self.tokenizer.vocab.size)
        frequent = (i for i in self.tokenizer.vocab.ordinary if self.counts[i] >= 20)
        self.known = {self.tokenizer.token(i): i for i in frequent}

    def theirs(self, seed: int, algorithm: str) -> np.ndarray:
        """gensim's vectors of the same words after the same passes over them; nothing for words it has not met."""
        from gensim.models import Word2Vec

        special = self.tokenizer.vocab.special
        # firth's run in words: steps of 16 rows of 512. Rows of 1,000 words, more than which gensim does not read.
        epochs = max(1, round(self.steps * 16 * 512 / self.counts.sum()))
        rows = [
            [str(w) for w in row[a : a + 1000] if not special[w]] for row in self.rows for a in range(0, len(row), 1000)
        ]
        made = Word2Vec(rows, vector_size=WIDTH, window=5, negative=5, sample=1e-3, min_count=1, sg=int(algorithm == "skipgram"),
                        workers=2, seed=seed + 1, epochs=epochs)  # fmt: skip
        table = np.zeros((len(special), WIDTH), np.float32)
        for word in made.wv.index_to_key:
            table[int(word)] = made.wv[word]
        return table

    def synonyms(self, table: np.ndarray) -> float:
        """The area under the curve of synonyms against words of the same frequencies."""
        senses: set[tuple[int, int]] = set()
        for path in sorted(catalog.fetch("wordnet", echo=print).glob("*.jsonl")):
            for line in path.read_text("utf-8").splitlines():
                same = [
                    self.known[w] for w in json.loads(line)["text"].partition(": ")[0].split(", ") if w in self.known
                ]
                senses |= set(itertools.combinations(sorted(set(same)), 2))
        pairs = np.array(sorted(senses))
        others = np.stack((pairs[:, 0], np.random.default_rng(0).permutation(pairs[:, 1])), 1)
        near, far = cosines(table, pairs), cosines(table, others)
        rank = np.concatenate((near, far)).argsort().argsort()[: len(near)]
        return float((rank.mean() - (len(near) - 1) / 2) / len(far))

    def judged(self, table: np.ndarray) -> float:
        """Spearman's correlation of the cosines with WordSim-353's (of gensim's own tests), of the pairs that are known."""
        from gensim.test.utils import datapath
        from scipy.stats import spearmanr

        lines = [line.split("\t") for line in Path(datapath("wordsim353.tsv")).read_text("utf-8").splitlines()]
        pairs = [(a.lower(), b.lower(), float(c)) for a, b, c in (line for line in lines if line[0][0] != "#")]
        kept = [(self.known[a], self.known[b], c) for a, b, c in pairs if a in self.known and b in self.known]
        likeness = cosines(table, np.array([pair[:2] for pair in kept]))
        return float(spearmanr(likeness, [c for *_, c in kept]).statistic)


def cosines(table: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """pairs: (n, 2) rows of table -> (n,)."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    found: np.ndarray = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    return found


STUDIES: dict[str, Callable[[int, Steps], dict[str, float]]] = {
    "headlines": headlines_study, "tags": tags_study, "words": words_study, "kinds": kinds_study,
}  # fmt: skip


def results(scale: float) -> str:
    """Markdown: mean and spread over the seeds that are there."""
    lines = ["| study | measure | seeds | mean | least to greatest |", "|---|---|---|---|---|"]
    for study in STUDIES:
        rows = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{study}-{scale:g}-seed-*.json"))]
        for name in rows[0] if rows else ():
            values = [row[name] for row in rows]
            spread = f"{min(values):.4f} to {max(values):.4f}"
            lines.append(f"| {study} | {name} | {len(values)} | {statistics.mean(values):.4f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is left, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--table", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    scale, seeds = (0.05, given.seeds[:1]) if given.quick else (1.0, given.seeds)
    for study, seed in itertools.product(() if given.table else given.only, seeds):
        done = RESULTS / f"{study}-{scale:g}-seed-{seed}.json"
        if not done.exists():
            found = STUDIES[study](seed, lambda count: max(4, round(count * scale)))
            done.write_text(json.dumps(found, indent=1), "utf-8")
    print(results(scale))


if __name__ == "__main__":
    main()
