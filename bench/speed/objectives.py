"""Training speed of each objective against a plain PyTorch loop around transformers' class of the same size.

    python -m bench.speed.objectives                    # every row of the table, about 15 minutes on two cores
    python -m bench.speed.objectives --only t5 bart     # some
    python -m bench.speed.objectives --check
    python -m bench.speed.objectives --profile xlnet    # where a step of firth and of the peer spends its time

A row is the tiny recipe of that name: its own batches of real text (made before the timing starts, on both sides), its
step, its optimizer, and the precision that it chooses on this machine. The peer gets the same examples, padded, with the
same labels, AdamW, gradient clipping and no dropout: a loop written by hand around the library. It runs twice, in fp32 and
in bf16 autocast; the ratio is to the faster of the two. Hidden size, layers, heads and vocabulary are the same; where
firth's MLP is gated it is half as wide, which gives as many parameters. Tokens are those of the examples, without padding
and queries. Where the library has no such objective, the peer is the nearest one: SpanBERT without span boundaries, MPNet
with masks alone; the peer of the LSTM is written with torch.nn. Rows with empty columns have no peer.

Ratios are medians over interleaved rounds (`bench.harness`); absolute speeds hold for the machine in the last line.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Candidate, EndSample, Report, compare, describe
from firth.data.collate import Batches, collate
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.runs import examples
from firth.runs.build_model import init_head
from firth.runs.prepare import RunData
from firth.runs.recipe import Recipe, load
from firth.runs.tokenizer import tokenizer_of
from firth.training.device import casts, choose_precision, keep_freed_memory
from firth.training.optimizer import Optimizer
from firth.training.step import step
from firth.types import IGNORE, NEVER, Batch

CPU = torch.device("cpu")

NUM_BATCHES, STEPS_PER_SAMPLE = 8, 8
"""Batches that each side cycles through, and steps per sample."""

FOLDER = Path("runs/objectives")
"""Directory of the token stores and tokenizers."""


def prepare(name: str) -> tuple[Recipe, Objective, Batches]:
    """Return the resolved tiny recipe, its objective and its batches."""
    recipe = load(name)
    folder = FOLDER / recipe.tokenizer.algorithm
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(recipe, folder, lambda _: None)
    assert recipe.model is not None
    data = RunData(
        recipe.data,
        tokenizer,
        folder,
        batch_size=recipe.batch.size,
        memory_length=recipe.model.attention.memory_length,
        log=lambda _: None,
    )
    splits = examples.build_datasets(recipe.examples, data, recipe.objective)
    batches = Batches(
        splits.train,
        recipe.objective,
        tokenizer.vocab.with_decoder_start(recipe.model.encoder.decoder_start_token),
        batch_size=recipe.batch.size,
        seed=0,
        pack_to_length=recipe.batch.pack_to_length,
    )
    return recipe, recipe.objective, batches


def padded_examples(batches: Batches, number: int) -> Batch:
    """Return the examples of a step as the peer reads them: one per row."""
    epochs, indices = batches.source.order(
        batches.seed, torch.arange(batches.batch_size).numpy() + number * batches.batch_size
    )
    fields = frozenset({*batches.objective.labels.values(), *batches.objective.metrics.values()})
    return collate(batches.shown(epochs, indices), fields)


def count_tokens(batch: Batch) -> int:
    """Return the tokens of the examples, without padding, queries and mask tokens appended to a text."""
    total = 0
    for side in ("", "source_"):
        if side + "tokens" in batch:
            key_time = batch.get(side + "key_time", torch.zeros_like(batch[side + "tokens"]))
            key_expiry = batch.get(side + "key_expiry", torch.full_like(key_time, NEVER))
            total += int(((key_time != NEVER) & (key_expiry == NEVER)).sum())
    return total


def ours(name: str) -> Iterator[int]:
    """Take firth's step on the recipe's batches forever; yield the tokens of each."""
    keep_freed_memory()
    recipe, objective, batches = prepare(name)
    assert recipe.model is not None
    torch.manual_seed(0)
    model = LM(recipe.model, objective.heads(recipe.model))
    init_head(model, objective, batches)
    optimizer = Optimizer(recipe.optimizer, model, sparse=True)
    precision = casts(choose_precision(recipe.precision, CPU), CPU)
    pool = [(batches.batches(i), count_tokens(padded_examples(batches, i))) for i in range(NUM_BATCHES)]
    model.train()
    for number in count():
        batch, tokens = pool[number % NUM_BATCHES]
        step(model, objective, batch, precision=precision)
        optimizer.clip_grad_norm()
        optimizer.step(0.1)
        yield tokens


def theirs(name: str, precision: Literal["fp32", "bf16"]) -> Iterator[int]:
    """Take the step of a plain loop around the peer's model forever; yield the tokens of each."""
    recipe, _, batches = prepare(name)
    torch.manual_seed(0)
    model, loss = PEERS[name](recipe)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    pool = [(batch, count_tokens(batch)) for batch in (padded_examples(batches, i) for i in range(NUM_BATCHES))]
    for number in count():
        batch, tokens = pool[number % NUM_BATCHES]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield tokens


def run_samples(end_sample: EndSample, side: Callable[[], Iterator[int]]) -> None:
    """Run samples of STEPS_PER_SAMPLE steps."""
    steps = side()
    while True:
        end_sample(sum(islice(steps, STEPS_PER_SAMPLE)))


# ------------------------------------------------------------------------------- peers

Peer = tuple[nn.Module, Callable[[Batch], Tensor]]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def attention_mask(batch: Batch, side: str = "") -> Tensor:
    """Return the attention mask of transformers."""
    tokens = batch[side + "tokens"]
    return (batch.get(side + "key_time", torch.zeros_like(tokens)) != NEVER).long()


def sizes(recipe: Recipe) -> dict[str, Any]:
    """Return the sizes as arguments of a config like BERT's; a gated MLP counts as one of twice the size."""
    s = recipe.model
    assert s is not None
    intermediate_size = s.intermediate_size * 2 if s.gated else s.intermediate_size
    return {
        "vocab_size": s.vocab_size, "hidden_size": s.hidden_size, "num_hidden_layers": s.num_layers, "num_attention_heads": s.num_heads,
        "intermediate_size": intermediate_size, "max_position_embeddings": s.max_positions + 2, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def causal(kind: str, recipe: Recipe) -> Peer:
    import transformers as t

    s = recipe.model
    assert s is not None
    model: Any
    if kind == "llama":
        config = t.LlamaConfig(
            vocab_size=s.vocab_size, hidden_size=s.hidden_size, num_hidden_layers=s.num_layers, num_attention_heads=s.num_heads,
            intermediate_size=s.intermediate_size, max_position_embeddings=s.max_positions,
        )  # fmt: skip
        model = t.LlamaForCausalLM(config)
    else:
        config = t.GPT2Config(
            vocab_size=s.vocab_size, n_embd=s.hidden_size, n_layer=s.num_layers, n_head=s.num_heads, n_inner=s.intermediate_size,
            n_positions=s.max_positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = t.GPT2LMHeadModel(config)
    return model, lambda b: mean_loss(
        model(input_ids=b["tokens"], attention_mask=attention_mask(b)).logits, b["labels"]
    )


def masked(kind: str, recipe: Recipe) -> Peer:
    """Return the masked LM of BERT or MPNet."""
    import transformers as t

    s = recipe.model
    assert s is not None
    model: Any
    if kind == "mpnet":
        model = t.MPNetForMaskedLM(t.MPNetConfig(**sizes(recipe)))
    else:
        model = t.BertForMaskedLM(t.BertConfig(**sizes(recipe)))

    def loss(batch: Batch) -> Tensor:
        if "key_expiry" not in batch:
            return mean_loss(
                model(input_ids=batch["tokens"], attention_mask=attention_mask(batch)).logits, batch["labels"]
            )
        # MPNet's row is the text, mask tokens and queries. The peer gets the text with its masks.
        rows = int(((batch["key_expiry"] == NEVER) & (batch["key_time"] != NEVER)).sum(-1).max())
        tokens, labels = batch["tokens"][:, :rows].clone(), torch.full_like(batch["tokens"][:, :rows], IGNORE)
        row, slot = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        position = batch["positions"][row, slot].long()
        tokens[row, position], labels[row, position] = batch["tokens"][row, slot], batch["labels"][row, slot]
        return mean_loss(model(input_ids=tokens, attention_mask=attention_mask(batch)[:, :rows]).logits, labels)

    return model, loss


def sentence_pairs(kind: str, recipe: Recipe) -> Peer:
    """Return the pretraining model of BERT or ALBERT, with both losses."""
    import transformers as t

    s = recipe.model
    assert s is not None
    model: Any
    if kind == "albert":
        model = t.AlbertForPreTraining(
            t.AlbertConfig(**sizes(recipe), embedding_size=s.embedding.size, classifier_dropout_prob=0.0)
        )
    else:
        model = t.BertForPreTraining(t.BertConfig(**sizes(recipe)))
    field = "order" if kind == "albert" else "next"

    def loss(batch: Batch) -> Tensor:
        out = model(
            input_ids=batch["tokens"], attention_mask=attention_mask(batch), token_type_ids=batch["token_type_ids"]
        )
        second = out.sop_logits if kind == "albert" else out.seq_relationship_logits
        return mean_loss(out.prediction_logits, batch["labels"]) + F.cross_entropy(second, batch[field][:, 0])

    return model, loss


def electra(recipe: Recipe) -> Peer:
    """Return generator and discriminator, which share their token embeddings."""
    import transformers as t

    s = recipe.model
    assert s is not None
    objective: Any = recipe.objective
    large = sizes(recipe) | {"embedding_size": s.embedding.size or s.hidden_size}
    small = large | {
        "hidden_size": round(s.hidden_size * objective.generator_size),
        "intermediate_size": round(large["intermediate_size"] * objective.generator_size),
    }  # fmt: skip
    small["num_attention_heads"] = max(1, small["hidden_size"] // (s.hidden_size // s.num_heads))
    while small["hidden_size"] % small["num_attention_heads"]:
        small["num_attention_heads"] -= 1
    model = nn.ModuleDict(
        {
            "generator": t.ElectraForMaskedLM(t.ElectraConfig(**small)),
            "discriminator": t.ElectraForPreTraining(t.ElectraConfig(**large)),
        }
    )
    model["discriminator"].electra.embeddings.word_embeddings = model["generator"].electra.embeddings.word_embeddings

    def loss(batch: Batch) -> Tensor:
        tokens, labels, mask = batch["tokens"], batch["labels"], attention_mask(batch)
        logits = model["generator"](input_ids=tokens, attention_mask=mask).logits
        masked = labels != IGNORE
        with torch.no_grad():
            sampled = torch.multinomial(logits[masked].softmax(-1), 1)[:, 0]
            corrupted, replaced = tokens.clone(), torch.zeros_like(tokens)
            corrupted[masked] = sampled
            replaced[masked] = (sampled != labels[masked]).long()
        judge_loss = model["discriminator"](input_ids=corrupted, attention_mask=mask, labels=replaced).loss
        return mean_loss(logits, labels) + 50 * judge_loss

    return model, loss


def xlnet(recipe: Recipe) -> Peer:
    """Return XLNet with both streams, permutation masks and target mappings; without memory, which the library carries over."""
    import transformers as t

    s = recipe.model
    assert s is not None
    config = t.XLNetConfig(
        vocab_size=s.vocab_size,
        d_model=s.hidden_size,
        n_layer=s.num_layers,
        n_head=s.num_heads,
        d_inner=2 * s.intermediate_size,
        dropout=0.0,
    )
    model = t.XLNetLMHeadModel(config)

    def loss(batch: Batch) -> Tensor:
        queries = int((batch["labels"] != IGNORE).sum(-1).max())
        n = batch["tokens"].shape[1] - queries
        key_time, query_time = batch["key_time"][:, :n], batch["query_time"][:, :n]
        perm_mask = (key_time[:, None, :] > query_time[:, :, None]).float()
        labels = batch["labels"][:, n:]
        target_mapping = F.one_hot(batch["positions"][:, n:].long().clamp(0, n - 1), n).float()
        out = model(input_ids=batch["tokens"][:, :n], perm_mask=perm_mask, target_mapping=target_mapping)
        return mean_loss(out.logits, labels)

    return model, loss


def encoder_decoder(kind: str, recipe: Recipe) -> Peer:
    """Return BART or T5."""
    import transformers as t

    s = recipe.model
    assert s is not None
    model: Any
    if kind == "bart":
        config = t.BartConfig(
            vocab_size=s.vocab_size, d_model=s.hidden_size, encoder_layers=s.encoder.num_layers, decoder_layers=s.num_layers,
            encoder_attention_heads=s.num_heads, decoder_attention_heads=s.num_heads, encoder_ffn_dim=2 * s.intermediate_size,
            decoder_ffn_dim=2 * s.intermediate_size, max_position_embeddings=s.max_positions, dropout=0.0,
        )  # fmt: skip
        model = t.BartForConditionalGeneration(config)
    else:
        config = t.T5Config(
            vocab_size=s.vocab_size, d_model=s.hidden_size, d_kv=s.head_dim, d_ff=s.intermediate_size, num_layers=s.encoder.num_layers,
            num_decoder_layers=s.num_layers, num_heads=s.num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )  # fmt: skip
        model = t.T5ForConditionalGeneration(config)

    def loss(batch: Batch) -> Tensor:
        out = model(
            input_ids=batch["source_tokens"],
            attention_mask=attention_mask(batch, "source_"),
            decoder_input_ids=batch["tokens"],
        )
        return mean_loss(out.logits, batch["labels"])

    return model, loss


class PlainLSTM(nn.Module):
    """LSTM language model written with torch.nn."""

    def __init__(self, vocab: int, width: int, depth: int):
        super().__init__()
        self.table, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(self.table(tokens))[0])
        return out


def recurrent(recipe: Recipe) -> Peer:
    s = recipe.model
    assert s is not None
    model = PlainLSTM(s.vocab_size, s.hidden_size, s.num_layers)
    return model, lambda b: mean_loss(model(b["tokens"]), b["labels"])


PEERS: dict[str, Callable[[Recipe], Peer]] = {
    "gpt": partial(causal, "gpt2"),
    "gpt2": partial(causal, "gpt2"),
    "llama": partial(causal, "llama"),
    "bert": partial(sentence_pairs, "bert"),
    "roberta": partial(masked, "bert"),
    "spanbert": partial(masked, "bert"),
    "albert": partial(sentence_pairs, "albert"),
    "electra": electra,
    "xlnet": xlnet,
    "mpnet": partial(masked, "mpnet"),
    "t5": partial(encoder_decoder, "t5"),
    "bart": partial(encoder_decoder, "bart"),
    "lstm": recurrent,
}
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
"""Precisions of a peer."""

WITHOUT_PEER = ("prefix_lm", "linformer", "elmo", "contrastive", "vae")
"""Recipes without a peer."""


def check(names: Sequence[str]) -> None:
    """Assert that both sides have as many labels, and print the peers' first losses, near ln(vocabulary)."""
    for name in (name for name in PEERS if name in names):
        recipe, objective, batches = prepare(name)
        model, loss = PEERS[name](recipe)
        batch = padded_examples(batches, 0)
        num_labels = [int((b[objective.labels[t]] != IGNORE).sum()) for t in objective.labels for b in (batch,)]
        packed = sum(
            int((b[objective.labels[t]] != IGNORE).sum()) for t in objective.labels for b in batches.batches(0)
        )
        assert sum(num_labels) == packed, (name, num_labels, packed)
        first, numbers = loss(batch).item(), sum(p.numel() for p in model.parameters())
        assert recipe.model is not None
        num_parameters = sum(p.numel() for p in LM(recipe.model, objective.heads(recipe.model)).parameters())
        print(
            f"{name:10} tokens {count_tokens(batch):6,}  peer's first loss {first:6.2f}  parameters {numbers:,}, firth's {num_parameters:,}"
        )


def row(name: str, rounds: int) -> tuple[str, Report]:
    """Measure a recipe; return its line of the table, and the report."""
    candidates: dict[str, Candidate] = {}
    if name in PEERS:
        candidates = {p: partial(run_samples, side=partial(theirs, name, p)) for p in PRECISIONS}
    candidates["firth"] = partial(run_samples, side=partial(ours, name))
    report = compare(candidates, rounds=rounds, peer=next(iter(candidates)))
    if not report.rounds:
        return f"| {name} | no clean round | | | |", report
    speed = {side: statistics.median(report.rates(side)) for side in candidates}
    if name not in PEERS:
        return f"| {name} | {speed['firth']:,.0f} | | | |", report
    middle, low, high = report.ratio("firth", max(PRECISIONS, key=lambda p: speed[p]))
    ratio = f"**{middle:.2f}x** ({low:.2f} to {high:.2f})"
    return (
        f"| {name} | {speed['firth']:,.0f} | {' | '.join(f'{speed[p]:,.0f}' for p in PRECISIONS)} | {ratio} |",
        report,
    )


def profile(name: str, rows: int = 40) -> None:
    """Print the operators in which a step of each side spends its time."""
    sides = {"firth": ours(name)} | ({p: theirs(name, p) for p in PRECISIONS} if name in PEERS else {})
    for side, steps in sides.items():
        for _ in islice(steps, NUM_BATCHES):
            pass
        with torch.profiler.profile() as found:
            for _ in islice(steps, NUM_BATCHES):
                pass
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60)
        print(f"{name}, {side}, {NUM_BATCHES} steps\n{table}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*PEERS, *WITHOUT_PEER], default=[*PEERS, *WITHOUT_PEER])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--profile", choices=[*PEERS, *WITHOUT_PEER], help="print where a step of this recipe spends its time"
    )
    args = parser.parse_args()
    if args.check:
        check(args.only)
        return
    if args.profile:
        profile(args.profile)
        return
    lines = [
        "| recipe | firth, tokens/s | plain loop in fp32 | in bf16 | speedup over the faster |",
        "|---|---|---|---|---|",
    ]
    for name in args.only:
        line, report = row(name, args.rounds)
        print(line, flush=True)
        lines.append(line)
    print("\n".join([*lines, "", describe(report.machine)]))


if __name__ == "__main__":
    main()
