"""Names of the published recipes. Importing this module does not import torch, so `firth list` is fast."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

RECIPES = {
    "word2vec": "firth.recipes.recurrent:word2vec",
    "lstm": "firth.recipes.recurrent:lstm",
    "elmo": "firth.recipes.recurrent:elmo",
    "gpt": "firth.recipes.decoders:gpt",
    "gpt2": "firth.recipes.decoders:gpt2",
    "gpt3": "firth.recipes.decoders:gpt3",
    "llama": "firth.recipes.decoders:llama",
    "bert": "firth.recipes.encoders:bert",
    "roberta": "firth.recipes.encoders:roberta",
    "spanbert": "firth.recipes.encoders:spanbert",
    "albert": "firth.recipes.encoders:albert",
    "electra": "firth.recipes.encoders:electra",
    "xlnet": "firth.recipes.encoders:xlnet",
    "mpnet": "firth.recipes.encoders:mpnet",
    "linformer": "firth.recipes.encoders:linformer",
    "t5": "firth.recipes.seq2seq:t5",
    "bart": "firth.recipes.seq2seq:bart",
    "prefix_lm": "firth.recipes.seq2seq:prefix_lm",
    "closed_book": "firth.recipes.seq2seq:closed_book",
    "contrastive": "firth.recipes.encoders:contrastive",
    "vae": "firth.recipes.seq2seq:vae",
    "classification": "firth.recipes.finetuning:classification",
    "regression": "firth.recipes.finetuning:regression",
    "multiple_choice": "firth.recipes.finetuning:multiple_choice",
    "token_classification": "firth.recipes.finetuning:token_classification",
    "token_features": "firth.recipes.recurrent:token_features",
    "question_answering": "firth.recipes.finetuning:question_answering",
    "text_to_text": "firth.recipes.finetuning:text_to_text",
    "glue": "firth.recipes.finetuning:glue",
    "semi_supervised": "firth.recipes.finetuning:semi_supervised",
    "weak_supervision": "firth.recipes.finetuning:weak_supervision",
    "closed_book_questions": "firth.recipes.seq2seq:closed_book_questions",
    "sft": "firth.recipes.post_training:sft",
    "reward_model": "firth.recipes.post_training:reward_model",
    "ranking": "firth.recipes.post_training:ranking",
    "dpo": "firth.recipes.post_training:dpo",
    "simpo": "firth.recipes.post_training:simpo",
    "orpo": "firth.recipes.post_training:orpo",
    "kto": "firth.recipes.post_training:kto",
    "reinforce": "firth.recipes.post_training:reinforce",
    "rloo": "firth.recipes.post_training:rloo",
    "grpo": "firth.recipes.post_training:grpo",
    "ppo": "firth.recipes.post_training:ppo",
}
"""Name on the command line -> module:function that returns the recipe."""

NEEDS = {
    "semi_supervised": "records {text, label}; examples.unlabeled_path=[FILE] of texts without a label; "
    "examples.teacher=RUN of classification",
    "weak_supervision": "records {text, labels: [of several annotators]}; examples=simulated_annotators simulates "
    "annotators of records {text, label}",
    "kto": "records {prompt, completion, label}, the label true for a good answer and false for a bad one",
}
"""Name -> the input that a recipe needs, where the name does not show it."""


def summary(name: str) -> str:
    """Return what a recipe is: the first sentence of its function's docstring, read from the source.

    >>> summary("bert")
    'BERT: masked language modeling and next sentence prediction (Devlin 2019).'
    """
    module, function = RECIPES[name].split(":")
    text = _docstrings(module)[function].partition("\n")[0].removeprefix("Return ")
    return text[0].upper() + text[1:]


@functools.cache
def _docstrings(module: str) -> dict[str, str]:
    """Return the docstring of each function of a module of the package, without importing it."""
    source = Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py").read_text("utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_docstring(node) or "" for node in functions}
