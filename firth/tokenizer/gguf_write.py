"""A tokenizer as GGUF files have it: what `firth.tokenizer.gguf_read` reads, with its table of names for how text is cut.

A kind is written only where llama.cpp makes the very same ids: byte-level BPE whose way to cut has a name, SentencePiece's
BPE whose merges some scores give back in their order, uncased WordPiece.

>>> cuts({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
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
    """What a GGUF file says of a tokenizer, for a model of `size` ids; ids without a token get names like [PAD7].

    dialogue: its chat template is written, and texts begin without bos, unless the tokenizer says whether they do. A
    template that is not firth's own is always written. UserError for a tokenizer that llama.cpp does not have.
    """
    definition = json.loads(tokenizer.definition)
    kind, more = _kind(definition)
    dialogue = dialogue or tokenizer.template not in (None, TEMPLATE)
    tokens, types = _listed(tokenizer, definition, size)
    scores = more.pop("scores", None)
    out: dict[str, Any] = {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens}
    out["tokenizer.ggml.token_type"] = np.array(types, "<i4")
    if scores is not None:
        out["tokenizer.ggml.scores"] = np.array([scores.get(token, 0.0) for token in tokens], "<f4")
    out |= {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    roles = tokenizer.vocab.roles
    out |= {f"tokenizer.ggml.{key}": int(roles[role]) for role, key in ROLES.items() if role in roles}
    begins = not dialogue if tokenizer.bos is None else tokenizer.bos
    out["tokenizer.ggml.add_bos_token"] = "bos" in roles and begins
    out["tokenizer.ggml.add_eos_token"] = False
    if kind == "bert":
        framed = range(len(tokens))
        out["tokenizer.ggml.tokens"] = [_phantom(tokens[i], types[i]) for i in framed]
        del out["tokenizer.ggml.add_bos_token"], out["tokenizer.ggml.add_eos_token"]
    if dialogue:
        source = TEMPLATE if tokenizer.template is None else tokenizer.template
        # What marks the assistant's words for training is no part of Jinja, and llama.cpp does not know it.
        out["tokenizer.chat_template"] = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
        ends = [stop for stop in chat.stops(tokenizer) if stop != roles.get("eos")]
        out |= {"tokenizer.ggml.eot_token_id": int(ends[-1])} if ends else {}
    return out


def _listed(tokenizer: Tokenizer, definition: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every id's token and type."""
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


def _phantom(token: str, type: int) -> str:
    if type in (CONTROL, UNUSED):
        return token
    return token[2:] if token.startswith("##") else BLANK + token


def _kind(definition: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """llama.cpp's kind of tokenizer, and what that kind says besides; UserError where it has none that does the same."""
    model, normalizer, pre = definition["model"], definition["normalizer"], definition["pre_tokenizer"] or {}
    if model["type"] == "BPE" and "ByteLevel" in json.dumps(pre) and normalizer is None:
        patterns, whole = cuts(pre), bool(model.get("ignore_merges"))
        name = next((n for n, cut in PRE.items() if (cut.patterns, cut.whole) == (patterns, whole)), None)
        if name is not None and not model.get("end_of_word_suffix"):
            return "gpt2", {"pre": name, "merges": [" ".join(pair) for pair in _pairs(model)]}
    if model["type"] == "BPE" and model.get("byte_fallback"):
        prefixed, scores = PREFIXES.get(json.dumps([normalizer, pre], sort_keys=True)), _scores(definition)
        if prefixed is not None and scores is not None:
            return "llama", {"pre": "default", "scores": scores, "add_space_prefix": prefixed}
    if model["type"] == "WordPiece" and (normalizer or {}).get("lowercase") and pre.get("type") == "BertPreTokenizer":
        return "bert", {"token_type_count": 2}
    raise UserError(
        f"llama.cpp has no tokenizer that cuts text as this one does ({model['type']}): train the model with one of "
        "`firth tokenizer train --algorithm byte-bpe`"
    )


def _prefixes() -> dict[str, bool]:
    """SentencePiece's ways to write blanks, as JSON -> whether a blank is put before a text: ours, and transformers'."""
    found = {}
    for dummy in (True, False):
        ours = json.loads(formats.pieced([("<unk>", 0.0, UNKNOWN)], False, b"", dummy, squeeze=False).to_str())
        found[json.dumps([ours["normalizer"], ours["pre_tokenizer"]], sort_keys=True)] = dummy
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    theirs = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, blank]}
    return found | {json.dumps([theirs, {}], sort_keys=True): True}


PREFIXES = _prefixes()


def _scores(definition: Mapping[str, Any]) -> dict[str, float] | None:
    """Scores by which SentencePiece makes the very same merges in the same order; None where no scores do."""
    model = definition["model"]
    pairs = _pairs(model)
    found: dict[str, float] = {}
    for at, (a, b) in enumerate(pairs):
        found.setdefault(a + b, -float(at))
    added = {entry["content"] for entry in definition["added_tokens"]}
    vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
    pieces = [(t, found.get(t, 0.0), CONTROL if t in added or re.fullmatch("<0x..>", t) else NORMAL) for t in vocab]
    return found if formats.ways(pieces) == pairs else None


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    return [(a, b) for a, b in split]


def cuts(pre: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns that a definition's pre-tokenizer cuts by, one after another; None where it does something else."""
    kind = pre.get("type")
    if kind == "Sequence":
        found = [cuts(one) for one in pre["pretokenizers"]]
        return None if None in found else tuple(p for some in found for p in some or ())
    if kind == "ByteLevel" and not pre["add_prefix_space"]:
        return (GPT2,) if pre.get("use_regex", True) else ()
    if kind == "Digits" and pre["individual_digits"]:
        return (r"\p{N}",)
    if kind == "Split" and pre["behavior"] == "Isolated" and not pre["invert"] and "Regex" in pre["pattern"]:
        return (pre["pattern"]["Regex"],)
    return None
