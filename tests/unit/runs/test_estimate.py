"""What a run takes, before it starts: FLOPs by hand, parameters of the built model, memory, refusals."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from firth.cli import app
from firth.corpora import readers
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.flops import num_parameters
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.replaced_tokens import RTD, generator_config
from firth.objectives.seq2seq import SpanCorruption
from firth.peft import lora
from firth.recipes.recurrent import lstm
from firth.runs.estimate import _sampled, dry_run, estimate, prepared
from firth.runs.recipe import Recipe, load
from firth.runs.run import run
from firth.runs.step_estimate import StepTimes, step_flops, step_seconds
from firth.training import device
from firth.training.logging import read_metrics
from firth.types import IGNORE, Batch, UserError
from tests.support.runs import quiet

ROWS, LENGTH, VOCAB, HIDDEN, LAYERS, INNER = 3, 20, 70, 32, 2, 48
TOKENS = ROWS * LENGTH
ATTENTION, MLP = 4 * HIDDEN**2, 2 * HIDDEN * INNER
"""Weights of a layer: q, k, v and o; up and down."""
PER_PAIR = 2 * HIDDEN
"""Products of a visible pair: its score and its weighted value."""
TRAINED = 6
"""2 for a product and a sum, 3 for forward, gradient of the input and gradient of the weight."""


def small(config: ModelConfig) -> ModelConfig:
    return config.with_fields({"intermediate_size": INNER, "num_heads": 2, "head_dim": HIDDEN // 2, "num_kv_heads": 2})


def tokens(length: int = LENGTH) -> Tensor:
    return torch.arange(ROWS * length).view(ROWS, length) % (VOCAB - 1) + 1


def causal() -> Batch:
    times = torch.arange(LENGTH, dtype=torch.int32).expand(ROWS, LENGTH)
    return {"tokens": tokens(), "labels": tokens().roll(-1, 1), "query_time": times, "key_time": times}


def masked(each: int) -> Batch:
    """Return a batch with `each` labels in every row."""
    labels = torch.full((ROWS, LENGTH), IGNORE)
    labels[:, :each] = 5
    return {"tokens": tokens(), "labels": labels, "real": tokens(), "chance": torch.rand(ROWS, LENGTH)}


def count(objective: Objective, config: ModelConfig, batch: Batch) -> float:
    return step_flops(LM(config, objective.heads(config)), objective, [[batch]])


def test_flops_of_a_decoder() -> None:
    pairs = ROWS * LENGTH * (LENGTH + 1) // 2
    by_hand = TRAINED * (LAYERS * (TOKENS * (ATTENTION + MLP) + pairs * PER_PAIR) + TOKENS * HIDDEN * VOCAB)
    assert count(CausalLM(), small(decoder_config(VOCAB, HIDDEN, LAYERS)), causal()) == by_hand


def test_flops_of_an_encoder_with_15_percent_labels() -> None:
    """The last layer has keys and values of all tokens, and the rest of its work at the labels; so has the head."""
    each = 3  # 15 % of 20
    config = small(encoder_config(VOCAB, HIDDEN, LAYERS)).with_fields({"activation": "gelu", "lm_head.type": "linear"})
    whole = TOKENS * (ATTENTION + MLP) + ROWS * LENGTH**2 * PER_PAIR
    at_labels = ROWS * each * (ATTENTION // 2 + MLP) + ROWS * each * LENGTH * PER_PAIR
    last = TOKENS * ATTENTION // 2 + at_labels
    by_hand = TRAINED * ((LAYERS - 1) * whole + last + ROWS * each * HIDDEN * VOCAB)
    assert count(MLM(mlm_probability=0.15), config, masked(each)) == by_hand


def test_flops_of_t5() -> None:
    """Encoder, decoder and cross-attention, whose keys and values are of the source."""
    config = small(encoder_decoder_config(VOCAB, HIDDEN, LAYERS)).with_fields({"activation": "geglu"})
    source, sources = 30, ROWS * 30
    batch = causal() | {"source_tokens": tokens(source)}
    gated = 3 * HIDDEN * INNER
    encoder = config.encoder.num_layers * (sources * (ATTENTION + gated) + ROWS * source**2 * PER_PAIR)
    own = TOKENS * (ATTENTION + gated) + ROWS * LENGTH * (LENGTH + 1) // 2 * PER_PAIR
    crossing = (TOKENS + sources) * ATTENTION // 2 + TOKENS * source * PER_PAIR
    by_hand = TRAINED * (encoder + LAYERS * (own + crossing) + TOKENS * HIDDEN * VOCAB)
    assert count(SpanCorruption(), config, batch) == by_hand


def test_flops_of_electra() -> None:
    """The discriminator at every token, the generator's last layer and head at the masked ones."""
    each = 3
    config = small(encoder_config(VOCAB, HIDDEN, LAYERS)).with_fields({"activation": "gelu"})
    objective = RTD(generator_size=0.5)
    g = generator_config(config, 0.5)
    width, inner = g.hidden_size, g.intermediate_size
    assert (width, inner, g.embedding.size) == (HIDDEN // 2, INNER // 2, HIDDEN)
    layer, pair = 4 * width**2 + 2 * width * inner, 2 * width
    whole = TOKENS * layer + ROWS * LENGTH**2 * pair
    last = TOKENS * 2 * width**2 + ROWS * each * (2 * width**2 + 2 * width * inner + LENGTH * pair)
    head = ROWS * each * HIDDEN * (VOCAB + width)  # a transform to the width of the shared table, then the vocabulary
    generator = (LAYERS - 1) * whole + last + TOKENS * HIDDEN * width + head
    judge = LAYERS * (TOKENS * (ATTENTION + MLP) + ROWS * LENGTH**2 * PER_PAIR) + TOKENS * HIDDEN * (HIDDEN + 1)
    assert count(objective, config, masked(each)) == TRAINED * (generator + judge)


def test_flops_of_lora() -> None:
    """A frozen matrix has no gradient of its own: 4 instead of 6; the adapters have all three products."""
    rank = 4
    config, objective = small(decoder_config(VOCAB, HIDDEN, LAYERS)), CausalLM()
    model = LM(config, objective.heads(config))
    lora.add(model, ["q"], lora.LoraConfig(rank=rank))
    lora.freeze(model)
    pairs = ROWS * LENGTH * (LENGTH + 1) // 2
    stack = LAYERS * (TOKENS * (ATTENTION + MLP) + pairs * PER_PAIR)
    adapters, frozen = LAYERS * 2 * rank * HIDDEN, LAYERS * (ATTENTION + MLP)
    by_hand = 4 * stack + 6 * stack * adapters / frozen + 4 * TOKENS * HIDDEN * VOCAB
    assert step_flops(model, objective, [[causal()]]) == pytest.approx(by_hand, rel=1e-12)


def test_flops_of_an_lstm() -> None:
    config = lstm().model
    assert config is not None and config.rnn.type == "lstm"
    width, inner, layers = config.embedding_dim, config.intermediate_size, config.num_layers
    assert (config.direction_size, inner) == (width, width)
    batch = {"tokens": tokens(), "labels": tokens().roll(-1, 1)}
    gates = layers * 4 * inner * (width + inner)
    by_hand = TRAINED * TOKENS * (gates + width * config.vocab_size)
    assert count(CausalLM(), config, batch) == by_hand


TEXT = "the king and queen of all that land did walk by night with many a fool who sang"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    words = TEXT.split()
    for number in range(12):
        turned = [words[(i * (number % 5 + 1) + number) % len(words)] for i in range(200)]
        (place / f"{number}.txt").write_text(". ".join(" ".join(turned[i : i + 8]) for i in range(0, 200, 8)))
    return place


def tiny(text: Path, *settings: str, name: str = "gpt") -> Recipe:
    few = (
        "tokenizer.vocab_size=300",
        "batch.size=4",
        "max_steps=10",
        "examples.max_length=32",
        "evaluation.max_examples=4",
        "model.num_layers=1",
    )
    return load(name, [f"data.path={text}", *few, *settings])


@pytest.mark.slow
def test_estimate_of_a_run(text: Path) -> None:
    recipe = tiny(text)
    found = estimate(recipe, timed=False, log=quiet)
    assert found.recipe.model is not None
    assert found.step.parameters == num_parameters(found.recipe.model)
    table = found.recipe.model.vocab_size * found.recipe.model.hidden_size
    assert found.step.parameters_without_embeddings == found.step.parameters - table
    assert (found.steps, found.step.tokens, found.tokens) == (10, 4 * 32, 10 * 4 * 32)
    assert found.epochs == pytest.approx(10 * 4 * 32 / found.data_tokens)
    assert found.step.memory.weights == 4 * found.step.parameters
    assert found.step_seconds == 0
    assert "tokenizer was trained" in found.data


@pytest.mark.slow
def test_estimate_predicts_the_checkpoint(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, "max_steps=1")
    found = estimate(recipe, timed=False, log=quiet)
    run(recipe, tmp_path / "run", log=quiet)
    saved = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints" / "step-000001").glob("*.safetensors"))
    assert saved == pytest.approx(found.step.checkpoint_bytes, rel=0.02)


@pytest.mark.slow
def test_memory_of_more_rows_is_in_the_activations(text: Path) -> None:
    few, many = (estimate(tiny(text, f"batch.size={n}"), timed=False, log=quiet).step.memory for n in (4, 64))
    assert (many.weights, many.optimizer) == (few.weights, few.optimizer)
    assert many.activations > 3 * few.activations
    halved = estimate(
        tiny(text, "batch.size=64", "batch.gradient_accumulation_steps=2"), timed=False, log=quiet
    ).step.memory
    assert halved.peak < many.peak


@pytest.mark.slow
def test_gradient_checkpointing_needs_less(text: Path) -> None:
    plain, recomputed = (
        estimate(
            tiny(text, "batch.size=64", "model.num_layers=3", f"gradient_checkpointing={on}"), timed=False, log=quiet
        ).step.memory
        for on in ("false", "true")
    )
    assert recomputed.peak < plain.peak


@pytest.mark.slow
def test_timed_estimate(text: Path) -> None:
    found = estimate(tiny(text, "precision=fp32"), log=quiet)
    assert 0 < found.step_seconds < 60
    assert found.seconds == found.steps * found.step_seconds
    assert "timed steps of this model" in found.timing


HUGE = ("model.hidden_size=100000", "model.num_layers=10", "model.num_heads=1000", "model.head_dim=0",
        "model.num_kv_heads=0", "model.intermediate_size=0")  # fmt: skip


def test_a_trillion_parameters_are_refused_at_once(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, *HUGE)
    assert recipe.model is not None and num_parameters(recipe.model) > 1e12
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"which take .* GB with gradients and optimizer, and .* are free"):
        run(recipe, tmp_path / "run", log=quiet)
    assert time.perf_counter() - start < 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_activations_that_do_not_fit_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights fit, and the step does not."""
    recipe = tiny(text, "batch.size=64", "precision=fp32")
    needed = estimate(recipe, timed=False, log=quiet).step.peak_bytes

    def free(_: torch.device) -> dict[str, int]:
        return {"main memory": int(0.7 * needed)}  # free blocks vary from process to process

    monkeypatch.setattr("firth.runs.step_estimate.available_memory", free)
    monkeypatch.setattr("firth.runs.build_model.LM", None)
    with pytest.raises(TypeError):  # the trace builds the model, on tensors without data
        run(recipe, tmp_path / "run", log=quiet)
    monkeypatch.setattr("firth.runs.build_model.LM", LM)
    with pytest.raises(UserError, match=r"the run needs about .* GB of main memory at its peak"):
        run(recipe, tmp_path / "run", log=quiet)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_errors_are_those_of_a_run(tmp_path: Path) -> None:
    recipe = dataclasses.replace(load("gpt"), data=dataclasses.replace(load("gpt").data, corpus=""))
    messages = []
    for attempt in (lambda: estimate(recipe, log=quiet), lambda: run(recipe, tmp_path / "run", log=quiet)):
        with pytest.raises(UserError) as error:
            attempt()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "the recipe has no data" in messages[0]


@pytest.mark.slow
def test_dry_run_trains_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints what the run takes and leaves no file behind."""
    monkeypatch.chdir(tmp_path)
    few = [f"data.path={text}", "tokenizer.vocab_size=300", "batch.size=4", "max_steps=10", "examples.max_length=32"]
    done = CliRunner().invoke(app, ["train", "gpt", *few, "--dry-run", "--out", "mine"])
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.output.splitlines() if line.startswith("  ")}
    assert [*lines] == ["parameters", "FLOPs", "memory", "checkpoint", "tokens", "time"]
    assert "1.28k in 10 steps of 128" in lines["tokens"]
    assert "MFU" in lines["time"]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_dry_run_of_a_step_that_does_not_fit(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported first, and then refused as a run is."""
    for module in ("step_estimate", "estimate"):
        monkeypatch.setattr(f"firth.runs.{module}.available_memory", lambda _: {"main memory": 1_000_000})
    monkeypatch.setattr("firth.runs.step_estimate.time_steps", lambda *_: StepTimes(1e-12, 0.1, 0.0, 2))
    lines: list[str] = []
    with pytest.raises(UserError, match="of main memory at its peak"):
        dry_run(tiny(text), lines.append)
    assert any("  memory      " in line for line in lines)


@pytest.mark.slow
def test_the_fastest_speed_of_a_large_model_is_kept(
    text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is that of a model with fewer layers. A busy machine only lowers one, so a slow one is replaced by the next."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    monkeypatch.setattr("firth.runs.step_estimate.MAX_STEP_SECONDS", 0.0)
    layers = []

    def found(per_flop: float) -> float:
        def times(model: LM, *_: object) -> StepTimes:
            layers.append(model.config.num_layers)
            return StepTimes(per_flop, 1e-3, 0.0, 2)

        monkeypatch.setattr("firth.runs.step_estimate.time_steps", times)
        recipe = tiny(text, "precision=fp32", "model.num_layers=4")
        one = estimate(recipe, log=quiet)
        assert one.timing == "the fastest measured speed of a smaller model of the same width"
        return one.step_seconds

    busy, idle, busy_again = found(1e-9), found(1e-10), found(1e-9)
    assert busy > 5 * idle and busy_again == pytest.approx(idle)
    assert layers == [2, 2, 2]


def test_a_run_records_its_utilization(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = run(tiny(text, "max_steps=2", "precision=fp32"), tmp_path / "run", log=lines.append)
    peak = device.machine_peak("cpu", "fp32")
    assert result.mfu == pytest.approx(result.flops / result.seconds / peak)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert all(row["mfu"] == pytest.approx(row["flops_per_second"] / peak, abs=1e-4) for row in rows)
    assert any("of this machine's peak (MFU)" in line for line in lines)
    assert run(tiny(text, "max_steps=2", "precision=fp32"), tmp_path / "run", log=quiet).mfu == result.mfu


def test_the_peak_only_rises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine can only lower a measurement."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    device.record_speed("peak cpu fp32", 1e18)
    assert device.measure_peak("cpu", "fp32") == 1e18
    device.record_speed("peak cpu fp32", 1.0)
    assert 1e9 < device.measure_peak("cpu", "fp32") < 1e15


@pytest.mark.slow
def test_dry_run_calls_no_reward(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["batch.size=4", "max_steps=1", "examples.max_length=48"]
    start = run(load("gpt", [f"data.path={text}", "tokenizer.vocab_size=300", *few]), tmp_path / "start", log=quiet)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "word {i}"}}\n' for i in range(40)))
    (tmp_path / "paid_score.py").write_text(
        f"from pathlib import Path\n\n\ndef paid(text):\n    Path({str(tmp_path / 'called')!r}).touch()\n    return 1.0\n"
    )
    reward = "paid_score:paid"
    settings = [f"init_from={start.directory}", f"data.path={tmp_path / 'prompts.jsonl'}", "batch.size=8", "max_steps=4",
                f"examples.reward_function={reward}", f"examples.true_reward_function={reward}", "examples.max_new_tokens=8"]  # fmt: skip
    found = estimate(load("grpo", settings), log=quiet)
    assert found.step_seconds > 0 and not (tmp_path / "called").exists()


def test_sample_of_large_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is sampled by its size, and held-out text too."""
    monkeypatch.setattr("firth.runs.estimate.MAX_COUNTED_BYTES", 10_000)
    monkeypatch.setattr("firth.runs.estimate.SAMPLE_BYTES", 6_400)
    monkeypatch.setattr("firth.runs.estimate.VALIDATION_BYTES", 3_200)
    files = {"a.txt": ("one ", 5_000), "b.jsonl": ("two ", 10_000), "held.txt": ("three ", 5_000)}
    for name, (word, count) in files.items():
        text = word * count
        (tmp_path / name).write_text(json.dumps({"body": text}) + "\n" if name == "b.jsonl" else text)
    paths = f"data.path=[{tmp_path / 'a.txt'}, {tmp_path / 'b.jsonl'}]"
    recipe = load("gpt", [paths, f"data.validation_path={tmp_path / 'held.txt'}", "data.text_field=body"])
    place = tmp_path / "place"
    place.mkdir()
    smaller, scale, how = _sampled(recipe, place, quiet)
    words = [document.text for document in readers.documents(smaller.data.path, field="body")]
    sizes = {word: sum(len(text) for text in words if text.startswith(word.strip())) for word in ("one ", "two ")}
    assert sizes["one "] == pytest.approx(6400 / 3, rel=0.1) and sizes["two "] == pytest.approx(6400 * 2 / 3, rel=0.1)
    assert scale == pytest.approx(60_000 / 6400, rel=0.1) and "estimated from" in how
    held = [document.text for document in readers.documents(smaller.data.validation_path, field="body")]
    assert sum(map(len, held)) == pytest.approx(3200, rel=0.1) and all("three" in text for text in held)


@pytest.mark.slow
def test_records_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are often sorted by label, so every n-th record is read, and the tokens are those of the whole."""
    lines = [json.dumps({"text": f"{TEXT} {i}", "label": "good" if i < 600 else "bad"}) for i in range(1200)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    few = ["tokenizer.vocab_size=300", "batch.size=4", "max_steps=10", f"data.path={tmp_path / 'records.jsonl'}"]
    start = run(
        load("bert", [f"data.path={tmp_path / 'records.jsonl'}", *few, "max_steps=1"]), tmp_path / "start", log=quiet
    )
    recipe = load("classification", [f"init_from={start.directory}", *few[1:]])
    whole = estimate(recipe, timed=False, log=quiet)
    size = (tmp_path / "records.jsonl").stat().st_size
    monkeypatch.setattr("firth.runs.estimate.MAX_COUNTED_BYTES", size // 2)
    monkeypatch.setattr("firth.runs.estimate.SAMPLE_BYTES", size // 6)
    with prepared(recipe, quiet) as sample:
        assert sample.scale == 6 and 180 <= len(sample.batches.source) <= 200
        assert sample.recipe.objective.constraints.class_names == ("bad", "good")
    found = estimate(recipe, timed=False, log=quiet)
    assert found.data_tokens == pytest.approx(whole.data_tokens, rel=0.05)
    assert "each 6th record" in found.data and "all of the data" in whole.data


@pytest.mark.slow
def test_timed_steps_are_kept(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second dry run times nothing, and one with other rows does."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    device.record_speed("peak cpu fp32", 1e12)
    calls: list[int] = []

    def times(model: LM, recipe: Recipe, *_: object) -> StepTimes:
        calls.append(recipe.batch.size)
        return StepTimes(1e-10 * len(calls), 1e-3, 0.0, 2)

    monkeypatch.setattr("firth.runs.step_estimate.time_steps", times)
    first, second, other = (estimate(tiny(text, "precision=fp32", f"batch.size={n}"), log=quiet) for n in (4, 4, 8))
    assert calls == [4, 8]
    assert first.step_seconds == second.step_seconds != other.step_seconds
    assert "timed on" in second.timing and "timed on" not in first.timing
    (tmp_path / "steps.json").write_text("{damaged")
    estimate(tiny(text, "precision=fp32"), log=quiet)
    assert calls == [4, 8, 4]


@pytest.mark.slow
def test_steps_of_a_busy_machine_are_timed_again(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Until none other uses the cores; the faster of two counts."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    monkeypatch.setattr("firth.runs.step_estimate.usable_cores", lambda: 2)
    device.record_speed("peak cpu fp32", 1e12)
    measured = iter([(2.0, 1.5), (3.0, 1.0), (1.0, 0.1)])

    def times(*_: object) -> StepTimes:
        optimizer, others = next(measured)
        return StepTimes(0.0, optimizer, 0.0, 2, others)

    monkeypatch.setattr("firth.runs.step_estimate.time_steps", times)
    with prepared(tiny(text, "precision=fp32"), quiet) as run:
        found = [step_seconds(lambda _: None, run.recipe, run.batches, 1e9, 1) for _ in range(4)]
    assert [seconds for seconds, _ in found] == [2.0, 2.0, 1.0, 1.0]
    busy = "while other processes used 1.5 of 2 cores"
    assert [busy in how for _, how in found] == [True, True, False, False]
    assert ["timed on" in how for _, how in found] == [False, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "sampled"), [(3, 3), (99, 12)])
def test_a_short_run_is_sampled_whole(text: Path, steps: int, sampled: int) -> None:
    """The batches are those that it trains on, in their order; of a longer run they are the first ones."""
    with prepared(tiny(text, f"max_steps={steps}"), quiet) as run:
        found, _ = run.sample()
        expected = [run.batches.batches(step) for step in range(sampled)]
    assert len(found) == sampled
    for own, other in zip(found, expected, strict=True):
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(own, other, strict=True))
