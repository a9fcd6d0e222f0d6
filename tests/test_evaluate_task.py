"""`evaluate` on directories: against transformers reading the same, and scikit-learn counting the same answers."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from test_model_families import built

from firth.data.collate import collate
from firth.evaluate.evaluate import evaluate
from firth.evaluate.task import load_evaluated_model, most_likely
from firth.evaluate.tasks.option_scoring import cut
from firth.evaluate.text_perplexity import MASKED_LIMIT, leading
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.reward_model import reward_head
from firth.pretrained.load_save import save_model
from firth.runs.inference import evaluate_run
from firth.tokenizer.train import train
from firth.train.step import step
from firth.types import IGNORE, UserError

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")

TEXT = "the king is dead, long live the queen; the fool speaks and nobody listens to the fool. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train([TEXT * 3], "byte-bpe", 330, num_sentinels=4)


def saved(directory, tokenizer, make, facts=None, parts=("lm",)):
    """A run directory with a model of random weights."""
    shape = make(tokenizer.vocab.size, 64, 1, context=32)
    if parts == ("lm",):
        model = built(shape)
    else:
        torch.manual_seed(0)
        model = LM(shape, {"classes": torch.nn.Linear(64, 3)} if "classes" in parts else {"reward": reward_head(64)})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    save_model(model, tokenizer, directory / "model", facts)
    return model


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(path)]


def test_causal_perplexity_is_theirs(tmp_path, tokenizer):
    """A run of ours: [bos] stands where a document begins, so its first token is asked too."""
    saved(tmp_path, tokenizer, decoder_config)
    text = "the fool speaks and the queen listens"
    (tmp_path / "a.txt").write_text(text)
    found = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[their_tokenizer.bos_token_id, *their_tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        mean = float(theirs(input_ids=ids, labels=ids).loss)
    assert (found["task"], found["reads"], found["bos"]) == ("likelihood", "causal", True)
    assert (found["tokens"], found["bytes"]) == (ids.shape[1] - 1, len(text))
    assert (found["documents"], found["share"]) == (1, 1.0)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(mean * found["tokens"] / math.log(2) / len(text), rel=1e-5)


def test_a_foreign_model_without_bos_is_not_asked_the_first_token(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    (tmp_path / "model" / "firth.json").unlink()
    tokenizer.save(tmp_path / "model")  # one that frames nothing
    (tmp_path / "a.txt").write_text("the fool speaks")
    found = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    ids = torch.tensor([tokenizer.encode("the fool speaks").tolist()])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        mean = float(theirs(input_ids=ids, labels=ids).loss)
    assert (found["bos"], found["tokens"]) == (False, ids.shape[1] - 1)
    assert found["bytes"] == len("the fool speaks") - len(tokenizer.decode(ids[0, :1].tolist()))
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_who_reads_bos_and_where(tmp_path, tokenizer):
    """Llama's tokenizer.json puts <s> in front by itself; a configuration may demand or forbid it; ours is silent."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.vocab.bos
    tokenizer.save(tmp_path)
    assert leading(tmp_path, tokenizer) == (None, False)
    (tmp_path / "firth.json").write_text("{}")
    assert leading(tmp_path, tokenizer) == (bos, False)
    framing = train([TEXT], "byte-bpe", 330, num_sentinels=0)
    framing.engine.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert leading(tmp_path, framing) == (bos, True)
    config = tmp_path / "tokenizer_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"add_bos_token": False}))
    assert leading(tmp_path, framing) == (None, False)
    config.write_text(json.dumps(plain | {"add_bos_token": True}))
    assert leading(tmp_path, tokenizer) == (bos, True)


def test_rows_are_as_long_as_training_read_them(tmp_path, tokenizer):
    """A shape may be meant for 32 where training read 8: beyond that a model has never been."""
    saved(tmp_path, tokenizer, decoder_config)
    (tmp_path / "a.txt").write_text(TEXT)
    whole = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    (tmp_path / "recipe.yaml").write_text("objective: causal_lm\nsegment: {kind: windows, length: 8}\n")
    short = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    assert (whole["context"], short["context"]) == (32, 8)
    assert short["tokens"] == whole["tokens"]
    assert short["nll"] != pytest.approx(whole["nll"], rel=1e-4)


def test_masked_and_encoder_decoder_runs(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    tokens = len(tokenizer.encode(TEXT))
    saved(tmp_path / "e", tokenizer, encoder_config)
    masked = evaluate(tmp_path / "e", [str(tmp_path / "a.txt")])
    assert (masked["reads"], masked["tokens"], masked["bytes"]) == ("masked", tokens, len(TEXT))
    saved(tmp_path / "t", tokenizer, encoder_decoder_config)
    second = evaluate(tmp_path / "t", [str(tmp_path / "a.txt")])
    assert second["reads"] == "halves"
    assert tokens / 2 <= second["tokens"] <= tokens / 2 + 5
    few = evaluate(tmp_path / "e", [str(tmp_path / "a.txt")], limit=60)
    assert 30 <= few["tokens"] <= 60 and few["limit"] == 60
    assert few["share"] == few["tokens"] / tokens
    assert tokens < MASKED_LIMIT


@pytest.mark.parametrize("shape", [decoder_config, encoder_config, encoder_decoder_config])
def test_a_limit_bounds_the_tokens_scored(shape, tmp_path, tokenizer):
    """Also where all of the text is one document."""
    (tmp_path / "a.txt").write_text(TEXT * 4)
    saved(tmp_path / "model", tokenizer, shape)
    whole = evaluate(tmp_path / "model", [str(tmp_path / "a.txt")])
    found = evaluate(tmp_path / "model", [str(tmp_path / "a.txt")], limit=5)
    assert (found["tokens"], found["limit"]) == (5, 5)
    assert whole["tokens"] > 100 and "limit" not in whole


def test_enough_text_has_an_interval_around_its_score(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    rows = [{"text": f"{TEXT} {i} {TEXT[i:]}"} for i in range(200)]
    told = []
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows), progress=told.append)
    low, high = found["bits_per_byte_interval"]
    assert low < found["bits_per_byte"] < high < 1.1 * low
    assert found["documents"] == 200
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_classification_agrees_with_transformers_and_scikit_learn(tmp_path, tokenizer):
    names = ("verse", "prose", "song")
    model = saved(tmp_path, tokenizer, encoder_config, {"classes": names}, parts=("classes",))
    rng = np.random.default_rng(0)
    words = TEXT.split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(40)]
    gold = rng.choice(names, 40).tolist()
    rows = [{"text": t, "label": g} for t, g in zip(texts, gold, strict=True)]
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))

    theirs = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    answered = []
    for text in texts:
        ids = torch.tensor([tokenizer.vocab.frame(tokenizer.encode(text)[:30]).tolist()])
        with torch.no_grad():
            state = theirs(input_ids=ids).last_hidden_state[0, 0]
            answered.append(names[int(model.heads["classes"](state).argmax())])
    assert len(set(answered)) > 1
    assert found["task"] == "classification"
    assert found["items"] == 40
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, answered))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, answered, average="macro"))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(gold, answered))
    assert found["accuracy_interval"][0] <= found["accuracy"] <= found["accuracy_interval"][1]
    assert found["commonest_accuracy"] == max(gold.count(n) for n in names) / 40


def test_classification_is_what_training_measures(tmp_path, tokenizer):
    """A head trained by the one step until it knows the difference; its logged accuracy is the evaluated one."""
    objective = Classification(class_names=("fool", "queen"))
    config = encoder_config(tokenizer.vocab.size, 64, 1, max_positions=32)
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    rng = np.random.default_rng(0)
    words = ["the", "king", "is", "dead", "long", "live"]
    texts = [" ".join([*rng.choice(words, 6), ("the fool", "the queen")[i % 2]]) for i in range(32)]
    examples = [{"tokens": tokenizer.vocab.frame(tokenizer.encode(t)), "label": i % 2} for i, t in enumerate(texts)]
    batch = collate([objective.build_example(e, tokenizer.vocab, rng) for e in examples], {"class"})
    moves = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        logged = step(model, objective, [batch])
        moves.step()
        moves.zero_grad()
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("objective:\n  kind: classification\n  classes: [fool, queen]\n")
    rows = [{"text": t, "label": objective.class_names[i % 2]} for i, t in enumerate(texts)]
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))
    assert found["accuracy"] == 1.0 == float(logged["accuracy"])


def test_comparisons_prefer_the_higher_reward(tmp_path, tokenizer):
    model = saved(tmp_path, tokenizer, decoder_config, parts=("reward",))
    rows = [
        {"prompt": "the king", "chosen": f"is dead {i}", "rejected": f"long live the queen {i}"} for i in range(12)
    ] + [{"prompt": [{"role": "user", "content": "hail"}], "chosen": "the fool", "rejected": "speaks"}]
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = evaluate(tmp_path, written(tmp_path / "b.jsonl", turned))
    assert (found["task"], found["items"]) == ("comparisons", 13)
    assert found["accuracy"] + other["accuracy"] == pytest.approx(1.0)
    assert "commonest" not in found
    torch.nn.init.zeros_(model.heads["reward"].weight)
    save_model(model, tokenizer, tmp_path / "model")
    assert evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))["accuracy"] == 0.0


def test_choices_are_by_their_log_likelihood(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    options = ["queen", "fool speaks", "dead", "king, long live the king"]
    rows = [
        {"prompt": f"{start} the ", "options": options, "answer": i % 4} for i, start in enumerate(TEXT.split()[:8])
    ]

    def log_likelihood(prompt, option):
        before = 1 + len(tokenizer.encode(prompt.rstrip()))
        whole = torch.tensor([tokenizer.vocab.bos, *tokenizer.encode(prompt + option)])
        labels = whole.clone()
        labels[:before] = IGNORE
        with torch.no_grad():
            return -float(theirs(input_ids=whole[None], labels=labels[None]).loss) * (len(whole) - before)

    right = [
        max(range(4), key=lambda k, r=row: log_likelihood(r["prompt"], options[k])) == row["answer"] for row in rows
    ]
    assert 0 < sum(right) < 8
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows), task="choices")
    assert found["accuracy"] == sum(right) / 8
    named = [row | {"answer": options[row["answer"]]} for row in rows]
    assert evaluate(tmp_path, written(tmp_path / "b.jsonl", named), task="choices") == found


def test_an_option_begins_as_it_would_in_running_text(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    evaluated = load_evaluated_model(tmp_path)
    for prompt, option in (("the king", "is"), ("the king ", "is"), ("the king", " is"), ("the king  ", "is")):
        before, after = cut(evaluated, prompt, option)
        assert tokenizer.decode(before) == "the king"
        assert tokenizer.decode(after) in (" is", "  is")
    # Where prompt and option would merge, or the prompt is empty, the option still has tokens of its own, and a blank at
    # the prompt's end changes nothing.
    for prompt, option in (
        ("Ans", "wer"),
        ("hello wor", "ld"),
        ("Q:\n", "is"),
        ("", "is"),
        ("counts:", "C"),
        ("king", "."),
    ):
        before, after = cut(evaluated, prompt, option)
        assert len(after)
        blank, again = cut(evaluated, prompt + " " * (prompt[-1:] not in ("", "\n")), option)
        assert (before.tolist(), after.tolist()) == (blank.tolist(), again.tolist())


@pytest.mark.parametrize(("rows", "said"), [
    ([{"text": "a", "label": "ode"}], r"a\.jsonl:1: the label ode is none of the classes \(verse, prose, song\)"),
    ([{"text": "a"}], r"a\.jsonl:1: there is no field 'label' for the label; it has text"),
    ([{"words": "a", "label": "verse"}], r"a\.jsonl:1: .*no field 'text'"),
])  # fmt: skip
def test_a_record_that_does_not_fit_is_named(tmp_path, tokenizer, rows, said):
    saved(tmp_path, tokenizer, encoder_config, {"classes": ["verse", "prose", "song"]}, parts=("classes",))
    with pytest.raises(UserError, match=said):
        evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))


def test_what_a_model_cannot_do_is_said_in_words(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, encoder_config)
    file = written(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}])
    refused = {
        "classification": "no head for classes",
        "comparisons": "no reward head",
        "choices": "writes no text",
        "x": "no task 'x'; there is likelihood, classification",
    }
    for task, said in refused.items():
        with pytest.raises(UserError, match=said):
            evaluate(tmp_path, file, task=task)


@pytest.mark.parametrize(("row", "said"), [
    ({"prompt": "a", "options": ["b"], "answer": 0}, "two or more"),
    ({"prompt": "a", "options": ["b", "c"], "answer": 2}, "neither one of the options"),
    ({"prompt": "a", "options": ["b", "c"], "answer": "d"}, "neither one of the options"),
    ({"options": ["b", "c"], "answer": 0}, "no field 'prompt'"),
])  # fmt: skip
def test_a_question_that_is_none_is_named(tmp_path, tokenizer, row, said):
    saved(tmp_path, tokenizer, decoder_config)
    with pytest.raises(UserError, match=rf"d\.jsonl:1: .*{said}"):
        evaluate(tmp_path, written(tmp_path / "d.jsonl", [row]), task="choices")


def test_a_tie_is_no_answer():
    assert most_likely(["a", "b", "c"], [1.0, 2.0, 2.0]) == ""
    assert most_likely(["a", "b", "c"], [1.0, 2.0, 1.0]) == "b"


@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("classes", {"text": "a fine film", "label": "b"}),
        ("reward", {"prompt": "a fine", "chosen": "film", "rejected": "fish"}),
    ],
)
def test_a_limit_bounds_the_records_of_a_task(part, row, tmp_path, tokenizer):
    facts = {"classes": ["a", "b", "c"]} if part == "classes" else None
    saved(tmp_path / "run", tokenizer, encoder_config if part == "classes" else decoder_config, facts, parts=(part,))
    files = written(tmp_path / "a.jsonl", [row] * 40)
    assert evaluate(tmp_path / "run", files)["items"] == 40
    found = evaluate(tmp_path / "run", files, limit=5)
    assert (found["items"], found["limit"]) == (5, 5)


def test_a_limit_without_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--limit 5 applies to files.*: name files, or leave out --limit"):
        evaluate_run(tmp_path, [], task=None, limit=5, as_json=False)
