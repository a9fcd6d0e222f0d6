"""The demo: every stage of a language model once, on real text, in about seven minutes on two cores.

    1 tokenizer   2 pretraining of three model families   3 finetuning of a classifier   4 instruction tuning
    5 preferences and a reward model   6 PPO and DPO   7 report, models, next commands

Every stage is an ordinary recipe in an ordinary run directory, so a user can do the same with `firth train`. An interrupted demo
resumes, and finished stages return at once.
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
from firth.align.rollouts import RolloutsConfig, RolloutSource
from firth.corpora import catalog
from firth.data.examples import DataConfig
from firth.demo import data
from firth.demo.data import INFO, SCORERS, DatasetInfo, read_rows
from firth.demo.report import EXAMPLE_WORDS, demo_report, next_commands
from firth.demo.sizes import SIZES, DemoSize
from firth.generate.engine import Engine
from firth.generate.fill import fill_masks
from firth.generate.sampling import Sampling
from firth.io.atomic import make_directory, write_text
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.recipes import finetuning, post_training
from firth.report.page import write
from firth.runs.inference import open_run
from firth.runs.loaded_model import Model, encode_prompt
from firth.runs.prepare import train_tokenizer
from firth.runs.recipe import Recipe, TokenizerConfig
from firth.runs.run import RunResult, run
from firth.runs.tokenizer import sentinels_of
from firth.tokenizer import chat, inspection
from firth.tokenizer.inspection import readable
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LOGGER, LogLine, UserError

Results = dict[str, Any]
"""Results of a stage, as JSON."""


def run_demo(
    out: Path, *, text: Sequence[str] = (), size: str = "small", seed: int = 0, log: LogLine = LOGGER.info
) -> Path:
    """Run every stage that is not finished in a directory.

    Args:
        out: Directory of the demo.
        text: A user's own files or folders instead of the plays.
        size: A name in SIZES.
        seed: Seed of all stages.
        log: Receives progress messages.

    Returns:
        The path of the report.

    Raises:
        UserError: The size is unknown, the text is too small, or the directory holds another demo.
    """
    if size not in SIZES:
        raise UserError(f"there is no size {size!r} of the demo; there is {', '.join(SIZES)}")
    make_directory(out)
    _check_settings(out, {"text": [str(Path(path).resolve()) for path in text], "size": size, "seed": seed})
    return _Demo(out, list(text), SIZES[size], seed, log).run()


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise a UserError if the directory holds a demo with other settings."""
    path = out / "demo.json"
    if not path.exists():
        path.write_text(json.dumps(settings), "utf-8")
    elif json.loads(path.read_text("utf-8")) != settings:
        raise UserError(
            f"{out} holds a demo of other text, size or seed: delete it, or choose another directory with --out"
        )


def mask_words(texts: Sequence[str], mask_token: str, num_words: int, rng: random.Random) -> list[str]:
    """Replace consecutive words of up to four texts by one mask token each.

    Texts with fewer than 8 or more than 24 words and texts that contain the mask token are left out.

    Args:
        texts: Candidates.
        mask_token: The mask token.
        num_words: Number of words that it replaces.
        rng: Random number generator.

    Returns:
        The masked texts.

    >>> mask_words(["so shaken as we are so wan with care", "a <mask> b c d e f g h"], "<mask>", 2, random.Random(0))
    ['so shaken as we <mask> wan with care']
    """
    candidates = [text for text in texts if 8 <= len(text.split()) <= 24 and mask_token not in text]
    masked = []
    for text in rng.sample(candidates, min(4, len(candidates))):
        words = text.split()
        start = rng.randrange(1, len(words) - 2)
        words[start : start + num_words] = [mask_token]
        masked.append(" ".join(words))
    return masked


def prompt_text(texts: Mapping[bytes, str], prompt: np.ndarray) -> str:
    """Return the text of an encoded prompt.

    Args:
        texts: Bytes of the token ids of each prompt -> its text.
        prompt: Token ids, (n,).

    Returns:
        The text.
    """
    return texts[prompt.tobytes()]


@dataclass
class _Demo:
    """The stages of one demo.

    Args:
        out: Directory of the demo.
        text: A user's own files or folders; empty for the plays.
        size: Configuration of the stages.
        seed: Seed of all stages.
        log: Receives progress messages.
    """

    out: Path
    text: list[str]
    size: DemoSize
    seed: int
    log: LogLine

    def run(self) -> Path:
        """Run all stages.

        Returns:
            The path of the report.
        """
        start_time = time.monotonic()
        self.info = self.load_or_make_data()
        self.log_stage(1, f"subwords of {self.info.title}, {self.info.bytes / 1e6:.1f} MB of training text")
        self.tokenizer = self.train_tokenizer()
        self.log_stage(2, "pretraining: an encoder, an encoder-decoder and a decoder")
        self.pretrained_runs = self.pretrain_families()
        self.log_stage(3, f"finetuning. {self.info.question}")
        self.finetune_classifier()
        self.log_stage(4, f"instruction tuning. {self.info.cue}")
        self.sft_directory = self.instruction_tune()
        self.log_stage(5, "preferences and a reward model")
        self.reward_model_directory = self.train_reward_model()
        self.log_stage(6, "PPO and DPO from the same start")
        self.align()
        self.log_stage(7, "report")
        path = write(demo_report(self.out, self.info, self.size), self.out / "report.html")
        self.log(f"\nDone in {time.monotonic() - start_time:.0f} s. Open {path}\nThen, for example:")
        activate = Path(sys.prefix, "bin", "activate")
        if shutil.which("firth") is None and activate.exists():
            self.log(f"  source {os.path.relpath(activate)}")
        for command in next_commands(self.out, self.info):
            self.log(f"  {command.line}")
        return path

    def log_stage(self, number: int, title: str) -> None:
        """Print the heading of a stage.

        Args:
            number: Number of the stage.
            title: Description of the stage.
        """
        self.log(f"\n[{number}/7] {title}")

    def log_samples(self, samples: Sequence[Mapping[str, str]]) -> None:
        """Print prompts with their samples before and after training.

        Args:
            samples: Prompt, before and after.
        """
        for sample in samples:
            self.log(f"  {sample['prompt']!r}\n    before: {sample['before']!r}\n    after:  {sample['after']!r}")

    def load_or_compute(self, name: str, compute: Callable[[], Results]) -> Results:
        """Read the results of a stage from their JSON file, or compute and write them.

        Args:
            name: Name of the file in findings/, without suffix.
            compute: Computes the results.

        Returns:
            The results.
        """
        path = self.out / "findings" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            computed = compute()
            write_text(path, json.dumps(computed, ensure_ascii=False, indent=1))
        results: Results = json.loads(path.read_text("utf-8"))
        return results

    # Stage 1: data and tokenizer

    def load_or_make_data(self) -> DatasetInfo:
        """Read the description of the data, and write the data first if it does not exist.

        Returns:
            The description of the data.
        """
        directory = self.out / "material"
        if (directory / INFO).exists():
            return DatasetInfo.load(directory)
        limits = {"max_labeled_train": self.size.max_labeled_train, "max_labeled_valid": self.size.max_labeled_valid}
        if self.text:
            return data.make_folder_data(self.text, directory, **limits, seed=self.seed)
        return data.make_play_data(catalog.fetch("shakespeare", log=self.log), directory, **limits, seed=self.seed)

    def data_file(self, name: str) -> str:
        """Return the path of a data file.

        Args:
            name: Its name without suffix.

        Returns:
            The path.
        """
        return str(self.out / "material" / f"{name}.jsonl")

    def data_of(self, task: str) -> DataConfig:
        """Return the data config of a task with a training and a validation file.

        Args:
            task: Prefix of the file names.

        Returns:
            The data config.
        """
        return DataConfig(path=(self.data_file(f"{task}-train"),), validation_path=(self.data_file(f"{task}-valid"),))

    def train_tokenizer(self) -> Tokenizer:
        """Train the tokenizer if it does not exist, and print its report.

        Returns:
            The tokenizer.
        """
        directory = self.out / "tokenizer"
        if not (directory / "merges.json").exists():
            recipes = self.size.pretraining_recipes(self.size.vocab_size).values()
            train_tokenizer(
                [self.data_file("train")],
                directory,
                algorithm="byte-bpe",
                vocab_size=self.size.vocab_size,
                seed=self.seed,
                log=self.log,
                num_sentinels=max(map(sentinels_of, recipes)),
            )
        self.log(inspection.report(directory, EXAMPLE_WORDS, first=12))
        return Tokenizer.load(directory)

    # Stage 2: pretraining

    def pretrain_families(self) -> dict[str, RunResult]:
        """Pretrain an encoder, an encoder-decoder and a decoder.

        Returns:
            The training runs by name.
        """
        data = DataConfig(
            path=(self.data_file("train"),),
            validation_path=(self.data_file("valid"),),
            cache_dir=str(self.out / "stores"),
        )
        tokenizer = TokenizerConfig(path=str(self.out / "tokenizer"))
        runs = {}
        for name, base in self.size.pretraining_recipes(self.tokenizer.vocab.size).items():
            recipe = dataclasses.replace(base, name=name, data=data, tokenizer=tokenizer, seed=self.seed)
            runs[name] = run(recipe, self.out / name, log=self.log)
            compute = functools.partial(self.sample_before_and_after, name, recipe)
            self.log_samples(self.load_or_compute(f"samples-{name}", compute)["samples"][:1])
        return runs

    def sample_before_and_after(self, name: str, recipe: Recipe) -> Results:
        """Sample from the untrained and from the trained model for the same prompts.

        Args:
            name: Name of the model family.
            recipe: Its pretraining recipe.

        Returns:
            `samples`: prompt, before and after.
        """
        trained = open_run(self.out / name)
        torch.manual_seed(self.seed)
        model = LM(trained.model.config, recipe.objective.heads(trained.model.config))
        untrained = Model.of(model, self.tokenizer)
        prompts = self.sample_prompts(name)
        before, after = (self.generate_samples(name, loaded, prompts) for loaded in (untrained, trained))
        samples = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
        return {"samples": samples}

    def sample_prompts(self, name: str) -> list[str]:
        """Return held-out prompts for a model family.

        Args:
            name: Name of the model family.

        Returns:
            Texts to continue for the decoder; texts with a mask token or a sentinel for the others.
        """
        if name == "decoder":
            return list(self.info.samples)
        completions = [row["completion"] for row in read_rows(Path(self.data_file("dialogues-valid")))]
        if name == "encoder":
            mask_token = self.tokenizer.token(self.tokenizer.vocab.mask)
            return mask_words(completions, mask_token, 1, random.Random(self.seed))
        return mask_words(completions, "<extra_id_0>", 2, random.Random(self.seed))

    def generate_samples(self, name: str, loaded: Model, prompts: Sequence[str]) -> list[str]:
        """Generate one sample per prompt.

        Args:
            name: Name of the model family.
            loaded: The model.
            prompts: The texts of `sample_prompts`.

        Returns:
            The five most probable tokens and their probabilities for the encoder; generated text for the others.
        """
        if name == "encoder":
            predictions = []
            for prompt in prompts:
                [candidates] = fill_masks(loaded.model, loaded.tokenizer, prompt, 5)
                shown = [readable(c.piece, loaded.tokenizer.is_byte_level) for c in candidates]
                predictions.append(
                    "  ".join(f"{s} {c.probability:.2f}" for s, c in zip(shown, candidates, strict=True))
                )
            return predictions
        sampling = self.readable_sampling(self.size.max_sample_tokens)
        if name == "decoder":
            return loaded.continue_text(prompts, sampling)
        sentinel = self.tokenizer.id("<extra_id_0>")
        sources = []
        for prompt in prompts:
            left, right = prompt.split("<extra_id_0>")
            ids = (
                self.tokenizer.encode(left.rstrip()),
                [sentinel],
                self.tokenizer.encode(right),
                [self.tokenizer.vocab.eos],
            )
            sources.append(np.concatenate(ids).astype(np.int32))
        short = dataclasses.replace(sampling, max_new_tokens=12)
        return [completion.text for completion in loaded.engine.generate(sources, short)]

    def readable_sampling(self, max_new_tokens: int) -> Sampling:
        """Return the sampling settings of printed samples: a temperature below 1, and no improbable tokens.

        Args:
            max_new_tokens: Largest number of tokens.

        Returns:
            The sampling settings.
        """
        return Sampling(max_new_tokens=max_new_tokens, temperature=0.7, min_p=0.05, seed=self.seed)

    # Stage 3: finetuning

    def finetune_classifier(self) -> None:
        """Train a classifier from the pretrained encoder, and one from random weights."""
        base = self.size.classification_recipe(finetuning.classification())
        config = load_model(self.pretrained_runs["encoder"].model).config
        tokenizer = TokenizerConfig(path=str(self.out / "tokenizer"))
        data = self.data_of("labeled")
        for name, start in (
            ("classification-pretrained", {"init_from": str(self.out / "encoder")}),
            ("classification-scratch", {"model": config}),
        ):
            recipe = dataclasses.replace(base, name=name, data=data, seed=self.seed, tokenizer=tokenizer, **start)
            result = run(recipe, self.out / name, log=self.log)
            self.log(f"  {name}: accuracy {result.metrics['valid/accuracy']:.1%} on the held-out passages")

    # Stage 4: instruction tuning

    def instruction_tune(self) -> Path:
        """Finetune the decoder on dialogues.

        Returns:
            The run directory.
        """
        recipe = dataclasses.replace(
            self.size.sft_recipe(post_training.sft()),
            name="sft",
            data=self.data_of("dialogues"),
            init_from=str(self.out / "decoder"),
            seed=self.seed,
        )
        run(recipe, self.out / "sft", log=self.log)
        self.log_samples(self.load_or_compute("samples-sft", self.sample_answers)["samples"][:2])
        return self.out / "sft"

    def dialogue_rows(self, split: str, max_rows: int) -> list[dict[str, Any]]:
        """Return the first dialogues whose prompts leave room for an answer.

        Args:
            split: train or valid.
            max_rows: Largest number of rows.

        Returns:
            Rows with prompt and completion.
        """
        rows = read_rows(Path(self.data_file(f"dialogues-{split}")))
        max_length = self.size.max_positions - self.size.max_answer_tokens
        return [row for row in rows if len(self.encode_chat_prompt(row["prompt"])) <= max_length][:max_rows]

    def encode_chat_prompt(self, text: str) -> np.ndarray:
        """Encode a user message with the chat template, up to the start of the answer.

        Args:
            text: The message.

        Returns:
            Token ids, (n,).
        """
        return chat.encode(self.tokenizer, [{"role": "user", "content": text}], open=True)[0]

    def sample_answers(self) -> Results:
        """Sample answers of the decoder before and after instruction tuning.

        Returns:
            `samples`: prompt, before and after.
        """
        texts = [row["prompt"] for row in self.dialogue_rows("valid", 4)]
        sampling = self.readable_sampling(self.size.max_answer_tokens)
        answers = []
        for name in ("decoder", "sft"):
            loaded = open_run(self.out / name)
            prompts = [
                self.encode_chat_prompt(text) if name == "sft" else encode_prompt(self.tokenizer, text, loaded.model)
                for text in texts
            ]
            answers.append([completion.text for completion in loaded.engine.generate(prompts, sampling)])
        return {"samples": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(texts, *answers, strict=True)]}

    # Stage 5: preferences and a reward model

    def true_reward(self) -> FunctionReward:
        """Return the ground-truth reward function.

        Returns:
            The reward function that the description of the data names.
        """
        return FunctionReward(SCORERS[self.info.scorer])

    def sample_completions(self, model: LM, prompts: Sequence[np.ndarray], seed: int) -> list[Rollout]:
        """Sample one completion per prompt at temperature 1.

        Args:
            model: The policy.
            prompts: Token ids of each prompt, (n,).
            seed: Seed of the sampling.

        Returns:
            One rollout per prompt.
        """
        sampling = Sampling(max_new_tokens=self.size.max_answer_tokens, seed=seed)
        completions = Engine(model, self.tokenizer).generate(prompts, sampling)
        return [Rollout.of(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def train_reward_model(self) -> Path:
        """Sample preferences and train a reward model on them.

        Returns:
            The run directory.
        """
        self.load_or_compute("preferences", self.sample_preferences)
        recipe = dataclasses.replace(
            self.size.reward_model_recipe(post_training.reward_model()),
            name="reward_model",
            data=self.data_of("preferences"),
            init_from=str(self.sft_directory),
            seed=self.seed,
        )
        result = run(recipe, self.out / "reward_model", log=self.log)
        self.log(f"  accuracy of the reward model on held-out comparisons: {result.metrics['valid/accuracy']:.1%}")
        return self.out / "reward_model"

    def sample_preferences(self) -> Results:
        """Sample two answers to each prompt, and compare them by the true reward with noise (Bradley-Terry).

        Returns:
            Number of comparisons of each split, and the share of them that agree with the true reward.
        """
        model = load_model(self.sft_directory / "model")
        counts: Results = {}
        for split, max_rows in (
            ("train", self.size.num_train_comparisons),
            ("valid", self.size.num_valid_comparisons),
        ):
            texts = [row["prompt"] for row in self.dialogue_rows(split, max_rows)]
            prompts = [self.encode_chat_prompt(text) for text in texts]
            text_of_ids = {prompt.tobytes(): text for prompt, text in zip(prompts, texts, strict=True)}
            first, second = (self.sample_completions(model, prompts, self.seed + s) for s in (1, 100_001))
            rng = np.random.default_rng((self.seed, len(split)))
            noise = self.size.preference_noise
            pairs = sample_preference(first, second, self.true_reward(), tokenizer=self.tokenizer, noise=noise, rng=rng)
            path = Path(self.data_file(f"preferences-{split}"))
            write_preference_pairs(pairs, path, functools.partial(prompt_text, text_of_ids))
            counts[split] = len(pairs)
            counts[f"{split}-agree"] = float(np.mean([pair.margin > 0 for pair in pairs]))
        self.log(
            f"  {counts['train']} training comparisons and {counts['valid']} held-out ones; the preferences are noisy: in "
            f"{counts['train-agree']:.0%} of the training comparisons the chosen answer has the higher true reward"
        )
        return counts

    # Stage 6: PPO and DPO

    def align(self) -> None:
        """Train the instruction-tuned decoder with PPO and with DPO, and print the comparison of the three models."""
        start = str(self.sft_directory)
        ppo = dataclasses.replace(
            self.size.ppo_recipe(
                post_training.ppo(),
                reward_model=str(self.reward_model_directory),
                true_reward_function=f"firth.demo.data:{self.info.scorer}",
            ),
            name="ppo",
            data=DataConfig(path=(self.data_file("dialogues-train"),)),
            init_from=start,
            seed=self.seed,
        )
        dpo = dataclasses.replace(
            self.size.dpo_recipe(post_training.dpo()),
            name="dpo",
            data=self.data_of("preferences"),
            init_from=start,
            seed=self.seed,
        )
        for recipe in (ppo, dpo):
            run(recipe, self.out / recipe.name, log=self.log)
        for name, metrics in self.load_or_compute("alignment", self.evaluate_alignment)["models"].items():
            self.log(
                f"  {name:<9} true reward {metrics['truth']:.2f}   reward model {metrics['reward']:+.2f}   "
                f"KL to the start {metrics['kl_per_answer']:.1f} nats per answer   {metrics['length']:.0f} tokens"
            )

    def evaluate_alignment(self) -> Results:
        """Measure true reward, reward model score and KL to the reference of all three models on the same held-out prompts.

        Returns:
            `models`: metrics by model; `samples`: prompt and answer of each model; `prompts`: number of prompts.
        """
        reference = load_model(self.sft_directory / "model")
        rows = self.dialogue_rows("valid", self.size.num_eval_prompts)
        prompts = [self.encode_chat_prompt(row["prompt"]) for row in rows]
        reward_model = RewardModel(load_model(self.reward_model_directory / "model"))
        reward_model = reward_model.normalized(self.sample_completions(reference, prompts, self.seed + 9))
        config = RolloutsConfig(rollout_size=len(prompts), max_new_tokens=self.size.max_answer_tokens)
        models: Results = {}
        answers: dict[str, list[str]] = {}
        for name in ("sft", "ppo", "dpo"):
            policy = load_model(self.out / name / "model")
            source = RolloutSource(
                prompts,
                self.tokenizer,
                reward_model,
                reference,
                config=config,
                steps=1,
                true_reward_function=self.true_reward(),
                seed=self.seed + 7,
            )
            models[name] = dict(source.prepare(policy, 0))
            sampling = self.readable_sampling(self.size.max_answer_tokens)
            completions = Engine(policy, self.tokenizer).generate(prompts[:6], sampling)
            answers[name] = [completion.text for completion in completions]
        samples = [
            {"prompt": row["prompt"], **{name: answers[name][i] for name in answers}} for i, row in enumerate(rows[:6])
        ]
        return {"models": models, "samples": samples, "prompts": len(prompts)}
