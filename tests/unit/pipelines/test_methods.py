"""The methods of `firth compare --methods`: which stages they need, and what is an error."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.pipelines.frontier import CompareMethods, Mean, MethodResult, printed
from firth.pipelines.pipeline import METHODS, TRAINED, load_methods
from firth.types import UserError

BASE = ["model=m", "dialogues=d.jsonl", "comparisons=c.jsonl", "test=t.jsonl"]


def table(methods: list[str], *more: str) -> CompareMethods:
    stage = load_methods(methods, [*BASE, *more], Path("out")).stages["table"]
    assert isinstance(stage, CompareMethods)
    return stage


def test_each_method_adds_its_stage() -> None:
    """Only PPO and GRPO read prompts; the reference and the reward model are always there."""
    assert [*load_methods(["dpo"], BASE, Path("out")).stages] == ["sft", "reward_model", "dpo", "table"]
    assert [*load_methods(["sft", "prompt"], BASE, Path("out")).stages] == ["sft", "reward_model", "table"]
    every = load_methods(METHODS, [*BASE, "prompts=p.jsonl"], Path("out")).stages
    assert [*every] == ["sft", "reward_model", *TRAINED, "table"]
    with pytest.raises(UserError, match="prompts for PPO and GRPO"):
        load_methods(["grpo"], BASE, Path("out"))


def test_the_table_has_the_chosen_methods() -> None:
    assert table(["dpo"]).models == ("out/dpo",) and table(["dpo"]).prompt == "" and table(["dpo"]).best_of == ()
    assert table(["prompt"]).prompt == "m" and table(["prompt"]).models == ()
    assert table(["best-of-n"]).best_of == CompareMethods.best_of
    assert table(["best-of-n"], "table.best_of=[2]").best_of == (2,)


def test_methods_that_do_not_exist() -> None:
    for methods in (["dpo", "gpo"], [""]):
        with pytest.raises(
            UserError, match=r"there is no method .*: choose from prompt, sft, best-of-n, dpo, ppo, grpo"
        ):
            load_methods(methods, BASE, Path("out"))
    with pytest.raises(UserError, match="there is no field 'budgt'"):
        load_methods(["sft"], [*BASE, "sft.budgt.max_steps=3"], Path("out"))
    result = CliRunner().invoke(app, ["compare", "--methods", "dpo", "--max-seconds", "5", *BASE])
    assert isinstance(result.exception, UserError) and "ppo.max_steps=N" in str(result.exception)


def test_printed_columns_are_those_with_numbers() -> None:
    found = [
        MethodResult("sft", Mean(0.25, 0.1), None, kl=0.0, minutes=2.0),
        MethodResult("best of 4", Mean(1.0, 0.1), None, kl=0.636),
    ]
    assert printed(found).splitlines() == [
        "method     reward  ± se     KL  minutes",
        "sft          0.25   0.1    0.0      2.0",
        "best of 4     1.0   0.1  0.636         ",
    ]
