"""The demo: every stage once, on real text, in about seven minutes on two cores.

    1 subwords   2 three families pretrained   3 a finetuned task   4 instruction tuning
    5 preferences and a reward model   6 PPO and DPO   7 report, models, next commands

Every stage is an ordinary recipe in an ordinary run directory: a user can do the same with `firth train`, and an interrupted demo
resumes. Finished stages return at once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firth.align.rewards import FunctionReward, RewardModel, Rollout, sample_preference, write_preference_pairs
from firth.align.rollouts import RolloutConfig, RolloutSource
from firth.corpora import catalog
from firth.demo import folder, plays
from firth.demo.data import DemoText, read_rows
from firth.demo.report import WORDS, commands, demo_report
from firth.demo.scorers import SCORERS
from firth.demo.sizes import SIZES, DemoSize
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.io.atomic import make_directory, write_text
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.recipes import finetuning, post_training
from firth.report.page import write
from firth.runs.inference import LoadedModel, encode_prompt, open_run
from firth.runs.prepare import DataConfig, train_tokenizer
from firth.runs.recipe import Recipe, TokenizerConfig
from firth.runs.run import RunResult, run
from firth.runs.tokenizer import sentinels_of
from firth.tokenizer import chat, inspection
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LogLine, UserError

Facts = dict[str, Any]


def run_demo(out: Path, *, text: Sequence[str] = (), size: str = "small", seed: int = 0, echo: LogLine = print) -> Path:
    """Run every stage that is not finished in `out`.

    Args:
        out: Directory of the demo.
        text: A user's own files or folders instead of the plays.
        size: A name in SIZES.
        seed: Seed of all stages.
        echo: Prints a line.

    Returns:
        The path of the report.

    Raises:
        UserError: The size is unknown, the text is too small, or the directory holds another demo.
    """
    if size not in SIZES:
        raise UserError(f"there is no size {size!r} of the demo; there is {', '.join(SIZES)}")
    make_directory(out)
    _check_same(out, {"text": [str(Path(t).resolve()) for t in text], "size": size, "seed": seed})
    return _Demo(out, list(text), SIZES[size], seed, echo).run()


def _check_same(out: Path, settings: Facts) -> None:
    """Raise a UserError if the directory holds a demo with other settings."""
    path = out / "demo.json"
    if not path.exists():
        path.write_text(json.dumps(settings), "utf-8")
    elif json.loads(path.read_text("utf-8")) != settings:
        raise UserError(
            f"{out} holds a demo of other text, size or seed: delete it, or choose another directory with --out"
        )


def gapped(texts: Sequence[str], gap: str, missing: int, rng: random.Random) -> list[str]:
    """Return up to four texts of 8 to 24 words, with some words replaced by a gap.

    Texts that contain the gap's own spelling are left out.

    Args:
        texts: Candidates.
        gap: The mask token.
        missing: Words to replace.
        rng: Random numbers.

    >>> gapped(["so shaken as we are so wan with care", "a <mask> b c d e f g h"], "<mask>", 2, random.Random(0))
    ['so shaken as we <mask> wan with care']
    """
    candidates = [text for text in texts if 8 <= len(text.split()) <= 24 and gap not in text]
    found = []
    for text in rng.sample(candidates, min(4, len(candidates))):
        words = text.split()
        at = rng.randrange(1, len(words) - 2)
        words[at : at + missing] = [gap]
        found.append(" ".join(words))
    return found


def text_of(texts: Mapping[bytes, str], prompt: np.ndarray) -> str:
    """Return the text of a prompt (n,), by the bytes of its tokens."""
    return texts[prompt.tobytes()]


@dataclass
class _Demo:
    """The stages of one demo."""

    out: Path
    text: list[str]
    size: DemoSize
    seed: int
    echo: LogLine

    def run(self) -> Path:
        """Run all stages and return the report."""
        began = time.monotonic()
        self.material = self.material_made()
        self.announce(1, f"subwords from {self.material.title}, {self.material.bytes / 1e6:.1f} MB of training text")
        self.tokenizer = self.subwords()
        self.announce(2, "pretraining: an encoder, an encoder-decoder and a decoder")
        self.families = self.pretrained()
        self.announce(3, f"finetuning. {self.material.question}")
        self.classified()
        self.announce(4, f"instruction tuning. {self.material.cue}")
        self.instructed = self.tuned()
        self.announce(5, "preferences, and a reward model")
        self.reward = self.rewarded()
        self.announce(6, "PPO and DPO from the same start")
        self.aligned()
        self.announce(7, "the report")
        path = write(demo_report(self.out, self.material, self.size), self.out / "report.html")
        self.echo(f"\nDone in {time.monotonic() - began:.0f} s. Open {path}\nThen, for example:")
        activate = Path(sys.prefix, "bin", "activate")
        if shutil.which("firth") is None and activate.exists():
            self.echo(f"  source {os.path.relpath(activate)}")
        for command in commands(self.out, self.material):
            self.echo(f"  {command.line}")
        return path

    def announce(self, number: int, what: str) -> None:
        self.echo(f"\n[{number}/7] {what}")

    def once(self, name: str, make: Callable[[], Facts]) -> Facts:
        """A stage's findings: computed once and kept as JSON."""
        path = self.out / "findings" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            found = make()
            write_text(path, json.dumps(found, ensure_ascii=False, indent=1))
        kept: Facts = json.loads(path.read_text("utf-8"))
        return kept

    # 1

    def material_made(self) -> DemoText:
        place = self.out / "material"
        plan = {"labels": self.size.labels, "held_labels": self.size.held_labels, "seed": self.seed}
        if (place / "material.json").exists():
            return DemoText.load(place)
        if self.text:
            return folder.make(self.text, place, **plan)
        return plays.make(catalog.fetch("shakespeare", echo=self.echo), place, **plan)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return read_rows(self.out / "material" / f"{name}.jsonl")

    def file(self, name: str) -> str:
        return str(self.out / "material" / f"{name}.jsonl")

    def subwords(self) -> Tokenizer:
        place = self.out / "tokenizer"
        if not (place / "merges.json").exists():
            plans = self.size.pretraining(self.size.vocab_size).values()
            train_tokenizer(
                [self.file("train")], place, algorithm="byte-bpe", vocab_size=self.size.vocab_size, seed=self.seed, log=self.echo,
                num_sentinels=max(map(sentinels_of, plans)),
            )  # fmt: skip
        self.echo(inspection.report(place, WORDS, first=12))
        return Tokenizer.load(place)

    # 2

    def pretrained(self) -> dict[str, RunResult]:
        source = DataConfig(
            path=(self.file("train"),), validation_path=(self.file("valid"),), cache_dir=str(self.out / "stores")
        )
        plan = TokenizerConfig(path=str(self.out / "tokenizer"))
        done = {}
        for name, recipe in self.size.pretraining(self.tokenizer.vocab.size).items():
            here = dataclasses.replace(recipe, name=name, data=source, tokenizer=plan, seed=self.seed)
            done[name] = run(here, self.out / name, log=self.echo)
            found = self.once(f"samples-{name}", functools.partial(self.before_and_after, name, here))
            for sample in found["samples"][:1]:
                self.echo(f"  {sample['prompt']!r}\n    before: {sample['before']!r}\n    after:  {sample['after']!r}")
        return done

    def before_and_after(self, name: str, recipe: Recipe) -> Facts:
        """The same prompts answered by the untrained and the trained model."""
        after = open_run(self.out / name)
        torch.manual_seed(self.seed)
        untrained = LM(after.model.config, recipe.objective.heads(after.model.config))
        before = LoadedModel(untrained, self.tokenizer, Engine(untrained, self.tokenizer))
        prompts = self.prompts(name)
        answers = [self.answers(name, opened, prompts) for opened in (before, after)]
        samples = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, *answers, strict=True)]
        return {"samples": samples}

    def prompts(self, name: str) -> list[str]:
        """Held-out text in the form that the family reads."""
        if name == "decoder":
            return list(self.material.samples)
        completions = [row["completion"] for row in self.rows("dialogues-valid")]
        if name == "encoder":
            return gapped(completions, self.tokenizer.token(self.tokenizer.vocab.mask), 1, random.Random(self.seed))
        return gapped(completions, "<extra_id_0>", 2, random.Random(self.seed))

    def answers(self, name: str, opened: LoadedModel, prompts: Sequence[str]) -> list[str]:
        if name == "encoder":
            found = []
            for prompt in prompts:
                [candidates] = opened.engine.fill(prompt, 5)
                found.append("  ".join(f"{readable(c.piece)} {c.probability:.2f}" for c in candidates))
            return found
        sampling = self.legible(self.size.sample)
        if name == "decoder":
            return opened.continue_text(prompts, sampling)
        sentinel = self.tokenizer.id("<extra_id_0>")
        ids = []
        for prompt in prompts:
            left, right = prompt.split("<extra_id_0>")
            parts = (
                self.tokenizer.encode(left.rstrip()),
                [sentinel],
                self.tokenizer.encode(right),
                [self.tokenizer.vocab.eos],
            )
            ids.append(np.concatenate(parts).astype(np.int32))
        short = dataclasses.replace(sampling, max_new_tokens=12)
        return [c.text for c in opened.engine.generate(ids, short)]

    def legible(self, longest: int) -> Sampling:
        """How a sample for a reader is drawn: somewhat below temperature 1, without the long tail."""
        return Sampling(max_new_tokens=longest, temperature=0.7, min_p=0.05, seed=self.seed)

    # 3

    def classified(self) -> None:
        source = DataConfig(path=(self.file("labeled-train"),), validation_path=(self.file("labeled-valid"),))
        base = self.size.finetune(finetuning.classification())
        config = load_model(self.families["encoder"].model).config
        plan = TokenizerConfig(path=str(self.out / "tokenizer"))
        for name, begins in (
            ("classification-pretrained", {"init_from": str(self.out / "encoder")}),
            ("classification-scratch", {"model": config}),
        ):
            recipe = dataclasses.replace(base, name=name, data=source, seed=self.seed, tokenizer=plan, **begins)
            done = run(recipe, self.out / name, log=self.echo)
            self.echo(f"  {name}: {done.metrics['valid/accuracy']:.1%} of the held-out passages right")

    # 4

    def tuned(self) -> Path:
        source = DataConfig(path=(self.file("dialogues-train"),), validation_path=(self.file("dialogues-valid"),))
        recipe = dataclasses.replace(
            self.size.sft(post_training.sft()),
            name="sft",
            data=source,
            init_from=str(self.out / "decoder"),
            seed=self.seed,
        )
        run(recipe, self.out / "sft", log=self.echo)
        found = self.once("samples-sft", self.dialogues)
        for sample in found["samples"][:2]:
            self.echo(f"  {sample['prompt']!r}\n    before: {sample['before']!r}\n    after:  {sample['after']!r}")
        return self.out / "sft"

    def prompt_rows(self, part: str, n: int) -> list[dict[str, Any]]:
        """The first n rows of dialogues whose prompts leave room for an answer."""
        rows = self.rows(f"dialogues-{part}")
        room = self.size.max_positions - self.size.answer
        return [r for r in rows if len(self.prompt(r["prompt"])) <= room][:n]

    def prompt(self, text: str) -> np.ndarray:
        return chat.encode(self.tokenizer, [{"role": "user", "content": text}], open=True)[0]

    def dialogues(self) -> Facts:
        prompts = [row["prompt"] for row in self.prompt_rows("valid", 4)]
        answers = []
        for name in ("decoder", "sft"):
            opened = open_run(self.out / name)
            read = [
                self.prompt(p) if name == "sft" else encode_prompt(self.tokenizer, p, opened.model) for p in prompts
            ]
            sampling = self.legible(self.size.answer)
            answers.append([c.text for c in opened.engine.generate(read, sampling)])
        return {"samples": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, *answers, strict=True)]}

    # 5

    def truth(self) -> FunctionReward:
        return FunctionReward(SCORERS[self.material.scorer])

    def drawn(self, model: LM, prompts: Sequence[np.ndarray], seed: int) -> list[Rollout]:
        sampling = Sampling(max_new_tokens=self.size.answer, seed=seed)
        written = Engine(model, self.tokenizer).generate(prompts, sampling)
        return [Rollout.of(p, w) for p, w in zip(prompts, written, strict=True)]

    def rewarded(self) -> Path:
        self.once("preferences", self.preferences)
        source = DataConfig(path=(self.file("preferences-train"),), validation_path=(self.file("preferences-valid"),))
        recipe = dataclasses.replace(
            self.size.reward(post_training.reward_model()),
            name="reward_model",
            data=source,
            init_from=str(self.instructed),
            seed=self.seed,
        )
        done = run(recipe, self.out / "reward_model", log=self.echo)
        self.echo(f"  the reward model agrees with {done.metrics['valid/accuracy']:.1%} of the held-out comparisons")
        return self.out / "reward_model"

    def preferences(self) -> Facts:
        """Two answers to each prompt, compared by the true scorer with a stated inconstancy (Bradley-Terry)."""
        model = load_model(self.instructed / "model")
        counts: Facts = {}
        for part, n in (("train", self.size.comparisons), ("valid", self.size.held_comparisons)):
            requests = [row["prompt"] for row in self.prompt_rows(part, n)]
            prompts = [self.prompt(text) for text in requests]
            texts = {prompt.tobytes(): text for prompt, text in zip(prompts, requests, strict=True)}
            first, second = (self.drawn(model, prompts, self.seed + s) for s in (1, 100_001))
            rng = np.random.default_rng((self.seed, len(part)))
            found = sample_preference(
                first, second, self.truth(), tokenizer=self.tokenizer, noise=self.size.noise, rng=rng
            )
            write_preference_pairs(found, Path(self.file(f"preferences-{part}")), functools.partial(text_of, texts))
            counts[part] = len(found)
            counts[f"{part}-agree"] = float(np.mean([c.margin > 0 for c in found]))
        self.echo(
            f"  {counts['train']} comparisons to learn from and {counts['valid']} held out; the judge is inconstant: "
            f"{counts['train-agree']:.0%} of its choices have the higher true score"
        )
        return counts

    # 6

    def aligned(self) -> None:
        start = str(self.instructed)
        prompts = DataConfig(path=(self.file("dialogues-train"),))
        ppo = dataclasses.replace(
            self.size.ppo(post_training.ppo(), reward=str(self.reward), scorer=f"firth.demo.scorers:{self.material.scorer}"),
            name="ppo", data=prompts, init_from=start, seed=self.seed,
        )  # fmt: skip
        pairs = DataConfig(path=(self.file("preferences-train"),), validation_path=(self.file("preferences-valid"),))
        dpo = dataclasses.replace(
            self.size.dpo(post_training.dpo()), name="dpo", data=pairs, init_from=start, seed=self.seed
        )
        for recipe in (ppo, dpo):
            run(recipe, self.out / recipe.name, log=self.echo)
        found = self.once("alignment", self.alignment)
        for name, row in found["models"].items():
            self.echo(
                f"  {name:<9} true reward {row['truth']:.2f}   reward model {row['reward']:+.2f}   "
                f"KL to the start {row['kl_per_answer']:.1f} nats an answer   {row['length']:.0f} tokens"
            )

    def alignment(self) -> Facts:
        """Return true reward, learned reward and KL to the reference of all three, on the same held-out prompts."""
        reference = load_model(self.instructed / "model")
        held = self.prompt_rows("valid", self.size.judged)
        prompts = [self.prompt(row["prompt"]) for row in held]
        judge = RewardModel(load_model(self.reward / "model"))
        judge = judge.normalized(self.drawn(reference, prompts, self.seed + 9))
        phase = RolloutConfig(rollout_size=len(prompts), max_new_tokens=self.size.answer, steps=1)
        models: Facts = {}
        texts: dict[str, list[str]] = {}
        for name in ("sft", "ppo", "dpo"):
            policy = load_model(self.out / name / "model")
            source = RolloutSource(
                prompts,
                self.tokenizer,
                judge,
                reference,
                config=phase,
                true_reward_function=self.truth(),
                seed=self.seed + 7,
            )
            models[name] = dict(source.prepare(policy, 0))
            written = Engine(policy, self.tokenizer).generate(prompts[:6], self.legible(self.size.answer))
            texts[name] = [w.text for w in written]
        samples = [
            {"prompt": row["prompt"], **{name: texts[name][i] for name in texts}} for i, row in enumerate(held[:6])
        ]
        return {"models": models, "samples": samples, "prompts": len(prompts)}
