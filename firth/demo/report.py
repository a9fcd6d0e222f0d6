"""The demo's report: what happened at each stage, in the order of the walk, from the files that the walk left."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firth.demo.data import DemoText, read_rows
from firth.demo.sizes import DemoSize
from firth.report.charts import Curve, Figure, Level
from firth.report.page import Cell, Command, Report, Section, StatCell, Table, TextSample
from firth.report.run_report import read_rows as metric_rows
from firth.report.run_report import series
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer

Facts = dict[str, Any]
WORDS = ("taaaaasty", "laern", "Transformerify")
FAMILIES = {
    "encoder": "masked language modelling: some of the tokens are hidden and guessed from both sides",
    "encoder-decoder": "span corruption: spans are dropped from the source, and the decoder writes them",
    "decoder": "causal language modelling: the next token from those before it",
}


def demo_report(out: Path, material: DemoText, size: DemoSize) -> Report:
    """Everything the walk left in `out`, as one page."""
    held = {
        name: last(out, name)
        for name in (*FAMILIES, "classification-pretrained", "classification-scratch", "sft", "reward_model")
    }
    models = finding(out, "alignment")["models"]
    pretrained, scratch = held["classification-pretrained"]["accuracy"], held["classification-scratch"]["accuracy"]
    seconds = sum(json.loads((out / name / "done.json").read_text("utf-8"))["seconds"] for name in runs(out))
    numbers = [
        StatCell("held-out bits per byte, decoder", held["decoder"]["bits_per_byte"], "8 = no model at all"),
        StatCell("classifier, pretrained", f"{pretrained:.1%}", f"the same model from random weights: {scratch:.1%}"),
        StatCell("reward model", f"{held['reward_model']['accuracy']:.1%}", "of the held-out comparisons"),
        StatCell(
            "true reward, PPO",
            models["ppo"]["truth"],
            f"before {models['sft']['truth']:.2f}, DPO {models['dpo']['truth']:.2f}",
        ),
    ]
    return Report(
        title=f"firth demo: {material.title}",
        text=(
            f"From {material.bytes / 1e6:.1f} MB of raw text to models that are pretrained, finetuned, instruction-tuned and aligned, "
            f"in {seconds:.0f} seconds of training. Held out, and seen by no stage: {', '.join(material.held_out)}."
        ),
        numbers=numbers,
        sections=[
            subwords(out),
            pretraining(out, held),
            finetuning(out, material, held),
            instruction(out, material),
            preferences(out, held, size),
            alignment(out, models, material),
            directories(out),
        ],
        commands=commands(out, material),
        facts={
            "text": material.title,
            "trained on": f"{material.bytes:,} bytes",
            "seconds of training": f"{seconds:.0f}",
        },
    )


def runs(out: Path) -> Iterator[str]:
    """The names of the finished runs."""
    return (path.parent.name for path in sorted(out.glob("*/done.json")))


def last(out: Path, name: str) -> Mapping[str, float]:
    """The last held-out row of a run."""
    return [row for row in metric_rows(out / name / "metrics.jsonl") if row["split"] == "valid"][-1]


def finding(out: Path, name: str) -> Facts:
    found: Facts = json.loads((out / "findings" / f"{name}.json").read_text("utf-8"))
    return found


def curves(
    out: Path, names: list[tuple[str, str]], metric: str, title: str, unit: str, *, level: Level | None = None
) -> Figure:
    """One metric on held-out text of several runs, against seconds of training."""
    lines = []
    for name, label in names:
        x, y = series(metric_rows(out / name / "metrics.jsonl"), "valid", metric, "seconds")
        lines.append(Curve(label, x, y, points=True))
    return Figure(title, "seconds of training", unit, tuple(lines), levels=(level,) if level else ())


def subwords(out: Path) -> Section:
    tokenizer = Tokenizer.load(out / "tokenizer")
    merges = tokenizer.merges[:24]
    rows = [
        [i, f"{readable(m.left)} + {readable(m.right)}", readable(m.left + m.right), m.count]
        for i, m in enumerate(merges, 1)
    ]
    words = [[word, "  ".join(readable(p) for p in tokenizer.pieces(word))] for word in WORDS]
    return Section(
        "Subwords",
        f"Byte-level BPE begins with the 256 bytes and merges the most frequent neighbours, again and again, "
        f"to {tokenizer.vocab.size} ids. No word is unknown: what was never seen falls into pieces that were. "
        "(␣ is a blank, ⏎ a line break.)",
        tables=[
            Table("The first merges, in the order they were learned", ["#", "pair", "piece", "count"], rows),
            Table("How unseen words split", ["word", "pieces"], words),
        ],
    )


def pretraining(out: Path, held: Mapping[str, Mapping[str, float]]) -> Section:
    tokenizer = Tokenizer.load(out / "tokenizer")
    chance = math.log(len(tokenizer.vocab.ordinary))
    rows: list[list[Cell]] = []
    for name in FAMILIES:
        facts = json.loads((out / name / "done.json").read_text("utf-8"))
        rows.append([name, facts["steps"], facts["tokens"], facts["seconds"], held[name]["loss"]])
    samples = [
        TextSample(s["prompt"], {"before": s["before"], "after": s["after"]}, name)
        for name in FAMILIES
        for s in finding(out, f"samples-{name}")["samples"][:3]
    ]
    return Section(
        "Three families pretrained",
        "\n\n".join(f"{name}: {what}." for name, what in FAMILIES.items())
        + f"\n\nThe losses ask different questions and cannot be compared with each other, only with the untrained "
        f"model's {chance:.2f} nats, the logarithm of the vocabulary.",
        figures=[
            curves(out, [(n, n) for n in FAMILIES], "loss", "Loss on held-out text", "nats per predicted token",
                   level=Level("untrained", chance)),
        ],
        tables=[Table("Pretraining", ["model", "steps", "tokens", "seconds", "held-out loss"], rows)],
        samples=samples,
    )  # fmt: skip


def finetuning(out: Path, material: DemoText, held: Mapping[str, Mapping[str, float]]) -> Section:
    labelled = len(read_rows(out / "material" / "labeled-train.jsonl"))
    tested = len(read_rows(out / "material" / "labeled-valid.jsonl"))
    names = [
        ("classification-pretrained", "from the pretrained encoder"),
        ("classification-scratch", "from random weights"),
    ]
    rows: list[list[Cell]] = [[label, held[name]["accuracy"], held[name]["loss"]] for name, label in names]
    gain = held["classification-pretrained"]["accuracy"] - held["classification-scratch"]["accuracy"]
    verdict = (
        f"The starting point is worth {gain * 100:.0f} points of accuracy." if gain > 0.02
        else "Here the starting point made no clear difference: the pretraining was too short, or the label too easy."
    )  # fmt: skip
    return Section(
        "A finetuned task",
        f"{material.question} The answers are {', '.join(material.labels)}, equally many of each, so a constant answer "
        f"gets {1 / len(material.labels):.0%}. {labelled} passages to learn from, {tested} from held-out text to be tested on. "
        f"Both models are the same in all but their first weights. {verdict}",
        figures=[curves(out, names, "accuracy", "Accuracy on held-out passages", "share right",
                        level=Level("a constant answer", 1 / len(material.labels)))],
        tables=[Table("After finetuning", ["start", "accuracy", "loss"], rows, best={"accuracy": "max"})],
    )  # fmt: skip


def instruction(out: Path, material: DemoText) -> Section:
    samples = [
        TextSample(s["prompt"], {"before": s["before"], "after": s["after"]})
        for s in finding(out, "samples-sft")["samples"]
    ]
    return Section(
        "Instruction tuning",
        f"{material.cue} The decoder learns only what the answer says, and the token that ends it.",
        figures=[curves(out, [("sft", "sft")], "loss", "Loss on held-out answers", "nats per token")],
        samples=samples,
    )


def preferences(out: Path, held: Mapping[str, Mapping[str, float]], size: DemoSize) -> Section:
    counts = finding(out, "preferences")
    return Section(
        "Preferences and a reward model",
        f"Two answers to each prompt are sampled from the instruction-tuned model and compared by a judge whose true score is a "
        f"stated function of the text (`firth.demo.scorers`); he prefers the first with probability "
        f"sigma((score_1 - score_2) / {size.noise:g}), so he is not always of one mind: {counts['train-agree']:.0%} of his choices "
        f"have the higher score. {counts['train']} comparisons to learn from, {counts['valid']} held out. The reward model agrees with "
        f"{held['reward_model']['accuracy']:.1%} of the held-out ones; nobody could agree with many more than {counts['valid-agree']:.0%}.",
        figures=[
            curves(out, [("reward_model", "reward model")], "accuracy", "Agreement with held-out comparisons", "share",
                   level=Level("chance", 0.5)),
        ],
    )  # fmt: skip


def alignment(out: Path, models: Facts, material: DemoText) -> Section:
    names = {"sft": "before", "dpo": "DPO", "ppo": "PPO"}
    rows = [
        [names[n], m["truth"], m["reward"], m["kl_per_answer"], m["length"], m["finished"]] for n, m in models.items()
    ]
    found = finding(out, "alignment")
    samples = [
        TextSample(s["prompt"], {"before": s["sft"], "DPO": s["dpo"], "PPO": s["ppo"]}) for s in found["samples"][:4]
    ]
    phases = metric_rows(out / "ppo" / "metrics.jsonl")
    figures = []
    for metric, title, unit in (("reward", "PPO: reward model's score, phase by phase", "standard deviations"),
                                ("truth", "PPO: true reward, which it never sees", "true reward"),
                                ("kl_per_answer", "PPO: KL to the start", "nats per answer")):  # fmt: skip
        x, y = series(phases, "rollouts", metric, "seconds")
        if x:
            figures.append(Figure(title, "seconds of training", unit, (Curve("PPO", x, y, points=True),)))
    points = tuple(Curve(names[n], [m["kl_per_answer"]], [m["truth"]], points=True) for n, m in models.items())
    figures.append(Figure("True reward against distance", "KL to the start, nats per answer", "true reward", points))
    return Section(
        "PPO and DPO",
        f"Both begin at the instruction-tuned model. PPO writes answers, has the reward model judge them and pays for distance from "
        f"the start; DPO reads the comparisons alone. All three answer the same {found['prompts']} held-out prompts, judged by the true "
        f"scorer (`{material.scorer}`), which neither has seen. "
        "A reward-model score that rises while the true one does not is reward hacking. The table's answers are drawn at "
        "temperature 1, as in training; the samples below at 0.7.",
        figures=figures,
        tables=[
            Table("On held-out prompts", ["model", "true reward", "reward model", "KL, nats", "tokens", "finished"], rows,
                  best={"true reward": "max"}),
        ],
        samples=samples,
    )  # fmt: skip


def directories(out: Path) -> Section:
    rows = [[str(out / name / "model"), json.loads((out / name / "model" / "config.json").read_text("utf-8"))["architectures"][0]]
            for name in runs(out) if (out / name / "model" / "config.json").exists()]  # fmt: skip
    return Section(
        "What there is now",
        "Each run directory holds its recipe, its metrics, a report of its own and `model/`, a directory that the transformers "
        "library loads: `AutoModelForCausalLM.from_pretrained(...)` for the decoders.",
        tables=[Table("Model directories", ["directory", "class in transformers"], rows)],
    )


def commands(out: Path, material: DemoText) -> list[Command]:
    """What to type next, exactly; the decoder goes on with a beginning of its own text."""
    return [
        Command("Talk with the aligned decoder", f"firth chat {out}/ppo"),
        Command("Continue a text", f"firth generate {out}/decoder {shlex.quote(next(iter(material.samples), 'The '))}"),
        Command("Fill a gap", f"firth fill {out}/encoder 'I will <mask> it.'"),
        Command("The same walk on your own text", "firth demo --text MY_FOLDER --out my-demo"),
        Command("Pretrain a decoder on your own text", "firth train gpt:small data.path=MY_FOLDER --out runs/mine"),
    ]
