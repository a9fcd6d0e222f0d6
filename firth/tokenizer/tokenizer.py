"""Text to ids and back. The engine is the `tokenizers` library; what firth adds is the vocabulary's roles and one rule.

The rule: user text can never become a control token. `encode` never yields a special id but `unk`, whatever the text
contains; control tokens are placed by id, by layouts and by `firth.tokenizer.chat`.

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
from firth.tokenizer import formats, gguf_read, post_processor
from firth.tokenizer.chat_template import END, START, TEMPLATE
from firth.tokenizer.hf_config import ending, loaded, said, spelling, template_of, with_hf_config
from firth.tokenizer.merges import Merge
from firth.tokenizer.normalize import replace_lone_surrogates
from firth.tokenizer.vocab import Vocab
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
    """One tokenizer.

    roles: role -> the token that has it; where nothing is said, the usual names. template: its chat template (Jinja),
    None for firth's own. learnt: the merges with their counts, as `firth.tokenizer.train` found them, first to last. bos:
    whether bos stands before every text that a decoder reads, None where nothing is said. ends: further tokens that end
    an answer, as a model's generation_config.json names them.
    """

    def __init__(
        self,
        engine: Engine,
        roles: dict[str, str] | None = None,
        template: str | None = None,
        learnt: Sequence[Merge] = (),
        bos: bool | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        _refuse_holes(engine)
        engine.no_padding()
        engine.no_truncation()
        # transformers 4 and 5 both honour a control token written in a template, so the file itself does not bar it.
        engine.encode_special_tokens = False
        self.definition: str = engine.to_str(pretty=True)
        self.engine = engine
        self.engine.encode_special_tokens = True
        self.template = template
        self.learnt = tuple(learnt)
        self.bos = bos
        self.ends = tuple(token for token in ends if engine.token_to_id(token) is not None)
        self._roles = _roles(engine, roles or {})
        _guard(engine, json.loads(self.definition))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.definition, self._roles, self.template, self.learnt, self.bos, self.ends)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text: (n,) int32, never a control token, but unk where a character is unknown.

        Lone surrogates are read as U+FFFD.
        """
        return np.array(self.engine.encode(replace_lone_surrogates(text), add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` for many texts, on all cores."""
        found = self.engine.encode_batch_fast([replace_lone_surrogates(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ones are left out."""
        text: str = self.engine.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) int32 as of `encode`, and where in the text each begins and ends: (n, 2) in characters."""
        found = self.engine.encode(replace_lone_surrogates(text), add_special_tokens=False)
        ids, spans = np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)
        if (n := len(self._end_bytes)) and len(ids) >= n:
            # The bytes of `</w>` behind those of a word's last character are of no character; the engine counts on.
            views = np.lib.stride_tricks.sliding_window_view(ids, n)
            for at in np.flatnonzero((views == self._end_bytes).all(1)):
                spans[at : at + n] = spans[at - 1]
        return ids, spans

    @functools.cached_property
    def _end_bytes(self) -> np.ndarray:
        """The ids that byte fallback writes for the end-of-word suffix; none where there is no suffix or no fallback."""
        model = json.loads(self.definition)["model"]
        suffix = (model.get("end_of_word_suffix") or "") if model.get("byte_fallback") else ""
        return np.array([self.id(f"<0x{byte:02X}>") for byte in suffix.encode()], np.int32)

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text, as the vocabulary writes them; what is unknown is `<unk>` (the engine itself would show
        the text's own characters for it)."""
        return [self.token(i) for i in self.encode(text)]

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
        """SHA-256 of everything that decides which ids a text gets: what frames it for others is not part of that."""
        return hashlib.sha256(post_processor.has_no_template(self.definition).encode()).hexdigest()

    def framed(self, reads: post_processor.Reads) -> Tokenizer:
        """The same one, which tells others too what its model reads around a text: see `firth.tokenizer.post_processor`."""
        definition = post_processor.framed(self.definition, self._roles, reads, self.bos)
        return _again(definition, self._roles, self.template, self.learnt, self.bos, self.ends)

    def save(self, directory: Path, segments: bool = False) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, which transformers reads too, 4 and 5.

        segments: whether the model tells two texts apart, so that others give it token_type_ids. The template is its own,
        else firth's where it has the tokens of turns. Beside them goes merges.json, where it is
        known how often each pair was seen when it was merged.
        """
        make_directory(directory)
        config: dict[str, Any] = {ROLE_KEYS[role]: token for role, token in self._roles.items()}
        extra = [self.token(int(i)) for i in np.flatnonzero(self.vocab.special) if self.engine.id_to_token(int(i))]
        named = set(config.values())
        config["additional_special_tokens"] = [t for t in extra if t not in named]
        config["model_input_names"] = ["input_ids", *["token_type_ids"] * segments, "attention_mask"]
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_max_length"] = int(1e30)
        config |= ({} if self.bos is None else {"add_bos_token": self.bos}) | (
            {"ends": list(self.ends)} if self.ends else {}
        )
        files = {
            "tokenizer.json": self.definition,
            "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False),
        }
        turns = all(self.engine.token_to_id(token) is not None for token in (START, END))
        if self.template is not None or turns:
            files["chat_template.jinja"] = TEMPLATE if self.template is None else self.template
        if self.learnt:
            learnt = [[m.left, m.right, m.count] for m in self.learnt]
            files["merges.json"] = json.dumps(learnt, ensure_ascii=False)
        for name, text in files.items():
            write_text(directory / name, text)

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """From a tokenizer.json, or a tokenizer, model or run directory that holds one (or GPT-2's or BERT's older files), or
        from a GGUF file.

        Raises UserError where nothing of the kind is there.
        """
        path = Path(path)
        one = find(path)
        if one is not None:
            engine, roles, chat, bos, ends = gguf_read.read(one)
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
        place = file.parent
        config = said(place / "special_tokens_map.json") | said(place / "tokenizer_config.json")
        engine = formats.read(file)
        try:
            return _configured(engine, file, config)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{place}: what is said beside {file.name} makes no sense ({str(error)[:120]})") from None


def _configured(engine: Engine, file: Path, config: dict[str, Any]) -> Tokenizer:
    """A tokenizer with what the files beside it say: roles, chat template, merges, what begins a text and what ends one."""
    place = file.parent
    if file.name != "tokenizer.json":
        with_hf_config(engine, file, config)
    named = {role: spelling(config[key]) for role, key in ROLE_KEYS.items() if config.get(key)}
    template = place / "chat_template.jinja"
    text = formats.text_of(template) if template.exists() else template_of(config.get("chat_template"))
    learnt = loaded(place / "merges.json") if file.name == "tokenizer.json" else []
    bos = config.get("add_bos_token")
    if bos is None and (place / "config.json").exists() and not (place / "firth.json").exists():
        bos = bool(
            post_processor.frames(engine)[:1] == [engine.token_to_id(named.get("bos", ""))]
        )  # a stranger's model
    ends = config.get("ends") or ending(engine, said(place / "generation_config.json").get("eos_token_id"))
    merges = [Merge(*row) for row in learnt if len(row) == 3]
    return Tokenizer(engine, named, text, merges, None if bos is None else bool(bos), [str(token) for token in ends])


def _again(
    definition: str, roles: dict[str, str], template: str | None, learnt: Sequence[Merge], bos: bool | None,
    ends: Sequence[str],
) -> Tokenizer:  # fmt: skip
    return Tokenizer(post_processor.engine_of(definition), roles, template, learnt, bos, ends)


def _refuse_holes(engine: Engine) -> None:
    """UserError for ids far beyond the number of tokens: tables of ids, the library's own too, are as long as the last."""
    ids = engine.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) > 4 * len(ids) + (1 << 20):
        last = f"an id {max(ids):,}" if ids else "no id"
        raise UserError(f"this tokenizer has {len(ids):,} tokens and {last}: it is damaged, so copy it again")


def _guard(engine: Engine, definition: dict[str, Any]) -> None:
    """Bar the engine's model from making a control token out of text that spells one.

    The engine already finds no control token *in* a text. But a Unigram model may hold its control symbols among its
    pieces, BPE may take a whole word for a piece, and text that was `</s>` would come out as the end of the sequence.
    So words are cut behind the first character of a control token's spelling, which leaves all other text alone.
    """
    model = definition["model"]
    control = [t["content"] for t in definition["added_tokens"] if t["special"] and len(t["content"]) > 1]
    made: set[str] = set()
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
        suffix = model.get("end_of_word_suffix") or ""
        control = [token for token in control if token in made or (suffix and token.endswith(suffix))]
    elif model["type"] == "WordPiece" and (definition["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer":
        control = [token for token in control if token.isalnum()]  # others have signs, at which words are cut anyway
    rests: dict[str, list[str]] = {}
    spelled = model["type"] == "Unigram" or model.get("ignore_merges") or any(map(BYTE.fullmatch, made))
    if model.get("byte_fallback") and spelled:  # nor a byte out of text that spells one
        rests["<"] = ["0x[0-9A-F]{2}>"]
    for token in sorted(control):
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    if not rests:
        return
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
    steps = [engine.pre_tokenizer] if engine.pre_tokenizer is not None else []
    engine.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.Split(Regex(pattern), "isolated")])


def _spelling(
    definition: dict[str, Any], ids: dict[str, int], special: np.ndarray, unk: str | None
) -> tuple[bytes, ...]:
    """Return the UTF-8 that each id stands for, as the text of its neighbors goes on from it.

    A blank is where the vocabulary has one: before a piece (byte-level BPE, Unigram, WordPiece), behind it (`</w>`).
    Control tokens are line breaks, which end whatever stands before them; what is unknown is U+FFFD.
    """
    model = definition["model"]
    on, end = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix") or ""
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
        elif model["type"] == "WordLevel" or (model["type"] == "WordPiece" and not token.startswith(on)):
            found[i] = f" {token}".encode()
        elif model["type"] == "WordPiece":
            found[i] = token.removeprefix(on).encode()
        elif end:
            found[i] = re.sub(f"{re.escape(end)}$", " ", token).encode()
        else:
            found[i] = token.replace("▁", " ").encode()
    return tuple(found)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE = re.compile("<0x[0-9A-F]{2}>")
"""How SentencePiece writes a byte of a character that is no piece."""


def _roles(engine: Engine, named: dict[str, str]) -> dict[str, str]:
    """Role -> token: what a configuration names, else the usual names, else the alias (cls is bos, eos is sep).

    A usual name counts where it is a control token: a large vocabulary may have `<s>` as a piece of text (Qwen 2's has).
    """
    control = {token.content for token in engine.get_added_tokens_decoder().values() if token.special}
    roles = {role: token for role, token in named.items() if engine.token_to_id(token) is not None}
    for role, usual in USUAL.items():
        if role not in roles:
            token = next((t for t in usual if t in control), None)
            if token is not None:
                roles[role] = token
    for role, alias in (("cls", "bos"), ("bos", "cls"), ("sep", "eos"), ("eos", "sep")):
        if role not in roles and alias in roles:
            roles[role] = roles[alias]
    return roles
