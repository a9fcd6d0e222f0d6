"""What a model reads around a text, written into tokenizer.json for others; firth itself frames by id, in its layouts.

    both      [CLS] text [SEP]      [CLS] text [SEP] text [SEP]      encoders
    left      <s> text                                               decoders
    source    text </s>                                              encoder-decoders

`tokenizer(text)` of transformers, sentence-transformers and vLLM then give what the model met in training. A tokenizer
that frames its texts already, or whose configuration forbids it (`add_bos_token`), stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import Tokenizer as Engine
from tokenizers import processors

from firth.types import UserError

Reads = Literal["bidirectional", "causal", "seq2seq"]


def has_no_template(definition: str) -> str:
    """A tokenizer.json that frames nothing, written as the library writes it; one that frames nothing is as it was."""
    if json.loads(definition).get("post_processor") is None:
        return definition
    told = json.loads(definition) | {"post_processor": None}
    return str(engine_of(json.dumps(told)).to_str(pretty=True))


def engine_of(definition: str) -> Engine:
    """Return the engine of a tokenizer.json as the library wrote it, which reads a few damaged ones once and not again.

    Raises:
        UserError: The library does not read what it wrote.
    """
    try:
        return Engine.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"the definition of this tokenizer is damaged ({reason}): copy tokenizer.json again") from None


def frames(engine: Engine) -> list[int]:
    """The ids that a tokenizer itself puts around a text."""
    return list(engine.encode("", add_special_tokens=True).ids)


def framed(definition: str, roles: Mapping[str, str], reads: Reads, bos: bool | None) -> str:
    """A tokenizer.json that frames its texts as a model of this kind reads them, where its roles have the tokens.

    roles: role -> token. bos: whether bos stands before a decoder's texts; None: yes, where there is one.
    """
    engine = engine_of(definition)
    first, last = {"bidirectional": ("cls", "sep"), "causal": ("bos", ""), "seq2seq": ("", "eos")}[reads]
    if frames(engine) or (reads == "causal" and bos is False) or not {first, last} - {""} <= roles.keys():
        return definition
    before, after = roles.get(first, ""), roles.get(last, "")
    pair = [before, "$A", after, "$B:1", after and f"{after}:1"]
    special_tokens_around(engine, [before, "$A", after], [part for part in pair if part])
    return str(engine.to_str(pretty=True))


def special_tokens_around(engine: Engine, single: list[str], pair: list[str]) -> None:
    """Let an engine put tokens around its texts. single, pair: the parts, such as ["[CLS]", "$A", "[SEP]"]."""
    names = {part.split(":")[0] for part in [*single, *pair] if part and not part.startswith("$")}
    there: list[Any] = [] if engine.post_processor is None else [engine.post_processor]
    template = processors.TemplateProcessing(
        single=[part for part in single if part],
        pair=pair,
        special_tokens=[(n, engine.token_to_id(n)) for n in sorted(names)],
    )
    engine.post_processor = processors.Sequence([*there, template]) if there else template
