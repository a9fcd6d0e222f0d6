"""Strict loading of files from transformers: missing, unknown and misfitting tensors are named, skipped ones are reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model import presets
from firth.model.config import ModelConfig, encoder_config
from firth.model.config_groups import RopeConfig
from firth.model.flops import num_parameters
from firth.model.heads import LMHead, linear, pooled
from firth.model.model import LM
from firth.pretrained.families import FAMILIES, families_of, family_of
from firth.pretrained.load_save import init_from, left_out, load_model, save_model
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer as make_tokenizer

BERT = presets.bert(61, 32, 1, 4, max_positions=40)
GPT2 = presets.gpt2(61, 32, 1, 4, max_positions=40)
LLAMA = presets.llama(61, 32, 1, 4, 48, max_positions=40, num_kv_heads=2)
QWEN3 = LLAMA.with_fields({"head_dim": 10, "attention.qk_norm": True, "attention.qk_norm_weight": True})
QWEN2 = replace(LLAMA, bias=True, bias_location="qkv")
T5 = presets.t5(61, 32, 1, 4, 8, 48)
CONFIGS = {
    "bert": BERT, "gpt2": GPT2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "t5": T5,
    "roberta": BERT.with_fields({"embedding.type_vocab_size": 1}), "distilbert": BERT.with_fields({"embedding.type_vocab_size": 0}),
    "openai-gpt": presets.gpt(61, 32, 1, 4, max_positions=40), "bart": presets.bart(61, 32, 1, 4, max_positions=40),
    "xlnet": presets.xlnet(61, 32, 1, 4), "mpnet": presets.mpnet(61, 32, 1, 4, max_positions=40),
    "albert": BERT.with_fields({"embedding.size": 12, "num_layer_groups": 1}), "electra": BERT.with_fields({"embedding.size": 12}),
    "modernbert": replace(encoder_config(61, 32, 2, num_heads=4, max_positions=40)),
}  # fmt: skip


def save_hf(config: ModelConfig, directory: Path, heads: dict[str, nn.Module] | None = None) -> dict[str, Tensor]:
    """Save a directory as transformers would and return its tensors."""
    torch.manual_seed(0)
    save_model(LM(config, {"lm": LMHead(config)} if heads is None else heads), None, directory)
    (directory / "firth.json").unlink()
    return load_file(directory / "model.safetensors")


def changed(directory: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in state.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_that_do_not_fit_are_named(name: str, tmp_path: Path) -> None:
    assert next(families_of(CONFIGS[name])).name == name
    state = save_hf(CONFIGS[name], tmp_path)
    for i, key in enumerate(state):
        rest = {other: tensor for other, tensor in state.items() if other != key}
        with pytest.raises(UserError, match=f"lacks tensor '{re.escape(key)}' of a "):
            load_model(changed(tmp_path, rest))
        if i % 3:
            continue
        longer = state[key].new_zeros((state[key].shape[0] + 1, *state[key].shape[1:]))
        with pytest.raises(UserError, match=f"'{re.escape(key)}' is .*, and its config expects"):
            load_model(changed(tmp_path, state | {key: longer}))
    with pytest.raises(UserError, match=r"holds 'adapter\.weight', which is no tensor of a "):
        load_model(changed(tmp_path, state | {"adapter.weight": torch.zeros(2)}))
    assert left_out(changed(tmp_path, state)) == []


def test_an_incomplete_head_is_an_error(tmp_path: Path) -> None:
    """Also without a named class: some tensors of a head imply that the file should have all."""
    state = save_hf(BERT, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    assert set(load_model(tmp_path).heads) == {"lm"}
    del state["cls.predictions.transform.dense.bias"]
    with pytest.raises(
        UserError, match=r"lacks tensor 'cls\.predictions\.transform\.dense\.bias' of a BertForMaskedLM"
    ):
        load_model(changed(tmp_path, state))


@pytest.mark.parametrize("name", ["mpnet", "roberta", "llama"])
def test_a_headless_model_may_name_another_class(name: str, tmp_path: Path) -> None:
    """As published sentence encoders do. With its prefix, the same file lacks the head."""
    state = save_hf(CONFIGS[name], tmp_path)
    prefix = FAMILIES[name].prefix
    stack = {key: tensor for key, tensor in state.items() if key.startswith(prefix)}
    changed(tmp_path, {key.removeprefix(prefix): tensor for key, tensor in stack.items()})
    assert set(load_model(tmp_path).heads) == set() and left_out(tmp_path) == []
    with pytest.raises(UserError, match="lacks tensor 'lm_head"):
        load_model(changed(tmp_path, stack))


def test_skipped_heads_are_reported(tmp_path: Path) -> None:
    state = save_hf(BERT, tmp_path, {"lm": LMHead(BERT), "next": pooled(32, 2)})
    assert left_out(tmp_path) == []
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    pooler = {name: tensor for name, tensor in state.items() if "seq_relationship" not in name}
    assert left_out(changed(tmp_path, pooler)) == ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert set(load_model(tmp_path).heads) == {"lm"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForRiddles"]}))
    choice = {name: tensor for name, tensor in pooler.items() if not name.startswith("cls")}
    choice |= {"classifier.weight": torch.zeros(1, 32), "classifier.bias": torch.zeros(1)}
    assert left_out(changed(tmp_path, choice)) == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"
    ]  # fmt: skip
    assert set(load_model(tmp_path).heads) == set()


def test_a_bert_that_names_one_head_keeps_both(tmp_path: Path) -> None:
    save_hf(BERT, tmp_path, {"lm": LMHead(BERT), "next": pooled(32, 2)})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert set(load_model(tmp_path).heads) == {"lm", "next"} and left_out(tmp_path) == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_separate_lm_head_is_not_tied(name: str, tmp_path: Path) -> None:
    """transformers 5 writes tie_word_embeddings=true for an untied T5."""
    state = save_hf(CONFIGS[name], tmp_path)
    key = {"bert": "cls.predictions.decoder.weight"}.get(name, "lm_head.weight")
    table = next(t for n, t in state.items() if n.endswith(("word_embeddings.weight", "wte.weight", "shared.weight")))
    assert load_model(changed(tmp_path, state | {key: table})).config.tie_embeddings and left_out(tmp_path) == []
    model = load_model(changed(tmp_path, state | {key: table + 1}))
    assert not model.config.tie_embeddings and torch.equal(model.heads["lm"].weight, table + 1)


UNSUPPORTED: dict[str, tuple[str, dict[str, object], str]] = {
    "a window": ("mistral", {"sliding_window": 16}, "a sliding window of 16 tokens and max_position_embeddings=40"),
    "a window of some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "a sliding window of 16"),
    "positions": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary positions of type 'yarn'"),
    "a decoder": ("bert", {"is_decoder": True}, "is_decoder=True"),
    "relative positions": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    "another pad": ("roberta", {"pad_token_id": 0}, "pad_token_id=0; firth supports pad_token_id=1 only"),
    "biases in the MLP": ("llama", {"mlp_bias": True}, "mlp_bias without attention_bias"),
    "blocks in a group": ("albert", {"inner_group_num": 2}, "inner_group_num above 1"),
    "no scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "a summary": ("xlnet", {"summary_type": "mean"}, "summary_type='mean'; firth supports 'last' only"),
    "a mean": ("modernbert", {"classifier_pooling": "mean"}, "classifier_pooling='mean'; firth supports 'cls' only"),
}  # fmt: skip


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_unsupported_settings_are_rejected(why: str, tmp_path: Path) -> None:
    kind, fields, message = UNSUPPORTED[why]
    model_config = CONFIGS.get(kind, LLAMA)
    family = FAMILIES[kind]
    head = next((h for h in family.heads if h.required_config), None)
    save_hf(model_config, tmp_path, {"classes": head.make(model_config, 3)} if head else None)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": kind} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(tmp_path)


def test_a_window_as_long_as_a_row_is_accepted(tmp_path: Path) -> None:
    save_hf(LLAMA, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).config == LLAMA


@pytest.mark.parametrize(
    ("millions", "width", "depth", "heads", "head_width"),
    [(44, 512, 8, 8, 64), (251, 1024, 16, 16, 64), (664, 1408, 24, 11, 128), (1609, 2176, 25, 17, 128),
     (4516, 3072, 36, 24, 128), (9293, 4096, 42, 32, 128), (11452, 4352, 47, 32, 128), (16183, 5120, 47, 40, 128)],
)  # fmt: skip
def test_chinchilla_parameter_counts_match_its_paper(
    millions: int, width: int, depth: int, heads: int, head_width: int
) -> None:
    """Rows of Hoffmann 2022, table A9: intermediate_size is four times hidden_size."""
    config = presets.transformer_xl(width, depth, heads, head_width)
    assert abs(num_parameters(config) - millions * 1e6) < 0.7e6
    tiny = presets.transformer_xl(32, 2, 4, 10, vocab_size=61)
    assert sum(p.numel() for p in LM(tiny, {"lm": LMHead(tiny)}).parameters()) == num_parameters(tiny)
    assert 69.5e9 < num_parameters(presets.PRESETS["chinchilla"]) < 70.5e9


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("roberta-base", 124_697_433 - 2 * 768),
        ("roberta-large", 355_412_057 - 2 * 1024),
        ("distilbert-base", 66_985_530),
    ],
)
def test_released_encoder_parameter_counts(name: str, count: int) -> None:
    """As transformers counts the classes with the LM head, less the two unused position rows."""
    assert num_parameters(presets.PRESETS[name]) == count
    assert family_of(presets.PRESETS[name]) is FAMILIES[name.partition("-")[0]]


def test_modernbert_rope_theta_of_both_versions(tmp_path: Path) -> None:
    save_hf(CONFIGS["modernbert"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 10000.0
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"global_rope_theta": 777.0}))
    assert load_model(tmp_path).config.position.rope.theta == 777.0


def test_two_names_for_one_tensor_are_rejected(tmp_path: Path) -> None:
    state = save_hf(LLAMA, tmp_path)
    twice = state | {"transformer.norm.weight": state["model.norm.weight"]}
    with pytest.raises(UserError, match="two names for one tensor"):
        load_model(changed(tmp_path, twice))


def test_spanbert_is_a_bert(tmp_path: Path) -> None:
    assert family_of(presets.PRESETS["spanbert"]) is FAMILIES["bert"]
    model = LM(BERT, {"lm": LMHead(BERT), "boundary": nn.Sequential(nn.Linear(96, 32), nn.GELU(), nn.Linear(32, 32))})
    assert save_model(model, None, tmp_path).endswith("BertForMaskedLM")
    again = load_model(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_pad_id_makes_a_roberta_a_bert(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = BERT.with_fields({"embedding.type_vocab_size": 1, "vocab_size": tokenizer.vocab.size})
    assert tokenizer.vocab.roles["pad"] != 1
    assert save_model(LM(config, {}), tokenizer, tmp_path).endswith("BertModel")
    assert save_model(LM(config, {}), None, tmp_path).endswith("RobertaModel")


HEADS: dict[str, tuple[ModelConfig, str, Callable[[], nn.Module], str]] = {
    "plain classes on BERT": (BERT, "classes", lambda: linear(32, 3), "BertModel"),
    "BERT's own": (BERT, "classes", lambda: pooled(32, 3), "BertForSequenceClassification"),
    "ELECTRA's on BERT": (BERT, "classes", lambda: pooled(32, 3, nn.GELU), "ElectraForSequenceClassification"),
    "one of BERT's own": (BERT, "score", lambda: pooled(32, 1), "BertForSequenceClassification"),
    "options": (BERT, "choice", lambda: pooled(32, 1), "BertForMultipleChoice"),
    "tags": (BERT, "tags", lambda: linear(32, 5), "BertForTokenClassification"),
    "a span": (BERT, "span", lambda: linear(32, 2), "BertForQuestionAnswering"),
    "a span of three": (BERT, "span", lambda: linear(32, 3), "BertModel"),
    "a reward": (GPT2, "reward", lambda: linear(32, 1, bias=False), "GPT2ForSequenceClassification"),
    "classes with a bias": (LLAMA, "classes", lambda: linear(32, 3), "LlamaModel"),
    "classes without": (LLAMA, "classes", lambda: linear(32, 3, bias=False), "LlamaForSequenceClassification"),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_only_equal_heads_use_transformers_names(what: str, tmp_path: Path) -> None:
    config, head, make, name = HEADS[what]
    model = LM(config, {head: make()})
    assert save_model(model, None, tmp_path) == f"transformers loads it as {name}"
    stored = load_file(tmp_path / "model.safetensors")
    assert any(key.startswith(f"heads.{head}") for key in stored) == ("For" not in name)
    for _ in range(2):
        again = load_model(tmp_path)
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
        if "For" not in name:
            break
        (tmp_path / "firth.json").unlink(missing_ok=True)  # then as a file from transformers
    assert init_from(LM(config, {"other": nn.Linear(2, 2)}), tmp_path) == ([head], ["other"])


@pytest.mark.parametrize(
    "config",
    [QWEN3, QWEN2, LLAMA.with_fields({"position.rope": RopeConfig(scaling="llama3", factor=4.0, original_max_positions=8)}),
     LLAMA.with_fields({"bias": True, "bias_location": "attention", "position.rope.scaling": "linear", "position.rope.factor": 2.0})],
)  # fmt: skip
def test_generation_with_a_cache_and_parameter_count(config: ModelConfig) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = replace(config, vocab_size=tokenizer.vocab.size)
    model = LM(config, {"lm": LMHead(config)}).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        start = [5, 9, 17, 30, 8]
        [output] = Engine(model, tokenizer, stops=()).generate([start], Sampling(max_new_tokens=12, temperature=0))
        row = torch.tensor([start + output.tokens.tolist()])
        steps = torch.arange(row.shape[1])[None]
        logits = model.heads["lm"](model({"tokens": row, "query_time": steps, "key_time": steps}))
    assert logits[0, 4:-1].argmax(-1).tolist() == output.tokens.tolist()
