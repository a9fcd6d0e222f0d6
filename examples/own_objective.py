"""Train with an objective of one's own, which lives in this file: a loss on rare tokens only.

    cd examples && python own_objective.py MY_TEXT runs/rare

The same objective on the command line: firth train gpt objective=own_objective:RareTokens data.path=MY_TEXT
"""

import sys
from dataclasses import dataclass

import numpy as np

import firth
from firth.data import attention_fields
from firth.objectives.objective import TokenObjective
from firth.types import IGNORE


@dataclass(frozen=True)
class RareTokens(TokenObjective):
    """Causal language modeling whose loss leaves out the most frequent tokens.

    Args:
        first_id: Tokens with a smaller id have no loss. The ids of a byte-level BPE grow as its merges become rarer.
    """

    attention = "causal"

    first_id: int = 300

    def build_example(self, example, vocab, rng):
        tokens = example["tokens"]
        labels = np.where(tokens[1:] >= self.first_id, tokens[1:], IGNORE)
        built = {"tokens": tokens[:-1], "labels": labels} | attention_fields.causal(len(tokens) - 1)
        if "document_ids" in example:
            document = example["document_ids"]
            built |= {"document_ids": document[:-1]}
            built["labels"][document[1:] != document[:-1]] = IGNORE
        return built


def main() -> None:
    text, out = sys.argv[1:3]
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200
    recipe = firth.load_recipe(
        "gpt",
        {"objective": "own_objective:RareTokens", "data.path": text, "tokenizer.vocab_size": 512, "max_steps": steps},
    )
    result = firth.train(recipe, out)
    print({name: round(value, 3) for name, value in result.metrics.items()})


if __name__ == "__main__":
    main()
