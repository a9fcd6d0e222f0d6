"""Using a trained model from the command line: chat, fill, generate, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from firth.cli import app
from firth.generate.sample import Sampling
from firth.model.heads import Vocabulary
from firth.model.lm import LM
from firth.model.shape import Shape, decoder
from firth.model.weights import save_model
from firth.recipes.recipe import load
from firth.recipes.run import run
from firth.recipes.use import Conversation, PromptTooLongError, open_engine
from firth.text import chat
from firth.text.tokenizer import Tokenizer
from firth.text.train import train
from firth.types import UserError

TEXT = "Who paints the boat at dawn, and who holds the map by the mill? The otter paints the boat. " * 12
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""A template that refuses a dialogue without whole exchanges, as Mistral's does."""


def random_model(shape: Shape, **parts: torch.nn.Module) -> LM:
    """A model with drawn weights."""
    torch.manual_seed(0)
    model = LM(shape, parts or {"lm": Vocabulary(shape)})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([TEXT], "byte-bpe", 340, sentinels=4)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A decoder with a context of 128."""
    place = tmp_path_factory.mktemp("talker")
    save_model(random_model(decoder(tokenizer.vocab.size, 32, 1, 2, context=128)), tokenizer, place)
    return place


def test_chat_outgrows_context_in_whole_exchanges(talker: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Six turns in 128 tokens behind a template that wants user and assistant in turn (case 25)."""
    save_model(random_model(decoder(tokenizer.vocab.size, 32, 1, 2, context=128)), tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    lines = "".join(f"Who paints the boat at dawn number {i}, and who holds the map?\n" for i in range(6))
    done = CliRunner().invoke(app, ["chat", str(tmp_path), "-n", "12", "--temperature", "0"], input=lines)
    assert done.exit_code == 0, done.output
    assert done.output.count("the oldest exchanges are dropped") == 1


def test_chat_keeps_room_for_every_answer(talker: Path) -> None:
    """-n 60 and short lines in 128 tokens: each answer of a model that never stops has 60 tokens (case 32)."""
    talk = Conversation(talker, Sampling(temperature=0, max_new=60))
    talk.opened.engine.stops = frozenset()
    for i in range(6):
        list(talk.answer(f"Who paints the boat {i}?"))
        [answer] = talk.opened.engine.generate(
            [chat.encode(talk.opened.tokenizer, talk.messages[:-1], open=True)[0]], talk.sampling
        )
        assert len(answer.tokens) == 60 and answer.finish == "length"
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
    assert talk.dropped == 6 - len(talk.messages) // 2 > 0


def test_chat_keeps_its_system_turn(talker: Path) -> None:
    talk = Conversation(talker, Sampling(temperature=0, max_new=40), system="Be kind.")
    for _ in range(5):
        list(talk.answer("Who paints the boat at dawn?"))
    assert talk.dropped > 0
    assert [m["role"] for m in talk.messages[:3]] == ["system", "user", "assistant"]
    assert talk.messages[0]["content"] == "Be kind."


def test_chat_refuses_a_long_line_and_goes_on(talker: Path) -> None:
    talk = Conversation(talker, Sampling(temperature=0, max_new=20))
    list(talk.answer("Who paints?"))
    before = list(talk.messages)
    with pytest.raises(
        PromptTooLongError, match=r"a prompt of \d+ tokens, .* answer of 20 in a context of 128: shorten it"
    ):
        list(talk.answer("Who paints the boat at dawn? " * 40))
    assert talk.messages == before
    done = CliRunner().invoke(app, ["chat", str(talker)], input="hello\n" + "the boat " * 400 + "\nhello again\n")
    assert done.exit_code == 0 and done.output.count("shorten it") == 1
    # By default half of the context is kept for an answer.
    assert "an answer of 64 in a context of 128" in done.output


def test_chat_refuses_an_answer_as_long_as_the_context(talker: Path) -> None:
    with pytest.raises(UserError, match=r"an answer of 128 tokens leaves no room .* choose fewer with --tokens"):
        Conversation(talker, Sampling(max_new=128))


def test_tuned_model_stops_where_pad_is_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The token that ends the assistant's turn is supervised, so the model stops by itself (case 27)."""
    base = tmp_path / "base"
    save_model(random_model(decoder(tokenizer.vocab.size, 32, 1, 2, context=64)), tokenizer, base)
    (base / "firth.json").rename(base / "kept.json")
    (base / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\n' }}"
        "{% else %}{{ 'A: ' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((base / name).read_text())
        config |= {key: config[key.replace("pad", "eos")] for key in ("pad_token", "pad_token_id") if key in config}
        (base / name).write_text(json.dumps(config))
    rows = [{"prompt": f"Who paints {i % 5}?", "completion": "The otter paints the boat."} for i in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"start={base}", f"source.path={tmp_path / 'd.jsonl'}", "source.held_out=0", "length.steps=80",
                "batch.rows=8", "segment.length=64", "optimizer.rate=1e-2", "checks.every=80"]  # fmt: skip
    run(load("instruct", settings), tmp_path / "run", echo=lambda _: None)
    opened = open_engine(tmp_path / "run")
    assert opened.tokenizer.vocab.pad == opened.tokenizer.vocab.eos
    messages = [{"role": "user", "content": "Who paints 1?"}, {"role": "assistant", "content": "The otter."}]
    tokens, mask = chat.encode(opened.tokenizer, messages)
    assert opened.tokenizer.vocab.eos in tokens[mask]
    prompt, _ = chat.encode(opened.tokenizer, messages[:1], open=True)
    [answer] = opened.engine.generate([prompt], Sampling(temperature=0, max_new=40))
    assert answer.finish == "stop"
