"""XLNet (Yang 2019): post-norm, Transformer-XL's relative positions and segments, a vector of its own for queries.

Theirs keeps the heads of a matrix apart, (width, heads, head_width): the same numbers as ours, turned. Their `mask_emb` is
our `query` (`Shape.query`), which stands wherever nobody can look, so nothing is lost: the embedding of <mask>, which
theirs also has, remains a token's. Two streams are `perm_mask` and `target_mapping` there and a row with queries behind
it here; `mems` are the states of `memory_tokens`. `context` bounds nothing in XLNet, whose config does not know it.

Its class of a text is read at the last token, where its tokenizer writes <cls>, through tanh (part `classes`).

What theirs can and ours cannot say is refused: clamped distances, reversed halves of a batch, a memory that slides.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.bert import ACTIVATIONS
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both
from firth.types import UserError


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": model_config.vocab_size, "d_model": model_config.hidden_size, "n_layer": model_config.num_layers, "n_head": model_config.num_heads,
        "d_head": model_config.head_dim, "d_inner": model_config.intermediate_size, "ff_activation": theirs.get(model_config.activation, model_config.activation),
        "attn_type": "uni" if model_config.causal else "bi", "layer_norm_eps": model_config.norm_eps, "dropout": model_config.dropout,
        "mem_len": model_config.memory_length or None, "clamp_len": -1, "same_length": False, "bi_data": False,
        "initializer_range": 0.02, "tie_word_embeddings": model_config.tie_embeddings, "firth_context": model_config.max_positions,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    for field, plain in (("clamp_len", -1), ("same_length", False), ("bi_data", False)):
        if config.get(field, plain) != plain and config[field] is not None:
            raise UserError(
                f"config.json asks for {field}={config[field]!r}; firth has XLNet with {field}={plain!r} only"
            )
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["d_model"], num_layers=config["n_layer"], num_heads=config["n_head"],
        intermediate_size=config["d_inner"], max_positions=config.get("firth_context", 512), causal=config.get("attn_type", "bi") == "uni",
        norm_placement="post", norm_eps=config.get("layer_norm_eps", 1e-12), position="xlnet", mask_embedding=True, type_vocab_size=2,
        memory_length=config.get("mem_len") or 0, dropout=config.get("dropout", 0.1), lm_head_bias=True,
        activation=activation(config.get("ff_activation", "gelu"), ACTIVATIONS, "ff_activation"),  # type: ignore[arg-type]
        tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = [
        WeightMapping("transformer.word_embedding.weight", ("tokens.weight",)),
        WeightMapping("transformer.mask_emb", ("query",), merged=((config.hidden_size,), (1, 1, config.hidden_size))),
    ]
    heads, inner = (config.num_heads, config.head_dim), config.num_heads * config.head_dim
    apart = ((config.hidden_size, inner), (config.hidden_size, *heads))
    names = {"place": "r_r_bias", "segment": "r_s_bias", "content": "r_w_bias"}
    rest = {
        "attention_norm": "rel_attn.layer_norm", "mlp.up": "ff.layer_1", "mlp.down": "ff.layer_2",
        "mlp_norm": "ff.layer_norm",
    }  # fmt: skip
    for i in range(config.num_layers):
        a, b = f"stack.blocks.{i}.", f"transformer.layer.{i}."
        for name in "qkv":
            out.append(
                WeightMapping(f"{b}rel_attn.{name}", (f"{a}attention.{name}.weight",), transposed=True, merged=apart)
            )
        out.append(WeightMapping(f"{b}rel_attn.o", (f"{a}attention.o.weight",), merged=apart))
        far = f"{a}attention.distance."
        out.append(WeightMapping(f"{b}rel_attn.r", (f"{far}r.weight",), transposed=True, merged=apart))
        out += [
            WeightMapping(f"{b}rel_attn.{theirs}", (far + ours,), merged=((inner,), heads))
            for ours, theirs in names.items()
        ]
        out.append(WeightMapping(f"{b}rel_attn.seg_embed", (f"{far}kinds",)))
        out += both(rest, a, b, bias=True)
    if head:
        out.append(WeightMapping("lm_loss.bias", ("heads.lm.bias",)))
        out += [WeightMapping("lm_loss.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


LAST = (("summary_type", "last"), ("summary_use_proj", True), ("summary_activation", "tanh"))
SUMMARY = {"0": "sequence_summary.summary", "2": "logits_proj"}

FAMILY = Family(
    "xlnet", ("XLNetLMHeadModel", "XLNetModel"), config, shape, entries, "transformer.", tied=r"^lm_loss\.weight$",
    unused=r"^lm_loss\.|^sequence_summary\.|^logits_proj\.|^classifier\.|^qa_outputs\.|_logits\.|^answer_class\.",
    heads=(
        HeadSpec("XLNetForSequenceClassification", "score", bert.pooler, SUMMARY, num_outputs=1, hf_labels=LAST),
        HeadSpec("XLNetForSequenceClassification", "classes", bert.pooler, SUMMARY, hf_labels=LAST),
        HeadSpec("XLNetForMultipleChoice", "choice", bert.pooler, SUMMARY, num_outputs=1, hf_labels=LAST),
        HeadSpec("XLNetForTokenClassification", "tags", bert.plain, {"": "classifier"}),
        HeadSpec("XLNetForQuestionAnsweringSimple", "span", bert.plain, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip
