"""Exports of firth in other libraries, offline: ids, logits, vectors and log-likelihoods must equal those of firth.

    python -m bench.interop.peers                                   # the libraries that are installed
    python -m bench.interop.peers --site DIR --version4 DIR         # also those installed with pip install --target
    python -m bench.interop.peers --model runs/mine                 # a run instead of random models

Peers: transformers as installed, transformers 4 (--version4: transformers 4.57, huggingface_hub 0.36, tokenizers 0.22,
requests, urllib3, certifi, charset-normalizer, each with pip install --no-deps --target), `lm_eval --model hf` and
sentence-transformers (--site). Each runs in a process of its own with HF_HUB_OFFLINE=1 and loads a directory that `firth
export` wrote in several files. A row has the largest difference to firth, or the reason why there is none.

The directories hold random models of every architecture that firth supports, with weights so large that a wrong tensor
shows. lm_eval gets a local task, a YAML file over a JSONL file, and must give each option the same log-likelihood as firth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

TEXTS = [
    "What is a module?",
    "The import statement binds names.",
    "A",
    "Lists, and tuples; dictionaries: all of them are containers.",
]
QUESTIONS = [
    {"question": "A module is", "options": [" an object", " a statement", " the"], "answer": 0},
    {"question": "The value of an expression", "options": [" is computed", " binds", " a name for it"], "answer": 1},
    {"question": "Names", "options": [" refer to objects", " are"], "answer": 0},
]


# ------------------------------------------------------------------------------- firth


def random_models(folder: Path) -> list[Path]:
    """Write random models, one of each architecture; return their directories."""
    import torch

    from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
    from firth.model.config_groups import EmbeddingConfig, LMHeadConfig, NormConfig, PositionConfig
    from firth.model.heads import LMHead
    from firth.model.model import LM
    from firth.pretrained.load_save import save_model
    from firth.tokenizer.train import train

    tokenizer = train(list(topics.values())[:60], "byte-bpe", vocab_size=1000, seed=0)
    size: dict[str, int] = {
        "vocab_size": tokenizer.vocab.size,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_positions": 128,
    }
    configs = {
        "llama": ModelConfig(**size, norm=NormConfig("rms", bias=False), position=PositionConfig("rotary"),
                             activation="swiglu", bias=False, num_kv_heads=2),  # type: ignore[arg-type]
        "gpt2": ModelConfig(**size),
        "nanochat": decoder_config(**size),
        "bert": ModelConfig(**size, causal=False, norm=NormConfig(placement="post", eps=1e-12, embedding=True),
                            embedding=EmbeddingConfig(type_vocab_size=2), activation="gelu", lm_head=LMHeadConfig("transform", bias=True)),
        "modernbert": encoder_config(**size),
        "t5": encoder_decoder_config(**size),
    }  # fmt: skip
    for name, config in configs.items():
        torch.manual_seed(0)
        model = LM(config, {"lm": LMHead(config)}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        save_model(model, tokenizer, folder / "made" / name)
    return [folder / "made" / name for name in configs]


def reference(directory: Path) -> dict[str, Any]:
    """Return firth's results for a directory: ids, logits and vectors of each text, log-likelihoods of the options."""
    import torch

    from firth.evaluate.task import load_evaluated_model
    from firth.evaluate.tasks.option_scoring import encode
    from firth.generate.engine import Engine
    from firth.model.variants import average
    from firth.runs.loaded_model import encode_prompt

    evaluated = load_evaluated_model(directory)
    model, tokenizer, model_config = evaluated.model, evaluated.tokenizer, evaluated.model.config
    kind = "source" if model_config.encoder.num_layers else "left" if model_config.causal else "both"
    modules, config = directory / "modules.json", directory / "config.json"
    unit = modules.exists() and "Normalize" in modules.read_text()
    expected: dict[str, Any] = {
        "kind": kind,
        "ids": [],
        "logits": [],
        "vectors": [],
        "scores": [],
        "head": "lm" in model.heads,
    }
    expected["family"] = json.loads(config.read_text())["model_type"]
    for text in TEXTS:
        ids = (
            tokenizer.vocab.add_special_tokens(tokenizer.encode(text))
            if kind == "both"
            else encode_prompt(tokenizer, text, model)
        )
        row = torch.as_tensor(ids)[None].long()
        steps = torch.arange(len(ids))[None]
        batch = {"tokens": row} | ({} if kind == "both" else {"query_time": steps, "key_time": steps})
        with torch.no_grad():
            states = model(batch | ({"source_tokens": row} if kind == "source" else {}))
            logits: torch.Tensor = model.heads["lm"](states) if "lm" in model.heads else states
        expected["ids"].append(ids.tolist())
        expected["logits"].append(logits[0].tolist())
        vector = average(states, None)[0]
        expected["vectors"].append((vector / vector.norm() if unit else vector).tolist())
    if kind == "left":
        engine = Engine(model, tokenizer)
        for item in QUESTIONS:
            pairs = [encode(evaluated, str(item["question"]), str(option)) for option in item["options"]]  # type: ignore[attr-defined]
            head = [tokenizer.vocab.bos] if "bos" in tokenizer.vocab.roles and tokenizer.bos is not False else []
            prompts = [np.concatenate((head, before)).astype(np.int32) for before, _ in pairs]
            expected["scores"].append([float(s) for s in engine.score(prompts, [after for _, after in pairs])])
    return expected


# ------------------------------------------------------------------------------- peers


def with_transformers(directory: str, expected: dict[str, Any]) -> str:
    """Compare ids and logits with those of the Auto classes."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if expected["family"] not in CONFIG_MAPPING_NAMES:
        return f"transformers {transformers.__version__}: no support for {expected['family']}"
    auto = {"left": "AutoModelForCausalLM", "both": "AutoModelForMaskedLM", "source": "AutoModelForSeq2SeqLM"}[
        expected["kind"]
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = getattr(transformers, auto if expected["head"] else "AutoModel").from_pretrained(directory).eval()
    difference = 0.0
    for text, ids, logits in zip(TEXTS, expected["ids"], expected["logits"], strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids, (inputs["input_ids"][0].tolist(), ids)
        more = {"decoder_input_ids": inputs["input_ids"]} if expected["kind"] == "source" else {}
        with torch.no_grad():
            output = model(**inputs, **more)[0][0] if expected["head"] else model(**inputs).last_hidden_state[0]
            difference = max(difference, (output - torch.tensor(logits)).abs().max().item())
    return f"transformers {transformers.__version__}: logits differ by {difference:.1e}"


def with_sentences(directory: str, expected: dict[str, Any]) -> str:
    """Compare vectors with those of sentence-transformers."""
    import sentence_transformers

    if expected["kind"] != "both":
        return "sentence-transformers: supports encoders only"
    model = sentence_transformers.SentenceTransformer(directory, device="cpu")
    difference = float(np.abs(model.encode(TEXTS) - np.array(expected["vectors"], np.float32)).max())
    return f"sentence-transformers {sentence_transformers.__version__}: vectors differ by {difference:.1e}"


def with_harness(directory: str, expected: dict[str, Any]) -> str:
    """Compare log-likelihoods with those of `lm_eval --model hf` for the options of a local task."""
    if expected["kind"] != "left":
        return "lm_eval: supports decoders only"
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "questions.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS))
        (Path(folder) / "local.yaml").write_text(
            "task: firth_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(data) + "\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{options}}'\n"
            "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
        )
        output = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={directory},dtype=float32", tasks=["firth_local"], device="cpu",
            task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0,
        )  # fmt: skip
    samples = sorted(output["samples"]["firth_local"], key=lambda sample: sample["doc_id"])
    theirs = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    difference = max(
        abs(a - b)
        for one, other in zip(theirs, expected["scores"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    accuracy = np.mean(
        [int(np.argmax(row)) == item["answer"] for row, item in zip(expected["scores"], QUESTIONS, strict=True)]
    )
    same = "" if abs(output["results"]["firth_local"]["acc,none"] - accuracy) < 1e-9 else "; THE ACCURACY DIFFERS"
    return f"lm_eval {lm_eval.__version__ if '__version__' in vars(lm_eval) else ''}: log-likelihoods differ by {difference:.1e}{same}"


PEERS = {
    "transformers": with_transformers,
    "version4": with_transformers,
    "sentences": with_sentences,
    "harness": with_harness,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--site", default="", help="directory in which sentence-transformers and lm-eval were installed with --target"
    )
    parser.add_argument("--version4", default="", help="directory in which transformers 4 was installed with --target")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a run or model directory")
    parser.add_argument("--dtype", default="", help="data type of the export; numbers agree to its precision")
    args = parser.parse_args()
    from firth.runs.import_export import export_model

    sites = {"transformers": "", "sentences": args.site, "harness": args.site} | (
        {"version4": args.version4} if args.version4 else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model or random_models(Path(folder)):
            out = Path(folder) / "out" / model.resolve().name
            export_model(
                model,
                out,
                form="hf",
                dtype=args.dtype,
                shard="100KB" if not args.model else "2GB",
                log=lambda _: None,
            )
            (Path(folder) / "expected.json").write_text(json.dumps(reference(out)))
            print(f"{model.name}:", flush=True)
            for peer, site in sites.items():
                path = os.pathsep.join(p for p in (site, os.environ.get("PYTHONPATH", "")) if p)
                done = subprocess.run(
                    [sys.executable, "-P", __file__, peer, str(out), str(Path(folder) / "expected.json")], capture_output=True, text=True,
                    env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": folder},
                )  # fmt: skip
                warnings = [
                    line for line in done.stderr.splitlines() if "warn" in line.lower() or "newly initialized" in line
                ]
                last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
                print(
                    f"  {last}" + (f"; {len(warnings)} warnings: {warnings[0][:150]}" if warnings else ""), flush=True
                )


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in PEERS:
        print(PEERS[sys.argv[1]](sys.argv[2], json.loads(Path(sys.argv[3]).read_text())))
    else:
        main()
