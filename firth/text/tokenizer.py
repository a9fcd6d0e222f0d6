"""Text to ids and back. The engine is the `tokenizers` library; what firth adds is the vocabulary's roles and one rule.

The rule: user text can never become a control token. `encode` never yields a special id, whatever the text contains;
control tokens are placed by id, by layouts and by `firth.text.chat`.

>>> from firth.text.train import train
>>> t = train(["low lower lowest slow " * 9], "byte-bpe", size=400, sentinels=0)
>>> t.decode(t.encode("slow <mask> lower"))
'slow <mask> lower'
>>> t.vocab.mask in t.encode("slow <mask> lower")
False
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders as engine_decoders
from tokenizers import models, pre_tokenizers

from firth.text.vocab import Vocab
from firth.types import UserError

ROLE_KEYS = {
    "pad": "pad_token", "unk": "unk_token", "bos": "bos_token", "eos": "eos_token",
    "cls": "cls_token", "sep": "sep_token", "mask": "mask_token",
}  # fmt: skip
"""Role -> its key in tokenizer_config.json."""

USUAL = {
    "pad": ("<pad>", "[PAD]", "<|padding|>"), "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>"),
}  # fmt: skip
"""What a role's token is called where no configuration says so."""


class Tokenizer:
    """One tokenizer. template: its chat template (Jinja), None for firth's own."""

    def __init__(self, engine: Engine, roles: dict[str, str] | None = None, template: str | None = None) -> None:
        self.engine = engine
        self.engine.encode_special_tokens = True
        self.engine.no_padding()
        self.engine.no_truncation()
        self.template = template
        self._roles = _roles(engine, roles or {})

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, without any special one: (n,) int32. Lone surrogates are read as U+FFFD."""
        return np.array(self.engine.encode(_clean(text), add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts, on all cores."""
        found = self.engine.encode_batch_fast([_clean(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ones are left out."""
        text: str = self.engine.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text, as the vocabulary writes them."""
        return list(self.engine.encode(_clean(text), add_special_tokens=False).tokens)

    def token(self, id: int) -> str:
        """How the vocabulary writes an id; UserError if there is none such."""
        found: str | None = self.engine.id_to_token(int(id))
        if found is None:
            raise UserError(f"there is no token {id}: this tokenizer has ids 0 to {self.vocab.size - 1}")
        return found

    def id(self, token: str) -> int:
        """The id of a token as the vocabulary writes it; UserError if there is none such."""
        found: int | None = self.engine.token_to_id(token)
        if found is None:
            raise UserError(f"this tokenizer has no token {token!r}")
        return found

    @functools.cached_property
    def vocab(self) -> Vocab:
        """Ids, roles and per-id facts, for views."""
        ids: dict[str, int] = self.engine.get_vocab(with_added_tokens=True)
        size = max(ids.values()) + 1
        special = np.zeros(size, bool)
        taken = np.zeros(size, bool)
        for i in ids.values():
            taken[i] = True
        special[~taken] = True  # a hole in the numbering: no text lands there
        for i, added in self.engine.get_added_tokens_decoder().items():
            special[i] = added.special
        for token in self._roles.values():
            special[ids[token]] = True
        sentinels: list[int] = []
        while f"<extra_id_{len(sentinels)}>" in ids:
            sentinels.append(ids[f"<extra_id_{len(sentinels)}>"])
        return Vocab(
            size=size,
            roles={role: ids[token] for role, token in self._roles.items()},
            special=special,
            sentinels=np.array(sentinels, np.int64),
            begins_word=self._begins_word(ids, size),
        )

    def _begins_word(self, ids: dict[str, int], size: int) -> np.ndarray | None:
        """Which ids start a word, where the spelling says so: WordPiece marks the rest, byte-level and Unigram the start.

        BPE with an end-of-word symbol marks only ends, so there it is unknown from one token alone.
        """
        kind = json.loads(self.engine.to_str())["model"]
        starts = np.ones(size, bool)
        if kind["type"] == "WordPiece":
            prefix = kind["continuing_subword_prefix"]
            for token, i in ids.items():
                starts[i] = not token.startswith(prefix)
            return starts
        if kind.get("end_of_word_suffix"):
            return None
        for token, i in ids.items():
            letter = token[:1]
            # Ġ Ċ ĉ: the byte alphabet's blank, line break and tab; ▁: SentencePiece's blank. Other signs stand alone.
            starts[i] = letter in ("Ġ", "Ċ", "ĉ", "▁") or not letter.isalnum()
        return starts

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        return hashlib.sha256(self.engine.to_str().encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers reads too."""
        from firth.text.chat import TEMPLATE

        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {ROLE_KEYS[role]: token for role, token in self._roles.items()}
        extra = [self.token(int(i)) for i in np.flatnonzero(self.vocab.special) if self.engine.id_to_token(int(i))]
        named = set(config.values())
        config["extra_special_tokens"] = [t for t in extra if t not in named]
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_max_length"] = int(1e30)
        # transformers 4 and 5 both honour a control token written in a template, so the file itself does not bar it.
        self.engine.encode_special_tokens = False
        _write(directory / "tokenizer.json", self.engine.to_str(pretty=True))
        self.engine.encode_special_tokens = True
        _write(directory / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False))
        _write(directory / "chat_template.jinja", self.template or TEMPLATE)

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """From a tokenizer.json, or a tokenizer, model or run directory that holds one (or GPT-2's or BERT's older files).

        Raises UserError where nothing of the kind is there.
        """
        path = Path(path)
        folder = path
        if path.is_dir():
            places = [path, path / "tokenizer", path / "model"]
            folder = next((p for p in places if _engine_file(p)), path)
        file = path if path.is_file() else _engine_file(folder)
        if file is None:
            raise UserError(f"{path}: there is no tokenizer.json here (nor vocab.txt, nor vocab.json with merges.txt)")
        engine = _read(file)
        config = _json(file.parent / "tokenizer_config.json")
        named = {role: _content(config[key]) for role, key in ROLE_KEYS.items() if config.get(key)}
        template = file.parent / "chat_template.jinja"
        text = template.read_text("utf-8") if template.exists() else config.get("chat_template")
        return Tokenizer(engine, named, text if isinstance(text, str) else None)


def _roles(engine: Engine, named: dict[str, str]) -> dict[str, str]:
    """Role -> token: what a configuration names, else the usual names, else the alias (cls is bos, eos is sep)."""
    roles = {role: token for role, token in named.items() if engine.token_to_id(token) is not None}
    for role, usual in USUAL.items():
        if role not in roles:
            token = next((t for t in usual if engine.token_to_id(t) is not None), None)
            if token is not None:
                roles[role] = token
    for role, alias in (("cls", "bos"), ("bos", "cls"), ("sep", "eos"), ("eos", "sep")):
        if role not in roles and alias in roles:
            roles[role] = roles[alias]
    return roles


def _engine_file(folder: Path) -> Path | None:
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "encoder.json"):
        if (folder / name).is_file():
            return folder / name
    return None


def _read(file: Path) -> Engine:
    try:
        if file.name == "vocab.txt":
            return _bert(file)
        if file.name in ("vocab.json", "encoder.json"):
            return _gpt2(file)
        return Engine.from_str(file.read_text("utf-8"))
    except UserError:
        raise
    except Exception as error:  # the engine raises bare Exception for whatever it cannot read
        raise UserError(f"{file}: this is not a tokenizer that the tokenizers library reads: {error}") from None


def _bert(file: Path) -> Engine:
    """BERT's vocab.txt: one token per line; uncased unless a capital stands in it."""
    from tokenizers import normalizers

    tokens = file.read_text("utf-8").splitlines()
    engine = Engine(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    plain = [t for t in tokens if not t.startswith("[")]
    engine.normalizer = normalizers.BertNormalizer(lowercase=not any(t != t.lower() for t in plain))
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = engine_decoders.WordPiece()
    engine.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in set(tokens)])
    return engine


def _gpt2(file: Path) -> Engine:
    """GPT-2's vocabulary (vocab.json or encoder.json) and merges (merges.txt or vocab.bpe)."""
    merges = next((p for n in ("merges.txt", "vocab.bpe") if (p := file.parent / n).is_file()), None)
    if merges is None:
        raise UserError(f"{file}: the merges that belong to it are missing: put merges.txt beside it")
    vocab = json.loads(file.read_text("utf-8"))
    lines = [line for line in merges.read_text("utf-8").splitlines() if line and not line.startswith("#version")]
    pairs = [(a, b) for a, _, b in (line.partition(" ") for line in lines)]
    engine = Engine(models.BPE(vocab, pairs))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = engine_decoders.ByteLevel()
    if "<|endoftext|>" in vocab:
        engine.add_special_tokens(["<|endoftext|>"])
    return engine


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: this is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    """A special token in tokenizer_config.json is a string or an object that holds one."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _clean(text: str) -> str:
    """A lone surrogate is valid JSON and no UTF-8: the engine refuses it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
