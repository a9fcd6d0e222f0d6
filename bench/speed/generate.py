"""Speed of cached greedy generation: a decoder of 29 M parameters (8 layers, hidden size 512) writes 128 tokens, CPU.

    python -m bench.speed.generate --batch 1 --weights fp32 bf16 int8      # and --batch 16
    python -m bench.speed.generate --batch 1 --model DIR     # a Llama in a directory, such as SmolLM2, instead of the two
    python -m bench.speed.generate --batch 1 --prompt 512 --new 1    # prefill speed: units are the tokens of the prompt
    python -m bench.speed.generate --check                   # the same weights write the same tokens on both sides; no timing

Candidates: transformers' `generate()` on a `GPT2LMHeadModel` with its defaults, the same with its weights in bf16, firth's
`Engine` with the same GPT-2, loaded from its directory, and firth's `Engine` with its own default decoder of that size, each
with every weight type in `--weights` (firth.generate.quantized). Ratios are of the last candidate. All get the same prompts
(32 tokens a row) and must write 128 tokens a row: there is no stop token. Units are the tokens written, or with `--new 1`
the tokens of the prompts.

At batch size 1 the lower bound is the bytes of the weights over the memory bandwidth (without the embeddings of tokens that
do not occur).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import EndSample, arguments, command

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, CONTEXT = 8192, 512, 8, 8, 1024
PROMPT, NEW = 32, 128


@dataclass(frozen=True)
class Workload:
    """Workload of a sample.

    Args:
        batch: Rows.
        prompt: Tokens of each prompt.
        new: Tokens to write in each row.
    """

    batch: int
    prompt: int = PROMPT
    new: int = NEW

    @property
    def units(self) -> int:
        """Tokens that count: those written, or those of the prompts if new is 1."""
        return self.batch * (self.prompt if self.new == 1 else self.new)

    def prompts(self) -> np.ndarray:
        """Return (batch, prompt) int64 ids of ordinary tokens."""
        return np.random.default_rng(0).integers(200, VOCAB_SIZE, size=(self.batch, self.prompt))


# ------------------------------------------------------------------------------- transformers


def hf_model() -> Any:
    """Return a GPT-2 with random weights so large that greedy decoding does not repeat one token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE, n_positions=CONTEXT, n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=NUM_HEADS, initializer_range=0.05,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    return model.eval()


def hf_from(directory: Path) -> Any:
    """Return the model in a directory, without a stop token."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def hf_write(model: Any, work: Workload) -> list[list[int]]:
    ids = torch.from_numpy(work.prompts())
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new, do_sample=False)
    return out[:, work.prompt :].tolist()  # type: ignore[no-any-return]


def transformers_generate(end_sample: EndSample, work: Workload, make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make().to(dtype)
    while True:
        hf_write(model, work)
        end_sample(work.units)


# ------------------------------------------------------------------------------- firth


class IdTokenizer:
    """Tokenizer whose text is the token ids, so that the model alone is measured."""

    def __init__(self) -> None:
        from firth.tokenizer.vocab import Vocab

        self.vocab = Vocab(size=VOCAB_SIZE, roles={"pad": 0}, special=np.arange(VOCAB_SIZE) < 1)

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(piece) for piece in text.split()], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return " ".join(str(int(i)) for i in ids)

    def token(self, id: int) -> str:
        return str(id)

    def id(self, token: str) -> int:
        return int(token)


def same_gpt2() -> Any:
    """Return firth's model with the weights of the peer, loaded from the directory that transformers wrote."""
    from firth.pretrained.load_save import load_model

    with tempfile.TemporaryDirectory() as directory:
        hf_model().save_pretrained(directory)
        return load_model(Path(directory))


def own_decoder() -> Any:
    """Return firth's default decoder, with random weights in the zero-initialized projections too."""
    from firth.model.config import decoder_config
    from firth.model.heads import LMHead
    from firth.model.model import LM

    torch.manual_seed(0)
    config = decoder_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        max_positions=CONTEXT,
    )
    model = LM(config, {"lm": LMHead(config)}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def firth_write(engine: Any, work: Workload) -> list[list[int]]:
    from firth.generate.sampling import Sampling

    completions = engine.generate(list(work.prompts()), Sampling(temperature=0, max_new_tokens=work.new))
    return [c.tokens.tolist() for c in completions]


def firth_generate(end_sample: EndSample, work: Workload, make: Callable[[], Any], weights: str) -> None:
    from firth.generate.engine import Engine

    engine = Engine(make(), IdTokenizer(), stops=(), weights=weights)
    while True:
        firth_write(engine, work)
        end_sample(work.units)


def candidates(
    work: Workload, weights: Sequence[str], directory: Path | None
) -> dict[str, Callable[[EndSample], None]]:
    from firth.pretrained.load_save import load_model

    theirs = hf_model if directory is None else partial(hf_from, directory)
    ours = {"the same GPT-2": same_gpt2, "its own": own_decoder}
    if directory is not None:
        ours = {"the same": partial(load_model, directory)}
    found: dict[str, Callable[[EndSample], None]] = {
        "transformers": partial(transformers_generate, work=work, make=theirs, dtype=torch.float32),
        "transformers, bf16": partial(transformers_generate, work=work, make=theirs, dtype=torch.bfloat16),
    }
    for name, make in ours.items():
        for kind in weights:
            found[f"firth, {name}, {kind}"] = partial(firth_generate, work=work, make=make, weights=kind)
    return found


def check(directory: Path | None) -> None:
    """Assert that both sides write the same tokens with the same weights, at batch sizes 1 and 4."""
    from firth.generate.engine import Engine
    from firth.pretrained.load_save import load_model

    theirs = hf_model() if directory is None else hf_from(directory)
    engine = Engine(same_gpt2() if directory is None else load_model(directory), IdTokenizer(), stops=())
    sizes = {
        "transformers": sum(p.numel() for p in theirs.parameters()),
        "firth, the same": sum(p.numel() for p in engine.model.parameters()),
        "firth, its own": sum(p.numel() for p in own_decoder().parameters()),
    }
    assert sizes["transformers"] == sizes["firth, the same"], sizes
    for batch in (1, 4):
        expected, written = hf_write(theirs, Workload(batch)), firth_write(engine, Workload(batch))
        assert all(len(row) == NEW for row in expected + written), "an answer ended early"
        assert len({t for row in expected for t in row}) > NEW // 4, (
            "the text has too few distinct tokens to show a difference"
        )
        agree = np.mean(np.array(expected) == np.array(written))
        assert agree == 1, f"batch {batch}: only {agree:.1%} of the tokens agree"
    print(f"parameters {sizes}; {5 * NEW} greedy tokens of the same weights agree")


def main() -> None:
    from firth.generate.quantized import FORMATS

    names = {**candidates(Workload(1), FORMATS, None), **candidates(Workload(1), FORMATS, Path())}
    parser = arguments(__doc__, names)
    parser.add_argument("--batch", type=int, default=1, help="rows written at once")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of each prompt")
    parser.add_argument(
        "--new", type=int, default=NEW, help="tokens written in each row; 1: count the tokens of the prompts"
    )
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=["fp32", "int8"])
    parser.add_argument("--model", type=Path, help="directory of a Llama for both sides")
    args = parser.parse_args()
    if args.check:
        check(args.model)
    else:
        command(
            args,
            candidates(Workload(args.batch, args.prompt, args.new), FORMATS if args.only else args.weights, args.model),
        )


if __name__ == "__main__":
    main()
