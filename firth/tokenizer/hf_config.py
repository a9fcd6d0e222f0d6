"""What tokenizer_config.json adds to a tokenizer of the older formats: its case, its further tokens, what frames a text.

A vocab.txt or a SentencePiece model holds the pieces alone. The rest stands in the configuration, or in the class that
it names and nowhere else; `CLASSES` is what is known of those.

    {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}      32,100 ids, and </s> behind every text
    {"do_lower_case": false, "added_tokens_decoder": {"30522": {"content": "[SPEAKER]", "special": true}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from firth.tokenizer import formats
from firth.tokenizer.post_processor import special_tokens_around
from firth.types import UserError

Frame = tuple[tuple[str, ...], tuple[str, ...]]

BERT: Frame = (("[CLS]", "$A", "[SEP]"), ("[CLS]", "$A", "[SEP]", "$B:1", "[SEP]:1"))
ROBERTA: Frame = (("<s>", "$A", "</s>"), ("<s>", "$A", "</s>", "</s>", "$B", "</s>"))
T5: Frame = (("$A", "</s>"), ("$A", "</s>", "$B", "</s>"))
LLAMA: Frame = (("<s>", "$A"), ("<s>", "$A", "<s>", "$B"))
XLNET: Frame = (("$A", "<sep>", "<cls>:2"), ("$A", "<sep>", "$B:1", "<sep>:1", "<cls>:2"))

CLASSES: dict[str, Frame] = {
    "Bert": BERT, "DistilBert": BERT, "Electra": BERT, "Albert": BERT, "MobileBert": BERT, "Funnel": BERT, "LayoutLM": BERT,
    "Roberta": ROBERTA, "Bart": ROBERTA, "Longformer": ROBERTA, "MPNet": ROBERTA, "T5": T5, "Llama": LLAMA, "XLNet": XLNET,
}  # fmt: skip
"""Name of a tokenizer's class, without its ending -> what it puts around a text, and around two."""

SHIFTED = ("XLMRoberta", "Camembert", "MBart", "Barthez", "Pegasus", "BigBird", "DebertaV2", "NllbTokenizer", "M2M100")
"""Classes that number their pieces otherwise than the file does: their tokenizer.json says how, the file alone does not."""


def with_hf_config(engine: Engine, file: Path, config: Mapping[str, Any]) -> None:
    """Add to an engine, read from an older file, what the configuration beside it says.

    UserError for a class whose ids are not those of the file, and for an added token that would get another id.
    """
    named = str(config.get("tokenizer_class") or "")
    kind = named.removesuffix("Fast").removesuffix("Tokenizer")
    if file.suffix == ".model" and named.startswith(SHIFTED):
        raise UserError(
            f"{file}: the ids of a {named} are not those of this file: save tokenizer.json beside it, with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers"
        )
    if not kind:
        kind = "Bert" if file.name == "vocab.txt" else ""
    if file.name == "vocab.txt":
        _letters(engine, config)
    elif file.suffix == ".model" and kind in PLAINER:
        _plainer(engine, config, PLAINER[kind])
    elif file.suffix != ".model" and config.get("add_prefix_space"):
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for id, token in _added(engine, config, kind):
        held = engine.token_to_id(token.content)
        if held is None and id is not None and id != engine.get_vocab_size(with_added_tokens=True):
            raise UserError(
                f"{file.parent}: tokenizer_config.json gives {token.content!r:.40} the id {id}, which is not free"
            )
        if held is not None and id is not None and held != id:
            raise UserError(
                f"{file.parent}: {token.content!r:.40} has the id {held}, and tokenizer_config.json says {id}"
            )
        (engine.add_special_tokens if token.special else engine.add_tokens)([token])
    if kind in CLASSES:
        single, pair = CLASSES[kind]
        if kind == "Llama" and (config.get("add_bos_token") is False or config.get("add_eos_token")):
            return
        tokens = [part.split(":")[0] for part in pair if not part.startswith("$")]
        if all(engine.token_to_id(token) is not None for token in tokens):
            special_tokens_around(engine, list(single), list(pair))


PLAINER = {"Albert": True, "XLNet": False}
"""Classes that mend a text before SentencePiece sees it -> whether in lower case, where nothing is said."""


def _plainer(engine: Engine, config: Mapping[str, Any], lower: bool) -> None:
    """ALBERT's and XLNet's own step: straight quotes, no accents, perhaps lower case."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not config.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if config.get("do_lower_case", lower):
        steps.append(normalizers.Lowercase())
    engine.normalizer = normalizers.Sequence([*steps, engine.normalizer])


def _letters(engine: Engine, config: Mapping[str, Any]) -> None:
    """BERT's three switches, where they are set."""
    lower = config.get("do_lower_case")
    if lower is None and config.get("strip_accents") is None and config.get("tokenize_chinese_chars") is None:
        return
    told = engine.normalizer.lowercase if lower is None else bool(lower)
    engine.normalizer = normalizers.BertNormalizer(
        lowercase=told, strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
    )  # fmt: skip


def _added(engine: Engine, config: Mapping[str, Any], kind: str) -> list[tuple[int | None, AddedToken]]:
    """(id, token) of what is added behind the file's own, in the order of the ids; None: the next free one."""
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, Mapping) and listed:
        rows = sorted((int(id), said) for id, said in listed.items())
        return [(id, _token(said)) for id, said in rows]
    if kind == "T5" and engine.token_to_id("<extra_id_0>") is None:
        count = min(int(config.get("extra_ids", 100)), 1000)
        return [(None, AddedToken(f"<extra_id_{i}>", special=True, normalized=False)) for i in reversed(range(count))]
    return []


def _token(said: Any) -> AddedToken:
    told = said if isinstance(said, Mapping) else {"content": str(said)}
    return AddedToken(
        str(told["content"]), special=bool(told.get("special", False)), lstrip=bool(told.get("lstrip", False)),
        rstrip=bool(told.get("rstrip", False)), single_word=bool(told.get("single_word", False)),
        normalized=bool(told.get("normalized", not told.get("special", False))),
    )  # fmt: skip


def loaded(file: Path) -> Any:
    """What a JSON file holds; nothing where there is none."""
    if not file.is_file():
        return {}
    try:
        return json.loads(formats.text_of(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: this is not JSON: {error}") from None


def said(file: Path) -> dict[str, Any]:
    """What a JSON file holds that must be an object."""
    found = loaded(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: this is not a JSON object")
    return found


def ending(engine: Engine, eos: Any) -> list[str]:
    """The tokens of generation_config.json's list of ids that end an answer."""
    ids = [i for i in eos if isinstance(i, int) and 0 <= i < 1 << 31] if isinstance(eos, list) else []
    return [token for i in ids if (token := engine.id_to_token(i)) is not None]


def spelling(token: Any) -> str:
    """A special token in tokenizer_config.json is a string or an object that holds one."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def template_of(template: Any) -> str | None:
    """The chat template in tokenizer_config.json: one text, or a list of named ones."""
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    return template if isinstance(template, str) else None
