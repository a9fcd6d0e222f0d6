"""Messages to tokens and a loss mask: the only door between a dialogue and a model.

A message is {"role", "content"}; a turn is `<|im_start|>role`, a line break, the content and `<|im_end|>` (ChatML).
Template pieces and content are encoded separately, so whatever a user writes stays text. The mask is True on what
the assistant says *and on the `<|im_end|>` that ends its turn*: a model never asked for its stop token never stops.

>>> from firth.text.train import train
>>> t = train(["user assistant hello there " * 9], "byte-bpe", size=400, sentinels=0)
>>> tokens, mask = encode(t, [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}])
>>> t.token(tokens[mask][-1]), t.decode(tokens[mask])
('<|im_end|>', 'there')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from firth.text.tokenizer import Tokenizer
from firth.types import UserError

Message = dict[str, str]

START, END = "<|im_start|>", "<|im_end|>"

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The same in Jinja, saved as chat_template.jinja for other tools."""


def encode(tokenizer: Tokenizer, messages: Sequence[Message], open: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """tokens (n,) int32 and mask (n,) bool of a dialogue. open: end with the assistant's turn begun, to be answered."""
    start, end = tokenizer.id(START), tokenizer.id(END)
    parts: list[tuple[np.ndarray, bool]] = []
    for message in messages:
        says = message["role"] == "assistant"
        parts.append((np.array([start], np.int32), False))
        parts.append((tokenizer.encode(message["role"] + "\n"), False))
        parts.append((tokenizer.encode(message["content"]), says))
        parts.append((np.array([end], np.int32), says))
        parts.append((tokenizer.encode("\n"), False))
    if open:
        parts.append((np.array([start], np.int32), False))
        parts.append((tokenizer.encode("assistant\n"), False))
    tokens = np.concatenate([p for p, _ in parts]).astype(np.int32) if parts else np.zeros(0, np.int32)
    mask = np.concatenate([np.full(len(p), m) for p, m in parts]) if parts else np.zeros(0, bool)
    return tokens, mask


ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "system": "system", "tool": "tool", "function": "tool",
}  # fmt: skip


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """The dialogue in a record: `messages`, ShareGPT's `conversations`, `prompt`/`completion`, or Alpaca's `instruction`.

    Raises UserError (without the place, which the reader of the file adds) where a record is none of these.
    """
    turns = record.get("messages") or record.get("conversations")
    if isinstance(turns, list):
        return [_message(turn) for turn in turns]
    if "prompt" in record and ("completion" in record or "response" in record):
        return [*prompt_of(record["prompt"]), *answer_of(record.get("completion", record.get("response")))]
    if "instruction" in record and "output" in record:
        asked = _text(record["instruction"])
        if record.get("input"):
            asked += "\n\n" + _text(record["input"])
        system = [{"role": "system", "content": _text(record["system"])}] if record.get("system") else []
        return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": _text(record["output"])}]
    raise UserError(
        "a dialogue needs `messages`, `conversations`, `prompt` and `completion`, or `instruction` and `output`; "
        f"this record has {', '.join(record) or 'nothing'}"
    )


def prompt_of(prompt: Any) -> list[Message]:
    """A prompt as messages: a string is one user's turn."""
    return [_message(t) for t in prompt] if isinstance(prompt, list) else [{"role": "user", "content": _text(prompt)}]


def answer_of(answer: Any) -> list[Message]:
    """An answer as messages: a string is one assistant's turn."""
    return (
        [_message(t) for t in answer] if isinstance(answer, list) else [{"role": "assistant", "content": _text(answer)}]
    )


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"a turn of a dialogue is an object with role and content, not {turn!r:.60}")
    role = str(turn.get("role", turn.get("from", "")))
    content = turn.get("content", turn.get("value"))
    if role not in ROLES or content is None:
        raise UserError(
            f"a turn needs a role (user, assistant, system, tool) and a content, and this has {dict(turn)!r:.80}"
        )
    return {"role": ROLES[role], "content": _text(content)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"text was expected where {value!r:.60} stands")
    return value
