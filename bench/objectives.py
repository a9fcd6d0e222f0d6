"""Each objective's training speed against a plain PyTorch loop around transformers' class for it, of the same sizes.

    python -m bench.objectives                    # every row of the table, about 15 minutes on two cores
    python -m bench.objectives --only t5 bart     # some
    python -m bench.objectives --check
    python -m bench.objectives --profile xlnet    # where a step of firth and of the peer spends its time

A row is the tiny recipe of that name: its own batches of real text (made before the clock starts, on both sides), its
step, its optimizer, and the precision that it chooses by itself on this machine. The peer reads the same examples, padded,
with the same labels, AdamW, a clipped gradient and no dropout: what one would write by hand around the library. It runs
twice, in fp32 and in bf16 autocast; the ratio is to the faster of the two. Width, layers, heads and vocabulary are the same;
where firth's block is gated its MLP is half as wide, which is as many numbers. Tokens are the examples' own: no padding,
no queries. Where the library has no such objective, the peer is the nearest: SpanBERT without span boundaries, MPNet with
masks alone; the LSTM's peer is written with torch.nn. Rows with empty columns have no peer.

Ratios are medians over rounds in turns (`bench.harness`); absolute speeds belong to the machine in the last line.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Contender, Report, Turn, compare, describe
from firth.data.collate import Batches, collate
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.runs import examples
from firth.runs.init_head import init_head
from firth.runs.prepare import RunData
from firth.runs.recipe import Recipe, load
from firth.runs.tokenizer import tokenizer_of
from firth.train.cpu_setup import keep_freed_memory
from firth.train.optimizer import Optimizer
from firth.train.precision import casts, choose
from firth.train.step import step
from firth.types import IGNORE, NEVER, Batch

CPU = torch.device("cpu")

POOL, SHARE = 8, 8
"""Batches that take turns; steps in a share."""

FOLDER = Path("runs/objectives")
"""Token stores and the tokenizer of the text that all read."""


def prepared(name: str) -> tuple[Recipe, Objective, Batches]:
    """The settled tiny recipe and its batches."""
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
        memory_length=recipe.model.memory_length,
        log=lambda _: None,
    )
    cut = examples.build_datasets(recipe.examples, data, recipe.objective)
    batches = Batches(
        cut.train,
        recipe.objective,
        tokenizer.vocab.with_decoder_start(recipe.model.decoder_start_token),
        batch_size=recipe.batch.size,
        seed=0,
        pack_to_length=recipe.batch.pack_to_length,
    )
    return recipe, recipe.objective, batches


def padded(batches: Batches, number: int) -> Batch:
    """The examples of a step as the peer reads them: one to a row."""
    epochs, indices = batches.source.order(
        batches.seed, torch.arange(batches.batch_size).numpy() + number * batches.batch_size
    )
    asked = frozenset({*batches.objective.labels.values(), *batches.objective.metrics.values()})
    return collate(batches.shown(epochs, indices), asked)


def useful(batch: Batch) -> int:
    """Tokens of the examples themselves: no padding, and no query or stand-in behind a text."""
    total = 0
    for side in ("", "source_"):
        if side + "tokens" in batch:
            appears = batch.get(side + "key_time", torch.zeros_like(batch[side + "tokens"]))
            leaves = batch.get(side + "key_expiry", torch.full_like(appears, NEVER))
            total += int(((appears != NEVER) & (leaves == NEVER)).sum())
    return total


def ours(name: str) -> Iterator[int]:
    """Take firth's step on the recipe's own batches, for ever; yield the tokens of each."""
    keep_freed_memory()
    recipe, objective, batches = prepared(name)
    assert recipe.model is not None
    torch.manual_seed(0)
    model = LM(recipe.model, objective.heads(recipe.model))
    init_head(model, objective, batches)
    mover = Optimizer(recipe.optimizer, model, sparse=True)
    precision = casts(choose(recipe.precision, CPU), CPU)
    pool = [(batches.batches(i), useful(padded(batches, i))) for i in range(POOL)]
    model.train()
    for number in count():
        here, tokens = pool[number % POOL]
        step(model, objective, here, precision=precision)
        mover.clip_grad_norm()
        mover.step(0.1)
        yield tokens


def theirs(name: str, precision: Literal["fp32", "bf16"]) -> Iterator[int]:
    """Take the step of a plain loop around the peer's model, for ever; yield the tokens of each."""
    recipe, _, batches = prepared(name)
    torch.manual_seed(0)
    model, loss = PEERS[name](recipe)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    pool = [(batch, useful(batch)) for batch in (padded(batches, i) for i in range(POOL))]
    for number in count():
        batch, tokens = pool[number % POOL]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield tokens


def in_turns(turn: Turn, side: Callable[[], Iterator[int]]) -> None:
    """Work in shares of SHARE steps."""
    steps = side()
    while True:
        turn(sum(islice(steps, SHARE)))


# ------------------------------------------------------------------------------- peers

Peer = tuple[nn.Module, Callable[[Batch], Tensor]]


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def there(batch: Batch, side: str = "") -> Tensor:
    """transformers' attention mask."""
    tokens = batch[side + "tokens"]
    return (batch.get(side + "key_time", torch.zeros_like(tokens)) != NEVER).long()


def sizes(recipe: Recipe) -> dict[str, Any]:
    """As BERT's descendants call them; a gated MLP's two halves are one."""
    s = recipe.model
    assert s is not None
    hidden = s.intermediate_size * 2 if s.gated else s.intermediate_size
    return {
        "vocab_size": s.vocab_size, "hidden_size": s.hidden_size, "num_hidden_layers": s.num_layers, "num_attention_heads": s.num_heads,
        "intermediate_size": hidden, "max_position_embeddings": s.max_positions + 2, "hidden_dropout_prob": 0.0,
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
            vocab_size=s.vocab_size,
            n_embd=s.hidden_size,
            n_layer=s.num_layers,
            n_head=s.num_heads,
            n_inner=s.intermediate_size,
            n_positions=s.max_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = t.GPT2LMHeadModel(config)
    return model, lambda b: mean(model(input_ids=b["tokens"], attention_mask=there(b)).logits, b["labels"])


def masked(kind: str, recipe: Recipe) -> Peer:
    """BERT's and MPNet's masks."""
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
            return mean(model(input_ids=batch["tokens"], attention_mask=there(batch)).logits, batch["labels"])
        # MPNet's row: the text, stand-ins, queries. The peer sees the text with its masks.
        rows = int(((batch["key_expiry"] == NEVER) & (batch["key_time"] != NEVER)).sum(-1).max())
        tokens, labels = batch["tokens"][:, :rows].clone(), torch.full_like(batch["tokens"][:, :rows], IGNORE)
        row, slot = (batch["labels"] != IGNORE).nonzero(as_tuple=True)
        place = batch["positions"][row, slot].long()
        tokens[row, place], labels[row, place] = batch["tokens"][row, slot], batch["labels"][row, slot]
        return mean(model(input_ids=tokens, attention_mask=there(batch)[:, :rows]).logits, labels)

    return model, loss


def paired(kind: str, recipe: Recipe) -> Peer:
    """BERT's and ALBERT's two losses."""
    import transformers as t

    s = recipe.model
    assert s is not None
    model: Any
    if kind == "albert":
        model = t.AlbertForPreTraining(
            t.AlbertConfig(**sizes(recipe), embedding_size=s.embedding_size, classifier_dropout_prob=0.0)
        )
    else:
        model = t.BertForPreTraining(t.BertConfig(**sizes(recipe)))
    field = "order" if kind == "albert" else "next"

    def loss(batch: Batch) -> Tensor:
        out = model(input_ids=batch["tokens"], attention_mask=there(batch), token_type_ids=batch["token_type_ids"])
        second = out.sop_logits if kind == "albert" else out.seq_relationship_logits
        return mean(out.prediction_logits, batch["labels"]) + F.cross_entropy(second, batch[field][:, 0])

    return model, loss


def electra(recipe: Recipe) -> Peer:
    """Generator and discriminator, which share their table of tokens."""
    import transformers as t

    s = recipe.model
    assert s is not None
    objective: Any = recipe.objective
    large = sizes(recipe) | {"embedding_size": s.embedding_size or s.hidden_size}
    small = large | {
        "hidden_size": round(s.hidden_size * objective.size), "intermediate_size": round(large["intermediate_size"] * objective.size)
    }  # fmt: skip
    small["num_attention_heads"] = max(1, small["hidden_size"] // (s.hidden_size // s.num_heads))
    while small["hidden_size"] % small["num_attention_heads"]:
        small["num_attention_heads"] -= 1
    model = nn.ModuleDict(
        {
            "writer": t.ElectraForMaskedLM(t.ElectraConfig(**small)),
            "judge": t.ElectraForPreTraining(t.ElectraConfig(**large)),
        }
    )
    model["judge"].electra.embeddings.word_embeddings = model["writer"].electra.embeddings.word_embeddings

    def loss(batch: Batch) -> Tensor:
        tokens, labels, mask = batch["tokens"], batch["labels"], there(batch)
        logits = model["writer"](input_ids=tokens, attention_mask=mask).logits
        asked = labels != IGNORE
        with torch.no_grad():
            drawn = torch.multinomial(logits[asked].softmax(-1), 1)[:, 0]
            shown, replaced = tokens.clone(), torch.zeros_like(tokens)
            shown[asked] = drawn
            replaced[asked] = (drawn != labels[asked]).long()
        judged = model["judge"](input_ids=shown, attention_mask=mask, labels=replaced).loss
        return mean(logits, labels) + 50 * judged

    return model, loss


def xlnet(recipe: Recipe) -> Peer:
    """Both streams, by permutation masks and target maps; without memory, which the library keeps from step to step."""
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
        appears, looks = batch["key_time"][:, :n], batch["query_time"][:, :n]
        hidden = (appears[:, None, :] > looks[:, :, None]).float()
        asked = batch["labels"][:, n:]
        places = F.one_hot(batch["positions"][:, n:].long().clamp(0, n - 1), n).float()
        out = model(input_ids=batch["tokens"][:, :n], perm_mask=hidden, target_mapping=places)
        return mean(out.logits, asked)

    return model, loss


def written(kind: str, recipe: Recipe) -> Peer:
    """Encoder-decoders."""
    import transformers as t

    s = recipe.model
    assert s is not None
    model: Any
    if kind == "bart":
        config = t.BartConfig(
            vocab_size=s.vocab_size, d_model=s.hidden_size, encoder_layers=s.num_encoder_layers, decoder_layers=s.num_layers,
            encoder_attention_heads=s.num_heads, decoder_attention_heads=s.num_heads, encoder_ffn_dim=2 * s.intermediate_size,
            decoder_ffn_dim=2 * s.intermediate_size, max_position_embeddings=s.max_positions, dropout=0.0,
        )  # fmt: skip
        model = t.BartForConditionalGeneration(config)
    else:
        config = t.T5Config(
            vocab_size=s.vocab_size, d_model=s.hidden_size, d_kv=s.head_dim, d_ff=s.intermediate_size, num_layers=s.num_encoder_layers,
            num_decoder_layers=s.num_layers, num_heads=s.num_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )  # fmt: skip
        model = t.T5ForConditionalGeneration(config)

    def loss(batch: Batch) -> Tensor:
        out = model(
            input_ids=batch["source_tokens"], attention_mask=there(batch, "source_"), decoder_input_ids=batch["tokens"]
        )
        return mean(out.logits, batch["labels"])

    return model, loss


class Plain(nn.Module):
    """An LSTM language model as one writes it with torch.nn."""

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
    model = Plain(s.vocab_size, s.hidden_size, s.num_layers)
    return model, lambda b: mean(model(b["tokens"]), b["labels"])


PEERS: dict[str, Callable[[Recipe], Peer]] = {
    "gpt": partial(causal, "gpt2"),
    "gpt2": partial(causal, "gpt2"),
    "llama": partial(causal, "llama"),
    "bert": partial(paired, "bert"),
    "roberta": partial(masked, "bert"),
    "spanbert": partial(masked, "bert"),
    "albert": partial(paired, "albert"),
    "electra": electra,
    "xlnet": xlnet,
    "mpnet": partial(masked, "mpnet"),
    "t5": partial(written, "t5"),
    "bart": partial(written, "bart"),
    "lstm": recurrent,
}
PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
"""Of a peer."""

ALONE = ("prefix_lm", "linformer", "elmo", "contrastive", "vae")
"""Recipes without a peer."""


def check() -> None:
    """Both sides read as many tokens and ask as many labels, and the peers' losses begin near ln(vocabulary)."""
    for name, peer in PEERS.items():
        recipe, objective, batches = prepared(name)
        model, loss = peer(recipe)
        batch = padded(batches, 0)
        asked = [int((b[objective.labels[t]] != IGNORE).sum()) for t in objective.labels for b in (batch,)]
        own = sum(int((b[objective.labels[t]] != IGNORE).sum()) for t in objective.labels for b in batches.batches(0))
        assert sum(asked) == own, (name, asked, own)
        first, numbers = loss(batch).item(), sum(p.numel() for p in model.parameters())
        assert recipe.model is not None
        mine = sum(p.numel() for p in LM(recipe.model, objective.heads(recipe.model)).parameters())
        print(
            f"{name:10} tokens {useful(batch):6,}  their first loss {first:6.2f}  parameters {numbers:,}, ours {mine:,}"
        )


def row(name: str, rounds: int) -> tuple[str, Report]:
    """A line of the table."""
    contenders: dict[str, Contender] = {}
    if name in PEERS:
        contenders = {p: partial(in_turns, side=partial(theirs, name, p)) for p in PRECISIONS}
    contenders["firth"] = partial(in_turns, side=partial(ours, name))
    report = compare(contenders, rounds=rounds, peer=next(iter(contenders)))
    if not report.rounds:
        return f"| {name} | no clean round | | | |", report
    speed = {who: statistics.median(report.rates(who)) for who in contenders}
    if name not in PEERS:
        return f"| {name} | {speed['firth']:,.0f} | | | |", report
    middle, low, high = report.ratio("firth", max(PRECISIONS, key=lambda p: speed[p]))
    ratio = f"**{middle:.2f}x** ({low:.2f} to {high:.2f})"
    return (
        f"| {name} | {speed['firth']:,.0f} | {' | '.join(f'{speed[p]:,.0f}' for p in PRECISIONS)} | {ratio} |",
        report,
    )


def profile(name: str, rows: int = 40) -> None:
    """Print the operators that a step of each side spends its time in."""
    sides = {"firth": ours(name)} | ({p: theirs(name, p) for p in PRECISIONS} if name in PEERS else {})
    for who, steps in sides.items():
        for _ in islice(steps, POOL):
            pass
        with torch.profiler.profile() as found:
            for _ in islice(steps, POOL):
                pass
        table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60)
        print(f"{name}, {who}, {POOL} steps\n{table}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*PEERS, *ALONE], default=[*PEERS, *ALONE])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", choices=[*PEERS, *ALONE], help="print where a step of this recipe spends its time")
    given = parser.parse_args()
    if given.check:
        check()
        return
    if given.profile:
        profile(given.profile)
        return
    lines = [
        "| recipe | firth, tokens/s | plain loop in fp32 | in bf16 | firth over the faster |",
        "|---|---|---|---|---|",
    ]
    for name in given.only:
        line, report = row(name, given.rounds)
        print(line, flush=True)
        lines.append(line)
    print("\n".join([*lines, "", describe(report.machine)]))


if __name__ == "__main__":
    main()
