"""Parity with the task classes of transformers, by family, and with families that share another's layout.

One test per class: a model of random weights saved by transformers is loaded, gives the same logits, and is saved again
with bit-identical tensors; transformers loads that directory, saves it, and firth loads it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firth.pretrained.families import FAMILIES as OURS
from firth.pretrained.load_save import class_names, left_out, load_model, save_model
from firth.types import NEVER

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

Fields = dict[str, Any]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TABLE = SIZES | {"max_position_embeddings": 40}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
SIDES = {f"{side}_{name}": size for side in ("encoder", "decoder")
         for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
GROUPED = TABLE | {"num_key_value_heads": 2}
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, Fields, str, str]] = {
    "bert": ("Bert", TABLE, "first", "snotq"),
    "roberta": ("Roberta", SIZES | {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1}, "first", "msotq"),
    "xlm-roberta": ("XLMRoberta", SIZES | {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1}, "first", "m"),
    "roberta-untied": (
        "Roberta",
        SIZES | {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1, "tie_word_embeddings": False}, "first", "m",
    ),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        "first", "msotq",
    ),
    "albert": ("Albert", TABLE | {"embedding_size": 12, "num_hidden_groups": 2}, "first", "sotq"),
    "electra": ("Electra", TABLE | {"embedding_size": 12}, "first", "sotq"),
    "mpnet": ("MPNet", SIZES | {"max_position_embeddings": 42, "pad_token_id": 1}, "first", "sotq"),
    "modernbert": ("ModernBert", TABLE | IDS | {"layer_types": ["full_attention"] * 2, "norm_bias": True}, "first", "sotq"),
    "modernbert-silu": (
        "ModernBert",
        TABLE | IDS | {"layer_types": ["full_attention"] * 2, "hidden_activation": "silu", "classifier_activation": "silu",
                       "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        "first", "s",
    ),
    "xlnet": ("XLNet", {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "end", "sotS"),
    "gpt2": ("GPT2", GPT | IDS, "last", "srtq"),
    "openai-gpt": ("OpenAIGPT", GPT | IDS, "last", "lsr"),
    "llama": ("Llama", GROUPED | IDS, "last", "srtq"),
    "llama-biased": ("Llama", GROUPED | IDS | {"attention_bias": True}, "last", "c"),
    "llama-stretched": ("Llama", GROUPED | IDS | {"rope_parameters": STRETCHED}, "last", "c"),
    "llama-linear": (
        "Llama", GROUPED | IDS | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}}, "last", "c"
    ),
    "smollm2": ("Llama", GROUPED | IDS | {"tie_word_embeddings": True, "rope_theta": 100000}, "last", "cr"),
    "mistral": ("Mistral", GROUPED | IDS | {"sliding_window": None, "head_dim": 10}, "last", "csrtq"),
    "mistral-window": ("Mistral", GROUPED | IDS | {"sliding_window": 40}, "last", "c"),
    "qwen2": ("Qwen2", GROUPED | IDS, "last", "csrtq"),
    "qwen2-tied": ("Qwen2", GROUPED | IDS | {"tie_word_embeddings": True}, "last", "c"),
    "qwen3": ("Qwen3", GROUPED | IDS | {"head_dim": 10}, "last", "csrtq"),
    "qwen3-biased": ("Qwen3", GROUPED | IDS | {"head_dim": 8, "attention_bias": True}, "last", "c"),
    "bart": ("Bart", SIDES | IDS | {"vocab_size": 61, "d_model": 32, "max_position_embeddings": 40, "decoder_start_token_id": 2},
             "again", "sq"),
    "t5": ("T5", T5 | IDS | {"decoder_start_token_id": 0}, "again", "gsq"),
    "flan-t5": ("T5", T5 | IDS | GATED, "again", "gsq"),
    "mt5": ("MT5", T5 | IDS | GATED, "again", "gsq"),
}  # fmt: skip
"""Case -> prefix of the class names, config, position that a classifier reads, and keys of the tested `CLASSES`."""
CLASSES: dict[str, tuple[str, str, int]] = {
    "m": ("ForMaskedLM", "lm", 0), "c": ("ForCausalLM", "lm", 0), "l": ("LMHeadModel", "lm", 0),
    "g": ("ForConditionalGeneration", "lm", 0), "s": ("ForSequenceClassification", "classes", 3),
    "r": ("ForSequenceClassification", "reward", 1), "t": ("ForTokenClassification", "tags", 5),
    "n": ("ForSequenceClassification", "score", 1), "o": ("ForMultipleChoice", "choice", 0),
    "q": ("ForQuestionAnswering", "span", 2), "S": ("ForQuestionAnsweringSimple", "span", 2),
}  # fmt: skip
CASES = [(case, kind) for case, (*_, kinds) in FAMILIES.items() for kind in kinds]
UNUSED_ROW_TABLES = ("embed_positions.weight", "position_embeddings.weight")
"""Tables with unused leading rows, which are saved as zeros (RoBERTa, MPNet, BART)."""
SAVED_AS = {"xlm-roberta": "roberta", "mistral": "llama", "mt5": "t5"}
"""Families that are saved as another one with the same layout and config."""


def theirs(case: str, kind: str) -> torch.nn.Module:
    name, fields, _, _ = FAMILIES[case]
    suffix, _, labels = CLASSES[kind]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**fields, **({"num_labels": labels} if labels else {}))
    model = getattr(transformers, name + suffix)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def rows(case: str) -> tuple[Fields, Fields, torch.Tensor]:
    """The same right-padded rows for firth and for transformers, and their lengths."""
    _, fields, place, _ = FAMILIES[case]
    torch.manual_seed(1)
    pad, eos = fields.get("pad_token_id", 0), 2
    lengths = torch.tensor([17, 17, 17] if place == "end" else [17, 12, 6])
    steps = torch.arange(17).expand(3, 17)
    real = steps < lengths[:, None]
    tokens = torch.where(real, torch.randint(3, 61, (3, 17)), pad)
    if place == "again":
        tokens[torch.arange(3), lengths - 1] = eos
    mask = {"input_ids": tokens, "attention_mask": real.long()}
    if place == "again":
        start = fields["decoder_start_token_id"]
        again = torch.cat((torch.full((3, 1), start), tokens[:, :-1]), 1)
        ours = {"source_tokens": tokens, "source_key_time": torch.where(real, 0, NEVER), "tokens": again}
        return ours | {"query_time": steps, "key_time": steps}, mask, lengths
    if place == "last":
        return {"tokens": tokens, "query_time": steps, "key_time": torch.where(real, steps, NEVER)}, mask, lengths
    return {"tokens": tokens, "key_time": torch.where(real, 0, NEVER)}, mask, lengths


@torch.no_grad()
def max_difference(model: torch.nn.Module, other: torch.nn.Module, case: str, kind: str) -> float:
    """The largest difference from transformers' logits at real tokens."""
    (ours, mask, lengths), (_, head, _) = rows(case), CLASSES[kind]
    hidden = model(ours)
    real = torch.arange(17) < lengths[:, None]
    if kind == "g":
        mask |= {"decoder_input_ids": ours["tokens"]}
    if head == "choice":
        outputs = other(**{name: field[None] for name, field in mask.items()})
        return float(
            (model.heads[head](hidden[:, -1 if FAMILIES[case][2] == "end" else 0])[:, 0] - outputs.logits[0])
            .abs()
            .max()
        )
    outputs = other(**mask)
    if head in ("classes", "reward", "score"):
        at = torch.zeros(3, dtype=torch.int64) if FAMILIES[case][2] == "first" else lengths - 1
        mine, want = model.heads[head](hidden[torch.arange(3), at]), outputs.logits
    elif head == "span":
        mine, want = model.heads[head](hidden)[real], torch.stack((outputs.start_logits, outputs.end_logits), -1)[real]
    else:
        mine, want = model.heads[head](hidden)[real], outputs.logits[real]
    assert mine.shape == want.shape and want.std() > 0.03
    return float((mine - want).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), CASES, ids=[f"{case}-{CLASSES[kind][1]}" for case, kind in CASES])
def test_task_classes_round_trip(case: str, kind: str, tmp_path: Path) -> None:
    model, (suffix, head, _) = theirs(case, kind), CLASSES[kind]
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert set(ours.heads) == {head} and left_out(tmp_path / "theirs") == []
    assert max_difference(ours, model, case, kind) < 1e-4

    family = SAVED_AS.get(case.split("-window")[0], "")
    name = {"roberta": "Roberta", "llama": "Llama", "t5": "T5"}.get(family, FAMILIES[case][0]) + suffix
    assert save_model(ours, None, tmp_path / "ours") == f"transformers loads it as {name}"
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    if (case, kind) == ("mistral", "q"):  # whose prefix differs from that of Llama's class
        after = {key.replace("transformer.", "model."): tensor for key, tensor in after.items()}
    assert before.keys() == after.keys() - ({"lm_head.weight"} if kind == "g" else set())
    for key, tensor in before.items():
        skip = (
            2 if key.endswith(UNUSED_ROW_TABLES) and case.startswith(("roberta", "xlm-roberta", "mpnet", "bart")) else 0
        )
        if (case, key) != ("roberta-untied", "lm_head.bias"):  # an untied decoder has a bias of its own
            assert torch.equal(tensor[skip:], after[key][skip:]), key
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["pad_token_id"] = FAMILIES[case][1].get("pad_token_id", 0)
    config |= {
        name: FAMILIES[case][1][name]
        for name in ("eos_token_id", "decoder_start_token_id")
        if name in FAMILIES[case][1]
    }
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    kind_of = getattr(transformers, name)
    again, info = kind_of.from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert max_difference(ours, again.eval(), case, kind) < 1e-4
    if kind != FAMILIES[case][3][0]:  # once for each case
        return
    again.save_pretrained(tmp_path / "again")
    back = load_model(tmp_path / "again").state_dict()
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, back[key]) for key, tensor in ours.state_dict().items())


def test_all_classes_of_the_families_are_tested() -> None:
    tested = {case: {FAMILIES[case][0] + CLASSES[kind][0] for kind in FAMILIES[case][3]} for case in FAMILIES}
    elsewhere = {"BertForPreTraining", "BertForNextSentencePrediction", "AlbertForPreTraining", "ElectraForPreTraining"}
    for name, family in OURS.items():
        classes = {headed.name for headed in family.heads}
        if name != "xlm-roberta":  # which differs from RoBERTa by names alone
            assert classes - elsewhere <= tested.get(name, set()), name


@pytest.mark.parametrize(("case", "kind"), [("bert", "s"), ("gpt2", "t")])
def test_label_names_are_saved(case: str, kind: str, tmp_path: Path) -> None:
    model = theirs(case, kind)
    names = ("B-person", "I-person", "O", "place", "time")[: CLASSES[kind][2]]
    model.save_pretrained(tmp_path / "plain")
    assert class_names(tmp_path / "plain") == ()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(tmp_path / "theirs")
    assert class_names(tmp_path / "theirs") == names
    save_model(load_model(tmp_path / "theirs"), None, tmp_path / "ours", {"classes": names})
    assert class_names(tmp_path / "ours") == names
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.id2label == dict(enumerate(names)) and config.num_labels == len(names)
    assert config.label2id == {name: i for i, name in enumerate(names)}


def test_similar_families_are_distinguished(tmp_path: Path) -> None:
    """Without a gain or a bias that is ignored, each would load as a plain Llama."""
    change: dict[str, Callable[[Any], Any]] = {
        "qwen2": lambda m: m.model.layers[1].self_attn.k_proj.bias,
        "qwen3": lambda m: m.model.layers[1].self_attn.q_norm.weight,
        "llama-stretched": lambda m: m.model.rotary_emb.inv_freq,
    }
    for case, which in change.items():
        model = theirs(case, "c")
        model.save_pretrained(tmp_path / case)
        ours = load_model(tmp_path / case)
        with torch.no_grad():
            which(model).mul_(1.5)
        assert max_difference(ours, model, case, "c") > 1e-3, case
