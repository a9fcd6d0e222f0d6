"""Initialize prefixes and prompts from tokens of a text (Li & Liang 2021, section 7.4; Lester 2021, section 3.2).

>>> from firth.model.config import decoder_config
>>> model = LM(decoder_config(vocab_size=9, hidden_size=64, num_layers=1), {})
>>> torch.equal(prompt_of(model, [3, 4]).table.weight, model.tokens.weight[3:5])
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firth.model.forward_context import ForwardContext
from firth.model.model import LM
from firth.model.prefix import PrefixEncoder, PromptEmbedding, check_prefix_supported


def prefix_of(model: LM, ids: Sequence[int], hidden: int = 0) -> PrefixEncoder:
    """Return a prefix initialized with the keys and values that the model computes for some tokens.

    Args:
        model: The model.
        ids: Token ids; their number is the length of the prefix.
        hidden: Hidden size of an MLP that the prefix is trained through; the prefix is then initialized at random.
    """
    config = model.config
    check_prefix_supported(config, "prefix")
    prefix = PrefixEncoder(len(ids), config.num_layers, config.num_kv_heads, config.head_dim, hidden)
    if not hidden:
        with torch.no_grad():
            cache, training = model.make_cache(1, len(ids)), model.training
            tokens = torch.tensor(list(ids), device=model.tokens.weight.device)[None]
            time = torch.arange(len(ids), device=tokens.device)[None] * config.causal
            source = {"source_tokens": tokens} if config.encoder.num_layers else {}
            fields = {"tokens": tokens, "query_time": time, "key_time": time} | source
            model.eval()(fields, ForwardContext(cache))
            model.train(training)
            pairs = torch.stack([torch.stack((k[0], v[0])) for k, v in zip(cache.keys, cache.values, strict=True)])
            prefix.table.weight.copy_(pairs.permute(3, 0, 1, 2, 4).flatten(1))
    return prefix


def prompt_of(model: LM, ids: Sequence[int]) -> PromptEmbedding:
    """Return a prompt initialized with the embeddings of some tokens (Lester 2021, section 3.2)."""
    check_prefix_supported(model.config, "prompt")
    prompt = PromptEmbedding(len(ids), model.config.embedding_dim)
    with torch.no_grad():
        prompt.table.weight.copy_(model.tokens(torch.tensor(list(ids), device=model.tokens.weight.device)))
    return prompt
