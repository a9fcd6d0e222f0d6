"""GGUF files of firth in llama.cpp: ids, chat templates and greedy text must equal those of firth.

    pip install --no-deps --target LLAMA xllamacpp gguf          # llama.cpp with a server inside, and no compiler
    python -m bench.interop.llamacpp --site LLAMA                        # a random model; with --run RUN also a trained one
    python -m bench.interop.llamacpp --site LLAMA --run runs/llama --chat runs/instruct --smollm2

Ids: a vocabulary is written with a small random model, and llama.cpp's `/tokenize` encodes TRICKY_TEXTS. Text: both sides
decode greedily, firth with the weights that it reads back from the file, so that both have the same rounding. llama.cpp also
rounds the activations (to F16, BF16, Q8_0), so only F32 must agree in every token; for the others the table has the number
of prompts that agree, the difference of the log-probabilities of the ten most likely next tokens, and the perplexity of 201
tokens of a play in both. Reference vocabularies of llama.cpp are used if they are in firth's cache (tests/unit/tokenizer/test_gguf_vocab.py
fetches them).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firth.corpora import catalog, download
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import bert, gpt2, llama
from firth.pretrained import gguf
from firth.pretrained.gguf_quantize import PACK
from firth.pretrained.load_save import load_model
from firth.runs.loaded_model import encode_prompt
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

TRICKY_TEXTS = (
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", "\t\n", "Hello world", " Hello world", "Hello World", " Hello, world!",
    "hello   world", "Hello\r\nworld\r\n", "trailing blank ", "  two  blanks  ", "I'm you're we'll IT'S they'D", "it''s",
    "1", "12", "123", "1234567890", "3.14159, 1e-5 and 0x7F", "x=3;y=[1,2]", "def f(n):\n    return n\n", "a\tb\t\tc",
    "<s>", "</s>", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>", "<unk><pad><mask>", "[CLS] [SEP]", "<extra_id_0>",
    "Füße, naïve, São Paulo", "e\u0301 and \u00e9", "\u1e9b\u0323", "Привет, мир!", "你好，世界。", "こんにちは 世界", "안녕하세요",
    "مرحبا بالعالم", "नमस्ते दुनिया", "ไทยภาษา", "🙂", "👩‍👩‍👧‍👦🏳️‍🌈", "a🙂b", "\u00a0nbsp\u2003em\u200bzero", "\ufeffbom",
    "\x00\x01\x7f", "½ ² Ⅷ ٣", "a\u0300\u0301\u0302", "«quoted» „deutsch“", "!!!???...---___", "http://a.b/c?d=e&f=g#h",
    "ALLCAPS lowercase MiXeD", "\u2581low line", "Ġword", "a" * 60, "\U0001d4d7\U0001d4ee", "ﬁﬂ ligatures", "…“”‘’",
)  # fmt: skip

PROMPTS = (
    "First Citizen:", "To be, or not to be", "The king", "What light through yonder", "My lord,", "Enter HAMLET",
    "I have seen", "Good morrow", "O Romeo, Romeo", "Once more unto the breach",
)  # fmt: skip
TOP_TOKENS = 2000
"""Most likely tokens whose probabilities are requested for perplexity at first: all of them are 4 MB of JSON."""
VOCABULARIES = (
    "gpt-2", "llama-spm", "llama-bpe", "qwen2", "qwen35", "falcon", "starcoder", "refact", "command-r", "mpt", "phi-3",
    "deepseek-coder",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Result of a check: `equal` of `count` cases agree."""

    what: str
    equal: int
    count: int
    note: str = ""

    @property
    def line(self) -> str:
        return f"| {self.what} | {self.equal} of {self.count} | {self.note} |"


@dataclass(frozen=True)
class Server:
    """Client of a local llama.cpp server."""

    address: str

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)  # type: ignore[no-any-return]


@contextmanager
def serving(
    file: Path, threads: int = 1, context: int = 512, embedding: bool = False, plain: bool = True
) -> Iterator[Server]:
    """Serve a file with llama.cpp, one row at a time; `plain` sets float32 keys and values and plain attention."""
    import xllamacpp as library  # type: ignore[import-not-found]

    params = library.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = (
        context,
        1,
        threads,
        threads,
    )
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # waiting threads sleep, which is faster on two cores
    if plain:
        params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity, params.cache_prompt, params.use_jinja, params.embedding = (
        False,
        0,
        False,
        True,
        embedding,
    )
    if embedding:
        params.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.embd_normalize = -1
    server = library.Server(params)
    try:
        yield Server(server.listening_address)
    finally:
        del server


def ids(name: str, tokenizer: Tokenizer, file: Path) -> Row:
    """Compare the ids of TRICKY_TEXTS as plain text, without BOS and control tokens."""
    with serving(file) as server:
        wrong = []
        for text in TRICKY_TEXTS:
            theirs = server.ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
            if theirs != tokenizer.encode(text).tolist():
                wrong.append(f"{text[:20]!r}: {tokenizer.encode(text).tolist()[:6]}, theirs {theirs[:6]}")
    return Row(f"{name}: ids", len(TRICKY_TEXTS) - len(wrong), len(TRICKY_TEXTS), "; ".join(wrong[:3]))


def texts(name: str, file: Path, new: int, prompts: Sequence[str] = PROMPTS) -> Row:
    """Compare greedy continuations, and the ten most likely next tokens."""
    model, tokenizer = load_model(file), Tokenizer.load(file)
    engine = Engine(model, tokenizer)
    equal_count, difference, tokens = 0, 0.0, 0
    with serving(file) as server:
        for prompt in prompts:
            request = {"prompt": prompt, "temperature": 0.0, "top_k": 1, "n_predict": new, "return_tokens": True}
            theirs = server.ask("/completion", request)["tokens"]
            prompt_ids = encode_prompt(tokenizer, prompt, model)
            ours = [
                int(i) for i in engine.generate([prompt_ids], Sampling(temperature=0, max_new_tokens=new))[0].tokens
            ]
            same = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            tokens += same
            # llama.cpp returns the stop token, firth may not.
            equal_count += same >= min(len(ours), len(theirs)) and abs(len(ours) - len(theirs)) <= 1
            response = server.ask("/completion", {"prompt": prompt, "temperature": 0.0, "n_predict": 1, "n_probs": 10})
            with inference_mode(model):
                hidden = model(rectangle([prompt_ids], torch.device("cpu")))
                found = model.heads["lm"](hidden[:, -1]).log_softmax(-1)[0]
            top = response.get("completion_probabilities", [])  # missing if the text ends at once
            for one in top[0]["top_logprobs"] if top else ():
                difference = max(difference, abs(float(found[one["id"]]) - one["logprob"]))
    return Row(
        f"{name}: greedy",
        equal_count,
        len(prompts),
        f"{tokens / len(prompts):.1f} equal tokens, log p within {difference:.1e}",
    )


def perplexity(name: str, file: Path, tokens: Sequence[int]) -> Row:
    """Compare the perplexity of a text in llama.cpp and in firth with the weights from the same file.

    The request is for the TOP_TOKENS most likely tokens after each prefix, and for all if the actual token is not among them.
    """
    model = load_model(file)
    with inference_mode(model):
        hidden = model(rectangle([np.array(tokens)], torch.device("cpu")))
        found = model.heads["lm"](hidden[0, :-1]).log_softmax(-1)
    ours = found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].double().numpy()
    theirs, equal = np.zeros_like(ours), 0
    with serving(file, context=len(tokens) + 8) as server:
        for at, token in enumerate(tokens[1:]):
            for count in (TOP_TOKENS, found.shape[1]):
                request = {"prompt": tokens[: at + 1], "n_predict": 1, "n_probs": count, "cache_prompt": True}
                reply = server.ask("/completion", request | {"temperature": 0.0})
                top = reply["completion_probabilities"][0]["top_logprobs"]
                logprobs = [one["logprob"] for one in top if one["id"] == token]
                if logprobs:
                    break
            theirs[at] = logprobs[0]
            equal += top[0]["id"] == int(found[at].argmax())
    their_perplexity, our_perplexity = np.exp(-theirs.mean()), np.exp(-ours.mean())
    note = (
        f"perplexity {their_perplexity:.3f}, firth {our_perplexity:.3f}; log p within {np.abs(theirs - ours).max():.1e}"
    )
    return Row(f"{name}: most likely token of {len(ours)}", equal, len(ours), note)


def play_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return 201 tokens of a play, which fit into the context of the smallest recipes."""
    text = (catalog.fetch("shakespeare", log=lambda _: None) / "hamlet.txt").read_text("utf-8")
    found: list[int] = tokenizer.encode(text).tolist()[1000:1201]
    return found


def dialogue(name: str, file: Path, new: int) -> list[Row]:
    """Compare the text of the chat template, and the answers."""
    model, tokenizer = load_model(file), Tokenizer.load(file)
    engine = Engine(model, tokenizer)
    cases = [
        [{"role": "user", "content": "Who are you?"}],
        [
            {"role": "user", "content": "Hi <|im_end|> <s>"}, {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What is\n2 + 2?"},
        ],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " blanks "}],
    ]  # fmt: skip
    equal, answers = 0, 0
    with serving(file, context=2048) as server:
        for messages in cases:
            prompt, _ = chat.encode(tokenizer, messages, open=True)
            written = tokenizer.engine.decode(prompt.tolist(), skip_special_tokens=False)
            equal += written == server.ask("/apply-template", {"messages": messages})["prompt"]
            reply = engine.generate([prompt], Sampling(temperature=0, max_new_tokens=new))[0].text
            request = {"messages": messages, "temperature": 0.0, "top_k": 1, "max_tokens": new}
            theirs = server.ask("/v1/chat/completions", request)["choices"][0]["message"]["content"]
            answers += reply.strip() == theirs.strip()
    note = "the second dialogue contains <|im_end|>, which is text in firth and a control token in llama.cpp"
    return [Row(f"{name}: template", equal, len(cases)), Row(f"{name}: answers", answers, len(cases), note)]


def random_model(config: ModelConfig, seed: int = 0) -> LM:
    """Return a random model with weights so large that greedy decoding does not repeat one token."""
    torch.manual_seed(seed)
    model = LM(config.with_fields({"init.std": 0.08, "dropout": 0.0}), {"lm": LMHead(config)}).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim == 1:
                weights.add_(torch.randn_like(weights) * 0.1 * ("norm" in name or "bias" in name))
    return model


def small_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on this file."""
    return train([Path(__file__).read_text("utf-8") * 2], "byte-bpe", 700)


def reference_vocabularies(directory: Path) -> Iterator[tuple[str, Tokenizer]]:
    """Yield llama.cpp's own vocabularies if their package is in the cache."""
    archives = catalog.cache_directory() / "archives" / "pypi-sdist-llama-cpp-python-0.3.36"
    for archive in sorted(archives.glob("*.tar.gz")):
        patterns = [f"*/llama.cpp/models/ggml-vocab-{name}.gguf" for name in VOCABULARIES]
        for path, file in download.members(archive, patterns):
            (directory / Path(path).name).write_bytes(file.read())
            yield Path(path).stem.removeprefix("ggml-vocab-"), Tokenizer.load(directory / Path(path).name)


def vectors(file: Path, tokenizer: Tokenizer, model: LM) -> Row:
    """Compare the hidden states of an encoder."""
    cases = ("the king is here", "a longer text, with signs!", "x")
    equal_count, difference = 0, 0.0
    with serving(file, embedding=True) as server:
        for text in cases:
            theirs = np.array(server.ask("/embedding", {"content": text})[0]["embedding"])  # type: ignore[index]
            input_ids = tokenizer.vocab.add_special_tokens(tokenizer.encode(text)).astype(np.int64)
            with inference_mode(model):
                ours = model(rectangle([input_ids], torch.device("cpu"), causal=False))[0].numpy()
            difference = max(difference, float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else np.inf)
            equal_count += ours.shape == theirs.shape and bool(np.allclose(ours, theirs, atol=2e-3))
    return Row("bert, random: hidden states", equal_count, len(cases), f"within {difference:.1e}")


def checks(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Run the checks that the arguments select."""
    tokenizer = small_tokenizer()
    size = tokenizer.vocab.size
    file = folder / "file.gguf"
    config = llama(size, 128, 3, 4, 256, max_positions=512, num_kv_heads=2)
    for kind in PACK:
        gguf.write(random_model(config), tokenizer, file, kind)
        yield texts(f"llama, random, {kind}", file, arguments.new)
    yield ids("firth's byte-bpe", tokenizer, file)
    biased = config.with_fields(
        {"bias": True, "tie_embeddings": True, "position.rope.theta": 50000.0, "num_kv_heads": 4}
    )
    gguf.write(random_model(biased), tokenizer, file, "F32")
    yield texts("llama, tied and biased, F32", file, arguments.new)
    for name, more in (
        ("qwen2", {"bias": True, "bias_location": "qkv"}),
        ("qwen3", {"attention.qk_norm": True, "attention.qk_norm_weight": True}),
    ):
        changes: dict[str, Any] = more
        gguf.write(random_model(config.with_fields(changes)), tokenizer, file, "F32")
        yield texts(f"{name}, random, F32", file, arguments.new)
    gguf.write(random_model(replace(gpt2(size, 128, 3, 4), max_positions=512)), tokenizer, file, "F32")
    yield texts("gpt2, random, F32", file, arguments.new)
    words = catalog.cache_directory() / "minilm" / "vocab.txt"
    if words.is_file():
        uncased = Tokenizer.load(words)
        model = random_model(bert(uncased.vocab.size, 64, 2, 4))
        gguf.write(model, uncased, file, "F32")
        yield ids("bert's WordPiece", uncased, file)
        yield vectors(file, uncased, model)
    for name, reference in reference_vocabularies(folder):
        gguf.write(random_model(llama(reference.vocab.size, 32, 1, 1, 32)), reference, file, "F16")
        yield ids(f"{name}, read and written", reference, file)
    if arguments.run:
        model, tokenizer = load_model(arguments.run / "model"), Tokenizer.load(arguments.run)
        for kind in PACK:
            gguf.write(model, tokenizer, file, kind)
            yield texts(f"{arguments.run.name}, {kind}", file, arguments.new)
            yield perplexity(f"{arguments.run.name}, {kind}", file, play_tokens(tokenizer))
        yield ids(f"{arguments.run.name}", tokenizer, file)
    if arguments.chat:
        model, tokenizer = load_model(arguments.chat / "model"), Tokenizer.load(arguments.chat)
        gguf.write(model, tokenizer, file, "F32", dialogue=True)
        yield from dialogue(f"{arguments.chat.name}, F32", file, arguments.new)
    if arguments.smollm2:
        directory = catalog.fetch("smollm2", log=lambda _: None)
        model, tokenizer = load_model(directory), Tokenizer.load(directory)
        gguf.write(model, tokenizer, file, "F32")
        yield ids("smollm2, written", tokenizer, file)
        yield texts("smollm2, F32", file, arguments.new, PROMPTS[:5])
        yield from dialogue("smollm2, F32", file, arguments.new)
        for kind in ("F32", "Q8_0", "Q4_0"):
            gguf.write(model, tokenizer, file, kind)
            yield perplexity(f"smollm2, {kind}", file, play_tokens(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--site", type=Path, default=None, help="directory in which xllamacpp was installed with --target"
    )
    parser.add_argument("--run", type=Path, default=None, help="a run of a llama")
    parser.add_argument("--chat", type=Path, default=None, help="a run of a llama trained on dialogues")
    parser.add_argument(
        "--smollm2", action="store_true", help="also SmolLM2-135M, written in F32 (540 MB), Q8_0 and Q4_0"
    )
    parser.add_argument("--new", type=int, default=48, help="tokens to write")
    arguments = parser.parse_args()
    if arguments.site is not None:
        sys.path.insert(0, str(arguments.site))
    torch.set_num_threads(1)
    print("| check | agree | |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in checks(arguments, Path(folder)):
            print(row.line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
