"""SpanBERT, ALBERT and ELECTRA: the published models have the published sizes, and the tiny ones train, save and reload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firth.data.collate import Batches
from firth.model.config import ModelConfig
from firth.model.flops import num_parameters
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import PRESETS
from firth.pretrained.load_save import load_model
from firth.runs import examples
from firth.runs.prepare import RunData
from firth.runs.recipe import load, load_resolved, published
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, UserError
from tests.support.tiny_corpus import TEXTS


def count(config: ModelConfig, parts: dict[str, torch.nn.Module] | None = None) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LM(config, {} if parts is None else parts).parameters())


MILLIONS = {
    "albert-base": 12,
    "albert-large": 18,
    "albert-xlarge": 60,
    "albert-xxlarge": 223,  # the paper prints 235 M, its released model holds 222.6 M
    "electra-small": 14,
    "electra-base": 110,
    "spanbert": 340,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_published_sizes(name: str) -> None:
    """The papers round, and count BERT's pooler (BERT-large's "340 M" are 335 M with 30,522 tokens)."""
    config, millions = PRESETS[name], MILLIONS[name]
    body = count(config) + (config.hidden_size + 1) * config.hidden_size
    assert abs(body / (millions * 1e6) - 1) < 0.04
    with torch.device("meta"):
        assert count(config, {"lm": LMHead(config)}) == num_parameters(config)


@pytest.mark.oracle
def test_parameter_counts_match_the_released_models() -> None:
    t = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    albert = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    with torch.device("meta"):
        theirs = {
            "albert": t.AlbertModel(t.AlbertConfig(**albert), add_pooling_layer=False),
            "electra": t.ElectraModel(t.ElectraConfig(hidden_size=256, embedding_size=128, intermediate_size=1024)),
            "spanbert": t.BertModel(
                t.BertConfig(vocab_size=28996, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
                add_pooling_layer=False,
            ),
        }  # fmt: skip
    for name, model in theirs.items():
        config = published(f"{name}:published").model
        assert config is not None
        assert count(config) == sum(p.numel() for p in model.parameters()), name


def test_electra_generator_shares_the_embeddings() -> None:
    recipe = published("electra:published")
    assert recipe.model is not None
    with torch.device("meta"):
        parts = recipe.objective.heads(recipe.model)
    small = parts["generator"].config
    assert (small.hidden_size, small.num_heads, small.intermediate_size, small.num_layers, small.embedding.size) == (
        64,
        1,
        256,
        12,
        128,
    )
    model = LM(
        replace(recipe.model, vocab_size=100, num_layers=1),
        recipe.objective.heads(replace(recipe.model, vocab_size=100, num_layers=1)),
    )
    assert sum(t.numel() for n, t in model.named_parameters() if t.shape[0] == 100 and t.ndim == 2) == 100 * 128


def test_unknown_sizes_are_rejected() -> None:
    with pytest.raises(UserError, match="no size 'huge'; there is tiny, published, base"):
        published("electra:huge")


SMALL = [
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.intermediate_size=48",
    "max_steps=3",
    "batch.size=4",
    "batch.pack_to_length=64",
    "examples.max_length=48",
    "tokenizer.vocab_size=400",
    "evaluation.every=2",
    "evaluation.max_examples=4",
    "checkpoint.every=2",
]


@pytest.mark.parametrize(
    ("name", "more"),
    [("spanbert", []), ("albert", ["model.embedding.size=16"]), ("electra", ["model.embedding.size=16"]),
     ("electra", ["objective.kind=adversarial_rtd"])],
    ids=["spanbert", "albert", "electra", "adversarial"],
)  # fmt: skip
def test_recipe_trains_saves_and_reloads(name: str, more: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i, words in enumerate(TEXTS[:12]):
        (text / f"{i}.txt").write_text(words[:900], encoding="utf-8")
    recipe = load(name, [*SMALL, *more, f"data.path={text}", "data.validation_fraction=0.3"])
    done = run(recipe, tmp_path / "run", log=lambda _: None)
    assert done.steps == 3 and any(metric.startswith("valid/") for metric in done.metrics)
    model = load_model(done.model)
    assert model.config == replace(recipe.model, vocab_size=model.config.vocab_size)
    with torch.device("meta"):
        assert set(model.heads) == set(recipe.objective.heads(recipe.model))
    assert run(recipe, tmp_path / "run", log=lambda _: None).metrics == done.metrics


@pytest.mark.oracle
def test_auc_of_the_detector_agrees_with_scikit_learn(tmp_path: Path) -> None:
    """The logged area is that of all held-out tokens together: neither of one batch nor a mean over texts."""
    oracle = pytest.importorskip("sklearn.metrics", reason="the oracle; installed with the test extra")
    text = tmp_path / "text"
    text.mkdir()
    for i, words in enumerate(TEXTS[:12]):
        (text / f"{i}.txt").write_text(words[:900], encoding="utf-8")
    settings = [
        *SMALL,
        "model.embedding.size=16",
        f"data.path={text}",
        "data.validation_fraction=0.3",
        "evaluation.max_examples=9",
    ]
    done = run(load("electra", settings), tmp_path / "run", log=lambda _: None)
    recipe, tokenizer = load_resolved(done.directory), Tokenizer.load(done.directory)
    splits = examples.build_datasets(recipe.examples, RunData(recipe.data, tokenizer, done.directory), recipe.objective)
    assert splits.validation is not None
    source = examples.spread(splits.validation, 9)
    scores, replaced = [], []
    model = load_model(done.model).eval()
    batches = Batches(source, recipe.objective, tokenizer.vocab, batch_size=1, seed=recipe.seed)
    for batch in batches.all_batches():
        with torch.no_grad():
            outputs = recipe.objective.forward(model, batch)
        here = batch["real"] != IGNORE
        scores += model.heads["replaced"](outputs["hidden"][here])[:, 0].tolist()
        replaced += (outputs["shown"][here] != batch["real"][here]).tolist()
    assert 0 < sum(replaced) < len(replaced)
    assert done.metrics["valid/auc"] == pytest.approx(oracle.roc_auc_score(replaced, scores), abs=2e-3)
