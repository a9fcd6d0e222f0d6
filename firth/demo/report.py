"""Report of the demo: the results of each stage, in order, from the files in the demo's directory."""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firth.demo.data import DatasetInfo, read_rows
from firth.demo.sizes import DemoSize
from firth.report.charts import Curve, Figure, Level
from firth.report.page import Cell, Command, Report, Section, StatCell, Table, TextSample
from firth.report.run_report import read_rows as metric_rows
from firth.report.run_report import series
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer

EXAMPLE_WORDS = ("taaaaasty", "laern", "Transformerify")
"""Words that are not in the training text, to show how they are tokenized."""

FAMILIES = {
    "encoder": "masked language modeling: some tokens are masked and predicted from the tokens on both sides",
    "encoder-decoder": "span corruption: spans are removed from the input, and the decoder generates them",
    "decoder": "causal language modeling: each token is predicted from the tokens before it",
}
"""Pretraining objective of each model family."""

Metrics = Mapping[str, Mapping[str, float]]
"""Last held-out metrics of each run."""


def demo_report(out: Path, info: DatasetInfo, size: DemoSize) -> Report:
    """Build the report of a demo whose stages are finished.

    Args:
        out: Directory of the demo.
        info: Description of its data.
        size: Configuration of its stages.

    Returns:
        The report, one page.
    """
    metrics = {
        name: last_validation(out, name)
        for name in (*FAMILIES, "classification-pretrained", "classification-scratch", "sft", "reward_model")
    }
    models = load_results(out, "alignment")["models"]
    pretrained, scratch = (
        metrics["classification-pretrained"]["accuracy"],
        metrics["classification-scratch"]["accuracy"],
    )
    seconds = sum(json.loads((out / name / "done.json").read_text("utf-8"))["seconds"] for name in finished_runs(out))
    numbers = [
        StatCell("held-out bits per byte, decoder", metrics["decoder"]["bits_per_byte"], "without a model: 8"),
        StatCell("classifier, pretrained", f"{pretrained:.1%}", f"the same model from random weights: {scratch:.1%}"),
        StatCell("reward model", f"{metrics['reward_model']['accuracy']:.1%}", "accuracy on held-out comparisons"),
        StatCell(
            "true reward, PPO",
            models["ppo"]["truth"],
            f"before {models['sft']['truth']:.2f}, DPO {models['dpo']['truth']:.2f}",
        ),
    ]
    return Report(
        title=f"firth demo: {info.title}",
        text=(
            f"The demo pretrained, finetuned, instruction-tuned and aligned models on {info.bytes / 1e6:.1f} MB of raw text, "
            f"in {seconds:.0f} seconds of training. No stage was trained on the held-out documents: {', '.join(info.held_out)}."
        ),
        numbers=numbers,
        sections=[
            tokenizer_section(out),
            pretraining_section(out, metrics),
            finetuning_section(out, info, metrics),
            instruction_tuning_section(out, info),
            preferences_section(out, metrics, size),
            alignment_section(out, models, info),
            directories_section(out),
        ],
        commands=next_commands(out, info),
        facts={
            "text": info.title,
            "trained on": f"{info.bytes:,} bytes",
            "seconds of training": f"{seconds:.0f}",
        },
    )


def finished_runs(out: Path) -> Iterator[str]:
    """List the finished runs of a demo.

    Args:
        out: Directory of the demo.

    Returns:
        Their names, sorted.
    """
    return (path.parent.name for path in sorted(out.glob("*/done.json")))


def last_validation(out: Path, name: str) -> Mapping[str, float]:
    """Read the last held-out metrics of a run.

    Args:
        out: Directory of the demo.
        name: Name of the run.

    Returns:
        The metrics by name.
    """
    return [row for row in metric_rows(out / name / "metrics.jsonl") if row["split"] == "valid"][-1]


def load_results(out: Path, name: str) -> dict[str, Any]:
    """Read the results that a stage wrote.

    Args:
        out: Directory of the demo.
        name: Name of the file in findings/, without suffix.

    Returns:
        The results.
    """
    results: dict[str, Any] = json.loads((out / "findings" / f"{name}.json").read_text("utf-8"))
    return results


def validation_figure(
    out: Path, names: list[tuple[str, str]], metric: str, title: str, unit: str, *, level: Level | None = None
) -> Figure:
    """Plot one held-out metric of several runs against seconds of training.

    Args:
        out: Directory of the demo.
        names: Name and label of each run.
        metric: Name of the metric.
        title: Title of the figure.
        unit: Unit of the metric.
        level: A horizontal reference line.

    Returns:
        The figure.
    """
    lines = []
    for name, label in names:
        x, y = series(metric_rows(out / name / "metrics.jsonl"), "valid", metric, "seconds")
        lines.append(Curve(label, x, y, points=True))
    return Figure(title, "seconds of training", unit, tuple(lines), levels=(level,) if level else ())


def tokenizer_section(out: Path) -> Section:
    """Build the section on the tokenizer: its first merges, and how unseen words are split.

    Args:
        out: Directory of the demo.

    Returns:
        The section.
    """
    tokenizer = Tokenizer.load(out / "tokenizer")
    show = functools.partial(readable, byte_level=tokenizer.is_byte_level)
    merges = tokenizer.merges[:24]
    rows = [[i, f"{show(m.left)} + {show(m.right)}", show(m.left + m.right), m.count] for i, m in enumerate(merges, 1)]
    words = [[word, "  ".join(show(p) for p in tokenizer.pieces(word))] for word in EXAMPLE_WORDS]
    return Section(
        "Subwords",
        "Byte-level BPE starts with the 256 bytes and repeatedly merges the most frequent pair of neighbors, "
        f"until the vocabulary has {tokenizer.vocab.size} ids. No word is unknown: an unseen word is split into known pieces. "
        "(␣ is a space, ⏎ a line break.)",
        tables=[
            Table("The first merges, in the order they were learned", ["#", "pair", "piece", "count"], rows),
            Table("How unseen words are split", ["word", "pieces"], words),
        ],
    )


def pretraining_section(out: Path, metrics: Metrics) -> Section:
    """Build the section on the pretraining of the three model families.

    Args:
        out: Directory of the demo.
        metrics: Last held-out metrics of each run.

    Returns:
        The section.
    """
    tokenizer = Tokenizer.load(out / "tokenizer")
    uniform_loss = math.log(len(tokenizer.vocab.ordinary))
    rows: list[list[Cell]] = []
    for name in FAMILIES:
        done = json.loads((out / name / "done.json").read_text("utf-8"))
        rows.append([name, done["steps"], done["tokens"], done["seconds"], metrics[name]["loss"]])
    samples = [
        TextSample(sample["prompt"], {"before": sample["before"], "after": sample["after"]}, name)
        for name in FAMILIES
        for sample in load_results(out, f"samples-{name}")["samples"][:3]
    ]
    return Section(
        "Pretraining of three model families",
        "\n\n".join(f"{name}: {objective}." for name, objective in FAMILIES.items())
        + "\n\nThe three objectives predict different tokens, so their losses cannot be compared with each other. Each can be "
        f"compared with the loss of an untrained model, {uniform_loss:.2f} nats, the logarithm of the vocabulary size.",
        figures=[
            validation_figure(
                out,
                [(name, name) for name in FAMILIES],
                "loss",
                "Loss on held-out text",
                "nats per predicted token",
                level=Level("untrained", uniform_loss),
            ),
        ],
        tables=[Table("Pretraining", ["model", "steps", "tokens", "seconds", "held-out loss"], rows)],
        samples=samples,
    )


def finetuning_section(out: Path, info: DatasetInfo, metrics: Metrics) -> Section:
    """Build the section on the classifiers from pretrained and from random weights.

    Args:
        out: Directory of the demo.
        info: Description of its data.
        metrics: Last held-out metrics of each run.

    Returns:
        The section.
    """
    num_train = len(read_rows(out / "material" / "labeled-train.jsonl"))
    num_valid = len(read_rows(out / "material" / "labeled-valid.jsonl"))
    names = [
        ("classification-pretrained", "from the pretrained encoder"),
        ("classification-scratch", "from random weights"),
    ]
    rows: list[list[Cell]] = [[label, metrics[name]["accuracy"], metrics[name]["loss"]] for name, label in names]
    gain = metrics["classification-pretrained"]["accuracy"] - metrics["classification-scratch"]["accuracy"]
    conclusion = (
        f"Pretraining improves the accuracy by {gain * 100:.0f} percentage points."
        if gain > 0.02
        else "Pretraining made no clear difference here: it was too short, or the task is too easy."
    )
    constant = 1 / len(info.labels)
    return Section(
        "Finetuning of a classifier",
        f"{info.question} The classes are {', '.join(info.labels)}, with equally many passages each, so a constant prediction "
        f"has an accuracy of {constant:.0%}. There are {num_train} training passages and {num_valid} test passages from held-out "
        f"text. The two models differ only in their initial weights. {conclusion}",
        figures=[
            validation_figure(
                out,
                names,
                "accuracy",
                "Accuracy on held-out passages",
                "accuracy",
                level=Level("a constant prediction", constant),
            )
        ],
        tables=[Table("After finetuning", ["initial weights", "accuracy", "loss"], rows, best={"accuracy": "max"})],
    )


def instruction_tuning_section(out: Path, info: DatasetInfo) -> Section:
    """Build the section on instruction tuning.

    Args:
        out: Directory of the demo.
        info: Description of its data.

    Returns:
        The section.
    """
    samples = [
        TextSample(sample["prompt"], {"before": sample["before"], "after": sample["after"]})
        for sample in load_results(out, "samples-sft")["samples"]
    ]
    return Section(
        "Instruction tuning",
        f"{info.cue} The loss covers only the tokens of the answer and the token that ends it.",
        figures=[
            validation_figure(out, [("sft", "sft")], "loss", "Loss on held-out answers", "nats per token"),
        ],
        samples=samples,
    )


def preferences_section(out: Path, metrics: Metrics, size: DemoSize) -> Section:
    """Build the section on the sampled preferences and the reward model.

    Args:
        out: Directory of the demo.
        metrics: Last held-out metrics of each run.
        size: Configuration of the stages.

    Returns:
        The section.
    """
    counts = load_results(out, "preferences")
    return Section(
        "Preferences and a reward model",
        "The instruction-tuned model samples two answers to each prompt. A simulated judge compares them by the true reward, a "
        "function of the text (`firth.demo.data`). The judge prefers the first answer with probability "
        f"sigma((reward_1 - reward_2) / {size.preference_noise:g}), so the preferences are noisy: {counts['train-agree']:.0%} of "
        f"the chosen answers have the higher true reward. There are {counts['train']} training comparisons and {counts['valid']} "
        f"held-out ones. The reward model has an accuracy of {metrics['reward_model']['accuracy']:.1%} on the held-out "
        f"comparisons; the true reward itself has {counts['valid-agree']:.0%}.",
        figures=[
            validation_figure(
                out,
                [("reward_model", "reward model")],
                "accuracy",
                "Accuracy on held-out comparisons",
                "accuracy",
                level=Level("chance", 0.5),
            ),
        ],
    )


def alignment_section(out: Path, models: Mapping[str, Mapping[str, float]], info: DatasetInfo) -> Section:
    """Build the section that compares the models before alignment, after DPO and after PPO.

    Args:
        out: Directory of the demo.
        models: Metrics of each model on held-out prompts.
        info: Description of the data.

    Returns:
        The section.
    """
    names = {"sft": "before", "dpo": "DPO", "ppo": "PPO"}
    rows: list[list[Cell]] = [
        [names[name], row["truth"], row["reward"], row["kl_per_answer"], row["length"], row["finished"]]
        for name, row in models.items()
    ]
    results = load_results(out, "alignment")
    samples = [
        TextSample(sample["prompt"], {"before": sample["sft"], "DPO": sample["dpo"], "PPO": sample["ppo"]})
        for sample in results["samples"][:4]
    ]
    ppo_metrics = metric_rows(out / "ppo" / "metrics.jsonl")
    figures = []
    for metric, title, unit in (
        ("reward", "PPO: score of the reward model per rollout batch", "standard deviations"),
        ("truth", "PPO: true reward, which is not used in training", "true reward"),
        ("kl_per_answer", "PPO: KL to the initial model", "nats per answer"),
    ):
        x, y = series(ppo_metrics, "rollouts", metric, "seconds")
        if x:
            figures.append(Figure(title, "seconds of training", unit, (Curve("PPO", x, y, points=True),)))
    points = tuple(
        Curve(names[name], [row["kl_per_answer"]], [row["truth"]], points=True) for name, row in models.items()
    )
    figures.append(Figure("True reward against KL", "KL to the initial model, nats per answer", "true reward", points))
    return Section(
        "PPO and DPO",
        "PPO and DPO both start from the instruction-tuned model. PPO samples answers, scores them with the reward model and "
        "subtracts a penalty for the KL to the initial model; DPO trains on the comparisons alone. All three models answer the "
        f"same {results['prompts']} held-out prompts and are measured by the true reward (`{info.scorer}`), which PPO and DPO do "
        "not use in training. If the score of the reward model rises and the true reward does not, that is reward hacking. The "
        "answers of the table are sampled at temperature 1, as in training; the samples below at 0.7.",
        figures=figures,
        tables=[
            Table(
                "On held-out prompts",
                ["model", "true reward", "reward model", "KL, nats", "tokens", "finished"],
                rows,
                best={"true reward": "max"},
            ),
        ],
        samples=samples,
    )


def directories_section(out: Path) -> Section:
    """Build the section that lists the model directories.

    Args:
        out: Directory of the demo.

    Returns:
        The section.
    """
    rows: list[list[Cell]] = []
    for name in finished_runs(out):
        config = out / name / "model" / "config.json"
        if config.exists():
            rows.append([str(config.parent), json.loads(config.read_text("utf-8"))["architectures"][0]])
    return Section(
        "Model directories",
        "Each run directory contains its recipe, its metrics, its own report and `model/`, a directory that the transformers "
        "library loads: `AutoModelForCausalLM.from_pretrained(...)` for the decoders.",
        tables=[Table("Model directories", ["directory", "class in transformers"], rows)],
    )


def next_commands(out: Path, info: DatasetInfo) -> list[Command]:
    """Return the commands to run after the demo.

    Args:
        out: Directory of the demo.
        info: Description of its data; its first sample is the prompt of the decoder.

    Returns:
        The commands, each with a title.
    """
    prompt = shlex.quote(next(iter(info.samples), "The "))
    return [
        Command("Chat with the aligned decoder", f"firth chat {out}/ppo"),
        Command("Continue a text", f"firth generate {out}/decoder {prompt}"),
        Command("Predict a masked word", f"firth fill {out}/encoder 'I will <mask> it.'"),
        Command("Run the demo on your own text", "firth demo --text MY_FOLDER --out my-demo"),
        Command("Pretrain a decoder on your own text", "firth train gpt:small data.path=MY_FOLDER --out runs/mine"),
    ]
