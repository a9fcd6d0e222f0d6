"""Adapters of every family, loaded with peft: the same outputs, or a statement that peft does not load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firth.model.model import LM
from firth.peft import adapter_files, lora
from firth.peft.lora import LoraConfig
from firth.pretrained.load_save import load_model
from firth.runs.peft_options import prefix_of, prompt_of

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TABLE = SIZES | {"max_position_embeddings": 40}
OFFSET = SIZES | {"max_position_embeddings": 42, "pad_token_id": 1}
GROUPED = TABLE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
SEQ2SEQ = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
           "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("Bert", TABLE),
    "BertModel": ("Bert", TABLE),
    "BertForSequenceClassification": ("Bert", TABLE),
    "BertForQuestionAnswering": ("Bert", TABLE),
    "RobertaForMaskedLM": ("Roberta", OFFSET | {"type_vocab_size": 1}),
    "RobertaForTokenClassification": ("Roberta", OFFSET | {"type_vocab_size": 1}),
    "ElectraForMaskedLM": ("Electra", TABLE | {"embedding_size": 16}),
    "AlbertForMaskedLM": ("Albert", TABLE | {"embedding_size": 16}),
    "MPNetForMaskedLM": ("MPNet", OFFSET),
    "DistilBertForMaskedLM": (
        "DistilBert",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    ),
    "ModernBertForMaskedLM": (
        "ModernBert", TABLE | {"layer_types": ["full_attention"] * 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "GPT2LMHeadModel": ("GPT2", GPT),
    "GPT2ForSequenceClassification": ("GPT2", GPT | {"pad_token_id": 0}),
    "OpenAIGPTLMHeadModel": ("OpenAIGPT", GPT),
    "LlamaForCausalLM": ("Llama", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3", GROUPED | {"head_dim": 10}),
    "MistralForCausalLM": ("Mistral", GROUPED | {"sliding_window": None}),
    "MistralModel": ("Mistral", GROUPED | {"sliding_window": None}),
    "NanoChatForCausalLM": ("NanoChat", TABLE | {"num_key_value_heads": 4}),
    "T5ForConditionalGeneration": (
        "T5",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "T5Model": ("T5", {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "BartForConditionalGeneration": ("Bart", SEQ2SEQ),
    "MarianMTModel": ("Marian", SEQ2SEQ),
}  # fmt: skip
NO_PREFIX = ("Albert", "DistilBert", "ModernBert", "MPNet", "OpenAIGPT")
"""Families whose classes take no past keys and values."""


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of random weights, saved by transformers."""
    family, fields = BASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, request.param)(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    return directory


def hf_model(base: Path) -> Any:
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(base, attn_implementation="eager").eval()


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": IDS.flip(1), "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS}
    outputs = model(**inputs)
    name = next(name for name in ("logits", "start_logits", "last_hidden_state") if name in outputs)
    out: Tensor = outputs[name]
    return out[:, -9:] if out.ndim == 3 or name == "start_logits" else out  # without the outputs at the virtual tokens


@torch.no_grad()
def ours(model: LM) -> Tensor:
    when = torch.arange(9)[None].expand(2, -1) * model.config.causal
    source = {"source_tokens": IDS.flip(1)} if model.config.encoder.num_layers else {}
    hidden = model.eval()({"tokens": IDS, "query_time": when, "key_time": when} | source)
    if "span" in model.heads:
        return model.heads["span"](hidden)[..., 0]
    if "classes" in model.heads:
        return model.heads["classes"](hidden[:, -1 if model.config.causal else 0])
    head = next((head for head in ("tags", "lm") if head in model.heads), "")
    return model.heads[head](hidden) if head else hidden


def adapted(base: Path, kind: str) -> LM:
    """The base with an adapter, and with its head changed as training would."""
    model = load_model(base)
    torch.manual_seed(1)
    if kind == "lora":
        lora.add(model, ["attention.q", "attention.v", "mlp.*"], LoraConfig(rank=2))
        for low in lora.lora_layers(model).values():
            low.B.data.normal_(std=0.2)
    else:
        module = (prefix_of if kind == "prefix" else prompt_of)(model, [5, 6, 7])
        module.table.weight.data.add_(0.3 * torch.randn_like(module.table.weight))
        model.heads[kind] = module
    for head in heads(model):
        for p in model.heads[head].parameters():
            p.data.add_(0.2 * torch.randn_like(p))
    return model


def heads(model: LM) -> list[str]:
    return [head for head in ("classes", "tags", "span") if head in model.heads]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_an_adapter_works_in_peft_or_is_rejected(base: Path, kind: str, tmp_path: Path) -> None:
    model, unadapted = adapted(base, kind), ours(load_model(base))
    wanted = ours(model)
    assert (wanted - unadapted).abs().max() > 0.05
    summary = adapter_files.write(model, tmp_path / "ours", base, heads(model))
    again = load_model(base)
    adapter_files.read(again, tmp_path / "ours")
    torch.testing.assert_close(ours(again), wanted, atol=1e-5, rtol=0)
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    supported = not (
        (kind == "prefix" and BASES[name][0] in NO_PREFIX)
        or (
            kind != "lora" and name == "BertForSequenceClassification"
        )  # its pooler was trained, and peft does not save it
    )
    assert ("peft loads it" in summary) == supported, summary
    if supported:
        peft_model = peft.PeftModel.from_pretrained(hf_model(base), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(peft_model), wanted, atol=2e-5, rtol=0)
    else:
        assert summary.startswith("only firth loads it, because ")
        with pytest.raises((KeyError, ValueError)):  # an error, and not the base's own output
            peft.PeftModel.from_pretrained(hf_model(base), tmp_path / "ours")
