"""The published recipes by name, readable without torch: `firth list` needs no more than this."""

from __future__ import annotations

RECIPES = {
    "gpt": "firth.recipes.pretrain:gpt",
    "bert": "firth.recipes.pretrain:bert",
    "t5": "firth.recipes.pretrain:t5",
    "word2vec": "firth.recipes.recurrent:word2vec",
    "lstm": "firth.recipes.recurrent:lstm",
    "elmo": "firth.recipes.recurrent:elmo",
    "classify": "firth.recipes.tune:classify",
    "tag": "firth.recipes.recurrent:tag",
    "instruct": "firth.recipes.tune:instruct",
    "reward": "firth.recipes.tune:reward",
    "dpo": "firth.recipes.tune:dpo",
    "reinforce": "firth.recipes.tune:reinforce",
    "ppo": "firth.recipes.tune:ppo",
}
"""Name on the command line -> the function that returns the recipe."""
