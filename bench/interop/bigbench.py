"""Read all task.json files of BIG-bench, and compare prompts and metrics with BIG-bench's own code.

    pip download --no-deps --no-binary :all: bigbench==1.0.0 && tar xf bigbench-1.0.0.tar.gz
    python -m bench.interop.bigbench bigbench-1.0.0 --compare 300

The code of BIG-bench needs TensorFlow, t5 and datasets only for their names here: they are replaced by empty modules, and t5's BLEU
and ROUGE by sacrebleu and rouge-score with t5's settings. Both sides get the replies of one model of random answers, without examples.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.prompts import without_lone_surrogates
from firth.evaluate.prompting.requests import GenerateReply, Reply, Request, ScoreReply, ScoreRequest
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_formats import read_bigbench
from firth.types import LOGGER, UserError

MAX_COMPARED_BYTES = 200_000
"""Larger files are not compared."""
MAX_EXAMPLES = 60
"""Examples of a file that are compared, and rendered by the survey."""


class RandomModel:
    """A model whose log-probabilities and answers are hashes of its prompts."""

    name, digest, weights, context = "random", "0" * 32, "", 1 << 30

    def __init__(self, targets: Sequence[str]) -> None:
        self.targets = targets

    def count_tokens(self, text: str, chat: bool = False) -> int:
        """Return 1."""
        return 1

    def check(self, requests: Sequence[Request]) -> None:
        """Accept every request."""

    def score(self, prompt: str, continuation: str) -> float:
        """Return a log-probability."""
        text = (prompt[-40:] + continuation).encode("utf-8", "surrogatepass")
        return -float(int.from_bytes(hashlib.sha256(text).digest()[:4], "big")) / 1e9

    def write(self, prompt: str, stops: Sequence[str]) -> str:
        """Return the whole or half of some target, often with more text after it."""
        rng = random.Random(prompt[-200:])
        words = rng.choice(self.targets).split(" ")
        text = " ".join(words if rng.random() < 0.5 else words[: max(1, len(words) // 2)])
        text = rng.choice(("\n", " ", " ")) + text + rng.choice(("", ". And so on!"))
        ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies of firth's requests."""
        for i, request in enumerate(requests):
            if isinstance(request, ScoreRequest):
                yield i, ScoreReply((self.score(request.prompt, request.continuation),), False)
            else:
                yield i, GenerateReply(self.write(request.prompt, request.stop), "stop")

    def cond_log_prob(self, inputs: Sequence[str], targets: Sequence[Sequence[str]], **_: Any) -> list[list[float]]:
        """Return the log-probabilities that BIG-bench wants."""
        return [[self.score(text, one) for one in some] for text, some in zip(inputs, targets, strict=True)]

    def generate_text(self, inputs: Sequence[str], stop_string: str | None, output_regex: str | None) -> list[str]:
        """Return the answers that BIG-bench wants, which its models cut themselves."""
        texts = [self.write(text, [stop_string or ""]) for text in inputs]
        if output_regex:
            texts = [found.group(0) if (found := re.search(output_regex, text)) else "" for text in texts]
        return [text.strip() for text in texts]


def their_code(source: Path) -> Any:
    """Return BIG-bench's module `json_task`, with its heavy imports replaced."""
    import sacrebleu
    from rouge_score import rouge_scorer

    def bleu(targets: Sequence[Sequence[str]], texts: Sequence[str]) -> dict[str, float]:
        return {"bleu": sacrebleu.corpus_bleu(texts, targets, smooth_method="exp", tokenize="intl").score}

    def rouge(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        names = ("rouge1", "rouge2", "rougeLsum")
        scorer = rouge_scorer.RougeScorer(names)
        pairs = [(a.replace(" . ", " .\n"), b.replace(" . ", " .\n")) for a, b in zip(targets, texts, strict=True)]
        return {name: 100 * float(np.mean([scorer.score(*pair)[name].fmeasure for pair in pairs])) for name in names}

    def sequence_accuracy(targets: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
        return {"sequence_accuracy": 100 * float(np.mean([a == b for a, b in zip(targets, texts, strict=True)]))}

    metrics = {"bleu": bleu, "rouge": rouge, "sequence_accuracy": sequence_accuracy}
    stubs: dict[str, dict[str, Any]] = {
        "tensorflow": {}, "tensorflow.compat": {}, "tensorflow.compat.v1": {}, "tensorflow.compat.v2": {}, "t5": {},
        "t5.evaluation": {}, "t5.evaluation.metrics": metrics, "datasets": {"load_metric": None}, "bigbench": {},
        "bigbench.benchmark_tasks": {}, "bigbench.api.results": {"add_aggregate_scores": None},
    }  # fmt: skip
    for name, members in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(members, __path__=[])
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)
    sys.modules["bigbench"].__path__ = [str(source / "bigbench")]
    from bigbench.api import json_task  # type: ignore[import-not-found]

    return json_task


def survey(files: Sequence[Path]) -> None:
    """Print how many files are read, what they need of a model, and why the others are not read."""
    kinds: collections.Counter[str] = collections.Counter()
    for file in files:
        try:
            if "examples" not in json.loads(file.read_text("utf-8")):
                kinds["without examples: a directory of tasks" if [*file.parent.glob("*/task.json")] else "empty"] += 1
                continue
            tasks = read_bigbench(file)
            for task in tasks:
                task.check(PromptConfig(limit=MAX_EXAMPLES))
            kinds[" and ".join(sorted(task.output_type for task in tasks))] += 1
        except UserError as error:
            kinds["not read"] += 1
            print(error)
    for kind, count in kinds.most_common():
        print(f"{count:6,}  {kind}")


def compare(files: Sequence[Path], json_task: Any, folder: Path) -> None:
    """Print the number of prompts and metrics that differ between both."""
    prompts = values = different = 0
    for file in files:
        data = without_lone_surrogates(json.loads(file.read_text("utf-8")))
        data["examples"] = data["examples"][:MAX_EXAMPLES]
        (folder / "task.json").write_text(json.dumps(data), "utf-8")
        tasks = read_bigbench(folder / "task.json")
        model = RandomModel([target for item in tasks[0].items for target in item.fields["targets"]])
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = json_task.JsonTask(data)
            inputs = [theirs.task_prefix + sample["input"] for sample in theirs._ds]
            expected = theirs.evaluate_fixed_shot(model, 0)
        for result in run_tasks(tasks, model, PromptConfig(shots=0)):
            found = [item.prompt for item in result.items]
            prompts += len(found)
            if found != inputs:
                different += 1
                print(f"{file}: prompts differ")
            for name, value in result.metrics.items():
                values += 1
                if abs(expected.get(name, np.inf) - value.value) > 1e-6:
                    different += 1
                    print(f"{file}: {name} is {value.value}, and {expected.get(name)} in BIG-bench")
    print(f"{len(files):,} files, {prompts:,} prompts and {values:,} metrics compared: {different:,} differ")


def main() -> None:
    """Read the arguments and run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the unpacked source distribution of bigbench 1.0.0")
    parser.add_argument("--compare", type=int, default=300, help="files that are compared")
    parser.add_argument("--skip-survey", action="store_true", help="only compare")
    args = parser.parse_args()
    LOGGER.setLevel(logging.ERROR)
    files = sorted((args.source / "bigbench" / "benchmark_tasks").rglob("task.json"))
    if not args.skip_survey:
        survey(files)
    small = [file for file in files if os.path.getsize(file) < MAX_COMPARED_BYTES]
    texts = {file: file.read_text("utf-8") for file in small}
    small = [file for file in small if '"examples"' in texts[file] and '"bleurt"' not in texts[file]]
    random.Random(1).shuffle(small)
    with tempfile.TemporaryDirectory() as folder:
        compare(small[: args.compare], their_code(args.source), Path(folder))


if __name__ == "__main__":
    main()
