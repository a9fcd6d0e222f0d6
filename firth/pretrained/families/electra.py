"""ELECTRA (Clark 2020): BERT's blocks, optionally with a smaller embedding size; a generator or a discriminator head.

The generator is an ElectraForMaskedLM, the discriminator an ElectraForPreTraining. The classification head has GELU where
BERT's has tanh.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import pooled
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, module_mappings

ACTIVATIONS = {"gelu": "gelu"}
"""transformers always applies GELU in the generator's head, so no other activation gives the same model."""


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {**bert.to_hf_config(config), "embedding_size": config.embedding_dim}


def to_config(hf: dict[str, Any]) -> ModelConfig:
    activation(hf.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act")
    embedding_size = hf["embedding_size"]
    found = bert.to_config({"type_vocab_size": 2, "max_position_embeddings": 512} | hf)
    if embedding_size == found.hidden_size:
        return found
    return found.with_fields({"embedding.size": embedding_size})


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = bert.embedding_mappings("electra.") + bert.block_mappings(config, "electra.")
    if config.embedding.size:
        out += module_mappings({"stack.project": "embeddings_project"}, "", "electra.", bias=True)
    if head:
        out += module_mappings(
            {"dense": "dense", "norm": "LayerNorm"}, "heads.lm.", "generator_predictions.", bias=True
        )
        out.append(WeightMapping("generator_lm_head.bias", ("heads.lm.bias",)))
        out += [WeightMapping("generator_lm_head.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


def gelu_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return BERT's pooled head with GELU in place of tanh."""
    return pooled(config.hidden_size, num_outputs, nn.GELU)


SUMMARY = {"0": "sequence_summary.summary", "2": "classifier"}
REPLACED = {"0": "discriminator_predictions.dense", "2": "discriminator_predictions.dense_prediction"}

FAMILY = Family(
    "electra", ("ElectraForMaskedLM", "ElectraModel"), to_hf_config, to_config, weight_mappings, "electra.",
    ignored_names=r"position_ids$", tied_names=r"^generator_lm_head\.weight$",
    unused_heads=r"^generator_|^discriminator_|^sequence_summary\.|^classifier\.|^qa_outputs\.",
    heads=(
        HeadSpec("ElectraForPreTraining", "replaced", gelu_head, REPLACED, num_outputs=1),
        *bert.task_heads("Electra", {"0": "classifier.dense", "2": "classifier.out_proj"}, SUMMARY, gelu_head),
    ),
)  # fmt: skip
