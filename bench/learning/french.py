"""A language other than English from raw text alone: French pages of Debian, 200 labels, three seeds.

    python -m bench.learning.french --run                         # about 10 minutes on two threads
    python -m bench.learning.french --run --encoder runs/encoder  # from the encoder of the tutorial
    python -m bench.learning.french --table                       # markdown of the existing results

encoder     `firth train roberta` on the French pages, once, and a classifier finetuned from it on 200 labeled sentences (multiemo)
random      the same classifier from random weights, with the same tokenizer
tf-idf      logistic regression of scikit-learn on words and pairs of words, its strength chosen by cross-validation

Every run is a run directory under runs/learn_french, so a stopped command can be repeated. Each seed draws its own 200 labels; all are
tested on the same 1,000 sentences, of which none is among the labels. Intervals: Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline

from firth.corpora import catalog
from firth.io.atomic import write_text
from firth.runs.recipe import load
from firth.runs.run import run

OUT = Path("runs/learn_french")
TEXTS = ("libreoffice-help-fr", "manpages-fr", "debian-handbook-fr")
SEEDS = (0, 1, 2)
CLASSES = ("negative", "positive")
NUM_LABELS, NUM_TEST = 200, 1000
LABEL_STEPS = 60
BODY = "model={hidden_size: 192, num_layers: 4, num_heads: 3, causal: false}"
LABEL_LR = 5e-4
"""Learning rate of the classifiers: a tiny encoder takes more than a published one (`classification`)."""


def silent(_: str) -> None:
    """Ignore a message."""


def text() -> str:
    """Return the setting of the French text."""
    return f"data.path=[{', '.join(str(catalog.fetch(name, silent) / '*.txt') for name in TEXTS)}]"


def rows() -> list[dict[str, Any]]:
    """Return the labeled sentences of the two classes, each once, in a random order that is the same each time."""
    (path,) = catalog.fetch("multiemo", silent).glob("*.jsonl")
    read = (json.loads(row) for row in path.read_text("utf-8").splitlines())
    unique = {row["fr"]: {"text": row["fr"], "label": row["label"]} for row in read if row["label"] in CLASSES}
    found = list(unique.values())
    random.Random(0).shuffle(found)
    return found


def write_rows(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records))
    return path


def labels(seed: int) -> list[dict[str, Any]]:
    """Return the labeled sentences of a seed."""
    return random.Random(seed + 1).sample(rows()[NUM_TEST:], NUM_LABELS)


def train(encoder: Path) -> None:
    """Run what is missing, from an encoder, which is pretrained first if it does not exist."""
    test = write_rows(OUT / "test.jsonl", rows()[:NUM_TEST])
    if not encoder.is_dir():
        run(load("roberta", [text()]), encoder)
    for seed in SEEDS:
        mine = write_rows(OUT / f"labels-{seed}.jsonl", labels(seed))
        starts = {
            "pretrained": [f"init_from={encoder}"],
            "random": [BODY, f"tokenizer.path={encoder / 'tokenizer'}"],
        }
        for arm, settings in starts.items():
            on = [
                f"data.path={mine}",
                f"data.validation_path=[{test}]",
                f"max_steps={LABEL_STEPS}",
                f"optimizer.lr={LABEL_LR}",
            ]
            run(load("classification", [*settings, *on, f"seed={seed}"]), OUT / f"{arm}-{seed}")


def metrics_of(name: str) -> dict[str, float]:
    """Return the metrics of a finished run."""
    found: dict[str, float] = json.loads((OUT / name / "done.json").read_text("utf-8"))["metrics"]
    return found


def tf_idf(seed: int) -> float:
    """Return the accuracy of logistic regression on tf-idf of words and pairs of words."""
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegressionCV(10, cv=5, max_iter=2000)
    )
    train, test = labels(seed), rows()[:NUM_TEST]
    pipeline.fit([row["text"] for row in train], [row["label"] for row in train])
    return float(pipeline.score([row["text"] for row in test], [row["label"] for row in test]))


def interval(values: list[float], sign: str = "") -> str:
    """Return mean and 95% interval of Student's t."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return f"{mean:{sign}.3f} [{mean - half:{sign}.3f}, {mean + half:{sign}.3f}]"


def table() -> None:
    """Print the results."""
    test = [row["label"] for row in rows()[:NUM_TEST]]
    arms = {arm: [metrics_of(f"{arm}-{seed}")["valid/accuracy"] for seed in SEEDS] for arm in ("pretrained", "random")}
    arms["tf-idf"] = [tf_idf(seed) for seed in SEEDS]
    print(
        f"majority {max(map(test.count, set(test))) / len(test):.3f}\n\n| start | accuracy | pretrained minus this |\n|---|---|---|"
    )
    for arm, values in arms.items():
        difference = [mine - theirs for mine, theirs in zip(arms["pretrained"], values, strict=True)]
        print(f"| {arm} | {interval(values)} | {'' if arm == 'pretrained' else interval(difference, '+')} |")


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", action="store_true")
    parser.add_argument(
        "--encoder", type=Path, default=OUT / "encoder", help="a run of firth train roberta on the text"
    )
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.run:
        train(args.encoder)
    if args.table:
        table()


if __name__ == "__main__":
    main()
