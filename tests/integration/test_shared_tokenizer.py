"""Models that exchange token ids must share a tokenizer; the same vocabulary size is not enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from firth.evaluate.task import load_evaluated_model
from firth.model.config import ModelConfig, decoder_config, encoder_config
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.reward_model import RewardModeling
from firth.peft import adapter_files, lora
from firth.pretrained.load_save import load_model, save_model
from firth.runs.import_export import export_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.runs import quiet

SIZE = 300


def save(directory: Path, tokenizer: Tokenizer, config: ModelConfig, objective: Objective, name: str = "") -> Path:
    torch.manual_seed(0)
    facts = {"classes": ["bad", "good"]} if isinstance(objective, Classification) else {}
    save_model(LM(config, objective.heads(config)), tokenizer, directory, facts)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one config and two tokenizers of one size, `ours` and `theirs`, and records."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = {
        "ours": "the otter paints the red door of a boat",
        "theirs": "zulu yankee xray whisky victor uniform tango",
    }
    for name, text in texts.items():
        tokenizer = train([f"{text} {text[i:]}" for i in range(30)], "byte-bpe", vocab_size=SIZE)
        tokenizer.save(folder / name / "tokenizer")
        size = tokenizer.vocab.size
        left, both = decoder_config(size, 32, 1, max_positions=64), encoder_config(size, 32, 1, max_positions=64)
        save(folder / name / "policy", tokenizer, left, CausalLM())
        save(folder / name / "reward", tokenizer, left, CausalLM() + RewardModeling())
        save(folder / name / "encoder", tokenizer, both, MLM())
        save(folder / name / "teacher", tokenizer, both, Classification(class_names=("bad", "good")))
    prompts = [{"prompt": f"Who paints {i}?", "completion": "The otter."} for i in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    labels = [{"text": f"the otter paints {i}", "label": "good" if i % 2 else "bad"} for i in range(24)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    return folder


def error_of(name: str, settings: list[str], out: Path) -> str:
    with pytest.raises(UserError, match="another tokenizer") as error:
        run(load(name, [*settings, "max_steps=2", "precision=fp32", "batch.size=8", "sample_prompts=[]"]), out, quiet)
    message = str(error.value)
    assert "\n" not in message and "checkpoints" not in {path.name for path in out.iterdir()}
    return message


def test_reward_model_with_other_tokenizer_is_rejected(place: Path, tmp_path: Path) -> None:
    """It would score the policy's ids as if they were its own (trl#1674, #3595, #6952)."""
    data = [f"data.path={place / 'prompts.jsonl'}", f"init_from={place / 'ours' / 'policy'}", "examples.rollout_size=8"]
    reward = f"examples.reward_model={place / 'theirs' / 'reward'}"
    message = error_of("ppo", [*data, reward, "examples.num_epochs=1", "examples.max_new_tokens=4"], tmp_path / "run")
    assert message.startswith("examples.reward_model:")


def test_teacher_with_other_tokenizer_is_rejected(place: Path, tmp_path: Path) -> None:
    data = [f"data.path={place / 'labels.jsonl'}", f"init_from={place / 'ours' / 'encoder'}"]
    of = "base: {kind: partially_labeled, num_labeled: 4}"
    taught = f"examples={{kind: pseudo_labeled, teacher: {place / 'theirs' / 'teacher'}, {of}}}"
    message = error_of("classification", [*data, taught, "objective=pseudo_labels"], tmp_path / "run")
    assert message.startswith("examples.teacher:")


@pytest.mark.parametrize("field", ["init_from", "init_embeddings_from"])
def test_init_from_with_other_tokenizer_is_rejected(place: Path, tmp_path: Path, field: str) -> None:
    settings = [f"data.path={place / 'labels.jsonl'}", f"tokenizer.path={place / 'theirs' / 'tokenizer'}"]
    shape = (
        [
            "model.causal=false",
            "model.hidden_size=32",
            "model.num_layers=1",
            "model.num_heads=2",
            "model.max_positions=64",
        ]
        if field == "init_embeddings_from"
        else []
    )
    begin = f"{field}={place / 'ours' / 'encoder'}"
    assert error_of("classification", [*settings, *shape, begin], tmp_path / "run").startswith(f"{field}:")


@pytest.fixture(scope="module")
def adapted(place: Path) -> Path:
    """Return a LoRA on our policy, with its tokenizer's digest."""
    model = load_model(place / "ours" / "policy")
    lora.add(model, ("attention.q",), lora.LoraConfig(2, 4.0))
    digest = Tokenizer.load(place / "ours" / "policy").digest
    adapter_files.write(model, place / "adapter", place / "ours" / "policy", tokenizer=digest)
    return place / "adapter"


def test_adapter_with_other_tokenizer_is_rejected(place: Path, adapted: Path, tmp_path: Path) -> None:
    """The base has the same config, so every matrix fits."""
    assert load_evaluated_model(adapted).model.config.vocab_size
    data = [f"data.path={place / 'prompts.jsonl'}", f"peft.init_from={adapted}", "peft.kind=lora"]
    message = error_of("sft", [*data, f"init_from={place / 'theirs' / 'policy'}"], tmp_path / "run")
    assert message.startswith(f"the adapter {adapted}")
    moved = tmp_path / "moved"
    shutil.copytree(adapted, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(place / "theirs" / "policy")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    record = {k: v for k, v in json.loads((moved / "firth.json").read_text()).items() if k not in ("files", "digest")}
    (moved / "firth.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="another tokenizer than its base"):
        load_evaluated_model(moved)


def test_adapter_of_peft_is_compared_by_its_tokens(place: Path, adapted: Path, tmp_path: Path) -> None:
    """Without a digest, a tokenizer with the same ids or more is accepted."""
    theirs = tmp_path / "theirs"
    shutil.copytree(adapted, theirs)
    (theirs / "firth.json").unlink()
    (theirs / "heads.safetensors").unlink(missing_ok=True)
    tokenizer = Tokenizer.load(place / "ours" / "policy")
    tokenizer.save(theirs)
    assert load_evaluated_model(theirs).tokenizer.digest == tokenizer.digest
    Tokenizer.load(place / "theirs" / "policy").save(theirs)
    with pytest.raises(UserError, match="another tokenizer than its base"):
        load_evaluated_model(theirs)


def test_replaced_tokenizer_of_a_model_is_rejected(place: Path, tmp_path: Path) -> None:
    """Two tokenizers with the same number of ids: only the digest distinguishes them."""
    mixed = tmp_path / "mixed"
    shutil.copytree(place / "ours" / "policy", mixed)
    Tokenizer.load(place / "theirs" / "policy").save(mixed)
    assert Tokenizer.load(mixed).vocab.size == Tokenizer.load(place / "ours" / "policy").vocab.size
    with pytest.raises(UserError, match="is not the tokenizer that this model was trained with"):
        load_evaluated_model(mixed)
    with pytest.raises(UserError, match="is not the tokenizer that this model was trained with"):
        export_model(mixed, tmp_path / "out", form="hf", dtype="", shard="", log=quiet)
    data = [f"data.path={place / 'prompts.jsonl'}", f"init_from={mixed}", "max_steps=2"]
    with pytest.raises(UserError, match="is not the tokenizer that this model was trained with"):
        run(load("sft", data), tmp_path / "run", quiet)
