"""ELECTRA's figure on Shakespeare, and the Transformer against the LSTM: `firth compare` with the settings of docs/results/index.md.

    python -m bench.learn_compare electra       about 20 minutes on two cores: masked, replaced, next, dropped tokens
    python -m bench.learn_compare encoders      every encoder's objective at a third of that a time, 3 seeds: 40 minutes on one thread
    python -m bench.learn_compare writers       the same for decoders and encoder-decoders: 25 minutes
    python -m bench.learn_compare others        what reads texts in pairs, or in slots: 15 minutes on one thread
    python -m bench.learn_compare lstm          15 minutes: held-out bits per byte against compute
    python -m bench.learn_compare electra --table

Text and probe are of one kind, or pretraining would not show: the plays, and whether a sentence of a play that no model has
read was a question, its mark taken away (300 labels, drawn anew for each of 3 seeds). The bodies are three blocks of width
128, so that 6e12 FLOPs are about a million tokens. Stopped and run again, it goes on; `--quick` is a check of a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from firth.compare.compare import ComparisonConfig, compare
from firth.runs.recipe_names import RECIPES
from firth.train.schedule import Budget

BODY = (
    "model.hidden_size=128", "model.num_layers=3", "model.num_heads=2", "model.intermediate_size=256",
    "gpt.model.intermediate_size=512",
    "prefix_lm.model.intermediate_size=512", "data.validation_fraction=0.1",
    "t5.model.num_layers=2", "t5.model.num_encoder_layers=2", "bart.model.num_layers=2", "bart.model.num_encoder_layers=2",
    "probe.budget.max_steps=60",
)  # fmt: skip
"""Two blocks on each side weigh what three do; an ungated MLP is twice as wide as a gated one."""


@dataclass(frozen=True)
class Contest:
    """names: of recipes; settings of all and of each."""

    names: tuple[str, ...]
    settings: tuple[str, ...]
    flops: float
    shares: tuple[float, ...]
    probe: str = ""


CONTESTS = {
    "electra": Contest(("roberta", "electra", "gpt", "t5"), BODY, 6e12, (0.33, 1.0)),
    "encoders": Contest(("roberta", "bert", "albert", "spanbert", "electra", "xlnet", "mpnet"), BODY, 6e12, (1.0,)),
    "writers": Contest(("gpt", "prefix_lm", "t5", "bart"), BODY, 6e12, (1.0,)),
    "others": Contest(("contrastive", "linformer"), BODY, 6e12, (1.0,)),
    "lstm": Contest(("gpt", "lstm"), ("data.validation_fraction=0.1",), 8e12, (0.1, 0.3, 1.0), "none"),
}


def main() -> None:
    """Run a contest, or print the table of one that was run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("contest", choices=CONTESTS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", action="store_true", help="print the table of a finished contest")
    parser.add_argument("--quick", action="store_true", help="one seed, a fiftieth of the compute")
    given = parser.parse_args()
    contest = CONTESTS[given.contest]
    out = given.out or Path("runs") / f"learn_compare-{given.contest}{'-quick' if given.quick else ''}"
    if given.table:
        print((out / "table.md").read_text("utf-8"))
        return
    known = [name for name in contest.names if name in RECIPES]
    if missing := sorted(set(contest.names) - set(known)):
        print(f"no such recipe yet, left out: {', '.join(missing)}")
    others = {*RECIPES} - {*known}
    settings = [s for s in contest.settings if s.split(".")[0] not in others]
    compute = Budget(max_flops=contest.flops / (50 if given.quick else 1))
    terms = ComparisonConfig(compute, contest.shares, 1 if given.quick else 3, contest.probe, labels=300)
    print(compare(known, settings, terms, out))


if __name__ == "__main__":
    main()
