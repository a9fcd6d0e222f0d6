"""What int8 and bf16 weights cost SmolLM2-135M in perplexity, on TOKENS tokens each of a play, of news and of speeches.

    python -m bench.interop.int8_loss

The files are those of `firth fetch smollm2 shakespeare brown sotu`. Reported are the divergence from fp32 (mean of KL(fp32,
other) in nats a token) and the change of the perplexity with its standard error over tokens; asserted is that int8 costs at
most MAX_LOSS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.speed.smollm2 import model_directory
from firth.corpora import catalog
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.quantized import FORMATS, quantize
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.tokenizer.tokenizer import Tokenizer

TEXTS, TOKENS, SKIPPED_CHARACTERS = ("shakespeare", "brown", "sotu"), 768, 3000
MAX_LOSS = 0.007


def text(name: str) -> str:
    """Return some of the first file of a corpus that is long enough."""
    for file in sorted(catalog.fetch(name, log=lambda _: None).glob("*.txt")):
        found = file.read_text("utf-8", "replace")[SKIPPED_CHARACTERS:]
        if len(found) > 8 * TOKENS:
            return found[: 8 * TOKENS]
    raise RuntimeError(f"{name} has no file of {8 * TOKENS} characters")


def log_probs(model: LM, rows: list[Tensor]) -> Tensor:
    """Return the log-probabilities of all tokens after each position, (tokens, vocab)."""
    with inference_mode(model):
        found = [
            model.heads["lm"](model(rectangle([row[:-1].numpy()], torch.device("cpu"))))[0].float() for row in rows
        ]
    return torch.cat(found).log_softmax(-1)


def main() -> None:
    model, tokenizer = load_model(model_directory()), Tokenizer.load(model_directory())
    rows = [torch.from_numpy(tokenizer.encode(text(name))[:TOKENS]).long() for name in TEXTS]
    labels = torch.cat([row[1:] for row in rows])[:, None]
    base = log_probs(quantize(model, "fp32"), rows)
    for weights in FORMATS[1:]:
        found = log_probs(quantize(model, weights), rows)
        divergence = float((base.exp() * (base - found)).sum(-1).mean())
        worse = (base - found).gather(1, labels)[:, 0]
        loss, error = math.expm1(float(worse.mean())), float(worse.std()) / len(worse) ** 0.5
        print(
            f"{weights}: divergence {divergence:.4f}, perplexity {loss:+.2%} (standard error {error:.2%})", flush=True
        )
        assert weights != "int8" or loss <= MAX_LOSS


if __name__ == "__main__":
    main()
