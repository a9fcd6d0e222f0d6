"""Greedy generation with SmolLM2-135M, one row: firth against transformers and llama.cpp on the same cores, by precision.

    pip install --no-deps --target LLAMA xllamacpp gguf
    python -m bench.speed.smollm2 --site LLAMA --check      # the same logits, the same 64 tokens on 20 prompts; no timing
    python -m bench.speed.smollm2 --site LLAMA              # the table: NEW_TOKENS tokens after PROMPT, interleaved
    python -m bench.speed.smollm2 --site LLAMA --only "transformers" "firth"

All start from the Q4_1 file of `firth fetch smollm2`. firth and transformers (which reads GGUF with the `gguf` package) run
its weights as float32 or bf16; llama.cpp runs the file unchanged, and the F32, F16, Q8_0 and Q4_0 files that firth writes
from it. Each writes NEW_TOKENS tokens after the same PROMPT, with prefill each time and without stop tokens. At one row the
lower bound is the bytes of the weights over the memory bandwidth: 540 MB in float32, 270 in 16 bits, 144 in Q8_0, 91 in Q4_0.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import EndSample, arguments, command
from firth.corpora import catalog

PROMPT = (
    "The history of the English language begins with the arrival of three Germanic tribes who crossed the North Sea."
)
NEW_TOKENS, THREADS = 64, 2

PROMPTS = (
    PROMPT, "What is the capital of France?", "def fibonacci(n):\n    ", "Once upon a time, in a small village,",
    "Water boils at", "The three laws of motion are", "To make a good bread, you first", "In 1969, two astronauts",
    "import numpy as np\n\nx = np.", "Dear Sir or Madam,\n\nI am writing to", "She opened the door and saw",
    "The largest planet in the solar system is", "List of fruits: apples, pears,", "A prime number is a number that",
    "Roses are red, violets are", "Q: What is 12 times 12?\nA:", "The mitochondrion is", "El perro de mi vecino",
    "Photosynthesis turns light into", "Thank you for your letter of the 3rd of May.",
)  # fmt: skip


def model_directory() -> Path:
    """Return the directory with the Q4_1 file."""
    return catalog.fetch("smollm2", log=lambda _: None)


def add_site(directory: str) -> None:
    if directory and directory not in sys.path:
        sys.path.insert(0, directory)


# ------------------------------------------------------------------------------- candidates


def load_transformers(dtype: torch.dtype, where: str) -> tuple[Any, Any]:
    """Load the model and tokenizer of transformers from the GGUF file."""
    add_site(where)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [file] = model_directory().glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(model_directory(), gguf_file=file.name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(model_directory(), gguf_file=file.name)


def transformers_generate(end_sample: EndSample, dtype: torch.dtype, where: str) -> None:
    torch.set_num_threads(THREADS)
    model, tokenizer = load_transformers(dtype, where)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False)])
    while True:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        end_sample(out.shape[1] - ids.shape[1])


def load_engine(weights: str) -> Any:
    """Return firth's engine with weights of a type, converted by the engine if it can, else by the model."""
    from firth.generate.engine import Engine
    from firth.pretrained.load_save import load_model
    from firth.tokenizer.tokenizer import Tokenizer

    model, tokenizer = load_model(model_directory()), Tokenizer.load(model_directory())
    if weights in quantized_weights():
        make: Callable[..., Any] = Engine
        return make(model, tokenizer, stops=(), weights=weights)
    return Engine(model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[weights]), tokenizer, stops=())


def quantized_weights() -> tuple[str, ...]:
    """Return the weight types that `Engine` can convert to; none in a version without that option."""
    from firth.generate.engine import Engine

    return ("bf16", "int8") if "weights" in inspect.signature(Engine).parameters else ()


def firth_generate(end_sample: EndSample, weights: str) -> None:
    from firth.generate.sampling import Sampling

    torch.set_num_threads(THREADS)
    engine = load_engine(weights)
    prompt = engine.tokenizer.encode(PROMPT)
    while True:
        end_sample(len(engine.generate([prompt], Sampling(temperature=0, max_new_tokens=NEW_TOKENS))[0].tokens))


def llama_generate(end_sample: EndSample, kind: str, where: str) -> None:
    add_site(where)
    from bench.interop.llamacpp import serving
    from firth.pretrained import gguf
    from firth.pretrained.load_save import load_model
    from firth.tokenizer.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        [file] = model_directory().glob("*.gguf")
        if kind != "Q4_1":
            gguf.write(
                load_model(model_directory()), Tokenizer.load(model_directory()), Path(folder) / "file.gguf", kind
            )
            file = Path(folder) / "file.gguf"
        request = {
            "prompt": PROMPT,
            "n_predict": NEW_TOKENS,
            "temperature": 0.0,
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        with serving(file, threads=THREADS, plain=False) as server:
            while True:
                end_sample(server.ask("/completion", request)["tokens_predicted"])


def candidates(where: str) -> dict[str, Callable[[EndSample], None]]:
    hf, llama = partial(transformers_generate, where=where), partial(llama_generate, where=where)
    return {
        "transformers": partial(hf, dtype=torch.float32),
        "transformers, bf16": partial(hf, dtype=torch.bfloat16),
        **{f"llama.cpp, {kind}": partial(llama, kind=kind) for kind in ("F32", "F16", "Q8_0", "Q4_1", "Q4_0")},
        **{f"firth, {w}": partial(firth_generate, weights=w) for w in dict.fromkeys((*quantized_weights(), "bf16"))},
        "firth": partial(firth_generate, weights="fp32"),
    }


# ------------------------------------------------------------------------------- check


def check(where: str) -> None:
    """Compare transformers and firth on PROMPTS: ids, logits (relative difference) and NEW_TOKENS greedy tokens."""
    from firth.generate.decoding_batch import inference_mode, rectangle
    from firth.generate.sampling import Sampling

    (model, tokenizer), engine = load_transformers(torch.float32, where), load_engine("fp32")
    model.generation_config.eos_token_id = None
    equal_ids, equal_texts, difference = 0, 0, 0.0
    for prompt in PROMPTS:
        prompt_ids = engine.tokenizer.encode(prompt)
        input_ids = torch.from_numpy(prompt_ids.astype(np.int64))[None]
        equal_ids += tokenizer.encode(prompt, add_special_tokens=False) == prompt_ids.tolist()
        with inference_mode(engine.model):
            our_logits = engine.model.heads["lm"](engine.model(rectangle([prompt_ids], torch.device("cpu"))))
            logits = model(input_ids).logits
        difference = max(difference, float((our_logits - logits).abs().max() / logits.abs().max()))
        out = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        found = engine.generate([prompt_ids], Sampling(temperature=0, max_new_tokens=NEW_TOKENS))[0].tokens.tolist()
        equal_texts += found == out[0, input_ids.shape[1] :].tolist()
    n = len(PROMPTS)
    print(
        f"ids {equal_ids} of {n} equal; logits within {difference:.1e}, relative; {NEW_TOKENS} greedy tokens: {equal_texts} of {n} equal"
    )
    assert equal_ids == equal_texts == n and difference < 1e-4


def main() -> None:
    parser = arguments(__doc__, candidates(""))
    parser.add_argument("--site", default="", help="directory in which xllamacpp and gguf were installed with --target")
    args = parser.parse_args()
    if args.check:
        check(args.site)
    else:
        command(args, candidates(args.site))


if __name__ == "__main__":
    main()
