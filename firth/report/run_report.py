"""The report of any run directory, read from what the run wrote.

    metrics.jsonl   one row per logged step, as `firth.train.logging` writes it:
                    {"split": "train", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.1, "rate": 0.003, ...}
                    {"split": "valid", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.3, "bits_per_byte": 2.2}
    recipe.yaml     optional: the resolved recipe, shown whole; running it again repeats the run
    done.json       optional: "counts" in it says what was read, cut and skipped: {"documents": 1000, "bad_utf8": 2}; "remarks"
                    are sentences about how the run ended; "exported_step" is the step whose model it left, the last one or the best
    held_out.json   optional: what the model told of each class: {"classes", "confusion", "per_class"}
    samples.jsonl   optional: {"step": 40, "prompt": "ROMEO:", "text": "..."}; a prompt's first and last are shown
    held_out_texts.jsonl  optional: answers to held-out prompts before and after training (`firth.runs.held_out_texts`)

A run of reinforcement learning has rows of the split "rollouts": its page begins with reward, divergence and answers.

A term that this file does not know gets a figure of its own, so a new objective's measures need no change here.

    write(run_report(Path("runs/gpt")), Path("runs/gpt/report.html"))
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from firth import __version__
from firth.io.integrity import COPY_AGAIN, check_recipe, read_done, read_record, verify_files
from firth.io.json_files import check_all, read_object
from firth.io.json_files import read_rows as rows_of
from firth.io.yaml_files import parse_yaml
from firth.report.charts import Curve, Figure, Level, number
from firth.report.matrix import Matrix
from firth.report.page import Command, Report, Section, StatCell, Table, TextSample
from firth.types import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MetricStyle:
    """How a measured thing is called and drawn. unit: the label of its axis; noisy: a long curve is smoothed."""

    title: str
    unit: str
    log: bool = False
    zero: bool = False
    noisy: bool = True


TERMS = {
    "loss": MetricStyle("Loss", "nats"),
    "bits_per_byte": MetricStyle("Bits per byte", "bits per byte of text"),
    "accuracy": MetricStyle("Accuracy", "share right"),
    "exact_match": MetricStyle("Exact match", "share of questions"),
    "kl": MetricStyle("Latent from its prior", "KL, nats a text"),
    "kl_per_token": MetricStyle("Distance from the reference", "KL, nats a token"),
    "f1": MetricStyle("F1", "F1"),
    "macro_f1": MetricStyle("F1, mean over classes", "F1"),
    "matthews": MetricStyle("Matthews' correlation", "correlation"),
    "rate": MetricStyle("Learning rate", "learning rate", noisy=False),
    "norm": MetricStyle("Gradient before clipping", "norm", log=True),
    "tokens_per_second": MetricStyle("Speed", "tokens per second", zero=True),
}

DRAWN = {
    "reward": MetricStyle("Judge's score", "score"),
    "truth": MetricStyle("True score, not learnt from", "score"),
    "kl_per_answer": MetricStyle("Distance from the start", "KL, nats an answer"),
    "explained_variance": MetricStyle("What the critic foresees", "explained variance"),
    "entropy": MetricStyle("Entropy", "nats a token"),
    "length": MetricStyle("Length", "tokens an answer"),
    "finished": MetricStyle("Answers that end by themselves", "share"),
}
"""Measures of the phases of answers, and how they are drawn."""

TOGETHER = {"Log-probability above the reference": ("nats an answer", {"chosen": "preferred", "rejected": "rejected"})}
"""Title of a figure -> its unit, and the terms that are drawn in it: term -> label."""

MACHINERY = ("rate", "norm", "tokens_per_second")
"""Terms that say how the run went, not what it learnt."""

_ASIDE = ("split", "step", "seconds", "tokens", "skipped", "flops", "flops_per_second")
"""Fields of a row that are told in words, not drawn."""

_NEXT = (
    {
        "causal": ("generate", "Let it write", '"Once"'),
        "span_corruption": ("generate", "Let it fill in what a sentinel stands for", '"To be, or <extra_id_0> to be"'),
        "text_to_text": ("generate", "Give it an input", '"..."'),
    }
    | dict.fromkeys(
        ("classification", "regression", "multiple_choice", "tagging", "spans"),
        ("predict", "Let it answer for a file of yours", "my-records.jsonl"),
    )
    | dict.fromkeys(("mlm", "mpnet", "plm"), ("fill", "Let it fill a gap", '"To be, or not to <mask>."'))
    | dict.fromkeys(("sft", "dpo", "reinforce", "ppo"), ("chat", "Talk with it", ""))
)
"""Objective -> the command that shows it at work, why, and an argument."""


def run_report(directory: Path) -> Report:
    """The report of a run directory. Raises UserError if it holds no metrics, or a row that is not JSON."""
    rows = read_rows(directory / "metrics.jsonl")
    if not rows:
        raise UserError(f"{directory / 'metrics.jsonl'} holds no row yet: train a few more steps")
    recipe_file = directory / "recipe.yaml"
    try:
        recipe = recipe_file.read_text(encoding="utf-8") if recipe_file.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{recipe_file} is not UTF-8 ({error}): copy it again") from None
    check_recipe(directory)
    kinds = objectives(recipe)
    learnt, ran = figures(rows)
    once = _once(rows)
    tables = [Table("Measured once", ("what", "held out"), [(_term(n).title, value) for n, value in once.items()])]
    sections = [Section("What it learnt", figures=learnt, tables=tables * bool(once))]
    drawn = rollouts(rows)
    if drawn:
        note = "Means over the answers of each phase, which the model wrote and then trained on."
        sections.insert(0, Section("The answers it wrote", note, figures=reward_figures(drawn)))
    texts = held_out_texts(directory / "held_out_texts.jsonl")
    sections[1:1] = [texts] if texts is not None else []
    answers = _answers(directory / "held_out.json")
    sections += [answers] if answers is not None else []
    samples = read_samples(directory / "samples.jsonl")
    if samples:
        text = "The same prompts and the same random numbers, at the first and at the last of the logged samples."
        sections.append(Section("Samples", text, samples=samples))
    sections.append(Section("How it ran", _trouble(rows), figures=ran))
    told_at_end = read_done(directory)
    if told_at_end and told_at_end["steps"] > rows[-1]["step"]:
        raise UserError(
            f"{directory / 'metrics.jsonl'} ends at step {rows[-1]['step']:,} of {told_at_end['steps']:,}: its last lines are "
            "missing, so copy it again or train again"
        )
    counts, exported = told_at_end.get("counts"), told_at_end.get("exported_step", rows[-1]["step"])
    if counts:
        counted = [(name.replace("_", " "), count) for name, count in counts.items()]
        sections.append(Section("Data", tables=(Table("What was read, and what was not", ("what", "count"), counted),)))
    if recipe:
        told = f"Everything the run depends on. `firth train {_quoted(recipe_file)}` repeats it."
        sections.append(Section("Recipe", told, listing=recipe))
    return Report(
        title=" + ".join(kinds) + f": {directory.name}" if kinds else directory.name,
        text=" ".join([summary(rows, exported), *told_at_end.get("remarks", [])]),
        numbers=numbers(rows, exported),
        sections=sections,
        commands=commands(directory, kinds),
        facts={
            "made with": f"firth {__version__}, torch {version('torch')}",
            "run": f"{rows[-1]['step']:,} steps, {_clock(rows[-1]['seconds'])} of training",
            "exported": f"the model of step {exported:,}",
        },
    )


def rollouts(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of phases of sampled answers; empty for a run without reinforcement learning."""
    return [row for row in rows if row["split"] == "rollouts"]


def reward_figures(drawn: Sequence[Row]) -> list[Figure]:
    """Return the figures of phases: rewards over divergence first, a dot for each phase, then each measure over steps."""
    known = [name for name in DRAWN if any(row.get(name) is not None for row in drawn)]
    over = []
    if "kl_per_answer" in known:
        for colour, name in enumerate(("reward", "truth")):
            if name in known:
                both = [row for row in drawn if None not in (row["kl_per_answer"], row[name])]
                x, y = [row["kl_per_answer"] for row in both], [row[name] for row in both]
                over.append(Curve(DRAWN[name].title, x, y, line=False, color=colour))
    note = (
        "A dot for each phase. Reward that rises while the true score falls is over-optimization of the reward model."
    )
    first = Figure(
        "Reward over divergence", DRAWN["kl_per_answer"].unit, "score", tuple(over), note=note if len(over) > 1 else ""
    )
    return [first] * bool(over) + [_drawn(drawn, name) for name in known]


def held_out_texts(path: Path) -> Section | None:
    """Return the answers to held-out prompts at the first and the last recorded step, with their scores."""
    if not path.exists():
        return None
    by_prompt: dict[str, list[Row]] = {}
    needs = {"step": int, "prompt": str, "held_out": bool, "score": str, "answers": list}
    for row in rows_of(path, needs, "delete the file"):
        check_all(row["answers"], ANSWER, f"{path}, an answer of {row['prompt']!r:.40}", "delete the file")
        by_prompt.setdefault(row["prompt"], []).append(row)
    if not by_prompt:
        return None
    samples = []
    for prompt, rows in by_prompt.items():
        ends = (rows[0], rows[-1])
        texts: dict[str, str] = {}
        for name in dict.fromkeys(answer["name"] for row in ends for answer in row["answers"]):
            found = [(r["step"], a) for r in ends for a in r["answers"] if a["name"] == name]
            if name == "model":
                texts |= {f"step {step:,}{_scored(a['score'])}": a["text"] for step, a in found}
            else:
                scores = [number(a["score"], 3) for _, a in found if a["score"] is not None]
                label = f"{name} ({scores[0]} before, {scores[-1]} after)" if scores else name
                texts[label] = found[-1][1]["text"]
        samples.append(TextSample(prompt, texts))
    some = next(iter(by_prompt.values()))[-1]
    which = "The model was not trained on these prompts." if some["held_out"] else "These prompts are training data."
    scored = any(a["score"] is not None for rows in by_prompt.values() for row in rows for a in row["answers"])
    what = f" In parentheses: {some['score']}." if scored else ""
    return Section("Answers before and after training", f"{which}{what}", samples=samples)


NUMBER = (int, float)
ANSWER = {"name": str, "text": str, "score": (int, float, type(None))}
"""Fields of an answer in held_out_texts.jsonl."""
CLASS = {"class": (str, *NUMBER), "examples": int, "precision": NUMBER, "recall": NUMBER, "f1": NUMBER}
"""Fields of a class in held_out.json."""


def _scored(score: float | None) -> str:
    return "" if score is None else f" ({number(score, 3)})"


def _answers(path: Path) -> Section | None:
    """What the model told of each class of the held-out examples; None where it has no classes."""
    cure = "delete the file: it is for the report alone"
    told = read_record(path, cure=cure) if path.exists() else {}
    if not told:
        return None
    check_all([told], {"per_class": list}, f"{path}", cure)
    check_all(told["per_class"], CLASS, f"{path}, a class", cure)
    names, table = told.get("classes", []), told.get("confusion", [])
    square = type(names) is list and type(table) is list and len(table) == len(names)
    if not square or any(
        type(row) is not list or len(row) != len(names) or any(type(n) is not int or n < 0 for n in row)
        for row in table
    ):
        raise UserError(
            f"{path}: the field 'confusion' is no table of counts with a row and a column for each class: {cure}"
        )
    rows = [[row["class"], row["examples"], row["precision"], row["recall"], row["f1"]] for row in told["per_class"]]
    table = Table("Class by class", ("class", "examples", "precision", "recall", "F1"), rows)
    matrices = []
    if "confusion" in told:
        note = "A row is what is right, a column what the model says; a cell is darker the larger its share of its row."
        matrices.append(Matrix("What is taken for what", told["classes"], told["confusion"], note))
    return Section("Held-out answers", "Of the exported model.", matrices=matrices, tables=(table,))


def read_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl; a last line that a kill has cut is left out."""
    if not path.exists():
        raise UserError(f"{path} does not exist: a report needs the metrics of a run, give a run directory")
    needs = {"split": str, "step": int, "seconds": NUMBER, "tokens": NUMBER}
    cure = "remove the line, or train again"
    rows: list[Row] = [*rows_of(path, needs, cure, cut=True)]
    for number_, row in enumerate(rows, 1):
        for name, value in row.items():
            if name != "split" and value is not None and not (isinstance(value, NUMBER) and math.isfinite(value)):
                raise UserError(f"{path}, row {number_}: the field {name!r} is no finite number: {cure}")
    return rows


def read_samples(path: Path) -> list[TextSample]:
    """The first and the last text of each prompt."""
    if not path.exists():
        return []
    by_prompt: dict[str, list[Row]] = {}
    for row in rows_of(path, {"step": int, "prompt": str, "text": str}, "delete the file"):
        by_prompt.setdefault(row["prompt"], []).append(row)
    return [
        TextSample(prompt, {f"step {row['step']:,}": row["text"] for row in (said[0], said[-1])})
        for prompt, said in by_prompt.items()
    ]


def objectives(recipe: str) -> list[str]:
    """Names of the objectives in a recipe's YAML.

    >>> objectives("objective: [nsp, {kind: mlm, rate: 0.2}]"), objectives("objective: causal_lm"), objectives("")
    (['nsp', 'mlm'], ['causal'], [])
    """
    found = parse_yaml(recipe, "recipe.yaml")[0]
    said = found.get("objective", []) if type(found) is dict else []
    listed = said if type(said) is list else [said]
    return [str(one.get("kind") if type(one) is dict else one) for one in listed]


def series(rows: Sequence[Row], split: str, name: str, x: str) -> tuple[list[float], list[float]]:
    """x and y of a term on one split; null is a break."""
    found = [(row[x], row[name]) for row in rows if row["split"] == split and name in row]
    return [float(a) for a, _ in found], [math.nan if b is None else float(b) for _, b in found]


def figures(rows: Sequence[Row]) -> tuple[list[Figure], list[Figure]]:
    """What was learnt, and how the run went: one figure per term, with the loss's own terms in one."""
    learning = [row for row in rows if row["split"] != "rollouts"]
    names = list(dict.fromkeys(name for row in learning for name in row if name not in _ASIDE))
    x, unit = ("tokens", "tokens read") if rows[-1]["tokens"] else ("step", "steps")
    parts = [name for name in names if name.startswith("loss/")]
    once = _once(rows)
    shared = {title: pair for title, pair in TOGETHER.items() if pair[1].keys() <= set(names)}
    drawn = {name for _, pair in shared.values() for name in pair}
    single = [name for name in names if not (name in parts or name in MACHINERY or name in once or name in drawn)]
    learnt = [_figure(rows, name, x, unit) for name in single]
    for title, (y, pair) in shared.items():
        learnt.insert(1, Figure(title, unit, y, tuple(_both_splits(rows, pair, x)), levels=(Level("reference", 0.0),)))
    if parts:
        labels = {name: name.removeprefix("loss/") for name in parts}
        learnt.append(Figure("Loss by term", unit, "nats", tuple(_both_splits(rows, labels, x))))
    return learnt, [_figure(rows, name, x, unit) for name in MACHINERY if name in names]


def _both_splits(rows: Sequence[Row], labels: Mapping[str, str], x: str) -> list[Curve]:
    """Return a solid training curve and a dashed held-out curve for each term, in one color a term."""
    curves = []
    for i, (name, label) in enumerate(labels.items()):
        for split, dashed in (("train", False), ("valid", True)):
            xs, ys = series(rows, split, name, x)
            if xs:
                curves.append(_curve(label + ", held out" * dashed, xs, ys, split, colour=i, dashed=dashed))
    return curves


def _once(rows: Sequence[Row]) -> dict[str, float]:
    """What a single row knows, and that one of held-out text: a number, of which there is no curve to draw."""
    counts = Counter(name for row in rows for name in row)
    lone = [(name, row[name]) for row in rows if row["split"] == "valid" for name in row if name not in _ASIDE]
    return {name: value for name, value in lone if counts[name] == 1 and value is not None}


def _term(name: str) -> MetricStyle:
    plain = name.replace("_", " ")
    return TERMS.get(name, MetricStyle(plain[:1].upper() + plain[1:], plain))


def _figure(rows: Sequence[Row], name: str, x: str, unit: str) -> Figure:
    term = _term(name)
    curves = []
    for colour, (split, label) in enumerate((("train", "train"), ("valid", "held out"))):
        xs, ys = series(rows, split, name, x)
        if xs:
            curves.append(_curve(label, xs, ys, split, colour, noisy=term.noisy))
    smooth = max((curve.smooth for curve in curves), default=0)
    note = f"Thin: every logged step. Thick: the mean over {2 * smooth + 1} of them." if smooth else ""
    return Figure(term.title, unit, term.unit, tuple(curves), note=note, log_y=term.log, zero=term.zero)


def _drawn(rows: Sequence[Row], name: str) -> Figure:
    xs, ys = series(rows, "rollouts", name, "step")
    return Figure(DRAWN[name].title, "steps", DRAWN[name].unit, (Curve("answers", xs, ys, points=len(xs) < 40),))


def _curve(
    label: str, xs: list[float], ys: list[float], split: str, colour: int, dashed: bool = False, noisy: bool = True
) -> Curve:
    """A long noisy curve of the train split is smoothed over a sixtieth of the run each way."""
    smooth = len(xs) // 60 if noisy and split == "train" else 0
    return Curve(label, xs, ys, smooth=smooth, color=colour, dashed=dashed, points=split == "valid" and len(xs) < 40)


def numbers(rows: Sequence[Row], exported: int | None = None) -> list[StatCell]:
    """The few figures that matter: what the exported model (of a step; the last if not told) gets on held-out text, what the
    run read, how fast."""
    out = []
    last = rows[-1]["step"]
    phases = rollouts(rows)
    for name, label in LEAD.items():
        ends = _ends(phases, name)
        if ends is not None:
            note = "" if len(phases) == 1 else f", {number(ends[0], 3)} in the first phases"
            out.append(StatCell(label, float(f"{ends[1]:.3g}"), f"last phases{note}"))
    if phases:
        return out + _speed(rows)
    for name, label in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"), ("loss", "loss")):
        steps, known = _known(rows, "valid", name)
        if known:
            first = f", {number(known[0], 3)} at the first check" if len(known) > 1 else ""
            value, of = known[-1], "held-out text"
            if exported not in (None, last) and exported in steps:
                value, of = known[steps.index(exported)], f"held-out text, exported step {exported:,}"
                first = f", {number(known[-1], 3)} at the last check"
            out.append(StatCell(label, float(f"{value:.4g}"), f"{of}{first}"))
    steps, known = _known(rows, "train", "loss")
    if known:
        first = f", {number(known[0], 3)} at step {steps[0]:,.0f}" if len(known) > 1 else ""
        out.append(StatCell("training loss", float(f"{known[-1]:.4g}"), f"last logged step{first}"))
    return out + _speed(rows)


def _speed(rows: Sequence[Row]) -> list[StatCell]:
    """Return the median speed of training, where it was logged."""
    _, speed = _known(rows, "train", "tokens_per_second")
    if speed:
        _, work = _known(rows, "train", "flops_per_second")
        rate = f", {number(median(work), 3)}FLOP/s" if work else ""
        return [StatCell("tokens per second", float(f"{median(speed):.3g}"), f"median over the run{rate}")]
    return []


LEAD = {
    "reward": "reward",
    "truth": "true score",
    "kl_per_answer": "KL, nats an answer",
    "finished": "answers that end",
}
"""Measures of phases that head the page of a run of reinforcement learning -> their labels."""


def _ends(phases: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Return the mean of a measure over the first and over the last tenth of the phases, at least one; None if unknown."""
    known = [float(row[name]) for row in phases if row.get(name) is not None]
    some = max(1, len(known) // 10)
    return (fmean(known[:some]), fmean(known[-some:])) if known else None


def summary(rows: Sequence[Row], exported: int | None = None) -> str:
    """What happened, in two or three sentences. exported: the step whose model the run left; the last if not told."""
    last = rows[-1]
    said = [f"{last['step']:,} steps over {number(last['tokens'], 3)} tokens in {_clock(last['seconds'])}."]
    phases = rollouts(rows)
    if phases:
        said += [_moved(label, ends) for name, label in (("reward", "reward"), ("truth", "true score"))
                 if (ends := _ends(phases, name)) is not None]  # fmt: skip
        divergence, finished = _ends(phases, "kl_per_answer"), _ends(phases, "finished")
        if divergence is not None:
            said.append(f"The answers diverge from the starting model by {number(divergence[1], 3)} nats each.")
        if finished is not None:
            said.append(f"{finished[1]:.0%} of them end with a stop token.")
        return " ".join(said)
    steps, known = _known(rows, "valid", "loss")
    where = "held-out text" if known else "the training text"
    if not known:
        steps, known = _known(rows, "train", "loss")
    if where == "held-out text" and exported not in (None, last["step"]) and exported in steps:
        said.append(
            f"The exported model is that of step {exported:,}, the best of {len(known)} checks: its loss on held-out text is "
            f"{number(known[steps.index(exported)], 3)}; it was {number(known[0], 3)} at the first and {number(known[-1], 3)} at "
            "the last."
        )
    elif len(known) > 1:
        first, best = number(known[0], 3), min(known)
        if known[-1] < known[0]:
            said.append(f"The loss on {where} fell from {first} to {number(known[-1], 3)}.")
        else:
            said.append(f"The loss on {where} did not fall: it was {first} and is {number(known[-1], 3)}.")
        if where == "held-out text" and known[-1] > 1.01 * best and best < known[0]:
            at = steps[known.index(best)]
            said.append(f"Its best was {number(best, 3)} at step {at:,.0f}; since then the model has been overfitting.")
    return " ".join(said)


def _moved(label: str, ends: tuple[float, float]) -> str:
    """Return a sentence on how a measure changed from the first phases to the last.

    >>> _moved("reward", (0.5, 1.25)), _moved("reward", (1.0, 1.0))
    ('The reward rose from 0.5 to 1.25.', 'The reward stayed at 1.')
    """
    first, last = (number(value, 3) for value in ends)
    if first == last:
        return f"The {label} stayed at {first}."
    return f"The {label} {'rose' if ends[1] > ends[0] else 'fell'} from {first} to {last}."


def _known(rows: Sequence[Row], split: str, name: str) -> tuple[list[float], list[float]]:
    pairs = [(a, b) for a, b in zip(*series(rows, split, name, "step"), strict=True) if math.isfinite(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _trouble(rows: Sequence[Row]) -> str:
    skipped = max((row.get("skipped") or 0 for row in rows), default=0)
    one = skipped == 1
    return f"{skipped:,} step{'' if one else 's'} had no finite gradient and moved nothing." if skipped else ""


def commands(directory: Path, kinds: Sequence[str]) -> list[Command]:
    """What to type next with this run, exactly."""
    place = _quoted(directory)
    out = []
    for kind in kinds:
        if kind in _NEXT:
            verb, why, argument = _NEXT[kind]
            out.append(Command(why, f"firth {verb} {place} {argument}".rstrip()))
    out.append(Command("Measure it on text or records of your own", f"firth evaluate {place} my-text.txt"))
    config = directory / "model" / "config.json"
    if config.exists():
        own = config.with_name("firth.json")
        record = read_record(own, cure=COPY_AGAIN) if own.exists() else {}
        verify_files(
            {"config.json": record["files"]["config.json"]} if "files" in record else {}, config.parent, COPY_AGAIN
        )
        [name] = read_object(config, {"architectures": list})["architectures"]
        code = f"from transformers import {name} as M; print(M.from_pretrained({json.dumps(str(config.parent))}))"
        out.append(Command("Load it with transformers", f"python -c {shlex.quote(code)}"))
    return out


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _clock(seconds: float) -> str:
    """
    >>> _clock(7), _clock(75), _clock(3675)
    ('7 s', '1 min 15 s', '1 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
