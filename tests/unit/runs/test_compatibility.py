"""Incompatible objectives and models are rejected when the recipe is loaded; the error names both and suggests a fix."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from firth import objectives
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.model.flops import num_parameters
from firth.model.init import init_empty_weights
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.replaced_tokens import RTD
from firth.objectives.semi_supervised import Consistency
from firth.objectives.sentence_pairs import NSP
from firth.objectives.seq2seq import SpanCorruption
from firth.objectives.token_tasks import LayerMixture
from firth.runs import compatibility
from firth.runs.compatibility import check_available_memory, check_pattern
from firth.runs.recipe import load
from firth.types import UserError

SHAPES = {
    "a causal decoder": decoder_config(vocab_size=10, hidden_size=64, num_layers=1),
    "an encoder": replace(
        encoder_config(vocab_size=10, hidden_size=64, num_layers=1), dropout=0.1
    ),  # it makes the two examples differ
    "an encoder-decoder": encoder_decoder_config(vocab_size=10, hidden_size=64, num_layers=1),
    "a Linformer": encoder_config(vocab_size=10, hidden_size=64, num_layers=1).with_fields(
        {"dropout": 0.1, "attention.linformer.k": 8}
    ),
    "a variational autoencoder": encoder_decoder_config(vocab_size=10, hidden_size=64, num_layers=1).with_fields(
        {"encoder.latent_size": 32}
    ),
    "a left-to-right LSTM": load("lstm").model,
    "a bidirectional LSTM": replace(load("lstm").model, causal=False, dropout=0.1),
    "a decoder that can attend in both directions": replace(
        decoder_config(vocab_size=10, hidden_size=64, num_layers=1), causal=False, dropout=0.1
    ),
    "a bidirectional LSTM with separate directions": replace(load("elmo").model, dropout=0.1),
    "a table of word vectors": load("word2vec").model,
}


def test_model_descriptions() -> None:
    assert {noun: config.description for noun, config in SHAPES.items()} == {noun: noun for noun in SHAPES}


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize("noun", SHAPES)
def test_only_incompatible_objectives_are_rejected(name: str, noun: str) -> None:
    objective, config = objectives.find(name)(), SHAPES[noun]
    try:
        check_pattern(objective, config)
    except UserError as refusal:
        message = str(refusal)
    else:
        assert objective.attention in config.supported_patterns
        return
    assert f"objective {name} " in message
    if objective.attention in config.supported_patterns:
        assert "cannot be trained with this model: " in message and "set " in message
        return
    assert noun in message
    offered = message.rpartition("serves: ")[2].split(", ")
    assert offered and name not in offered
    for other in offered:
        check_pattern(objectives.find(other)(), config)


def test_every_objective_has_a_compatible_model() -> None:
    for name in objectives.OBJECTIVES:
        assert any(objectives.find(name)().attention in config.supported_patterns for config in SHAPES.values()), name


def test_error_names_the_incompatible_component_of_a_sum() -> None:
    with pytest.raises(UserError, match="objective nsp reads a text from both sides"):
        check_pattern(NSP() + MLM(), SHAPES["a causal decoder"])
    with pytest.raises(UserError, match=r"cannot add causal_lm\+nsp"):
        CausalLM() + NSP()


def test_inputs_of_a_sum() -> None:
    assert (NSP() + MLM()).inputs == {"first", "second", "other"}
    assert (LayerMixture() + Classification()).inputs == {"tokens", "label"}
    assert (MLM() + SBO()).inputs == {"tokens"}


def test_settings_determine_the_attention_pattern() -> None:
    check_pattern(SpanCorruption(layout="prefix"), SHAPES["an encoder"])
    with pytest.raises(UserError, match="source"):
        check_pattern(SpanCorruption(), SHAPES["an encoder"])
    check_pattern(Classification(position="last"), SHAPES["a causal decoder"])
    with pytest.raises(UserError, match="both sides"):
        check_pattern(Classification(position="first"), SHAPES["a causal decoder"])


def error_of(name: str, settings: list[str]) -> str:
    """Return the error message of a recipe; empty if it loads and the model can be built."""
    try:
        recipe = load(name, settings)
        with init_empty_weights():
            assert recipe.model is not None
            LM(recipe.model, recipe.objective.heads(recipe.model))
    except UserError as refusal:
        return str(refusal)
    return ""


def with_suggestion(name: str, settings: list[str], message: str) -> tuple[str, list[str]]:
    """Return a recipe with the first suggestion of its error applied."""
    remedy = message.partition(", or take")[0].rpartition(": ")[2]
    if found := re.search(r"use the recipe (\w+)", remedy):
        return found[1], [settings[0]]
    written = re.findall(r"(?:model|objective)[.\w]*=(?:\[.*\]|[\w.]+)", remedy)
    return name, settings + written + re.findall(r"examples(?:\.\w+)?=\w+", remedy)[:1]


RECIPES = (
    "gpt",
    "roberta",
    "bert",
    "t5",
    "lstm",
    "elmo",
    "word2vec",
    "linformer",
    "vae",
    "prefix_lm",
    "xlnet",
    "contrastive",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_suggestions_of_errors_work(name: str) -> None:
    """At most three times: another model, then other examples, then a setting of those."""
    for objective in objectives.OBJECTIVES:
        recipe, settings = name, [f"objective={objective}"]
        for _ in range(4):
            if not (message := error_of(recipe, settings)):
                break
            assert ": " in message and "\n" not in message
            recipe, settings = with_suggestion(recipe, settings, message)
        assert not message or objective == "ranking", (name, objective, message)


@pytest.mark.parametrize(
    ("name", "objective", "remedy"),
    [
        ("t5", "mlm", "set model.causal=false and model.encoder.num_layers=0"),
        ("gpt", "span_corruption", "set model.encoder.num_layers=4"),
        ("linformer", "causal_lm", "set model.attention.linformer.k=0 and model.causal=true"),
        ("elmo", "causal_lm", "set model.causal=true and model.rnn.separate_directions=false"),
        ("vae", "denoising", "set model.encoder.latent_size=0"),
        ("lstm", "bilm", "set model.causal=false and model.rnn.separate_directions=true"),
        ("word2vec", "mlm", "use the recipe roberta (an encoder)"),
        ("gpt", "word2vec", "use the recipe word2vec (a table of vectors)"),
    ],
)
def test_suggestions_fit_the_model(name: str, objective: str, remedy: str) -> None:
    message = error_of(name, [f"objective={objective}"])
    assert f": {remedy}, or take" in message
    others = message.rpartition("serves: ")[2].split(", ")
    assert others and all(not error_of(name, [f"objective={other}"]) for other in others)


def test_recurrent_generator_has_the_hidden_size_of_the_model() -> None:
    both = ["objective=rtd", "model.causal=false"]
    assert "cannot be trained with this model" in error_of("lstm", both)
    assert "set objective.generator_size=1" in error_of("lstm", both)
    assert not error_of("lstm", [*both, "objective.generator_size=1"])
    assert "set model.rnn.separate_directions=false and objective.generator_size=1" in error_of(
        "elmo", ["objective=rtd"]
    )


def test_error_for_pretrained_model_suggests_another() -> None:
    with pytest.raises(
        UserError, match=r"a causal decoder cannot: start from a model of the recipe roberta \(an encoder\), or take"
    ):
        check_pattern(MLM(), SHAPES["a causal decoder"], fixed=True)


def test_invalid_sums_are_rejected() -> None:
    with pytest.raises(
        UserError, match=r"cannot add causal_lm\+nsp: one reads a text from left to right, the other .* both sides"
    ):
        CausalLM() + NSP()
    with pytest.raises(UserError, match=r"cannot add causal_lm\+mlm: two of them have the loss term 'tokens'"):
        CausalLM() + MLM()
    with pytest.raises(UserError, match=r"cannot add rtd\+consistency: each has its own forward pass"):
        RTD() + Consistency()


def test_check_happens_when_the_recipe_is_loaded() -> None:
    with pytest.raises(UserError, match=r"objective mlm .* a causal decoder cannot: set model\.causal=false"):
        load("gpt", ["objective=mlm"])
    assert load("gpt", ["objective=mlm", "model.causal=false"]).model == replace(load("gpt").model, causal=False)


def test_shards_divide_the_whole_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes a weight over 17 ranks were 0 bytes a weight, so that every model fitted."""
    config = decoder_config(vocab_size=1000, hidden_size=64, num_layers=2, num_heads=2)
    for shards in (1, 8, 17, 32):
        need = num_parameters(config) * 16 / shards
        for free, fits in ((int(need) + 1, True), (int(need) - 1, False)):
            monkeypatch.setattr(compatibility, "memory", lambda free=free: (1 << 40, free))
            with nullcontext() if fits else pytest.raises(UserError, match="GB of main memory are free: lower"):
                check_available_memory(config, "adamw", True, torch.device("cpu"), shards, whole=False)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder_config(vocab_size=1000, hidden_size=64, num_layers=2, num_heads=2)
    monkeypatch.setattr(compatibility, "memory", lambda: (1 << 40, num_parameters(config) * 16 + 8))
    check_available_memory(config, "adamw", True, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_available_memory(config, "adamw", True, torch.device("cpu"), 2, whole=False)
    with pytest.raises(UserError, match="are free for each of 2 processes: lower"):
        check_available_memory(config, "adamw", True, torch.device("cpu"))


FREED = r"""
import re, torch
from firth.runs.compatibility import available_memory
from firth.training.device import keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1]) >> 10
assert keep_freed_memory()
blocks = [torch.ones(1_000_000) for _ in range(100)]
del blocks
before = resident()
available_memory(torch.device("cpu"))
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_an_earlier_run_has_freed_is_free() -> None:
    """A second run in a process was refused, since malloc kept the 400 MB of the first."""
    done = subprocess.run([sys.executable, "-c", FREED], text=True, capture_output=True, check=True)
    assert int(done.stdout) > 350
