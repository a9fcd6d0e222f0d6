"""The task `translate` of `bench.learn_tasks`: English to Spanish, by an encoder-decoder from nothing, from our own span
corruption of English text, and by transformers' T5 of the same shape from nothing.

    pretrained(Path("runs/learn_tasks"), train, quick=False)     where our own model is, made once
    measured(run, test, finished)                                {"chrf", "bleu", "loss", "items"}: a number each
    taught(lesson, coder, out)                                   the peer's, with "seconds" and "tokens"

All arms have one tokenizer (4,096 pieces of the sentences to learn from, of both languages) and one shape: T5 1.1's with two
blocks on each side and a head of its own that begins at zero, else what each makes of a model from nothing. Answers are
greedy, of at most LENGTH tokens; BLEU and chrF are sacrebleu's through `firth.evaluate`; loss is nats per target token. Span
corruption reads the Brown corpus and none of these sentences, for BIG-Bench asks that its texts be kept out of pretraining.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from bench.tasks_peers import Lesson, Row, Rows, trained
from firth.data.records import Seq2SeqRecords
from firth.evaluate import overlap_metrics
from firth.evaluate.task import load_evaluated_model
from firth.evaluate.tasks import generation
from firth.model.config import ModelConfig, encoder_decoder_config
from firth.pretrained.families import t5
from firth.runs.config_io import to_dict
from firth.runs.prepare import train_tokenizer
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example

LANGUAGES = ("en", "es")
LENGTH, WIDTH, VOCAB = 64, 192, 4096
LETTERS = 160
"""Pairs of which one is longer are left out, so that none is cut."""
AT_ONCE = 50


def short(row: Row) -> bool:
    """Whether a pair can be learnt from and asked whole."""
    return all(len(row[language]) <= LETTERS for language in LANGUAGES)


def shape(vocab: int) -> ModelConfig:
    """Both sides' shape."""
    return encoder_decoder_config(vocab, WIDTH, 2, max_positions=2 * LENGTH)


def pretrained(results: Path, train: Path, quick: bool) -> Path:
    """Our own encoder-decoder after span corruption of the Brown corpus, in the pieces of the sentences to learn from."""
    coder = train.with_name("tokenizer")
    if not (coder / "tokenizer.json").exists():
        rows = [json.loads(line) for line in train.open(encoding="utf-8")]
        texts = (row[language] for row in rows for language in LANGUAGES)
        train_tokenizer(
            [str(train)],
            coder,
            algorithm="unigram",
            vocab_size=VOCAB,
            texts=texts,
            num_sentinels=100,
            log=lambda _: None,
        )
    steps = 4 if quick else 600
    settings = [
        "data.corpus=brown", f"tokenizer.path={coder}", f"model={json.dumps(to_dict(shape(VOCAB)))}",
        f"examples.max_length={LENGTH}", "batch.size=64", f"max_steps={steps}", "evaluation.every=0", f"checkpoint.every={steps}",
        "sample_prompts=[]",
    ]  # fmt: skip
    return run(load("t5", settings), results / "own-translate", lambda _: None).model


def measured(directory: Path, test: Path, done: RunResult) -> Row:
    """What a run of ours scores."""
    evaluated = load_evaluated_model(directory)
    items = generation.load(evaluated, [str(test)])
    right, said = generation.respond(evaluated, items, lambda _: None, LENGTH)
    return scored(right, said) | {"loss": done.metrics["valid/loss"], "items": len(right)}


def scored(right: Sequence[str], said: Sequence[str]) -> Row:
    """BLEU and chrF of texts."""
    return {
        "chrf": overlap_metrics.chrf(right, said),
        "bleu": overlap_metrics.bleu(*overlap_metrics.bleu_counts(right, said)),
    }


def taught(lesson: Lesson, coder: str, out: str) -> Row:
    """transformers' T5 from nothing, trained by its Trainer on the same pairs."""
    tokenizer = Tokenizer.load(coder)
    vocab = tokenizer.vocab
    learnt, asked = (pairs(path, tokenizer, lesson) for path in (lesson.train, lesson.test))
    config = {key: value for key, value in t5.to_hf_config(shape(vocab.size)).items() if key != "firth_tied"}
    special = {"pad_token_id": vocab.pad, "eos_token_id": vocab.eos, "decoder_start_token_id": vocab.start}
    transformers.set_seed(lesson.seed)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config | special))
    # transformers 5 ties a T5 1.1 that it makes itself; this head is its own, and begins at zero, as ours does.
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert sum(p.numel() for p in model.parameters()) == shape(vocab.size).num_parameters()
    padding = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.engine, pad_token=tokenizer.token(vocab.pad), eos_token=tokenizer.token(vocab.eos)
    )
    collator = transformers.DataCollatorForSeq2Seq(padding, model=model)
    _, told = trained(model, learnt, collator, lesson, out, writes=True)
    right = [tokenizer.decode(asked[i]["labels"]) for i in range(len(asked))]
    said, nats, tokens = [], 0.0, 0
    model.eval()
    for first in range(0, len(asked), AT_ONCE):
        batch = collator([asked[i] for i in range(first, min(first + AT_ONCE, len(asked)))])
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            found = model(**source, labels=batch["labels"])
            written = model.generate(**source, max_new_tokens=LENGTH, do_sample=False, num_beams=1)
        count = int((batch["labels"] != IGNORE).sum())
        nats, tokens = nats + float(found.loss) * count, tokens + count
        said += [tokenizer.decode(until(row, vocab.eos)).strip() for row in written[:, 1:].tolist()]
    return scored(right, said) | {"loss": nats / tokens} | told | {"tested": len(asked)}


def pairs(path: Path, tokenizer: Tokenizer, lesson: Lesson) -> Rows:
    """The records as both sides read them."""
    how = lesson.examples
    found = Seq2SeqRecords(
        [str(path)],
        tokenizer,
        how.max_length,
        answer=how.max_target_length,
        forms=(how.prompt_template, how.completion_template),
    )
    return Rows(found, pair)


def pair(example: Example) -> Row:
    """A sentence and its translation, both ended by the stop token."""
    source, target = example["source"].tolist(), example["target"].tolist()
    return {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}


def until(tokens: list[int], stop: int) -> list[int]:
    """What stands before the first stop token.

    >>> until([5, 6, 1, 0, 0], 1)
    [5, 6]
    """
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
