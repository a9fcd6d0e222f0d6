"""Encode text to ids and decode it. The engine is the `tokenizers` library; firth adds the roles of tokens and one rule.

The rule: user text never becomes a control token. `encode` yields no special id except `unk`, whatever the text contains;
control tokens are inserted by id, by layouts and by `firth.tokenizer.chat`.

>>> from firth.tokenizer.train import train
>>> t = train(["low lower lowest slow " * 9], "byte-bpe", vocab_size=400, num_sentinels=0)
>>> t.decode(t.encode("slow <mask> lower"))
'slow <mask> lower'
>>> t.vocab.mask in t.encode("slow <mask> lower")
False
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Engine

from firth.io.atomic import make_directory, write_text
from firth.io.gguf import find
from firth.tokenizer import formats, gguf_read, hf_config
from firth.tokenizer.chat_template import END, START, TEMPLATE
from firth.tokenizer.hf_config import end_tokens, read_json, read_object, template_of, token_text, with_hf_config
from firth.tokenizer.merges import Merge
from firth.tokenizer.vocab import Vocab, replace_lone_surrogates
from firth.types import UserError

ROLE_KEYS = {
    "pad": "pad_token", "unk": "unk_token", "bos": "bos_token", "eos": "eos_token",
    "cls": "cls_token", "sep": "sep_token", "mask": "mask_token",
}  # fmt: skip
"""Role -> its key in tokenizer_config.json."""

DEFAULT_TOKENS = {
    "pad": ("<pad>", "[PAD]", "<|padding|>"), "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
    "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>"),
}  # fmt: skip
"""Role -> the usual spellings of its token, for tokenizers without a configuration."""


class Tokenizer:
    """A tokenizer.

    Args:
        engine: A tokenizer of the tokenizers library.
        roles: Role -> token; the others get their usual names.
        template: Chat template (Jinja); None for firth's own.
        merges: The merges with their counts, as `firth.tokenizer.train` learned them, in order.
        bos: Whether every text of a decoder starts with bos; None if the configuration does not say.
        ends: Further tokens that end an answer, from generation_config.json.
    """

    def __init__(
        self,
        engine: Engine,
        roles: dict[str, str] | None = None,
        template: str | None = None,
        merges: Sequence[Merge] = (),
        bos: bool | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        _check_ids(engine)
        engine.no_padding()
        engine.no_truncation()
        # transformers 4 and 5 both encode control tokens in template text, so the saved file must allow them.
        engine.encode_special_tokens = False
        self.definition: str = engine.to_str(pretty=True)
        self.engine = engine
        self.engine.encode_special_tokens = True
        self.template = template
        self.merges = tuple(merges)
        self.bos = bos
        self.ends = tuple(token for token in ends if engine.token_to_id(token) is not None)
        self._roles = _roles(engine, roles or {})
        _protect_control_tokens(engine, json.loads(self.definition))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.definition, self._roles, self.template, self.merges, self.bos, self.ends)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text: (n,) int32, never a control token, but unk for an unknown character.

        Lone surrogates are encoded as U+FFFD.
        """
        return np.array(self.engine.encode(replace_lone_surrogates(text), add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, as `encode`, on all cores."""
        found = self.engine.encode_batch_fast([replace_lone_surrogates(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; special ones are skipped."""
        text: str = self.engine.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (n,) int32 of a text and the start and end of each (n, 2), in characters."""
        found = self.engine.encode(replace_lone_surrogates(text), add_special_tokens=False)
        ids, spans = np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)
        if (n := len(self._end_bytes)) and len(ids) >= n:
            # The bytes of `</w>` after a word belong to no character, but the engine counts them.
            views = np.lib.stride_tricks.sliding_window_view(ids, n)
            for at in np.flatnonzero((views == self._end_bytes).all(1)):
                spans[at : at + n] = spans[at - 1]
        return ids, spans

    @functools.cached_property
    def _end_bytes(self) -> np.ndarray:
        """Byte fallback ids of the end-of-word suffix; empty without a suffix or without fallback."""
        model = json.loads(self.definition)["model"]
        suffix = (model.get("end_of_word_suffix") or "") if model.get("byte_fallback") else ""
        return np.array([self.id(f"<0x{byte:02X}>") for byte in suffix.encode()], np.int32)

    def pieces(self, text: str) -> list[str]:
        """Return the tokens of a text as strings; unknown ones are `<unk>` (the engine itself would return the characters)."""
        return [self.token(i) for i in self.encode(text)]

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are spelled in GPT-2's byte alphabet (`byte_alphabet`)."""
        definition = json.loads(self.definition)
        return "ByteLevel" in json.dumps([definition["pre_tokenizer"], definition["decoder"]])

    def token(self, id: int) -> str:
        """Return the string of an id.

        Raises:
            UserError: There is no such id.
        """
        found: str | None = self.engine.id_to_token(int(id))
        if found is None:
            raise UserError(f"there is no token {id}: this tokenizer has ids 0 to {self.vocab.size - 1}")
        return found

    def id(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            UserError: There is no such token.
        """
        found: int | None = self.engine.token_to_id(token)
        if found is None:
            raise UserError(f"this tokenizer has no token {token!r}")
        return found

    @functools.cached_property
    def vocab(self) -> Vocab:
        """Ids, roles and per-id properties."""
        ids: dict[str, int] = self.engine.get_vocab(with_added_tokens=True)
        size = max(ids.values()) + 1
        special = np.zeros(size, bool)
        taken = np.zeros(size, bool)
        for i in ids.values():
            taken[i] = True
        special[~taken] = True  # an unused id: no text produces it
        for i, added in self.engine.get_added_tokens_decoder().items():
            special[i] = added.special
        for token in self._roles.values():
            special[ids[token]] = True
        sentinels: list[int] = []
        while f"<extra_id_{len(sentinels)}>" in ids:
            sentinels.append(ids[f"<extra_id_{len(sentinels)}>"])
        definition = json.loads(self.definition)
        return Vocab(
            size=size,
            roles={role: ids[token] for role, token in self._roles.items()},
            special=special,
            sentinels=np.array(sentinels, np.int64),
            holes=np.flatnonzero(~taken),
            spelling=_spelling(definition, ids, special, self._roles.get("unk")),
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the ids of a text; the post-processor does not."""
        return hashlib.sha256(hf_config.without_template(self.definition).encode()).hexdigest()

    def with_post_processor(self, attention: hf_config.AttentionKind) -> Tokenizer:
        """Return a copy with a post-processor for models with this attention (`firth.tokenizer.hf_config`)."""
        return self.with_definition(hf_config.with_template(self.definition, self._roles, attention, self.bos))

    def with_definition(self, definition: str) -> Tokenizer:
        """Return a copy with another tokenizer.json."""
        return _rebuild(definition, self._roles, self.template, self.merges, self.bos, self.ends)

    def save(self, directory: Path, token_type_ids: bool = False) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, in the format of transformers 4 and 5.

        The template is the tokenizer's own, else firth's if the tokenizer has its tokens. merges.json is added if the counts of
        the merges are known.

        Args:
            directory: Where to write.
            token_type_ids: Whether the model uses token_type_ids.
        """
        make_directory(directory)
        config: dict[str, Any] = {ROLE_KEYS[role]: token for role, token in self._roles.items()}
        extra = [self.token(int(i)) for i in np.flatnonzero(self.vocab.special) if self.engine.id_to_token(int(i))]
        named = set(config.values())
        config["additional_special_tokens"] = [t for t in extra if t not in named]
        config["model_input_names"] = ["input_ids", *["token_type_ids"] * token_type_ids, "attention_mask"]
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_max_length"] = int(1e30)
        config |= ({} if self.bos is None else {"add_bos_token": self.bos}) | (
            {"ends": list(self.ends)} if self.ends else {}
        )
        files = {
            "tokenizer.json": self.definition,
            "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False),
        }
        has_turn_tokens = all(self.engine.token_to_id(token) is not None for token in (START, END))
        if self.template is not None or has_turn_tokens:
            files["chat_template.jinja"] = TEMPLATE if self.template is None else self.template
        if self.merges:
            rows = [[m.left, m.right, m.count] for m in self.merges]
            files["merges.json"] = json.dumps(rows, ensure_ascii=False)
        for name, text in files.items():
            write_text(directory / name, text)

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """Load a tokenizer.

        Args:
            path: A tokenizer.json, GPT-2's, BERT's or SentencePiece's files, a tokenizer, model or run directory with one of them, or
                a GGUF file.

        Raises:
            UserError: There is no tokenizer, or it cannot be read.
        """
        path = Path(path)
        gguf_file = find(path)
        if gguf_file is not None:
            engine, roles, chat, bos, ends = gguf_read.read(gguf_file)
            return Tokenizer(engine, roles, chat, bos=bos, ends=ends)
        folder = path
        if path.is_dir():
            folder = next((p for p in (path, path / "tokenizer", path / "model") if formats.find(p)), path)
        file = path if path.is_file() else formats.find(folder)
        if file is None:
            raise UserError(
                f"{path}: there is no tokenizer here: no tokenizer.json, vocab.txt, vocab.json with merges.txt, nor "
                "SentencePiece .model; make one with `firth tokenizer train`"
            )
        directory = file.parent
        config = read_object(directory / "special_tokens_map.json") | read_object(directory / "tokenizer_config.json")
        engine = formats.read(file)
        try:
            return _configured(engine, file, config)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"{directory}: the configuration of {file.name} makes no sense ({str(error)[:120]})"
            ) from None


def _configured(engine: Engine, file: Path, config: dict[str, Any]) -> Tokenizer:
    """Return a tokenizer with the roles, chat template, merges, bos and end tokens of the files next to it."""
    directory = file.parent
    if file.name != "tokenizer.json":
        with_hf_config(engine, file, config)
    named = {role: token_text(config[key]) for role, key in ROLE_KEYS.items() if config.get(key)}
    template = directory / "chat_template.jinja"
    text = formats.text_of(template) if template.exists() else template_of(config.get("chat_template"))
    rows = read_json(directory / "merges.json") if file.name == "tokenizer.json" else []
    bos = config.get("add_bos_token")
    if bos is None and (directory / "config.json").exists() and not (directory / "firth.json").exists():
        bos = bool(
            hf_config.added_ids(engine)[:1] == [engine.token_to_id(named.get("bos", ""))]
        )  # a model of another program
    ends = config.get("ends") or end_tokens(
        engine, read_object(directory / "generation_config.json").get("eos_token_id")
    )
    merges = [Merge(*row) for row in rows if len(row) == 3]
    return Tokenizer(engine, named, text, merges, None if bos is None else bool(bos), [str(token) for token in ends])


def _rebuild(
    definition: str, roles: dict[str, str], template: str | None, merges: Sequence[Merge], bos: bool | None,
    ends: Sequence[str],
) -> Tokenizer:  # fmt: skip
    return Tokenizer(hf_config.engine_of(definition), roles, template, merges, bos, ends)


def _check_ids(engine: Engine) -> None:
    """Check that no id is far beyond the number of tokens: tables of ids, also in the library, are as long as the largest id.

    Raises:
        UserError: An id is.
    """
    ids = engine.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) > 4 * len(ids) + (1 << 20):
        last = f"an id {max(ids):,}" if ids else "no id"
        raise UserError(f"this tokenizer has {len(ids):,} tokens and {last}: it is damaged, so copy it again")


def _protect_control_tokens(engine: Engine, definition: dict[str, Any]) -> None:
    """Prevent the engine's model from producing a control token from text that spells one.

    The engine already finds no control token *in* a text. But a Unigram model may have its control symbols among its pieces,
    BPE may match a whole word, and the text `</s>` would become the end of the sequence. So words are split after the first
    character of the spelling of a control token, which leaves all other text alone.
    """
    model = definition["model"]
    control = [t["content"] for t in definition["added_tokens"] if t["special"] and len(t["content"]) > 1]
    merged: set[str] = set()
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        merged = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
        suffix = model.get("end_of_word_suffix") or ""
        control = [token for token in control if token in merged or (suffix and token.endswith(suffix))]
    elif model["type"] == "WordPiece" and (definition["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer":
        control = [
            token for token in control if token.isalnum()
        ]  # others contain signs, at which words are split anyway
    suffixes: dict[str, list[str]] = {}
    spelled = model["type"] == "Unigram" or model.get("ignore_merges") or any(map(BYTE.fullmatch, merged))
    if model.get("byte_fallback") and spelled:  # nor a byte token from its spelling
        suffixes["<"] = ["0x[0-9A-F]{2}>"]
    for token in sorted(control):
        suffixes.setdefault(token[0], []).append(re.escape(token[1:]))
    if not suffixes:
        return
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(suffix)})" for first, suffix in suffixes.items())
    steps = [engine.pre_tokenizer] if engine.pre_tokenizer is not None else []
    engine.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.Split(Regex(pattern), "isolated")])


def _spelling(
    definition: dict[str, Any], ids: dict[str, int], special: np.ndarray, unk: str | None
) -> tuple[bytes, ...]:
    """Return the UTF-8 bytes of each id within a text.

    A blank is where the vocabulary has it: before a piece (byte-level BPE, Unigram, WordPiece) or after it (`</w>`). Control
    tokens are line breaks, so that they end a word; unknown is U+FFFD.
    """
    model = definition["model"]
    prefix, end = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix") or ""
    bytewise = "ByteLevel" in json.dumps([definition["pre_tokenizer"], definition["decoder"]])
    alphabet = byte_alphabet()
    found = [b"\n"] * len(special)
    for token, i in ids.items():
        if token == unk:
            found[i] = "\ufffd".encode()
        elif special[i]:
            continue
        elif BYTE.fullmatch(token) and not bytewise:
            found[i] = bytes([int(token[3:5], 16)])
        elif bytewise and set(token) <= alphabet.keys():
            found[i] = bytes(alphabet[character] for character in token)
        elif model["type"] == "WordLevel" or (model["type"] == "WordPiece" and not token.startswith(prefix)):
            found[i] = f" {token}".encode()
        elif model["type"] == "WordPiece":
            found[i] = token.removeprefix(prefix).encode()
        elif end:
            found[i] = re.sub(f"{re.escape(end)}$", " ", token).encode()
        else:
            found[i] = token.replace("▁", " ").encode()
    return tuple(found)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's character -> byte: printable bytes are themselves, the others are 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE = re.compile("<0x[0-9A-F]{2}>")
"""SentencePiece's spelling of a byte."""


def _roles(engine: Engine, named: dict[str, str]) -> dict[str, str]:
    """Return role -> token: from the configuration, else the usual names, else the alias (cls is bos, eos is sep).

    A usual name counts only as a control token: a large vocabulary may have `<s>` as a piece of text (Qwen 2's has).
    """
    control = {token.content for token in engine.get_added_tokens_decoder().values() if token.special}
    roles = {role: token for role, token in named.items() if engine.token_to_id(token) is not None}
    for role, defaults in DEFAULT_TOKENS.items():
        if role not in roles:
            token = next((t for t in defaults if t in control), None)
            if token is not None:
                roles[role] = token
    for role, alias in (("cls", "bos"), ("bos", "cls"), ("sep", "eos"), ("eos", "sep")):
        if role not in roles and alias in roles:
            roles[role] = roles[alias]
    return roles
