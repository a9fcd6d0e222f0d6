"""ELECTRA (Clark 2020): BERT's blocks behind tables that may be narrower, a generator's head or a discriminator's.

The generator is an ElectraForMaskedLM, the discriminator an ElectraForPreTraining. A text is classified through GELU,
where BERT has tanh.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import pooled
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both

ACTIVATIONS = {"gelu": "gelu"}
"""transformers applies GELU in the generator's head whatever the config says, so no other is the same model."""


def config(model_config: ModelConfig) -> dict[str, Any]:
    return {**bert.config(model_config), "embedding_size": model_config.embedding_dim}


def shape(config: dict[str, Any]) -> ModelConfig:
    activation(config.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act")
    narrow = config["embedding_size"]
    found = bert.shape({"type_vocab_size": 2, "max_position_embeddings": 512} | config)
    if narrow == found.hidden_size:
        return found
    return replace(found, embedding_size=narrow)


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = bert.tables("electra.") + bert.layers(config, "electra.")
    if config.embedding_size:
        out += both({"stack.project": "embeddings_project"}, "", "electra.", bias=True)
    if head:
        out += both({"dense": "dense", "norm": "LayerNorm"}, "heads.lm.", "generator_predictions.", bias=True)
        out.append(WeightMapping("generator_lm_head.bias", ("heads.lm.bias",)))
        out += [WeightMapping("generator_lm_head.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


def through_gelu(config: ModelConfig, answers: int) -> nn.Module:
    return pooled(config.hidden_size, answers, nn.GELU)


SUMMARY = {"0": "sequence_summary.summary", "2": "classifier"}
REPLACED = {"0": "discriminator_predictions.dense", "2": "discriminator_predictions.dense_prediction"}

FAMILY = Family(
    "electra", ("ElectraForMaskedLM", "ElectraModel"), config, shape, entries, "electra.",
    spare=r"position_ids$", tied=r"^generator_lm_head\.weight$",
    unused=r"^generator_|^discriminator_|^sequence_summary\.|^classifier\.|^qa_outputs\.",
    heads=(
        HeadSpec("ElectraForPreTraining", "replaced", through_gelu, REPLACED, num_outputs=1),
        *bert.tasks("Electra", {"0": "classifier.dense", "2": "classifier.out_proj"}, SUMMARY, through_gelu),
    ),
)  # fmt: skip
