"""Adapters on disk, as peft writes and reads them: LoRA, prefixes, prompts.

    adapter_config.json           what it is, of which base
    adapter_model.safetensors     base_model.model.NAME.lora_A.weight ...; or prompt_embeddings, (V, ...), alone
    firth.json, heads.safetensors the heads that were trained with it and have no name there (peft reads neither), the facts,
                                  the content hashes of these files,
                                  the digest of the base's tokenizer

NAME is a module's in the family's own words (`model.layers.0.self_attn.q_proj`). Where theirs is several of ours (GPT-2's
`c_attn`, ModernBERT's `Wqkv`), its one A is read into each of them and its B is cut by rows; adapters that were made on
the pieces are written side by side, with a rank that is the sum of theirs and zeros between them, which is the same map:

    [B_q 0; 0 0; 0 B_v] [A_q; A_v]

A model that no family expresses, or a matrix that it has no name for, is written with our names, for firth alone.

    load(Path("runs/mine/adapter"))        the base that it names, with it
    read(model, Path("theirs"))            onto a model that is there; returns what it was
    write(model, Path("adapter"), base)
"""

from __future__ import annotations

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
from firth.model.head_descriptions import describe_head, rebuild_head
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS, PrefixEncoder, PromptEmbedding, check_prefix_supported
from firth.peft import lora
from firth.peft.adapter_heads import TASKS, bring
from firth.peft.adapter_names import AdapterNames, modules
from firth.peft.lora import LoraConfig, LoraLayer
from firth.pretrained.load_save import load_model
from firth.types import UserError

FILE, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OWN, OWN_TENSORS = "firth.json", "heads.safetensors"
PARTS = "model_parts"
"""The field of firth.json with the names of all parts of the model that the adapter was trained on."""
FRONT = "base_model.model."
PLAIN = "base_model."
"""What peft writes before the names of LoRA's tensors, and before those of a head with a prefix or a prompt."""
TABLES = ("tokens", "places", "token_types", "source_places")
"""Modules of ours that are tables and not maps."""

OWN_TYPE = "FIRTH_"
"""What stands before peft's name of a kind where peft would load the file and silently leave out what it holds."""
WITHOUT_PREFIX = ("albert", "distilbert", "modernbert", "mpnet", "openai-gpt")
"""Families whose classes in transformers ignore or refuse `past_key_values` for a text that is read at once."""
PEFT_HEADS = ("classifier", "score", "qa_outputs")
"""Ends of the names of the modules that peft keeps whole with a prefix or a prompt."""

REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "arrow_config": "Arrow",
}
"""Settings of peft's that change what its tensors mean and that firth has not."""


def present(directory: Path) -> bool:
    """Whether a directory holds an adapter and not a model."""
    return (directory / FILE).is_file() and not (directory / "config.json").is_file()


def base_of(directory: Path) -> Path:
    """The model directory that an adapter says it lies on. UserError where that is none of this machine's."""
    said = _config(directory).get("base_model_name_or_path") or ""
    for base in (Path(said), directory / said):
        if said and base.is_dir():
            return base / "model" if (base / "model").is_dir() else base
    raise UserError(
        f"{directory / FILE} names the base {said!r}, which is no directory here: give the model's directory as start= "
        "and the adapter as peft.init_from="
    )


def load(directory: Path) -> LM:
    """The base that an adapter names with the adapter: LoRA merged into it, a prefix or a prompt among its parts.

    A base without the head that the adapter was trained with gets it (`firth.peft.adapter_heads`), and loses its other parts,
    as it loses those that a run of firth's left out: a head that is tied to the table of tokens would forbid to merge what
    was learned on that table.
    """
    base = base_of(directory)
    model, state = load_model(base), read_file(directory / TENSORS)
    known = read_json(directory / OWN).get(PARTS)
    for part in [part for part in model.heads if known is not None and part not in known]:
        del model.heads[part]
    bring(model, _config(directory), _whole(state), base, directory / TENSORS)
    read(model, directory)
    return lora.merge_and_unload(model).eval()


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were trained whole (`modules_to_save`), by their names in the base's class. peft writes tables and heads
    along with what lies on them."""
    rest = {name: tensor for name, tensor in state.items() if ".lora_" not in name and name != "prompt_embeddings"}
    front = FRONT if any(name.startswith(FRONT) for name in rest) else PLAIN
    return {name.removeprefix(front).replace(".base_layer.", "."): tensor for name, tensor in rest.items()}


def virtual_tokens(directory: Path) -> int:
    """Return how many trained positions the prefix or the prompt in a directory has; 0 for a LoRA."""
    config = _config(directory)
    return 0 if str(config.get("peft_type")).endswith("LORA") else int(_number(config, "num_virtual_tokens", directory))


def read(model: LM, directory: Path, name: str = "default") -> str:
    """Put an adapter of peft's files onto the base it was made for, and say in a word what it was: lora, prefix, prompt.

    Heads that were trained with it are put in the place of the model's. UserError for what does not fit.
    """
    config = _config(directory)
    kind = str(config.get("peft_type")).removeprefix(OWN_TYPE)
    state = read_file(directory / TENSORS)
    check_finite(state, directory)
    readers = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}
    if kind not in readers:
        raise UserError(f"{directory / FILE} is of peft's type {kind!r}; firth reads {', '.join(readers)}")
    _read_parts(model, directory)
    _put_whole(model, _whole(state), directory)
    readers[kind](model, config, state, directory, name)
    return {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}[kind]


def write(
    model: LM, directory: Path, base: Path, parts: Sequence[str] = (), name: str = "default",
    facts: Mapping[str, Any] | None = None, tokenizer: str = "",
) -> str:  # fmt: skip
    """Write the adapter that lies on a model; return one sentence about who can load it.

    base: the directory of the model that it was made for. parts: the heads that were trained with it. facts: anything
    worth keeping beside it, as JSON. tokenizer: the digest of the base's tokenizer.
    """
    make_directory(directory)
    low = lora.lora_layers(model, name)
    names = AdapterNames.of(model, base, low)
    heads = tuple(f"heads.{part}." for part in parts)
    state = {n: t for n, t in model.state_dict().items() if n.startswith(heads)} if heads else {}
    theirs = {n: names.tensors[n] for n in state if n in names.tensors}
    if theirs:  # whoever has the head has the class with the head
        names = names.headed()
    if low:
        config, tensors = _lora(names, low)
        config["modules_to_save"] = sorted({_saved(names.outside(new)) for new in theirs.values()}) or None
    elif model.prefix is not None:
        config, tensors = _prefix(model, model.prefix)
    elif model.prompt is not None:
        config, tensors = _prompt(model, model.prompt)
    else:
        raise UserError("there is no adapter on this model to be written")
    front = FRONT if low else PLAIN
    tensors |= {front + names.outside(new): state[n] for n, new in theirs.items()}
    task = _task(model, names)
    lacking = _unserved(model, names, task, theirs.values(), bool(low))
    if lacking:
        config["peft_type"] = OWN_TYPE + config["peft_type"]
    told = {"base_model_name_or_path": str(base.resolve()), "task_type": task, "inference_mode": True}
    write_json(directory / FILE, config | told)
    _save(tensors, directory / TENSORS)
    rest = {n: t for n, t in state.items() if n not in theirs}
    own = [part for part in parts if any(n.startswith(f"heads.{part}.") for n in rest)]
    (directory / OWN_TENSORS).unlink(missing_ok=True)
    if rest:
        _save(rest, directory / OWN_TENSORS)
    record: dict[str, Any] = {
        "heads": {part: describe_head(model.heads[part]) for part in own},
        "facts": dict(facts or {}),
    }
    record |= {PARTS: sorted(model.heads)} | ({"tokenizer": tokenizer} if tokenizer else {})
    write_json(directory / OWN, sealed(record, directory, [FILE, TENSORS, *[OWN_TENSORS] * bool(rest)]))
    if names.form is None:
        return "no family of transformers has names for it, so only firth loads it"
    if lacking:
        return f"only firth loads it, for {lacking}"
    return f"peft loads it onto {base}" + ("; the heads trained with it are firth's own" if rest else "")


def _unserved(model: LM, names: AdapterNames, task: str | None, head: Iterable[str], low: bool) -> str:
    """Return why peft cannot serve an adapter on a model, checked with peft 0.21; empty where it can.

    Args:
        model: The model with the adapter.
        names: What its modules are called in transformers.
        task: peft's word for the task.
        head: The tensors of the head that was trained with it, by their names there.
        low: Whether the adapter is LoRA.
    """
    if names.form is None:
        return ""
    if low:
        ahead = " and a ".join(sorted(PREFIX_HEADS & {*model.heads}))
        return f"its base has a {ahead}, which transformers does not read" if ahead else ""
    family = names.form.family.name
    if model.prefix is not None and family in WITHOUT_PREFIX:
        return f"transformers' {family} takes no keys and values before a text"
    if model.prompt is not None and task == "SEQ_CLS" and not model.config.causal:
        return "peft reads the class of a text at the first vector of its prompt"
    lost = [name for name in head if not any(module.endswith(PEFT_HEADS) for module in name.split("."))]
    return f"peft keeps no {lost[0]} with a {'prefix' if model.prefix is not None else 'prompt'}" if lost else ""


def _saved(tensor: str) -> str:
    """The module that peft is told to keep a tensor with: its own, or the head that peft keeps whole unasked."""
    first = tensor.partition(".")[0]
    return first if first in ("classifier", "score") else tensor.rpartition(".")[0]


def _lora(names: AdapterNames, low: Mapping[str, LoraLayer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and tensors of LoRA's."""
    tensors: dict[str, Tensor] = {}
    at: dict[str, tuple[int, float]] = {}  # their module -> rank and alpha
    first = next(iter(low.values())).plan
    for theirs, entry in names.entries.items():
        places = modules(entry)
        pieces = [low.get(place) for place in places]
        there = [one for one in pieces if one is not None]
        if not there:
            continue
        name, (a, b) = names.outside(theirs), _together(pieces, entry.sizes)
        if entry.ignored:
            b = torch.cat((b.new_zeros(entry.ignored, b.shape[1]), b))
        if places[0] in TABLES:  # theirs are turned: rows are columns
            tensors |= {f"{FRONT}{name}.lora_embedding_A": b.t(), f"{FRONT}{name}.lora_embedding_B": a.t()}
        else:
            tensors |= {f"{FRONT}{name}.lora_A.weight": a, f"{FRONT}{name}.lora_B.weight": b}
        rank = len(a)
        at[theirs] = rank, there[0].plan.scaling * (math.sqrt(rank) if first.use_rslora else rank)
    (rank, alpha), _ = Counter(at.values()).most_common(1)[0]
    ends = {theirs.rpartition(".")[2] for theirs in at}
    whole = {theirs for theirs in names.entries if theirs.rpartition(".")[2] in ends} == set(at)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": first.dropout, "use_rslora": first.use_rslora,
        "target_modules": sorted(ends if whole else map(names.outside, at)), "bias": "none", "init_lora_weights": True,
        "rank_pattern": {names.outside(theirs): r for theirs, (r, _) in at.items() if r != rank},
        "alpha_pattern": {names.outside(theirs): x for theirs, (_, x) in at.items() if x != alpha},
        "fan_in_fan_out": any(names.entries[theirs].transposed for theirs in at),
    }, tensors  # fmt: skip


def _together(pieces: Sequence[LoraLayer | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A and B of a matrix whose rows are those of several, of which some have no adapter. One scale serves them: that of the
    first, the others' B makes up for theirs."""
    there = [one for one in pieces if one is not None]
    if len(there) == len(pieces) and all(torch.equal(one.A, there[0].A) for one in there):
        return there[0].A, torch.cat([one.B * (one.plan.scaling / there[0].plan.scaling) for one in there])
    a = torch.cat([one.A for one in there])
    b, row, column = a.new_zeros(sum(sizes), len(a)), 0, 0
    for one, size in zip(pieces, sizes, strict=True):
        if one is not None:
            b[row : row + size, column : column + len(one.A)] = one.B * (one.plan.scaling / there[0].plan.scaling)
            column += len(one.A)
        row += size
    return a, b


def _read_lora(model: LM, config: Mapping[str, Any], state: dict[str, Tensor], where: Path, name: str) -> None:
    for setting, what in REFUSED.items():
        if config.get(setting):
            raise UserError(f"{where / FILE} asks for {what} ({setting}), which firth has not")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where / FILE} trained biases too (bias={config['bias']!r}), which firth does not read")
    names, own_names = AdapterNames.of(model), AdapterNames.own(model)
    rank, alpha = _number(config, "r", where), _number(config, "lora_alpha", where)
    plan = LoraConfig(int(rank), alpha, bool(config.get("use_rslora")), config.get("lora_dropout") or 0.0)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, found, which = key.removeprefix(FRONT).rpartition(".lora_")
        if found:
            pairs.setdefault(module, {})["A" if "A" in which else "B"] = tensor.t() if "embedding" in which else tensor
    spelling = names.inside(pairs)
    for module, pair in pairs.items():
        entry = names.entries.get(spelling[module]) or own_names.entries.get(module)
        if entry is None or pair.keys() != {"A", "B"}:
            raise UserError(f"{where / TENSORS} adapts {module!r}, which is no matrix of the base")
        turned = any(f"{FRONT}{module}.lora_embedding_A" == key for key in state)
        a, b = (pair["B"], pair["A"]) if turned else (pair["A"], pair["B"])
        own = replace(plan, rank=len(a), alpha=_patterned(config.get("alpha_pattern") or {}, module, plan.alpha, where))
        for place, rows in zip(modules(entry), b[entry.ignored :].split(list(entry.sizes) or len(b)), strict=True):
            low = lora.put(model, place, own, name)
            for mine, theirs in ((low.A, a), (low.B, rows)):
                if mine.shape != theirs.shape:
                    raise UserError(f"{where / TENSORS}: {module!r} is made for another matrix than {place}")
                mine.data.copy_(theirs)


def _patterned(patterns: Mapping[str, float], module: str, default: float, where: Path) -> float:
    """peft's exceptions by module: a name's end, or an expression for it."""
    try:
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)
    except re.error as fault:
        raise UserError(f"{where / FILE} has a pattern that is no regular expression ({fault})") from None


def _number(config: Mapping[str, Any], name: str, where: Path) -> float:
    if type(config.get(name)) not in (int, float):
        raise UserError(f"{where / FILE} lacks the number {name!r}, or it is none")
    return float(config[name])


def _vectors(state: Mapping[str, Tensor], where: Path) -> Tensor:
    if "prompt_embeddings" not in state or state["prompt_embeddings"].ndim != 2:
        raise UserError(f"{where / TENSORS} lacks the matrix 'prompt_embeddings'")
    return state["prompt_embeddings"]


@torch.no_grad()
def _put_whole(model: LM, whole: Mapping[str, Tensor], where: Path) -> None:
    """Put the tensors that were trained whole in the place of the model's."""
    names = AdapterNames.of(model)
    ours, state, spelling = (
        {theirs: mine for mine, theirs in names.tensors.items()},
        model.state_dict(),
        names.inside(whole),
    )
    for stored, tensor in whole.items():
        name = spelling[stored]
        if name not in ours or state[ours[name]].shape != tensor.shape:
            raise UserError(
                f"{where / TENSORS} holds {stored!r}, which is no tensor of the base: this head is not the model's"
            )
        state[ours[name]].copy_(tensor)


def _prefix(model: LM, prefix: PrefixEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensor, layers, modules = prefix.weights(), prefix.layers, 1
    if model.config.num_encoder_layers:
        # peft lays its layers out twice, four to a layer, and reads the first two: a tensor of twice the layers, every
        # second pair unread, then says what is meant.
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
    if model_config.num_encoder_layers:
        # The first two of every four, of the layers laid out twice.
        twice = torch.cat((tensor, tensor), 1)[:, : 2 * model_config.num_layers * each]
        tensor = twice.view(len(tensor), -1, each)[:, ::2].flatten(1)
    if tensor.shape[1] != model_config.num_layers * each:
        raise UserError(
            f"{where / TENSORS}: a prefix of {tensor.shape[1]} numbers, and this model needs {model_config.num_layers * each}"
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
    theirs = not str(config["peft_type"]).startswith(OWN_TYPE)
    if theirs and _whole(state) and not model.config.causal and {"classes", "score"} & {*model.heads}:
        raise UserError(
            f"{where / TENSORS}: peft reads the class of a text at the first vector of its prompt there, and firth at the text's "
            "first token: train it here (peft=prompt), or take a prefix"
        )
    vectors = _vectors(state, where)[
        : int(_number(config, "num_virtual_tokens", where))
    ]  # peft stores a decoder's too, and uses none
    if vectors.shape[1] != model.config.embedding_dim:
        raise UserError(
            f"{where / TENSORS}: vectors of {vectors.shape[1]} numbers, and this model reads {model.config.embedding_dim}"
        )
    prompt = PromptEmbedding(*vectors.shape)
    prompt.table.weight.data.copy_(vectors)
    model.heads["prompt"] = prompt


def _read_parts(model: LM, directory: Path) -> None:
    """The heads that an adapter of firth's was trained with."""
    told = read_json(directory / OWN).get("heads", {})
    state = read_file(directory / OWN_TENSORS) if told else {}
    check_finite(state, directory)
    for part, description in told.items():
        front = f"heads.{part}."
        module = rebuild_head(description, part)
        try:
            module.load_state_dict({n.removeprefix(front): t for n, t in state.items() if n.startswith(front)})
        except RuntimeError as fault:  # torch names every tensor that does not fit
            raise UserError(
                f"{directory / OWN_TENSORS} does not hold the part {part!r} that {OWN} describes"
            ) from fault
        model.heads[part] = module


def _task(model: LM, names: AdapterNames) -> str | None:
    """peft's word for what the base is, which is the class that it wraps it in."""
    form = names.form
    bare = form is not None and bool(form.family.prefix) and not names.front
    if form is not None and not bare and (named := TASKS.get(form.name.rpartition("For")[2])):
        return named
    if model.config.num_encoder_layers and "lm" in model.heads:
        return "SEQ_2_SEQ_LM"
    if model.config.causal and "lm" in model.heads and not bare:
        return "CAUSAL_LM"
    # Without a word for its task, peft would load a prefix or a prompt and never show it to the model.
    return "FEATURE_EXTRACTION" if bare or model.prefix is not None or model.prompt is not None else None


def _config(directory: Path) -> dict[str, Any]:
    if not (directory / FILE).is_file():
        raise UserError(f"{directory} holds no adapter: {FILE} is not there")
    verify(read_json(directory / OWN), directory, directory / OWN, COPY_AGAIN)
    return read_json(directory / FILE)


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    check_finite(state, file.parent)
    write_file(state, file)
