"""The model with which prompts and metrics are compared with BIG-bench's own code."""

import json
from pathlib import Path

from bench.interop.bigbench import RandomModel
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_formats import read_bigbench


def test_the_random_model_replies_to_tasks(tmp_path: Path) -> None:
    """It scores choices and writes answers, the same for BIG-bench as for firth."""
    examples = [{"input": f"{i}?", "target": "up", "target_scores": {"up": i % 2, "down": 1 - i % 2}} for i in range(8)]
    task = {"name": "t", "metrics": ["multiple_choice_grade", "exact_str_match"], "examples": examples}
    (tmp_path / "task.json").write_text(json.dumps(task))
    model = RandomModel(["up", "down"])
    choices, texts = run_tasks(read_bigbench(tmp_path / "task.json"), model, PromptConfig(shots=0))
    assert len(choices.items) == len(texts.items) == 8
    for item in choices.items:
        assert list(item.replies) == model.cond_log_prob([item.prompt], [["up", "down"]])[0]
    for item in texts.items:
        assert item.replies == [model.write(item.prompt, ["\n\nQ:"])]
