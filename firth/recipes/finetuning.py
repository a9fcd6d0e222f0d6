"""Tasks over files: a class, a number, a choice, tags, a span of a passage, or text for a text.

    firth train classification init_from=runs/bert data=reviews.csv examples.text_field=review examples.label_field=stars
    firth train classification init_from=MODEL data=pairs.csv examples.text_field=premise examples.text_pair_field=hypothesis
    firth train regression  init_from=MODEL data=pairs.tsv examples.text_field=sentence1 examples.text_pair_field=sentence2 examples.label_field=score
    firth train multiple_choice   init_from=MODEL data=questions.jsonl                    {"text", "options": [...], "label"}
    firth train token_classification      init_from=MODEL data=train.conll data.validation_path=dev.conll
    firth train question_answering   init_from=MODEL data=train-v1.1.json data.validation_path=dev-v1.1.json
    firth train text_to_text init_from=runs/t5 data=pairs.csv "examples.prompt_template=translate to French: {en}" "examples.completion_template={fr}"
    firth train glue:mrpc init_from=MODEL data=MRPC/train.tsv data.validation_path=MRPC/dev.tsv
    firth evaluate runs/glue-mrpc runs/glue-cola --task glue

Whatever is wrong with a file is said with its line, and counted. Records whose label says that there is none (SNLI's "-") are
left out where they are told: "examples.missing_labels=['-']".

Without init_from=MODEL they begin from nothing: model={hidden_size: 192, num_layers: 4, num_heads: 3, causal: false}. An encoder
answers at [CLS], a decoder at its last token, an encoder-decoder at the first that it would write.

The examples of a step are packed into rows as long as the longest may be, and do not see one another; where they cannot be
(the options of a question, a prompt before each text), steps are made of examples of like length (`batch.pack_to_length`, `batch.group_by_length`).

    evaluation.every=50 evaluation.best_metric=f1 evaluation.patience=3     the best of the checks is exported, and three that are no better end it
    objective.class_weights=balanced objective.label_smoothing=0.1   every class counts the same; a tenth of each label is spread over all
"""

from __future__ import annotations

from dataclasses import replace

from firth.objectives.classification import Classification
from firth.objectives.extractive_qa import QuestionAnswering
from firth.objectives.multiple_choice import MultipleChoice
from firth.objectives.regression import Regression
from firth.objectives.sft import Seq2SeqSFT
from firth.objectives.token_classification import TokenClassification
from firth.recipes import sizes
from firth.runs.examples import Seq2SeqConfig
from firth.runs.labeled_examples import LabeledConfig, MultipleChoiceConfig, QuestionsConfig, ScoredConfig, TaggedConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def classification() -> Recipe:
    """A label for a text or for two, read at [CLS].

    The rate suits a small published encoder: MiniLM, 80 steps, headlines and reviews: 0.852 and 0.807 at 1e-4, 0.856 and 0.823
    at 2e-4, 0.857 and 0.811 at 5e-4. BERT-base wants a fifth of it, a tiny encoder of one's own up to ten times as much.
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
    """A number for a text or for two (STS-B)."""
    return replace(classification(), name="regression", objective=Regression(), examples=ScoredConfig(max_length=128))


def multiple_choice(size: str = "records") -> Recipe:
    """One of several options; choose:swag reads SWAG's four endings (Zellers 2018)."""
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
    return sizes.one_of("multiple_choice", size, {"records": plain, "swag": replace(plain, name="swag", examples=swag)})


def token_classification() -> Recipe:
    """A tag for each word."""
    return replace(classification(), name="tag", objective=TokenClassification(), examples=TaggedConfig(max_length=128))


def question_answering() -> Recipe:
    """A span of a passage that answers a question."""
    return replace(
        classification(), name="answer", objective=QuestionAnswering(), examples=QuestionsConfig(max_length=384), batch=BatchConfig(size=16, pack_to_length="auto"),
        budget=Budget(max_steps=1000), evaluation=EvalConfig(every=0, max_examples=2000), checkpoint=CheckpointConfig(every=500),
    )  # fmt: skip


def text_to_text() -> Recipe:
    """Text in, text out: any of these, translation, summaries, talk. For an encoder-decoder; decoders have `instruct`."""
    plain = classification()
    return replace(
        plain, name="text_to_text", objective=Seq2SeqSFT(), examples=Seq2SeqConfig(max_length=256, max_target_length=64),
        batch=BatchConfig(size=16, pack_to_length="auto"), budget=Budget(max_steps=400), evaluation=EvalConfig(every=200, max_examples=400), checkpoint=CheckpointConfig(every=200),
        optimizer=replace(plain.optimizer, lr=5e-4),
    )  # fmt: skip


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
"""How each of GLUE's files of classes is read (Wang 2018): CoLA's has no head. MNLI has "-" where annotators do not agree, and
such records are left out. STS-B has numbers."""


def glue(size: str = "sst2") -> Recipe:
    """GLUE by its task: `firth train glue:cola`; for MNLI data.validation_path is either of its two development sets, or both.

    `firth evaluate runs/glue-cola runs/glue-sst2 --task glue` gives the score of several (`firth.evaluate.glue`).
    """
    plain = classification()
    tasks = {name: replace(plain, name=f"glue-{name}", examples=examples) for name, examples in GLUE.items()}
    pair = ScoredConfig(text_field="sentence1", text_pair_field="sentence2", label_field="score")
    return sizes.one_of("glue", size, tasks | {"stsb": replace(regression(), name="glue-stsb", examples=pair)})
