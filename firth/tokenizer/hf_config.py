"""tokenizer_config.json and post-processors in the layout of transformers.

The post-processor in tokenizer.json: special tokens around a text. firth itself adds them by id, in its layouts.

    bidirectional    [CLS] text [SEP]      [CLS] text [SEP] text [SEP]      encoders
    causal           <s> text                                               decoders
    seq2seq          text </s>                                              encoder-decoders

With it, `tokenizer(text)` of transformers, sentence-transformers and vLLM returns what the model was trained on. A
tokenizer that has a post-processor, or whose configuration forbids it (`add_bos_token`), is unchanged.

Apply tokenizer_config.json to a tokenizer in one of the older formats: case, added tokens, special tokens around a text.

A vocab.txt or a SentencePiece model has the pieces only. The rest is in the configuration, or in the code of the class
that it names; `CLASSES` lists those.

    {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}      32,100 ids, and </s> after every text
    {"do_lower_case": false, "added_tokens_decoder": {"30522": {"content": "[SPEAKER]", "special": true}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from firth.tokenizer import formats
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


Template = tuple[tuple[str, ...], tuple[str, ...]]

BERT: Template = (("[CLS]", "$A", "[SEP]"), ("[CLS]", "$A", "[SEP]", "$B:1", "[SEP]:1"))
ROBERTA: Template = (("<s>", "$A", "</s>"), ("<s>", "$A", "</s>", "</s>", "$B", "</s>"))
T5: Template = (("$A", "</s>"), ("$A", "</s>", "$B", "</s>"))
LLAMA: Template = (("<s>", "$A"), ("<s>", "$A", "<s>", "$B"))
XLNET: Template = (("$A", "<sep>", "<cls>:2"), ("$A", "<sep>", "$B:1", "<sep>:1", "<cls>:2"))

CLASSES: dict[str, Template] = {
    "Bert": BERT, "DistilBert": BERT, "Electra": BERT, "Albert": BERT, "MobileBert": BERT, "Funnel": BERT, "LayoutLM": BERT,
    "Roberta": ROBERTA, "Bart": ROBERTA, "Longformer": ROBERTA, "MPNet": ROBERTA, "T5": T5, "Llama": LLAMA, "XLNet": XLNET,
}  # fmt: skip
"""Tokenizer class without its suffix -> its template for a text and for a pair of texts."""

RENUMBERED_CLASSES = (
    "XLMRoberta",
    "Camembert",
    "MBart",
    "Barthez",
    "Pegasus",
    "BigBird",
    "DebertaV2",
    "NllbTokenizer",
    "M2M100",
)
"""Classes whose ids differ from those of the file; only their tokenizer.json has them."""


def with_hf_config(engine: Engine, file: Path, config: Mapping[str, Any]) -> None:
    """Apply a tokenizer_config.json to an engine that was read from an older format.

    Raises:
        UserError: The class has other ids than the file, or an added token would get another id than stated.
    """
    named = str(config.get("tokenizer_class") or "")
    kind = named.removesuffix("Fast").removesuffix("Tokenizer")
    if file.suffix == ".model" and named.startswith(RENUMBERED_CLASSES):
        raise UserError(
            f"{file}: the ids of a {named} are not those of this file: save tokenizer.json next to it, with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers"
        )
    if not kind:
        kind = "Bert" if file.name == "vocab.txt" else ""
    if file.name == "vocab.txt":
        _set_bert_switches(engine, config)
    elif file.suffix == ".model" and kind in LOWERCASE_CLASSES:
        _add_text_cleanup(engine, config, LOWERCASE_CLASSES[kind])
    elif file.suffix != ".model" and config.get("add_prefix_space"):
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for id, token in _added(engine, config, kind):
        current = engine.token_to_id(token.content)
        if current is None and id is not None and id != engine.get_vocab_size(with_added_tokens=True):
            raise UserError(
                f"{file.parent}: tokenizer_config.json gives {token.content!r:.40} the id {id}, which is not free"
            )
        if current is not None and id is not None and current != id:
            raise UserError(
                f"{file.parent}: {token.content!r:.40} has the id {current}, and tokenizer_config.json says {id}"
            )
        (engine.add_special_tokens if token.special else engine.add_tokens)([token])
    if kind in CLASSES:
        single, pair = CLASSES[kind]
        if kind == "Llama" and (config.get("add_bos_token") is False or config.get("add_eos_token")):
            return
        tokens = [part.split(":")[0] for part in pair if not part.startswith("$")]
        if all(engine.token_to_id(token) is not None for token in tokens):
            special_tokens_around(engine, list(single), list(pair))


LOWERCASE_CLASSES = {"Albert": True, "XLNet": False}
"""Classes that clean a text before SentencePiece -> the default of do_lower_case."""


def _add_text_cleanup(engine: Engine, config: Mapping[str, Any], lower: bool) -> None:
    """Add the cleanup of ALBERT and XLNet: straight quotes, no accents, lower case if configured."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", lower):
        steps.append(normalizers.Lowercase())
    engine.normalizer = normalizers.Sequence([*steps, engine.normalizer])


def _set_bert_switches(engine: Engine, config: Mapping[str, Any]) -> None:
    """Apply do_lower_case, strip_accents and tokenize_chinese_chars of BERT, if set."""
    lower = config.get("do_lower_case")
    if lower is None and config.get("strip_accents") is None and config.get("tokenize_chinese_chars") is None:
        return
    lowercase = engine.normalizer.lowercase if lower is None else bool(lower)
    engine.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
    )  # fmt: skip


def _added(engine: Engine, config: Mapping[str, Any], kind: str) -> list[tuple[int | None, AddedToken]]:
    """Return (id, token) of the added tokens in the order of their ids; None means the next free id."""
    added = config.get("added_tokens_decoder")
    if isinstance(added, Mapping) and added:
        rows = sorted((int(id), entry) for id, entry in added.items())
        return [(id, _token(entry)) for id, entry in rows]
    if kind == "T5" and engine.token_to_id("<extra_id_0>") is None:
        count = min(int(config.get("extra_ids", 100)), 1000)
        return [(None, AddedToken(f"<extra_id_{i}>", special=True, normalized=False)) for i in reversed(range(count))]
    return []


def _token(entry: Any) -> AddedToken:
    fields = entry if isinstance(entry, Mapping) else {"content": str(entry)}
    return AddedToken(
        str(fields["content"]), special=bool(fields.get("special", False)), lstrip=bool(fields.get("lstrip", False)),
        rstrip=bool(fields.get("rstrip", False)), single_word=bool(fields.get("single_word", False)),
        normalized=bool(fields.get("normalized", not fields.get("special", False))),
    )  # fmt: skip


def read_json(file: Path) -> Any:
    """Return the content of a JSON file; {} if it does not exist."""
    if not file.is_file():
        return {}
    try:
        return json.loads(formats.text_of(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: this is not JSON: {error}") from None


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if it does not exist.

    Raises:
        UserError: The content is not an object.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: this is not a JSON object")
    return found


def end_tokens(engine: Engine, eos: Any) -> list[str]:
    """Return the tokens of the eos_token_id list in generation_config.json."""
    ids = [i for i in eos if isinstance(i, int) and 0 <= i < 1 << 31] if isinstance(eos, list) else []
    return [token for i in ids if (token := engine.id_to_token(i)) is not None]


def token_text(token: Any) -> str:
    """Return the text of a special token in tokenizer_config.json: a string, or an object with `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def template_of(template: Any) -> str | None:
    """Return the chat template in tokenizer_config.json: one string, or a list of named ones."""
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    return template if isinstance(template, str) else None
