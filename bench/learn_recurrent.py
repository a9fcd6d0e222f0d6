"""What word vectors, a pretrained LSTM and ELMo are worth, on held-out data, beside the same model without them.

    python -m bench.learn_recurrent              20 minutes on two cores, three seeds (W1 to W4, P13)
    python -m bench.learn_recurrent --table      markdown for docs/results.md
    python -m bench.learn_recurrent --quick      one seed and a twentieth of the steps: a check that it works

headlines   is it satire? (`firth fetch sarcasm`) 500 labels, 2,000 others to be scored on, and the rest as bare text, on which
            word vectors and an LSTM language model are trained. An LSTM classifier begins from nothing, from the vectors
            (pretrained embeddings), from the whole language model (Dai and Le 2015).
tags        the main part of speech of each word of the Brown corpus; every tenth document is held out from everything. A
            linear reading of frozen states: of an untrained ELMo, of word vectors, of ELMo's layers mixed.
words       do synonyms (`firth fetch wordnet`) have nearer vectors than two words of the same frequencies? The area under
            the curve, 0.5 by chance, of firth's skip-gram and, where it is installed, of gensim's on the same words.

Each run is a run directory under runs/learn_recurrent: stopped and begun again, it goes on; what is done is not done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from firth.generate import vectors
from firth.model.weights import load_model
from firth.recipes.recipe import load
from firth.recipes.run import Finished, run
from firth.text import corpora
from firth.text.tokenizer import Tokenizer

RESULTS = Path("runs/learn_recurrent")
WIDTH = 128
LABELS, SCORED = 500, 2000
TOKENIZER = ("tokenizer.algorithm=word", "tokenizer.size=10000")
READER = (
    f"{{vocab: 1, width: {WIDTH}, depth: 1, heads: 1, norm_at: post, position: none, recurrent: lstm, dropout: 0.1}}"
)
SPELLER = (
    f"{{vocab: 1, width: {2 * WIDTH}, depth: 2, heads: 1, norm_at: post, position: none, recurrent: lstm, causal: false, "
    "apart: true, skip: true, tied: false, head_bias: true, characters: 16, filters: 256}"
)


def headlines(folder: Path) -> None:
    """bare.jsonl, few.jsonl and scored.jsonl; what is scored is in no other, and the few are read as bare text too."""
    lines = next(corpora.fetch("sarcasm", echo=print).glob("*.jsonl")).read_text("utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    cuts = {"scored": order[:SCORED], "few": order[SCORED : SCORED + LABELS], "bare": order[SCORED:]}
    for name, some in cuts.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in some), "utf-8")


def brown(folder: Path) -> None:
    """text/*.txt without the held-out documents; tagged.jsonl and scored_tags.jsonl with main tags alone."""
    source = corpora.fetch("brown", echo=print)
    names = sorted(path.stem for path in source.glob("*.txt"))
    apart = set(names[::10])
    (folder / "text").mkdir()
    for name in set(names) - apart:
        (folder / "text" / f"{name}.txt").write_text((source / f"{name}.txt").read_text("utf-8"), "utf-8")
    rows: dict[bool, list[str]] = {True: [], False: []}
    for line in (source / "tagged.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        row["tags"] = [tag.removeprefix("fw-").split("-")[0].split("+")[0] or tag for tag in row["tags"]]
        rows[row["document"] in apart].append(json.dumps(row))
    (folder / "tagged.jsonl").write_text("\n".join(rows[False]) + "\n", "utf-8")
    (folder / "scored_tags.jsonl").write_text("\n".join(rows[True]) + "\n", "utf-8")


def stage(name: str, recipe: str, seed: int, steps: int, settings: Sequence[str]) -> Finished:
    """One run, or what there is of it."""
    common = (
        f"seed={seed}",
        f"length.steps={steps}",
        "checks.save=1000",
        "samples=[]",
        f"checks.every={max(steps // 2, 1)}",
    )
    return run(load(recipe, [*common, *settings]), RESULTS / f"{name}-{steps}-{seed}", echo=print)


def one(seed: int, scale: float) -> dict[str, float]:
    """Every measure of a seed."""
    data = RESULTS / "data"
    if not (data / "whole").exists():
        data.mkdir(parents=True, exist_ok=True)
        headlines(data)
        brown(data)
        (data / "whole").touch()

    def steps(count: int) -> int:
        return max(4, round(count * scale))

    bare = (f"source.path={data}/bare.jsonl",)
    w2v = stage(
        "vectors", "word2vec", seed, steps(600), [*bare, *TOKENIZER, f"shape.width={WIDTH}", "segment.length=256"]
    )
    shape = (f"shape={READER}", f"tokenizer.path={w2v.directory}")
    lm = stage("lm", "lstm", seed, steps(800), [*bare, *shape, "segment.length=64", "batch.rows=32"])
    found = {"lm, held-out loss": lm.metrics["valid/loss"]}
    task = (
        f"source.path={data}/few.jsonl",
        f"source.valid={data}/scored.jsonl",
        "objective.at=last",
        "segment.length=48",
    )
    begins = {
        "nothing": [*shape, "optimizer.rate=2e-3"],
        "word vectors": [*shape, f"embeddings={w2v.directory}", "optimizer.rate=2e-3"],
        "the whole LM": [f"start={lm.directory}"],
    }
    for name, start in begins.items():
        done = stage(f"headlines-{name.replace(' ', '_')}", "classify", seed, steps(200), [*task, *start])
        found[f"headlines from {name}, accuracy"] = done.metrics["valid/accuracy"]

    text = (f"source.path={data}/text",)
    words = stage("brown-vectors", "word2vec", seed, steps(1200), [*text, *TOKENIZER, f"shape.width={WIDTH}"])
    spelled = (f"shape={SPELLER}", f"tokenizer.path={words.directory}")
    elmo = stage("elmo", "elmo", seed, steps(500), [*text, *spelled, "segment.length=64", "batch.rows=16"])
    for way in ("forward", "backward"):
        found[f"elmo {way}, held-out loss"] = elmo.metrics[f"valid/loss/{way}"]
    task = (f"source.path={data}/tagged.jsonl", f"source.valid={data}/scored_tags.jsonl", "segment.length=64")
    for name, start in (("an untrained ELMo", spelled[:2]), ("word vectors", (f"start={words.directory}",)),
                        ("ELMo", (f"start={elmo.directory}",))):  # fmt: skip
        done = stage(f"tags-{name.replace(' ', '_')}", "tag_features", seed, steps(300), [*task, *start])
        found[f"tags from {name}, accuracy"] = done.metrics["valid/accuracy"]
    return found | synonyms(words.directory, data / "text", seed)


def synonyms(directory: Path, text: Path, seed: int) -> dict[str, float]:
    """The area under the curve of synonyms against words of the same frequencies, for firth's vectors and gensim's."""
    model, tokenizer = load_model(directory / "model"), Tokenizer.load(directory)
    rows = [tokenizer.encode(path.read_text("utf-8")) for path in sorted(text.glob("*.txt"))]
    counts = np.bincount(np.concatenate(rows), minlength=tokenizer.vocab.size)
    known = {tokenizer.token(i): i for i in tokenizer.vocab.ordinary if counts[i] >= 20}
    senses: set[tuple[int, int]] = set()
    for path in sorted(corpora.fetch("wordnet", echo=print).glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            same = [known[w] for w in json.loads(line)["text"].partition(": ")[0].split(", ") if w in known]
            senses |= set(itertools.combinations(sorted(set(same)), 2))
    pairs = np.array(sorted(senses))
    others = np.stack((pairs[:, 0], np.random.default_rng(0).permutation(pairs[:, 1])), 1)

    def area(table: np.ndarray) -> float:
        unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
        near, far = ((unit[p[:, 0]] * unit[p[:, 1]]).sum(1) for p in (pairs, others))
        rank = np.concatenate((near, far)).argsort().argsort()[: len(near)]
        return float((rank.mean() - (len(near) - 1) / 2) / len(far))

    found = {"synonyms, firth's vectors": area(vectors.table(model).numpy())}
    if importlib.util.find_spec("gensim"):
        from gensim.models import Word2Vec

        steps = int(directory.name.split("-")[-2])
        # firth's run in words: steps of 16 rows of 512. Rows of 1,000 words, more than which gensim does not read.
        epochs = max(1, round(steps * 16 * 512 / counts.sum()))
        text_rows = [[str(w) for w in row[a : a + 1000] if not tokenizer.vocab.special[w]]
                     for row in rows for a in range(0, len(row), 1000)]  # fmt: skip
        theirs = Word2Vec(text_rows, vector_size=WIDTH, window=5, negative=5, sample=1e-3, min_count=1, sg=1,
                          workers=2, seed=seed + 1, epochs=epochs)  # fmt: skip
        table = np.zeros((tokenizer.vocab.size, WIDTH), np.float32)
        for word in theirs.wv.index_to_key:
            table[int(word)] = theirs.wv[word]
        found["synonyms, gensim's vectors"] = area(table)
    return found


def results(scale: float) -> str:
    """Markdown: mean and spread over the seeds that are there."""
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"scale-{scale:g}-seed-*.json"))]
    lines = [f"| measure | {len(rows)} seeds, mean | least to greatest |", "|---|---|---|"]
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if name in row]
        lines.append(f"| {name} | {statistics.mean(values):.4f} | {min(values):.4f} to {max(values):.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is left, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what there is and run nothing")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    scale, seeds = (0.05, given.seeds[:1]) if given.quick else (1.0, given.seeds)
    for seed in () if given.table else seeds:
        done = RESULTS / f"scale-{scale:g}-seed-{seed}.json"
        if not done.exists():
            found = one(seed, scale)
            done.write_text(json.dumps(found, indent=1), "utf-8")
    print(results(scale))


if __name__ == "__main__":
    main()
