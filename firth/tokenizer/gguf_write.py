"""Write a tokenizer as GGUF metadata, in the form that `firth.tokenizer.gguf_read` reads.

Only tokenizers to which llama.cpp gives exactly the same ids are written: byte-level BPE whose pre-tokenizer has a name,
SentencePiece BPE whose merges follow from scores, uncased WordPiece.

>>> split_patterns({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
...      {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}) == PRE["smollm"].patterns
True
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from firth.tokenizer import chat, formats
from firth.tokenizer.chat_template import TEMPLATE
from firth.tokenizer.formats import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER
from firth.tokenizer.gguf_read import BLANK, GPT2, PRE, ROLES
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError


def metadata(tokenizer: Tokenizer, size: int, dialogue: bool) -> dict[str, Any]:
    """Return the GGUF metadata of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        size: Number of ids of the model; ids without a token get names like [PAD7].
        dialogue: Whether the chat template is written and, unless the tokenizer says otherwise, bos is not added. A template
            other than firth's own is always written.

    Raises:
        UserError: llama.cpp has no equivalent tokenizer.
    """
    definition = json.loads(tokenizer.definition)
    kind, extra = _kind(definition)
    dialogue = dialogue or tokenizer.template not in (None, TEMPLATE)
    tokens, types = _tokens_and_types(tokenizer, definition, size)
    scores = extra.pop("scores", None)
    out: dict[str, Any] = {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens}
    out["tokenizer.ggml.token_type"] = np.array(types, "<i4")
    if scores is not None:
        out["tokenizer.ggml.scores"] = np.array([scores.get(token, 0.0) for token in tokens], "<f4")
    out |= {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    roles = tokenizer.vocab.roles
    out |= {f"tokenizer.ggml.{key}": int(roles[role]) for role, key in ROLES.items() if role in roles}
    add_bos = not dialogue if tokenizer.bos is None else tokenizer.bos
    out["tokenizer.ggml.add_bos_token"] = "bos" in roles and add_bos
    out["tokenizer.ggml.add_eos_token"] = False
    if kind == "bert":
        out["tokenizer.ggml.tokens"] = [_bert_token(tokens[i], types[i]) for i in range(len(tokens))]
        del out["tokenizer.ggml.add_bos_token"], out["tokenizer.ggml.add_eos_token"]
    if dialogue:
        source = TEMPLATE if tokenizer.template is None else tokenizer.template
        # `generation` (the loss mask) is not part of Jinja, and llama.cpp rejects it.
        out["tokenizer.chat_template"] = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
        ends = [stop for stop in chat.stops(tokenizer) if stop != roles.get("eos")]
        out |= {"tokenizer.ggml.eot_token_id": int(ends[-1])} if ends else {}
    return out


def _tokens_and_types(tokenizer: Tokenizer, definition: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the token and the type of every id."""
    special, bytewise = tokenizer.vocab.special, definition["model"].get("byte_fallback")
    added = {entry["id"]: entry["special"] for entry in definition["added_tokens"]}
    tokens, types = [], []
    for id in range(size):
        token = tokenizer.engine.id_to_token(id)
        tokens.append(f"[PAD{id}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif special[id]:
            types.append(UNKNOWN if bytewise and token == definition["model"]["unk_token"] else CONTROL)
        elif id in added:
            types.append(USER)
        else:
            types.append(BYTE if bytewise and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL)
    return tokens, types


def _bert_token(token: str, type: int) -> str:
    if type in (CONTROL, UNUSED):
        return token
    return token[2:] if token.startswith("##") else BLANK + token


def _kind(definition: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return llama.cpp's type of tokenizer and the metadata specific to it.

    Raises:
        UserError: llama.cpp has no equivalent tokenizer.
    """
    model, normalizer, pre = definition["model"], definition["normalizer"], definition["pre_tokenizer"] or {}
    if model["type"] == "BPE" and "ByteLevel" in json.dumps(pre) and normalizer is None:
        patterns, ignore_merges = split_patterns(pre), bool(model.get("ignore_merges"))
        name = next(
            (n for n, known in PRE.items() if (known.patterns, known.ignore_merges) == (patterns, ignore_merges)), None
        )
        if name is not None and not model.get("end_of_word_suffix"):
            return "gpt2", {"pre": name, "merges": [" ".join(pair) for pair in _pairs(model)]}
    if model["type"] == "BPE" and model.get("byte_fallback"):
        prefixed, scores = PREFIXES.get(json.dumps([normalizer, pre], sort_keys=True)), _scores(definition)
        if prefixed is not None and scores is not None:
            return "llama", {"pre": "default", "scores": scores, "add_space_prefix": prefixed}
    if model["type"] == "WordPiece" and (normalizer or {}).get("lowercase") and pre.get("type") == "BertPreTokenizer":
        return "bert", {"token_type_count": 2}
    raise UserError(
        f"llama.cpp has no tokenizer that splits text as this one does ({model['type']}): train the model with one of "
        "`firth tokenizer train --algorithm byte-bpe`"
    )


def _prefixes() -> dict[str, bool]:
    """Return SentencePiece's ways to write blanks as JSON -> whether a prefix space is added: firth's and transformers'."""
    found = {}
    for dummy in (True, False):
        own = json.loads(
            formats.sentencepiece_engine([("<unk>", 0.0, UNKNOWN)], False, b"", dummy, squeeze=False).to_str()
        )
        found[json.dumps([own["normalizer"], own["pre_tokenizer"]], sort_keys=True)] = dummy
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    hf = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, blank]}
    return found | {json.dumps([hf, {}], sort_keys=True): True}


PREFIXES = _prefixes()


def _scores(definition: Mapping[str, Any]) -> dict[str, float] | None:
    """Return scores with which SentencePiece makes the same merges in the same order; None if there are none."""
    model = definition["model"]
    pairs = _pairs(model)
    found: dict[str, float] = {}
    for at, (a, b) in enumerate(pairs):
        found.setdefault(a + b, -float(at))
    added = {entry["content"] for entry in definition["added_tokens"]}
    vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
    pieces = [(t, found.get(t, 0.0), CONTROL if t in added or re.fullmatch("<0x..>", t) else NORMAL) for t in vocab]
    return found if formats.all_merges(pieces) == pairs else None


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    return [(a, b) for a, b in split]


def split_patterns(pre: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the patterns that a pre-tokenizer splits by, in order; None if it does anything else."""
    kind = pre.get("type")
    if kind == "Sequence":
        found = [split_patterns(one) for one in pre["pretokenizers"]]
        return None if None in found else tuple(p for some in found for p in some or ())
    if kind == "ByteLevel" and not pre["add_prefix_space"]:
        return (GPT2,) if pre.get("use_regex", True) else ()
    if kind == "Digits" and pre["individual_digits"]:
        return (r"\p{N}",)
    if kind == "Split" and pre["behavior"] == "Isolated" and not pre["invert"] and "Regex" in pre["pattern"]:
        return (pre["pattern"]["Regex"],)
    return None
