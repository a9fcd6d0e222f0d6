"""Losses and exported tensors of 20 steps of every tiny recipe, to compare two versions of the code bit by bit.

    python -m bench.golden record --out runs/golden            # before a change of structure: every run, then golden.json
    python -m bench.golden compare --out runs/golden-new --with runs/golden/golden.json     # after it: equal bit by bit

Runs are in fp32 on one thread. A refactoring changes no random draw and no sum, so both versions must agree in every bit
on one machine. Kernels are the plain ones, unless FIRTH_KERNELS names others: measured choices may differ between two
recordings. Tensors are compared by their names in transformers. Records are made from Python's own help pages, so nothing
is fetched. Four minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from firth import kernel_choice
from firth.runs.recipe import load
from firth.runs.recipe_names import RECIPES
from firth.runs.run import run

SHARED = ("max_steps=20", "precision=fp32", "evaluation.every=10", "checkpoint.every=10", "evaluation.max_examples=64")
TEXT = (*SHARED, "data.corpus=pydoc")
RECORDS = (*SHARED, "data.validation_fraction=0.1", "batch.size=8")
PRETRAINING = (
    "word2vec", "lstm", "elmo", "gpt", "gpt2", "gpt3", "llama", "bert", "roberta", "spanbert", "albert", "electra", "xlnet",
    "mpnet", "linformer", "t5", "bart", "prefix_lm", "closed_book", "contrastive", "vae",
)  # fmt: skip
MORE = {
    "gpt-dropout": ("gpt", ("model.position=t5", "model.dropout=0.1")),
    "electra-adversarial": ("electra", ("objective=adversarial_rtd",)),
    "roberta-micro-batches": ("roberta", ("batch.gradient_accumulation_steps=2", "objective.noise=ngrams")),
}
"""Name -> a recipe with settings that the published recipes do not use."""
GROUPS = (
    "examples.reward_function=builtins:len",
    "examples.rollout_size=8",
    "examples.num_generations=4",
    "examples.max_new_tokens=8",
)
SUPERVISED: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "classify": ("classification", "bert", "classes.jsonl", ()),
    "classify-lora": ("classification", "bert", "classes.jsonl", ("peft=lora", "peft.rank=4", "peft.dropout=0.1")),
    "classify-decoder": ("classification", "llama", "classes.jsonl", ("objective.class_weights=balanced", "objective.label_smoothing=0.1")),
    "regress": ("regression", "bert", "scores.jsonl", ()),
    "choose": ("multiple_choice", "bert", "options.jsonl", ()),
    "tag": ("token_classification", "bert", "tags.conll", ()),
    "tag_features": ("token_features", "elmo", "tags.conll", ()),
    "answer": (
        "question_answering", "bert", "squad.json",
        ("examples.max_length=64", "examples.max_question_length=16", "examples.doc_stride=16"),
    ),
    "text_to_text": ("text_to_text", "t5", "prompts.jsonl", ("examples.max_length=32", "examples.max_target_length=16")),
    "weak": ("weak_supervision", "bert", "votes.jsonl", ()),
    "closed_book_questions": ("closed_book_questions", "closed_book", "prompts.jsonl", ()),
    "semi_supervised": (
        "semi_supervised", "bert", "classes.jsonl", ("examples.teacher=@classify", "examples.num_labeled=40", "batch.size=16"),
    ),
    "consistency": (
        "semi_supervised", "bert", "classes.jsonl", ("objective=consistency", "examples=partially_labeled", "examples.num_labeled=40"),
    ),
    "instruct": ("sft", "gpt", "prompts.jsonl", ()),
    "reward": ("reward_model", "gpt", "preferences.jsonl", ()),
    "ranking": ("ranking", "gpt", "rankings.jsonl", ()),
    "dpo": ("dpo", "gpt2", "preferences.jsonl", ()),
    "simpo": ("simpo", "gpt2", "preferences.jsonl", ()),
    "orpo": ("orpo", "gpt2", "preferences.jsonl", ()),
    "kto": ("kto", "gpt2", "unpaired.jsonl", ()),
    "reinforce": ("reinforce", "gpt", "prompts.jsonl", GROUPS),
    "grpo": ("grpo", "gpt", "prompts.jsonl", GROUPS),
    "rloo": ("rloo", "gpt", "prompts.jsonl", GROUPS),
    "ppo": ("ppo", "gpt", "prompts.jsonl", ("examples.reward_model=@reward", "examples.rollout_size=8", "examples.max_new_tokens=8")),
}  # fmt: skip
"""Name -> recipe, the run that it starts from, its records, further settings; @NAME is another run's directory."""


def sentences() -> list[str]:
    """Return lines of Python's help pages with six to sixteen words."""
    from pydoc_data.topics import topics

    lines = (line.strip() for name in sorted(topics) for line in topics[name].splitlines())
    return [line for line in dict.fromkeys(lines) if 6 <= len(line.split()) <= 16][:400]


def write_records(directory: Path) -> None:
    """Write a file of records of each kind."""
    lines = sentences()
    rng = np.random.default_rng(0)

    def jsonl(name: str, rows: Iterable[dict[str, Any]]) -> None:
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    labels = ["long" if len(line) > 60 else "short" for line in lines]
    jsonl("classes.jsonl", ({"text": t, "label": k} for t, k in zip(lines, labels, strict=True)))
    jsonl("scores.jsonl", ({"text": line, "label": len(line) / 10} for line in lines))
    jsonl(
        "votes.jsonl",
        ({"text": t, "labels": [k, k, str(rng.choice(["long", "short"]))]} for t, k in zip(lines, labels, strict=True)),
    )
    jsonl("prompts.jsonl", ({"prompt": " ".join(w[:4]), "completion": " ".join(w[4:])} for w in map(str.split, lines)))
    unpaired = [
        {"prompt": " ".join(w[:4]), "completion": " ".join(w[4:]), "label": i % 3 > 0}
        for i, w in enumerate(map(str.split, lines))
    ]
    jsonl("unpaired.jsonl", unpaired)
    thirds = list(zip(lines[::3], lines[1::3], lines[2::3], strict=False))
    jsonl("preferences.jsonl", ({"prompt": a, "chosen": b, "rejected": c} for a, b, c in thirds))
    jsonl("rankings.jsonl", ({"prompt": a, "answers": [b, c, a][: 2 + i % 2]} for i, (a, b, c) in enumerate(thirds)))
    jsonl(
        "options.jsonl",
        ({"text": a, "options": [b, c, a][: 2 + i % 2], "label": i % 2} for i, (a, b, c) in enumerate(thirds)),
    )
    words = [line.split() for line in lines]
    tagged = "\n\n".join("\n".join(f"{w} {'I-CAP' if w[0].isupper() else 'O'}" for w in some) for some in words)
    (directory / "tags.conll").write_text(tagged + "\n", encoding="utf-8")
    paragraphs = []
    for i, (a, b, _) in enumerate(thirds):
        answer = b.split()[1]
        found = [{"text": answer, "answer_start": b.index(answer)}] * (i % 4 > 0)
        question = {"id": str(i), "question": a, "answers": found, "is_impossible": not found}
        paragraphs.append({"context": b, "qas": [question]})
    (directory / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")


def digest(directory: Path) -> dict[str, Any]:
    """Return the losses of a run and a hash of every exported tensor by its name."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [{name: value for name, value in row.items() if "second" not in name and "/s" not in name} for row in rows]
    keep = [{k: v for k, v in row.items() if k in ("step", "split", "loss") or k.startswith("loss")} for row in losses]
    tensors = {}
    for part in ("model", "adapter"):
        for path in sorted((directory / part).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                tensors[f"{part}/{name}"] = hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8)).hexdigest()[:16]
    assert keep and tensors, directory
    return {"losses": keep, "tensors": tensors}


def every_run(out: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the runs by name, each a function that trains it (once) and returns its digest."""
    records = out / "records"

    def train(name: str, recipe: str, settings: Iterable[str]) -> dict[str, Any]:
        directory = out / name
        run(load(recipe, list(settings)), directory, log=lambda _: None)
        return digest(directory)

    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in PRETRAINING:
        tokens = [f"tokenizer.path={out / 'gpt' / 'tokenizer'}"] if name in ("gpt2", "gpt3", "llama") else []
        runs[name] = lambda name=name, tokens=tokens: train(name, name, [*TEXT, *tokens])  # type: ignore[misc]
    for name, (recipe, settings) in MORE.items():
        runs[name] = lambda name=name, recipe=recipe, settings=settings: train(name, recipe, [*TEXT, *settings])  # type: ignore[misc]
    for name, (recipe, start, file, settings) in SUPERVISED.items():
        own_settings = [s.replace("@", f"{out}/") if "=@" in s else s for s in settings]
        all_settings = [*RECORDS, f"init_from={out / start}", f"data.path={records / file}", *own_settings]
        runs[name] = lambda name=name, recipe=recipe, all_settings=all_settings: train(name, recipe, all_settings)  # type: ignore[misc]
    missing = set(RECIPES) - {*PRETRAINING, *(recipe for recipe, *_ in SUPERVISED.values()), "glue"}
    assert not missing, f"recipes without a golden run: {sorted(missing)}"
    return runs


def record(out: Path, only: list[str]) -> dict[str, Any]:
    """Train the missing runs, print each, and write golden.json."""
    os.environ.setdefault(kernel_choice.FORCE, "first")
    torch.set_num_threads(1)
    (out / "records").mkdir(parents=True, exist_ok=True)
    write_records(out / "records")
    path = out / "golden.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name, make in every_run(out).items():
        if name in found or (only and name not in only):
            continue
        found[name] = make()
        print(f"{name}: {found[name]['losses'][-1]}, {len(found[name]['tensors'])} tensors", flush=True)
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line for each run that is not equal to the bit."""
    lines = []
    for name in old:
        if name not in new:
            lines.append(f"{name}: missing")
            continue
        losses = [row.get("loss") for row in old[name]["losses"]], [row.get("loss") for row in new[name]["losses"]]
        if losses[0] != losses[1]:
            at = next((i for i, pair in enumerate(zip(*losses, strict=False)) if pair[0] != pair[1]), -1)
            lines.append(f"{name}: losses differ from row {at} on")
        a, b = old[name]["tensors"], new[name]["tensors"]
        changed = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        if changed:
            lines.append(f"{name}: {len(changed)} of {len(a)} tensors differ, such as {min(changed)}")
    return lines


def main() -> None:
    """Record, or record and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("record", "compare"))
    parser.add_argument("--out", type=Path, default=Path("runs/golden"))
    parser.add_argument("--with", dest="other", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    found = record(args.out.resolve(), args.only)
    if args.mode == "compare":
        old = json.loads(args.other.read_text("utf-8"))
        old = {name: old[name] for name in old if not args.only or name in args.only}
        lines = differences(old, found)
        print("\n".join(lines) or f"{len(old)} runs are equal to the bit")
        sys.exit(bool(lines))


if __name__ == "__main__":
    main()
