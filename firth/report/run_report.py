"""Report of a run directory from the files that the run wrote.

    metrics.jsonl   one row per logged step, as `firth.training.logging` writes it:
                    {"split": "train", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.1, "rate": 0.003, ...}
                    {"split": "valid", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.3, "bits_per_byte": 2.2}
    recipe.yaml     optional: the resolved recipe, shown in full; running it again repeats the run
    done.json       optional: "counts" are the read statistics, {"documents": 1000, "bad_utf8": 2}; "remarks" are sentences
                    about the end of the run; "exported_step" is the step of the exported model, the last or the best
    held_out.json   optional: results of the exported model on held-out examples (`firth.report.sections`)
    samples.jsonl   optional: {"step": 40, "prompt": "ROMEO:", "text": "..."}; the first and last of a prompt are shown
    held_out_texts.jsonl  optional: answers to held-out prompts before and after training (`firth.align.held_out`)

A run of reinforcement learning has rows of the split "rollouts"; its page starts with reward, divergence and answers.

An unknown metric gets a figure of its own, so the metrics of a new objective need no change here.

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

from firth.io.integrity import COPY_AGAIN, check_recipe, read_done, read_record, verify_files
from firth.io.json_files import check_all, read_object
from firth.io.json_files import read_rows as rows_of
from firth.io.yaml_files import parse_yaml
from firth.report.charts import Curve, Figure, Level, number
from firth.report.page import Command, Report, Section, StatCell, Table, TextSample
from firth.report.sections import gao_fit, held_out_section, parting
from firth.types import VERSION, UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MetricStyle:
    """How a metric is named and drawn.

    Args:
        title: Title of its figure.
        unit: Label of its axis.
        log: Whether its axis is logarithmic.
        zero: Whether its axis includes 0.
        noisy: Whether a long curve is smoothed.
    """

    title: str
    unit: str
    log: bool = False
    zero: bool = False
    noisy: bool = True


TERMS = {
    "loss": MetricStyle("Loss", "nats"),
    "bits_per_byte": MetricStyle("Bits per byte", "bits per byte of text"),
    "accuracy": MetricStyle("Accuracy", "share correct"),
    "exact_match": MetricStyle("Exact match", "share of questions"),
    "kl": MetricStyle("KL of the latent to its prior", "KL, nats per text"),
    "kl_per_token": MetricStyle("KL to the reference model", "KL, nats per token"),
    "f1": MetricStyle("F1", "F1"),
    "macro_f1": MetricStyle("F1, mean over classes", "F1"),
    "matthews": MetricStyle("Matthews' correlation", "correlation"),
    "rate": MetricStyle("Learning rate", "learning rate", noisy=False),
    "norm": MetricStyle("Gradient norm before clipping", "norm", log=True),
    "tokens_per_second": MetricStyle("Speed", "tokens per second", zero=True),
}

ROLLOUT_TERMS = {
    "reward": MetricStyle("Reward", "score"),
    "truth": MetricStyle("True score (not used in training)", "score"),
    "kl_per_answer": MetricStyle("KL to the initial policy", "KL, nats per answer"),
    "explained_variance": MetricStyle("Explained variance of the critic", "explained variance"),
    "entropy": MetricStyle("Entropy", "nats per token"),
    "length": MetricStyle("Length", "tokens per answer"),
    "finished": MetricStyle("Answers that end with a stop token", "share"),
}
"""Metrics of rollouts and their styles."""

TOGETHER = {"Log-probability above the reference": ("nats per answer", {"chosen": "preferred", "rejected": "rejected"})}
"""Title of a shared figure -> its unit and its metrics: metric -> label."""

TASK = "task/"
"""Start of the names of the metrics of `evaluation.tasks`."""

TASK_TERMS = {
    "in_context_score": MetricStyle("In-context score: late minus early loss", "nats"),
    "copying_loss": MetricStyle("Loss in the second half of a repeated random sequence", "nats"),
    "copying_accuracy": MetricStyle("Accuracy in the second half of a repeated random sequence", "share correct"),
}
"""Built-in measures of `evaluation.tasks` and their styles."""

TRAINING_TERMS = ("rate", "norm", "tokens_per_second")
"""Metrics of the training process, drawn in a section of their own."""

_NOT_DRAWN = ("split", "step", "seconds", "tokens", "skipped", "flops", "flops_per_second", "mfu")
"""Fields of a row without a figure."""


def run_report(directory: Path) -> Report:
    """Return the report of a run directory; UserError if it has no metrics, or a file of the run is damaged."""
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
    metric_figures, training_figures = figures(rows)
    once = _measured_once(rows)
    tables = [Table("Measured once", ("metric", "held out"), [(_style(n).title, value) for n, value in once.items()])]
    sections = [Section("Metrics", figures=metric_figures, tables=tables * bool(once))]
    phases = rollouts(rows)
    if phases:
        note = "Means over the answers of each rollout phase, which the model generated and was then trained on."
        sections.insert(0, Section("Rollouts", note, figures=reward_figures(phases)))
    texts = held_out_texts(directory / "held_out_texts.jsonl")
    sections[1:1] = [texts] if texts is not None else []
    measured = held_out_section(directory / "held_out.json")
    sections += [measured] if measured is not None else []
    tasks = task_figures(rows)
    if tasks:
        sections.append(Section("Tasks", "Tasks of `evaluation.tasks`, measured at each evaluation.", figures=tasks))
    samples = read_samples(directory / "samples.jsonl")
    if samples:
        text = "The first and the last logged sample of each prompt, with the same random numbers."
        sections.append(Section("Samples", text, samples=samples))
    sections.append(Section("Training", _skipped_steps(rows), figures=training_figures))
    done = read_done(directory)
    if done and done["steps"] > rows[-1]["step"]:
        raise UserError(
            f"{directory / 'metrics.jsonl'} ends at step {rows[-1]['step']:,} of {done['steps']:,}: its last lines are "
            "missing, so copy it again or train again"
        )
    counts, exported = done.get("counts"), done.get("exported_step", rows[-1]["step"])
    if counts:
        cells = [(name.replace("_", " "), count) for name, count in counts.items()]
        sections.append(Section("Data", tables=(Table("Read statistics", ("what", "count"), cells),)))
    if recipe:
        text = f"All settings of the run. `firth train {_quoted(recipe_file)}` repeats it."
        sections.append(Section("Recipe", text, listing=recipe))
    return Report(
        title=" + ".join(kinds) + f": {directory.name}" if kinds else directory.name,
        text=" ".join([summary(rows, exported), *done.get("remarks", [])]),
        numbers=numbers(rows, exported),
        sections=sections,
        commands=commands(directory, done.get("next_command")),
        facts={
            "made with": f"firth {VERSION}, torch {version('torch')}",
            "run": f"{rows[-1]['step']:,} steps, {_clock(rows[-1]['seconds'])} of training",
            "exported": f"the model of step {exported:,}",
        },
    )


def rollouts(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of rollout phases; empty for a run without reinforcement learning."""
    return [row for row in rows if row["split"] == "rollouts"]


def reward_figures(phases: Sequence[Row]) -> list[Figure]:
    """Return the figures of rollout phases: reward over KL, a dot per phase, then each metric over steps."""
    known = [name for name in ROLLOUT_TERMS if any(row.get(name) is not None for row in phases)]
    curves = []
    if "kl_per_answer" in known:
        for color, name in enumerate(("reward", "truth")):
            if name in known:
                both = [row for row in phases if None not in (row["kl_per_answer"], row[name])]
                x, y = [row["kl_per_answer"] for row in both], [row[name] for row in both]
                curves.append(Curve(ROLLOUT_TERMS[name].title, x, y, line=False, color=color))
    note = "One dot per phase. Rising reward with a falling true score is over-optimization of the reward."
    fit = gao_fit(curves[1].x, curves[1].y) if len(curves) > 1 else None
    if fit is not None:
        grid = [max(curves[1].x) * i / 40 for i in range(41)]
        curves.append(Curve("fitted true score", grid, [fit(kl) for kl in grid], color=1, dashed=True))
        note += (
            f" Dashed: the true score as {number(fit.start, 3)} + d ({number(fit.alpha, 3)} - {number(fit.beta, 3)} log d), d the root of "
            f"the KL (Gao 2022), which explains {fit.r_squared:.0%} of its variance."
        )
    unit = ROLLOUT_TERMS["kl_per_answer"].unit
    first = Figure("Reward over KL", unit, "score", tuple(curves), note=note if len(curves) > 1 else "")
    return [first] * bool(curves) + [_rollout_figure(phases, name) for name in known]


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


def _scored(score: float | None) -> str:
    return "" if score is None else f" ({number(score, 3)})"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of metrics.jsonl, without a last line that was truncated by a kill."""
    if not path.exists():
        raise UserError(f"{path} does not exist: a report needs the metrics of a run; give a run directory")
    needs = {"split": str, "step": int, "seconds": NUMBER, "tokens": NUMBER}
    cure = "remove the line, or train again"
    rows: list[Row] = [*rows_of(path, needs, cure, cut=True)]
    for number_, row in enumerate(rows, 1):
        for name, value in row.items():
            if name != "split" and value is not None and not (isinstance(value, NUMBER) and math.isfinite(value)):
                raise UserError(f"{path}, row {number_}: the field {name!r} is not a finite number: {cure}")
    return rows


def read_samples(path: Path) -> list[TextSample]:
    """Return the first and the last text of each prompt."""
    if not path.exists():
        return []
    by_prompt: dict[str, list[Row]] = {}
    for row in rows_of(path, {"step": int, "prompt": str, "text": str}, "delete the file"):
        by_prompt.setdefault(row["prompt"], []).append(row)
    return [
        TextSample(prompt, {f"step {row['step']:,}": row["text"] for row in (found[0], found[-1])})
        for prompt, found in by_prompt.items()
    ]


def objectives(recipe: str) -> list[str]:
    """Return the names of the objectives in a recipe's YAML.

    >>> objectives("objective: [nsp, {kind: mlm, mlm_probability: 0.2}]"), objectives("objective: causal_lm"), objectives("")
    (['nsp', 'mlm'], ['causal_lm'], [])
    """
    found = parse_yaml(recipe, "recipe.yaml")[0]
    objective = found.get("objective", []) if type(found) is dict else []
    listed = objective if type(objective) is list else [objective]
    return [str(one.get("kind") if type(one) is dict else one) for one in listed]


def series(rows: Sequence[Row], split: str, name: str, x: str) -> tuple[list[float], list[float]]:
    """Return x and y of a metric on one split; null breaks the curve."""
    found = [(row[x], row[name]) for row in rows if row["split"] == split and name in row]
    return [float(a) for a, _ in found], [math.nan if b is None else float(b) for _, b in found]


def figures(rows: Sequence[Row]) -> tuple[list[Figure], list[Figure]]:
    """Return the figures of metrics and of the training process: one per metric, and one for the terms of the loss."""
    measured = [row for row in rows if row["split"] != "rollouts"]
    listed = (name for row in measured for name in row if name not in _NOT_DRAWN and not name.startswith(TASK))
    names = list(dict.fromkeys(listed))
    x, unit = ("tokens", "tokens read") if rows[-1]["tokens"] else ("step", "steps")
    loss_terms = [name for name in names if name.startswith("loss/")]
    once = _measured_once(rows)
    shared = {title: pair for title, pair in TOGETHER.items() if pair[1].keys() <= set(names)}
    drawn = {name for _, pair in shared.values() for name in pair}
    elsewhere = {*loss_terms, *TRAINING_TERMS, *once, *drawn}
    metric_figures = [_figure(rows, name, x, unit) for name in names if name not in elsewhere]
    for title, (y, pair) in shared.items():
        metric_figures.insert(
            1, Figure(title, unit, y, tuple(_both_splits(rows, pair, x)), levels=(Level("reference", 0.0),))
        )
    if loss_terms:
        labels = {name: name.removeprefix("loss/") for name in loss_terms}
        metric_figures.append(Figure("Loss by term", unit, "nats", tuple(_both_splits(rows, labels, x))))
    return metric_figures, [_figure(rows, name, x, unit) for name in TRAINING_TERMS if name in names]


def task_figures(rows: Sequence[Row]) -> list[Figure]:
    """Return a figure over steps for each metric of `evaluation.tasks`, and one for the losses at two tokens."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith(TASK)))
    at_token = [name for name in names if name.startswith(f"{TASK}loss_at_token_")]
    found = []
    for name in names:
        if name in at_token[1:]:
            continue
        together = at_token if name in at_token else [name]
        plain = name.removeprefix(TASK).replace("_", " ")
        style = TASK_TERMS.get(name.removeprefix(TASK), MetricStyle(plain[:1].upper() + plain[1:], plain))
        if name in at_token:
            style = MetricStyle("Loss early and late in the context", "nats")
        curves = []
        for color, one in enumerate(together):
            xs, ys = series(rows, "valid", one, "step")
            label = one.removeprefix(TASK).replace("_", " ").removeprefix("loss ") if name in at_token else "held out"
            curves.append(_curve(label, xs, ys, "valid", color))
        found.append(Figure(style.title, "steps", style.unit, tuple(curves)))
    return found


def _both_splits(rows: Sequence[Row], labels: Mapping[str, str], x: str) -> list[Curve]:
    """Return a solid training curve and a dashed held-out curve for each metric, in one color per metric."""
    curves = []
    for i, (name, label) in enumerate(labels.items()):
        for split, dashed in (("train", False), ("valid", True)):
            xs, ys = series(rows, split, name, x)
            if xs:
                curves.append(_curve(label + ", held out" * dashed, xs, ys, split, color=i, dashed=dashed))
    return curves


def _measured_once(rows: Sequence[Row]) -> dict[str, float]:
    """Return the held-out metrics that only a single row has, which are shown as numbers, not as curves."""
    counts = Counter(name for row in rows for name in row)
    lone = [
        (name, row[name])
        for row in rows
        if row["split"] == "valid"
        for name in row
        if name not in _NOT_DRAWN and not name.startswith(TASK)
    ]
    return {name: value for name, value in lone if counts[name] == 1 and value is not None}


def _style(name: str) -> MetricStyle:
    plain = name.replace("_", " ")
    return TERMS.get(name, MetricStyle(plain[:1].upper() + plain[1:], plain))


def _figure(rows: Sequence[Row], name: str, x: str, unit: str) -> Figure:
    style = _style(name)
    curves = []
    for color, (split, label) in enumerate((("train", "train"), ("valid", "held out"))):
        xs, ys = series(rows, split, name, x)
        if xs:
            curves.append(_curve(label, xs, ys, split, color, noisy=style.noisy))
    smooth = max((curve.smooth for curve in curves), default=0)
    note = f"Thin: every logged step. Thick: the mean over {2 * smooth + 1} of them." if smooth else ""
    return Figure(style.title, unit, style.unit, tuple(curves), note=note, log_y=style.log, zero=style.zero)


def _rollout_figure(rows: Sequence[Row], name: str) -> Figure:
    xs, ys = series(rows, "rollouts", name, "step")
    style = ROLLOUT_TERMS[name]
    return Figure(style.title, "steps", style.unit, (Curve("answers", xs, ys, points=len(xs) < 40),))


def _curve(
    label: str, xs: list[float], ys: list[float], split: str, color: int, dashed: bool = False, noisy: bool = True
) -> Curve:
    """Return a curve; a long noisy one of the train split is smoothed over a sixtieth of the run each way."""
    smooth = len(xs) // 60 if noisy and split == "train" else 0
    return Curve(label, xs, ys, smooth=smooth, color=color, dashed=dashed, points=split == "valid" and len(xs) < 40)


def numbers(rows: Sequence[Row], exported: int | None = None) -> list[StatCell]:
    """Return the key numbers: metrics of the exported model on held-out text, training loss and speed.

    Args:
        rows: Rows of metrics.jsonl.
        exported: Step of the exported model; None for the last.
    """
    out = []
    last = rows[-1]["step"]
    phases = rollouts(rows)
    for name, label in ROLLOUT_NUMBERS.items():
        ends = _ends(phases, name)
        if ends is not None:
            note = "" if len(phases) == 1 else f", {number(ends[0], 3)} in the first phases"
            out.append(StatCell(label, float(f"{ends[1]:.3g}"), f"last phases{note}"))
    if phases:
        return out + _speed(rows)
    for name, label in (("bits_per_byte", "bits per byte"), ("accuracy", "accuracy"), ("loss", "loss")):
        steps, known = _known(rows, "valid", name)
        if known:
            first = f", {number(known[0], 3)} at the first evaluation" if len(known) > 1 else ""
            value, of = known[-1], "held-out text"
            if exported not in (None, last) and exported in steps:
                value, of = known[steps.index(exported)], f"held-out text, exported step {exported:,}"
                first = f", {number(known[-1], 3)} at the last evaluation"
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
        _, shares = _known(rows, "train", "mfu")
        rate = f", {number(median(work), 3)}FLOP/s" if work else ""
        rate += f", {median(shares):.1%} of the machine's peak (MFU)" if shares else ""
        return [StatCell("tokens per second", float(f"{median(speed):.3g}"), f"median over the run{rate}")]
    return []


ROLLOUT_NUMBERS = {
    "reward": "reward",
    "truth": "true score",
    "kl_per_answer": "KL, nats per answer",
    "finished": "answers that end",
}
"""Metrics of rollouts that are key numbers of a run of reinforcement learning -> their labels."""


def _ends(phases: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Return the mean of a metric over the first and the last tenth of the phases, at least one; None if unknown."""
    known = [float(row[name]) for row in phases if row.get(name) is not None]
    some = max(1, len(known) // 10)
    return (fmean(known[:some]), fmean(known[-some:])) if known else None


def summary(rows: Sequence[Row], exported: int | None = None) -> str:
    """Return a summary of a run in two or three sentences.

    Args:
        rows: Rows of metrics.jsonl.
        exported: Step of the exported model; None for the last.
    """
    last = rows[-1]
    sentences = [f"{last['step']:,} steps over {number(last['tokens'], 3)} tokens in {_clock(last['seconds'])}."]
    phases = rollouts(rows)
    if phases:
        for name, label in (("reward", "reward"), ("truth", "true score")):
            ends = _ends(phases, name)
            sentences += [_change(label, ends)] if ends is not None else []
        parted = parting(phases)
        if parted is not None:
            sentences.append(
                f"The reward is over-optimized: the true score was best at step {parted.step:,}, {number(parted.kl, 3)} nats from the "
                f"starting model, and fell from {number(parted.truth[0], 3)} to {number(parted.truth[1], 3)} while the reward rose from "
                f"{number(parted.reward[0], 3)} to {number(parted.reward[1], 3)}."
            )
        divergence, finished = _ends(phases, "kl_per_answer"), _ends(phases, "finished")
        if divergence is not None:
            sentences.append(f"The answers diverge from the starting model by {number(divergence[1], 3)} nats each.")
        if finished is not None:
            sentences.append(f"{finished[1]:.0%} of them end with a stop token.")
        return " ".join(sentences)
    steps, known = _known(rows, "valid", "loss")
    where = "held-out text" if known else "the training text"
    if not known:
        steps, known = _known(rows, "train", "loss")
    if where == "held-out text" and exported not in (None, last["step"]) and exported in steps:
        sentences.append(
            f"The exported model is that of step {exported:,}, the best of {len(known)} evaluations: its loss on held-out text is "
            f"{number(known[steps.index(exported)], 3)}; it was {number(known[0], 3)} at the first and {number(known[-1], 3)} at "
            "the last."
        )
    elif len(known) > 1:
        first, best = number(known[0], 3), min(known)
        if known[-1] < known[0]:
            sentences.append(f"The loss on {where} fell from {first} to {number(known[-1], 3)}.")
        else:
            sentences.append(f"The loss on {where} did not fall: it was {first} and is {number(known[-1], 3)}.")
        if where == "held-out text" and known[-1] > 1.01 * best and best < known[0]:
            at = steps[known.index(best)]
            sentences.append(
                f"Its best was {number(best, 3)} at step {at:,.0f}; since then the model has been overfitting."
            )
    return " ".join(sentences)


def _change(label: str, ends: tuple[float, float]) -> str:
    """Return a sentence on how a metric changed from the first phases to the last.

    >>> _change("reward", (0.5, 1.25)), _change("reward", (1.0, 1.0))
    ('The reward rose from 0.5 to 1.25.', 'The reward stayed at 1.')
    """
    first, last = (number(value, 3) for value in ends)
    if first == last:
        return f"The {label} stayed at {first}."
    return f"The {label} {'rose' if ends[1] > ends[0] else 'fell'} from {first} to {last}."


def _known(rows: Sequence[Row], split: str, name: str) -> tuple[list[float], list[float]]:
    pairs = [(a, b) for a, b in zip(*series(rows, split, name, "step"), strict=True) if math.isfinite(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _skipped_steps(rows: Sequence[Row]) -> str:
    """Return a sentence about skipped optimizer steps; empty if there were none."""
    skipped = max((row.get("skipped") or 0 for row in rows), default=0)
    one = skipped == 1
    return f"{skipped:,} step{'' if one else 's'} had no finite gradient and changed no weights." if skipped else ""


def commands(directory: Path, first: Sequence[str] | None = None) -> list[Command]:
    """Return the commands to run next with a run.

    Args:
        directory: The run directory.
        first: The command that uses its model, from done.json: its name, what it does, and its arguments after the run.
    """
    quoted = _quoted(directory)
    out = []
    if first:
        verb, what, argument = first
        out.append(Command(what, f"firth {verb} {quoted} {argument}".rstrip()))
    out.append(Command("Evaluate on your own text or records", f"firth evaluate {quoted} my-text.txt"))
    config = directory / "model" / "config.json"
    if config.exists():
        own = config.with_name("firth.json")
        record = read_record(own, cure=COPY_AGAIN) if own.exists() else {}
        verify_files(
            {"config.json": record["files"]["config.json"]} if "files" in record else {}, config.parent, COPY_AGAIN
        )
        [name] = read_object(config, {"architectures": list})["architectures"]
        code = f"from transformers import {name} as M; print(M.from_pretrained({json.dumps(str(config.parent))}))"
        out.append(Command("Load with transformers", f"python -c {shlex.quote(code)}"))
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
