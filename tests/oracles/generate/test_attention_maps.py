"""Attention weights by layer and head: equal to `output_attentions` of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from firth.generate.attention_maps import Text, attention_maps
from firth.pretrained.load_save import load_model
from tests.support.hf_families import random_hf_model

FAMILIES = (
    "bert",
    "albert",
    "electra",
    "mpnet",
    "modernbert",
    "xlnet",
    "gpt2",
    "llama",
    "nanochat",
    "t5",
    "t5-gated",
    "bart",
)


def text(length: int, seed: int) -> Text:
    tokens = np.random.default_rng(seed).integers(3, 61, length)
    return Text(tokens, [str(token) for token in tokens])


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = random_hf_model(name)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    theirs.set_attn_implementation("eager")  # type: ignore[operator]
    read, source = text(11, 0), text(17, 1) if name[:2] in ("t5", "ba") else None
    maps = {found.kind: found for found in attention_maps(load_model(tmp_path), read, source)}
    tokens = torch.from_numpy(read.tokens)[None]
    with torch.no_grad():
        if source is None:
            expected = {"self": theirs(input_ids=tokens, output_attentions=True).attentions}
        else:
            out = theirs(
                input_ids=torch.from_numpy(source.tokens)[None], decoder_input_ids=tokens, output_attentions=True
            )
            expected = {
                "encoder": out.encoder_attentions,
                "decoder": out.decoder_attentions,
                "cross": out.cross_attentions,
            }
    assert maps.keys() == expected.keys()
    for kind, layers in expected.items():
        right = torch.stack(layers)[:, 0].numpy()
        assert maps[kind].weights.shape == right.shape
        np.testing.assert_allclose(maps[kind].weights, right, atol=1e-5)
        assert right.std() > 1e-2  # weights that are all alike would show nothing
    shapes = {kind: (len(found.queries), len(found.keys)) for kind, found in maps.items()}
    assert shapes == (
        {"self": (11, 11)} if source is None else {"decoder": (11, 11), "encoder": (17, 17), "cross": (11, 17)}
    )
