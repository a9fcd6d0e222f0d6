"""Stages that make training records, with a model that replies by rules."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firth.evaluate.prompting.requests import (
    GenerateReply,
    GenerateRequest,
    Reply,
    Request,
    ScoreReply,
    ScoreRequest,
    sample_seed,
)
from firth.pipelines import rationales
from firth.pipelines import stage as stage_module
from firth.pipelines.ai_feedback import JudgePairs, ReviseAnswers, answer_pairs
from firth.pipelines.best_of_n import SampleAnswers
from firth.pipelines.rationales import SampleRationales
from firth.types import UserError
from tests.support.samples import sample_number

SUMS = """task: sums
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
num_fewshot: 1
filter_list: [{name: none, filter: [{function: regex, regex_pattern: "#### ([0-9]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, regexes_to_ignore: ["(?s).*#### "]}]
"""


class RuleModel:
    """A model that replies by functions of the request."""

    name, weights, digest, context = "rules", "fp32", "1" * 32, 10_000

    def __init__(
        self, write: Callable[[GenerateRequest], str], logprob: Callable[[ScoreRequest], float] = lambda _: 0.0
    ):
        self.write, self.logprob = write, logprob
        self.requests: list[Request] = []

    def count_tokens(self, text: str, chat: bool = False) -> int:
        return len(text.split())

    def check(self, requests: Sequence[Request]) -> None:
        """Every request fits."""

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.requests += requests
        for i, request in enumerate(requests):
            if isinstance(request, ScoreRequest):
                yield i, ScoreReply((self.logprob(request),), greedy=False)
            else:
                yield i, GenerateReply(self.write(request), "stop")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[RuleModel], RuleModel]:
    """Let every stage ask a given model, with an empty cache of replies."""
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))

    def use(model: RuleModel) -> RuleModel:
        for module in (stage_module, rationales):
            monkeypatch.setattr(module, "open_responder", lambda name, weights="", scored=False: model)
        return model

    return use


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_sampled_with_a_seed_each(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    model = use(RuleModel(lambda request: f" {request.prompt} {request.seed} "))
    seeds = {prompt: [sample_seed(3, prompt, number) for number in range(2)] for prompt in "ab"}
    assert len({seed for pair in seeds.values() for seed in pair}) == 4
    data = write(tmp_path / "p.jsonl", {"prompt": "a", "gold": 1}, {"messages": [{"role": "user", "content": "b"}]})
    summary = SampleAnswers(model="m", data=(data,), num_samples=2, seed=3).run(tmp_path)
    rows = read(tmp_path / "answers.jsonl")
    assert rows[0] == {"prompt": "a", "gold": 1, "samples": [f"a {seed}" for seed in seeds["a"]]}
    assert rows[1]["samples"] == [f"b {seed}" for seed in seeds["b"]]
    assert summary == {"prompts": 2, "answers": 4, "different": 1.0, "finished": 1.0}
    assert all(isinstance(request, GenerateRequest) and request.chat for request in model.requests)


def test_a_prompt_of_several_messages_is_rejected_with_its_line(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel]
) -> None:
    use(RuleModel(str))
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    data = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": turns})
    with pytest.raises(UserError, match=r"p\.jsonl:2: the prompt must be one message of the user"):
        SampleAnswers(model="m", data=(data,)).run(tmp_path)


def test_a_judge_without_bias_labels_every_pair(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    """The judge prefers the longer answer, whatever its place."""

    def logprob(request: ScoreRequest) -> float:
        first, second = (
            part.partition("\n\n")[0] for part in request.prompt.split("Answer A: ")[1].split("Answer B: ")
        )
        return float((len(first) > len(second)) == (request.continuation == " A"))

    use(RuleModel(str, logprob))
    data = write(
        tmp_path / "a.jsonl",
        {"prompt": "q", "samples": ["long one", "no", "no"]},
        {"prompt": "r", "chosen": "this is right", "rejected": "wrong"},
        {"prompt": "s", "chosen": "right", "rejected": "this is wrong"},
    )
    summary = JudgePairs(data=(data,), model="m").run(tmp_path)
    rows = read(tmp_path / "preferences.jsonl")
    assert rows[0] == {"prompt": "q", "chosen": "long one", "rejected": "no", "log_odds": 1.0}
    assert [row["chosen"] for row in rows] == ["long one", "this is right", "this is wrong"]
    assert summary["pairs"] == summary["labeled"] == 3 and summary["ties"] == 0 and summary["share of A"] == 0.5
    assert summary["agreement"] == 0.5 and summary["agreement, standard error"] == pytest.approx(math.sqrt(0.125))


def test_a_judge_that_looks_at_the_place_labels_nothing(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    use(RuleModel(str, lambda request: float(request.continuation == " A")))
    data = write(tmp_path / "a.jsonl", {"prompt": "q", "samples": ["x", "yy", "zzz"]})
    with pytest.raises(UserError, match="same position in both orders of all 3 pairs"):
        JudgePairs(data=(data,), model="m", principles=("One.", "Two.")).run(tmp_path)


def test_pairs_need_two_different_answers(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "q", "samples": ["x", "x"]})
    with pytest.raises(UserError, match="no two different answers"):
        list(answer_pairs([data]))


def test_messages_stay_messages(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    """A prompt of several turns is written as it was read, and the judge sees the role of each."""
    prompt = [
        {"role": role, "content": text}
        for role, text in (("system", "S"), ("user", "Hi"), ("assistant", "A"), ("user", "B"))
    ]
    data = write(tmp_path / "a.jsonl", {"prompt": prompt, "chosen": "yes indeed", "rejected": "no"})
    model = use(RuleModel(str, lambda request: float(("A: yes" in request.prompt) == (request.continuation == " A"))))
    JudgePairs(data=(data,), model="m").run(tmp_path)
    [row] = read(tmp_path / "preferences.jsonl")
    assert row["prompt"] == prompt and row["chosen"] == "yes indeed" and row["rejected"] == "no"
    assert "system: S\n\nuser: Hi\n\nassistant: A\n\nuser: B" in model.requests[0].prompt


def test_an_endpoint_gets_plain_text(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    model = use(RuleModel(str, lambda request: float(("A: x" in request.prompt) == (request.continuation == " A"))))
    data = write(tmp_path / "a.jsonl", {"prompt": "q", "samples": ["x", "y"]})
    JudgePairs(data=(data,), model="openai:http://127.0.0.1:1/v1").run(tmp_path)
    assert not any(request.chat for request in model.requests)


def test_samples_need_a_prompt(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"samples": ["x", "y"]})
    with pytest.raises(UserError, match=r"a\.jsonl:1: the record has samples, and no prompt"):
        list(answer_pairs([data]))


def test_the_label_does_not_follow_from_the_order(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", *({"prompt": "q", "chosen": "c", "rejected": "r"} for _ in range(4)))
    assert [(pair.first, pair.truth) for pair in answer_pairs([data])] == [("c", True), ("r", False)] * 2


def test_revisions_are_preferred_over_the_answers(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    def reply(request: GenerateRequest) -> str:
        if "Criticism: too short" in request.prompt:
            return "same" if "Request: keep" in request.prompt else "a longer answer"
        return "too short" if "what is wrong" in request.prompt else "same"

    use(RuleModel(reply))
    data = write(tmp_path / "p.jsonl", {"prompt": "tell"}, {"prompt": "keep"})
    summary = ReviseAnswers(model="m", data=(data,), principles=("Be long.",)).run(tmp_path)
    assert read(tmp_path / "revisions.jsonl") == [
        {
            "prompt": "tell",
            "chosen": "a longer answer",
            "rejected": "same",
            "critique": "too short",
            "principle": "Be long.",
        }
    ]
    assert summary == {"prompts": 2, "revised": 1, "unchanged": 1}


@pytest.fixture
def sums(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "sums.yaml").write_text(SUMS)
    data = write(
        tmp_path / "q.jsonl",
        {"question": "1 + 1?", "answer": "One more is 2.\n#### 2"},
        {"question": "2 + 2?", "answer": "Two more is 4.\n#### 4"},
    )
    examples = write(tmp_path / "e.jsonl", {"question": "0 + 3?", "answer": "Nothing more.\n#### 3"})
    return {"model": "m", "task": str(tmp_path / "sums.yaml"), "data": (data,), "examples": (examples,)}


def votes(request: GenerateRequest) -> str:
    """Three of four samples of the first question say 2, one says 3; those of the second one say 5, 5, 6 and nothing."""
    answer = "2223" if "1 + 1" in request.prompt else "556-"
    sample = sample_number(request)
    number = answer[sample]
    return "I do not know." if number == "-" else f" Way {sample % 2}.\n#### {number}"


def test_the_majority_is_kept_without_gold_answers(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel], sums: dict[str, Any]
) -> None:
    """LMSI: different rationales that reach the most frequent answer, with the question alone as the prompt."""
    model = use(RuleModel(votes))
    summary = SampleRationales(**sums, num_samples=4, min_share=0.6).run(tmp_path)
    assert read(tmp_path / "rationales.jsonl") == [
        {"prompt": "Question: 1 + 1?\nAnswer:", "completion": f"Way {way}.\n#### 2"} for way in (0, 1)
    ]
    assert summary["kept questions"] == 1 and summary["accuracy of the majority"] == 0.5
    assert summary["accuracy of a sample"] == pytest.approx(3 / 8)
    assert all(isinstance(one, GenerateRequest) and "0 + 3?" in one.prompt for one in model.requests)


def test_correct_rationales_and_hints(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel], sums: dict[str, Any]
) -> None:
    """STaR: the hint is in the prompt that is sent, in its examples too, and not in the record."""

    def reply(request: GenerateRequest) -> str:
        return "Told.\n#### 4" if "(Hint: the answer is 4.)" in request.prompt else votes(request)

    model = use(RuleModel(reply))
    summary = SampleRationales(**sums, num_samples=4, keep="correct", rationalize=True).run(tmp_path)
    rows = read(tmp_path / "rationales.jsonl")
    assert rows[-1] == {"prompt": "Question: 2 + 2?\nAnswer:", "completion": "Told.\n#### 4"}
    assert len(rows) == 3 and summary["rationalized questions"] == 1
    hinted = [one.prompt for one in model.requests if isinstance(one, GenerateRequest) and "Hint" in one.prompt]
    assert len(hinted) == 4 and all("0 + 3?\nAnswer: (Hint: the answer is 3.)" in prompt for prompt in hinted)


def test_examples_show_the_rationales_of_the_task(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    model = use(RuleModel(lambda _: "One more. The answer is 2."))
    data = write(tmp_path / "q.jsonl", {"question": "1 + 1?", "answer": "2"})
    examples = write(tmp_path / "e.jsonl", {"question": "0 + 3?", "answer": "3", "rationale": "Nothing more."})
    stage = SampleRationales(model="m", task="arithmetic", data=(data,), examples=(examples,), shots=1, num_samples=2)
    stage.run(tmp_path)
    [request, _] = model.requests
    assert isinstance(request, GenerateRequest) and request.max_new_tokens == 128
    assert "0 + 3?\nAnswer: Nothing more. The answer is 3." in request.prompt
    assert [row["completion"] for row in read(tmp_path / "rationales.jsonl")] == ["One more. The answer is 2."]


def test_answers_that_the_metric_holds_for_equal_are_one_vote(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel]
) -> None:
    """gsm8k reads "42." and "$42", and its metric ignores the point and the sign."""
    texts = ["The answer is 42.", "It costs $42", "So 43", "#### 42"]
    data = write(tmp_path / "q.jsonl", {"question": "How much?", "answer": "Count.\n#### 42"})
    examples = write(tmp_path / "e.jsonl", {"question": "0 + 3?", "answer": "Nothing.\n#### 3"})
    settings = {"model": "m", "task": "gsm8k", "data": (data,), "examples": (examples,), "shots": 1, "num_samples": 4}
    for settings["keep"] in ("majority", "correct"):
        replies = iter(texts)
        use(RuleModel(lambda _, replies=replies: next(replies)))  # type: ignore[misc]
        summary = SampleRationales(**settings).run(tmp_path)
        rows = read(tmp_path / "rationales.jsonl")
        assert [row["completion"] for row in rows] == [texts[0], texts[1], texts[3]], settings["keep"]
        assert summary["accuracy of the majority"] == 1 and summary["accuracy of a sample"] == 0.75


def test_rationales_that_repeat_the_hint_are_left_out(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel], sums: dict[str, Any]
) -> None:
    def reply(request: GenerateRequest) -> str:
        repeated = "(Hint: the answer is 4.) " * (sample_number(request) > 0)
        return f"{repeated}Two and two.\n#### 4" if "(Hint: the answer is 4.)" in request.prompt else votes(request)

    use(RuleModel(reply))
    SampleRationales(**sums, num_samples=4, keep="correct", rationalize=True).run(tmp_path)
    rows = [row for row in read(tmp_path / "rationales.jsonl") if "2 + 2" in row["prompt"]]
    assert [row["completion"] for row in rows] == ["Two and two.\n#### 4"]


def test_the_description_of_a_task_is_part_of_the_record(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel], sums: dict[str, Any]
) -> None:
    """The record has the prompt that an evaluation without examples sends."""
    (tmp_path / "sums.yaml").write_text("description: 'Add.\n\n'\n" + SUMS)
    model = use(RuleModel(votes))
    SampleRationales(**sums, num_samples=4, shots=0).run(tmp_path)
    prompts = {request.prompt for request in model.requests if isinstance(request, GenerateRequest)}
    assert {row["prompt"] for row in read(tmp_path / "rationales.jsonl")} <= prompts


def test_written_examples_are_left_out_without_shots(
    tmp_path: Path, use: Callable[[RuleModel], RuleModel], sums: dict[str, Any]
) -> None:
    (tmp_path / "shots.txt").write_text("Question: 0 + 9?\nAnswer: Nine.\n#### 9\n")
    for shots, shown in ((-1, True), (0, False)):
        model = use(RuleModel(votes))
        settings = {**sums, "examples": (str(tmp_path / "shots.txt"),), "shots": shots, "seed": shots + 1}
        SampleRationales(**settings, num_samples=4).run(tmp_path)
        assert model.requests and all(("0 + 9?" in request.prompt) == shown for request in model.requests)


def test_no_rationale_is_an_error(tmp_path: Path, use: Callable[[RuleModel], RuleModel], sums: dict[str, Any]) -> None:
    use(RuleModel(lambda _: "I do not know."))
    with pytest.raises(UserError, match="no rationale of 2 questions was kept"):
        SampleRationales(**sums).run(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rationalize": True}, "rationalize=true needs the gold answers of keep=correct"),
        ({"num_samples": 1}, "keep=majority needs num_samples of 2 or more"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleRationales(model="m", task="gsm8k", **settings).check()


def test_replies_are_kept(tmp_path: Path, use: Callable[[RuleModel], RuleModel]) -> None:
    """A stage that is run again asks nothing again."""
    data = write(tmp_path / "p.jsonl", {"prompt": "a"})
    stage = SampleAnswers(model="m", data=(data,), num_samples=3)
    rng = np.random.default_rng(0)
    first = use(RuleModel(lambda _: str(rng.integers(1000))))
    stage.run(tmp_path)
    before = read(tmp_path / "answers.jsonl")
    second = use(RuleModel(lambda _: "other"))
    stage.run(tmp_path)
    assert len(first.requests) == 3 and second.requests == [] and read(tmp_path / "answers.jsonl") == before
