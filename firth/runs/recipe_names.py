"""Names of the published recipes. Importing this module does not import torch, so `firth list` is fast."""

from __future__ import annotations

RECIPES = {
    "word2vec": "firth.recipes.recurrent:word2vec",
    "lstm": "firth.recipes.recurrent:lstm",
    "elmo": "firth.recipes.recurrent:elmo",
    "gpt": "firth.recipes.gpt:gpt",
    "gpt2": "firth.recipes.gpt:gpt2",
    "gpt3": "firth.recipes.gpt:gpt3",
    "llama": "firth.recipes.gpt:llama",
    "bert": "firth.recipes.bert:bert",
    "roberta": "firth.recipes.bert:roberta",
    "spanbert": "firth.recipes.spanbert:spanbert",
    "albert": "firth.recipes.albert:albert",
    "electra": "firth.recipes.electra:electra",
    "xlnet": "firth.recipes.xlnet:xlnet",
    "mpnet": "firth.recipes.xlnet:mpnet",
    "linformer": "firth.recipes.linformer:linformer",
    "t5": "firth.recipes.t5:t5",
    "bart": "firth.recipes.bart:bart",
    "prefix_lm": "firth.recipes.prefix_lm:prefix_lm",
    "closed_book": "firth.recipes.closed_book:closed_book",
    "contrastive": "firth.recipes.contrastive:contrastive",
    "vae": "firth.recipes.vae:vae",
    "classification": "firth.recipes.finetuning:classification",
    "regression": "firth.recipes.finetuning:regression",
    "multiple_choice": "firth.recipes.finetuning:multiple_choice",
    "token_classification": "firth.recipes.finetuning:token_classification",
    "token_features": "firth.recipes.recurrent:token_features",
    "question_answering": "firth.recipes.finetuning:question_answering",
    "text_to_text": "firth.recipes.finetuning:text_to_text",
    "glue": "firth.recipes.finetuning:glue",
    "semi_supervised": "firth.recipes.few_labels:semi_supervised",
    "weak_supervision": "firth.recipes.few_labels:weak_supervision",
    "closed_book_questions": "firth.recipes.closed_book:closed_book_questions",
    "sft": "firth.recipes.post_training:sft",
    "reward_model": "firth.recipes.post_training:reward_model",
    "ranking": "firth.recipes.post_training:ranking",
    "dpo": "firth.recipes.post_training:dpo",
    "reinforce": "firth.recipes.post_training:reinforce",
    "ppo": "firth.recipes.post_training:ppo",
}
"""Name on the command line -> module:function that returns the recipe."""

NEEDS = {
    "semi_supervised": "records {text, label}; examples.unlabeled_path=[FILE] of texts without a label; examples.teacher=RUN of classification",
    "weak_supervision": "records {text, labels: [of several annotators]}; examples=simulated_annotators simulates annotators of records {text, label}",
}
"""Name -> the input that a recipe needs, where the name does not say it."""
