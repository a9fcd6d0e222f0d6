"""Every objective with every kind of examples: rejected with one sentence that suggests a fix, or trained from real files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from firth import objectives
from firth.align.precompute import PseudoLabeledConfig
from firth.align.rollouts import RolloutsConfig
from firth.data.collate import Batches
from firth.data.examples import DataConfig, DatasetSplits, ExamplesConfig
from firth.data.semi_supervised import PartiallyLabeledConfig
from firth.data.windows import ChunksConfig, SegmentPairsConfig, WindowsConfig
from firth.model.config import (
    AttentionPattern,
    ModelConfig,
    decoder_config,
    encoder_config,
    encoder_decoder_config,
    recurrent_config,
    word_vector_config,
)
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, components
from firth.pretrained.load_save import save_model
from firth.runs.compatibility import check_fields, check_pattern
from firth.runs.examples import EXAMPLES
from firth.runs.prepare import RunData, train_tokenizer
from firth.runs.start_model import StartModel
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.device import casts
from firth.training.step import step
from firth.types import UserError

WORDS = ["the", "a", "fine", "dull", "otter", "swims", "sleeps", "and", "the", "cold", "river", "runs"]
SIZES = {"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 160}
SHAPES: dict[AttentionPattern, ModelConfig] = {
    "any": encoder_config(**SIZES),
    "bidirectional": replace(encoder_config(**SIZES), dropout=0.1),
    "causal": decoder_config(**SIZES),
    "permuted": encoder_config(**SIZES),
    "prefix": encoder_config(**SIZES),
    "seq2seq": encoder_decoder_config(**SIZES),
    "latent": encoder_decoder_config(**SIZES).with_fields({"encoder.latent_size": 32}),
    "bidirectional_separate": recurrent_config(400, 32, 1).with_fields(
        {"causal": False, "rnn.separate_directions": True, "tie_embeddings": False, "intermediate_size": 0}
    ),
    "none": word_vector_config(400, 16),
}


@dataclass(frozen=True)
class Place:
    """A directory with records of every kind, a tokenizer, and two base models."""

    folder: Path
    tokenizer: Tokenizer

    def segment(self, name: str, objective: Objective | None = None) -> ExamplesConfig:
        """Return small examples of a kind, with the advantages that the objective is trained with."""
        grouped = objective is not None and any(
            "advantage" in one.inputs and "returns" not in one.inputs for one in components(objective)
        )
        credit: Literal["gae", "rloo"] = "rloo" if grouped else "gae"
        changed = {
            "windows": WindowsConfig(max_length=16),
            "chunks": ChunksConfig(max_length=24),
            "segment_pairs": SegmentPairsConfig(max_length=24),
            "partially_labeled": PartiallyLabeledConfig(num_labeled=4),
            "pseudo_labeled": PseudoLabeledConfig(num_labeled=4, teacher=str(self.folder / "classifier")),
            "rollouts": RolloutsConfig(
                rollout_size=4, num_epochs=1, max_new_tokens=3, reward_function=("builtins:len",), advantages=credit
            ),
        }
        return changed.get(name) or EXAMPLES[name]()

    def cut(self, name: str, objective: Objective, config: ModelConfig) -> tuple[DatasetSplits, Objective]:
        """Return the datasets as a run builds them, and the configured objective."""
        file = next(path for path in sorted(self.folder.glob("*.*")) if name in path.stem.split("-"))
        start = str(self.folder / ("causal" if config.causal else "classifier"))
        source = DataConfig(path=(str(file),), split_by="line")
        place = self.folder / "cut" / (objectives.name_of(type(objective)) if name == "pseudo_labeled" else "")
        data = RunData(source, self.tokenizer, place, start=StartModel(start), batch_size=2, log=lambda _: None)
        examples = self.segment(name, objective)
        objective = objective.configure(lambda: examples.stats(data, objective.constraints.class_names), config)
        return examples.build(data, objective), objective


def random_sentence(rng: np.random.Generator, n: int = 9) -> str:
    return " ".join(rng.choice(WORDS, n))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder, rng = tmp_path_factory.mktemp("fed"), np.random.default_rng(0)
    some = [random_sentence(rng) for _ in range(24)]
    texts = folder / "windows-chunks-segment_pairs-word_windows.txt"
    texts.write_text("\n".join(f"{one}. {two}." for one in some for two in some[:4]))

    def write(name: str, record: Callable[[int], object]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(12)))

    write(
        "labeled-partially_labeled-pseudo_labeled-simulated_annotators",
        lambda i: {"text": some[i], "label": "ab"[i % 2]},
    )
    write("multi_annotator", lambda i: {"text": some[i], "labels": ["a", "b", "ab"[i % 2]]})
    write("scored", lambda i: {"text": some[i], "label": float(i)})
    write("tagged", lambda i: {"tokens": some[i].split(), "tags": ["a"] * len(some[i].split())})
    write("multiple_choice", lambda i: {"text": some[i], "options": ["swims", "sleeps"], "label": 1})
    write("dialogues-seq2seq-rollouts", lambda i: {"prompt": some[i], "completion": some[-i]})
    write("preferences-ref_logprobs", lambda i: {"prompt": some[i], "chosen": "swims", "rejected": "sleeps"})
    write("unpaired_preferences", lambda i: {"prompt": some[i], "completion": "swims", "label": i % 2 == 0})
    write("rankings", lambda i: {"prompt": some[i], "answers": ["swims", "sleeps", "otter"][: 2 + i % 2]})
    ids, ends = {"prompt": [60, 61], "chosen": [50, 51], "rejected": [50, 51]}, {"chosen": True, "rejected": True}
    texts_of = {"prompt": "y", "chosen": "x", "rejected": "x", "margin": 1.0}
    write("sampled_preferences", lambda i: texts_of | {"tokens": ids, "finished": ends})
    questions = [
        {"id": str(i), "question": "who?", "answers": {"text": ["otter"], "answer_start": [4]}} for i in range(6)
    ]
    write("questions", lambda i: questions[i % 6] | {"context": "the otter swims", "title": str(i)})
    train_tokenizer(
        [str(texts)], folder / "tok", algorithm="byte-bpe", vocab_size=400, num_sentinels=100, log=lambda _: None
    )
    tokenizer = Tokenizer.load(folder / "tok")
    for name, config, objective in (
        ("causal", SHAPES["causal"], objectives.find("ppo")()),
        ("classifier", SHAPES["any"], Classification(class_names=("a", "b")) + MLM()),
    ):
        torch.manual_seed(0)
        save_model(LM(config, objective.heads(config)), tokenizer, folder / name)
    return Place(folder, tokenizer)


def trained(place: Place, name: str, objective: Objective) -> dict[str, torch.Tensor]:
    """Train one step in fp32 and one in bf16; return the losses of the latter."""
    config = SHAPES[objective.attention]
    cut, objective = place.cut(name, objective, config)
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    cut.train.prepare(model, 0)
    vocab = place.tokenizer.vocab.with_decoder_start(config.encoder.decoder_start_token)
    batches = Batches(cut.train, objective, vocab, batch_size=2, seed=0).batches(0)
    step(model, objective, batches)
    return step(model, objective, batches, precision=casts("bf16", torch.device("cpu")))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_their_fields(place: Place, name: str) -> None:
    cut, _ = place.cut(name, Classification(class_names=("a", "b")), SHAPES["causal"])
    cut.train.prepare(LM(SHAPES["causal"], objectives.find("ppo")().heads(SHAPES["causal"])), 0)
    for i in range(len(cut.train)):
        missing = place.segment(name).fields - cut.train[i].keys()
        assert missing <= {"taught"} and not missing, (name, i, missing)


def test_ref_logprobs_report_missing_validation(place: Place) -> None:
    cut, _ = place.cut("ref_logprobs", objectives.find("dpo")(), SHAPES["causal"])
    assert cut.validation is None and "nothing is held out of 12" in cut.no_validation_reason


def suggestions(objective: Objective, segment: str, message: str) -> list[tuple[Objective, str]]:
    """Return the suggestions of an error: pairs of an objective and a kind of examples."""
    remedy = message.rpartition(": ")[2]
    if found := re.search(r"objective=\[(\w+), (\w+)\]", remedy):
        objective = objectives.find(found[1])() + objectives.find(found[2])()
    segments = re.findall(r"examples=(\w+)", remedy)
    return [(objective, name) for name in segments or [segment] * bool(found)]


@pytest.mark.slow
@pytest.mark.parametrize("segment", EXAMPLES)
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_accepted_combinations_train(place: Place, name: str, segment: str) -> None:
    objective = objectives.find(name)()
    try:
        check_fields(objective, place.segment(segment, objective))
    except UserError as refusal:
        message = str(refusal)
        assert f"objective {name} " in message and "\n" not in message
        remedies = suggestions(objective, segment, message)
        assert remedies
        for one, other in remedies:
            check_fields(one, place.segment(other, one))
        return
    terms = trained(place, segment, objective)
    assert all(torch.isfinite(value) for value in terms.values()) and terms.keys() >= objective.labels.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_accepted_sums_train(place: Place, name: str) -> None:
    """Components in the written order, on the first kind of examples with the inputs of both."""
    trained_with = 0
    for other in objectives.OBJECTIVES:
        try:
            both = objectives.find(name)() + objectives.find(other)()
        except UserError:
            continue
        for segment in EXAMPLES:
            try:
                check_pattern(both, SHAPES[both.attention])
                check_fields(both, place.segment(segment, both), SHAPES[both.attention])
            except UserError:
                continue
            try:
                assert trained(place, segment, both).keys() >= both.labels.keys()
            except UserError as refusal:  # the attention pattern was open until the model was known
                assert str(refusal).startswith(f"cannot add {name}+{other}: one reads")  # noqa: PT017
            trained_with += 1
            break
    assert trained_with or name in ("sbo", "penalty", "word2vec", "vae", "mixed", "ranking")
