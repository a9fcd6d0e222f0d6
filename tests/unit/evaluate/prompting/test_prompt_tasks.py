"""Tasks in prompts: what is requested, how replies are read, and what is wrong in a task file."""

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firth.evaluate.prompting.metrics import Filter, FilterChain
from firth.evaluate.prompting.prompt_task import MetricConfig, PromptConfig, PromptTask, majority
from firth.evaluate.prompting.prompts import ExamplePool, fit
from firth.evaluate.prompting.requests import (
    GenerateReply,
    GenerateRequest,
    Reply,
    ReplyCache,
    Request,
    ScoreReply,
    ScoreRequest,
)
from firth.evaluate.prompting.results import comparisons, paired_bootstrap, table, to_json, write_results
from firth.evaluate.prompting.runner import TaskResult, run_tasks, standard_error
from firth.evaluate.prompting.task_files import load_tasks, read_task
from firth.tokenizer import chat_template
from firth.types import UserError
from tests.support.fake_responder import FakeModel, items, one_result
from tests.support.samples import sample_number

CAPITALS = items(
    {"country": "Chad", "capital": "N'Djamena"},
    {"country": "Peru", "capital": "Lima"},
    {"country": "Fiji", "capital": "Suva"},
)
TASK = PromptTask(
    "capitals", CAPITALS, "generate_until", "Capital of {{country}}:", "capital", stop=("\n",), metrics=(MetricConfig("exact_match"),),
    filters=(FilterChain("none", (Filter("remove_whitespace"),)),),
)  # fmt: skip
CHOICE = PromptTask(
    "choice", items({"q": "x", "options": ["a", "bbbb", "cc"], "gold": "a"}, {"q": "y", "options": ["dd", "e"], "gold": 0}),
    "multiple_choice", "{{q}} is", "gold", choices="options", metrics=(MetricConfig("acc"), MetricConfig("acc_norm")),
)  # fmt: skip


def test_multiple_choice_takes_the_most_likely_choice() -> None:
    """The shortest choice is the most likely one here; acc_norm divides by its characters, where all choices tie."""
    model = FakeModel()
    result = one_result(CHOICE, model)
    assert [item.answers["none"] for item in result.items] == ["a", "e"]
    assert result.metrics["acc"].value == 0.5
    assert model.requests[0] == ScoreRequest("x is", " a")
    result = one_result(replace(CHOICE, target_delimiter=""), model)
    assert result.metrics["acc_norm"].value == 0, "a tie is wrong"


def test_a_choice_may_be_the_name_of_a_field() -> None:
    """lm-evaluation-harness takes the entries of a list as they are; templates are rendered."""
    record = {"q": "x", "A": "one", "B": "two", "gold": 1}
    task = replace(CHOICE, items=items(record), choices=("A", "B", "{{A}}"))
    assert task.choices_of(task.items[0]) == ["A", "B", "one"]
    model = FakeModel()
    assert one_result(task, model).items[0].gold == "B"
    assert [request.continuation for request in model.requests if isinstance(request, ScoreRequest)] == [
        " A",
        " B",
        " one",
    ]


def test_examples_precede_the_question_and_never_hold_it() -> None:
    """Each prompt has two of the other items, formatted with their answers."""
    model = FakeModel()
    one_result(TASK, model, PromptConfig(shots=2))
    for item, request in zip(CAPITALS, model.requests, strict=True):
        *shots, question = request.prompt.split("\n\n")
        assert question == f"Capital of {item.fields['country']}:"
        assert sorted(shots) == sorted(
            f"Capital of {o.fields['country']}: {o.fields['capital']}" for o in CAPITALS if o is not item
        )


def test_copies_of_a_question_are_no_examples() -> None:
    """A record that is equal to the question would show its answer."""
    pool = items(*[dict(CAPITALS[0].fields)] * 5, dict(CAPITALS[1].fields))
    assert ExamplePool(pool).choose(CAPITALS[0], 1, "random", 0, 0) == [pool[5]]
    with pytest.raises(UserError, match=r"questions.jsonl:1: 2 examples are wanted and only 1"):
        ExamplePool(pool).choose(CAPITALS[0], 2, "first_n", 0, 0)


def test_examples_without_copies_of_a_question() -> None:
    """Each item of a pool with many copies gets the same examples as from a list without its copies."""
    rng = random.Random(1)
    pool = items(*({"n": rng.randint(0, 20)} for _ in range(60)))
    examples = ExamplePool(pool)
    for index, item in enumerate(pool):
        others = [one for one in pool if one.fields != item.fields]
        assert examples.choose(item, 5, "first_n", 3, index) == others[:5]
        assert examples.choose(item, 5, "random", 3, index) == random.Random(f"3/{index}").sample(others, 5)


def test_a_template_is_rendered_once_per_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the check, the question and its use as an example together."""
    rendered: list[object] = []
    send = chat_template.send
    monkeypatch.setattr(chat_template, "send", lambda request: rendered.append(request) or send(request))
    fresh = items(*(dict(one.fields) for one in CAPITALS))
    one_result(replace(TASK, items=fresh, target="{{capital}}"), FakeModel(), PromptConfig(shots=2))
    assert len(rendered) == 2 * len(fresh), "a prompt and a target per item"


def test_random_examples_depend_on_the_seed_and_the_item() -> None:
    """The same seed gives the same examples."""
    pool = items(*({"n": n} for n in range(50)))
    draw = [
        ExamplePool(pool).choose(pool[0], 5, "random", seed, index) for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert draw[0] == draw[1] != draw[2] and draw[0] != draw[3]


def test_whole_examples_are_dropped_where_a_prompt_is_too_long() -> None:
    """The last examples go first, and the question stays whole."""
    prompt, kept = fit(["one two\n", "three four\n"], "five six", "", 5, lambda text: len(text.split()))
    assert (prompt, kept) == ("one two\nfive six", 1)
    result = one_result(replace(TASK, max_new_tokens=1), FakeModel(context=9), PromptConfig(shots=2))
    assert result.dropped == 3 and result.shots == 1
    with pytest.raises(UserError, match=r"questions.jsonl:1: the prompt of capitals has 3 tokens without any example"):
        one_result(TASK, FakeModel(context=2))


def test_votes_are_samples_of_which_the_most_frequent_counts() -> None:
    """Self-consistency: five seeds per item, and the votes are kept."""

    class Voter(FakeModel):
        def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for i, request in enumerate(requests):
                assert isinstance(request, GenerateRequest) and request.temperature > 0
                yield i, GenerateReply("Lima" if sample_number(request) < 3 else "Quito", "stop")

    result = one_result(TASK, Voter(), PromptConfig(votes=5))
    assert [item.answers["none"] for item in result.items] == ["Lima"] * 3
    assert result.items[0].replies.count("Quito") == 2
    assert result.metrics["exact_match"].value == pytest.approx(1 / 3)
    assert majority(["b", "a", "a", "b"]) == "b" and majority([]) == ""


def test_zero_shot_chain_of_thought_asks_twice() -> None:
    """First the rationale, then the answer after it (Kojima 2022)."""
    model = FakeModel({"step by step.": "Peru is in Andes.", "the answer is": "Lima"})
    result = one_result(replace(TASK, items=CAPITALS[1:2]), model, PromptConfig(cot="zero-shot"))
    assert [request.prompt for request in model.requests] == [
        "Capital of Peru: Let's think step by step.",
        "Capital of Peru: Let's think step by step.Peru is in Andes.\nTherefore, the answer is",
    ]
    assert result.metrics["exact_match"].value == 1
    assert result.items[0].replies == ["Peru is in Andes.", "Lima"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", [TASK, CHOICE], ids=["text", "choice"])
def test_a_rationale_leaves_room_for_the_answer(task: PromptTask, chat: bool) -> None:
    """A long one is cut; the prompt itself takes at most half of the context."""
    model = FakeModel({"": "so " * 60}, context=64)
    result = one_result(replace(task, description="word " * 20), model, PromptConfig(chat=chat, cot="zero-shot"))
    second = [request for request in model.requests if "the answer is" in request.prompt + request.begun]
    assert len(second) == (len(TASK.items) if task is TASK else 5)
    room = 64 // 4 if task is TASK else 1
    for request in second:
        assert model.count_tokens(f"{request.prompt} {request.begun}") in (64 - room - 1, 64 - room)
    assert all(10 < item.replies[0].count("so") < 60 for item in result.items)
    one_result(
        replace(task, description="word " * 20),
        short := FakeModel(context=64),
        PromptConfig(chat=chat, cot="zero-shot"),
    )
    assert any(re.search(r"sample \d+\nTherefore", one.prompt + one.begun) for one in short.requests), "not cut"


def test_an_error_of_a_second_request_has_the_line() -> None:
    """A choice that fits no context, after the rationale."""

    class Checking(FakeModel):
        def check(self, requests: Sequence[Request]) -> None:
            if any(isinstance(request, ScoreRequest) for request in requests):
                raise UserError("pair 0 has 99 tokens")

    with pytest.raises(UserError, match=r"questions.jsonl:1: pair 0 has 99 tokens"):
        one_result(CHOICE, Checking(), PromptConfig(cot="zero-shot"))


def test_chat_prompts_are_messages() -> None:
    """The answer of a chat model begins with the rationale; nothing of it is in the user's message."""
    model = FakeModel()
    one_result(replace(TASK, items=CAPITALS[:1]), model, PromptConfig(chat=True, cot="zero-shot"))
    first, second = model.requests
    assert isinstance(first, GenerateRequest) and isinstance(second, GenerateRequest)
    assert first.chat and first.prompt == second.prompt == "Capital of Chad:"
    assert first.begun == "Let's think step by step."
    assert second.begun.endswith("\nTherefore, the answer is")


def test_loglikelihood_and_rolling_metrics() -> None:
    """Perplexity of targets, and of whole texts per word and per byte."""
    task = PromptTask(
        "targets",
        CAPITALS,
        "loglikelihood",
        "{{country}}",
        " {{capital}}",
        metrics=(MetricConfig("acc"), MetricConfig("perplexity")),
    )
    result = one_result(task, FakeModel())
    lengths = [len(" " + str(item.fields["capital"])) for item in CAPITALS]
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(np.mean(lengths)))
    rolling = PromptTask(
        "texts", items({"text": "one two"}, {"text": "three"}), "loglikelihood_rolling", "", "text",
        metrics=tuple(map(MetricConfig, ("word_perplexity", "byte_perplexity", "bits_per_byte"))),
    )  # fmt: skip
    found = one_result(rolling, FakeModel()).metrics
    assert found["word_perplexity"].value == pytest.approx(math.exp(12 / 3))
    assert found["bits_per_byte"].value == pytest.approx(1 / math.log(2))


def test_the_mean_over_groups_weighs_items_as_each_group_does() -> None:
    """Bits per byte of a group are its bits over its bytes, and the macro value is the mean of the groups' own values."""

    class Bits(FakeModel):
        def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for i in range(len(requests)):
                yield i, ScoreReply((-8 * math.log(2),), False)  # 8 bits, whatever the length

    texts = items({"text": "a", "kind": "x"}, {"text": "b" * 15, "kind": "x"}, {"text": "c" * 4, "kind": "y"})
    task = PromptTask(
        "texts", texts, "loglikelihood_rolling", "", "text", group="kind", metrics=(MetricConfig("bits_per_byte"),),
    )  # fmt: skip
    result = one_result(task, Bits())
    assert {name: group["bits_per_byte"].value for name, group in result.groups.items()} == pytest.approx(
        {"x": 1, "y": 2}
    )
    assert result.metrics["bits_per_byte"].macro == pytest.approx(1.5)
    assert result.metrics["bits_per_byte"].value == pytest.approx(24 / 20)


def test_no_example_is_missed_where_none_is_chosen() -> None:
    """Whole texts have no examples, and written examples replace those that `--shots` asks for."""
    texts = PromptTask(
        "texts", items({"text": "one two"}), "loglikelihood_rolling", "", "text", shots=2, metrics=(MetricConfig("bits_per_byte"),),
    )  # fmt: skip
    assert one_result(texts, FakeModel(), PromptConfig(shots=5)).dropped == 0
    assert one_result(replace(TASK, example_text="Written.\n\n"), FakeModel(), PromptConfig(shots=5)).dropped == 0
    assert one_result(replace(TASK, max_new_tokens=1), FakeModel(context=9), PromptConfig(shots=2)).dropped == 3


def test_an_interrupted_evaluation_resumes(tmp_path: Path) -> None:
    """Replies before the end are not requested again, and half a line of the cache is dropped."""
    first = FakeModel(dies_after=2)
    cache = ReplyCache(tmp_path, first.digest)
    with pytest.raises(UserError, match="does not answer"):
        run_tasks([TASK], first, PromptConfig(), cache)
    cache.close()
    with cache.path.open("a") as file:
        file.write('["abc", {"text": "ha')
    second = FakeModel()
    cache = ReplyCache(tmp_path, second.digest)
    run_tasks([TASK], second, PromptConfig(), cache)
    cache.close()
    assert len(second.requests) == 1
    cache.path.write_text("no\n")
    with pytest.raises(UserError, match=r"\.jsonl:1: this line of the cache"):
        ReplyCache(tmp_path, second.digest)


def test_equal_requests_are_sent_once() -> None:
    """Two tasks with the same prompts."""
    model = FakeModel()
    results = run_tasks([TASK, replace(TASK, name="again")], model, PromptConfig())
    assert len(model.requests) == 3 and len(results[1].items) == 3


def test_standard_errors_are_clustered_by_group() -> None:
    """With one item per group the clustered error is that of independent items."""
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    alone = standard_error(values, [""] * 5)
    assert standard_error(values, list("abcde")) == pytest.approx(alone)
    assert standard_error(np.repeat(values, 4), list("aaaabbbbccccddddeeee")) == pytest.approx(alone)


def test_better_is_said_only_where_the_interval_allows() -> None:
    """A paired bootstrap over the same items."""

    def result(name: str, values: Sequence[float]) -> TaskResult:
        task = replace(TASK, items=items(*({"country": str(i), "capital": "x"} for i in range(len(values)))))
        model = FakeModel({f"of {i}:": "x" if value else "y" for i, value in enumerate(values)})
        model.name = name
        [found] = run_tasks([replace(task, prompt="Capital of {{country}}:")], model, PromptConfig())
        return found

    rng = np.random.default_rng(0)
    base = (rng.random(9) < 0.5).astype(float)
    good, same = result("good", [1.0] * 9), result("base", base.tolist())
    found = paired_bootstrap(good, same, "exact_match")
    assert found is not None
    assert found.difference == pytest.approx(1 - base.mean()) and 0 < found.low <= found.difference <= found.high
    assert "good is better than base" in comparisons([good, same])[0]
    assert "does not differ from" in comparisons([same, same])[0]


def test_results_have_the_layout_of_lm_eval(tmp_path: Path) -> None:
    """ "metric,filter" keys, standard errors, and a record per item."""
    config = PromptConfig(shots=1)
    result = one_result(TASK, FakeModel({"Peru:": "Lima"}), config)
    write_results(tmp_path, [result], config)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == json.loads(json.dumps(to_json([result], config)))
    assert found["results"]["capitals"]["exact_match,none"] == pytest.approx(1 / 3)
    assert found["results"]["capitals"]["exact_match_stderr,none"] == pytest.approx(1 / 3)
    lines = (tmp_path / "samples_capitals.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[1])["answers"] == {"none": "Lima"}
    assert any("exact_match" in line and "0.3333" in line for line in table([result]))


def test_lone_surrogates_are_replaced_where_text_is_read(tmp_path: Path) -> None:
    """JSON may hold half of a character, which no file can be written with: in records and in the task file itself."""
    path = write_task(tmp_path, YAML.replace("country}} is", "country}} \\ud83d is"))
    (tmp_path / "capitals.jsonl").write_text('{"country": "Chad\\ud83d", "capital": "\\udc00x"}\n')
    task = read_task(path)
    model = FakeModel()
    result = one_result(task, model, PromptConfig(shots=0))
    assert model.requests[0].prompt == "The capital of Chad\ufffd \ufffd is" and result.items[0].gold == "\ufffdx"
    write_results(tmp_path / "out", [result], PromptConfig())
    assert "Chad\ufffd" in (tmp_path / "out" / "samples_capitals.jsonl").read_text("utf-8")


YAML = """\
task: capitals
data: capitals.jsonl
output_type: generate_until
doc_to_text: "The capital of {{country}} is"
doc_to_target: capital
num_fewshot: 1
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, ignore_case: true}]
"""


def write_task(directory: Path, text: str = YAML) -> Path:
    """Write a task and its records."""
    records = [{"country": "Chad", "capital": "N'Djamena"}, {"country": "Peru", "capital": "Lima"}]
    (directory / "capitals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = directory / "capitals.yaml"
    path.write_text(text)
    return path


def test_a_task_is_ten_lines_of_yaml(tmp_path: Path) -> None:
    """Records next to the file, and an included file below it."""
    task = read_task(write_task(tmp_path))
    model = FakeModel({"Peru is": "LIMA"})
    assert one_result(task, model).metrics["exact_match"].value == 0.5
    assert model.requests[0].prompt == "The capital of Peru is Lima\n\nThe capital of Chad is"
    child = tmp_path / "child.yaml"
    child.write_text("include: capitals.yaml\ntask: child\nnum_fewshot: 0\n")
    assert (read_task(child).name, read_task(child).shots) == ("child", 0)


SELF_CONSISTENCY = """\
include: capitals.yaml
repeats: 8
generation_kwargs: {until: ["\\n"], do_sample: true, temperature: 0.2, top_p: 0.9}
filter_list:
  - {name: score-first, filter: [{function: regex, regex_pattern: "is (.*)"}, {function: take_first}]}
  - name: maj@8
    filter: [{function: regex, regex_pattern: "is (.*)"}, {function: majority_vote}, {function: take_first}]
  - name: maj@3
    filter:
      - {function: take_first_k, k: 3}
      - {function: regex, regex_pattern: "is (.*)"}
      - {function: majority_vote}
      - {function: take_first}
"""
"""The fields of lm-evaluation-harness's gsm8k-cot-self-consistency.yaml."""


class Samples(FakeModel):
    """Answers A, B, B, C, C, C, C, C, by the seed."""

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        self.requests.extend(requests)
        for i, request in enumerate(requests):
            assert isinstance(request, GenerateRequest)
            yield i, GenerateReply(f"it is {'ABBCCCCC'[sample_number(request)]}", "stop")


def test_repeated_samples_are_read_by_whole_chains(tmp_path: Path) -> None:
    """As many as the file says, with its temperature; the first, the majority of all, and that of the first three."""
    write_task(tmp_path)
    path = tmp_path / "votes.yaml"
    path.write_text(SELF_CONSISTENCY)
    model = Samples()
    result = one_result(read_task(path), model, PromptConfig(shots=0, seed=3))
    assert [item.answers for item in result.items] == [{"score-first": "A", "maj@8": "C", "maj@3": "B"}] * 2
    first = [request for request in model.requests if "Chad" in request.prompt and isinstance(request, GenerateRequest)]
    assert [sample_number(request) for request in first] == list(range(8))
    assert {(request.temperature, request.top_p) for request in first} == {(0.2, 0.9)}
    path.write_text(SELF_CONSISTENCY.replace("do_sample: true", "do_sample: false"))
    greedy = FakeModel({"": "it is Lima"})
    result = one_result(read_task(path), greedy, PromptConfig(shots=0))
    assert len(greedy.requests) == 2, "greedy samples are equal"
    assert isinstance(greedy.requests[0], GenerateRequest) and greedy.requests[0].temperature == 0
    assert result.metrics["exact_match,maj@8"].value == 0.5


def test_votes_are_read_by_chains_that_vote(tmp_path: Path) -> None:
    """--votes gives a chain that votes all samples; what takes the first of each text counts by majority."""
    write_task(tmp_path)
    path = tmp_path / "votes.yaml"
    path.write_text(SELF_CONSISTENCY.replace("repeats: 8", "repeats: 1"))
    model = Samples()
    result = one_result(read_task(path), model, PromptConfig(shots=0, votes=8, temperature=0.9))
    assert result.items[0].answers == {"score-first": "C", "maj@8": "C", "maj@3": "B"}
    assert {request.temperature for request in model.requests if isinstance(request, GenerateRequest)} == {0.9}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("repeats: 0", r"capitals.yaml:9: repeats must be an integer of at least 1, and it is 0"),
        (
            "generation_kwargs: {num_beams: 4}",
            r"capitals.yaml:9: generation_kwargs has 'num_beams', which is not supported",
        ),
        (
            "generation_kwargs: {temperature: -1}",
            r"capitals.yaml:9: temperature must be a number at least 0, and it is -1",
        ),
        (
            "generation_kwargs: {do_sample: maybe}",
            r"capitals.yaml:9: do_sample must be true or false, and it is 'maybe'",
        ),
        ("doc_to_txt: x", r"capitals.yaml:9: there is no field 'doc_to_txt'; did you mean 'doc_to_text'\?"),
        ("process_docs: x", r"capitals.yaml:9: process_docs runs Python"),
        ("process_results: !function utils.f", "runs Python"),
        ("output_type: chat", r"capitals.yaml:9: output_type is 'chat', and must be one of"),
        (
            "description: '{{country'",
            r"capitals.yaml:9: the template '{{country' cannot be used: it is not valid Jinja",
        ),
        ("filter_list: [{name: a, filter: [{function: regexp}]}]", r"capitals.yaml:9: there is no filter 'regexp'"),
        (
            "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '('}]}]",
            r"capitals.yaml:9: the filter 'regex'",
        ),
        ("metric_list: [{metric: acc}]", r"capitals.yaml:9: generate_until has no metric 'acc'"),
        ("data: other.jsonl", "other.jsonl"),
    ],
)
def test_a_wrong_task_file_is_named_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    """The field is wrong before anything runs."""
    field = line.split(":")[0]
    kept = [one for one in YAML.splitlines() if one.split(":")[0] != field]
    kept += [""] * (8 - len(kept))
    with pytest.raises(UserError, match=words):
        read_task(write_task(tmp_path, "\n".join([*kept, line]) + "\n"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            replace(TASK, prompt="county"),
            r"questions.jsonl:1: doc_to_text is 'county', and the record has no such field",
        ),
        (replace(TASK, target="captial"), r"questions.jsonl:1: doc_to_target is 'captial', .* it has country, capital"),
        (
            replace(TASK, prompt="{{county}}"),
            r"questions.jsonl:1: the template '{{county}}' fails: 'county' is undefined",
        ),
        (replace(CHOICE, choices="q"), r"questions.jsonl:1: the choices are 'x'"),
        (replace(CHOICE, items=items({"q": "x", "options": ["a"], "gold": 0})), "needs a list of two or more"),
        (
            replace(CHOICE, items=items({"q": "x", "options": ["a", "b"], "gold": "c"})),
            r"jsonl:1: the gold answer 'c' is neither",
        ),
        (replace(CHOICE, items=items({"q": "x", "options": ["a", "b"], "gold": 2})), "the gold answer 2 is neither"),
        (replace(TASK, group="continent"), r"questions.jsonl:1: there is no field 'continent'"),
        (replace(TASK, items=[]), "there is no item"),
    ],
)
def test_a_wrong_record_is_named_before_the_model_runs(task: PromptTask, words: str) -> None:
    """No request is sent."""
    model = FakeModel()
    with pytest.raises(UserError, match=words):
        run_tasks([TASK, task], model, PromptConfig())
    assert not model.requests


def test_a_template_is_sandboxed() -> None:
    """A task file cannot reach Python, nor take the machine's time or memory."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for template, words in (
        ("{{ country.__class__.__mro__ }}", "unsafe"),
        (endless, "more time"),
        ("{{ ('a' * 10**10) | length }}", "memory"),
    ):
        with pytest.raises(UserError, match=rf"questions.jsonl:1: the template .* fails: .*{words}"):
            replace(TASK, prompt=template).check(PromptConfig())


def test_a_tie_of_a_minimal_pair_is_wrong(tmp_path: Path) -> None:
    """Sentences of equal score."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"sentence_good": "aa", "sentence_bad": "bb"}) + "\n")
    result = one_result(load_tasks("minimal_pairs", [str(path)])[0], FakeModel())
    assert result.metrics["acc"].value == 0
