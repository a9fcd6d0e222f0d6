"""`evaluate` on directories, against transformers on the same text and scikit-learn on the same predictions."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from firth.data.collate import collate
from firth.evaluate.evaluate import evaluate
from firth.evaluate.perplexity import leading_bos
from firth.evaluate.task import load_evaluated_model, most_likely
from firth.evaluate.tasks.likelihood import MASKED_LIMIT
from firth.evaluate.tasks.option_scoring import encode
from firth.model.config import decoder_config, encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.reward_model import reward_head
from firth.pretrained.load_save import save_model
from firth.runs.inference import evaluate_run
from firth.tokenizer.train import train
from firth.training.step import step
from firth.types import IGNORE, UserError
from tests.support.models import perturbed_model

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")

TEXT = "the king is dead, long live the queen; the fool speaks and nobody listens to the fool. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train([TEXT * 3], "byte-bpe", 330, num_sentinels=4)


def saved(directory, tokenizer, make, metadata=None, heads=("lm",)):
    """Write a run directory with a model of random weights; return the model."""
    config = make(tokenizer.vocab.size, 64, 1, max_positions=32)
    if heads == ("lm",):
        model = perturbed_model(config)
    else:
        torch.manual_seed(0)
        model = LM(config, {"classes": torch.nn.Linear(64, 3)} if "classes" in heads else {"reward": reward_head(64)})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    save_model(model, tokenizer, directory / "model", metadata)
    return model


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(path)]


def test_causal_perplexity_equals_transformers(tmp_path, tokenizer):
    """A run of firth has [bos] before a document, so the first token is scored too."""
    saved(tmp_path, tokenizer, decoder_config)
    text = "the fool speaks and the queen listens"
    (tmp_path / "a.txt").write_text(text)
    found = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[their_tokenizer.bos_token_id, *their_tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        mean = float(theirs(input_ids=ids, labels=ids).loss)
    assert (found["task"], found["mode"], found["bos"]) == ("likelihood", "causal", True)
    assert (found["tokens"], found["bytes"]) == (ids.shape[1] - 1, len(text))
    assert (found["documents"], found["share"]) == (1, 1.0)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(mean * found["tokens"] / math.log(2) / len(text), rel=1e-5)


def test_first_token_is_not_scored_without_bos(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    (tmp_path / "model" / "firth.json").unlink()
    tokenizer.save(tmp_path / "model")  # one without a post-processor
    (tmp_path / "a.txt").write_text("the fool speaks")
    found = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    ids = torch.tensor([tokenizer.encode("the fool speaks").tolist()])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        mean = float(theirs(input_ids=ids, labels=ids).loss)
    assert (found["bos"], found["tokens"]) == (False, ids.shape[1] - 1)
    assert found["bytes"] == len("the fool speaks") - len(tokenizer.decode(ids[0, :1].tolist()))
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_where_bos_is_added(tmp_path, tokenizer):
    """By tokenizer.json itself (Llama), as tokenizer_config.json sets, or before each document in runs of firth."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.vocab.bos
    tokenizer.save(tmp_path)
    assert leading_bos(tmp_path, tokenizer) == (None, False)
    (tmp_path / "firth.json").write_text("{}")
    assert leading_bos(tmp_path, tokenizer) == (bos, False)
    framing = train([TEXT], "byte-bpe", 330, num_sentinels=0)
    framing.engine.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert leading_bos(tmp_path, framing) == (bos, True)
    config = tmp_path / "tokenizer_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"add_bos_token": False}))
    assert leading_bos(tmp_path, framing) == (None, False)
    config.write_text(json.dumps(plain | {"add_bos_token": True}))
    assert leading_bos(tmp_path, tokenizer) == (bos, True)


def test_rows_have_the_length_of_training(tmp_path, tokenizer):
    """A model with 32 positions that was trained on 8 is evaluated on 8."""
    saved(tmp_path, tokenizer, decoder_config)
    (tmp_path / "a.txt").write_text(TEXT)
    whole = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    (tmp_path / "recipe.yaml").write_text("objective: causal_lm\nexamples: {kind: windows, max_length: 8}\n")
    short = evaluate(tmp_path, [str(tmp_path / "a.txt")])
    assert (whole["context"], short["context"]) == (32, 8)
    assert short["tokens"] == whole["tokens"]
    assert short["nll"] != pytest.approx(whole["nll"], rel=1e-4)


def test_masked_and_encoder_decoder_runs(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    tokens = len(tokenizer.encode(TEXT))
    saved(tmp_path / "e", tokenizer, encoder_config)
    masked = evaluate(tmp_path / "e", [str(tmp_path / "a.txt")])
    assert (masked["mode"], masked["tokens"], masked["bytes"]) == ("masked", tokens, len(TEXT))
    saved(tmp_path / "t", tokenizer, encoder_decoder_config)
    second = evaluate(tmp_path / "t", [str(tmp_path / "a.txt")])
    assert second["mode"] == "halves"
    assert tokens / 2 <= second["tokens"] <= tokens / 2 + 5
    few = evaluate(tmp_path / "e", [str(tmp_path / "a.txt")], limit=60)
    assert 30 <= few["tokens"] <= 60 and few["limit"] == 60
    assert few["share"] == few["tokens"] / tokens
    assert tokens < MASKED_LIMIT


@pytest.mark.parametrize("make", [decoder_config, encoder_config, encoder_decoder_config])
def test_a_limit_bounds_the_tokens_scored(make, tmp_path, tokenizer):
    """Also where all of the text is one document."""
    (tmp_path / "a.txt").write_text(TEXT * 4)
    saved(tmp_path / "model", tokenizer, make)
    whole = evaluate(tmp_path / "model", [str(tmp_path / "a.txt")])
    found = evaluate(tmp_path / "model", [str(tmp_path / "a.txt")], limit=5)
    assert (found["tokens"], found["limit"]) == (5, 5)
    assert whole["tokens"] > 100 and "limit" not in whole


def test_enough_text_has_an_interval(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    rows = [{"text": f"{TEXT} {i} {TEXT[i:]}"} for i in range(200)]
    progress = []
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows), progress=progress.append)
    low, high = found["bits_per_byte_interval"]
    assert low < found["bits_per_byte"] < high < 1.1 * low
    assert found["documents"] == 200
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_classification_agrees_with_scikit_learn(tmp_path, tokenizer):
    names = ("verse", "prose", "song")
    model = saved(tmp_path, tokenizer, encoder_config, {"classes": names}, heads=("classes",))
    rng = np.random.default_rng(0)
    words = TEXT.split()
    texts = [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(40)]
    gold = rng.choice(names, 40).tolist()
    rows = [{"text": t, "label": g} for t, g in zip(texts, gold, strict=True)]
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))

    theirs = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    answered = []
    for text in texts:
        ids = torch.tensor([tokenizer.vocab.add_special_tokens(tokenizer.encode(text)[:30]).tolist()])
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
    assert found["majority_accuracy"] == max(gold.count(n) for n in names) / 40


def test_classification_equals_training_accuracy(tmp_path, tokenizer):
    """The evaluated accuracy of a trained head is the one that its last step logged."""
    objective = Classification(class_names=("fool", "queen"))
    config = encoder_config(tokenizer.vocab.size, 64, 1, max_positions=32)
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    rng = np.random.default_rng(0)
    words = ["the", "king", "is", "dead", "long", "live"]
    texts = [" ".join([*rng.choice(words, 6), ("the fool", "the queen")[i % 2]]) for i in range(32)]
    examples = [
        {"tokens": tokenizer.vocab.add_special_tokens(tokenizer.encode(t)), "label": i % 2} for i, t in enumerate(texts)
    ]
    batch = collate([objective.build_example(e, tokenizer.vocab, rng) for e in examples], {"class"})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        logged = step(model, objective, [batch])
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("objective:\n  kind: classification\n  class_names: [fool, queen]\n")
    rows = [{"text": t, "label": objective.class_names[i % 2]} for i, t in enumerate(texts)]
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))
    assert found["accuracy"] == 1.0 == float(logged["accuracy"])


def test_preferences_follow_the_higher_reward(tmp_path, tokenizer):
    model = saved(tmp_path, tokenizer, decoder_config, heads=("reward",))
    rows = [
        {"prompt": "the king", "chosen": f"is dead {i}", "rejected": f"long live the queen {i}"} for i in range(12)
    ] + [{"prompt": [{"role": "user", "content": "hail"}], "chosen": "the fool", "rejected": "speaks"}]
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = evaluate(tmp_path, written(tmp_path / "b.jsonl", swapped))
    assert (found["task"], found["items"]) == ("preferences", 13)
    assert found["accuracy"] + other["accuracy"] == pytest.approx(1.0)
    assert "majority_label" not in found
    torch.nn.init.zeros_(model.heads["reward"].weight)
    save_model(model, tokenizer, tmp_path / "model")
    ties = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))
    assert ties["accuracy"] == 0.0
    assert ties["calibration_error"] == 0.5  # a probability of one half, and never correct


def test_options_are_scored_by_log_likelihood(tmp_path, tokenizer):
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
    found = evaluate(tmp_path, written(tmp_path / "a.jsonl", rows), task="option_scoring")
    assert found["accuracy"] == sum(right) / 8
    named = [row | {"answer": options[row["answer"]]} for row in rows]
    assert evaluate(tmp_path, written(tmp_path / "b.jsonl", named), task="option_scoring") == found


def test_options_are_tokenized_as_in_running_text(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, decoder_config)
    evaluated = load_evaluated_model(tmp_path)
    for prompt, option in (("the king", "is"), ("the king ", "is"), ("the king", " is"), ("the king  ", "is")):
        before, after = encode(evaluated, prompt, option)
        assert tokenizer.decode(before) == "the king"
        assert tokenizer.decode(after) in (" is", "  is")
    # Where prompt and option would merge, or the prompt is empty, the option still has tokens of its own, and a blank at
    # the end of the prompt changes nothing.
    for prompt, option in (
        ("Ans", "wer"),
        ("hello wor", "ld"),
        ("Q:\n", "is"),
        ("", "is"),
        ("counts:", "C"),
        ("king", "."),
    ):
        before, after = encode(evaluated, prompt, option)
        assert len(after)
        blank, again = encode(evaluated, prompt + " " * (prompt[-1:] not in ("", "\n")), option)
        assert (before.tolist(), after.tolist()) == (blank.tolist(), again.tolist())


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "a", "label": "ode"}], r"a\.jsonl:1: the label ode is none of the classes \(verse, prose, song\)"),
    ([{"text": "a"}], r"a\.jsonl:1: there is no field 'label' for the label; it has text"),
    ([{"words": "a", "label": "verse"}], r"a\.jsonl:1: .*no field 'text'"),
])  # fmt: skip
def test_invalid_records_are_named(tmp_path, tokenizer, rows, message):
    saved(tmp_path, tokenizer, encoder_config, {"classes": ["verse", "prose", "song"]}, heads=("classes",))
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, written(tmp_path / "a.jsonl", rows))


def test_unsupported_tasks_are_refused(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, encoder_config)
    file = written(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}])
    refused = {
        "classification": "no head for classes",
        "preferences": "no reward head",
        "option_scoring": "generates no text",
        "x": "no task 'x'; the tasks are likelihood, classification",
    }
    for task, message in refused.items():
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path, file, task=task)


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "a", "options": ["b"], "answer": 0}, "two or more"),
    ({"prompt": "a", "options": ["b", "c"], "answer": 2}, "neither one of the options"),
    ({"prompt": "a", "options": ["b", "c"], "answer": "d"}, "neither one of the options"),
    ({"options": ["b", "c"], "answer": 0}, "no field 'prompt'"),
])  # fmt: skip
def test_invalid_questions_are_named(tmp_path, tokenizer, row, message):
    saved(tmp_path, tokenizer, decoder_config)
    with pytest.raises(UserError, match=rf"d\.jsonl:1: .*{message}"):
        evaluate(tmp_path, written(tmp_path / "d.jsonl", [row]), task="option_scoring")


def test_a_tie_counts_as_wrong():
    assert most_likely(["a", "b", "c"], [1.0, 2.0, 2.0]) == ""
    assert most_likely(["a", "b", "c"], [1.0, 2.0, 1.0]) == "b"


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("classes", {"text": "a fine film", "label": "b"}),
        ("reward", {"prompt": "a fine", "chosen": "film", "rejected": "fish"}),
    ],
)
def test_a_limit_bounds_the_records_of_a_task(head, row, tmp_path, tokenizer):
    metadata = {"classes": ["a", "b", "c"]} if head == "classes" else None
    saved(tmp_path / "run", tokenizer, encoder_config if head == "classes" else decoder_config, metadata, heads=(head,))
    files = written(tmp_path / "a.jsonl", [row] * 40)
    assert evaluate(tmp_path / "run", files)["items"] == 40
    found = evaluate(tmp_path / "run", files, limit=5)
    assert (found["items"], found["limit"]) == (5, 5)


def test_a_limit_without_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--limit 5 applies to files.*: name files, or leave out --limit"):
        evaluate_run(tmp_path, [], task=None, limit=5, as_json=False)
