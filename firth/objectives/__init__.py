"""Registry of objectives by their recipe name. To add one, write its file and add a line here.

An objective outside the package needs no line: a recipe names it `objective=my_module:MyObjective`
(docs/how-to/add-an-objective.md).
"""

from __future__ import annotations

import importlib

from firth.io import user_code

OBJECTIVES = {
    "causal_lm": "firth.objectives.causal_lm:CausalLM",
    "mlm": "firth.objectives.masked_lm:MLM",
    "plm": "firth.objectives.permuted_lm:PLM",
    "mpnet": "firth.objectives.permuted_lm:MPNet",
    "nsp": "firth.objectives.sentence_pairs:NSP",
    "sop": "firth.objectives.sentence_pairs:SOP",
    "sbo": "firth.objectives.masked_lm:SBO",
    "rtd": "firth.objectives.replaced_tokens:RTD",
    "adversarial_rtd": "firth.objectives.replaced_tokens:AdversarialRTD",
    "span_corruption": "firth.objectives.seq2seq:SpanCorruption",
    "prefix_lm": "firth.objectives.causal_lm:PrefixLM",
    "denoising": "firth.objectives.seq2seq:Denoising",
    "word2vec": "firth.objectives.word2vec:Word2Vec",
    "bilm": "firth.objectives.causal_lm:BiLM",
    "layer_mixture": "firth.objectives.token_tasks:LayerMixture",
    "token_classification": "firth.objectives.token_tasks:TokenClassification",
    "classification": "firth.objectives.classification:Classification",
    "regression": "firth.objectives.classification:Regression",
    "multiple_choice": "firth.objectives.classification:MultipleChoice",
    "question_answering": "firth.objectives.token_tasks:QuestionAnswering",
    "contrastive": "firth.objectives.contrastive:Contrastive",
    "infonce": "firth.objectives.contrastive:InfoNCE",
    "vae": "firth.objectives.vae:VAE",
    "pseudo_labels": "firth.objectives.semi_supervised:PseudoLabels",
    "consistency": "firth.objectives.semi_supervised:Consistency",
    "multi_annotator": "firth.objectives.semi_supervised:MultiAnnotator",
    "weight_penalty": "firth.objectives.semi_supervised:WeightPenalty",
    "sft": "firth.objectives.sft:SFT",
    "seq2seq": "firth.objectives.sft:Seq2SeqSFT",
    "reward_model": "firth.objectives.reward_model:RewardModeling",
    "ranking": "firth.objectives.reward_model:Ranking",
    "dpo": "firth.objectives.preferences:DPO",
    "simpo": "firth.objectives.preferences:SimPO",
    "orpo": "firth.objectives.preferences:ORPO",
    "kto": "firth.objectives.preferences:KTO",
    "reinforce": "firth.objectives.policy_gradient:Reinforce",
    "ppo": "firth.objectives.policy_gradient:PPO",
    "grpo": "firth.objectives.policy_gradient:GRPO",
    "rloo": "firth.objectives.policy_gradient:RLOO",
}
"""Name -> "module:class"; imported on demand, so that listing them needs no torch."""


def exists(name: str) -> bool:
    """Return whether a name is in the registry or has the form `module:class` of a user's objective."""
    return name in OBJECTIVES or ":" in name


def find(name: str) -> type:
    """Return the objective class of a recipe name, or of `module:class` in a user's module.

    Raises:
        UserError: A user's module cannot be imported, or what it names is not a frozen dataclass derived from Objective.
    """
    if name in OBJECTIVES:
        module, cls = OBJECTIVES[name].split(":")
        found: type = getattr(importlib.import_module(module), cls)
        return found
    from firth.objectives.objective import Objective

    return user_code.find_class(name, Objective, "objective")


def name_of(kind: type) -> str:
    """Return the recipe name of an objective class; `module:class` for a user's class."""
    path = f"{kind.__module__}:{kind.__qualname__}"
    return next((name for name, known in OBJECTIVES.items() if known == path), path)
