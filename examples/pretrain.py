"""Pretrain a small decoder on a folder of text, and continue a prompt with it.

python examples/pretrain.py MY_FOLDER runs/mine --steps 300
"""

import argparse
import logging

import firth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a text file or a folder of them")
    parser.add_argument("out", help="the run directory; an interrupted run resumes there")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompt", default="The ")
    arguments = parser.parse_args()

    recipe = firth.load_recipe(
        "gpt",
        {
            "data.path": arguments.text,
            "tokenizer.vocab_size": 2048,
            "max_steps": arguments.steps,
            "evaluation.every": max(arguments.steps // 4, 1),
        },
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # shows firth's messages
    losses = []

    def on_metrics(row: dict) -> None:
        if row["split"] == "valid":
            losses.append((row["step"], row["loss"]))

    result = firth.train(recipe, arguments.out, on_metrics=on_metrics)
    for step, loss in losses:
        print(f"step {step}: held-out loss {loss:.3f}")
    print(f"{result.tokens:,} tokens in {result.seconds:.0f} s")

    model = firth.load_model(result.directory)
    [text] = model.generate([arguments.prompt], max_new_tokens=40, temperature=0.8, min_p=0.05, seed=1)
    print(arguments.prompt + text)


if __name__ == "__main__":
    main()
