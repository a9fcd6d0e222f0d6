"""Prompts of a report: those of the recipe on its own text, beginnings of held-out examples on another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firth.data.examples import DataConfig, DatasetSplits
from firth.data.source import Source
from firth.runs.recipe import Recipe, published
from firth.runs.report_texts import prompts_of, spaced
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import Example

TEXTS = ["Le chien brun dort dans la grande maison.", "Un", "La fonction renvoie une valeur nulle ou non."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 9, "byte-bpe", 320)


class Texts(Source):
    """Examples of texts."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        self._rows = [{"tokens": tokenizer.encode(text)} for text in texts]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]


def prompts(recipe: Recipe, tokenizer: Tokenizer, texts: list[str]) -> tuple[str, ...]:
    held = Texts(tokenizer, texts)
    found: tuple[str, ...] = prompts_of(recipe, DatasetSplits(held, held), tokenizer)
    return found


def test_prompts_of_a_foreign_text_are_its_own_words(tokenizer: Tokenizer) -> None:
    for name in ("roberta", "gpt"):
        own = published(name)
        assert prompts(own, tokenizer, TEXTS) == own.sample_prompts  # Shakespeare's plays
        mine = replace(own, data=DataConfig(path=("french",)), sample_prompts=("Bonjour <mask>",))
        assert prompts(mine, tokenizer, TEXTS) == ("Bonjour <mask>",)
    mine = replace(published("roberta"), data=DataConfig(path=("french",)))
    assert [len(prompt.split()) for prompt in mine.sample_prompts] == [4, 4, 6]
    assert prompts(mine, tokenizer, TEXTS) == ("Le chien brun <mask> dans", "La fonction renvoie une valeur <mask> ou")
    mine = replace(published("gpt"), data=DataConfig(path=("french",)))
    assert prompts(mine, tokenizer, TEXTS[:1]) == ("Le",)
    assert prompts(mine, tokenizer, ["Un"]) == mine.sample_prompts  # no text is long enough
    mixed = replace(published("vae"), data=DataConfig(path=("french",)))
    assert prompts(mixed, tokenizer, TEXTS) == mixed.sample_prompts
    assert prompts(replace(mine, name="own"), tokenizer, TEXTS) == mine.sample_prompts
    assert spaced(10, 3) == [0, 3, 6] and spaced(2, 3) == [0, 1]
