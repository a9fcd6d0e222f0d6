"""The post-processor in tokenizer.json: special tokens around a text. firth itself adds them by id, in its layouts.

    bidirectional    [CLS] text [SEP]      [CLS] text [SEP] text [SEP]      encoders
    causal           <s> text                                               decoders
    seq2seq          text </s>                                              encoder-decoders

With it, `tokenizer(text)` of transformers, sentence-transformers and vLLM returns what the model was trained on. A
tokenizer that has a post-processor, or whose configuration forbids it (`add_bos_token`), is unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import Tokenizer as Engine
from tokenizers import processors

from firth.types import UserError

AttentionKind = Literal["bidirectional", "causal", "seq2seq"]


def without_template(definition: str) -> str:
    """Return a tokenizer.json without its post-processor; unchanged if it has none."""
    if json.loads(definition).get("post_processor") is None:
        return definition
    without = json.loads(definition) | {"post_processor": None}
    return str(engine_of(json.dumps(without)).to_str(pretty=True))


def engine_of(definition: str) -> Engine:
    """Return the engine of a tokenizer.json that the library wrote.

    Raises:
        UserError: The library cannot read what it wrote, as for a few damaged files.
    """
    try:
        return Engine.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"the definition of this tokenizer is damaged ({reason}): copy tokenizer.json again") from None


def added_ids(engine: Engine) -> list[int]:
    """Return the ids that a tokenizer adds around a text."""
    return list(engine.encode("", add_special_tokens=True).ids)


def with_template(definition: str, roles: Mapping[str, str], attention: AttentionKind, bos: bool | None) -> str:
    """Return a tokenizer.json that adds the special tokens of a model, if the tokenizer has them.

    Args:
        definition: The tokenizer.json.
        roles: Role -> token.
        attention: Attention of the model.
        bos: Whether a decoder's texts start with bos; None: if there is one.
    """
    engine = engine_of(definition)
    first, last = {"bidirectional": ("cls", "sep"), "causal": ("bos", ""), "seq2seq": ("", "eos")}[attention]
    if added_ids(engine) or (attention == "causal" and bos is False) or not {first, last} - {""} <= roles.keys():
        return definition
    before, after = roles.get(first, ""), roles.get(last, "")
    pair = [before, "$A", after, "$B:1", after and f"{after}:1"]
    special_tokens_around(engine, [before, "$A", after], [part for part in pair if part])
    return str(engine.to_str(pretty=True))


def special_tokens_around(engine: Engine, single: list[str], pair: list[str]) -> None:
    """Add special tokens around the texts of an engine.

    Args:
        engine: Changed in place.
        single: Template of a text, such as ["[CLS]", "$A", "[SEP]"].
        pair: Template of a pair of texts.
    """
    names = {part.split(":")[0] for part in [*single, *pair] if part and not part.startswith("$")}
    present: list[Any] = [] if engine.post_processor is None else [engine.post_processor]
    template = processors.TemplateProcessing(
        single=[part for part in single if part],
        pair=pair,
        special_tokens=[(n, engine.token_to_id(n)) for n in sorted(names)],
    )
    engine.post_processor = processors.Sequence([*present, template]) if present else template
