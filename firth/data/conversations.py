r"""Read a record of any common format as a dialogue, a prompt, a preference, or a labeled answer.

`docs/reference/data-formats.md` lists the formats. A field that carries text to the model in a known format is either read with
the meaning that the format gives it, or the record is rejected with a message that names the field. No text is dropped
silently. `firth.tokenizer.chat` encodes the messages.

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
"""Role in a record -> role in the dialogue. A `function_call` is text of the assistant, an `observation` is its result."""

TURNS = ("messages", "conversations", "conversation")
"""Fields that hold a whole dialogue, as a list of turns."""

PROMPTS = ("prompt", "instruction")
"""Fields that hold a prompt."""

INPUTS = ("input", "context")
"""Fields that belong to an `instruction`: those of Alpaca and Dolly."""

ANSWERS = ("completion", "response", "output")
"""Fields that hold one answer."""

SYSTEMS = ("system", "system_prompt")
"""Fields that hold the system turn."""

LABELS = ("label", "kto_tag")
"""Fields of KTO records: whether the answer is desirable."""

TEXT_FIELDS = frozenset({
    *SYSTEMS, *INPUTS, "query", "history", "tools", "functions", "documents", "image", "images", "video", "videos", "audio",
    "audios", "chat_template_kwargs",
})  # fmt: skip
"""Fields that reach the model in some known format: a record is rejected if it has one that is not read."""

TURN_FIELDS = frozenset({
    "tool_calls", "function_call", "tools", "reasoning", "reasoning_content", "thinking", "image", "images", "video", "videos",
    "audio", "audios",
})  # fmt: skip
"""Fields of a turn that reach the model in some known format and are not supported here."""

TURN_WEIGHTS = ("weight", "train", "training")
"""Fields of a turn that switch training on it on or off: those of OpenAI and axolotl."""

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
"""Start of a turn in the strings of HH-RLHF (Bai 2022)."""


def messages_of(record: Record) -> list[Message]:
    """Return the dialogue of a record, including its answers.

    Raises:
        UserError: The format is unknown, or a field is not supported. The caller adds file and line.
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
                "`chosen` and `rejected`, and use the recipe `reward_model` or `dpo`"
            )
        context, read = _prompt_side(record)
        return _completed(record, [*context, *_answers(record, answer)], read)
    raise UserError(
        "a dialogue needs `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`; "
        f"this record has {', '.join(record) or 'nothing'}"
    )


def prompt_of(record: Record) -> list[Message]:
    """Return the prompt of a record: its dialogue up to the last answer.

    Raises:
        UserError: As in `messages_of`.
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

    Both answers may be whole dialogues (UltraFeedback, HH-RLHF). Their common beginning is then the prompt, and a
    `prompt` field that repeats it is read once.

    Raises:
        UserError: The record is not a preference, or a field is not supported.

    >>> hello = {"role": "user", "content": "hello"}
    >>> good, bad = ({"role": "assistant", "content": c} for c in ("hi", "go away"))
    >>> comparison({"chosen": [hello, good], "rejected": [hello, bad]}) == ([hello], [good], [bad])
    True
    >>> comparison({"prompt": "hello", "chosen": [hello, good], "rejected": [hello, bad]}) == ([hello], [good], [bad])
    True
    """
    record = _pair_named(record)
    chosen, rejected = _answers(record, "chosen"), _answers(record, "rejected")
    context, read = (
        _prompt_side(record) if _first(record, PROMPTS, filled=False) or _first(record, TURNS) else ([], set())
    )
    if not _is_answer(chosen) or not _is_answer(rejected):
        if _is_answer(chosen) != _is_answer(rejected):
            raise UserError(
                "one of `chosen` and `rejected` is a whole dialogue and the other is an answer: use one format for both"
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


def unpaired(record: Record) -> tuple[list[Message], list[Message], bool]:
    """Return (prompt, answer, whether the answer is desirable) of a KTO record: a dialogue with a label.

    Raises:
        UserError: The record has no label or no answer, or a field is not supported.

    >>> unpaired({"prompt": "hello", "completion": "go away", "label": False})
    ([{'role': 'user', 'content': 'hello'}], [{'role': 'assistant', 'content': 'go away'}], False)
    """
    name = _first(record, LABELS, filled=False)
    label = {"true": True, "false": False}.get(str(record.get(name)).strip().lower())
    if label is None:
        given = f"`{name}` is {record[name]!r:.60}" if name else f"this record has {', '.join(record) or 'nothing'}"
        raise UserError(f"a KTO record needs a `label` of true (desirable) or false (undesirable), and {given}")
    *prompt, answer = messages_of({key: value for key, value in record.items() if key not in LABELS})
    if answer["role"] != "assistant" or not prompt:
        raise UserError("a KTO record needs a prompt and one answer after it, which its label is about")
    return prompt, [answer], label


def _pair_named(record: Record) -> Record:
    """Return a preference record with its answers in `chosen` and `rejected`."""
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
            f"this is a KTO record: `{label}` marks one answer as desirable or not, and a preference needs two answers to one "
            "prompt: use the recipe `kto`, or pair them as `chosen` and `rejected`"
        )
    raise UserError(f"a preference needs `chosen` and `rejected`; this record has {', '.join(record) or 'nothing'}")


def _merged(context: Sequence[Message], common: Sequence[Message], chosen: Sequence[Message]) -> list[Message]:
    """Return the prompt of two whole dialogues that begin with `common`, where the record may repeat it in `context`."""
    system, own = list(takewhile(_is_system, context)), list(takewhile(_is_system, common))
    if system and own and system != own:
        raise UserError("the system turn of the prompt differs from that of `chosen` and `rejected`: keep one of them")
    prompt_turns, turns = _stripped(context[len(system) :]), _stripped(common[len(own) :])
    if prompt_turns == [*turns, *_stripped(chosen)][: len(prompt_turns)]:
        return [*(own or system), *common[len(own) :]]
    if prompt_turns[-len(turns) :] == turns:  # the last turns of a longer prompt are repeated
        return [*own, *context] if not system else list(context)
    raise UserError(
        "`chosen` and `rejected` are whole dialogues that do not begin with the prompt: remove the prompt, or keep only the "
        "answers"
    )


def _prompt_side(record: Record) -> tuple[list[Message], set[str]]:
    """Return the prompt from `prompt`, `instruction` or the turns before the answer; and the names of the fields that were read."""
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
                f"`{name}` ends with an answer, and `chosen` and `rejected` are two more: remove the answer from `{name}`"
            )
        return turns, {name}
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise UserError(f"`history` must be a list of [instruction, answer], not {pairs!r:.60}")
    turns = [_turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    name = _first(record, INPUTS)
    parts = [_text(record["instruction"]), *([_text(record[name])] if name else [])]
    return [*turns, _turn("user", "\n\n".join(parts))], {"instruction", "history", name}


def _answers(record: Record, name: str) -> list[Message]:
    """Return the answer in a field: text, a turn, a list of turns, or a dialogue of HH-RLHF."""
    value = record[name]
    if isinstance(value, (list, Mapping)) and not _is_parts(value):
        return _turns(value if isinstance(value, list) else [value], name)
    text = _text(value)
    prompt = record.get("prompt")
    if isinstance(prompt, str) and _transcript(prompt, open=True):
        text = text.strip()  # answers of HH-RLHF begin with the space after "Assistant:"
    return (_transcript(text) if name in ("chosen", "rejected") else []) or [_turn("assistant", text)]


def _transcript(text: str, open: bool = False) -> list[Message]:
    """Return the turns of an HH-RLHF dialogue, [] if the text is not one. With `open`, the text is a prompt that ends with "Assistant:"."""
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
    """Return the messages with the record's system turn in front. Raise UserError for a text field that is not read."""
    known = {*read, *SYSTEMS}
    for name in record:
        if name in TEXT_FIELDS - known and _filled(record[name]):
            raise UserError(
                f"the field `{name}` is not supported in a record of this format ({', '.join(record)}): write it into a turn, "
                "or remove it"
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
    """Raise UserError for an answer with a negative KTO label, which would be trained on as a good one."""
    for name in LABELS:
        if str(record.get(name)).strip().lower() == "false":
            raise UserError(
                f"`{name}` is false, so the answer is undesirable (KTO), but this recipe trains on every answer: use the recipe "
                "`kto`, or keep the records whose label is true"
            )


def _turns(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"`{name}` must be a list of turns, not {value!r:.60}")
    if not value:
        raise UserError(f"`{name}` has no turn: write one, or remove the record")
    return [_message(turn) for turn in value]


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"a turn of a dialogue must be an object with role and content, not {turn!r:.60}")
    role = str(turn.get("role", turn.get("from", "")))
    content = turn.get("content", turn.get("value"))
    of = role if role in ROLES else "a dialogue"
    for name in turn:
        if name in TURN_FIELDS and _filled(turn[name]):
            raise UserError(f"a turn of {of} has `{name}`, which is not supported: write it as text in the content")
        if name in TURN_WEIGHTS and turn[name] in (0, False) and turn[name] is not None:
            raise UserError(
                f"a turn of {of} has `{name}`: {turn[name]!r}, but every answer is trained on: move turns without training "
                "into the prompt of a record with `prompt` and `completion`"
            )
    if role not in ROLES:
        raise UserError(f"a turn needs a role ({', '.join(ROLES)}), and this turn is {dict(turn)!r:.80}")
    if content is None:
        raise UserError(f"a turn needs a content, and this turn is {dict(turn)!r:.80}")
    return _turn(ROLES[role], content)


def _stripped(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _turn(role: str, content: Any) -> Message:
    return {"role": role, "content": _text(content)}


def _text(value: Any) -> str:
    """Return a text, or the text of content parts."""
    if not _is_parts(value):
        if not isinstance(value, str):
            raise UserError(f"text was expected, not {value!r:.60}")
        return value
    other = next((part for part in value if part.get("type") != "text"), None)
    if other is not None:
        raise UserError(f"a content has a part of type {other.get('type')!r}, and only the type 'text' is supported")
    return "".join(_text(part.get("text")) for part in value)


def _is_parts(value: Any) -> bool:
    """Return whether a value is a list of content parts rather than turns."""
    parts = value if isinstance(value, list) else []
    return bool(parts) and all(
        isinstance(p, Mapping) and "type" in p and not {"role", "from"} & p.keys() for p in parts
    )


def _is_answer(messages: Sequence[Message]) -> bool:
    return not messages or messages[0]["role"] == "assistant"


def _is_system(message: Message) -> bool:
    return message["role"] == "system"


def _first(record: Record, names: Sequence[str], filled: bool = True) -> str:
    """Return the first of some fields that the record has (with a value if `filled`), or ""."""
    return next((name for name in names if name in record and (not filled or _filled(record[name]))), "")


def _filled(value: Any) -> bool:
    return value not in (None, "", "[]", "{}", [], {}, ())
