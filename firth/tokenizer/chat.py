"""Messages to tokens and a loss mask: the only door between a dialogue and a model.

A message is {"role", "content"}; a turn is `<|im_start|>role`, a line break, the content and `<|im_end|>` (ChatML).
Template pieces and content are encoded separately, so whatever a user writes stays text. The mask is True on what
the assistant says *and on the `<|im_end|>` that ends its turn*: a model never asked for its stop token never stops.

>>> from firth.tokenizer.train import train
>>> t = train(["user assistant hello there " * 9], "byte-bpe", vocab_size=400, num_sentinels=0)
>>> tokens, mask = encode(t, [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}])
>>> t.token(tokens[mask][-1]), t.decode(tokens[mask])
('<|im_end|>', 'there')
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer as Engine

from firth.tokenizer import chat_template
from firth.tokenizer.chat_template import END, START, TEMPLATE
from firth.tokenizer.normalize import whole
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

Message = dict[str, str]


def encode(tokenizer: Tokenizer, messages: Sequence[Message], open: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """tokens (n,) int32 and mask (n,) bool of a dialogue. open: end with the assistant's turn begun, to be answered.

    A tokenizer that brings its own chat template is written to as that says (`firth.tokenizer.chat_template`). UserError where
    it cannot write this dialogue, puts no stop token behind the last answer, or where there is neither a template nor
    the tokens of ChatML.
    """
    if tokenizer.template is not None and tokenizer.template != TEMPLATE:
        return _templated(tokenizer, tokenizer.template, messages, open)
    start, end = _turn(tokenizer)
    if _prefixes(tokenizer.definition)[0]:
        return _templated(tokenizer, TEMPLATE, messages, open)
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
    return _joined(parts)


def stops(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: eos, what the template or ChatML puts behind the assistant's turn, and `Tokenizer.ends`.

    The second is left out where there is no such token.
    """
    eos = tokenizer.vocab.roles.get("eos")
    try:
        tokens, mask = encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        found = [eos, int(tokens[mask][-1])]
    except UserError:
        found = [eos]
    return list(dict.fromkeys(i for i in (*found, *map(tokenizer.id, tokenizer.ends)) if i is not None))


def _turn(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of ChatML's two tokens."""
    start, end = (tokenizer.engine.token_to_id(token) for token in (START, END))
    if start is None or end is None:
        raise UserError(
            f"this tokenizer cannot write a dialogue: it has neither a chat_template.jinja of its own nor the tokens "
            f"{START} and {END}; train one with `firth tokenizer train`"
        )
    return start, end


def _joined(parts: Sequence[tuple[np.ndarray, bool]]) -> tuple[np.ndarray, np.ndarray]:
    if not parts:
        return np.zeros(0, np.int32), np.zeros(0, bool)
    tokens = np.concatenate([p for p, _ in parts]).astype(np.int32)
    return tokens, np.concatenate([np.full(len(p), m) for p, m in parts])


def _templated(
    tokenizer: Tokenizer, source: str, messages: Sequence[Message], open: bool
) -> tuple[np.ndarray, np.ndarray]:
    names = {f"{role}_token": tokenizer.token(id) for role, id in tokenizer.vocab.roles.items()}
    pieces, shown = chat_template.parts(source, messages, names, open)
    parser, special = _parser(tokenizer.definition), tokenizer.vocab.special
    prefixes, after = _prefixes(tokenizer.definition)
    parts: list[tuple[np.ndarray, bool]] = []
    text = False  # whether a text goes on: a tokenizer that puts a blank before a text does not then
    for i, piece in enumerate(pieces):
        answered = i > 0 and messages[i - 1]["role"] == "assistant"
        blank = piece.endswith(" ") and (i < len(shown) or open)  # it belongs to the word that follows
        found = _going_on(parser, piece.removesuffix(" ") if blank else piece, prefixes and text)
        ids = np.array([id for id, _ in found], np.int32)
        stop = next((k for k, id in enumerate(ids) if special[id]), None)
        if stop is not None and piece[: found[stop][1]].strip():
            stop = None
        if answered and stop is not None:
            parts += [(ids[: stop + 1], True), (ids[stop + 1 :], False)]
        else:
            parts.append((ids, False))
        if answered and stop is None and i == len(messages):
            raise UserError("the tokenizer's chat template puts no stop token behind the answer: no model would stop")
        if i < len(shown):
            if len(ids):
                text = not special[ids[-1]] or not after
            content = _going_on(tokenizer.engine, " " * blank + shown[i], prefixes and (text or blank))
            parts.append((np.array([id for id, _ in content], np.int32), messages[i]["role"] == "assistant"))
            text = text or bool(shown[i])
    return _joined(parts)


def _going_on(engine: Engine, text: str, going_on: bool) -> list[tuple[int, int]]:
    """(id, where it begins) of a text. going_on: it is read behind a line break, which is then left out; so a tokenizer
    that puts a blank before each text (the caller knows) puts none here.
    """
    ahead = "\n" if going_on else ""
    first = engine.encode(ahead, add_special_tokens=False).ids
    found = engine.encode(ahead + whole(text), add_special_tokens=False)
    if found.ids[: len(first)] != first:
        first, ahead, found = [], "", engine.encode(whole(text), add_special_tokens=False)
    starts = [begin - len(ahead) for begin, _ in found.offsets]
    return list(zip(found.ids, starts, strict=True))[len(first) :]


@functools.lru_cache(maxsize=8)
def _parser(definition: str) -> Engine:
    """A tokenizer that reads control tokens in a text: for what templates write."""
    engine = Engine.from_str(definition)
    engine.encode_special_tokens = False
    return engine


@functools.lru_cache(maxsize=8)
def _prefixes(definition: str) -> tuple[bool, bool]:
    """Whether a blank is put before a text (as SentencePiece does), and whether behind a control token too."""
    engine = _parser(definition)
    plain = engine.encode("a", add_special_tokens=False).tokens
    control = [t.content for t in engine.get_added_tokens_decoder().values() if t.special]
    behind = engine.encode(control[0] + "a", add_special_tokens=False).tokens[1:] if control else plain
    return plain[:1] != ["a"] and plain[0].startswith("▁"), bool(behind) and behind[0].startswith("▁")
