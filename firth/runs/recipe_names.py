"""The published recipes by name, readable without torch: `firth list` needs no more than this."""

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
    "classify": "firth.recipes.finetuning:classify",
    "regress": "firth.recipes.finetuning:regress",
    "choose": "firth.recipes.finetuning:choose",
    "tag": "firth.recipes.finetuning:tag",
    "tag_features": "firth.recipes.recurrent:tag_features",
    "answer": "firth.recipes.finetuning:answer",
    "text_to_text": "firth.recipes.finetuning:text_to_text",
    "glue": "firth.recipes.finetuning:glue",
    "semi_supervised": "firth.recipes.few_labels:semi_supervised",
    "weak": "firth.recipes.few_labels:weak",
    "closed_book_questions": "firth.recipes.closed_book:closed_book_questions",
    "instruct": "firth.recipes.post_training:instruct",
    "reward": "firth.recipes.post_training:reward",
    "ranking": "firth.recipes.post_training:ranking",
    "dpo": "firth.recipes.post_training:dpo",
    "reinforce": "firth.recipes.post_training:reinforce",
    "ppo": "firth.recipes.post_training:ppo",
}
"""Name on the command line -> the function that returns the recipe."""

NEEDS = {
    "semi_supervised": "records {text, label}; segment.others=[FILE] of texts without a label; segment.teacher=RUN of classify",
    "weak": "records {text, labels: [of several annotators]}; segment=voted simulates annotators of records {text, label}",
}
"""Name -> what a recipe reads that its name does not say."""
