"""SmolLM2-135M, one row, greedy: firth beside transformers and llama.cpp on the same cores, in the same class of precision.

    pip install --no-deps --target LLAMA xllamacpp gguf
    python -m bench.smollm2 --site LLAMA --check      # the same logits, the same 64 tokens on 20 prompts; no timing
    python -m bench.smollm2 --site LLAMA              # the table: NEW tokens behind PROMPT, in turns
    python -m bench.smollm2 --site LLAMA --only "transformers" "firth"

All begin from the Q4_1 file of `firth fetch smollm2`. firth and transformers (which reads GGUF itself, with the `gguf`
package) run its weights as float32 or bf16; llama.cpp runs the file as it is, and the F32, F16, Q8_0 and Q4_0 files that
firth writes from it. Each writes NEW tokens behind the same PROMPT and reads that anew each time; nothing ends an answer early.
At one row the floor is the weights' bytes over the memory bandwidth: 540 MB in float32, 270 in 16 bits, 144 in Q8_0, 91 in Q4_0.
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

from bench.harness import Turn, arguments, command
from firth.corpora import catalog

PROMPT = (
    "The history of the English language begins with the arrival of three Germanic tribes who crossed the North Sea."
)
NEW, THREADS = 64, 2

PROMPTS = (
    PROMPT, "What is the capital of France?", "def fibonacci(n):\n    ", "Once upon a time, in a small village,",
    "Water boils at", "The three laws of motion are", "To make a good bread, you first", "In 1969, two astronauts",
    "import numpy as np\n\nx = np.", "Dear Sir or Madam,\n\nI am writing to", "She opened the door and saw",
    "The largest planet in the solar system is", "List of fruits: apples, pears,", "A prime number is a number that",
    "Roses are red, violets are", "Q: What is 12 times 12?\nA:", "The mitochondrion is", "El perro de mi vecino",
    "Photosynthesis turns light into", "Thank you for your letter of the 3rd of May.",
)  # fmt: skip


def place() -> Path:
    """The directory with the Q4_1 file."""
    return catalog.fetch("smollm2", echo=lambda _: None)


def site(directory: str) -> None:
    if directory and directory not in sys.path:
        sys.path.insert(0, directory)


# ------------------------------------------------------------------------------- the three


def theirs(dtype: torch.dtype, where: str) -> tuple[Any, Any]:
    """transformers' model and tokenizer, out of the GGUF file."""
    site(where)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [file] = place().glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(place(), gguf_file=file.name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(place(), gguf_file=file.name)


def transformers_generate(turn: Turn, dtype: torch.dtype, where: str) -> None:
    torch.set_num_threads(THREADS)
    model, tokenizer = theirs(dtype, where)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False)])
    while True:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        turn(out.shape[1] - ids.shape[1])


def ours(weights: str) -> Any:
    """firth's engine with these weights. What this version of the engine does not have is for the model to be."""
    from firth.generate.engine import Engine
    from firth.pretrained.load_save import load_model
    from firth.tokenizer.tokenizer import Tokenizer

    model, tokenizer = load_model(place()), Tokenizer.load(place())
    if weights in lowered():
        make: Callable[..., Any] = Engine
        return make(model, tokenizer, stops=(), weights=weights)
    return Engine(model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[weights]), tokenizer, stops=())


def lowered() -> tuple[str, ...]:
    """The weights that `Engine` can make of a model itself; none in a version without that option."""
    from firth.generate.engine import Engine

    return ("bf16", "int8", "int8-dynamic") if "weights" in inspect.signature(Engine).parameters else ()


def firth_generate(turn: Turn, weights: str) -> None:
    from firth.generate.sampling import Sampling

    torch.set_num_threads(THREADS)
    engine = ours(weights)
    prompt = engine.coder.encode(PROMPT)
    while True:
        turn(len(engine.generate([prompt], Sampling(temperature=0, max_new_tokens=NEW))[0].tokens))


def llama_generate(turn: Turn, kind: str, where: str) -> None:
    site(where)
    from bench.llamacpp import serving
    from firth.pretrained import gguf
    from firth.pretrained.load_save import load_model
    from firth.tokenizer.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        [file] = place().glob("*.gguf")
        if kind != "Q4_1":
            gguf.write(load_model(place()), Tokenizer.load(place()), Path(folder) / "file.gguf", kind)
            file = Path(folder) / "file.gguf"
        asked = {
            "prompt": PROMPT,
            "n_predict": NEW,
            "temperature": 0.0,
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        with serving(file, threads=THREADS, plain=False) as server:
            while True:
                turn(server.ask("/completion", asked)["tokens_predicted"])


def contenders(where: str) -> dict[str, Callable[[Turn], None]]:
    hf, llama = partial(transformers_generate, where=where), partial(llama_generate, where=where)
    return {
        "transformers": partial(hf, dtype=torch.float32),
        "transformers, bf16": partial(hf, dtype=torch.bfloat16),
        **{f"llama.cpp, {kind}": partial(llama, kind=kind) for kind in ("F32", "F16", "Q8_0", "Q4_1", "Q4_0")},
        **{f"firth, {w}": partial(firth_generate, weights=w) for w in dict.fromkeys((*lowered(), "bf16"))},
        "firth": partial(firth_generate, weights="fp32"),
    }


# ------------------------------------------------------------------------------- the same model


def check(where: str) -> None:
    """transformers and firth on PROMPTS: ids, logits (largest relative difference) and NEW greedy tokens."""
    from firth.generate.decoding import inference_mode, rectangle
    from firth.generate.sampling import Sampling

    (model, tokenizer), engine = theirs(torch.float32, where), ours("fp32")
    model.generation_config.eos_token_id = None
    ids, same, worst = 0, 0, 0.0
    for prompt in PROMPTS:
        shown = engine.coder.encode(prompt)
        asked = torch.from_numpy(shown.astype(np.int64))[None]
        ids += tokenizer.encode(prompt, add_special_tokens=False) == shown.tolist()
        with inference_mode(engine.model):
            mine = engine.model.heads["lm"](engine.model(rectangle([shown], torch.device("cpu"))))
            logits = model(asked).logits
        worst = max(worst, float((mine - logits).abs().max() / logits.abs().max()))
        out = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False)
        found = engine.generate([shown], Sampling(temperature=0, max_new_tokens=NEW))[0].tokens.tolist()
        same += found == out[0, asked.shape[1] :].tolist()
    n = len(PROMPTS)
    print(f"ids {ids} of {n} alike; logits within {worst:.1e}, relative; {NEW} greedy tokens: {same} of {n} alike")
    assert ids == same == n and worst < 1e-4


def main() -> None:
    parser = arguments(__doc__, contenders(""))
    parser.add_argument("--site", default="", help="where xllamacpp and gguf were installed, if not here")
    given = parser.parse_args()
    if given.check:
        check(given.site)
    else:
        command(given, contenders(given.site))


if __name__ == "__main__":
    main()
