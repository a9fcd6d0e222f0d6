"""Examples from dialogues, prompts with answers, and preferences; templates that are filled with the fields of a record.

`docs/reference/data-formats.md` lists the formats (`firth.data.conversations`). Any other format is an error with file and line.

A template names fields: `translate to French: {en}`. A field is its name between braces and nothing else; doubled braces are
literal braces. Python's own formatting can do more (`{en:>999999999}` allocates a gigabyte, `{en.__class__}` accesses Python
objects), which no prompt needs.

Several answers to one prompt may be in order of preference, for a reward model:

>>> prompt, answers, rank = ranking({"prompt": "Hi", "answers": ["No", "Hello", "Hey"], "ranks": [2, 1, 1]})
>>> [answer[0]["content"] for answer in answers], rank
(['No', 'Hello', 'Hey'], [1, 0, 0])
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from firth.corpora import readers
from firth.data.conversations import comparison, messages_of, prompt_of
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, split_records
from firth.data.records import Purpose, Record, Records, RecordsConfig, located
from firth.data.split import content_key
from firth.fields import TokenCount
from firth.tokenizer import chat
from firth.tokenizer.chat import Message
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import DataStats, Example, UserError

if TYPE_CHECKING:
    from firth.objectives.objective import Objective

FIELD_OR_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def field_names(template: str) -> list[str]:
    """Return the names of the fields in a template, sorted, each once.

    >>> field_names("{b}, {a} and {b}: {{c}}")
    ['a', 'b']
    """
    return sorted({found[1] for found in FIELD_OR_BRACE.finditer(template) if found[1]})


def fill_template(template: str, record: Mapping[str, Any]) -> str:
    """Return the template with field names replaced by a record's values.

    Raises:
        UserError: A brace is unpaired, or a name is not a field of the record.

    >>> fill_template("in French: {en} {{x}}", {"en": "otter"})
    'in French: otter {x}'
    """

    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] is None:
            raise UserError(
                f"the template {template!r} has an unpaired brace {found[0]!r}: double it for a literal brace"
            )
        if found[1] not in record:
            raise UserError(
                f"the template {template!r} does not fit this record: {found[0]} is not a field name; the fields are "
                f"{', '.join(record) or 'none'}: write one of these names between braces, and nothing else"
            )
        return str(record[found[1]])

    return FIELD_OR_BRACE.sub(value, template)


def fill_templates(record: Record, prompt: str, completion: str) -> Record:
    """Return a record with a prompt and a completion made from its fields; the record itself without templates.

    >>> fill_templates({"en": "otter", "fr": "loutre"}, "in French: {en}", "{fr}")
    {'prompt': 'in French: otter', 'completion': 'loutre'}
    """
    if not prompt and not completion:
        return record
    if not prompt or not completion:
        raise UserError("examples.prompt_template and examples.completion_template must be set together")
    return {"prompt": fill_template(prompt, record), "completion": fill_template(completion, record)}


def first_prompt(messages: Sequence[chat.Message]) -> str:
    """Return the turns before the first answer to a user, as one text; the whole dialogue if nothing is answered.

    Dialogues that continue the same beginning share it, and so do the answers of a preference.

    >>> hello, hi = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
    >>> first_prompt([hello, hi]) == first_prompt([hello, hi, hello]) == first_prompt([hello])
    True
    """
    users = [i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant")]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and users and i > users[0]]
    end = answers[0] if answers else len(messages)
    return json.dumps([[message["role"], message["content"]] for message in messages[:end]])


@dataclass(frozen=True)
class TemplatedConfig(RecordsConfig):
    """Base class of dialogues and of prompts with an answer.

    Args:
        max_length: The most tokens of a dialogue or prompt.
        prompt_template: How a prompt is made of a record's fields, "translate to French: {en}"; empty takes the record's prompt.
        completion_template: How an answer is made of a record's fields; empty takes the record's answer.
    """

    max_length: TokenCount = 256
    prompt_template: str = ""
    completion_template: str = ""

    @property
    def tokenizer_settings(self) -> tuple[Any, ...]:
        return (self.prompt_template, self.completion_template)

    def limit_to(self, context: int) -> ExamplesConfig:
        return self

    def messages(self, record: Record) -> list[Message]:
        """Return the messages of a dialogue."""
        return messages_of(fill_templates(record, self.prompt_template, self.completion_template))

    def messages_before(self, record: Record) -> list[Message]:
        """Return the messages before the last answer, of a record that may have no answer."""
        template = self.prompt_template
        before = prompt_of({"prompt": fill_template(template, record)} if template else record)
        if not before:
            raise UserError("a text-to-text record needs a prompt, and this record has none")
        return before

    def group(self, record: Record) -> str:
        return first_prompt(self.messages(record))

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        return [message["content"] for message in self.messages(record)]


@dataclass(frozen=True)
class DialoguesConfig(TemplatedConfig):
    """Dialogues whose assistant turns are the labels: {"tokens", "mask"}, the mask True on these turns and their stop tokens.

    Args:
        max_length: The most tokens of a dialogue; longer ones are truncated at the end.
        prompt_template: How a prompt is made of a record's fields; empty takes the record's prompt.
        completion_template: How an answer is made of a record's fields; empty takes the record's answer.
    """

    columns: ClassVar[Mapping[str, type]] = {"tokens": np.int32, "mask": np.bool_}

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        tokens, mask = chat.encode(records.tokenizer, self.messages(record))
        tokens, mask = records.fit(tokens, self.max_length), mask[: self.max_length]
        # The first token cannot be a label, because no token is before it.
        return {"tokens": tokens, "mask": mask} if mask[1:].any() else None


@dataclass(frozen=True)
class Seq2SeqConfig(TemplatedConfig):
    """Prompts for an encoder and answers from a decoder: {"source", "target"}, both ending with eos.

    The target is the last answer, the source everything before it. A truncated target has no eos. For prediction, records need no
    answer, and the target is eos alone.

    Args:
        max_length: The most tokens of a prompt.
        prompt_template: How a prompt is made of a record's fields, "translate to French: {en}"; empty takes the record's prompt.
        completion_template: How an answer is made of a record's fields; empty takes the record's answer.
        max_target_length: The most tokens of an answer.
    """

    columns: ClassVar[Mapping[str, type]] = {"source": np.int32, "target": np.int32}

    max_target_length: TokenCount = 128

    @property
    def max_tokens(self) -> int:
        return max(self.max_length, self.max_target_length)

    @property
    def limits(self) -> Mapping[str, int]:
        return {"long_answers": self.max_target_length}

    def row_limits(self, text: int, source: int) -> dict[str, int]:
        return {"max_length": source, "max_target_length": text}

    def group(self, record: Record) -> str:
        return first_prompt(self.messages_before(record))

    def texts(self, record: Record, labeled: bool = True) -> list[str]:
        if not labeled:
            return ["\n\n".join(message["content"] for message in self.messages_before(record))]
        *before, last = self.messages(record)
        if last["role"] != "assistant" or not before:
            raise UserError("a text-to-text record needs a prompt and an answer after it")
        return ["\n\n".join(message["content"] for message in before), last["content"]]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        source, *targets = encoded
        eos = records.tokenizer.vocab.eos
        if any(not len(target) for target in targets):
            return None
        return {
            "source": np.append(records.fit(source, self.max_length - 1), eos),
            "target": records.fit(np.concatenate((*targets, [eos])), self.max_target_length, "long_answers"),
        }


PREFERENCE_FIELDS = frozenset({"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask", "margin"})
"""The fields of a chosen and a rejected answer to one prompt, and by how much the chosen one is better."""


@dataclass(frozen=True)
class PreferencesConfig(RecordsConfig):
    """Records with a prompt, a chosen and a rejected answer.

    An example is {"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask", "margin" (1,)}. "margin" is the number of that
    name in the record, by which the chosen answer is better, or NaN. The masks are True on the answers and their stop tokens only,
    not on assistant turns in the prompt. A pair is left out as unanswered if `max_length` leaves no room for one of its answers, or
    if the answers are equal.
    """

    columns: ClassVar[Mapping[str, type]] = {
        "chosen_tokens": np.int32, "chosen_mask": np.bool_, "rejected_tokens": np.int32, "rejected_mask": np.bool_,
        "margin": np.float32,
    }  # fmt: skip

    max_length: TokenCount = 256

    def group(self, record: Record) -> str:
        prompt, chosen, _ = comparison(record)
        return first_prompt([*prompt, *chosen])

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        return [message["content"] for messages in comparison(record) for message in messages]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        prompt, *answers = comparison(record)
        prompt_length = len(chat.encode(records.tokenizer, prompt)[0])
        output: Example = {"margin": np.array([_margin(record)])}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            tokens, mask = chat.encode(records.tokenizer, [*prompt, *answer])
            mask &= np.arange(len(tokens)) >= prompt_length
            output |= {f"{side}_tokens": records.fit(tokens, self.max_length), f"{side}_mask": mask[: self.max_length]}
        answered = output["chosen_mask"].any() and output["rejected_mask"].any()
        differ = not np.array_equal(output["chosen_tokens"], output["rejected_tokens"])
        return output if answered and differ else None

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        def read(paths: Sequence[str]) -> Records:
            found = self.records(data, paths)
            missing = np.flatnonzero(np.isnan(found.column("margin").whole))
            if "margin" in objective.inputs and len(missing):
                raise UserError(
                    f"{found.location_of(int(missing[0]))}: the preference has no `margin`, and objective.margin_weight needs one "
                    f"in every record ({len(missing):,} of {len(found):,} have none): add it, or set objective.margin_weight=0"
                )
            return found

        return split_records(data, read)


def _margin(record: Record) -> float:
    """Return the `margin` of a preference; NaN where it has none."""
    margin = record.get("margin")
    if margin in (None, ""):
        return math.nan
    try:
        found = float(margin)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"the `margin` of a preference must be a number, not {margin!r:.60}")
    return found


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, and what a reward function may need to know of it.

    Args:
        tokens: The dialogue up to its last answer, followed by the start of the assistant's turn: (n,).
        fields: The fields of its record; "prompt" is the text of the dialogue, without the chat template.
        location: File and line of the record.
    """

    tokens: np.ndarray
    fields: Record
    location: str


def prompts(
    paths: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[list[Prompt], np.ndarray, Mapping[str, int]]:
    """Read prompts.

    A prompt of more than `length` tokens is left out, because without its end it would be another question.

    Returns:
        The prompts; the `content_key` of each, (n,) uint64, which is that of a dialogue or a preference with
        this prompt, so a prompt held out in one stage is held out in the next; and the counts of `records`, `too_long` and
        `unanswered`.

    Raises:
        UserError: There is no prompt.
    """
    found, keys, counts = [], array("Q"), Counter[str]()
    for location, record in readers.records(paths):
        with located(location):
            messages = prompt_of(record)
            tokens, _ = chat.encode(tokenizer, messages, open=True)
        counts["records"] += 1
        if messages and len(tokens) <= length:
            text = "\n\n".join(message["content"] for message in messages)
            found.append(Prompt(tokens, {**record, "prompt": text}, location))
            keys.append(content_key(first_prompt(messages)))
        else:
            counts["too_long" if messages else "unanswered"] += 1
    if not found:
        raise UserError(
            f"{', '.join(paths)}: there is no prompt of at most {length} tokens; the counts are {dict(counts)}"
        )
    return found, np.array(keys, np.uint64), counts


@dataclass(frozen=True)
class DecoderPromptsConfig(TemplatedConfig):
    """Prompts that a decoder answers, with the right answer where there is one: {"source", "target"}, for evaluation.

    For a chat model the prompt is formatted by the tokenizer's chat template, up to the start of the assistant's turn. For any other
    model it is plain text. A prompt is never truncated, because without its end it would be another question.

    Args:
        max_length: The most positions of the model. Longer prompts are noted, since they leave no room for an answer.
        prompt_template: How a prompt is made of a record's fields; empty takes the record's prompt.
        completion_template: How an answer is made of a record's fields; empty takes the record's answer.
        is_chat: Whether to format the prompt with the chat template.
        bos: Tokens before a plain-text prompt.
    """

    columns: ClassVar[Mapping[str, type]] = {"source": np.int32, "target": np.int32}

    is_chat: bool = False
    bos: tuple[int, ...] = ()

    def group(self, record: Record) -> str:
        return first_prompt(self.messages_before(record))

    def note_templates(self, purpose: Purpose) -> Mapping[str, str]:
        return {"no_room": "prompt{s} left no room in {limit} tokens for an answer, so {they} {have} none"}

    def texts(self, record: Record, labeled: bool = True) -> list[str]:
        before, answer = self._split_answer(record, labeled)
        return [answer] if self.is_chat else [answer, "\n\n".join(message["content"] for message in before)]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        if self.is_chat:
            before, _ = self._split_answer(record, records.labeled)
            source, _ = chat.encode(records.tokenizer, before, open=True)
        else:
            source = np.concatenate((np.array(self.bos, np.int32), encoded[1]))
        if not len(source):
            raise UserError("the prompt is empty, and this tokenizer has no token for the beginning of a text")
        if len(source) > self.max_length:
            records.note("no_room")
        return {"source": source, "target": encoded[0]}

    def _split_answer(self, record: Record, labeled: bool) -> tuple[list[Message], str]:
        """Return the messages before the last answer, and that answer."""
        if not labeled:
            return self.messages_before(record), ""
        *before, last = self.messages(record)
        if last["role"] != "assistant" or not before:
            raise UserError("this record needs a prompt and an answer after it, and it has only one of them")
        return before, last["content"]


LISTS = ("answers", "responses", "completions")
"""Fields that hold the answers."""

TEXTS = ("answer", "response", "text", "completion")
"""Fields of an answer object that may hold its text."""

RANKS, SCORES = ("rank", "ranks"), ("score", "overall_score", "scores")
"""Fields of a record or of an answer. The lowest rank and the highest score are the best."""


def ranking(record: Record) -> tuple[list[Message], list[list[Message]], list[int]]:
    """Return the prompt, the answers, and the rank of each answer from 0, the best; equal ranks are ties.

    Raises:
        UserError: The record is not a ranking, or a field is not supported.
    """
    name = next((name for name in LISTS if isinstance(record.get(name), list)), "")
    if not name or len(record[name]) < 2:
        raise UserError(
            "a ranking needs a prompt and a list of at least two `answers`, the best first or with `ranks` or `scores`; "
            f"this record has {', '.join(record) or 'nothing'}"
        )
    listed: list[Any] = record[name]
    rest = {key: value for key, value in record.items() if key not in (name, *RANKS, *SCORES)}
    values = [_text(answer) for answer in listed]
    prompt: list[Message] = []
    answers: list[list[Message]] = []
    for value in values[1:]:
        prompt, first, other = comparison(rest | {"chosen": values[0], "rejected": value})
        answers = [*(answers or [first]), other]
    return prompt, answers, _order(record, listed)


def _text(answer: Any) -> Any:
    """Return the text of an answer in the list: the answer itself, or one of its fields."""
    if not isinstance(answer, Mapping) or "role" in answer or "from" in answer:
        return answer
    name = next((name for name in TEXTS if name in answer), "")
    if not name:
        raise UserError(
            f"an answer of a ranking has none of the fields {', '.join(TEXTS)}: its fields are {', '.join(answer)}"
        )
    return answer[name]


def _order(record: Record, listed: Sequence[Any]) -> list[int]:
    """Return ranks from 0, by the ranks or scores of the record or of its answers, else by the order of the answers."""
    for names, sign in ((RANKS, 1.0), (SCORES, -1.0)):
        for name in names:
            numbers = record.get(name)
            if numbers is None and any(isinstance(answer, Mapping) and name in answer for answer in listed):
                numbers = [answer.get(name) if isinstance(answer, Mapping) else None for answer in listed]
            if numbers is None:
                continue
            if not isinstance(numbers, list) or len(numbers) != len(listed) or not all(map(_finite, numbers)):
                raise UserError(f"`{name}` of a ranking needs one number for each of its {len(listed)} answers")
            return [int(rank) for rank in np.unique(sign * np.array(numbers, np.float64), return_inverse=True)[1]]
    return list(range(len(listed)))


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


@dataclass(frozen=True)
class RankingsConfig(RecordsConfig):
    """Records with a prompt and several answers in order of preference: {"answers": K rows of tokens, "masks": K, "rank": (K,)}.

    The masks are True on the answers and their stop tokens only. A ranking is left out as unanswered if `max_length` leaves no
    room for one of its answers, or if all answers are tied.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"answers", "masks", "rank"})
    columns: ClassVar[Mapping[str, type]] = {
        "tokens": np.int32, "mask": np.bool_, "lengths": np.int64, "rank": np.int64,
    }  # fmt: skip

    max_length: TokenCount = 256

    def group(self, record: Record) -> str:
        prompt, answers, _ = ranking(record)
        return first_prompt([*prompt, *answers[0]])

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        prompt, answers, _ = ranking(record)
        return [message["content"] for messages in (prompt, *answers) for message in messages]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        prompt, answers, rank = ranking(record)
        prompt_length = len(chat.encode(records.tokenizer, prompt)[0])
        rows, masks = [], []
        for answer in answers:
            tokens, mask = chat.encode(records.tokenizer, [*prompt, *answer])
            mask &= np.arange(len(tokens)) >= prompt_length
            rows.append(records.fit(tokens, self.max_length))
            masks.append(mask[: self.max_length])
        if not all(mask.any() for mask in masks) or len(set(rank)) < 2:
            return None
        return {
            "tokens": np.concatenate(rows), "mask": np.concatenate(masks), "rank": np.array(rank),
            "lengths": np.array([len(row) for row in rows]),
        }  # fmt: skip

    def to_example(self, arrays: Example, records: Records) -> Example:
        ends = np.cumsum(arrays["lengths"])[:-1]
        return {
            "answers": np.split(arrays["tokens"], ends), "masks": np.split(arrays["mask"], ends), "rank": arrays["rank"],
        }  # fmt: skip

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most answers of a ranking, which is the number of rows per example."""
        return DataStats(max_options=self.longest(data, "rank"))
