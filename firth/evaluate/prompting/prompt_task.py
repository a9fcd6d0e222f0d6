"""A task that asks a model in text: how prompts are built, what is requested, and how replies are read.

A task asks each of its items one of four kinds of questions (`output_type`, the names are lm-evaluation-harness's):

    multiple_choice         log p of each choice after the prompt; the most likely one is the answer
    generate_until          a generated text, read by filters
    loglikelihood           log p of the target, which directly follows the prompt, and whether greedy decoding would write it
    loglikelihood_rolling   log p of a whole text, for perplexity and bits per byte

Replies may be followed by further requests: zero-shot chain of thought first generates a rationale, then asks for the answer
after it. `PromptTask.ask` is therefore a generator of requests that receives the replies. Few-shot chain of thought shows
examples with rationales and generates the answer of multiple_choice too, so that filters read it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from firth.evaluate.prompting.metrics import (
    SAMPLE_FILTERS,
    TEXT_METRICS,
    Counts,
    FilterChain,
    apply_filters,
    bleu_counts,
    class_counts,
    value_of,
)
from firth.evaluate.prompting.prompts import (
    STEP_BY_STEP,
    THEREFORE,
    ExamplePool,
    Item,
    fit,
    render,
    render_value,
    shorten,
)
from firth.evaluate.prompting.requests import (
    GenerateReply,
    GenerateRequest,
    Reply,
    Request,
    Responder,
    ScoreReply,
    ScoreRequest,
    sample_seed,
)
from firth.types import UserError

OutputType = Literal["multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling"]
OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling")
METRICS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "f1", "mcc", "macro_f1", "multiple_choice_grade"),
    "generate_until": (*TEXT_METRICS, "bleu"),
    "loglikelihood": ("acc", "perplexity", "log_likelihood"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
"""Output type -> its metrics."""
CLASS_METRICS = frozenset({"f1", "mcc", "macro_f1"})
"""Metrics of multiple_choice over the classified items: F1 of the second choice, Matthews' correlation, the mean F1 of the choices."""
RATIONALE_TOKENS = 256
"""Fewest tokens of an answer that begins with a rationale."""


@dataclass(frozen=True)
class MetricConfig:
    """One metric of a task.

    Args:
        name: A name in `METRICS`.
        options: Options of `exact_match`: ignore_case, ignore_punctuation, ignore_numbers, regexes_to_ignore.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptConfig:
    """How the prompts of an evaluation are built; `firth evaluate` sets it.

    Args:
        shots: Examples before the question; None for the task's own number.
        chat: Whether the prompt is a message of the model's chat template.
        cot: Whether the model writes a rationale first: "" for no, "zero-shot" ("Let's think step by step."), "few-shot" (the
            examples have rationales).
        votes: Sampled answers per item, of which the most frequent counts (self-consistency, Wang 2022); 1: greedy.
        temperature: Temperature of sampled answers.
        seed: Seed of examples and samples.
        limit: Most items, the first ones; None for all.
        max_new_tokens: Most tokens of a generated answer; 0 for the task's own number.
    """

    shots: int | None = None
    chat: bool = False
    cot: Literal["", "zero-shot", "few-shot"] = ""
    votes: int = 1
    temperature: float = 0.7
    seed: int = 0
    limit: int | None = None
    max_new_tokens: int = 0


@dataclass(frozen=True)
class ItemResult:
    """Result of one item.

    Args:
        location: File and line of the item.
        group: Its group (a subject); "" without groups.
        prompt: The first prompt.
        shots: Number of examples in it.
        gold: The gold answer.
        answers: What was read from the replies, by filter chain ("none" without filters).
        metrics: Metric -> value of this item; with several filter chains "metric,chain".
        replies: Generated texts, or log p of each choice.
        weights: Metric -> weight of the item in the mean (words or bytes); 1 if absent.
        counts: Metric that is no mean over items -> what the item adds to it; `metrics` has the value of the item alone.
    """

    location: str
    group: str
    prompt: str
    shots: int
    gold: Any
    answers: Mapping[str, str]
    metrics: Mapping[str, float]
    replies: Sequence[Any]
    weights: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PromptTask:
    """A task in text.

    Args:
        name: Name in tables.
        items: The questions.
        pool: Items that examples are taken from; the questions themselves if empty.
        output_type: What is requested.
        prompt: Template of the prompt, or a field.
        target: Template or field of the gold answer: for multiple_choice a choice or its index.
        choices: Choices: a list of texts and templates, or a template or field whose value is a list.
        description: Text before the examples, a template.
        target_delimiter: Text between a prompt and its target.
        fewshot_delimiter: Text after an example.
        shots: Default number of examples.
        sampler: "first_n" or "random".
        group: Field that groups items (subjects); "" for none.
        filters: Chains that read generated answers; without any the answer is the stripped text.
        metrics: The metrics.
        stop: Strings that end an answer.
        max_new_tokens: Most tokens of an answer.
        scores: Field with a score of each choice (BIG-bench's `multiple_choice_grade`); "" for none.
        example_answer: Template or field of the answer that an example shows; the gold answer if empty.
        rationale: Template of what an example shows with few-shot chain of thought: a rationale that ends with the answer.
        example_text: Examples that are written out, put before each question in place of `pool`.
        repeats: Samples of each generated answer, all of which a filter chain reads; `PromptConfig.votes` above 1 replaces it.
        temperature: Their temperature; 0 for greedy decoding.
        top_p: Their nucleus.
    """

    name: str
    items: Sequence[Item]
    output_type: OutputType
    prompt: str
    target: str
    pool: Sequence[Item] = ()
    choices: str | Sequence[str] = ()
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    shots: int = 0
    sampler: Literal["first_n", "random"] = "random"
    group: str = ""
    filters: tuple[FilterChain, ...] = ()
    metrics: tuple[MetricConfig, ...] = ()
    stop: tuple[str, ...] = ("\n\n",)
    max_new_tokens: int = 256
    scores: str = ""
    example_answer: str = ""
    rationale: str = ""
    example_text: str = ""
    repeats: int = 1
    temperature: float = 0.0
    top_p: float = 1.0

    def choices_of(self, item: Item) -> list[str]:
        """Return the choices of an item; UserError with its location unless there are two or more different ones."""
        found = (
            render_value(self.choices, item)
            if isinstance(self.choices, str)
            else [render(choice, item) if "{" in choice else choice for choice in self.choices]
        )
        if not isinstance(found, list | tuple) or len(found) < 2:
            raise UserError(f"{item.location}: the choices are {found!r}: a question needs a list of two or more")
        return [str(choice) for choice in found]

    def gold_of(self, item: Item) -> Any:
        """Return the gold answer: the index of a choice for multiple_choice, otherwise a tuple of accepted texts.

        Raises:
            UserError: The gold answer is not among the choices, or there is none.
        """
        if self.output_type != "multiple_choice":
            found = render_value(self.target, item) if self.target else ""
            golds = tuple(str(one) for one in found) if isinstance(found, list | tuple) else (str(found),)
            if not golds:
                raise UserError(f"{item.location}: the list of gold answers is empty")
            return golds
        choices = self.choices_of(item)
        value = int(self.target) if self.target.lstrip("-").isdigit() else render_value(self.target, item)
        text = str(value)
        if isinstance(value, int) and not isinstance(value, bool):
            index = value
        elif text in choices:
            index = choices.index(text)
        else:
            index = int(text) if text.isdigit() else -1
        if not 0 <= index < len(choices):
            raise UserError(
                f"{item.location}: the gold answer {value!r} is neither one of the choices nor the index of one"
            )
        return index

    def target_text(self, item: Item) -> str:
        """Return the gold answer as text, as it is shown in an example."""
        gold = self.gold_of(item)
        return self.choices_of(item)[gold] if self.output_type == "multiple_choice" else str(gold[0])

    def check(self, config: PromptConfig) -> None:
        """Render every item once, so that a wrong field is found before the model runs.

        Raises:
            UserError: An item does not fit the task, or the settings do not.
        """
        if not self.items:
            raise UserError(f"{self.name}: there is no item")
        if config.votes > 1 and not self.generates(config):
            raise UserError(f"{self.name}: --votes samples generated answers, and this task scores {self.output_type}")
        if config.cot and self.output_type not in ("generate_until", "multiple_choice"):
            raise UserError(f"{self.name}: --cot needs answers, and this task scores {self.output_type}")
        if config.cot == "few-shot":
            self._check_rationales(config)
        sizes = set()
        for item in self.selected(config):
            _check_field(self.prompt, "doc_to_text", item)
            render(self.prompt, item)
            if self.output_type == "multiple_choice":
                sizes.add(len(self.choices_of(item)))
            else:
                _check_field(self.target, "doc_to_target", item)
            self.gold_of(item)
            if self.group and self.group not in item.fields:
                raise UserError(f"{item.location}: there is no field {self.group!r}, which groups the items")
        by_class = [metric.name for metric in self.metrics if metric.name in ("mcc", "macro_f1")]
        if len(sizes) > 1 and by_class:
            raise UserError(f"{self.name}: {by_class[0]} needs the same number of choices in every item")

    def _check_rationales(self, config: PromptConfig) -> None:
        """Check that examples with rationales are possible, and that the filters read the answer of the first one."""
        if self.example_text:
            return
        if not self.rationale:
            raise UserError(
                f"{self.name}: --cot few-shot needs rationales, and the task names none: give their template in the task file "
                "(doc_to_rationale: ...), or use --cot zero-shot"
            )
        if not self.shots_under(config):
            raise UserError(f"{self.name}: --cot few-shot needs examples, and there are 0: give --shots")
        item = next(iter(self.pool or self.items))
        text = self.target_delimiter + render(self.rationale, item)
        stop = next((one for one in self.stop if one and one in text), None)
        if stop is not None:
            raise UserError(f"{item.location}: the rationale contains {stop!r}, at which answers of {self.name} end")
        if not any(self.is_right(answer, item) for answer in self._read([text]).values()):
            found = " and ".join(map(repr, self._read([text]).values()))
            raise UserError(
                f"{item.location}: filter_list reads {found} from the rationale, and the answer is "
                f"{self.target_text(item)!r}: let doc_to_rationale end with the answer as filter_list reads it"
            )

    def is_right(self, answer: str, item: Item) -> bool:
        """Return whether an answer that filters read is the gold answer."""
        gold = self.gold_of(item)
        if self.output_type == "multiple_choice":
            return self._choice_index(answer, item) == gold
        exact = [metric for metric in self.metrics if metric.name == "exact_match"]
        return not exact or text_value(exact[0], answer, gold) == 1.0

    def equal_answers(self, answer: str, other: str) -> bool:
        """Return whether the metric `exact_match` holds two answers for equal; without it, whether they are."""
        exact = [metric for metric in self.metrics if metric.name == "exact_match"]
        return text_value(exact[0], answer, (other,)) == 1.0 if exact else answer == other

    def generates(self, config: PromptConfig) -> bool:
        """Return whether answers are generated and read by filters."""
        return self.output_type == "generate_until" or (
            self.output_type == "multiple_choice" and config.cot == "few-shot"
        )

    def shots_under(self, config: PromptConfig) -> int:
        """Return the number of examples that are chosen for a question: none before a whole text or with written examples."""
        if self.example_text or self.output_type == "loglikelihood_rolling":
            return 0
        return self.shots if config.shots is None else config.shots

    def selected(self, config: PromptConfig) -> Sequence[Item]:
        """Return the items that are evaluated."""
        return self.items if config.limit is None else self.items[: config.limit]

    def _example(self, item: Item, cot: str) -> str:
        template = self.rationale if cot == "few-shot" else self.example_answer
        answer = render(template, item) if template else self.target_text(item)
        return render(self.prompt, item) + self.target_delimiter + answer + self.fewshot_delimiter

    @cached_property
    def _pools(self) -> dict[str, ExamplePool]:
        """Examples of each group, and of all under ""."""
        pool = self.pool or self.items
        members: dict[str, list[Item]] = {}
        if self.group and self.pool:
            for item in pool:
                members.setdefault(str(item.fields.get(self.group)), []).append(item)
        return {"": ExamplePool(pool)} | {group: ExamplePool(some) for group, some in members.items()}

    def build_prompt(self, item: Item, index: int, config: PromptConfig, model: Responder) -> tuple[str, int]:
        """Return the prompt of an item and the number of examples in it.

        Raises:
            UserError: The prompt is too long even without examples.
        """
        count = self.shots_under(config)
        pool = self._pools[""]
        own = str(item.fields.get(self.group)) if self.group else ""
        if own and own in self._pools:  # examples of the item's own subject, as many as there are
            pool = self._pools[own]
            count = min(count, pool.others(item))
        shots = pool.choose(item, count, self.sampler, config.seed, index) if count else []
        description = render(self.description, item) if self.description else ""
        description += self.example_text if config.shots != 0 else ""
        question = render(self.prompt, item)
        if config.cot == "zero-shot" and not config.chat:
            question += self.target_delimiter + STEP_BY_STEP
        room = self._answer_tokens(item, config, model)
        if config.cot == "zero-shot":
            room += self._room(config) + model.count_tokens(f"{STEP_BY_STEP}\n{THEREFORE}")
        elif config.cot and self.output_type == "multiple_choice":
            room += self._room(config)
        if self.output_type == "loglikelihood":
            room += model.count_tokens(self.gold_of(item)[0])
        longest = model.context - min(room, model.context // 2)

        def count_tokens(text: str) -> int:
            return model.count_tokens(text, config.chat)

        prompt, kept = fit(
            [self._example(shot, config.cot) for shot in shots], question, description, longest, count_tokens
        )
        length = count_tokens(prompt)
        if length > longest:
            raise UserError(
                f"{item.location}: the prompt of {self.name} has {length:,} tokens without any example, and {model.name} reads "
                f"{model.context:,}, of which {model.context - longest:,} are kept for the answer: leave the item out"
            )
        return prompt, kept

    def ask(
        self, item: Item, index: int, config: PromptConfig, model: Responder
    ) -> Generator[Sequence[Request], Sequence[Reply], ItemResult]:
        """Yield the requests of an item, receive the replies, and return the result.

        Args:
            item: The question.
            index: Its number.
            config: How prompts are built.
            model: Counts tokens and applies the chat template; it is not run here.
        """
        group = str(item.fields[self.group]) if self.group else ""
        if self.output_type == "loglikelihood_rolling":
            text = render(self.target or self.prompt, item)
            (score,) = yield [ScoreRequest("", text)]
            assert isinstance(score, ScoreReply)
            return self._rolling(item, group, text, score)
        prompt, kept = self.build_prompt(item, index, config, model)
        gold, room = self.gold_of(item), self._room(config)
        chat = config.chat
        lead = "" if chat else self.target_delimiter
        begun = [""]  # how the answer begins: a rationale
        rationales: list[str] = []
        if config.cot == "zero-shot":
            step = STEP_BY_STEP if chat else ""
            thoughts = yield self._samples(prompt, config, step)
            written = [step + thought.text.rstrip() for thought in thoughts if isinstance(thought, GenerateReply)]
            rationales = [self._shortened(text, prompt, item, config, model) for text in written]
            begun, lead = [f"{text}\n{THEREFORE}" for text in rationales], " "
        starts = [(prompt, one) if chat else (prompt + one, "") for one in begun]
        if not self.generates(config) and self.output_type == "multiple_choice":
            choices = self.choices_of(item)
            scores = yield [ScoreRequest(starts[0][0], lead + choice, chat, starts[0][1]) for choice in choices]
            found = [score for score in scores if isinstance(score, ScoreReply)]
            return self._choice(item, group, prompt, kept, gold, choices, found, rationales)
        if self.output_type == "loglikelihood":
            scores = yield [ScoreRequest(prompt, one, chat) for one in gold]
            found = [score for score in scores if isinstance(score, ScoreReply)]
            sums = [score.logprob for score in found]
            total = max(sums) + math.log(sum(math.exp(one - max(sums)) for one in sums))
            values = {"acc": float(found[0].greedy), "perplexity": sums[0], "log_likelihood": total}
            return ItemResult(item.location, group, prompt, kept, gold[0], {}, self._known(values), sums)
        if config.cot == "zero-shot":
            replies = yield [GenerateRequest(p, self.stop, room, chat=chat, begun=b) for p, b in starts]
        else:
            replies = yield self._samples(prompt, config)
        texts = [reply.text for reply in replies if isinstance(reply, GenerateReply)]
        return self._generated(item, group, prompt, kept, gold, texts, rationales)

    def _samples(self, prompt: str, config: PromptConfig, begun: str = "") -> list[GenerateRequest]:
        """Return the requests of the samples of an answer. Greedy ones are equal, and are sent once."""
        count, temperature, top_p = 1, 0.0, 1.0
        if config.votes > 1:
            count, temperature = config.votes, config.temperature
        elif self.generates(config):
            count, temperature, top_p = self.repeats, self.temperature, self.top_p
        return [
            GenerateRequest(
                prompt, self.stop, self._room(config), temperature, top_p,
                sample_seed(config.seed, prompt, number if temperature else 0), config.chat, begun,
            )
            for number in range(count)
        ]  # fmt: skip

    def _answer_tokens(self, item: Item, config: PromptConfig, model: Responder) -> int:
        """Return the tokens to keep for an answer: those of the longest choice, or of the longest text."""
        if self.output_type == "multiple_choice":
            return max(model.count_tokens(self.target_delimiter + choice) for choice in self.choices_of(item))
        return self._room(config) if self.output_type == "generate_until" else 0

    def _shortened(self, rationale: str, prompt: str, item: Item, config: PromptConfig, model: Responder) -> str:
        """Return the start of a rationale after which there is room to ask for the answer and to give it."""
        answer = self._answer_tokens(item, config, model)
        if self.output_type == "generate_until":  # whose length is a limit: most answers are shorter
            answer = min(answer, model.context // 4)
        before = model.count_tokens(prompt, True) if config.chat else 0

        def fits(text: str) -> bool:
            begun = f"{text}\n{THEREFORE}"
            length = before + model.count_tokens(begun) if config.chat else model.count_tokens(prompt + begun)
            return length + answer <= model.context

        return shorten(rationale, fits)

    def _room(self, config: PromptConfig) -> int:
        """Return the most tokens of an answer."""
        if config.max_new_tokens:
            return config.max_new_tokens
        return max(self.max_new_tokens, RATIONALE_TOKENS) if config.cot == "few-shot" else self.max_new_tokens

    def _known(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values of the task's metrics."""
        return {metric.name: values[metric.name] for metric in self.metrics if metric.name in values}

    def _choice(
        self, item: Item, group: str, prompt: str, kept: int, gold: int, choices: Sequence[str],
        scores: Sequence[ScoreReply], rationales: Sequence[str],
    ) -> ItemResult:  # fmt: skip
        """Return the result of a multiple-choice item. The most likely choice must be the only one: a tie is wrong."""
        sums = [score.logprob for score in scores]
        norms = [total / max(1, len(choice)) for total, choice in zip(sums, choices, strict=True)]
        best = max(range(len(sums)), key=lambda i: (sums[i], i != gold))
        values, counts = self._graded(item, best, gold, len(choices))
        values["acc_norm"] = _wins(norms, gold)
        return ItemResult(
            item.location, group, prompt, kept, choices[gold], {"none": choices[best]}, self._known(values),
            [*rationales, *sums], counts=counts,
        )  # fmt: skip

    def _graded(self, item: Item, best: int, gold: int, size: int) -> tuple[dict[str, float], dict[str, Counts]]:
        """Return the metrics of a chosen answer, and what it adds to those over classes; -1 is an answer that is no choice."""
        right = float(best == gold)
        values = {"acc": right} | dict.fromkeys(CLASS_METRICS, right)
        if self.scores:
            values["multiple_choice_grade"] = float(render_value(self.scores, item)[best]) if best >= 0 else 0.0
        wanted = [metric.name for metric in self.metrics if metric.name in CLASS_METRICS]
        other = best if best >= 0 else (gold + 1) % size
        return values, {name: class_counts(name, gold, other, size) for name in wanted}

    def _choice_index(self, answer: str, item: Item) -> int:
        """Return the index of the choice that an answer names, or -1."""
        choices = [choice.strip().casefold() for choice in self.choices_of(item)]
        answer = answer.strip().casefold()
        return choices.index(answer) if answer in choices else -1

    def _read(self, texts: Sequence[str]) -> dict[str, str]:
        """Return the answer that each filter chain reads.

        Of the task's own samples (`repeats`) it is the first that the chain returns, as in lm-evaluation-harness. Of the
        samples of `PromptConfig.votes` it is the most frequent one, also where the chain itself takes the first.
        """
        found = {}
        for chain in self.filters or (FilterChain("none", ()),):
            if self.repeats > 1:
                answers = apply_filters(chain.filters, texts)[:1]
            elif any(step.function in SAMPLE_FILTERS for step in chain.filters):
                answers = apply_filters(chain.filters, texts)
            else:
                answers = [one for text in texts for one in apply_filters(chain.filters, [text])[:1]]
            found[chain.name] = majority(answers)
        return found

    def _rolling(self, item: Item, group: str, text: str, score: ScoreReply) -> ItemResult:
        words, size = max(1, len(text.split())), max(1, len(text.encode("utf-8", "surrogatepass")))
        nll = -score.logprob
        values = {
            "word_perplexity": nll / words,
            "byte_perplexity": nll / size,
            "bits_per_byte": nll / size / math.log(2),
        }
        weights = {"word_perplexity": float(words), "byte_perplexity": float(size), "bits_per_byte": float(size)}
        return ItemResult(item.location, group, text, 0, "", {}, self._known(values), [score.logprob], weights)

    def _generated(
        self, item: Item, group: str, prompt: str, kept: int, gold: Any, texts: Sequence[str],
        rationales: Sequence[str],
    ) -> ItemResult:  # fmt: skip
        """Return the result of a generated answer, as each filter chain reads it."""
        answers = self._read(texts)
        values: dict[str, float] = {}
        counts: dict[str, Counts] = {}
        for chain, answer in answers.items():
            end = "" if len(answers) == 1 else f",{chain}"
            if self.output_type == "multiple_choice":
                size = len(self.choices_of(item))
                found, added = self._graded(item, self._choice_index(answer, item), gold, size)
                values |= {name + end: value for name, value in self._known(found).items()}
                counts |= {name + end: one for name, one in added.items()}
                continue
            for metric in self.metrics:
                if metric.name == "bleu":
                    counts["bleu" + end] = Counts("bleu", bleu_counts(answer, gold))
                    values["bleu" + end] = value_of([counts["bleu" + end]])
                else:
                    values[metric.name + end] = text_value(metric, answer, gold)
        shown = self.target_text(item)
        return ItemResult(
            item.location, group, prompt, kept, shown, answers, values, [*rationales, *texts], counts=counts
        )


def _check_field(template: str, setting: str, item: Item) -> None:
    """Raise a UserError if a template is one word that is no field of an item: it would be the same text for every item."""
    if template.isidentifier() and template not in item.fields:
        raise UserError(
            f"{item.location}: {setting} is {template!r}, and the record has no such field: it has {', '.join(item.fields)}"
        )


def text_value(metric: MetricConfig, answer: str, golds: Sequence[str]) -> float:
    """Return a metric of an answer against the gold answer that it fits best."""
    options = dict(metric.options)
    if metric.name == "exact_match":
        options["ignore"] = tuple(options.pop("regexes_to_ignore", None) or ())
    return max(TEXT_METRICS[metric.name](answer, gold, **options) for gold in golds)


def majority(answers: Sequence[str]) -> str:
    """Return the most frequent answer; of equally frequent ones the first; "" for none."""
    return max(answers, key=lambda one: (answers.count(one), -answers.index(one))) if answers else ""


def _wins(scores: Sequence[float], gold: int) -> float:
    """Return 1.0 if the gold score is the only highest one, 0.0 otherwise."""
    return float(all(scores[gold] > score for i, score in enumerate(scores) if i != gold))
