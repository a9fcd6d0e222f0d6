"""Compare `firth evaluate` with lm-evaluation-harness, item by item, on the same tasks, model and precision.

    python -m bench.interop.lm_eval --model DIR --mmlu QUESTIONS.jsonl --text TEXT.txt --limit 100

DIR is a directory that transformers loads (`firth import FILE.gguf DIR`). lm_eval 0.4.13 must be installed. Five tasks: MMLU's
format with five examples, minimal pairs, generated sums with examples, log-probability of the last words of sentences, and
perplexity of paragraphs. For each it prints the largest difference of a log-probability, the number of items with another
answer, and the CPU time of both, task by task in turns. Other work on the machine adds little to CPU time with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.responders import LocalModel
from firth.evaluate.prompting.runner import TaskResult, run_tasks
from firth.evaluate.prompting.task_files import BUILTIN, load_tasks
from firth.io.yaml_files import read_yaml
from firth.runs.loaded_model import fast_weights


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def paragraphs(text: Path, count: int) -> list[str]:
    """Return paragraphs of 200 to 1,000 characters, spread over a text."""
    found = [" ".join(one.split()) for one in text.read_text("utf-8").split("\n\n")]
    found = [one for one in found if 200 <= len(one) <= 1000]
    return [found[i * len(found) // count] for i in range(min(count, len(found)))]


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Return questions such as "17 + 5 ="."""
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 49), rng.randint(1, 49)) for _ in range(count)]
    return [{"question": f"{a} + {b} =", "answer": str(a + b)} for a, b in pairs]


def minimal_pairs(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the first sentence of each paragraph, and the same with two of its words exchanged."""
    rows = []
    for text in texts:
        words = text.split(". ")[0].split()
        if len(words) > 4:
            middle = len(words) // 2
            swapped = [*words[: middle - 1], words[middle], words[middle - 1], *words[middle + 1 :]]
            rows.append({"sentence_good": " ".join(words) + ".", "sentence_bad": " ".join(swapped) + "."})
    return rows


def last_words(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return paragraphs without their last word, and the word."""
    return [{"text": text.rpartition(" ")[0], "word": text.rpartition(" ")[2]} for text in texts]


def tasks(folder: Path, mmlu: Path, text: Path, limit: int) -> list[tuple[dict[str, Any], Path, Path, int]]:
    """Return (task file as data, questions, examples, shots) of five tasks."""
    questions = [json.loads(line) for line in mmlu.read_text("utf-8").splitlines()][:limit]
    texts = paragraphs(text, limit)
    shown = write_rows(folder / "mmlu-shown.jsonl", questions[-5:])
    mmlu_task = dict(read_yaml(BUILTIN / "mmlu.yaml")[0]) | {"task": "mmlu_format"}
    mmlu_task.pop("group_by")
    mmlu_task["description"] = "The following are multiple choice questions (with answers).\n\n"
    generated = {
        "task": "sums", "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "fewshot_delimiter": "\n", "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    }  # fmt: skip
    words = {
        "task": "last_words", "output_type": "loglikelihood", "doc_to_text": "text", "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }  # fmt: skip
    rolling = {
        "task": "paragraphs", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    pairs = dict(read_yaml(BUILTIN / "minimal_pairs.yaml")[0]) | {"task": "pairs"}
    none = write_rows(folder / "none.jsonl", [])
    return [
        (mmlu_task, write_rows(folder / "mmlu.jsonl", questions[:-5]), shown, 5),
        (pairs, write_rows(folder / "pairs.jsonl", minimal_pairs(texts)), none, 0),
        (
            generated,
            write_rows(folder / "sums.jsonl", sums(limit, 0)),
            write_rows(folder / "shown.jsonl", sums(8, 1)),
            8,
        ),
        (words, write_rows(folder / "words.jsonl", last_words(texts)), none, 0),
        (rolling, write_rows(folder / "texts.jsonl", [{"text": one} for one in texts]), none, 0),
    ]


def theirs(model: Any, task: dict[str, Any], data: Path, shown: Path, shots: int) -> tuple[list[dict[str, Any]], float]:
    """Return the samples of lm-evaluation-harness and its time."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = {"test": str(data)} | ({"train": str(shown)} if shots else {})
    config = dict(task) | {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    if shots:
        config |= {"fewshot_split": "train"}
    config["num_fewshot"] = shots
    start = time.process_time()
    found = lm_eval.simple_evaluate(
        model=model, tasks=[config], num_fewshot=shots, log_samples=True, bootstrap_iters=0, verbosity="ERROR",
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    spent = time.process_time() - start
    return sorted(found["samples"][task["task"]], key=lambda one: one["doc_id"]), spent


def ours(
    model: LocalModel, folder: Path, task: dict[str, Any], data: Path, shown: Path, shots: int
) -> tuple[TaskResult, float]:
    """Return the result of firth and its time."""
    path = folder / f"{task['task']}.yaml"
    path.write_text(json.dumps(task), "utf-8")  # JSON is YAML
    start = time.process_time()
    [result] = run_tasks(
        load_tasks(str(path), [str(data)], [str(shown)] if shots else []), model, PromptConfig(shots=shots)
    )
    return result, time.process_time() - start


def compare(result: TaskResult, samples: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Return the largest difference of a log-probability, and the number of items with another answer."""
    worst, other = 0.0, 0
    for item, sample in zip(result.items, samples, strict=True):
        replies = sample["resps"]
        if isinstance(item.replies[0], str):
            other += item.answers["none"] != sample["filtered_resps"][0]
            continue
        scores = [one[0][0] if isinstance(one[0], list | tuple) else one[0] for one in replies]
        scores = [float(score) for score in scores]
        worst = max(worst, *(abs(a - b) for a, b in zip(item.replies, scores, strict=True)))
        if len(scores) > 1:
            other += scores.index(max(scores)) != item.replies.index(max(item.replies))
    return worst, other


def main() -> None:
    """Run both on every task and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mmlu", type=Path, required=True, help="questions in MMLU's format, JSON lines")
    parser.add_argument("--text", type=Path, required=True, help="a plain text with paragraphs")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="batch size of lm_eval")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "default"), default="fp32",
        help="precision of both; default: of firth as measured, of lm_eval as stored",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="*", help="names of some of the tasks; all by default")
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    dtype = {"fp32": "float32", "bf16": "bfloat16", "default": "auto"}[options.dtype]
    peer = HFLM(pretrained=str(options.model), dtype=dtype, batch_size=options.batch, device="cpu")
    model = LocalModel.open(options.model, fast_weights if options.dtype == "default" else options.dtype)
    print(
        "| task | items | max difference of log p | other answers | lm_eval, s | firth, s | ratio |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, data, shown, shots in tasks(folder, options.mmlu, options.text, options.limit):
            if options.tasks and task["task"] not in options.tasks:
                continue
            result, mine = ours(model, folder, task, data, shown, shots)
            samples, spent = theirs(peer, task, data, shown, shots)
            worst, other = compare(result, samples)
            print(
                f"| {task['task']}, {shots} shots | {len(samples)} | {worst:.1e} | {other} | {spent:.1f} | {mine:.1f} | "
                f"{spent / mine:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
