r"""Read a record of any usual shape as a dialogue, a prompt, or a preference. `docs/reference/data-formats.md` has the table of the shapes.

Every field that carries text to the model in a known format is read with the meaning that the format gives it, or the record
is rejected with a sentence that names the field. Nothing is dropped. `firth.tokenizer.chat` encodes the messages.

>>> messages_of({"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
... # doctest: +NORMALIZE_WHITESPACE
[{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'},
 {'role': 'assistant', 'content': 'Hello'}]
>>> comparison({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"})
... # doctest: +NORMALIZE_WHITESPACE
([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Hello'}],
 [{'role': 'assistant', 'content': 'No'}])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from firth.tokenizer.chat import Message
from firth.types import UserError

Record = Mapping[str, Any]

ROLES = {
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Role in a record -> role in the dialogue. A `function_call` is what the assistant writes, an `observation` is its result."""

TURNS = ("messages", "conversations", "conversation")
"""Fields that hold a whole dialogue, as a list of turns."""

PROMPTS = ("prompt", "instruction")
"""Fields that hold what is answered."""

INPUTS = ("input", "context")
"""Fields that belong to an `instruction`: Alpaca's and Dolly's."""

ANSWERS = ("completion", "response", "output")
"""Fields that hold one answer."""

SYSTEMS = ("system", "system_prompt")
"""Fields that hold the system turn."""

LABELS = ("label", "kto_tag")
"""Fields of KTO's records: whether the answer is desirable."""

TEXT_FIELDS = frozenset({
    *SYSTEMS, *INPUTS, "query", "history", "tools", "functions", "documents", "image", "images", "video", "videos", "audio",
    "audios", "chat_template_kwargs",
})  # fmt: skip
"""Fields that reach the model in some known format: a record that has one which is not read is rejected."""

TURN_FIELDS = frozenset({
    "tool_calls", "function_call", "tools", "reasoning", "reasoning_content", "thinking", "image", "images", "video", "videos",
    "audio", "audios",
})  # fmt: skip
"""Fields of a turn that reach the model in some known format, and are not read."""

TURN_WEIGHTS = ("weight", "train", "training")
"""Fields of a turn that say whether it is trained on: OpenAI's and axolotl's."""

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
"""What begins a turn in the strings of HH-RLHF (Bai 2022)."""


def messages_of(record: Record) -> list[Message]:
    """Return the dialogue in a record, with its answers.

    Raises:
        UserError: The record has no known shape, or a field that is not read. The reader of the file adds the place.
    """
    _check_desirable(record)
    turns = _first(record, TURNS)
    if turns:
        return _completed(record, _turns(record[turns], turns), {turns})
    answer = next((name for name in ANSWERS if name in record), "")
    if answer and any(name in record for name in PROMPTS):
        if isinstance(record[answer], list) and any(isinstance(one, str) for one in record[answer]):
            raise UserError(
                f"`{answer}` holds {len(record[answer])} answers, which is a preference and not a dialogue: name them "
                "`chosen` and `rejected`, and train `reward` or `dpo` on them"
            )
        context, read = _prompt_side(record)
        return _completed(record, [*context, *_answers(record, answer)], read)
    raise UserError(
        "a dialogue needs `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`; "
        f"this record has {', '.join(record) or 'nothing'}"
    )


def prompt_of(record: Record) -> list[Message]:
    """Return what there is to answer in a record: its dialogue up to the last answer, or its prompt.

    Raises:
        UserError: As of `messages_of`.
    """
    if "chosen" in record and "rejected" in record:
        return comparison(record)[0]
    if _first(record, TURNS):
        messages = messages_of({name: value for name, value in record.items() if name not in LABELS})
        return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if any(name in record for name in PROMPTS):
        return _completed(record, *_prompt_side(record))
    raise UserError(
        "a prompt needs `prompt`, `instruction`, `messages` or `conversations`; "
        f"this record has {', '.join(record) or 'nothing'}"
    )


def comparison(record: Record) -> tuple[list[Message], list[Message], list[Message]]:
    """Return (prompt, chosen, rejected) of a preference, each as messages.

    Both answers may be whole dialogues (UltraFeedback, HH-RLHF): what they begin with in common is then the prompt, and a
    `prompt` that repeats it is read once.

    >>> hello = {"role": "user", "content": "hello"}
    >>> good, bad = ({"role": "assistant", "content": c} for c in ("hi", "go away"))
    >>> comparison({"chosen": [hello, good], "rejected": [hello, bad]}) == ([hello], [good], [bad])
    True
    >>> comparison({"prompt": "hello", "chosen": [hello, good], "rejected": [hello, bad]}) == ([hello], [good], [bad])
    True

    Raises:
        UserError: The record is no preference, or has a field that is not read.
    """
    record = _pair_named(record)
    chosen, rejected = _answers(record, "chosen"), _answers(record, "rejected")
    context, read = (
        _prompt_side(record) if _first(record, PROMPTS, filled=False) or _first(record, TURNS) else ([], set())
    )
    if not _is_answer(chosen) or not _is_answer(rejected):
        if _is_answer(chosen) != _is_answer(rejected):
            raise UserError(
                "one of `chosen` and `rejected` is a whole dialogue and the other an answer: write both alike"
            )
        same = len(list(takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))))
        common, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not same or not _is_answer(chosen) or not _is_answer(rejected):
            raise UserError(
                "`chosen` and `rejected` are dialogues that differ before the answer: a preference has one prompt for both"
            )
        context = _merged(context, common, chosen)
    elif not context:
        raise UserError("a preference needs a `prompt`, or two dialogues that begin with the same turns")
    return _completed(record, context, read), chosen, rejected


def _pair_named(record: Record) -> Record:
    """A preference with its answers in `chosen` and `rejected`."""
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if not missing:
        return record
    both = record.get("output")
    if isinstance(both, list) and len(both) == 2 and len(missing) == 2:
        rest = {name: value for name, value in record.items() if name != "output"}
        return rest | {"chosen": both[0], "rejected": both[1]}
    label = _first(record, LABELS, filled=False)
    if label and len(missing) == 2:
        raise UserError(
            f"this is KTO's record: `{label}` says whether one answer is desirable, and a preference needs two answers to one "
            "prompt: pair them as `chosen` and `rejected`"
        )
    raise UserError(f"a preference needs `chosen` and `rejected`; this record has {', '.join(record) or 'nothing'}")


def _merged(context: Sequence[Message], common: Sequence[Message], chosen: Sequence[Message]) -> list[Message]:
    """The prompt of two whole dialogues, which begin with `common`, and of a record that may repeat it in `context`."""
    system, own = list(takewhile(_is_system, context)), list(takewhile(_is_system, common))
    if system and own and system != own:
        raise UserError("the system turn of the prompt differs from that of `chosen` and `rejected`: keep one of them")
    begun, turns = _stripped(context[len(system) :]), _stripped(common[len(own) :])
    if begun == [*turns, *_stripped(chosen)][: len(begun)]:
        return [*(own or system), *common[len(own) :]]
    if begun[-len(turns) :] == turns:  # the last turns of a longer prompt are repeated
        return [*own, *context] if not system else list(context)
    raise UserError(
        "`chosen` and `rejected` are whole dialogues that do not begin with the prompt: remove the prompt, or keep the answers "
        "alone"
    )


def _prompt_side(record: Record) -> tuple[list[Message], set[str]]:
    """What is answered, by `prompt`, `instruction` or the turns before the answer; and the fields that were read."""
    if "prompt" in record:
        prompt = record["prompt"]
        if isinstance(prompt, list):
            return _turns(prompt, "prompt"), {"prompt"}
        return _transcript(_text(prompt), open=True) or [_turn("user", prompt)], {"prompt"}
    if "instruction" not in record:
        name = _first(record, TURNS)
        turns = _turns(record[name], name)
        if _is_answer(_answers(record, "chosen")) and turns and turns[-1]["role"] == "assistant":
            raise UserError(
                f"`{name}` ends with an answer, and `chosen` and `rejected` are two more: remove one of the two"
            )
        return turns, {name}
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise UserError(f"`history` is a list of [instruction, answer], not {pairs!r:.60}")
    turns = [_turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    name = _first(record, INPUTS)
    parts = [_text(record["instruction"]), *([_text(record[name])] if name else [])]
    return [*turns, _turn("user", "\n\n".join(parts))], {"instruction", "history", name}


def _answers(record: Record, name: str) -> list[Message]:
    """The answer in a field: text, a turn, a list of turns, or a dialogue of HH-RLHF."""
    value = record[name]
    if isinstance(value, (list, Mapping)) and not _is_parts(value):
        return _turns(value if isinstance(value, list) else [value], name)
    text = _text(value)
    prompt = record.get("prompt")
    if isinstance(prompt, str) and _transcript(prompt, open=True):
        text = text.strip()  # HH-RLHF's answers begin with the blank behind "Assistant:"
    return (_transcript(text) if name in ("chosen", "rejected") else []) or [_turn("assistant", text)]


def _transcript(text: str, open: bool = False) -> list[Message]:
    """The turns of a dialogue of HH-RLHF, none where a text is not one. open: it is a prompt, which ends with "Assistant:"."""
    pieces = HH_TURN.split("\n\n" + text.lstrip())
    if pieces[0] or pieces[1:2] != ["Human"] or "Assistant" not in pieces[1::2]:
        return []
    if open and (pieces[-2] != "Assistant" or pieces[-1].strip()):
        return []
    turns = [
        _turn("user" if who == "Human" else "assistant", text.strip())
        for who, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return turns[:-1] if open else turns


def _completed(record: Record, messages: list[Message], read: Iterable[str]) -> list[Message]:
    """The messages with the system turn of the record in front; UserError for a field of text that is not read."""
    known = {*read, *SYSTEMS}
    for name in record:
        if name in TEXT_FIELDS - known and _filled(record[name]):
            raise UserError(
                f"the field `{name}` is not read in a record of this shape ({', '.join(record)}): write it into a turn, or "
                "remove it"
            )
    turns = next((name for name in TURNS if name in known), "")
    for name in PROMPTS if turns else ():
        text = record.get(name)
        if isinstance(text, str) and not any(text.strip() in message["content"] for message in messages):
            raise UserError(f"the field `{name}` is in no turn of `{turns}`: write it into a turn, or remove it")
    for name in SYSTEMS:
        if not _filled(record.get(name)):
            continue
        first = _turn("system", record[name])
        own = [message for message in messages if _is_system(message)]
        if own and own != [first]:
            raise UserError(f"the field `{name}` differs from the system turn of the dialogue: keep one of them")
        messages = messages if own else [first, *messages]
    return messages


def _check_desirable(record: Record) -> None:
    """UserError for an answer that KTO's label calls undesirable: it would be trained on as a good one."""
    for name in LABELS:
        if str(record.get(name)).strip().lower() == "false":
            raise UserError(
                f"`{name}` is false, so the answer is undesirable (KTO), and a dialogue is trained on as it is: keep the records "
                "whose label is true, or pair the answers as `chosen` and `rejected`"
            )


def _turns(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"`{name}` is a list of turns, not {value!r:.60}")
    if not value:
        raise UserError(f"`{name}` has no turn: write one, or remove the record")
    return [_message(turn) for turn in value]


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"a turn of a dialogue is an object with role and content, not {turn!r:.60}")
    role = str(turn.get("role", turn.get("from", "")))
    content = turn.get("content", turn.get("value"))
    of = role if role in ROLES else "a dialogue"
    for name in turn:
        if name in TURN_FIELDS and _filled(turn[name]):
            raise UserError(f"a turn of {of} has `{name}`, which is not read: write it as text in its content")
        if name in TURN_WEIGHTS and turn[name] in (0, False) and turn[name] is not None:
            raise UserError(
                f"a turn of {of} has `{name}`: {turn[name]!r}, and every answer is trained on: move what is not "
                "into the prompt of a record with `prompt` and `completion`"
            )
    if role not in ROLES:
        raise UserError(f"a turn needs a role ({', '.join(ROLES)}), and this has {dict(turn)!r:.80}")
    if content is None:
        raise UserError(f"a turn needs a content, and this has {dict(turn)!r:.80}")
    return _turn(ROLES[role], content)


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": _text(content)}


def _text(value: Any) -> str:
    """A text, or the text of content parts."""
    if not _is_parts(value):
        if not isinstance(value, str):
            raise UserError(f"text was expected, not {value!r:.60}")
        return value
    other = next((part for part in value if part.get("type") != "text"), None)
    if other is not None:
        raise UserError(f"a content has a part of type {other.get('type')!r}, and only parts of type 'text' are read")
    return "".join(_text(part.get("text")) for part in value)


def _is_parts(value: Any) -> bool:
    """Whether a value is a list of content parts, and not of turns."""
    parts = value if isinstance(value, list) else []
    return bool(parts) and all(
        isinstance(p, Mapping) and "type" in p and not {"role", "from"} & p.keys() for p in parts
    )


def _is_answer(messages: Sequence[Message]) -> bool:
    return not messages or messages[0]["role"] == "assistant"


def _is_system(message: Message) -> bool:
    return message["role"] == "system"


def _first(record: Record, names: Sequence[str], filled: bool = True) -> str:
    """The first of some fields that a record has, or has something in; empty: none."""
    return next((name for name in names if name in record and (not filled or _filled(record[name]))), "")


def _filled(value: Any) -> bool:
    return value not in (None, "", "[]", "{}", [], {}, ())
