"""Train a decoder with DPO on a list of preference pairs, and compare its answers before and after.

    python examples/preferences.py runs/sft runs/dpo --steps 60

runs/sft is a run of `firth train sft`, or a chat model in transformers' format.
"""

import argparse

import firth

SUBJECTS = ("the king", "the moon", "a horse", "the sea", "my sword", "the night", "a crown", "the storm")


def preferences() -> list[dict[str, str]]:
    """Return pairs in which the short answer is preferred; put your own pairs here."""
    return [
        {
            "prompt": f"Speak of {subject}.",
            "chosen": f"It is {word}.",
            "rejected": f"It is {word}, and I would say, good sir, that it is very {word} indeed, as all the world knows.",
        }
        for subject in SUBJECTS
        for word in ("fair", "dark", "old", "great")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", help="the instruction-tuned model")
    parser.add_argument("out", help="the run directory")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    recipe = firth.load_recipe("dpo", {"init_from": arguments.start, "max_steps": arguments.steps, "batch.size": 8})
    result = firth.train(recipe, arguments.out, rows=preferences())
    print({name: round(value, 3) for name, value in result.metrics.items()})

    pair = preferences()[0]
    for name, directory in (("before", arguments.start), ("after", result.directory)):
        model = firth.load_model(directory)
        chosen, rejected = model.score([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        print(f"{name}: log p(chosen) - log p(rejected) = {chosen - rejected:.2f} nats")


if __name__ == "__main__":
    main()
