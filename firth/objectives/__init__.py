"""Registry of objectives by their recipe name. To add one, write its file and add a line here."""

from __future__ import annotations

import importlib

OBJECTIVES = {
    "causal_lm": "firth.objectives.causal_lm:CausalLM",
    "mlm": "firth.objectives.masked_lm:MLM",
    "plm": "firth.objectives.permuted_lm:PLM",
    "mpnet": "firth.objectives.mpnet:MPNet",
    "nsp": "firth.objectives.next_sentence:NSP",
    "sop": "firth.objectives.sentence_order:SOP",
    "sbo": "firth.objectives.span_boundary:SBO",
    "rtd": "firth.objectives.replaced_tokens:RTD",
    "adversarial_rtd": "firth.objectives.replaced_tokens:AdversarialRTD",
    "span_corruption": "firth.objectives.span_corruption:SpanCorruption",
    "prefix_lm": "firth.objectives.prefix_lm:PrefixLM",
    "denoising": "firth.objectives.denoise:Denoising",
    "word2vec": "firth.objectives.word2vec:Word2Vec",
    "bilm": "firth.objectives.bilm:BiLM",
    "layer_mixture": "firth.objectives.layer_mixture:LayerMixture",
    "token_classification": "firth.objectives.token_classification:TokenClassification",
    "classification": "firth.objectives.classification:Classification",
    "regression": "firth.objectives.regression:Regression",
    "multiple_choice": "firth.objectives.multiple_choice:MultipleChoice",
    "question_answering": "firth.objectives.extractive_qa:QuestionAnswering",
    "contrastive": "firth.objectives.contrastive:Contrastive",
    "infonce": "firth.objectives.contrastive:InfoNCE",
    "vae": "firth.objectives.vae:VAE",
    "pseudo_labels": "firth.objectives.semi_supervised:PseudoLabels",
    "consistency": "firth.objectives.semi_supervised:Consistency",
    "multi_annotator": "firth.objectives.multi_annotator:MultiAnnotator",
    "weight_penalty": "firth.objectives.weight_penalty:WeightPenalty",
    "sft": "firth.objectives.sft:SFT",
    "seq2seq": "firth.objectives.sft:Seq2SeqSFT",
    "reward_model": "firth.objectives.reward_model:RewardModeling",
    "ranking": "firth.objectives.reward_model:Ranking",
    "dpo": "firth.objectives.dpo:DPO",
    "reinforce": "firth.objectives.reinforce:Reinforce",
    "ppo": "firth.objectives.ppo:PPO",
}
"""Name -> "module:class"; imported on demand, so that listing them needs no torch."""


def find(name: str) -> type:
    """Return the objective class of a recipe name."""
    module, cls = OBJECTIVES[name].split(":")
    found: type = getattr(importlib.import_module(module), cls)
    return found


def name_of(kind: type) -> str:
    """Return the recipe name of an objective class, or the class's own name where it has none."""
    path = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, known in OBJECTIVES.items() if known == path), kind.__qualname__)
