"""Read and write adapters in peft's format: LoRA, prefix tuning, prompt tuning.

    adapter_config.json             type and settings of the adapter, path of the base
    adapter_model.safetensors       base_model.model.NAME.lora_A.weight, ...; or prompt_embeddings alone, (V, ...)
    firth.json, heads.safetensors   ignored by peft: trained heads that transformers has no name for, metadata, content
                                    hashes of these files, digest of the base's tokenizer

NAME is the name of a module in transformers (`model.layers.0.self_attn.q_proj`). If that module is several of firth's
(GPT-2's `c_attn`, ModernBERT's `Wqkv`), its A is read into each of them and its B is split by rows. Separate adapters on
the pieces are written as one block matrix, whose rank is the sum of theirs:

    [B_q 0; 0 0; 0 B_v] [A_q; A_v]

An adapter of a model that no family supports, or of a weight without a name in transformers, is written with firth's
names and can be loaded by firth only.

    load(Path("runs/mine/adapter"))        # the base that the adapter names, with the adapter merged
    read(model, Path("theirs"))            # onto an existing model; returns the type of the adapter
    write(model, Path("adapter"), base)
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firth.io.atomic import make_directory
from firth.io.integrity import COPY_AGAIN, sealed, verify
from firth.io.safetensors import check_finite, read_file, read_json, write_file, write_json
from firth.model.heads import describe_head, rebuild_head
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS, PrefixEncoder, PromptEmbedding, check_prefix_supported
from firth.peft import lora
from firth.peft.adapter_names import TASKS, AdapterNames, add_task_head, modules
from firth.peft.lora import LoraConfig, LoraLayer
from firth.pretrained.load_save import load_model
from firth.types import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FIRTH_FILE, HEADS_FILE = "firth.json", "heads.safetensors"
MODEL_HEADS = "model_heads"
"""The field of firth.json with the names of all heads of the model that the adapter was trained on."""
LORA_PREFIX = "base_model.model."
PEFT_PREFIX = "base_model."
"""peft's prefixes of tensor names: with LoRA, and of a head saved with a prefix or a prompt."""
EMBEDDINGS = ("tokens", "places", "token_types", "source_places")
"""Names of firth's embedding modules."""

UNSUPPORTED_PREFIX = "FIRTH_"
"""Prefix of `peft_type` if peft would load the file but silently ignore some of its contents."""
NO_PREFIX_FAMILIES = ("albert", "distilbert", "modernbert", "mpnet", "openai-gpt")
"""Families whose transformers classes ignore or reject `past_key_values` in a full forward pass."""
PEFT_HEADS = ("classifier", "score", "qa_outputs")
"""Suffixes of the modules that peft saves in full with a prefix or a prompt."""

UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "arrow_config": "Arrow",
}
"""peft settings that change the meaning of its tensors and that firth does not support -> what they are."""


def present(directory: Path) -> bool:
    """Return whether a directory contains an adapter and no model."""
    return (directory / CONFIG_FILE).is_file() and not (directory / "config.json").is_file()


def base_of(directory: Path) -> Path:
    """Return the directory of an adapter's base model; raise a UserError if it is not on this machine."""
    name = _config(directory).get("base_model_name_or_path") or ""
    for base in (Path(name), directory / name):
        if name and base.is_dir():
            return base / "model" if (base / "model").is_dir() else base
    raise UserError(
        f"{directory / CONFIG_FILE} names the base {name!r}, which is no directory here: set init_from to the directory of the "
        "model and peft.init_from to the adapter"
    )


def load(directory: Path) -> LM:
    """Load the base of an adapter with the adapter: LoRA is merged, a prefix or a prompt becomes one of its heads.

    If the base lacks the head that the adapter was trained with, the head is added and the base's other heads are removed
    (`firth.peft.adapter_names`). Heads that the training run did not have are removed too: an LM head tied to the
    embedding table would rule out merging an adapter of that table.
    """
    base = base_of(directory)
    return lora.merge_and_unload(_attach(load_model(base), base, directory)).eval()


def load_shared(model: LM, directory: Path) -> LM:
    """Return a loaded base with an adapter, which is not merged: both have the base's tensors in common.

    Only the adapter's own tensors, and those that were trained in full with it, take further memory.

    Args:
        model: The base, which is not changed.
        directory: Directory of the adapter.
    """
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    full = _full_tensors(read_file(directory / WEIGHTS_FILE))
    state = model.state_dict(keep_vars=True)
    for name in _own_names(model, full):  # those are written to
        tensors[id(state[name])] = torch.nn.Parameter(state[name].detach().clone(), requires_grad=False)
    attached = _attach(copy.deepcopy(model, tensors), base_of(directory), directory)
    dtype = model.tokens.weight.dtype
    for layer in lora.lora_layers(attached).values():
        layer.to(dtype)
    return attached.eval()


def _own_names(model: LM, full: Mapping[str, Tensor]) -> list[str]:
    """Return firth's names of the tensors of a model that an adapter has in full."""
    if not full:
        return []
    names = AdapterNames.of(model)
    ours = {theirs: mine for mine, theirs in names.tensors.items()}
    return [ours[theirs] for theirs in names.from_file(full).values() if theirs in ours]


def _attach(model: LM, base: Path, directory: Path) -> LM:
    """Read an adapter onto its base, changed in place, and return it."""
    state = read_file(directory / WEIGHTS_FILE)
    known = read_json(directory / FIRTH_FILE).get(MODEL_HEADS)
    for head in [head for head in model.heads if known is not None and head not in known]:
        del model.heads[head]
    add_task_head(model, _config(directory), _full_tensors(state), base, directory / WEIGHTS_FILE)
    read(model, directory)
    return model


def _full_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that were trained in full (`modules_to_save`) by their names in the base's class.

    peft saves embeddings and heads with their adapters.
    """
    full = {name: tensor for name, tensor in state.items() if ".lora_" not in name and name != "prompt_embeddings"}
    prefix = LORA_PREFIX if any(name.startswith(LORA_PREFIX) for name in full) else PEFT_PREFIX
    return {name.removeprefix(prefix).replace(".base_layer.", "."): tensor for name, tensor in full.items()}


def virtual_tokens(directory: Path) -> int:
    """Return the number of virtual tokens of the prefix or prompt in a directory; 0 for LoRA."""
    config = _config(directory)
    return 0 if str(config.get("peft_type")).endswith("LORA") else int(_number(config, "num_virtual_tokens", directory))


def read(model: LM, directory: Path, name: str = "default") -> str:
    """Read an adapter onto its base and return its type: "lora", "prefix" or "prompt".

    Heads that were trained with it replace the model's.

    Args:
        model: The base, changed in place.
        directory: Directory of the adapter.
        name: Name of a LoRA adapter in the model.

    Raises:
        UserError: If the adapter is damaged, not supported, or does not fit the model.
    """
    config = _config(directory)
    kind = str(config.get("peft_type")).removeprefix(UNSUPPORTED_PREFIX)
    state = read_file(directory / WEIGHTS_FILE)
    check_finite(state, directory)
    readers = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}
    if kind not in readers:
        raise UserError(f"{directory / CONFIG_FILE} has peft_type {kind!r}; firth reads {', '.join(readers)}")
    _read_heads(model, directory)
    _copy_full_tensors(model, _full_tensors(state), directory)
    readers[kind](model, config, state, directory, name)
    return {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}[kind]


def write(
    model: LM, directory: Path, base: Path, heads: Sequence[str] = (), name: str = "default",
    facts: Mapping[str, Any] | None = None, tokenizer: str = "",
) -> str:  # fmt: skip
    """Write the adapter of a model and return one sentence about what can load it.

    Args:
        model: The model with the adapter.
        directory: Directory to write.
        base: Directory of the base model.
        heads: Names of the heads that were trained with the adapter.
        name: Name of the LoRA adapter to write.
        facts: Metadata to save, as JSON.
        tokenizer: Digest of the base's tokenizer.

    Raises:
        UserError: If the model has no adapter.
    """
    make_directory(directory)
    layers = lora.lora_layers(model, name)
    names = AdapterNames.of(model, base, layers)
    prefixes = tuple(f"heads.{head}." for head in heads)
    state = {n: t for n, t in model.state_dict().items() if n.startswith(prefixes)} if heads else {}
    theirs = {n: names.tensors[n] for n in state if n in names.tensors}
    if theirs:  # the head's names are those of the class with the head
        names = names.with_head()
    if layers:
        config, tensors = _lora(names, layers)
        config["modules_to_save"] = sorted({_module_to_save(names.to_file(new)) for new in theirs.values()}) or None
    elif model.prefix is not None:
        config, tensors = _prefix(model, model.prefix)
    elif model.prompt is not None:
        config, tensors = _prompt(model, model.prompt)
    else:
        raise UserError("this model has no adapter to write")
    prefix = LORA_PREFIX if layers else PEFT_PREFIX
    tensors |= {prefix + names.to_file(new): state[n] for n, new in theirs.items()}
    task = _task(model, names)
    reason = _why_unsupported(model, names, task, theirs.values(), bool(layers))
    if reason:
        config["peft_type"] = UNSUPPORTED_PREFIX + config["peft_type"]
    base_config = {"base_model_name_or_path": str(base.resolve()), "task_type": task, "inference_mode": True}
    write_json(directory / CONFIG_FILE, config | base_config)
    _save(tensors, directory / WEIGHTS_FILE)
    rest = {n: t for n, t in state.items() if n not in theirs}
    own = [head for head in heads if any(n.startswith(f"heads.{head}.") for n in rest)]
    (directory / HEADS_FILE).unlink(missing_ok=True)
    if rest:
        _save(rest, directory / HEADS_FILE)
    record: dict[str, Any] = {
        "heads": {head: describe_head(model.heads[head]) for head in own},
        "facts": dict(facts or {}),
    }
    record |= {MODEL_HEADS: sorted(model.heads)} | ({"tokenizer": tokenizer} if tokenizer else {})
    write_json(
        directory / FIRTH_FILE, sealed(record, directory, [CONFIG_FILE, WEIGHTS_FILE, *[HEADS_FILE] * bool(rest)])
    )
    if names.form is None:
        return "transformers has no names for it, so only firth loads it"
    if reason:
        return f"only firth loads it, because {reason}"
    return f"peft loads it onto {base}" + (
        "; peft ignores the heads trained with it, which are firth's own" if rest else ""
    )


def _why_unsupported(model: LM, names: AdapterNames, task: str | None, head: Iterable[str], is_lora: bool) -> str:
    """Return why peft cannot load an adapter, empty if it can; checked with peft 0.21.

    Args:
        model: The model with the adapter.
        names: Names of its modules in transformers.
        task: peft's task type.
        head: Names in transformers of the tensors of the head that was trained with it.
        is_lora: Whether the adapter is LoRA.
    """
    if names.form is None:
        return ""
    if is_lora:
        present = " and a ".join(sorted(PREFIX_HEADS & {*model.heads}))
        return f"its base has a {present}, which transformers does not read" if present else ""
    family = names.form.family.name
    if model.prefix is not None and family in NO_PREFIX_FAMILIES:
        return f"{family} in transformers takes no past keys and values"
    if model.prompt is not None and task == "SEQ_CLS" and not model.config.causal:
        return "peft classifies at the first vector of the prompt"
    lost = [name for name in head if not any(module.endswith(PEFT_HEADS) for module in name.split("."))]
    return f"peft does not save {lost[0]} with a {'prefix' if model.prefix is not None else 'prompt'}" if lost else ""


def _module_to_save(tensor: str) -> str:
    """Return the `modules_to_save` entry of a tensor: its module, or the head that peft saves in full by default."""
    first = tensor.partition(".")[0]
    return first if first in ("classifier", "score") else tensor.rpartition(".")[0]


def _lora(names: AdapterNames, layers: Mapping[str, LoraLayer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the peft config and tensors of a LoRA adapter."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}  # module in transformers -> rank and alpha
    first = next(iter(layers.values())).config
    for theirs, entry in names.entries.items():
        module_names = modules(entry)
        pieces = [layers.get(module_name) for module_name in module_names]
        present = [piece for piece in pieces if piece is not None]
        if not present:
            continue
        name, (a, b) = names.to_file(theirs), _stack_adapters(pieces, entry.sizes)
        if entry.unused_rows:
            b = torch.cat((b.new_zeros(entry.unused_rows, b.shape[1]), b))
        if module_names[0] in EMBEDDINGS:  # peft transposes adapters of embeddings
            tensors |= {f"{LORA_PREFIX}{name}.lora_embedding_A": b.t(), f"{LORA_PREFIX}{name}.lora_embedding_B": a.t()}
        else:
            tensors |= {f"{LORA_PREFIX}{name}.lora_A.weight": a, f"{LORA_PREFIX}{name}.lora_B.weight": b}
        rank = len(a)
        ranks[theirs] = rank, present[0].config.scaling * (math.sqrt(rank) if first.use_rslora else rank)
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0]
    suffixes = {theirs.rpartition(".")[2] for theirs in ranks}
    all_matched = {theirs for theirs in names.entries if theirs.rpartition(".")[2] in suffixes} == set(ranks)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": first.dropout, "use_rslora": first.use_rslora,
        "target_modules": sorted(suffixes if all_matched else map(names.to_file, ranks)), "bias": "none", "init_lora_weights": True,
        "rank_pattern": {names.to_file(theirs): r for theirs, (r, _) in ranks.items() if r != rank},
        "alpha_pattern": {names.to_file(theirs): x for theirs, (_, x) in ranks.items() if x != alpha},
        "fan_in_fan_out": any(names.entries[theirs].transposed for theirs in ranks),
    }, tensors  # fmt: skip


def _stack_adapters(pieces: Sequence[LoraLayer | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return A and B of a matrix that stacks several by rows, some of which may lack an adapter.

    All use the scale of the first; the others' B is rescaled.
    """
    present = [piece for piece in pieces if piece is not None]
    if len(present) == len(pieces) and all(torch.equal(piece.A, present[0].A) for piece in present):
        return present[0].A, torch.cat(
            [piece.B * (piece.config.scaling / present[0].config.scaling) for piece in present]
        )
    a = torch.cat([piece.A for piece in present])
    b, row, column = a.new_zeros(sum(sizes), len(a)), 0, 0
    for piece, size in zip(pieces, sizes, strict=True):
        if piece is not None:
            b[row : row + size, column : column + len(piece.A)] = piece.B * (
                piece.config.scaling / present[0].config.scaling
            )
            column += len(piece.A)
        row += size
    return a, b


def _read_lora(model: LM, config: Mapping[str, Any], state: dict[str, Tensor], where: Path, name: str) -> None:
    for setting, what in UNSUPPORTED.items():
        if config.get(setting):
            raise UserError(f"{where / CONFIG_FILE} uses {what} ({setting}), which firth does not support")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where / CONFIG_FILE} has trained biases (bias={config['bias']!r}), which firth does not support"
        )
    names, firth_names = AdapterNames.of(model), AdapterNames.firth(model)
    rank, alpha = _number(config, "r", where), _number(config, "lora_alpha", where)
    lora_config = LoraConfig(int(rank), alpha, bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, found, which = key.removeprefix(LORA_PREFIX).rpartition(".lora_")
        if found:
            pairs.setdefault(module, {})["A" if "A" in which else "B"] = tensor.t() if "embedding" in which else tensor
    known = names.from_file(pairs)
    for module, pair in pairs.items():
        entry = names.entries.get(known[module]) or firth_names.entries.get(module)
        if entry is None or pair.keys() != {"A", "B"}:
            raise UserError(f"{where / WEIGHTS_FILE} has an adapter of {module!r}, which is no module of the base")
        is_embedding = any(f"{LORA_PREFIX}{module}.lora_embedding_A" == key for key in state)
        a, b = (pair["B"], pair["A"]) if is_embedding else (pair["A"], pair["B"])
        module_config = replace(
            lora_config,
            rank=len(a),
            alpha=_patterned(config.get("alpha_pattern") or {}, module, lora_config.alpha, where),
        )
        for module_name, rows in zip(
            modules(entry), b[entry.unused_rows :].split(list(entry.sizes) or len(b)), strict=True
        ):
            layer = lora.add_to_module(model, module_name, module_config, name)
            for mine, theirs in ((layer.A, a), (layer.B, rows)):
                if mine.shape != theirs.shape:
                    raise UserError(
                        f"{where / WEIGHTS_FILE}: the adapter of {module!r} does not fit the weight of {module_name}"
                    )
                mine.data.copy_(theirs)


def _patterned(patterns: Mapping[str, float], module: str, default: float, where: Path) -> float:
    """Look up a module in peft's patterns, whose keys are name suffixes or regular expressions."""
    try:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)
    except re.error as fault:
        raise UserError(f"{where / CONFIG_FILE} has an invalid regular expression in a pattern ({fault})") from None


def _number(config: Mapping[str, Any], name: str, where: Path) -> float:
    if type(config.get(name)) not in (int, float):
        raise UserError(f"{where / CONFIG_FILE} lacks the number {name!r}, or it is not a number")
    return float(config[name])


def _vectors(state: Mapping[str, Tensor], where: Path) -> Tensor:
    if "prompt_embeddings" not in state or state["prompt_embeddings"].ndim != 2:
        raise UserError(f"{where / WEIGHTS_FILE} lacks the matrix 'prompt_embeddings'")
    return state["prompt_embeddings"]


@torch.no_grad()
def _copy_full_tensors(model: LM, full: Mapping[str, Tensor], where: Path) -> None:
    """Copy the tensors that were trained in full into the model."""
    names = AdapterNames.of(model)
    ours, state, known = (
        {theirs: mine for mine, theirs in names.tensors.items()},
        model.state_dict(),
        names.from_file(full),
    )
    for stored, tensor in full.items():
        name = known[stored]
        if name not in ours or state[ours[name]].shape != tensor.shape:
            raise UserError(
                f"{where / WEIGHTS_FILE} has {stored!r}, which is no tensor of the base: its head is not the model's"
            )
        state[ours[name]].copy_(tensor)


def _prefix(model: LM, prefix: PrefixEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensor, layers, modules = prefix.weights(), prefix.layers, 1
    if model.config.encoder.num_layers:
        # peft duplicates the layers and uses the first two of every four tensors: every second pair here is unused.
        modules, layers = 2, 2 * prefix.layers
        pairs = tensor.view(prefix.tokens, prefix.layers, 1, -1)
        tensor = torch.cat((pairs, torch.zeros_like(pairs)), 2).flatten(1)
    return {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": prefix.tokens, "num_layers": layers,
        "token_dim": prefix.kv_heads * prefix.head_width, "num_attention_heads": prefix.kv_heads,
        "num_transformer_submodules": modules, "encoder_hidden_size": prefix.hidden or None,
        "prefix_projection": bool(prefix.hidden),
    }, {"prompt_embeddings": tensor}  # fmt: skip


def _read_prefix(model: LM, config: Mapping[str, Any], state: dict[str, Tensor], where: Path, name: str) -> None:
    check_prefix_supported(model.config, "prefix")
    model_config, tensor = model.config, _vectors(state, where)
    each = 2 * model_config.num_kv_heads * model_config.head_dim
    if model_config.encoder.num_layers:
        # peft uses the first two of every four tensors of the duplicated layers.
        twice = torch.cat((tensor, tensor), 1)[:, : 2 * model_config.num_layers * each]
        tensor = twice.view(len(tensor), -1, each)[:, ::2].flatten(1)
    if tensor.shape[1] != model_config.num_layers * each:
        raise UserError(
            f"{where / WEIGHTS_FILE}: the prefix has {tensor.shape[1]} numbers per token, and this model needs "
            f"{model_config.num_layers * each}"
        )
    prefix = PrefixEncoder(len(tensor), model_config.num_layers, model_config.num_kv_heads, model_config.head_dim)
    prefix.table.weight.data.copy_(tensor)
    model.heads["prefix"] = prefix


def _prompt(model: LM, prompt: PromptEmbedding) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": prompt.tokens, "token_dim": prompt.width,
        "num_layers": model.config.num_layers, "num_attention_heads": model.config.num_heads, "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }, {"prompt_embeddings": prompt.table.weight}  # fmt: skip


def _read_prompt(model: LM, config: Mapping[str, Any], state: dict[str, Tensor], where: Path, name: str) -> None:
    check_prefix_supported(model.config, "prompt")
    from_peft = not str(config["peft_type"]).startswith(UNSUPPORTED_PREFIX)
    if from_peft and _full_tensors(state) and not model.config.causal and {"classes", "score"} & {*model.heads}:
        raise UserError(
            f"{where / WEIGHTS_FILE}: peft classifies at the first vector of the prompt, and firth at the first token of the text: "
            "train it here (peft=prompt), or use a prefix"
        )
    vectors = _vectors(state, where)[
        : int(_number(config, "num_virtual_tokens", where))
    ]  # peft stores unused vectors of the decoder too
    if vectors.shape[1] != model.config.embedding_dim:
        raise UserError(
            f"{where / WEIGHTS_FILE}: the prompt has vectors of {vectors.shape[1]} numbers, and this model needs "
            f"{model.config.embedding_dim}"
        )
    prompt = PromptEmbedding(*vectors.shape)
    prompt.table.weight.data.copy_(vectors)
    model.heads["prompt"] = prompt


def _read_heads(model: LM, directory: Path) -> None:
    """Read the heads that an adapter of firth's was trained with."""
    descriptions = read_json(directory / FIRTH_FILE).get("heads", {})
    state = read_file(directory / HEADS_FILE) if descriptions else {}
    check_finite(state, directory)
    for head, description in descriptions.items():
        prefix = f"heads.{head}."
        module = rebuild_head(description, head)
        try:
            module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        except RuntimeError as fault:  # torch lists every tensor that does not fit
            raise UserError(
                f"{directory / HEADS_FILE} does not have the head {head!r} that {FIRTH_FILE} describes"
            ) from fault
        model.heads[head] = module


def _task(model: LM, names: AdapterNames) -> str | None:
    """Return peft's task type, which selects the class that it wraps the base in."""
    form = names.form
    headless = form is not None and bool(form.family.prefix) and not names.prefix
    if form is not None and not headless and (task := TASKS.get(form.name.rpartition("For")[2])):
        return task
    if model.config.encoder.num_layers and "lm" in model.heads:
        return "SEQ_2_SEQ_LM"
    if model.config.causal and "lm" in model.heads and not headless:
        return "CAUSAL_LM"
    # Without a task type, peft would load a prefix or a prompt and never pass it to the model.
    return "FEATURE_EXTRACTION" if headless or model.prefix is not None or model.prompt is not None else None


def _config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} contains no adapter: it has no {CONFIG_FILE}")
    verify(read_json(directory / FIRTH_FILE), directory, directory / FIRTH_FILE, COPY_AGAIN)
    return read_json(directory / CONFIG_FILE)


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    check_finite(state, file.parent)
    write_file(state, file)
