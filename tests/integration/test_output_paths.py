"""A place where nothing can be written is refused in one sentence by every command that writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.io.atomic import refusal
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.tokenizer.train import train
from firth.types import UserError

TINY = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=0",
    "tokenizer.vocab_size=300",
    "examples.max_length=16",
    "max_steps=1",
    "sample_prompts=[]",
]
COMMANDS = {
    "train": ["train", "gpt", *TINY, "data.path={text}", "--out", "{out}"],
    "export": ["export", "{model}", "{out}"],
    "import": ["import", "{model}", "{out}"],
    "vectors": ["vectors", "{model}", "--out", "{out}"],
    "predict": ["predict", "{model}", "{text}", "--out", "{out}"],
    "embed": ["embed", "{model}", "{text}", "--out", "{out}"],
    "tokenizer": ["tokenizer", "train", "{text}", "--vocab-size", "300", "--out", "{out}"],
    "compare": ["compare", "gpt", "data.path={text}", "--max-flops", "1e6", "--probe", "none", "--out", "{out}"],
    "demo": ["demo", "--text", "{text}", "--size", "tiny", "--out", "{out}"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    text = "the otter paints a red boat\n" * 200
    (folder / "text.txt").write_text(text)
    tokenizer = train([text], "byte-bpe", 300)
    config = ModelConfig(vocab_size=tokenizer.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    save_model(LM(config, {"lm": LMHead(config)}), tokenizer, folder / "model")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_made_is_refused(command: str, place: Path) -> None:
    for out in ("/proc/x/y", "/dev/null/x", str(place / "text.txt" / "x")):
        words = [word.format(out=out, text=place / "text.txt", model=place / "model") for word in COMMANDS[command]]
        error = CliRunner().invoke(app, words).exception
        if isinstance(error, OSError):  # `main` does the same with what is left
            error = refusal(error, error.filename)
        assert isinstance(error, UserError), (out, error)
        assert "\n" not in str(error) and any(part in str(error) for part in (out, str(Path(out).parent)))
