"""compile=true: compiles blocks in training only, with the gradients of plain blocks, or raises a clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.compiler.config
from torch import Tensor

from firth import kernel_choice
from firth.data.collate import collate
from firth.model import model as model_module
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, word_vector_config
from firth.model.config_groups import EmbeddingConfig, NormConfig
from firth.model.model import LM, MAX_RECOMPILES, _pass, compile_blocks
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.replaced_tokens import RTD
from firth.objectives.seq2seq import SpanCorruption
from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import Batch, UserError

pytestmark = pytest.mark.slow

VOCAB = Vocab(
    size=60, roles={"pad": 0, "bos": 1, "eos": 2, "mask": 3}, special=np.arange(60) < 14, sentinels=np.arange(4, 14)
)
SIZE: Any = {"vocab_size": 60, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "max_positions": 64}
BERT = ModelConfig(
    **SIZE,
    norm=NormConfig(placement="post", embedding=True),
    embedding=EmbeddingConfig(type_vocab_size=2),
    activation="gelu",
    causal=False,
)
CASES: dict[str, tuple[ModelConfig, Objective]] = {
    "decoder": (decoder_config(**SIZE), CausalLM()),
    "grouped, gated": (replace(decoder_config(**SIZE), num_kv_heads=1, activation="swiglu"), CausalLM()),
    "encoder": (encoder_config(**SIZE), MLM()),
    "post-norm": (BERT, MLM(mlm_probability=0.5)),
    "encoder-decoder": (encoder_decoder_config(**SIZE), SpanCorruption()),
    "electra": (encoder_config(**SIZE), RTD()),
}
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")


def batches(objective: Objective) -> list[Batch]:
    """Return two batches of different lengths and numbers of rows."""
    rng = np.random.default_rng(0)
    examples = [objective.build_example({"tokens": rng.integers(14, 60, n)}, VOCAB, rng) for n in (9, 17, 5, 23, 12)]
    return [collate(examples[:2], set()), collate(examples[2:], set())]


def gradients(model: LM, objective: Objective, rows: list[Batch]) -> dict[str, Tensor]:
    model.zero_grad()
    means = step(model.train(), objective, rows)
    return means | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Record every graph that torch makes of a block and run it uncompiled, which is faster."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compiler.config.recompile_limit = MAX_RECOMPILES
    whole = torch.compile(_pass, backend=keep, fullgraph=True)
    monkeypatch.setattr(model_module, "_compiled", lambda: whole)
    monkeypatch.setattr(model_module, "_try", lambda device: None)
    # Compiled blocks use torch's operators; plain blocks do so too here, so that they agree to the last bits.
    monkeypatch.setattr(
        kernel_choice, "_chosen", {name: next(iter(k.choices)) for name, k in kernel_choice.KERNELS.items()}
    )
    return made


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_plain_blocks(case: str, graphs: list[torch.fx.GraphModule]) -> None:
    config, objective = CASES[case]
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    for p in model.parameters():  # init.zero_output would hide what a block does
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    rows = batches(objective)
    plain = gradients(model, objective, rows)
    assert not graphs
    compile_blocks(model)
    found = gradients(model, objective, rows)
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    made = len(graphs)
    assert made, "nothing was compiled"
    gradients(model, objective, rows)
    assert len(graphs) == made, "recompiled for known shapes"
    with torch.no_grad():
        model.eval()(rows[0])
        model({name: value[:1, :3] for name, value in rows[0].items()})
    assert len(graphs) == made, "compiled without gradients"


def test_one_graph_serves_all_equal_layers(graphs: list[torch.fx.GraphModule]) -> None:
    made = []
    for depth in (2, 6):
        config, objective = replace(CASES["encoder"][0], num_layers=depth), CASES["encoder"][1]
        model = LM(config, objective.heads(config))
        compile_blocks(model)
        torch._dynamo.reset()
        graphs.clear()
        gradients(model, objective, batches(objective)[:1])
        made.append(len(graphs))
    # The first block may have no norm, the last may run at a subset, and those between are all equal.
    assert made[1] <= made[0] + 1 <= 4


def test_compiled_blocks_with_gradient_checkpointing(graphs: list[torch.fx.GraphModule]) -> None:
    config, objective = CASES["decoder"]
    model, rows = LM(config, objective.heads(config)), batches(objective)
    plain = gradients(model, objective, rows)
    model.stack.gradient_checkpointing = True
    compile_blocks(model)
    found = gradients(model, objective, rows)
    assert graphs and all(torch.allclose(plain[name], found[name], atol=1e-6) for name in plain)


def test_a_model_without_blocks_is_rejected() -> None:
    with pytest.raises(UserError, match="this model has none: set compile=false"):
        compile_blocks(LM(word_vector_config(60, 16), {}))


def test_missing_compiler_gives_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = LM(CASES["decoder"][0], {})
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(UserError, match=r"^torch.compile does not work here \(.+\): set compile=false$") as error,
    ):
        compile_blocks(model)
    assert "compiler" in str(error.value)


@COMPILER
def test_a_compiled_run_matches_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    text = tmp_path / "a.txt"
    text.write_text("The king saw the queen . The queen saw a dog .\n" * 200)
    overrides = [f"data.path={text}", "tokenizer.vocab_size=400", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2",
            "examples.max_length=32", "batch.size=4", "evaluation.every=0", "evaluation.max_examples=8", "checkpoint.every=3",
            "max_steps=6", "precision=fp32", "sample_prompts=['The ']"]  # fmt: skip
    for name, more in (("plain", []), ("whole", ["compile=true"])):
        run(load("gpt", [*overrides, *more]), tmp_path / name, log=lambda _: None)
    plain, whole = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[:6]]
        for name in ("plain", "whole")
    )
    assert whole == pytest.approx(plain, rel=1e-4) and whole[0] != whole[-1]
    # As if the run had been killed after its third step.
    (tmp_path / "whole" / "done.json").unlink()
    wanted = load_model(tmp_path / "whole" / "model").state_dict()
    shutil.rmtree(tmp_path / "whole" / "model")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-000006")
    again = run(load("gpt", [*overrides, "compile=true"]), tmp_path / "whole", log=lambda _: None)
    assert again.steps == 6
    found = load_model(tmp_path / "whole" / "model").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
