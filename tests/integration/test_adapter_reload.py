"""A run with an adapter reloads on its base and initializes a next run, for all target modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from firth.evaluate.task import load_evaluated_model
from firth.generate.sampling import Sampling
from firth.model.model import LM
from firth.runs.inference import evaluate_run, fill_text
from firth.runs.loaded_model import generates_left_to_right, open_model
from firth.runs.recipe import Recipe, load
from firth.runs.run import run
from firth.types import UserError
from tests.support.runs import quiet

WORDS = ["the", "king", "queen", "of", "sea", "had", "a", "ship", "with", "no", "sail", "and", "crown", "salt"]
SMALL = [
    "batch.size=4", "precision=fp32", "checkpoint.every=1000", "evaluation.max_examples=16", "sample_prompts=[]", "max_steps=1",
    "examples.max_length=24",
]  # fmt: skip
SHAPE = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.max_positions=64"]
BASES = {
    "gpt": ["model.num_kv_heads=2", "model.intermediate_size=48"], "gpt2": [], "roberta": [], "t5": ["model.encoder.num_layers=2"],
    "bert": ["data.split_by=blank"], "bart": ["model.encoder.num_layers=2"],
}  # fmt: skip
"""Recipe -> what else its model needs. The LM heads of gpt2 and roberta are tied to the token embeddings."""
RATE = ["optimizer.name=adamw", "optimizer.lr=0.05"]
STILL = ["optimizer.lr=1e-12", "optimizer.embedding_lr=0", "optimizer.scalar_lr=0", "optimizer.weight_decay=0"]
"""A step that changes nothing: metrics after it equal those before it."""

CASES = [
    ("gpt", "gpt", "lora", "['*']"), ("gpt", "gpt", "prompt", ""), ("gpt2", "gpt2", "lora", "[all-linear, places]"),
    ("gpt2", "gpt2", "prefix", ""), ("gpt2", "classification", "lora", "[tokens, places]"),
    ("foreign", "classification", "prefix", ""), ("roberta", "roberta", "lora", "[heads.lm.dense]"),
    ("roberta", "classification", "lora", "[tokens, blocks.*]"), ("roberta", "classification", "frozen", ""),
    ("t5", "t5", "lora", "['*']"), ("t5", "t5", "prefix", ""), ("t5", "classification", "prompt", ""),
    ("bert", "bert", "lora", "[blocks.*, heads.next.0]"), ("bert", "classification", "prefix", ""), ("bert", "bert", "prompt", ""),
    ("bart", "bart", "lora", "['*']"), ("bart", "bart", "prompt", ""), ("bart", "classification", "lora", "[tokens, blocks.*]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a text and records of two classes."""
    folder = tmp_path_factory.mktemp("again")
    lines = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(40)) for i in range(1, 60)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    records = [{"text": line[: 30 + i % 50], "label": "salt" if "salt" in line[: 30 + i % 50] else "none"}
               for i, line in enumerate(lines)]  # fmt: skip
    (folder / "records.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return folder


@pytest.fixture(scope="module")
def base(place: Path) -> Callable[[str], Path]:
    """Return the directory of a base model, made once; `foreign` is one that transformers could have written."""

    @cache
    def make(name: str) -> Path:
        if name == "foreign":
            shutil.copytree(make("gpt2") / "model", place / name)
            (place / name / "firth.json").unlink()
            return place / name
        settings = [f"data.path={place / 'text.txt'}", "tokenizer.vocab_size=400", *SMALL, *SHAPE, *BASES[name]]
        return run(load(name, settings), place / name, quiet).directory

    return make


def recipe(place: Path, task: str, start: Path, *more: str) -> Recipe:
    data = place / ("records.jsonl" if task == "classification" else "text.txt")
    settings = [*SMALL, *RATE, f"data.path={data}", f"data.validation_path={data}", f"init_from={start}", *more]
    settings += ["data.split_by=blank"] * (task == "bert")
    return load(task, [*settings, *["model=null"] * (task != "classification")])


def states(model: LM) -> torch.Tensor:
    tokens = torch.arange(14).view(2, 7) * 11 % 200
    when = torch.arange(7)[None].expand(2, -1) * model.config.causal
    source = {"source_tokens": tokens} if model.config.encoder.num_layers else {}
    with torch.no_grad():
        return model({"tokens": tokens, "query_time": when, "key_time": when, **source})


def answer(directory: Path, task: str, place: Path) -> object:
    """Return the output of the command for a directory's task."""
    if task == "classification":
        valid = [str(place / "records.jsonl")]
        return json.loads(evaluate_run(directory, valid, task=None, limit=20, as_json=True))["accuracy"]
    opened = open_model(directory)
    return (
        opened.sample("the king", Sampling(max_new_tokens=5, temperature=0.0))
        if generates_left_to_right(opened.model.config)
        else fill_text(directory, "a <mask>", 2)
    )


@pytest.mark.parametrize(("name", "task", "kind", "targets"), CASES)
def test_run_reloads_and_initializes_the_next_run(
    place: Path, base: Callable[[str], Path], tmp_path: Path, name: str, task: str, kind: str, targets: str
) -> None:
    adapt = [f"peft.kind={kind}", *[f"peft.target_modules={targets}"] * bool(targets)]
    adapt += ["peft.num_virtual_tokens=3"] * (kind in ("prefix", "prompt"))
    one = run(recipe(place, task, base(name), *adapt), tmp_path / "one", quiet)
    whole = load_evaluated_model(one.directory).model
    answer(one.directory, task, place)
    onward = [recipe(place, task, one.directory, *STILL)]
    if kind != "frozen":
        part = load_evaluated_model(one.directory / "adapter").model
        assert part.state_dict().keys() == whole.state_dict().keys()
        torch.testing.assert_close(states(part), states(whole), atol=1e-5, rtol=0)
        assert answer(one.directory / "adapter", task, place) == answer(one.model, task, place)
        onward.append(recipe(place, task, base(name), *STILL, f"peft.kind={kind}", f"peft.init_from={one.directory}"))
    for i, plan in enumerate(onward):
        again = run(plan, tmp_path / f"next-{i}", quiet)
        assert again.metrics["valid/loss"] == pytest.approx(one.metrics["valid/loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("gpt2", ["peft.kind=lora", "peft.target_modules=[norm]"], r"matches the target 'norm'; available targets: places, attention.q, "),
        ("gpt2", ["peft.kind=lora", "peft.target_modules=[bias]"], r"matches the target 'bias'; available targets: places, attention.q, "),
        ("gpt2", ["peft.kind=lora", "peft.target_modules=[tokens]"],
         r"tokens shares its weight with heads.lm, .* from the adapter's targets; available targets: places, attention.q, "),
        ("gpt2", ["peft.kind=lora", "peft.target_modules=[heads.lm]"], r"heads.lm shares its weight with tokens, "),
        ("gpt", ["peft=frozen"], r"a mixture of all layers, which an LM head does not read"),
    ],
)  # fmt: skip
def test_unwritable_adapter_is_rejected_before_reading_data(
    place: Path, base: Callable[[str], Path], tmp_path: Path, name: str, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(recipe(place, name, base(name), *more), tmp_path, quiet)
    assert not (tmp_path / "inputs.json").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_adapter_on_a_model_with_a_prefix(place: Path, base: Callable[[str], Path], tmp_path: Path) -> None:
    """LoRA keeps the prefix of its base, and a second prefix is rejected."""
    prefix = ["peft.kind=prefix", "peft.num_virtual_tokens=3"]
    one = run(recipe(place, "gpt2", base("gpt2"), *prefix), tmp_path / "one", quiet).directory
    two = run(recipe(place, "gpt2", one, "peft=lora"), tmp_path / "two", quiet).directory
    before, after, part = (load_evaluated_model(place).model for place in (one, two, two / "adapter"))
    assert torch.equal(before.prefix.weights(), after.prefix.weights())  # type: ignore[union-attr]
    torch.testing.assert_close(states(part), states(after), atol=1e-5, rtol=0)
    assert (states(before) - states(after)).abs().max() > 1e-3
    config = json.loads((two / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "FIRTH_LORA"  # peft's base would read no prefix
    with pytest.raises(
        UserError, match=r"the model of init_from has a prefix already: continue it with peft.init_from=RUN too"
    ):
        run(recipe(place, "gpt2", one, *prefix), tmp_path / "no", quiet)
