"""Objectives and architectures compared at equal FLOPs: `firth compare` with the settings of docs/results/index.md.

    python -m bench.learning.compare electra       about 20 minutes on two cores: masked, replaced, next, dropped tokens
    python -m bench.learning.compare encoders      objectives of all encoders, 3 seeds: 40 minutes on one thread
    python -m bench.learning.compare writers       objectives of decoders and encoder-decoders: 25 minutes
    python -m bench.learning.compare others        contrastive pairs and Linformer: 15 minutes on one thread
    python -m bench.learning.compare lstm          15 minutes: held-out bits per byte against compute
    python -m bench.learning.compare electra --table

Text and probe are from the same domain, so that pretraining helps: Shakespeare's plays, and whether a sentence of a held-out
play was a question, its question mark removed (300 labels, sampled for each of 3 seeds). The bodies are three blocks of
hidden size 128, so 6e12 FLOPs are about a million tokens. A stopped command can be repeated; `--quick` is a check of a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from firth.compare.compare import ComparisonConfig, compare
from firth.runs.recipe_names import RECIPES
from firth.training.schedule import Budget

BODY = (
    "model.hidden_size=128", "model.num_layers=3", "model.num_heads=2", "model.intermediate_size=256",
    "gpt.model.intermediate_size=512", "prefix_lm.model.intermediate_size=512", "data.validation_fraction=0.1",
    "t5.model.num_layers=2", "t5.model.encoder.num_layers=2", "bart.model.num_layers=2", "bart.model.encoder.num_layers=2",
    "probe.max_steps=60",
)  # fmt: skip
"""Two blocks on each side of an encoder-decoder cost as much as three; an ungated MLP is twice as wide as a gated one."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of recipes.

    Args:
        names: Names of the recipes.
        settings: Settings of all recipes, and of single ones (NAME.KEY=VALUE).
        flops: Training FLOPs of each recipe.
        shares: Fractions of the FLOPs at which the models are compared.
        probe: Probe task; "" for the default.
    """

    names: tuple[str, ...]
    settings: tuple[str, ...]
    flops: float
    shares: tuple[float, ...]
    probe: str = ""


COMPARISONS = {
    "electra": Comparison(("roberta", "electra", "gpt", "t5"), BODY, 6e12, (0.33, 1.0)),
    "encoders": Comparison(("roberta", "bert", "albert", "spanbert", "electra", "xlnet", "mpnet"), BODY, 6e12, (1.0,)),
    "writers": Comparison(("gpt", "prefix_lm", "t5", "bart"), BODY, 6e12, (1.0,)),
    "others": Comparison(("contrastive", "linformer"), BODY, 6e12, (1.0,)),
    "lstm": Comparison(("gpt", "lstm"), ("data.validation_fraction=0.1",), 8e12, (0.1, 0.3, 1.0), "none"),
}


def main() -> None:
    """Run a comparison, or print the table of a finished one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true", help="print the table of a finished comparison")
    parser.add_argument("--quick", action="store_true", help="one seed, 2%% of the compute")
    args = parser.parse_args()
    comparison = COMPARISONS[args.comparison]
    out = args.out or Path("runs") / f"learn_compare-{args.comparison}{'-quick' if args.quick else ''}"
    if args.table:
        print((out / "table.md").read_text("utf-8"))
        return
    names = [name for name in comparison.names if name in RECIPES]
    if missing := sorted(set(comparison.names) - set(names)):
        print(f"Skipped, no such recipe: {', '.join(missing)}")
    others = {*RECIPES} - {*names}
    settings = [s for s in comparison.settings if s.split(".")[0] not in others]
    compute = Budget(max_flops=comparison.flops / (50 if args.quick else 1))
    config = ComparisonConfig(compute, comparison.shares, 1 if args.quick else 3, comparison.probe, labels=300)
    print(compare(names, settings, config, out))


if __name__ == "__main__":
    main()
