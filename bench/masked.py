"""Masked language modelling on sentences of varied length: useful tokens per second, CPU.

    python -m bench.masked                 # nine rounds, a table for docs/results/index.md
    python -m bench.masked --check         # equal sizes, equal sentences, first losses near ln 8192; no timing

A sentence is [CLS], about 25 tokens on average and at most 126, [SEP]; a step is 64 sentences; the model has 6 layers
of width 384. Useful tokens are those of the sentences: padding is work that nobody asked for. Contenders:
`BertForMaskedLM` in a `Trainer` with `DataCollatorForLanguageModeling` as they come (padded to the longest of the
batch), the same with bf16=True and length grouping, the same with length grouping alone (what a user of a CPU without
bf16 instructions would choose), and firth: packed rows, its head only where a token is asked. Dropout is off and the
peers' batch, steps and optimizer are the same; every contender pays for masking and batching.

The lengths are drawn from a log-normal distribution fitted to English prose (median 22, mean about 27, at most 128
with the frame), the tokens by Zipf's law: what the text says does not change the speed.
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

from bench.causal import DEPTH, HEADS, VOCAB, WIDTH, firth_run
from bench.harness import Turn, arguments, command

LONGEST, ROWS, SHARE, STORE = 128, 64, 6, 16384
PAD, UNK, CLS, SEP, MASK, FIRST = 0, 1, 2, 3, 4, 107
RATE = 0.15
GROUP = 50
"""Steps of a turn that is grouped by length: the sampler sorts as many batches at a time, the longest sentences first, so that
fewer would be measured on the longest alone."""


def sentences(n: int = STORE, seed: int = 0) -> list[np.ndarray]:
    """Framed sentences, int64 ids: lengths log-normal, tokens Zipf over the ordinary ids."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(math.log(20), 0.65, n).round().astype(int), 2, LONGEST - 2)
    chance = 1 / np.arange(1, VOCAB - FIRST + 1)
    text = rng.choice(np.arange(FIRST, VOCAB), size=lengths.sum(), p=chance / chance.sum())
    return [np.concatenate(([CLS], part, [SEP])) for part in np.split(text, np.cumsum(lengths)[:-1])]


# ------------------------------------------------------------------------------- transformers


def hf_tokenizer(directory: Path) -> Any:
    """What the collator needs of a tokenizer: ids of the specials, padding. Its words are their ids' names."""
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = names + [f"w{i}" for i in range(len(names), VOCAB)]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer.from_pretrained(directory)
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)) == (PAD, MASK, VOCAB)
    return tokenizer


def hf_model() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH, max_position_embeddings=LONGEST, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=PAD,
        )
    )  # fmt: skip


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a user hands to `Trainer`: token ids; the collator pads and masks."""

    def __init__(self) -> None:
        self.rows = [row.tolist() for row in sentences()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[i]}


def useful_turns(model: Any, share: int, turn: Turn) -> Any:
    """A callback of a Trainer that ends its turn every `share` steps, telling the tokens that were no padding."""
    from transformers import TrainerCallback

    useful = [0]

    def count(_: object, __: object, fields: dict[str, Tensor]) -> None:
        useful[0] += int(fields["attention_mask"].sum())

    model.register_forward_pre_hook(count, with_kwargs=True)

    class Turns(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
            if state.global_step % share == 0:  # type: ignore[attr-defined]
                turn(useful[0])
                useful[0] = 0

    return Turns()


def trainer(turn: Turn, share: int = SHARE, **chosen: Any) -> None:
    """transformers' Trainer; useful tokens are counted where the model reads them. A turn is `share` steps."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model = hf_model()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = hf_tokenizer(Path(directory))
        arguments = TrainingArguments(
            directory, per_device_train_batch_size=ROWS, max_steps=1_000_000, use_cpu=True, save_strategy="no",
            disable_tqdm=True, **chosen,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE)
        Trainer(
            model, arguments, train_dataset=Sentences(), data_collator=collator, callbacks=[useful_turns(model, share, turn)]
        ).train()  # fmt: skip


def trainer_default(turn: Turn) -> None:
    trainer(turn)


def trainer_grouped(turn: Turn) -> None:
    trainer(turn, GROUP, train_sampling_strategy="group_by_length")


def trainer_bf16_grouped(turn: Turn) -> None:
    trainer(turn, GROUP, bf16=True, train_sampling_strategy="group_by_length")


# ------------------------------------------------------------------------------- firth


def firth_parts(bert: bool = False) -> tuple[Any, Any, Any]:
    """(model, objective, batches): the default encoder, or the peer's own BERT, on these sentences in packed rows."""
    from firth.data.collate import Batches
    from firth.data.source import Source
    from firth.model.config import ModelConfig, encoder_config
    from firth.model.model import LM
    from firth.objectives.masked_lm import MLM
    from firth.tokenizer.vocab import Vocab
    from firth.types import Example

    class Framed(Source):
        rows = sentences()

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> Example:
            return {"tokens": self.rows[i]}

    torch.manual_seed(0)
    objective = MLM()
    config = encoder_config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=DEPTH,
        num_heads=HEADS,
        max_positions=LONGEST,
        intermediate_size=8 * WIDTH // 3,
    )
    if bert:
        config = ModelConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_layers=DEPTH,
            num_heads=HEADS,
            max_positions=LONGEST,
            norm_placement="post",
            norm_eps=1e-12,
            embedding_norm=True,
            type_vocab_size=2,
            activation="gelu",
            lm_head="transform",
            lm_head_bias=True,
        )
    roles = {"pad": PAD, "unk": UNK, "cls": CLS, "sep": SEP, "mask": MASK}
    vocab = Vocab(size=VOCAB, roles=roles, special=np.arange(VOCAB) < FIRST)
    model = LM(config, objective.heads(config))
    return model, objective, Batches(Framed(), objective, vocab, batch_size=ROWS, seed=0, pack_to_length=LONGEST)


def firth_masked(turn: Turn, bert: bool = False, optimizer: Literal["muon", "adamw"] = "muon") -> None:
    model, objective, batches = firth_parts(bert)
    lengths = np.array([len(row) for row in batches.source.rows])

    def useful(step: int) -> int:
        """Tokens of the sentences of the last SHARE steps."""
        positions = np.arange((step - SHARE) * ROWS, step * ROWS)
        return int(lengths[batches.source.order(batches.seed, positions)[1]].sum())

    firth_run(turn, optimizer, useful, (model, objective, batches), SHARE)


def firth_bert(turn: Turn) -> None:
    firth_masked(turn, bert=True)


def firth_bert_adamw(turn: Turn) -> None:
    firth_masked(turn, bert=True, optimizer="adamw")


CONTENDERS: dict[str, Callable[[Turn], None]] = {
    "BertForMaskedLM in Trainer": trainer_default,
    "the same, length grouping": trainer_grouped,
    "the same, bf16 and length grouping": trainer_bf16_grouped,
    "firth, the same BERT and AdamW": firth_bert_adamw,
    "firth, the same BERT": firth_bert,
    "firth": firth_masked,
}


def check() -> None:
    """What makes the comparison fair, asserted: sizes, sentences, 15% asked, first losses at ln(vocabulary)."""
    from firth.train.step import count_targets

    rows = sentences()
    lengths = np.array([len(row) for row in rows])
    assert 26 < lengths.mean() < 28, lengths.mean()
    assert lengths.max() == LONGEST, lengths.max()
    theirs = hf_model()
    sizes = {"transformers": sum(p.numel() for p in theirs.parameters())}
    some = [torch.from_numpy(row)[None] for row in rows[:8]]
    with torch.no_grad():
        first = {"transformers": np.mean([theirs(input_ids=r, labels=r).loss.item() for r in some])}
        for name, bert in (("firth, the same BERT", True), ("firth", False)):
            model, objective, batches = firth_parts(bert)
            sizes[name] = sum(p.numel() for p in model.parameters())
            asked = useful = slots = 0.0
            for number in range(20):
                [batch] = batches.batches(number)
                asked += count_targets(objective, [batch])["tokens"].item()
                useful += int((batch["document_ids"] > 0).sum())
                slots += batch["tokens"].numel()
            mine = batches.source.order(0, np.arange(20 * ROWS))[1]
            assert useful == lengths[mine].sum(), "firth packed other tokens than the sentences'"
            assert abs(asked / (useful - 2 * 20 * ROWS) - RATE) < 0.01, f"{asked / useful:.3f} of the tokens are asked"
            n = count_targets(objective, [batch])["tokens"].item()
            first[name] = objective.loss(model, objective.run(model, batch), batch)["tokens"].item() / n
    assert sizes["transformers"] == sizes["firth, the same BERT"], sizes
    for name, loss in first.items():
        assert abs(loss - math.log(VOCAB)) < 0.3, f"{name} starts at {loss:.3f}, not at ln {VOCAB}"
    padded = np.mean([lengths[i : i + ROWS].max() * ROWS / lengths[i : i + ROWS].sum() for i in range(0, STORE, ROWS)])
    print(f"parameters {sizes}")
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in first.items())
    print(f"first losses: {shown}; ln {VOCAB} = {math.log(VOCAB):.3f}")
    print(f"mean length {lengths.mean():.1f}; slots per useful token: {padded:.2f} padded, {slots / useful:.2f} packed")


def main() -> None:
    given = arguments(__doc__, CONTENDERS).parse_args()
    if given.check:
        check()
    else:
        command(given, CONTENDERS, unit="useful tokens")


if __name__ == "__main__":
    main()
