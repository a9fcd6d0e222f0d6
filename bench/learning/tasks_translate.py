"""The task `translate` of `bench.learning.tasks`: English to Spanish with an encoder-decoder.

The model starts from random weights or from our own span corruption of English text; the peer is transformers' T5 of the
same size from random weights.

    pretrained(Path("runs/learn_tasks"), train, quick=False)     # directory of our pretrained model, trained once
    score_run(run, test, finished)                               # {"chrf", "bleu", "loss", "items"}
    train_and_score(lesson, tokenizer_dir, out)                  # the same of the peer, with "seconds" and "tokens"

All arms have the same tokenizer (4,096 pieces, trained on the training sentences of both languages) and the same model
config: T5 1.1 with two blocks on each side and an untied head that starts at zero; other weights have each library's own
initialization. Answers are greedy, of at most LENGTH tokens; BLEU and chrF are those of sacrebleu through `firth.evaluate`;
loss is in nats per target token. Span corruption reads the Brown corpus and none of these sentences, because BIG-Bench asks
to keep its texts out of pretraining.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from bench.learning.tasks_peers import Lesson, Row, Rows, trained
from firth.data.dialogues import Seq2SeqConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.task import load_evaluated_model
from firth.evaluate.tasks import generation
from firth.model.config import ModelConfig, encoder_decoder_config
from firth.model.flops import num_parameters
from firth.pretrained.families import t5
from firth.runs.config_io import to_dict
from firth.runs.prepare import train_tokenizer
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example

LANGUAGES = ("en", "es")
LENGTH, HIDDEN_SIZE, VOCAB_SIZE = 64, 192, 4096
MAX_CHARACTERS = 160
"""Pairs with a longer sentence are left out, so that none is truncated."""
GENERATION_BATCH = 50


def short(row: Row) -> bool:
    """Return whether both sentences of a pair are short enough."""
    return all(len(row[language]) <= MAX_CHARACTERS for language in LANGUAGES)


def model_config(vocab: int) -> ModelConfig:
    """Return the model config of both sides."""
    return encoder_decoder_config(vocab, HIDDEN_SIZE, 2, max_positions=2 * LENGTH)


def pretrained(results: Path, train: Path, quick: bool) -> Path:
    """Return the directory of our encoder-decoder after span corruption of the Brown corpus, trained once."""
    tokenizer_dir = train.with_name("tokenizer")
    if not (tokenizer_dir / "tokenizer.json").exists():
        rows = [json.loads(line) for line in train.open(encoding="utf-8")]
        train_tokenizer(
            [str(train)],
            tokenizer_dir,
            algorithm="unigram",
            vocab_size=VOCAB_SIZE,
            texts=lambda _: (row[language] for row in rows for language in LANGUAGES),
            num_sentinels=100,
            log=lambda _: None,
        )
    steps = 4 if quick else 600
    settings = [
        "data.corpus=brown", f"tokenizer.path={tokenizer_dir}", f"model={json.dumps(to_dict(model_config(VOCAB_SIZE)))}",
        f"examples.max_length={LENGTH}", "batch.size=64", f"max_steps={steps}", "evaluation.every=0", f"checkpoint.every={steps}",
        "sample_prompts=[]",
    ]  # fmt: skip
    return run(load("t5", settings), results / "own-translate", lambda _: None).model


def score_run(directory: Path, test: Path, done: RunResult) -> Row:
    """Return the scores of a run of firth."""
    evaluated = load_evaluated_model(directory)
    items = generation.load(evaluated, [str(test)])
    references, answers = generation.respond(evaluated, items, lambda _: None, LENGTH)
    return scored(references, answers) | {"loss": done.metrics["valid/loss"], "items": len(references)}


def scored(references: Sequence[str], answers: Sequence[str]) -> Row:
    """Return BLEU and chrF of answers."""
    return {
        "chrf": metrics.chrf(references, answers),
        "bleu": metrics.bleu(*metrics.bleu_counts(references, answers)),
    }


def train_and_score(lesson: Lesson, tokenizer_dir: str, out: str) -> Row:
    """Train transformers' T5 from random weights with its Trainer on the same pairs; return its scores."""
    tokenizer = Tokenizer.load(tokenizer_dir)
    vocab = tokenizer.vocab
    train_pairs, test_pairs = (pairs(path, tokenizer, lesson) for path in (lesson.train, lesson.test))
    config = {key: value for key, value in t5.to_hf_config(model_config(vocab.size)).items() if key != "firth_tied"}
    special = {"pad_token_id": vocab.pad, "eos_token_id": vocab.eos, "decoder_start_token_id": vocab.start}
    transformers.set_seed(lesson.seed)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config | special))
    # transformers 5 ties the embeddings of a new T5 1.1; this head is untied and starts at zero, as in firth.
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert sum(p.numel() for p in model.parameters()) == num_parameters(model_config(vocab.size))
    padding = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.engine, pad_token=tokenizer.token(vocab.pad), eos_token=tokenizer.token(vocab.eos)
    )
    collator = transformers.DataCollatorForSeq2Seq(padding, model=model)
    _, stats = trained(model, train_pairs, collator, lesson, out, count_targets=True)
    references = [tokenizer.decode(test_pairs[i]["labels"]) for i in range(len(test_pairs))]
    answers, nats, tokens = [], 0.0, 0
    model.eval()
    for first in range(0, len(test_pairs), GENERATION_BATCH):
        batch = collator([test_pairs[i] for i in range(first, min(first + GENERATION_BATCH, len(test_pairs)))])
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            found = model(**source, labels=batch["labels"])
            generated = model.generate(**source, max_new_tokens=LENGTH, do_sample=False, num_beams=1)
        count = int((batch["labels"] != IGNORE).sum())
        nats, tokens = nats + float(found.loss) * count, tokens + count
        answers += [tokenizer.decode(until(row, vocab.eos)).strip() for row in generated[:, 1:].tolist()]
    return scored(references, answers) | {"loss": nats / tokens} | stats | {"tested": len(test_pairs)}


def pairs(path: Path, tokenizer: Tokenizer, lesson: Lesson) -> Rows:
    """Return the training or test pairs as both sides read them."""
    config = lesson.examples
    found = Records(
        Seq2SeqConfig(
            max_length=config.max_length,
            max_target_length=config.max_target_length,
            prompt_template=config.prompt_template,
            completion_template=config.completion_template,
        ),
        [str(path)],
        tokenizer,
    )
    return Rows(found, pair)


def pair(example: Example) -> Row:
    """Return the row of a sentence and its translation, both with the stop token."""
    source, target = example["source"].tolist(), example["target"].tolist()
    return {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}


def until(tokens: list[int], stop: int) -> list[int]:
    """Return the tokens before the first stop token.

    >>> until([5, 6, 1, 0, 0], 1)
    [5, 6]
    """
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
