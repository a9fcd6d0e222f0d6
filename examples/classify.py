"""Finetune a classifier on a list of dicts, and use it.

    python examples/classify.py runs/classifier --init-from MODEL

A pandas DataFrame works too: rows = frame.to_dict("records"). Without --init-from the model starts from random weights.
"""

import argparse
import random

import firth

ADJECTIVES = {"good": ("fine", "lovely", "warm", "clever"), "bad": ("dull", "awful", "cold", "stupid")}
NOUNS = ("film", "book", "meal", "song", "play", "trip", "game", "talk")


def reviews() -> list[dict[str, str]]:
    """Return made-up reviews with their labels; put your own rows here."""
    rows = []
    for label, adjectives in ADJECTIVES.items():
        for adjective in adjectives:
            rows += [{"text": f"what a {adjective} {noun}", "label": label} for noun in NOUNS]
    random.Random(0).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="the run directory")
    parser.add_argument("--init-from", help="a run, or a model in transformers' format")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    settings = {"max_steps": arguments.steps, "batch.size": 16}
    if arguments.init_from:
        settings["init_from"] = arguments.init_from
    else:
        settings["model"] = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "causal": False}
        settings["tokenizer.vocab_size"] = 400
    rows = reviews()
    result = firth.train(firth.load_recipe("classification", settings), arguments.out, rows=rows[16:])

    model = firth.load_model(result.directory)
    test = rows[:16]
    predictions = model.predict([{"text": row["text"]} for row in test])
    correct = sum(row["label"] == predicted["label"] for row, predicted in zip(test, predictions, strict=True))
    print(f"{correct} of {len(test)} test rows right")
    print(model.predict(["what a lovely trip"])[0])


if __name__ == "__main__":
    main()
