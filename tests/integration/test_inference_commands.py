"""Using a trained model from the command line: chat, fill, generate, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.evaluate.task import load_evaluated_model
from firth.generate.sampling import Sampling
from firth.model.config import decoder_config, encoder_config
from firth.pretrained.load_save import save_model
from firth.runs.inference import Conversation, PromptTooLongError, open_engine
from firth.runs.loaded_model import encode_prompt
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.models import random_model

TEXT = "Who paints the boat at dawn, and who holds the map by the mill? The otter paints the boat. " * 12
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""A template that refuses a dialogue without whole exchanges, as Mistral's does."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([TEXT], "byte-bpe", 340, num_sentinels=4)


@pytest.fixture(scope="module")
def conversation(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return a chat with a decoder that has a context of 128."""
    place = tmp_path_factory.mktemp("talker")
    save_model(random_model(decoder_config(tokenizer.vocab.size, 32, 1, 2, max_positions=128)), tokenizer, place)
    return place


def test_chat_drops_whole_exchanges(conversation: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Six turns in 128 tokens with a template that requires alternating user and assistant turns (case 25)."""
    save_model(random_model(decoder_config(tokenizer.vocab.size, 32, 1, 2, max_positions=128)), tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    lines = "".join(f"Who paints the boat at dawn number {i}, and who holds the map?\n" for i in range(6))
    done = CliRunner().invoke(app, ["chat", str(tmp_path), "-n", "12", "--temperature", "0"], input=lines)
    assert done.exit_code == 0, done.output
    assert done.output.count("the oldest exchanges are dropped") == 1


def test_chat_keeps_room_for_every_answer(conversation: Path) -> None:
    """-n 60 and short lines in 128 tokens: each answer of a model that never stops has 60 tokens (case 32)."""
    talk = Conversation(conversation, Sampling(temperature=0, max_new_tokens=60))
    talk.loaded.engine.stops = frozenset()
    for i in range(6):
        list(talk.answer(f"Who paints the boat {i}?"))
        [answer] = talk.loaded.engine.generate(
            [chat.encode(talk.loaded.tokenizer, talk.messages[:-1], open=True)[0]], talk.sampling
        )
        assert len(answer.tokens) == 60 and answer.finish == "length"
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
    assert talk.dropped == 6 - len(talk.messages) // 2 > 0


def test_chat_keeps_its_system_turn(conversation: Path) -> None:
    talk = Conversation(conversation, Sampling(temperature=0, max_new_tokens=40), system="Be kind.")
    for _ in range(5):
        list(talk.answer("Who paints the boat at dawn?"))
    assert talk.dropped > 0
    assert [m["role"] for m in talk.messages[:3]] == ["system", "user", "assistant"]
    assert talk.messages[0]["content"] == "Be kind."


def test_chat_rejects_a_long_line_and_continues(conversation: Path) -> None:
    talk = Conversation(conversation, Sampling(temperature=0, max_new_tokens=20))
    list(talk.answer("Who paints?"))
    before = list(talk.messages)
    with pytest.raises(
        PromptTooLongError, match=r"a prompt of \d+ tokens, .* answer of 20 in a context of 128: shorten it"
    ):
        list(talk.answer("Who paints the boat at dawn? " * 40))
    assert talk.messages == before
    done = CliRunner().invoke(app, ["chat", str(conversation)], input="hello\n" + "the boat " * 400 + "\nhello again\n")
    assert done.exit_code == 0 and done.output.count("shorten it") == 1
    # By default half of the context is kept for an answer.
    assert "an answer of 64 in a context of 128" in done.output


def test_chat_rejects_an_answer_as_long_as_the_context(conversation: Path) -> None:
    with pytest.raises(
        UserError, match=r"an answer of 128 tokens leaves no room .* choose fewer with --max-new-tokens"
    ):
        Conversation(conversation, Sampling(max_new_tokens=128))


# A decoder that is tuned on dialogues, and scored by what it writes

PAINTERS = {"boat": "otter", "map": "pilot", "mill": "clerk", "dawn": "heron"}
ROWS = [
    {"prompt": f"Who paints the {thing}?", "completion": f"The {who} paints the {thing}."}
    for thing, who in PAINTERS.items()
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """An SFT run on ROWS from a model of another library whose pad is its eos, with its own chat template."""
    place = tmp_path_factory.mktemp("tuned")
    base = place / "base"
    save_model(random_model(decoder_config(tokenizer.vocab.size, 32, 1, 2, max_positions=64)), tokenizer, base)
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
    (place / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    settings = [f"init_from={base}", f"data.path={place / 'd.jsonl'}", "data.validation_fraction=0", "max_steps=120", "batch.size=8",
                "examples.max_length=64", "optimizer.lr=1e-2", "evaluation.every=0", "precision=fp32"]  # fmt: skip
    run(load("sft", settings), place / "run", log=lambda _: None)
    return place


def test_tuned_model_stops_where_pad_is_eos(tuned: Path) -> None:
    """The token that ends the assistant's turn is supervised, so the model stops by itself (case 27)."""
    opened = open_engine(tuned / "run")
    assert opened.tokenizer.vocab.pad == opened.tokenizer.vocab.eos
    messages = [{"role": "user", "content": ROWS[0]["prompt"]}, {"role": "assistant", "content": "The otter."}]
    tokens, mask = chat.encode(opened.tokenizer, messages)
    assert opened.tokenizer.vocab.eos in tokens[mask]
    prompt, _ = chat.encode(opened.tokenizer, messages[:1], open=True)
    [answer] = opened.engine.generate([prompt], Sampling(temperature=0, max_new_tokens=40))
    assert answer.finish == "stop" and answer.text.strip() == "The otter paints the boat."


def firth(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("where", ["run", "run/model"])
def test_decoder_is_scored_by_its_answers(tuned: Path, where: str) -> None:
    """It was trained to generate these answers: exact match, F1 and BLEU are perfect, and one wrong gold answer lowers them."""
    right = tuned / "right.jsonl"
    right.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:3], ROWS[3] | {"completion": "Nobody."}]))
    found = json.loads(firth("evaluate", str(tuned / where), str(right), "--task", "generation", "--json"))
    assert found["items"] == 4 and found["exact_match"] == 0.75 and found["f1"] == 0.75
    assert found["majority_accuracy"] == 0.25
    if where == "run":
        right.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert json.loads(firth("evaluate", str(tuned / where), str(right), "--task", "translation", "--json"))[
            "bleu"
        ] == pytest.approx(100)


def test_dialogues_are_answered_without_a_task(tuned: Path, tmp_path: Path) -> None:
    """A run that is trained on dialogues answers them; other records and text are scored as before."""
    rows = tmp_path / "right.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = json.loads(firth("evaluate", str(tuned / "run"), str(rows), "--json"))
    assert found["task"] == "generation" and found["exact_match"] == 1
    texts = tmp_path / "t.jsonl"
    texts.write_text(json.dumps({"text": TEXT, "prompt": "a", "completion": "b"}) + "\n")
    assert json.loads(firth("evaluate", str(tuned / "run"), str(texts), "--json"))["task"] == "likelihood"


@pytest.mark.parametrize(
    ("row", "cure"),
    [
        (ROWS[0], "use --task generation to score the model's completions of the prompts"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "use --task objective for a run of dpo, or evaluate a run of reward_model"),
    ],
)  # fmt: skip
def test_records_without_text_name_their_task(
    conversation: Path, tmp_path: Path, row: dict[str, str], cure: str
) -> None:
    """A model that was trained on running text."""
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    done = CliRunner().invoke(app, ["evaluate", str(conversation), str(rows)])
    assert str(done.exception) == (
        f"{rows}:1: this record has {', '.join(row)} but no `text`, which the default task (likelihood) needs: {cure}"
    )


def test_decoder_predicts_one_row_per_record(tuned: Path) -> None:
    """Prompts in every format, blank lines, and a prompt that leaves no room for an answer."""
    opened = open_engine(tuned / "run")
    prompts = tuned / "p.txt"
    prompts.write_text(f"{ROWS[0]['prompt']}\n\n{ROWS[2]['prompt']}\n{'the boat ' * 80}\n")
    rows = [json.loads(line) for line in firth("predict", str(tuned / "run"), str(prompts)).splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("answer") for row in rows] == [ROWS[0]["completion"], None, ROWS[2]["completion"], ""]
    assert [row.get("finish") for row in rows] == ["stop", None, "stop", "context"]
    prompt, _ = chat.encode(opened.tokenizer, [{"role": "user", "content": ROWS[0]["prompt"]}], open=True)
    [answer] = opened.engine.generate([prompt], Sampling(temperature=0, max_new_tokens=40))
    assert rows[0]["probability"] == pytest.approx(float(np.exp(answer.logprobs.sum())), abs=1e-5)
    dialogues = tuned / "m.jsonl"
    turns = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "x"}] for row in ROWS]
    dialogues.write_text("".join(json.dumps({"id": i, "messages": turn}) + "\n" for i, turn in enumerate(turns)))
    firth("predict", str(tuned / "run"), str(dialogues), "--out", str(tuned / "out.csv"))
    lines = (tuned / "out.csv").read_text().splitlines()
    assert lines[0] == "row,id,answer,probability,finish" and lines[4].startswith("4,3,The heron paints the dawn.,")


def test_plain_decoder_continues_a_line(conversation: Path, tokenizer: Tokenizer) -> None:
    """It was never trained with a chat template."""
    prompts = conversation / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "Who paints the boat?"}) + "\n")
    [row] = [json.loads(line) for line in firth("predict", str(conversation), str(prompts)).splitlines()]
    opened = open_engine(conversation)
    [answer] = opened.engine.generate(
        [encode_prompt(tokenizer, "Who paints the boat?", opened.model)],
        Sampling(temperature=0, max_new_tokens=256, stop_strings=("\n",)),
    )
    assert row == {"row": 1, "answer": answer.text.strip(), "probability": row["probability"], "finish": answer.finish}


@pytest.mark.parametrize(
    ("objective", "talks"),
    [
        (None, False),
        ("sft", True),
        (["sft"], True),
        ({"kind": "dpo"}, True),
        ("causal", False),
        ("none such", False),
        ([[7]], False),
    ],
)
def test_metadata_says_whether_trained_on_dialogues(
    tokenizer: Tokenizer, tmp_path: Path, objective: object, talks: bool
) -> None:
    """The objective in firth.json decides; the file may hold anything."""
    facts = {} if objective is None else {"objective": objective}
    save_model(
        random_model(decoder_config(tokenizer.vocab.size, 32, 1, 2, max_positions=64)), tokenizer, tmp_path, facts
    )
    assert load_evaluated_model(tmp_path).is_chat_model is talks


def test_masked_model_does_not_generate_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(random_model(encoder_config(tokenizer.vocab.size, 32, 1, 2, max_positions=64)), tokenizer, tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    for command, instead in (
        (["evaluate", str(tmp_path), str(tmp_path / "d.jsonl"), "--task", "generation"], "firth train sft"),
        (["predict", str(tmp_path), str(tmp_path / "d.jsonl")], "use `firth fill`"),
    ):
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, UserError) and instead in str(done.exception)
