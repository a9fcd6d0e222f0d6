"""Training speed of a masked language model on sentences of varied length, in useful tokens per second, CPU.

    python -m bench.speed.masked                 # nine rounds, a table for docs/results/index.md
    python -m bench.speed.masked --check         # equal sizes, equal sentences, first losses near ln 8192; no timing

A sentence is [CLS], about 25 tokens on average and at most 126, [SEP]; a step is 64 sentences; the model has 6 layers
of hidden size 384. Useful tokens are those of the sentences, without padding. Candidates: `BertForMaskedLM` in a `Trainer`
with `DataCollatorForLanguageModeling` and their defaults (padded to the longest of the batch), the same with bf16=True and
length grouping, the same with length grouping alone (the best choice on a CPU without bf16 instructions), and firth: packed
rows, its head only at supervised positions. Dropout is off, and the peers have the same batch, steps and optimizer; masking
and batching count for all.

The lengths are drawn from a log-normal distribution fitted to English prose (median 22, mean about 27, at most 128 with
[CLS] and [SEP]), the tokens by Zipf's law: speed does not depend on the text.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.harness import EndSample, arguments, command
from bench.speed.causal import HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS, VOCAB_SIZE, firth_run

MAX_LENGTH, ROWS, STEPS_PER_SAMPLE, NUM_SENTENCES = 128, 64, 6, 16384
PAD, UNK, CLS, SEP, MASK, FIRST = 0, 1, 2, 3, 4, 107
MLM_PROBABILITY = 0.15
GROUPED_STEPS = 50
"""Steps per sample with length grouping: the sampler sorts as many batches at a time, the longest sentences first, so a
shorter sample would measure the longest sentences alone."""


def sentences(n: int = NUM_SENTENCES, seed: int = 0) -> list[np.ndarray]:
    """Return sentences with [CLS] and [SEP], int64 ids: lengths log-normal, tokens Zipf over the ordinary ids."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(math.log(20), 0.65, n).round().astype(int), 2, MAX_LENGTH - 2)
    probabilities = 1 / np.arange(1, VOCAB_SIZE - FIRST + 1)
    text = rng.choice(np.arange(FIRST, VOCAB_SIZE), size=lengths.sum(), p=probabilities / probabilities.sum())
    return [np.concatenate(([CLS], part, [SEP])) for part in np.split(text, np.cumsum(lengths)[:-1])]


# ------------------------------------------------------------------------------- transformers


def hf_tokenizer(directory: Path) -> Any:
    """Return a tokenizer for the collator, which needs special ids and padding. Words are named after their ids."""
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = names + [f"w{i}" for i in range(len(names), VOCAB_SIZE)]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer.from_pretrained(directory)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)) == (PAD, MASK, VOCAB_SIZE)
    return tokenizer


def hf_model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_hidden_layers=NUM_LAYERS, num_attention_heads=NUM_HEADS,
            intermediate_size=4 * HIDDEN_SIZE, max_position_embeddings=MAX_LENGTH, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=PAD,
        )
    )  # fmt: skip


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Data set for `Trainer`: token ids; the collator pads and masks."""

    def __init__(self) -> None:
        self.rows = [row.tolist() for row in sentences()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[i]}


def end_sample_callback(model: Any, steps_per_sample: int, end_sample: EndSample) -> Any:
    """Return a Trainer callback that ends a sample every `steps_per_sample` steps, with the tokens that are not padding."""
    from transformers import TrainerCallback

    useful = [0]

    def count(_: object, __: object, fields: dict[str, Tensor]) -> None:
        useful[0] += int(fields["attention_mask"].sum())

    model.register_forward_pre_hook(count, with_kwargs=True)

    class EndSampleCallback(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
            if state.global_step % steps_per_sample == 0:  # type: ignore[attr-defined]
                end_sample(useful[0])
                useful[0] = 0

    return EndSampleCallback()


def trainer(end_sample: EndSample, steps_per_sample: int = STEPS_PER_SAMPLE, **chosen: Any) -> None:
    """Run transformers' Trainer; useful tokens are counted in the model's input. A sample is `steps_per_sample` steps."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model = hf_model()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = hf_tokenizer(Path(directory))
        arguments = TrainingArguments(
            directory, per_device_train_batch_size=ROWS, max_steps=1_000_000, use_cpu=True, save_strategy="no",
            disable_tqdm=True, **chosen,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY)
        Trainer(
            model,
            arguments,
            train_dataset=Sentences(),
            data_collator=collator,
            callbacks=[end_sample_callback(model, steps_per_sample, end_sample)],
        ).train()


def trainer_default(end_sample: EndSample) -> None:
    trainer(end_sample)


def trainer_grouped(end_sample: EndSample) -> None:
    trainer(end_sample, GROUPED_STEPS, train_sampling_strategy="group_by_length")


def trainer_bf16_grouped(end_sample: EndSample) -> None:
    trainer(end_sample, GROUPED_STEPS, bf16=True, train_sampling_strategy="group_by_length")


# ------------------------------------------------------------------------------- firth


def firth_setup(bert: bool = False) -> tuple[Any, Any, Any]:
    """Return (model, objective, batches) of the default encoder, or of the peer's BERT, on packed sentences."""
    from firth.data.collate import Batches
    from firth.data.source import Source
    from firth.model.config import ModelConfig, encoder_config
    from firth.model.config_groups import EmbeddingConfig, LMHeadConfig, NormConfig
    from firth.model.model import LM
    from firth.objectives.masked_lm import MLM
    from firth.tokenizer.vocab import Vocab
    from firth.types import Example

    class SentenceSource(Source):
        rows = sentences()

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Example:
            return {"tokens": self.rows[i]}

    torch.manual_seed(0)
    objective = MLM()
    config = encoder_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        max_positions=MAX_LENGTH,
        intermediate_size=8 * HIDDEN_SIZE // 3,
    )
    if bert:
        config = ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            num_layers=NUM_LAYERS,
            num_heads=NUM_HEADS,
            max_positions=MAX_LENGTH,
            norm=NormConfig(placement="post", eps=1e-12, embedding=True),
            embedding=EmbeddingConfig(type_vocab_size=2),
            activation="gelu",
            lm_head=LMHeadConfig("transform", bias=True),
        )
    roles = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK}
    vocab = Vocab(size=VOCAB_SIZE, roles=roles, special=np.arange(VOCAB_SIZE) < FIRST)
    model = LM(config, objective.heads(config))
    return (
        model,
        objective,
        Batches(SentenceSource(), objective, vocab, batch_size=ROWS, seed=0, pack_to_length=MAX_LENGTH),
    )


def firth_masked(end_sample: EndSample, bert: bool = False, optimizer: Literal["muon", "adamw"] = "muon") -> None:
    model, objective, batches = firth_setup(bert)
    lengths = np.array([len(row) for row in batches.source.rows])

    def useful(step: int) -> int:
        """Return the tokens of the sentences of the last STEPS_PER_SAMPLE steps."""
        positions = np.arange((step - STEPS_PER_SAMPLE) * ROWS, step * ROWS)
        return int(lengths[batches.source.order(batches.seed, positions)[1]].sum())

    firth_run(end_sample, optimizer, useful, (model, objective, batches), STEPS_PER_SAMPLE)


def firth_bert(end_sample: EndSample) -> None:
    firth_masked(end_sample, bert=True)


def firth_bert_adamw(end_sample: EndSample) -> None:
    firth_masked(end_sample, bert=True, optimizer="adamw")


CANDIDATES: dict[str, Callable[[EndSample], None]] = {
    "BertForMaskedLM in Trainer": trainer_default,
    "the same, length grouping": trainer_grouped,
    "the same, bf16 and length grouping": trainer_bf16_grouped,
    "firth, the same BERT and AdamW": firth_bert_adamw,
    "firth, the same BERT": firth_bert,
    "firth": firth_masked,
}


def check() -> None:
    """Assert that the comparison is fair: equal sizes and sentences, 15% masked, first losses near ln(vocabulary)."""
    from firth.training.step import count_targets

    rows = sentences()
    lengths = np.array([len(row) for row in rows])
    assert 26 < lengths.mean() < 28, lengths.mean()
    assert lengths.max() == MAX_LENGTH, lengths.max()
    theirs = hf_model()
    sizes = {"transformers": sum(p.numel() for p in theirs.parameters())}
    some = [torch.from_numpy(row)[None] for row in rows[:8]]
    with torch.no_grad():
        first = {"transformers": np.mean([theirs(input_ids=r, labels=r).loss.item() for r in some])}
        for name, bert in (("firth, the same BERT", True), ("firth", False)):
            model, objective, batches = firth_setup(bert)
            sizes[name] = sum(p.numel() for p in model.parameters())
            num_labels = useful = slots = 0.0
            for number in range(20):
                [batch] = batches.batches(number)
                num_labels += count_targets(objective, [batch])["tokens"].item()
                useful += int((batch["document_ids"] > 0).sum())
                slots += batch["tokens"].numel()
            read = batches.source.order(0, np.arange(20 * ROWS))[1]
            assert useful == lengths[read].sum(), "firth packed other tokens than those of the sentences"
            masked = num_labels / (useful - 2 * 20 * ROWS)
            assert abs(masked - MLM_PROBABILITY) < 0.01, f"{masked:.3f} of the tokens are masked"
            n = count_targets(objective, [batch])["tokens"].item()
            first[name] = objective.loss(model, objective.forward(model, batch), batch)["tokens"].item() / n
    assert sizes["transformers"] == sizes["firth, the same BERT"], sizes
    for name, loss in first.items():
        assert abs(loss - math.log(VOCAB_SIZE)) < 0.3, f"{name} starts at {loss:.3f}, not at ln {VOCAB_SIZE}"
    padded = np.mean(
        [lengths[i : i + ROWS].max() * ROWS / lengths[i : i + ROWS].sum() for i in range(0, NUM_SENTENCES, ROWS)]
    )
    print(f"parameters {sizes}")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in first.items())
    print(f"first losses: {losses}; ln {VOCAB_SIZE} = {math.log(VOCAB_SIZE):.3f}")
    print(f"mean length {lengths.mean():.1f}; slots per useful token: {padded:.2f} padded, {slots / useful:.2f} packed")


def main() -> None:
    args = arguments(__doc__, CANDIDATES).parse_args()
    if args.check:
        check()
    else:
        command(args, CANDIDATES, unit="useful tokens")


if __name__ == "__main__":
    main()
