"""An example report like the demo's: realistic sizes and words, and hostile text."""

import numpy as np

from firth.report.charts import Curve, Figure, Level
from firth.report.page import Command, Report, Section, StatCell, Table, TextSample

HOSTILE = "</p><script>alert('x')</script><img src=https://example.com/a.png onerror=alert(1)>\" & 'quotes'"


def example() -> Report:
    rng = np.random.default_rng(0)
    steps = np.arange(1, 1501)
    tokens = (steps * 4096).tolist()

    def falling(low, high, pace):
        return (low + high * np.exp(-steps / pace) + 0.08 * rng.standard_normal(len(steps))).tolist()

    stages = (("decoder, next word", 3.12, 150), ("encoder, masked words", 3.42, 210), ("encoder-decoder", 2.71, 190))
    losses = tuple(
        Figure(
            f"Loss of the {name}",
            "tokens read",
            "nats per token",
            (
                Curve("train", tokens, falling(low, 5.9, pace), smooth=12),
                Curve("held-out plays", tokens[::125], falling(low + 0.25, 5.7, pace)[::125], points=True),
            ),
            levels=(Level("untrained", 9.01),),
            note="Thin: every step. Thick: the mean over 25 of them.",
        )
        for name, low, pace in stages
    )
    shown = (0, 200, 400, 800, 1600)
    finetuned = Figure(
        "Accuracy on held-out speakers",
        "labeled examples",
        "share correct",
        (
            Curve("pretrained", shown, (0.52, 0.62, 0.68, 0.73, 0.752), points=True),
            Curve("from random weights", shown, (0.51, 0.51, 0.52, 0.55, 0.583), points=True, dashed=True),
        ),
        levels=(Level("majority class", 0.52),),
    )
    distance = (0.0, 1.1, 2.2, 3.9, 6.1, 9.4)
    aligned = Figure(
        "Reward against distance",
        "KL to the starting model, nats",
        "true reward",
        (
            Curve("PPO", distance, (0.0, 0.71, 1.22, 1.61, 1.82, 1.55), points=True),
            Curve("DPO", distance[:5], (0.0, 0.66, 1.11, 1.43, 1.31), points=True),
        ),
        note="Beyond 6 nats the learned reward of PPO rises and the true reward falls: the reward model is over-optimized.",
    )
    reached = Table(
        "What each stage reached",
        ("stage", "parameters", "seconds", "before", "after", "bits per byte"),
        (
            ("decoder, next word", 14_100_992, 101.2, 9.01, 3.12, 2.314),
            ("encoder, masked words", 3_412_224, 61.0, 9.01, 3.42, None),
            ("encoder-decoder, spans", 5_120_512, 74.9, 9.02, 2.71, None),
        ),
        note="Loss in nats per predicted token, on six plays that no stage was trained on.",
        best={"after": "min"},
    )
    split = Table(
        "How words split",
        ("word", "pieces"),
        (("taaaaasty", "t · aaa · aa · sty"), ("laern", "la · ern"), ("Transformerify", "Trans · form · er · ify")),
    )
    verse = "O, speak again, bright angel! for thou art\nAs glorious to this night, being o'er my head,\nAs is a winged"
    return Report(
        title="Shakespeare, from raw text to an aligned model",
        text="In 5 minutes and 12 seconds on two cores, firth trained a tokenizer on 32 plays, pretrained three models, "
        "finetuned one and aligned another.\n\nSix plays were held out: every score below is on those.",
        numbers=(
            StatCell("bits per byte", 2.314, "held-out plays; gzip reaches 2.98"),
            StatCell("accuracy, pretrained", 0.752, "0.583 from random weights"),
            StatCell("true reward, PPO", 1.82, "at 6.1 nats from the start"),
            StatCell("true reward, DPO", 1.43, "at 3.9 nats from the start"),
        ),
        sections=(
            Section("Subwords", "The most frequent pair is merged repeatedly: `t h` first.", tables=(split,)),
            Section(
                "Pretraining",
                "Three families read the same plays.",
                figures=losses,
                tables=(reached,),
                samples=(
                    TextSample(
                        "ROMEO:", {"before": "gl the,, ofQuin mere st", "after": verse}, "temperature 0.8, seed 0"
                    ),
                    TextSample(HOSTILE, {"before": HOSTILE, "after": "<b>not bold</b>"}, HOSTILE),
                ),
            ),
            Section("Finetuning", figures=(finetuned,)),
            Section("Alignment", HOSTILE, figures=(aligned,), listing="objective: dpo\nbeta: 0.1  # <em>\n"),
            Section("Alignment"),
        ),
        commands=(
            Command("Chat with the aligned model", "firth chat demo/dpo"),
            Command("Run the demo on a folder of your own", "firth demo --text my-texts/"),
        ),
        facts={"made with": "firth 0.1.0, torch 2.13.0", "corpus": "shakespeare (MIT), 5,318,858 bytes"},
    )
