"""Continued pretraining from published models: what transformers loads afterwards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.extend import old_tokens
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.training.optimizer import OptimizerConfig
from firth.types import UserError

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

ENGLISH = "The quick brown fox jumps over the lazy dog, and it is quick again. "
FRENCH = "Le renard brun saute par-dessus le chien paresseux, déjà fatigué de la journée. "
FEW = [
    "max_steps=2",
    "examples.max_length=32",
    "batch.size=4",
    "batch.pack_to_length=0",
    "sample_prompts=[]",
    "evaluation.max_examples=4",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("french")
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"Lettre {i}. " + FRENCH * 30)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without an LM head, as sentence encoders are published."""
    place = tmp_path_factory.mktemp("encoder")
    coder = train([ENGLISH * 20, "abcdefghijklmnopqrstuvwxyz é à"], "wordpiece", 300)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=coder.vocab.size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(place)
    coder.save(place)
    return place


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, whose table is larger than its tokenizer."""
    place = tmp_path_factory.mktemp("decoder")
    coder = train([ENGLISH * 20], "byte-bpe", 320)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=coder.vocab.size + 12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    coder.save(place)
    return place


def lines_of(recipe: str, settings: list[str], out: Path) -> list[str]:
    lines: list[str] = []
    run(load(recipe, settings), out, lines.append)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "gpt"])
@pytest.mark.parametrize("more", [0, 40])
def test_exported_model_and_tokenizer_are_those_of_transformers(
    kind: str, more: int, text: Path, encoder: Path, decoder: Path, tmp_path: Path
) -> None:
    base = encoder if kind == "roberta" else decoder
    settings = [f"init_from={base}", f"data.path={text}", *FEW, f"tokenizer.extend={more}"]
    printed = "\n".join(lines_of(kind, settings, tmp_path / "run"))
    assert ("has no LM head, so roberta begins with a new one, tied to its token embeddings" in printed) == (
        kind == "roberta"
    )
    assert (f"{more} tokens of this text are added" in printed) == bool(more)
    place = tmp_path / "run" / "model"
    auto = transformers.AutoModelForMaskedLM if kind == "roberta" else transformers.AutoModelForCausalLM
    theirs, loading = auto.from_pretrained(place, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    words, coder, old = transformers.AutoTokenizer.from_pretrained(place), Tokenizer.load(place), Tokenizer.load(base)
    assert coder.vocab.size == old.vocab.size + more
    for sentence in (FRENCH, ENGLISH, "Déjà 12 chiens."):
        assert words(sentence, add_special_tokens=False)["input_ids"] == coder.encode(sentence).tolist()
    ids = torch.from_numpy(coder.encode(FRENCH)[:30].astype("int64"))[None]
    assert not more or (ids >= old.vocab.size).any()
    mine, when = load_model(place), torch.arange(ids.shape[1])[None] * (kind == "gpt")
    with torch.no_grad():
        hidden = mine({"tokens": ids, "query_time": when, "key_time": when})
        difference = mine.heads["lm"](hidden) - theirs.eval()(ids).logits
    assert difference.abs().max() < 1e-4
    followed = [f"init_from={tmp_path / 'run'}", f"data.path={labeled(tmp_path)}", "max_steps=1", "batch.size=4"]
    assert run(load("classification", followed), tmp_path / "classes", lambda _: None).steps == 1
    again = lines_of(str(tmp_path / "run"), [], tmp_path / "run")
    assert "is finished" in again[-1]


def labeled(place: Path) -> Path:
    rows = [{"text": f"le chien {word} {i}", "label": word} for i in range(10) for word in ("bon", "mauvais")]
    (place / "labeled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "labeled.jsonl"


@pytest.mark.slow
def test_first_step_starts_from_the_means(text: Path, decoder: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 the exported rows are the means of the old ones."""
    settings = [f"init_from={decoder}", f"data.path={text}", *FEW, "tokenizer.extend=40", "optimizer.lr=1e-12"]
    run(load("gpt", settings), tmp_path / "run", lambda _: None)
    old, new = Tokenizer.load(decoder), Tokenizer.load(tmp_path / "run" / "model")
    before, after = (load_model(place).tokens.weight for place in (decoder, tmp_path / "run" / "model"))
    first = old.vocab.size
    assert torch.allclose(after[:first], before[:first], atol=1e-6)
    for i, parts in enumerate(old_tokens(old, new)):
        assert torch.allclose(after[first + i], before[parts].mean(0), atol=1e-6)


def test_defaults_suit_a_trained_model(encoder: Path, decoder: Path, tmp_path: Path) -> None:
    one = load("roberta", [f"init_from={encoder}"])
    assert one.optimizer == OptimizerConfig(name="adamw", lr=5e-4, weight_decay=0.01, beta2=0.98) and one.model is None
    assert (one.schedule.kind, one.schedule.warmup_ratio, one.budget.max_steps) == ("linear", 0.06, 200)
    lora = load("gpt", [f"init_from={decoder}", "peft=lora"])
    assert (lora.optimizer.lr, lora.peft.target_modules) == (1e-3, ("blocks.*",))
    mine = load(
        "gpt",
        [
            f"init_from={decoder}",
            "optimizer.lr=1e-5",
            "max_seconds=60",
            "peft.kind=lora",
            "peft.rank=4",
            "schedule.kind=wsd",
        ],
    )
    assert (mine.optimizer.lr, mine.optimizer.name, mine.budget.max_seconds, mine.budget.max_steps) == (
        1e-5,
        "adamw",
        60,
        0,
    )
    assert (mine.peft.rank, mine.peft.target_modules, mine.schedule.kind) == (4, ("blocks.*",), "wsd")
    inline = load("gpt", [f"init_from={decoder}", "peft={kind: lora, target_modules: [blocks.*.attention.*]}"])
    assert inline.peft.target_modules == ("blocks.*.attention.*",)
    assert load("gpt").optimizer != one.optimizer  # a run from random weights keeps its own
    (tmp_path / "recipe.yaml").write_text("name: gpt\ninit_from: ''\n")
    for name in ("model", "tokenizer"):
        (tmp_path / name).symlink_to(decoder)
    own = load("gpt", [f"init_from={tmp_path}"])
    assert (own.optimizer, own.budget, own.model) == (load("gpt").optimizer, load("gpt").budget, None)
    (tmp_path / "recipe.yaml").write_text(f"name: gpt\ninit_from: {decoder}\n")
    assert load("gpt", [f"init_from={tmp_path}"]).optimizer == one.optimizer
    assert load("contrastive:published", [f"init_from={encoder}"]).optimizer.lr == 3e-5  # already that of a finetuning
    dropout = load("roberta", [f"init_from={encoder}", "model.dropout=0.3"])
    assert dropout.model is not None and (dropout.model.dropout, dropout.model.hidden_size) == (0.3, 32)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("gpt", [], r"^the recipe gpt trains a decoder, and .* is an encoder: take the recipe roberta$"),
        ("roberta", ["model.hidden_size=96"], r"its model.hidden_size is 32, not 96"),
        ("roberta", ["tokenizer.vocab_size=900"], r"^tokenizer.vocab_size=900: a run with init_from has the tokenizer of .*extend=N"),
        ("roberta", ["examples.max_length=90"], r"^examples.max_length=90: the model has learned 64 positions"),
        ("roberta", ["tokenizer.extend=9", "peft=lora"], r"^tokenizer.extend=9 adds rows .* peft=full trains"),
    ],
)  # fmt: skip
def test_what_contradicts_the_model_is_refused(
    recipe: str, settings: list[str], message: str, encoder: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(
            load(recipe, [f"init_from={encoder}", f"data.path={text}", "max_steps=1", *settings]),
            tmp_path / "run",
            lambda _: None,
        )
    assert "\n" not in str(error.value)


def test_extension_needs_a_start_model() -> None:
    with pytest.raises(
        UserError, match=r"^tokenizer.extend=9 adds tokens to the tokenizer of init_from: set init_from=MODEL"
    ):
        load("roberta", ["tokenizer.extend=9"])


@pytest.mark.network
def test_names_of_the_catalog_are_models(minilm: Path) -> None:
    assert Path(load("roberta", ["init_from=minilm"]).init_from).samefile(minilm)
