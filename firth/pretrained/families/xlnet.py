"""XLNet (Yang 2019): post-norm, Transformer-XL's relative positions, relative token types, and a query vector.

transformers stores projections as (hidden_size, num_heads, head_dim): the same numbers as firth's, transposed. Its
`mask_emb` is firth's `query` (`ModelConfig.embedding.mask`), the input of the query stream; the embedding of the <mask>
token is a separate one in both. Two-stream attention is `perm_mask` and `target_mapping` in transformers, and query
positions appended to the row here; `mems` are the states of `memory_tokens`. XLNet's config has no maximum length:
`max_positions` is stored as `firth_context`.

Its classification head (`classes`) reads the last token, where its tokenizer puts <cls>, through tanh.

Settings that firth does not support are rejected: clamped distances, reversed halves of a batch, a sliding memory.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.model.config_groups import AttentionConfig, EmbeddingConfig, LMHeadConfig, NormConfig, PositionConfig
from firth.pretrained.families import bert
from firth.pretrained.families.bert import ACTIVATIONS
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, module_mappings
from firth.types import UserError


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads,
        "d_head": config.head_dim, "d_inner": config.intermediate_size, "ff_activation": theirs.get(config.activation, config.activation),
        "attn_type": "uni" if config.causal else "bi", "layer_norm_eps": config.norm.eps, "dropout": config.dropout,
        "mem_len": config.attention.memory_length or None, "clamp_len": -1, "same_length": False, "bi_data": False,
        "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings, "firth_context": config.max_positions,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    for field, supported in (("clamp_len", -1), ("same_length", False), ("bi_data", False)):
        if hf.get(field, supported) != supported and hf[field] is not None:
            raise UserError(
                f"config.json has {field}={hf[field]!r}; firth supports XLNet with {field}={supported!r} only"
            )
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["d_model"], num_layers=hf["n_layer"], num_heads=hf["n_head"],
        intermediate_size=hf["d_inner"], max_positions=hf.get("firth_context", 512), causal=hf.get("attn_type", "bi") == "uni",
        norm=NormConfig(placement="post", eps=hf.get("layer_norm_eps", 1e-12)), position=PositionConfig("xlnet"),
        embedding=EmbeddingConfig(type_vocab_size=2, mask=True), attention=AttentionConfig(memory_length=hf.get("mem_len") or 0),
        dropout=hf.get("dropout", 0.1), lm_head=LMHeadConfig(bias=True),
        activation=activation(hf.get("ff_activation", "gelu"), ACTIVATIONS, "ff_activation"),  # type: ignore[arg-type]
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = [
        WeightMapping("transformer.word_embedding.weight", ("tokens.weight",)),
        WeightMapping("transformer.mask_emb", ("query",), shapes=((config.hidden_size,), (1, 1, config.hidden_size))),
    ]
    heads, inner = (config.num_heads, config.head_dim), config.num_heads * config.head_dim
    split = ((config.hidden_size, inner), (config.hidden_size, *heads))
    names = {"place": "r_r_bias", "segment": "r_s_bias", "content": "r_w_bias"}
    block = {
        "attention_norm": "rel_attn.layer_norm", "mlp.up": "ff.layer_1", "mlp.down": "ff.layer_2",
        "mlp_norm": "ff.layer_norm",
    }  # fmt: skip
    for i in range(config.num_layers):
        a, b = f"stack.blocks.{i}.", f"transformer.layer.{i}."
        for name in "qkv":
            out.append(
                WeightMapping(f"{b}rel_attn.{name}", (f"{a}attention.{name}.weight",), transposed=True, shapes=split)
            )
        out.append(WeightMapping(f"{b}rel_attn.o", (f"{a}attention.o.weight",), shapes=split))
        distance = f"{a}attention.distance."
        out.append(WeightMapping(f"{b}rel_attn.r", (f"{distance}r.weight",), transposed=True, shapes=split))
        out += [
            WeightMapping(f"{b}rel_attn.{theirs}", (distance + ours,), shapes=((inner,), heads))
            for ours, theirs in names.items()
        ]
        out.append(WeightMapping(f"{b}rel_attn.seg_embed", (f"{distance}kinds",)))
        out += module_mappings(block, a, b, bias=True)
    if head:
        out.append(WeightMapping("lm_loss.bias", ("heads.lm.bias",)))
        out += [WeightMapping("lm_loss.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


LAST = (("summary_type", "last"), ("summary_use_proj", True), ("summary_activation", "tanh"))
SUMMARY = {"0": "sequence_summary.summary", "2": "logits_proj"}

FAMILY = Family(
    "xlnet", ("XLNetLMHeadModel", "XLNetModel"), to_hf_config, to_config, weight_mappings, "transformer.", tied_names=r"^lm_loss\.weight$",
    unused_heads=r"^lm_loss\.|^sequence_summary\.|^logits_proj\.|^classifier\.|^qa_outputs\.|_logits\.|^answer_class\.",
    heads=(
        HeadSpec("XLNetForSequenceClassification", "score", bert.pooled_head, SUMMARY, num_outputs=1, required_config=LAST),
        HeadSpec("XLNetForSequenceClassification", "classes", bert.pooled_head, SUMMARY, required_config=LAST),
        HeadSpec("XLNetForMultipleChoice", "choice", bert.pooled_head, SUMMARY, num_outputs=1, required_config=LAST),
        HeadSpec("XLNetForTokenClassification", "tags", bert.linear_head, {"": "classifier"}),
        HeadSpec("XLNetForQuestionAnsweringSimple", "span", bert.linear_head, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip
