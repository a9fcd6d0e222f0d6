"""Encode a dialogue as tokens and a loss mask.

A message is {"role", "content"}; in ChatML a turn is `<|im_start|>role`, a line break, the content and `<|im_end|>`.
Template text and content are encoded separately, so that user text never becomes a control token. The mask is True on
the assistant's content *and on the `<|im_end|>` that ends its turn*: a model that is not trained on its stop token never
stops.

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
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

Message = dict[str, str]


def encode(tokenizer: Tokenizer, messages: Sequence[Message], open: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Encode a dialogue.

    Args:
        tokenizer: With its own chat template (`firth.tokenizer.chat_template`), or with the tokens of ChatML.
        messages: The dialogue.
        open: Whether to append the start of an assistant turn (a generation prompt).

    Returns:
        tokens (n,) int32 and the loss mask (n,) bool.

    Raises:
        UserError: The template cannot render the dialogue or writes no stop token after the last answer, or the tokenizer has
            neither a template nor the tokens of ChatML.
    """
    if tokenizer.template is not None and tokenizer.template != TEMPLATE:
        return _templated(tokenizer, tokenizer.template, messages, open)
    start, end = _turn(tokenizer)
    if _prefixes(tokenizer.definition)[0]:
        return _templated(tokenizer, TEMPLATE, messages, open)
    parts: list[tuple[np.ndarray, bool]] = []
    for message in messages:
        supervised = message["role"] == "assistant"
        parts.append((np.array([start], np.int32), False))
        parts.append((tokenizer.encode(message["role"] + "\n"), False))
        parts.append((tokenizer.encode(message["content"]), supervised))
        parts.append((np.array([end], np.int32), supervised))
        parts.append((tokenizer.encode("\n"), False))
    if open:
        parts.append((np.array([start], np.int32), False))
        parts.append((tokenizer.encode("assistant\n"), False))
    return _joined(parts)


def stops(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the tokens that end an answer.

    These are eos, the token that the template or ChatML writes after the assistant's turn (if there is one), and
    `Tokenizer.ends`.
    """
    eos = tokenizer.vocab.roles.get("eos")
    try:
        tokens, mask = encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        found = [eos, int(tokens[mask][-1])]
    except UserError:
        found = [eos]
    return list(dict.fromkeys(i for i in (*found, *map(tokenizer.id, tokenizer.ends)) if i is not None))


def _turn(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of ChatML's two tokens."""
    start, end = (tokenizer.engine.token_to_id(token) for token in (START, END))
    if start is None or end is None:
        raise UserError(
            f"this tokenizer cannot encode a dialogue: it has neither a chat_template.jinja nor the tokens "
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
    """Encode a dialogue as a chat template renders it."""
    names = {f"{role}_token": tokenizer.token(id) for role, id in tokenizer.vocab.roles.items()}
    pieces, shown = chat_template.split_template(source, messages, names, open)
    parser, special = _parser(tokenizer.definition), tokenizer.vocab.special
    prefixes, after = _prefixes(tokenizer.definition)
    parts: list[tuple[np.ndarray, bool]] = []
    text = False  # whether a text is continued: no prefix space then
    for i, piece in enumerate(pieces):
        after_answer = i > 0 and messages[i - 1]["role"] == "assistant"
        blank = piece.endswith(" ") and (i < len(shown) or open)  # the blank belongs to the next word
        found = _continued(parser, piece.removesuffix(" ") if blank else piece, prefixes and text)
        ids = np.array([id for id, _ in found], np.int32)
        stop = next((k for k, id in enumerate(ids) if special[id]), None)
        if stop is not None and piece[: found[stop][1]].strip():
            stop = None
        if after_answer and stop is not None:
            parts += [(ids[: stop + 1], True), (ids[stop + 1 :], False)]
        else:
            parts.append((ids, False))
        if after_answer and stop is None and i == len(messages):
            raise UserError("the tokenizer's chat template writes no stop token after the answer: no model would stop")
        if i < len(shown):
            if len(ids):
                text = not special[ids[-1]] or not after
            content = _continued(tokenizer.engine, " " * blank + shown[i], prefixes and (text or blank))
            parts.append((np.array([id for id, _ in content], np.int32), messages[i]["role"] == "assistant"))
            text = text or bool(shown[i])
    return _joined(parts)


def _continued(engine: Engine, text: str, continued: bool) -> list[tuple[int, int]]:
    """Encode a text, optionally as the continuation of another.

    Args:
        engine: Encodes the text.
        text: The text.
        continued: Encode it after a line break, which is then dropped, so that a tokenizer that adds a prefix space adds none.

    Returns:
        (id, start offset) of each token.
    """
    prefix = "\n" if continued else ""
    first = engine.encode(prefix, add_special_tokens=False).ids
    found = engine.encode(prefix + replace_lone_surrogates(text), add_special_tokens=False)
    if found.ids[: len(first)] != first:
        first, prefix, found = [], "", engine.encode(replace_lone_surrogates(text), add_special_tokens=False)
    starts = [begin - len(prefix) for begin, _ in found.offsets]
    return list(zip(found.ids, starts, strict=True))[len(first) :]


@functools.lru_cache(maxsize=8)
def _parser(definition: str) -> Engine:
    """Return an engine that recognizes control tokens in a text, for template text."""
    engine = Engine.from_str(definition)
    engine.encode_special_tokens = False
    return engine


@functools.lru_cache(maxsize=8)
def _prefixes(definition: str) -> tuple[bool, bool]:
    """Return whether a prefix space is added to a text (as in SentencePiece), and whether after a control token too."""
    engine = _parser(definition)
    plain = engine.encode("a", add_special_tokens=False).tokens
    control = [t.content for t in engine.get_added_tokens_decoder().values() if t.special]
    after = engine.encode(control[0] + "a", add_special_tokens=False).tokens[1:] if control else plain
    return plain[:1] != ["a"] and plain[0].startswith("▁"), bool(after) and after[0].startswith("▁")
