"""Pipelines that train: InstructGPT's stages and self-improvement, on untrained models of a few thousand parameters."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firth.cli import app
from firth.evaluate.prompting.requests import Reply, Request, ScoreReply, ScoreRequest
from firth.evaluate.prompting.responders import LocalModel
from firth.model.config import decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pipelines import stage as stage_module
from firth.pretrained.load_save import save_model
from firth.tokenizer.train import train as train_tokenizer
from firth.types import UserError

WORDS = ["the", "otter", "paints", "a", "boat", "while", "every", "heron", "counts", "red", "stones", "near", "their"]
SHORT = ["max_steps=2", "batch.size=4", "evaluation.max_examples=4"]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write an untrained decoder and records, and work in their directory with an empty cache."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(64)]
    tokenizer = train_tokenizer(iter(texts), "byte-bpe", 420)
    torch.manual_seed(0)
    config = decoder_config(
        vocab_size=tokenizer.vocab.size, hidden_size=32, num_layers=2, num_heads=2, max_positions=256
    )
    model = LM(config, {"lm": LMHead(config)})
    for weight in model.parameters():  # projections start at zero, with which no prompt changes an answer
        nn.init.normal_(weight, std=0.2)
    save_model(model, tokenizer, tmp_path / "model")
    write(
        tmp_path / "dialogues.jsonl",
        [{"prompt": a, "completion": b} for a, b in zip(texts[:32], texts[32:], strict=True)],
    )
    write(
        tmp_path / "pairs.jsonl",
        [{"prompt": texts[i], "chosen": texts[i + 1], "rejected": texts[i + 2]} for i in range(24)],
    )
    write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts[:16]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def firth(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    return result.output


def test_instruct_gpt(workdir: Path) -> None:
    """SFT, a reward model and PPO in one command; the second call trains nothing."""
    short = [f"{stage}.{one}" for stage in ("sft", "reward_model", "ppo") for one in SHORT]
    rollouts = ["examples.rollout_size=8", "examples.num_epochs=1", "examples.max_new_tokens=4"]
    arguments = [
        "pipeline", "instruct_gpt", "model=model", "dialogues=dialogues.jsonl", "comparisons=pairs.jsonl", "prompts=prompts.jsonl",
        *short, *(f"ppo.{one}" for one in rollouts), "--out", "out",
    ]  # fmt: skip
    shown = firth(*arguments)
    assert "stage 3 of 3: ppo (train)" in shown and "Report: out/report.html" in shown
    for stage in ("sft", "reward_model", "ppo"):
        assert json.loads((workdir / "out" / stage / "stage.json").read_text())["summary"]["steps"] == 2
        assert (workdir / "out" / stage / "model" / "config.json").is_file()
    again = firth(*arguments)
    assert again.count("is finished") == 3 and "step" not in again


def test_methods_side_by_side(workdir: Path) -> None:
    """The reference has no divergence from itself, best-of-n gains reward, and the page has both frontiers."""
    (workdir / "side_rewards.py").write_text("def letters(completion): return float(completion.count('e'))\n")
    stages = ("sft", "reward_model", "dpo", "ppo", "grpo")
    short = [f"{stage}.{one}" for stage in stages for one in SHORT]
    rollouts = ["examples.rollout_size=8", "examples.num_epochs=1", "examples.max_new_tokens=4"]
    shown = firth(
        "pipeline", "side_by_side", "model=model", "dialogues=dialogues.jsonl", "comparisons=pairs.jsonl", "prompts=prompts.jsonl",
        "test=prompts.jsonl", "truth=side_rewards:letters", *short, *(f"{stage}.{one}" for stage in ("ppo", "grpo") for one in rollouts),
        "table.max_new_tokens=8", "--out", "out",
    )  # fmt: skip
    assert "stage 6 of 6: table (frontier)" in shown
    results = {one["method"]: one for one in json.loads((workdir / "out" / "table" / "results.json").read_text())}
    assert [*results] == ["sft", "prompt", "dpo", "ppo", "grpo", "best of 4", "best of 16"]
    assert results["sft"]["kl"] == pytest.approx(0, abs=1e-6) and results["prompt"]["kl"] > 0
    assert results["sft"]["reward"][0] < results["best of 4"]["reward"][0] < results["best of 16"]["reward"][0]
    assert results["ppo"]["steps"] == 2 and results["best of 4"]["steps"] is None
    assert {name: one["samples"] for name, one in results.items()} == {
        "sft": None, "prompt": None, "dpo": None, "ppo": 8, "grpo": 8, "best of 4": 4, "best of 16": 16,
    }  # fmt: skip
    page = (workdir / "out" / "table" / "report.html").read_text()
    assert page.count("KL from the reference") >= 2 and "best of 16" in page


def test_chosen_methods_are_compared(workdir: Path) -> None:
    """Nothing is trained for the other methods; the second call trains nothing at all."""
    arguments = [
        "compare", "--methods", "prompt, grpo", "model=model", "dialogues=dialogues.jsonl", "comparisons=pairs.jsonl",
        "prompts=prompts.jsonl", "test=prompts.jsonl", *(f"{stage}.{one}" for stage in ("sft", "reward_model", "grpo") for one in SHORT),
        "grpo.examples.rollout_size=8", "grpo.examples.max_new_tokens=4", "table.max_new_tokens=8",
    ]  # fmt: skip
    shown = firth(*arguments)
    out = workdir / "runs" / "methods"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["grpo", "reward_model", "sft", "table"]
    lines = shown[shown.index("\nmethod") :].splitlines()
    assert lines[1].split()[:6] == ["method", "reward", "±", "se", "KL", "tokens"], "no true reward was given"
    assert [line.split()[0] for line in lines[2:5]] == ["sft", "prompt", "grpo"]
    assert "Report: runs/methods/table/report.html" in lines[5]
    results = json.loads((out / "table" / "results.json").read_text())
    assert [one["samples"] for one in results] == [None, None, 8]
    assert float(lines[4].split()[1]) == pytest.approx(results[2]["reward"][0], abs=1e-4)
    assert firth(*arguments).count("is finished") == 4


def test_stages_choose_the_data_type_of_the_weights(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the message on bf16 weights says what to set, and it is a field of every stage that asks a model."""
    opened = []

    def recorded(directory: Path, weights: object = None) -> None:
        opened.append(weights)
        raise UserError("stopped")

    monkeypatch.setattr(LocalModel, "open", recorded)
    stages = {"sample": "prompts.jsonl", "judge": "pairs.jsonl", "revise": "prompts.jsonl"}
    for kind, data in stages.items():
        arguments = ["pipeline", kind, f"data={data}", "model=model"]
        for more in (["weights=fp32"], []):
            assert str(CliRunner().invoke(app, [*arguments, *more]).exception) == "stopped"
        wrong = CliRunner().invoke(app, [*arguments, "weights=fp64"])
        assert isinstance(wrong.exception, UserError) and "weights" in str(wrong.exception)
    assert opened == ["fp32", stage_module.fast_weights] * 3


class LongerIsBetter:
    """A judge that prefers the longer answer, wherever it is."""

    name, weights, digest, context = "judge", "fp32", "2" * 32, 10_000

    def count_tokens(self, text: str, chat: bool = False) -> int:
        return len(text.split())

    def check(self, requests: Sequence[Request]) -> None:
        """Every request fits."""

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for i, request in enumerate(requests):
            assert isinstance(request, ScoreRequest)
            first, second = request.prompt.split("Answer A: ")[1].split("\n\nAnswer B: ")
            longer = len(first) > len(second.partition("\n\nWhich")[0])
            yield i, ScoreReply((float(longer == (request.continuation == " A")),), greedy=False)


def test_ai_feedback(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's decisions become DPO's preferences."""
    opened = stage_module.open_responder
    monkeypatch.setattr(
        stage_module,
        "open_responder",
        lambda name, weights="", scored=False: LongerIsBetter() if name == "judge" else opened(name, weights),
    )
    short = [f"dpo.{one}" for one in ("max_steps=2", "batch.size=2", "evaluation.max_examples=2", "evaluation.every=2")]
    shown = firth(
        "pipeline", "rlaif", "model=model", "judge=judge", "prompts=prompts.jsonl", "answers.max_new_tokens=5", *short, "--out", "out"
    )  # fmt: skip
    answers = [json.loads(line) for line in (workdir / "out" / "answers" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 16 and all(len(one["samples"]) == 4 for one in answers)
    summary = json.loads((workdir / "out" / "preferences" / "stage.json").read_text())["summary"]
    assert summary["labeled"] + summary["ties"] == summary["pairs"] and summary["labeled"] > 0
    assert "stage 3 of 3: dpo (train)" in shown


def test_one_stage_from_the_command_line(workdir: Path) -> None:
    shown = firth(
        "pipeline", "sample", "model=model", "data=prompts.jsonl", "max_new_tokens=3", "limit=2", "--out", "one"
    )
    assert "one/answers.jsonl" in shown and len((workdir / "one" / "answers.jsonl").read_text().splitlines()) == 2
    failed = CliRunner().invoke(app, ["pipeline", "sample", "model=model", "dat=prompts.jsonl", "--out", "two"])
    assert failed.exit_code != 0 and "dat" in str(failed.exception)
    failed = CliRunner().invoke(app, ["pipeline", "train", "init_from=model", "--out", "two"])
    assert "use `firth train RECIPE" in str(failed.exception)
    assert not (workdir / "two").exists()
    write(workdir / "long.jsonl", [{"prompt": "the"}, {"prompt": "the otter " * 200}])
    failed = CliRunner().invoke(app, ["pipeline", "sample", "model=model", "data=long.jsonl", "--out", "two"])
    assert "long.jsonl:2: the prompt has 4" in str(failed.exception) and "reads 25" in str(failed.exception)
