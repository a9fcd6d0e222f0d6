"""Finetuning on labeled records: classes, numbers, choices, tags, answer spans, text for a text; few or noisy labels.

    firth train classification init_from=runs/bert data=reviews.csv examples.text_field=review examples.label_field=stars
    firth train classification init_from=MODEL data=pairs.csv examples.text_field=premise examples.text_pair_field=hypothesis
    firth train regression init_from=MODEL data=pairs.tsv examples.text_field=a examples.text_pair_field=b examples.label_field=score
    firth train multiple_choice init_from=MODEL data=questions.jsonl
    firth train token_classification init_from=MODEL data=train.conll data.validation_path=dev.conll
    firth train question_answering init_from=MODEL data=train-v1.1.json data.validation_path=dev-v1.1.json
    firth train text_to_text init_from=MODEL data=pairs.csv "examples.prompt_template=in French: {en}" "examples.completion_template={fr}"
    firth train glue:mrpc init_from=MODEL data=MRPC/train.tsv data.validation_path=MRPC/dev.tsv
    firth evaluate runs/glue-mrpc runs/glue-cola --task glue

Errors in a file name its line. Labels that mean "no label" (SNLI's "-") are left out with "examples.missing_labels=['-']".

Without init_from the model starts from random weights: model={hidden_size: 192, num_layers: 4, num_heads: 3, causal: false}. An
encoder reads the class at [CLS], a decoder at its last token, an encoder-decoder at the first token of its output.

Several examples share one row of the batch and do not attend to each other. Where that is impossible (the options of a question, prompt
tuning), batches are made of examples of similar length (`batch.pack_to_length`, `batch.group_by_length`).

    evaluation.every=50 evaluation.best_metric=f1 evaluation.patience=3   the best checkpoint; stop after three without a better one
    objective.class_weights=balanced objective.label_smoothing=0.1        classes of equal weight; a tenth of each label on the others

Few labels and many texts without one: a classifier of the labeled records is the teacher, and its confident predictions are labels.

    firth train classification init_from=runs/bert data=labeled.csv --out runs/teacher
    firth train semi_supervised init_from=runs/bert data=labeled.csv examples.teacher=runs/teacher examples.unlabeled_path=[more.txt]

more.txt has one text per line; a table or JSON lines work too. `examples.num_labeled=100` replaces `examples.unlabeled_path`
for a simulation on records that all have a label. `objective=consistency examples=partially_labeled` needs no teacher:
predictions must agree when words are masked. It was worse than the labeled records alone with every seed.

Several labels per record, some of them wrong: all votes are trained on.

    firth train weak_supervision init_from=runs/bert data.path=voted.jsonl
    firth train weak_supervision init_from=runs/bert data=labeled.csv examples=simulated_annotators

The second command replaces the labels by votes of `examples.num_annotators=5` annotators who are right with probability
`examples.annotator_accuracy=0.7`. Baselines: `classification` on the labeled records alone, and `firth train weak_supervision
objective=classification`, which trains on the majority of the same votes. Results: docs/results/tasks.md and
docs/results/few-labels.md.
"""

from __future__ import annotations

from dataclasses import replace

from firth.align.precompute import PseudoLabeledConfig
from firth.data.dialogues import Seq2SeqConfig
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, ScoredConfig, TaggedConfig
from firth.data.question_answering import QuestionsConfig
from firth.data.semi_supervised import MultiAnnotatorConfig
from firth.objectives.classification import Classification, MultipleChoice, Regression
from firth.objectives.semi_supervised import MultiAnnotator, PseudoLabels, WeightPenalty
from firth.objectives.sft import Seq2SeqSFT
from firth.objectives.token_tasks import QuestionAnswering, TokenClassification
from firth.recipes.common import (
    recipe_of_size,
)
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule


def classification() -> Recipe:
    """Return classification of a text or a pair of texts.

    The learning rate suits a small published encoder. MiniLM, 80 steps, headlines and reviews: accuracy 0.852 and 0.807 at
    1e-4, 0.856 and 0.823 at 2e-4, 0.857 and 0.811 at 5e-4. BERT-base needs a fifth of it, a tiny encoder of one's own up to ten
    times as much.
    """
    return Recipe(
        name="classification",
        objective=Classification(),
        examples=LabeledConfig(max_length=128),
        batch=BatchConfig(size=32, pack_to_length="auto"),
        optimizer=OptimizerConfig(name="adamw", lr=2e-4, weight_decay=0.01, beta2=0.98),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=200),
        evaluation=EvalConfig(every=0, max_examples=2000),
        checkpoint=CheckpointConfig(every=200),
    )


def regression() -> Recipe:
    """Return prediction of a number for a text or a pair of texts (STS-B)."""
    return replace(classification(), name="regression", objective=Regression(), examples=ScoredConfig(max_length=128))


def multiple_choice(size: str = "records") -> Recipe:
    """Return a choice among several options; multiple_choice:swag reads SWAG's four endings (Zellers 2018)."""
    plain = replace(
        classification(),
        name="multiple_choice",
        objective=MultipleChoice(),
        examples=MultipleChoiceConfig(max_length=128),
        batch=BatchConfig(size=16, pack_to_length="auto"),
    )
    swag = MultipleChoiceConfig(
        text_field="sent1", option_prefix_field="sent2", option_fields=("ending0", "ending1", "ending2", "ending3")
    )
    return recipe_of_size(
        "multiple_choice", size, {"records": plain, "swag": replace(plain, name="swag", examples=swag)}
    )


def token_classification() -> Recipe:
    """Return a tag for each word."""
    return replace(classification(), name="tag", objective=TokenClassification(), examples=TaggedConfig(max_length=128))


def question_answering() -> Recipe:
    """Return extractive question answering: the span of a passage that answers a question."""
    return replace(
        classification(),
        name="answer",
        objective=QuestionAnswering(),
        examples=QuestionsConfig(max_length=384),
        batch=BatchConfig(size=16, pack_to_length="auto"),
        budget=Budget(max_steps=1000),
        evaluation=EvalConfig(every=0, max_examples=2000),
        checkpoint=CheckpointConfig(every=500),
    )


def text_to_text() -> Recipe:
    """Return text to text for an encoder-decoder: translation, summaries, any of the tasks above. Decoders have `sft`."""
    plain = classification()
    return replace(
        plain,
        name="text_to_text",
        objective=Seq2SeqSFT(),
        examples=Seq2SeqConfig(max_length=256, max_target_length=64),
        batch=BatchConfig(size=16, pack_to_length="auto"),
        budget=Budget(max_steps=400),
        evaluation=EvalConfig(every=200, max_examples=400),
        checkpoint=CheckpointConfig(every=200),
        optimizer=replace(plain.optimizer, lr=5e-4),
    )


GLUE = {
    "cola": LabeledConfig(text_field="sentence", column_names=("source", "label", "mark", "sentence")),
    "sst2": LabeledConfig(text_field="sentence"),
    "mrpc": LabeledConfig(text_field="#1 String", text_pair_field="#2 String", label_field="Quality"),
    "qqp": LabeledConfig(text_field="question1", text_pair_field="question2", label_field="is_duplicate"),
    "mnli": LabeledConfig(
        text_field="sentence1", text_pair_field="sentence2", label_field="gold_label", missing_labels=("-",)
    ),
    "qnli": LabeledConfig(text_field="question", text_pair_field="sentence"),
    "rte": LabeledConfig(text_field="sentence1", text_pair_field="sentence2"),
    "wnli": LabeledConfig(text_field="sentence1", text_pair_field="sentence2"),
}
"""How the files of each GLUE task with classes are read (Wang 2018). CoLA has no header. MNLI marks records without a gold label by "-";
these are left out. STS-B is a regression."""


def glue(size: str = "sst2") -> Recipe:
    """Return a GLUE task by its name: `firth train glue:cola`.

    For MNLI data.validation_path is either of its two development sets, or both.

    `firth evaluate runs/glue-cola runs/glue-sst2 --task glue` gives the score of several (`firth.evaluate.evaluate`).
    """
    plain = classification()
    tasks = {name: replace(plain, name=f"glue-{name}", examples=examples) for name, examples in GLUE.items()}
    pair = ScoredConfig(text_field="sentence1", text_pair_field="sentence2", label_field="score")
    return recipe_of_size("glue", size, tasks | {"stsb": replace(regression(), name="glue-stsb", examples=pair)})


def semi_supervised() -> Recipe:
    """Return classification from few labels and a teacher's pseudo-labels of other texts; a weight penalty replaces weight decay.

    Confidence and ramp are those that were measured: better than the labels alone with each of three seeds (docs/results/few-labels.md).
    """
    plain = classification()
    return replace(
        plain,
        name="semi_supervised",
        objective=PseudoLabels(confidence=0.8, ramp_steps=30) + WeightPenalty(weight=1e-6),
        examples=PseudoLabeledConfig(),
        batch=replace(plain.batch, size=64),
        optimizer=replace(plain.optimizer, weight_decay=0.0),
    )


def weak_supervision() -> Recipe:
    """Return classification from the votes of several annotators."""
    return replace(classification(), name="weak", objective=MultiAnnotator(), examples=MultiAnnotatorConfig())
