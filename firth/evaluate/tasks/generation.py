"""Generation: greedy completions of prompts, compared with the gold answers (closed-book question answering).

Records are those of dialogues and seq2seq ({"prompt", "completion"}, {"messages"}, ...), read as in finetuning with the
templates of the run's recipe. A line of text is a prompt, or the only field of the recipe's prompt template.

    encoder-decoders               the prompt is the input of the encoder
    decoders tuned on dialogues    the chat template renders the prompt, and the answer ends with its turn
    other decoders                 the prompt is plain text, and the answer ends with its line

Exact match and F1 are SQuAD's, after its normalization, as is the score of the majority baseline.

Translation and summarization are scored against references by BLEU and ROUGE. Records are read and prompted as in `generation`, with
the templates of the run's recipe ("translate to French: {en}").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firth.data.dialogues import DecoderPromptsConfig, Seq2SeqConfig, field_names
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.perplexity import leading_bos
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.generate.engine import Engine
from firth.generate.output import Completion
from firth.generate.sampling import Sampling
from firth.generate.scoring import scoring_mode
from firth.types import UserError

PROMPTS_PER_CALL = 256
MIN_NEW_TOKENS = 64
"""Token limit of a completion; a longer gold answer raises it to its own length."""
MAX_CHAT_TOKENS = 256
"""Token limit of a decoder's completion where no gold answer is known."""


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load prompts as the model reads them; UserError for a model that does not generate text."""
    config = evaluated.model.config
    if not can_generate(evaluated):
        raise UserError(
            f"{evaluated.directory}: this model does not generate text: finetune one that does (firth train sft or "
            "text_to_text)"
        )
    if config.encoder.num_layers:
        return evaluated.records(Seq2SeqConfig, paths, labeled, max_target_length=evaluated.context)
    bos, _ = (
        (None, False) if config.attention.prefix_lm else leading_bos(evaluated.model_directory, evaluated.tokenizer)
    )
    return evaluated.records(
        DecoderPromptsConfig, paths, labeled, max_length=evaluated.model.context, is_chat=evaluated.is_chat_model,
        bos=() if bos is None else (bos,),
    )  # fmt: skip


def can_generate(evaluated: EvaluatedModel) -> bool:
    """Return whether a model generates text from left to right after a prompt."""
    config = evaluated.model.config
    return evaluated.model.has_lm_head and not config.encoder.latent_size and scoring_mode(config) != "masked"


def templates(evaluated: EvaluatedModel) -> tuple[str, str]:
    """Return the prompt and completion templates of the run's recipe; empty where it has none."""
    return evaluated.examples.get("prompt_template", ""), evaluated.examples.get("completion_template", "")


def completions(evaluated: EvaluatedModel, items: Records, max_tokens: int, progress: Progress) -> Iterator[Completion]:
    """Yield the greedy completion of each prompt.

    Args:
        evaluated: The model.
        items: The prompts.
        max_tokens: Most tokens of a completion.
        progress: Called with the share done, 0 to 1.
    """
    engine = Engine(evaluated.model, evaluated.tokenizer)
    plain = not evaluated.model.config.encoder.num_layers and not evaluated.is_chat_model
    greedy = Sampling(
        temperature=0, max_new_tokens=min(max_tokens, evaluated.model.context), stop_strings=("\n",) if plain else ()
    )
    for first in range(0, len(items), PROMPTS_PER_CALL):
        prompts = [items[i]["source"] for i in range(first, min(first + PROMPTS_PER_CALL, len(items)))]
        generated = iter(engine.generate([prompt for prompt in prompts if engine.room(prompt)], greedy))
        yield from (next(generated) if engine.room(prompt) else NO_ROOM for prompt in prompts)
        progress(min(first + PROMPTS_PER_CALL, len(items)) / len(items))


NO_ROOM = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "", "context")
"""Completion of a prompt that fills the context."""


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress, max_tokens: int = MIN_NEW_TOKENS) -> Answers:
    """Return the gold answers and the completions as text."""
    targets = [items[i]["target"] for i in range(len(items))]
    max_tokens = max(max_tokens, *(len(target) + 1 for target in targets))
    gold = [evaluated.tokenizer.decode(target) for target in targets]
    return gold, [completion.text.strip() for completion in completions(evaluated, items, max_tokens, progress)]


def input_schema(evaluated: EvaluatedModel) -> InputSchema:
    """Return the schema of a prompt, or of the fields of the prompt template."""
    template, _ = templates(evaluated)
    fields = field_names(template) if template else ["prompt"]

    def line(text: str) -> dict[str, Any]:
        if len(fields) != 1:
            raise UserError(
                f"the prompt template has the fields {', '.join(fields) or '(none)'}, which lines of text cannot give: give JSON lines"
            )
        return {fields[0]: text}

    return InputSchema(
        fields[0] if fields else "", line, lambda record: [record.get(name) for name in fields] or [None]
    )


def predict(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield {"answer", "probability", "finish"} for each prompt.

    "probability" is the product over the tokens; "finish" is "stop", or "length" or "context" for a truncated answer.
    """
    default = MIN_NEW_TOKENS if evaluated.model.config.encoder.num_layers else MAX_CHAT_TOKENS
    for found in completions(evaluated, items, int(evaluated.examples.get("max_target_length", default)), progress):
        probability = round(float(np.exp(found.logprobs.sum(dtype=np.float64))), 6) if len(found.tokens) else 0.0
        yield {"answer": found.text.strip(), "probability": probability, "finish": found.finish}


def f1(gold: Sequence[str], texts: Sequence[str]) -> float:
    """Return the mean of SQuAD's word F1 over the answers."""
    return metrics.mean([metrics.squad([answer], text)[1] for answer, text in zip(gold, texts, strict=True)])


GENERATION = Task(
    "generation",
    load,
    respond,
    {"exact_match": metrics.exact_match, "f1": f1},
    majority_baseline=True,
    predict=predict,
    input_schema=input_schema,
)


MAX_NEW_TOKENS = 200
"""Token limit of a completion; a longer reference raises it to its own length."""


def translate(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the n-gram counts of each text for BLEU."""
    metrics.library("sacrebleu", "sacrebleu")  # fail before a long generation
    return tuple(metrics.bleu_counts(*respond(evaluated, items, progress, MAX_NEW_TOKENS)))


def summarize(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the ROUGE scores of each text."""
    metrics.library("rouge_score.rouge_scorer", "rouge-score")
    return tuple(metrics.rouge_scores(*respond(evaluated, items, progress, MAX_NEW_TOKENS)))


TRANSLATION = Task("translation", load, translate, {"bleu": metrics.bleu}, predict=predict, input_schema=input_schema)
SUMMARIZATION = Task(
    "summarization", load, summarize,
    {name: lambda *columns, at=at: metrics.mean(columns[at]) for at, name in enumerate(metrics.ROUGE)},
    predict=predict, input_schema=input_schema,
)  # fmt: skip
