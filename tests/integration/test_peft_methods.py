"""PEFT methods: training, exact resumption, files that other libraries load, and error messages."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from firth.data.attention_fields import causal
from firth.data.collate import collate, pack
from firth.evaluate.task import load_evaluated_model
from firth.model import flops
from firth.model.config import decoder_config, encoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.objective import Objective, forward_flops
from firth.peft import lora
from firth.pretrained.load_save import init_from, load_model
from firth.runs import config_io
from firth.runs.inference import evaluate_run
from firth.runs.peft_options import PEFT_METHODS, FullFinetuning, LoRA, prefix_of, prompt_of
from firth.runs.recipe import Recipe, load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.training import checkpoint
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.step import step
from firth.types import UserError
from tests.support.runs import quiet

WORDS = "the king and the queen of the sea had a ship with no sail and a crown of salt upon the wind".replace(
    " ", "\n"
).splitlines()
SHAPE = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=0",
    "model.intermediate_size=48",
    "model.max_positions=64",
]
SMALL = ["batch.size=8", "precision=fp32", "evaluation.every=0", "evaluation.max_examples=16", "sample_prompts=[]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, labeled records, and two models that are trained a little on the text: a decoder and an encoder."""
    folder = tmp_path_factory.mktemp("adapt")
    lines = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(40)) for i in range(1, 200)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    records = [{"text": line[: 30 + i % 50], "label": "salt" if "salt" in line[: 30 + i % 50] else "none"}
               for i, line in enumerate(lines)]  # fmt: skip
    (folder / "records.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    common = [f"data.path={folder / 'text.txt'}", "tokenizer.vocab_size=400", "max_steps=4", "examples.max_length=24"]
    for name, recipe in (("decoder", "llama"), ("encoder", "roberta")):
        run(load(recipe, [*common, *SHAPE, *SMALL]), folder / name, quiet)
    return folder


def settings(place: Path, start: str, *more: str, steps: int = 6) -> list[str]:
    data = "records.jsonl" if start == "encoder" else "text.txt"
    return [
        *SMALL, f"data.path={place / data}", f"init_from={place / start}", f"max_steps={steps}", "checkpoint.every=3",
        "examples.max_length=24", "optimizer.name=adamw", *more,
    ]  # fmt: skip


def recipe(place: Path, start: str, *more: str) -> Recipe:
    settled = settings(place, start, *more)
    return load(
        "classification" if start == "encoder" else "gpt", settled + ([] if start == "encoder" else ["model=null"])
    )


CASES = [
    ("decoder", "lora"), ("decoder", "prefix"), ("decoder", "prompt"), ("encoder", "lora"), ("encoder", "prefix"),
    ("encoder", "prompt"), ("encoder", "head"), ("encoder", "frozen"),
]  # fmt: skip


Made = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def made(place: Path) -> Made:
    """Return the directory of a finished run of each kind, trained once."""

    @functools.cache
    def make(start: str, kind: str) -> Path:
        directory = place / f"{start}-{kind}"
        lines: list[str] = []
        run(validation_loss(place, start, kind), directory, lines.append)
        assert "of which" in next(line for line in lines if "parameters" in line)
        return directory

    return make


def validation_loss(place: Path, start: str, kind: str) -> Recipe:
    return recipe(
        place,
        start,
        f"peft={kind}",
        f"data.validation_path={metric_rows(place, start)}",
        "evaluation.max_examples=1000",
    )


def metric_rows(place: Path, start: str) -> str:
    return str(place / ("records.jsonl" if start == "encoder" else "text.txt"))


@pytest.mark.parametrize(("start", "kind"), CASES)
def test_resumed_run_is_bit_identical(place: Path, made: Made, tmp_path: Path, start: str, kind: str) -> None:
    """A run that is killed after its third step resumes from a checkpoint of the trained weights alone."""
    directory = made(start, kind)
    saved = checkpoint.load(directory / "checkpoints" / "step-000003")
    assert not any(name.startswith("stack.") and ".low." not in name for name in saved.files["model"])
    shutil.copytree(saved.path, tmp_path / "checkpoints" / saved.path.name)
    for name in ("recipe.yaml", "inputs.json"):
        shutil.copy(directory / name, tmp_path)
    run(validation_loss(place, start, kind), tmp_path, quiet)
    whole, killed = load_model(directory / "model"), load_model(tmp_path / "model")
    assert whole.state_dict().keys() == killed.state_dict().keys() and not lora.adapted(whole)
    assert all(torch.equal(x, killed.state_dict()[n]) for n, x in whole.state_dict().items())
    base = load_model(place / start / "model").state_dict()
    same = [torch.equal(x, base[n]) for n, x in whole.state_dict().items() if n.startswith("stack.")]
    assert all(same) == (kind != "lora")
    again = load(str(directory))
    assert type(again.peft) is PEFT_METHODS[kind] and again == load(str(tmp_path))


@pytest.mark.parametrize(("start", "kind"), CASES)
def test_exported_model_has_the_score_of_the_run(place: Path, made: Made, start: str, kind: str) -> None:
    directory, valid = made(start, kind), metric_rows(place, start)
    places = [directory / "model", *([directory / "adapter"] if (directory / "adapter").is_dir() else [])]
    if start == "encoder":
        logged = json.loads((directory / "done.json").read_text())["metrics"]["valid/accuracy"]
        found = json.loads(evaluate_run(directory, [valid], task=None, limit=None, as_json=True))
        assert found["accuracy"] == pytest.approx(logged, abs=1e-6)
    scores = [json.loads(evaluate_run(one, [valid], task=None, limit=None, as_json=True)) for one in places]
    name = "accuracy" if start == "encoder" else "bits_per_byte"
    for score in scores:
        assert score[name] == pytest.approx(scores[0][name], abs=1e-6)
    models = [load_evaluated_model(one).model for one in places]
    for model in models:
        torch.testing.assert_close(states(model), states(models[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("start", "kind"), CASES)
def test_ten_steps_lower_the_loss_and_change_trained_weights(place: Path, start: str, kind: str) -> None:
    trunk = load_model(place / start / "model")
    objective: Objective = CausalLM() if start == "decoder" else Classification(class_names=("a", "b"))
    adapt = PEFT_METHODS[kind]()
    objective = adapt.configure_objective(objective)
    model = LM(trunk.config, objective.heads(trunk.config))
    _, added = init_from(model, place / start / "model")
    tokenizer = Tokenizer.load(place / start / "tokenizer")
    adapt.apply(model, added, tokenizer, 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rng = np.random.default_rng(0)
    shown = [
        objective.build_example(
            {"tokens": rng.integers(120, tokenizer.vocab.size, 9).astype(np.int32), "label": i % 2},
            tokenizer.vocab,
            rng,
        )
        for i in range(6)
    ]
    batch = collate(shown, set(objective.labels.values()))
    mover = Optimizer(OptimizerConfig(name="adamw", lr=0.02, weight_decay=0.0), model)
    term = next(iter(objective.labels))
    losses = []
    for _ in range(11):
        losses.append(float(step(model, objective, [batch])[term]))
        mover.step(1.0)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trained and not any(n.startswith("stack.") and ".low." not in n for n in moved)


def states(model: LM) -> torch.Tensor:
    tokens = torch.arange(2 * 7).view(2, 7) * 11 % 300
    when = torch.arange(7)[None].expand(2, -1) * model.config.causal
    with torch.no_grad():
        return model({"tokens": tokens, "query_time": when, "key_time": when})


@pytest.mark.oracle
def test_peft_loads_the_adapter_of_a_run(place: Path, tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    transformers.logging.set_verbosity_error()
    for kind in ("lora", "prefix", "prompt"):
        run(recipe(place, "decoder", f"peft={kind}", "optimizer.lr=0.05"), tmp_path / kind, quiet)
        base = transformers.AutoModelForCausalLM.from_pretrained(place / "decoder" / "model").eval()
        there = peft.PeftModel.from_pretrained(base, tmp_path / kind / "adapter").eval()
        tokens = torch.arange(9)[None] * 7 % 300
        model = load_model(tmp_path / kind / "model")
        when = torch.arange(9)[None]
        with torch.no_grad():
            ours = model.heads["lm"](model({"tokens": tokens, "query_time": when, "key_time": when}))
            theirs = there(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -9:]
            plain = base(input_ids=tokens).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        if kind == "lora":
            merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind / "model").eval()
            torch.testing.assert_close(merged(input_ids=tokens).logits, ours, atol=1e-5, rtol=1e-5)
        else:
            assert (plain - ours).abs().max() > 0.01


def test_run_continues_from_an_adapter(place: Path, tmp_path: Path) -> None:
    """The first loss is that of the merged model on the same batch, and the adapter predicts better than the base.

    (On one batch of 8 rows the loss may rise while that of the held-out text falls.)
    """
    texts = [f"data.validation_path={place / 'text.txt'}", "evaluation.max_examples=1000", "optimizer.lr=0.001"]
    one = run(recipe(place, "decoder", "peft=lora", "peft.rank=3", *texts), tmp_path / "one", quiet)
    onward = {
        "two": recipe(place, "decoder", "peft=lora", f"peft.init_from={tmp_path / 'one'}", *texts),
        "merged": recipe(place, str(tmp_path / "one"), "peft=lora", *texts),
        "base": recipe(place, "decoder", *texts, "optimizer.lr=1e-12", "optimizer.embedding_lr=0"),
    }
    ends = {name: run(plan, tmp_path / name, quiet) for name, plan in onward.items()}
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3 and ends["two"].steps == 6
    rows = {n: json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0])["loss"] for n in ends}
    assert rows["two"] == pytest.approx(rows["merged"], abs=1e-5) and abs(rows["two"] - rows["base"]) > 1e-4
    held_out = {name: end.metrics["valid/loss"] for name, end in ends.items()}
    assert max(held_out["two"], one.metrics["valid/loss"]) < held_out["base"]
    with pytest.raises(UserError, match=r"holds an adapter of kind lora: set peft.kind=lora"):
        run(recipe(place, "decoder", "peft=prefix", f"peft.init_from={tmp_path / 'one'}"), tmp_path / "three", quiet)


def test_gradient_checkpointing_is_bit_identical(place: Path, made: Made, tmp_path: Path) -> None:
    """(test_model_prefix shows that it saves memory.)"""
    run(dataclasses.replace(validation_loss(place, "decoder", "prefix"), gradient_checkpointing=True), tmp_path, quiet)
    plain, again = (load_model(one / "model").state_dict() for one in (made("decoder", "prefix"), tmp_path))
    assert all(torch.equal(x, again[n]) for n, x in plain.items())


def test_adapter_with_another_base_is_rejected(place: Path, tmp_path: Path) -> None:
    plan = recipe(place, "decoder", "peft=lora")
    run(plan, tmp_path, quiet)
    (tmp_path / "done.json").unlink()
    for later in (tmp_path / "checkpoints").glob("step-000006"):
        later.rename(tmp_path / "later")
    weights = place / "decoder" / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    record = weights.with_name("firth.json")
    hashes = record.read_text()
    record.write_text(json.dumps({k: v for k, v in json.loads(hashes).items() if k not in ("files", "digest")}))
    try:
        with pytest.raises(UserError, match="holds a run that began with another content of init_from"):
            run(plan, tmp_path, quiet)
    finally:
        weights.write_bytes(before)
        record.write_text(hashes)


def test_peft_in_short_and_long_form() -> None:
    plain = load("gpt")
    assert plain.peft == FullFinetuning()
    assert load("classification", ["init_from=x", "peft=lora"]).peft == LoRA()
    full = load("classification", ["init_from=x", "peft.kind=lora", "peft.rank=4", "peft.target_modules=[blocks.*]"])
    assert full.peft == LoRA(rank=4, target_modules=("blocks.*",))
    assert config_io.from_dict(type(full), yaml.safe_load(config_io.write_yaml(full))) == full


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["peft=lora", "init_from="],
            "peft=lora needs a pretrained model: set init_from=RUN",
        ),
        (["peft=lara"], "there is no way to adapt 'lara'; did you mean 'lora'"),
        (
            ["peft=lora", "peft.rank=33"],
            "rank 33 is too large for stack.blocks.0.attention.q, whose weight is 32 x 32",
        ),
        (
            ["peft=lora", "peft.target_modules=query"],
            "no module of this model matches the target 'query'; available targets: tokens, ",
        ),
        (["peft=prefix", "peft.num_virtual_tokens=64"], "a prefix takes at least 1 of the 64 positions, and not all"),
        (["peft=frozen", "objective=rtd"], "which a causal decoder cannot"),
    ],
)
def test_unsupported_peft_is_rejected(place: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(recipe(place, "decoder", *more), tmp_path, quiet)


def test_prefix_on_a_recurrent_model_is_rejected(place: Path, tmp_path: Path) -> None:
    small = [
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.max_positions=64",
        "tokenizer.vocab_size=400",
        "examples.max_length=24",
        "max_steps=1",
    ]
    run(load("lstm", [f"data.path={place / 'text.txt'}", *SMALL, *small]), tmp_path / "lstm", quiet)
    with pytest.raises(UserError, match=r"peft=prefix puts trained positions before a text, which .* has no attention"):
        run(load("lstm", [*settings(place, "decoder", "peft=prefix"), f"init_from={tmp_path / 'lstm'}", "model=null"]),
            tmp_path / "no", quiet)  # fmt: skip


def test_frozen_weights_add_no_gradient_flops(place: Path) -> None:
    model = load_model(place / "decoder" / "model")
    assert flops.trained_share(model) == 1
    maps = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("stack."))
    lora.add(model, ["q"], lora.LoraConfig(rank=2))
    low = 2 * 2 * (32 + 32)
    lora.freeze(model)
    assert flops.trained_share(model) == pytest.approx((4 * maps + 6 * low) / (6 * maps))
    lora.freeze(lora.merge_and_unload(model), ["lm"])
    assert flops.trained_share(model) == pytest.approx(1 / 3)


def test_virtual_tokens_are_counted_in_flops() -> None:
    """A prompt costs as many FLOPs as that many more tokens; a prefix only costs attention to it."""
    for make in (decoder_config, encoder_config):
        config = make(50, 64, 2, num_heads=2)
        model = LM(config, {"lm": LMHead(config)})
        texts, longer = (
            [{"tokens": np.arange(n), "labels": np.arange(n)} for n in (5 + more, 8 + more)] for more in (0, 3)
        )
        if config.causal:
            texts, longer = ([one | causal(len(one["tokens"])) for one in those] for those in (texts, longer))
        batch = collate(texts, {"labels"})
        plain = forward_flops(model, batch, batch["labels"] >= 0)
        model.heads["prompt"] = prompt_of(model, [1, 2, 3])
        longer_batch = collate(longer, {"labels"})
        assert forward_flops(model, batch, batch["labels"] >= 0) == forward_flops(
            LM(config, {}), longer_batch, longer_batch["labels"] >= 0
        )
        packed = flops.with_prefix(flops.work(pack(texts, 16, {"labels"})), pack(texts, 16, {"labels"}), config, 0, 3)
        assert (packed.positions, packed.pairs) == (
            flops.work(collate(longer, {"labels"})).positions, flops.work(collate(longer, {"labels"})).pairs
        )  # fmt: skip
        del model.heads["prompt"]
        model.heads["prefix"] = prefix_of(model, [1, 2, 3])
        assert forward_flops(model, batch, batch["labels"] >= 0) == plain + 6 * config.num_layers * 13 * 3 * 2 * 64
