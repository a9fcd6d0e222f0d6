"""A model that replies to requests by rules, for tests of tasks in prompts."""

from collections.abc import Iterator, Sequence

from firth.evaluate.prompting.prompt_task import PromptConfig, PromptTask
from firth.evaluate.prompting.prompts import Item
from firth.evaluate.prompting.requests import GenerateReply, Reply, Request, ScoreReply, ScoreRequest
from firth.evaluate.prompting.runner import TaskResult, run_tasks
from firth.types import UserError


class FakeModel:
    """Replies by rules and keeps the requests: a continuation scores minus its length, an answer is what `answers` gives."""

    name, digest, weights = "fake", "0" * 32, ""

    def __init__(
        self, answers: dict[str, str] | None = None, context: int = 1000, dies_after: int | None = None
    ) -> None:
        self.answers, self.context, self.dies_after = answers or {}, context, dies_after
        self.requests: list[Request] = []

    def count_tokens(self, text: str, chat: bool = False) -> int:
        return len(text.split())

    def check(self, requests: Sequence[Request]) -> None:
        """Reply to every request."""

    def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for i, request in enumerate(requests):
            if self.dies_after is not None and len(self.requests) >= self.dies_after:
                raise UserError("the server does not answer")
            self.requests.append(request)
            if isinstance(request, ScoreRequest):
                yield i, ScoreReply((-float(len(request.continuation)),), greedy=len(request.continuation) < 4)
            else:
                known = [text for key, text in self.answers.items() if key in request.prompt + request.begun]
                yield i, GenerateReply(known[-1] if known else f"sample {request.seed}", "stop")


def items(*records: dict[str, object]) -> list[Item]:
    return [Item(record, f"questions.jsonl:{i}") for i, record in enumerate(records, 1)]


DEFAULT = PromptConfig()


def one_result(task: PromptTask, model: FakeModel, config: PromptConfig = DEFAULT) -> TaskResult:
    """Return the result of one task."""
    [result] = run_tasks([task], model, config)
    return result
