"""Count the functions and files of firth that one training run of one step enters, by phase and package.

    python -m bench.entered            # the tables
    python -m bench.entered --list     # and the functions, in the order in which they are entered

The run is a tiny GPT on Python's own documentation, with everything that `firth train` does: it trains a tokenizer,
prepares the corpus, takes one step, validates, saves a checkpoint, and writes the report and the model. A function counts
once, in the phase that enters it first; nested functions count, lambdas and comprehensions do not. The step alone is
counted too. It is the number of functions whose names a reader meets who follows the run in a debugger.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import firth

ROOT = str(Path(firth.__file__).parent)

PHASES = {
    "runs.run.prepare_tokenizer": "tokenizer",
    "data.token_store.TokenStore.build": "token store",
    "runs.resolve.resolve": "resolve",
    "runs.run.build_data": "data",
    "runs.run.build_model": "model",
    "runs.report_texts.write_texts": "sample texts",
    "runs.run.train": "training loop",
    "training.step.step": "forward, backward",
    "training.optimizer.Optimizer.step": "optimizer",
    "runs.evaluation.Validator.measure": "validation",
    "training.checkpoint.save_state": "checkpoint",
    "runs.run.export": "export",
    "pretrained.load_save.save_model": "model files",
    "runs.model_card.of_run": "model card",
    "runs.model_card.write": "model card",
    "report.run_report.run_report": "report",
    "report.page.write": "report",
    "runs.run.run": "run",
}
"""Function -> phase of what it calls, unless another of these is between them."""

STEP = ("Batches.batches", "_Run._step")
"""Functions of a step: its batches, and the forward pass, the backward pass and the update."""

SETTINGS = {
    "data.corpus": "pydoc", "max_steps": 1, "precision": "fp32", "model.hidden_size": 64, "model.num_heads": 1,
    "model.num_layers": 2, "tokenizer.vocab_size": 512,
}  # fmt: skip


def name_of(code: CodeType) -> str:
    """Return `module.function` of a function of firth, without `firth.`."""
    return ".".join((*Path(code.co_filename).relative_to(ROOT).with_suffix("").parts, code.co_qualname))


def phase(frame: FrameType | None) -> str:
    """Return the phase of a call: that of the nearest caller in PHASES, or "import" under the import of a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(ROOT):
            name = name_of(frame.f_code)
            if frame.f_code.co_name == "<module>":
                return "import"
            if name in PHASES:
                return PHASES[name]
        frame = frame.f_back
    return "others"


def entered() -> tuple[dict[CodeType, str], set[CodeType]]:
    """Train for one step.

    Returns:
        Code -> phase of every function of firth that was entered, and those that the step itself enters.
    """
    seen: dict[CodeType, str] = {}
    in_step: set[CodeType] = set()
    inside: list[CodeType] = []  # the calls of STEP that have not returned

    def record(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(ROOT) or code.co_name[0] == "<":
            return
        if code.co_qualname in STEP:
            if event == "call":
                inside.append(code)
            elif event == "return":
                inside.remove(code)
        if event == "call":
            if inside:
                in_step.add(code)
            if code not in seen:
                seen[code] = phase(frame)

    recipe = firth.load_recipe("gpt", SETTINGS)
    with tempfile.TemporaryDirectory() as directory:
        threading.setprofile(record)
        sys.setprofile(record)
        try:
            firth.train(recipe, Path(directory) / "run")
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return seen, in_step


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="print every function")
    args = parser.parse_args()
    seen, in_step = entered()
    for what, codes in (("the run", seen), ("its step", in_step)):
        print(f"{what}: {len(codes)} functions in {len({code.co_filename for code in codes})} files")
    print()
    for title, keys in (("phase", seen.values()), ("package", (name_of(code).split(".")[0] for code in seen))):
        print(f"{title:20} functions")
        for key, count in Counter(keys).most_common():
            print(f"{key:20} {count:9}")
        print()
    if args.list:
        for code, where in seen.items():
            print(f"{where:18} {'step' if code in in_step else '':5} {name_of(code)}")


if __name__ == "__main__":
    main()
