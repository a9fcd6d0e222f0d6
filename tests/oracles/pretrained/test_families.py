"""Parity with transformers: each family, both directions, logits and loss, on models of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import PositionConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.families import FAMILIES, family_of
from firth.pretrained.load_save import init_from, load_model, save_model
from firth.types import NEVER, UserError
from tests.support.hf_families import AUTO_CLASSES, CONFIGS, SIZES, random_hf_model
from tests.support.models import perturbed_model
from tests.support.tiny_corpus import tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()


def batches(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The same right-padded rows for firth and for transformers, and the mask of real tokens."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 61, (3, 20))
    real = torch.arange(20) < torch.tensor([20, 13, 7])[:, None]
    steps = torch.arange(20).expand(3, 20)
    ours = {"tokens": tokens}
    theirs = {"input_ids": tokens, "attention_mask": real.long()}
    if family in ("bert", "albert", "electra", "modernbert", "mpnet", "xlnet"):
        ours["key_time"] = torch.where(real, 0, NEVER)
    else:
        ours |= {"query_time": steps, "key_time": torch.where(real, steps, NEVER)}
    if family == "mpnet":
        theirs["position_ids"] = steps + 2
    if family in ("bert", "albert", "electra", "xlnet"):
        ours["token_type_ids"] = theirs["token_type_ids"] = (steps > 4).long()
    if family in ("t5", "bart", "marian"):
        source = torch.randint(1, 61, (3, 26))
        theirs = {"input_ids": source, "decoder_input_ids": tokens}
        keep = torch.arange(26) < torch.tensor([26, 9, 18])[:, None]
        theirs["attention_mask"] = keep.long()
        ours |= {"source_tokens": source, "source_key_time": torch.where(keep, 0, NEVER), "key_time": steps}
    return ours, theirs, real


@torch.no_grad()
def agree(model: LM, theirs: torch.nn.Module, family: str) -> float:
    """Return the largest difference of logits on real positions, in units of their deviation where that is above 1.

    Random weights of a gated T5 give logits of up to 25 (deviation 6.6), which differ by 1.2e-4 with kernels of AVX2. That is
    rounding in fp32, 5e-6 of them: `test_a_gated_t5_is_exact_in_float64`.
    """
    ours_in, theirs_in, real = batches(family)
    hidden = model(ours_in)
    head = model.heads["lm"]
    labels = ours_in["tokens"].roll(-1, 1)
    want = theirs(**theirs_in).logits
    difference = (head(hidden) - want)[real].abs().max().item()
    loss = head.nll(hidden[real], labels[real]) / real.sum()  # type: ignore[operator]
    expected = torch.nn.functional.cross_entropy(want[real].float(), labels[real])
    assert abs(loss.item() - expected.item()) < 1e-5
    assert want[real].std() > 0.05
    return difference / max(1.0, want[real].std().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_saved_models(name: str, tmp_path: Path) -> None:
    config, family = CONFIGS[name], name.split("-")[0]
    model = perturbed_model(config)
    found = family_of(config)
    assert found is not None and found.name == family
    summary = save_model(model, None, tmp_path)
    assert summary.endswith(found.classes[0])
    auto = getattr(transformers, AUTO_CLASSES[family])
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert agree(model, theirs.eval(), family) < 1e-4
    again = load_model(tmp_path)
    assert again.config == config
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "bart",
        "marian",
        "albert",
        "electra",
        "electra-wide",
        "gpt2",
        "llama",
        "t5",
        "t5-gated",
        "nanochat",
        "modernbert",
        "xlnet",
        "mpnet",
    ],
)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_models_saved_by_transformers_load(name: str, shards: str, tmp_path: Path) -> None:
    theirs = random_hf_model(name)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    model = load_model(tmp_path)
    assert "lm" in model.heads
    assert agree(model, theirs, name.split("-")[0]) < 1e-4


def test_a_gated_t5_is_exact_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference in fp32 is rounding alone. T5LayerNorm computes its variance in fp32 for any dtype, so it is patched."""

    def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr("transformers.models.t5.modeling_t5.T5LayerNorm.forward", norm)
    theirs = random_hf_model("t5-gated")
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path).double()
    ours_in, theirs_in, real = batches("t5")
    with torch.no_grad():
        found = model.heads["lm"](model(ours_in)) - theirs.double()(**theirs_in).logits
    assert found[real].abs().max() < 1e-10


def test_a_headless_model_has_no_head(tmp_path: Path) -> None:
    theirs = random_hf_model("bert")
    theirs.bert.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not len(model.heads)
    ours_in, theirs_in, real = batches("bert")
    with torch.no_grad():
        assert (model(ours_in) - theirs.bert(**theirs_in).last_hidden_state)[real].abs().max() < 1e-4


def test_config_suits_both_transformers_versions(tmp_path: Path) -> None:
    save_model(perturbed_model(CONFIGS["llama-tied"]), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in set(file.keys())


def test_all_heads_are_saved(tmp_path: Path) -> None:
    config = CONFIGS["bert"]
    inner = replace(config, num_layers=1)
    torch.manual_seed(0)
    heads = {
        "lm": LMHead(config),
        "classes": torch.nn.Linear(32, 3),
        "pair": torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)),
        "generator": LM(inner, {"lm": LMHead(inner)}),
    }
    model = LM(config, heads).eval()
    save_model(model, None, tmp_path, {"steps": 7})
    again = load_model(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert again.heads["lm"].weight is again.tokens.weight
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert agree(again, theirs.eval(), "bert") < 1e-4


def test_init_from_is_strict_on_the_stack(tmp_path: Path) -> None:
    config = CONFIGS["bert"]
    old = perturbed_model(config)
    save_model(old, None, tmp_path)
    torch.manual_seed(9)
    new = LM(config, {"classes": torch.nn.Linear(32, 3)})
    assert init_from(new, tmp_path) == (["lm"], ["classes"])
    assert torch.equal(new.stack.blocks[1].mlp.up.weight, old.stack.blocks[1].mlp.up.weight)
    with pytest.raises(UserError, match=r"model\.intermediate_size is 48, not 64"):
        init_from(LM(replace(config, intermediate_size=64), {}), tmp_path)


def test_a_config_without_a_family_is_saved(tmp_path: Path) -> None:
    config = ModelConfig(**SIZES, position=PositionConfig("sinusoidal"), activation="relu2")
    assert family_of(config) is None
    model = perturbed_model(config)
    assert "only firth" in save_model(model, None, tmp_path)
    again = load_model(tmp_path)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items())


def test_invalid_directories_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 5}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled"):
        load_model(tmp_path)
    save_model(perturbed_model(CONFIGS["gpt2"]), None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not as it was written"):
        load_model(tmp_path)
    (tmp_path / "firth.json").unlink()  # and with it the content hashes
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    save = tmp_path / "model.safetensors"
    save.unlink()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, save)
    with pytest.raises(UserError, match="model_type 'rwkv'"):
        load_model(tmp_path)


def test_every_default_config_has_a_family() -> None:
    assert {n.split("-")[0] for n in CONFIGS} <= set(FAMILIES)  # the others: test_model_family_heads
    for config in (decoder_config(61, 64, 2), encoder_config(61, 64, 2), encoder_decoder_config(61, 64, 2)):
        assert family_of(config) is not None


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_generation_ends_where_transformers_does(end: str, tmp_path: Path) -> None:
    """Generation ends at the end of a text and of a turn: the model is changed to emit it first as its n-th token."""
    tok = tokenizer()
    model = perturbed_model(
        decoder_config(tok.vocab.size, 32, 2, num_heads=4, max_positions=64).with_fields({"init.zero_output": False})
    )
    prompt, greedy = tok.encode("What is a module?"), Sampling(max_new_tokens=12, temperature=0)
    [unending] = Engine(model, tok, stops=()).generate([prompt], greedy)
    tokens = unending.tokens.tolist()
    n = max(i for i in range(12) if tokens[i] not in tokens[:i])
    assert n > 1
    head = model.heads["lm"].weight.data
    swap = [tokens[n], tok.id(end)]
    head[swap] = head[swap[::-1]].clone()
    save_model(model, tok, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == [tok.id("</s>"), tok.id("<|im_end|>")]
    ids = torch.as_tensor(prompt, dtype=torch.int64)[None]
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    [ours] = Engine(model, tok).generate([prompt], greedy)
    assert out[0, len(prompt) :].tolist() == ours.tokens.tolist() == [*tokens[:n], tok.id(end)]
