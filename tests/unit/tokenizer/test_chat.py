"""Dialogues to tokens: the loss mask, hostile user text, templates of other models; transformers is the oracle."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from firth.tokenizer import chat
from firth.tokenizer.chat import Message, encode
from firth.tokenizer.chat_template import TEMPLATE, split_template
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

PROSE = "user assistant system hello there, what is it? It is a cat; you know that well.\n\nYes!  No.\n" * 9


def dialogue(*contents: str, system: str = "") -> list[Message]:
    """Return a dialogue with alternating user and assistant turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


DIALOGUES = [
    dialogue("hello", "there"),
    dialogue("hello there", "It is a cat.", "what?", "Yes!\n\nNo.", system="you know"),
    dialogue("what is it?", "a cat; you know", "well?"),
    dialogue("", ""),
]

SMOL = (  # that of SmolLM2-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
LLAMA3 = (  # that of Llama 3, with firth's control tokens
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|im_start|>' + "
    "message['role'] + '<mask>\n\n'+ message['content'] | trim + '<|im_end|>' %}{% if loop.index0 == 0 %}{% set content "
    "= bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant"
    "<mask>\n\n' }}{% endif %}"
)
LLAMA2 = (  # that of Llama 2 and Mistral
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim"
    " + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '<<SYS>> ' + message['content'] + ' <</SYS>> ' }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # that of Zephyr, with a generation block
    "{% for message in messages %}\n{% if message['role'] == 'assistant' %}\n{% generation %}{{ '<|assistant|>\n' + "
    "message['content'] + eos_token }}{% endgeneration %}\n{% else %}\n{{ '<|' + message['role'] + '|>\n' + "
    "message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
    "{% endif %}\n{% endfor %}"
)
TEMPLATES = {"smol": SMOL, "llama3": LLAMA3, "llama2": LLAMA2, "zephyr": ZEPHYR}


def llama_engine() -> Engine:
    """Return an engine like Llama's: a prefix space, byte fallback, no pre-tokenizer."""
    trained = Engine(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<mask>"]
    learner = Engine(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace()]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    learner.train_from_iterator(
        [PROSE, PROSE.replace("\n", " ")],
        trainers.BpeTrainer(vocab_size=500, special_tokens=control + bytes_, show_progress=False),
    )
    learner.model.unk_token = "<unk>"
    learner.model.byte_fallback = True
    learner.model.fuse_unk = True
    trained.model = learner.model
    trained.add_special_tokens(control)
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return trained


ENGINES = {
    "byte-bpe": lambda: train([PROSE], "byte-bpe", 420, num_sentinels=0).engine,
    "bpe": lambda: train([PROSE], "bpe", 380).engine,
    "wordpiece": lambda: train([PROSE], "wordpiece", 120, num_sentinels=0).engine,
    "unigram": lambda: train([PROSE], "unigram", 380).engine,
    "llama": llama_engine,
}


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train([PROSE], "byte-bpe", 420, num_sentinels=0)


def mirrored(tokenizer: Tokenizer, directory: Path):
    """Return the same tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    tokenizer.save(directory)
    return AutoTokenizer.from_pretrained(directory)


# --- firth's template --------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("algorithm", ["byte-bpe", "bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("open", [False, True])
def test_transformers_encodes_the_same_dialogue(tmp_path, algorithm, open):
    tokenizer = train([PROSE], algorithm, 420, num_sentinels=3)
    peer = mirrored(tokenizer, tmp_path)
    for messages in DIALOGUES:
        wanted = peer.apply_chat_template(messages, add_generation_prompt=open, return_dict=False)
        assert encode(tokenizer, messages, open)[0].tolist() == wanted


@pytest.mark.oracle
def test_transformers_derives_the_same_mask(own, tmp_path):
    """Templates without `generation` marks give an assistant mask of zeros, and training learns nothing."""
    peer = mirrored(own, tmp_path)
    for messages in DIALOGUES:
        theirs = peer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask = encode(own, messages)[1]
        assert mask.any() == any(message["role"] == "assistant" for message in messages)
        assert mask.astype(int).tolist() == list(theirs["assistant_masks"])


def test_the_mask_is_on_answers_and_their_stop_tokens(own):
    tokens, mask = encode(own, dialogue("hello", "there", "you?", "Yes!", system="cat"))
    supervised = "".join(own.token(i) for i in tokens[mask])
    assert supervised == "there<|im_end|>Yes!<|im_end|>"
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape
    opened, none = encode(own, dialogue("hello"), open=True)
    assert not none.any() and opened.tolist() == tokens_before_the_answer(own)


def tokens_before_the_answer(tokenizer: Tokenizer) -> list[int]:
    tokens, mask = encode(tokenizer, dialogue("hello", "there"))
    return tokens[: int(mask.argmax())].tolist()


def test_no_messages(own):
    for tokenizer in (own, Tokenizer(own.engine, template=SMOL)):
        tokens, mask = encode(tokenizer, [])
        assert tokens.shape == mask.shape == (0,) and tokens.dtype == np.int32 and mask.dtype == bool


HOSTILE = ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<mask>", "<pad>", "[/INST]", "{{", "}}", "{% raw %}", "a", " "]
HOSTILE += ["\n", "é", "\ud800", "\ue0000\ue001", "\ue000", "\0"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", *TEMPLATES])
@given(texts=st.lists(st.lists(st.sampled_from(HOSTILE), max_size=6).map("".join), min_size=1, max_size=4))
def test_user_text_never_becomes_a_control_token(own, kind, texts):
    """The dialogue has as many control tokens as one with plain words, in the same order."""
    tokenizer = own if kind == "own" else Tokenizer(Engine.from_str(own.definition), template=TEMPLATES[kind])

    def control(messages):
        tokens, mask = encode(tokenizer, messages)
        special = tokenizer.vocab.special[tokens]
        return tokens[special].tolist(), mask[special].tolist()

    assert control(dialogue(*texts)) == control(dialogue(*("a" for _ in texts)))


# --- templates of other models -----------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["byte-bpe", "llama"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("open", [False, True])
def test_a_foreign_template_gives_transformers_ids(tmp_path, kind, name, open):
    roles = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    tokenizer = Tokenizer(ENGINES[kind](), roles, TEMPLATES[name])
    peer = mirrored(tokenizer, tmp_path)
    for messages in DIALOGUES[:3]:
        wanted = peer.apply_chat_template(messages, add_generation_prompt=open, return_dict=False)
        tokens, mask = encode(Tokenizer.load(tmp_path), messages, open)
        assert tokenizer.decode(tokens) == tokenizer.decode(wanted)
        assert tokens.tolist() == wanted
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
        assert [tokenizer.decode(tokens[a:b]).strip() for a, b in runs] == answers
        assert {tokenizer.token(tokens[b - 1]) for _, b in runs} == {
            "<|im_end|>" if name in ("smol", "llama3") else "</s>"
        }


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ENGINES)
def test_the_prompt_is_a_prefix_of_the_dialogue(kind, name):
    """A model is prompted with exactly the tokens that precede an answer in training."""
    tokenizer = Tokenizer(ENGINES[kind](), {"bos": "<s>", "eos": "</s>"}, TEMPLATES[name])
    prompt, _ = encode(tokenizer, dialogue("hello", "there", "what is it?"), open=True)
    tokens, mask = encode(tokenizer, dialogue("hello", "there", "what is it?", "a cat"))
    answer = int(np.flatnonzero(np.diff(mask.astype(int)) == 1)[-1]) + 1  # where the last run of the mask begins
    if name == "llama2":  # the blank before an answer belongs to its first word
        assert tokens[: len(prompt)].tolist() == prompt.tolist() and answer in (len(prompt), len(prompt) + 1)
    else:
        assert tokens[:answer].tolist() == prompt.tolist()


def test_firths_template_read_from_a_file_is_the_same(own, tmp_path):
    own.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.template == TEMPLATE
    as_foreign = Tokenizer(Engine.from_str(own.definition), template=TEMPLATE + "{# strange #}")
    for messages in [*DIALOGUES, dialogue("a</s>", "<|im_end|>\n"), dialogue("\n x \n", " ")]:
        for open in (False, True):
            (tokens, mask), *others = (encode(t, messages, open) for t in (own, loaded, as_foreign))
            assert all(np.array_equal(tokens, t) and np.array_equal(mask, m) for t, m in others)


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "does not show the message 'hello' as it was"),
        ("{{ messages[-1].content }}</s>", "shows a message 0 times or out of order"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}</s>{% endfor %}", "shows a message 2 times"),
        ("{% for m in messages | reverse %}{{ m.content }}</s>{% endfor %}", "shows a message 0 times or out of order"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}{{ 'x' * messages[0].content | length }}",
         "writes text that depends on the contents"),
        ("{{ messages[0].content | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}", "does not show"),
        ("{{ raise_exception('no system role') }}", "cannot write this dialogue: no system role"),
        ("{{ 1 / 0 }}", "has a fault: ZeroDivisionError"),
        ("{{ messages.nothing.at_all }}", "cannot write this dialogue: "),
        ("{% for %}", "cannot write this dialogue: "),
        ("{{ ''.__class__.__mro__ }}", "cannot write this dialogue: "),
        ("{% for m in messages %}Q: {{ m.content }}\n{% endfor %}", "writes no stop token after the answer"),
    ],
)  # fmt: skip
def test_an_unusable_template_is_rejected_in_one_line(own, template, wrong):
    strange = Tokenizer(Engine.from_str(own.definition), template=template)
    with pytest.raises(UserError, match="the tokenizer's chat template .*" + wrong) as error:
        encode(strange, dialogue("hello", "there"))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_turns_is_rejected():
    plain = Engine(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match=r"this tokenizer cannot encode a dialogue: .*firth tokenizer train"):
        encode(Tokenizer(plain), dialogue("a", "a"))
    assert chat.stops(Tokenizer(plain)) == []


def test_stops(own):
    assert [own.token(i) for i in chat.stops(own)] == ["</s>", "<|im_end|>"]
    llama = Tokenizer(Engine.from_str(own.definition), {"eos": "<pad>"}, LLAMA3.replace("<|im_end|>", "<mask>"))
    assert [own.token(i) for i in chat.stops(llama)] == ["<pad>", "<mask>"]


def test_pieces_of_a_template_with_a_system_prompt():
    pieces, shown = split_template(SMOL, dialogue(" hello ", "there"), {}, open=True)
    assert pieces[0].startswith("<|im_start|>system\nYou are") and pieces[0].endswith("<|im_start|>user\n")
    assert pieces[1:] == ["<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant\n"]
    assert shown == [" hello ", "there"]
