"""The groups of `ModelConfig`: in Python, as nested dicts, and as recipe keys."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from firth.model.config import ModelConfig, decoder_config
from firth.model.config_groups import NormConfig, PositionConfig, RopeConfig
from firth.model.presets import PRESETS
from firth.runs.recipe import load
from firth.types import UserError


def test_a_reader_sees_about_twenty_fields() -> None:
    assert len(fields(ModelConfig)) <= 23
    assert len(decoder_config(100, 64, 1).flat_fields()) == 57


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_flat_fields_give_the_config_back(name: str) -> None:
    config = PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert ModelConfig(9, 8, 1, 1).with_fields(config.flat_fields()) == config


def test_fields_are_set_by_dotted_names() -> None:
    config = ModelConfig(9, 8, 1, 1, norm=NormConfig("rms", eps=1e-6))
    changed = config.with_fields({"norm.placement": "post", "position.rope.theta": 5e5, "causal": False})
    assert changed.norm == NormConfig("rms", placement="post", eps=1e-6)
    assert changed.position == PositionConfig(rope=RopeConfig(theta=5e5))
    assert not changed.causal
    both = config.with_fields({"position": PositionConfig("rotary"), "position.rope.sign": -1})
    assert both.position == PositionConfig("rotary", RopeConfig(sign=-1))


def test_invalid_groups_are_rejected() -> None:
    with pytest.raises(UserError, match=r"^model\.norm='rms' should be an instance of NormConfig$"):
        ModelConfig(9, 8, 1, 1, norm="rms")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^model\.position\.rope\.theta=0 should be greater than 0$"):
        RopeConfig(theta=0)
    with pytest.raises(UserError, match=r"^model\.norm\.type='batch' should be 'layer' or 'rms'$"):
        NormConfig("batch")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model\.position\.rope is 3, not a mapping of fields"):
        ModelConfig.from_dict(asdict(ModelConfig(9, 8, 1, 1)) | {"position": {"rope": 3}})


def test_recipe_keys_of_groups(tmp_path: Path) -> None:
    """A bare value sets the type of a group and keeps the other fields, in YAML and on the command line."""
    model = load("bert", ["model.norm=rms", "model.position=t5", "model.position.relative_buckets=8"]).model
    before = load("bert").model
    assert model is not None and before is not None
    assert model.flat_fields() == before.flat_fields() | {
        "norm.type": "rms",
        "position.type": "t5",
        "position.relative_buckets": 8,
    }
    file = tmp_path / "mine.yaml"
    text = "name: mine\nobjective: causal_lm\nexamples: windows\ndata: {corpus: shakespeare}\nmodel:\n"
    text += (
        "  hidden_size: 64\n  num_layers: 1\n  num_heads: 1\n  position: rotary\n  norm: {type: rms, NAME: 1.0e-6}\n"
    )
    file.write_text(text.replace("NAME", "eps"), "utf-8")
    mine = load(str(file), ["model.position.rope.theta=500"]).model
    assert mine is not None
    assert (mine.norm, mine.position) == (NormConfig("rms", eps=1e-6), PositionConfig("rotary", RopeConfig(500.0)))
    file.write_text(text.replace("NAME", "epss"), "utf-8")
    with pytest.raises(
        UserError, match=rf"^{file}:10: model\.norm\.epss: there is no field 'epss' .* did you mean 'eps'\?"
    ):
        load(str(file))
    file.write_text(text.replace("NAME", "eps").replace("rotary", "rotory"), "utf-8")
    with pytest.raises(UserError, match=rf"^{file}:9: model\.position\.type='rotory' should be .*'rotary'"):
        load(str(file))
