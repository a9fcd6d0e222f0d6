"""Models in GGUF files: llama.cpp's names for the fields and tensors of a published family, both ways from one map.

A GGUF file is a `config.json` and a `model.safetensors` in other words, so an `Architecture` is a list of those words
beside a family of `firth.pretrained.families`, which does the rest. Numbers of few bits become float32 (`firth.pretrained.gguf_quantize`).
llama.cpp turns neighbouring pairs of numbers in a head, and transformers (so firth) the two halves: for `llama` the rows
of q and k are written in the other order, as in llama.cpp's convert_hf_to_gguf.py.

    model = load_model(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))        # firth.pretrained.load_save reads it like a directory
    print(write(model, tokenizer, Path("mine.gguf"), "Q8_0"))          # llama.cpp loads it as llama

>>> ARCHITECTURES["llama"].hf_name("model.layers.3.self_attn.q_proj.weight")
'blk.3.attn_q.weight'
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from firth.io import gguf
from firth.io.gguf import KINDS, GGUFFile, GGUFTensorSpec
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.pretrained.families import FAMILIES
from firth.pretrained.families.family import Family, to_hf
from firth.pretrained.gguf_quantize import PACK, pack, unpack
from firth.tokenizer import gguf_write
from firth.types import UserError

if TYPE_CHECKING:
    from firth.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class GGUFArchitecture:
    """One of llama.cpp's architectures, as another spelling of a family.

    family: of `firth.pretrained.families`. fields: config.json's field -> the key behind `NAME.`; optional: those of them
    that a file may leave out. fixed: fields of config.json that no key says. still: keys that must say this if they are
    there, since firth's models have nothing else; ignored: keys that say what is known already.
    names: the family's module -> theirs, outside of the layers; layers, layer: the same inside of one.
    turned: modules whose rows are in the order of neighbouring pairs. transposed: those that the family stores turned over.
    sizes: fields of config.json that are the number of rows of a tensor.
    """

    name: str
    family: str
    fields: Mapping[str, str]
    names: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    fixed: Mapping[str, Any]
    sizes: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    still: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset({"vocab_size", "tensor_data_layout"})
    turned: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    def hf_name(self, name: str) -> str:
        """The GGUF name of a tensor that the family calls `name`."""
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(re.escape(self.layers) + r"(\d+)\.(.+)", module)
        if inside:
            return f"blk.{inside[1]}.{self.layer[inside[2]]}.{kind}"
        return f"{self.names[module]}.{kind}"

    def our_name(self, name: str) -> str | None:
        """What the family calls a tensor of a GGUF file; None where it has none such."""
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
        names = {theirs: ours for ours, theirs in (self.layer if inside else self.names).items()}
        found = names.get(inside[2] if inside else module)
        return None if found is None else (f"{self.layers}{inside[1]}.{found}" if inside else found) + f".{kind}"


ROTARY = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
LLAMA = GGUFArchitecture(
    "llama", "llama", ROTARY,
    {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}, "model.layers.", BLOCK,
    {"hidden_act": "silu", "architectures": ["LlamaForCausalLM"]}, {"vocab_size": "token_embd.weight"},
    optional=frozenset({"num_key_value_heads", "head_dim", "rope_theta"}),
    still={"expert_count": 0, "expert_used_count": 0},
    turned=frozenset({"self_attn.q_proj", "self_attn.k_proj"}),
)  # fmt: skip
GPT2 = GGUFArchitecture(
    "gpt2", "gpt2",
    {
        "n_embd": "embedding_length", "n_layer": "block_count", "n_inner": "feed_forward_length",
        "n_positions": "context_length", "n_head": "attention.head_count",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
    },
    {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"},
    "transformer.h.",
    {
        "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    },
    {"activation_function": "gelu_new", "resid_pdrop": 0.0, "architectures": ["GPT2LMHeadModel"]},
    {"vocab_size": "token_embd.weight"}, optional=frozenset({"n_inner"}),
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
)  # fmt: skip
BERT = GGUFArchitecture(
    "bert", "bert",
    {
        "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length",
        "num_attention_heads": "attention.head_count", "layer_norm_eps": "attention.layer_norm_epsilon",
    },
    {
        "bert.embeddings.word_embeddings": "token_embd", "bert.embeddings.position_embeddings": "position_embd",
        "bert.embeddings.token_type_embeddings": "token_types", "bert.embeddings.LayerNorm": "token_embd_norm",
    },
    "bert.encoder.layer.",
    {
        "attention.self.query": "attn_q", "attention.self.key": "attn_k", "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output", "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up", "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
    },
    {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "architectures": ["BertModel"]},
    {"vocab_size": "token_embd.weight", "type_vocab_size": "token_types.weight"},
    still={"attention.causal": False}, ignored=frozenset({"vocab_size", "pooling_type"}),
)  # fmt: skip

ARCHITECTURES = {
    "llama": LLAMA, "gpt2": GPT2, "bert": BERT,
    "qwen2": replace(
        LLAMA, name="qwen2", family="qwen2", turned=frozenset(),
        fixed={"hidden_act": "silu", "architectures": ["Qwen2ForCausalLM"]},
    ),
    "qwen3": replace(
        LLAMA, name="qwen3", family="qwen3", turned=frozenset(),
        fixed={"hidden_act": "silu", "architectures": ["Qwen3ForCausalLM"]},
        layer=BLOCK | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    ),
}  # fmt: skip
"""`general.architecture` -> how it is spelled. Those whose family firth does not have are refused when they are met."""


def config(path: Path) -> dict[str, Any]:
    """The config.json that a GGUF file amounts to: what `firth.pretrained.load_save` reads of a directory.

    Raises UserError for an architecture firth does not have, and for keys that say what it cannot do.
    """
    file = gguf.read(path)
    return configured(file, architecture(file))


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file by the family's names, as float32. UserError as `config`, and for one not known."""
    file = gguf.read(path)
    kind = architecture(file)
    told, state = configured(file, kind), {}
    for name, stored in file.tensors.items():
        ours = kind.our_name(name)
        if ours is None:
            raise UserError(f"{path} holds the tensor {name!r}, which firth's {kind.family} models do not have")
        numbers = torch.from_numpy(unpack(stored.kind, stored.data).reshape(stored.shape))
        state[ours] = _turn(kind, told, ours, numbers, back=True)
    return state


def dtypes(path: Path) -> list[torch.dtype]:
    """What the matrices of a file are as PyTorch's types, the commonest first: float32 for those of few bits."""
    counts: Counter[torch.dtype] = Counter()
    for stored in gguf.read(path).tensors.values():
        if len(stored.shape) > 1:
            counts[{"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.kind, torch.float32)] += math.prod(
                stored.shape
            )
    return [dtype for dtype, _ in counts.most_common()]


def architecture(file: GGUFFile) -> GGUFArchitecture:
    """The spelling of a file's architecture; UserError where firth has none, or not its family."""
    name = file.text("general.architecture")
    known = [a for a in ARCHITECTURES.values() if a.family in FAMILIES]
    found = next((a for a in known if a.name == name), None)
    if found is None:
        raise UserError(
            f"{file.path} is a model of the architecture {name!r}; firth reads {', '.join(a.name for a in known)}"
        )
    return found


def configured(file: GGUFFile, kind: GGUFArchitecture) -> dict[str, Any]:
    """The config.json that a file's metadata amount to. UserError where a key lacks, is no number, or is not known."""
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{file.path} is one part of a model in several files: join them with llama-gguf-split --merge")
    prefix = f"{kind.name}."
    told = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    config: dict[str, Any] = {"model_type": kind.family, **kind.fixed}
    for name, key in kind.fields.items():
        if key not in told and name not in kind.optional:
            raise UserError(f"{file.path}: its metadata lacks {prefix + key!r}")
        if key in told:
            value = config[name] = told.pop(key)
            if type(value) not in (int, float) or not 0 < value < 2**31:
                raise UserError(f"{file.path}: {prefix + key!r} is {value!r:.40} where a number above 0 was expected")
    for name, tensor in kind.sizes.items():
        if tensor not in file.tensors:
            raise UserError(f"{file.path} lacks the tensor {tensor!r}")
        config[name] = file.tensors[tensor].shape[0]
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    depth = config.get("num_hidden_layers", config.get("n_layer"))
    if len(blocks) != depth:
        raise UserError(f"{file.path}: its metadata speak of {depth} layers, and it holds {len(blocks)}")
    head = told.pop("rope.dimension_count", None), told.pop("attention.value_length", None)
    usual = config.get("head_dim", config.get("hidden_size", 0) // config.get("num_attention_heads", 1))
    if any(size not in (None, usual) for size in head):
        raise UserError(f"{file.path}: its heads are {usual} wide, and their values or rotary parts are not ({head})")
    config |= _stretched(file, prefix, told)
    for key, value in told.items():
        if key not in kind.ignored and (key not in kind.still or value != kind.still[key]):
            raise UserError(f"{file.path} asks for {prefix}{key} = {value!r:.40}, which firth's models do not have")
    return config | {
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }  # fmt: skip


def _stretched(file: GGUFFile, prefix: str, told: dict[str, Any]) -> dict[str, Any]:
    """What is said of wavelengths that are stretched, taken out of `told`: nothing, or all by the same factor."""
    kind, factor = told.pop("rope.scaling.type", "none"), told.pop("rope.scaling.factor", None)
    original = told.pop("rope.scaling.original_context_length", None)
    if kind == "none" and factor is None and original is None:
        return {}
    if kind != "linear" or type(factor) is not float:
        raise UserError(
            f"{file.path} asks for {prefix}rope.scaling.type = {kind!r:.40}, which firth does not read here"
        )
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _turn(kind: GGUFArchitecture, config: Mapping[str, Any], name: str, tensor: Tensor, back: bool) -> Tensor:
    """A tensor of the family's in the file's order, or back: rows of pairs, and matrices that the family turns over."""
    module = name.removeprefix(kind.layers).partition(".")[2].rpartition(".")[0]
    if module in kind.transposed and tensor.ndim == 2:
        return tensor.t().contiguous()
    if module in kind.turned:
        heads = config["num_attention_heads"]
        if module.endswith("k_proj"):
            heads = config.get("num_key_value_heads", heads)
        if tensor.shape[0] % (2 * heads):
            raise UserError(f"the tensor {name!r} has {tensor.shape[0]} rows, which are not {heads} heads of pairs")
        half = tensor.shape[0] // heads // 2
        order = (heads, half, 2) if back else (heads, 2, half)
        return tensor.reshape(*order, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def write(
    model: LM,
    tokenizer: Tokenizer,
    path: Path,
    kind: str = "F16",
    *,
    dialogue: bool = False,
    facts: Mapping[str, str] | None = None,
) -> str:
    """Write a model with its tokenizer as one GGUF file; return one sentence that says what llama.cpp loads it as.

    kind: of the matrices, one of F32, F16, BF16, Q8_0, Q4_0; vectors stay float32, as llama.cpp has it, and
    `stored_kind` says which matrices are of another kind: the sentence names them. dialogue: whether the
    model was trained on dialogues: then its chat template is written, and texts begin as that says, without bos.
    facts: further metadata, such as general.name and general.license. UserError for a shape that no architecture has,
    for a tokenizer that llama.cpp does not have, and for a model of whose rows none has whole blocks of the kind.
    """
    if kind not in PACK:
        raise UserError(f"{kind!r} is no kind of numbers that firth writes into a GGUF file: use {', '.join(PACK)}")
    found = next((a for a in ARCHITECTURES.values() if expresses(a, model.config)), None)
    if found is None:
        raise UserError(_misfit(model.config))
    if tokenizer.vocab.size > model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab.size} ids and the model {model.config.vocab_size}")
    family = FAMILIES[found.family]
    told = family.to_hf_config(model.config)
    metadata: dict[str, Any] = {"general.architecture": found.name, "general.type": "model", **(facts or {})}
    metadata |= described(found, told)
    metadata |= {"general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    metadata |= gguf_write.metadata(tokenizer, model.config.vocab_size, dialogue)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    entries = family.weight_mappings(model.config, "lm" in model.heads and "lm_head" in found.names)
    left_out = [
        name for name in state if name not in model.shared_parameters() and not any(name in e.name for e in entries)
    ]
    theirs = to_hf(state, entries)
    untied = any(found.hf_name(name) == "output.weight" for name in theirs)
    written = []
    for name, tensor in theirs.items():
        shape = tuple(_turn(found, told, name, tensor.to("meta"), back=False).shape)
        stored = stored_kind(found.hf_name(name), shape, kind, untied)
        make = partial(_made, found, told, name, tensor, stored)
        written.append(GGUFTensorSpec(found.hf_name(name), stored, shape, make))
    if not any(one.kind == kind for one in written):
        raise UserError(
            f"{kind} stores {KINDS[kind].block} numbers of a row together, and no matrix of this model has rows of a "
            "multiple of that: use F16"
        )
    gguf.write(path, metadata, written)
    dropped = f", without {', '.join(sorted({n.split('.')[1] for n in left_out}))}" if left_out else ""
    return f"llama.cpp loads it as {found.name}, {kind}{_exceptions(written, kind)}{dropped}"


FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""`general.file_type`, by ggml's numbers: what most matrices are."""
HEADS = {"Q4_0": "Q8_0"}
"""Kind of a file -> kind of the matrix that makes the logits, where that is another. llama.cpp's own quantizer takes Q6_K
there, a k-quant; Q8_0 costs 2 bits more for each of its numbers."""


def stored_kind(name: str, shape: tuple[int, ...], kind: str, untied: bool) -> str:
    """Return how a file of a kind stores a tensor.

    Args:
        name: llama.cpp's name of the tensor.
        shape: Its shape, the rows first.
        kind: What the file's matrices are, one of `PACK`.
        untied: Whether the model has an `output.weight`; the token table makes the logits of one that has not.

    Returns:
        F32 for what llama.cpp reads as float32, the head's kind for the matrix that makes the logits, and F16 for rows
        that have no whole blocks, as llama.cpp's convert_hf_to_gguf.py does.
    """
    # token_types and position_embd are read row by row as float32 by llama.cpp.
    if len(shape) == 1 or name in ("token_types.weight", "position_embd.weight"):
        return "F32"
    if name == ("output.weight" if untied else "token_embd.weight"):
        kind = HEADS.get(kind, kind)
    return "F16" if shape[-1] % KINDS[kind].block else kind


def _exceptions(written: Sequence[GGUFTensorSpec], kind: str) -> str:
    """Name the matrices that are not of a file's kind: those of all layers once, as `blk.*.ffn_down.weight`."""
    names: dict[tuple[str, int], dict[str, None]] = {}
    for one in written:
        if one.kind not in (kind, "F32"):
            width = one.shape[-1] if one.shape[-1] % KINDS[kind].block else 0
            names.setdefault((one.kind, width), {})[re.sub(r"^blk\.\d+", "blk.*", one.name)] = None
    found = [
        f"{', '.join(of)} in {other}" + f" (rows of {width}, no multiple of {KINDS[kind].block})" * (width > 0)
        for (other, width), of in names.items()
    ]
    return f"; {'; '.join(found)}" if found else ""


def _made(found: GGUFArchitecture, config: Mapping[str, Any], name: str, tensor: Tensor, kind: str) -> np.ndarray:
    return pack(kind, _turn(found, config, name, tensor.float().cpu(), back=False).numpy())


def described(kind: GGUFArchitecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that a config.json amounts to."""
    told = {f"{kind.name}.{key}": config[name] for name, key in kind.fields.items()}
    if "head_dim" in kind.fields:
        told |= {f"{kind.name}.{key}": config["head_dim"] for key in ("attention.value_length", "rope.dimension_count")}
    told |= {f"{kind.name}.{key}": value for key, value in kind.still.items() if value is False}
    return told | {f"{kind.name}.vocab_size": config["vocab_size"]}


def expresses(kind: GGUFArchitecture, config: ModelConfig) -> bool:
    """Whether the shape survives the way into a file's metadata and back (dropout and how weights begin aside)."""
    return kind.family in FAMILIES and _back(kind, FAMILIES[kind.family], config) == _lasting(config)


def _lasting(config: ModelConfig) -> ModelConfig:
    return replace(config, dropout=0.0, init_std=0.02, zero_init=False)


def _back(kind: GGUFArchitecture, family: Family, model_config: ModelConfig) -> ModelConfig | None:
    """What a shape is read as when it was written so; None where the family's config cannot even be made of it."""
    config = family.to_hf_config(model_config)
    kept = {name: value for name, value in config.items() if name in kind.fields or name in kind.sizes}
    kept |= {name: config.get(name, False) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    try:
        return _lasting(family.to_config(kept | dict(kind.fixed)))
    except (UserError, KeyError):
        return None


def _misfit(config: ModelConfig) -> str:
    """What keeps a shape from being a llama, and what to do."""
    back = _back(LLAMA, FAMILIES["llama"], config)
    mine = _lasting(config)
    told = "it is no decoder of that kind"
    for one in fields(ModelConfig) if back is not None else ():
        here, there = getattr(mine, one.name), getattr(back, one.name)
        if here != there:
            told = f"its shape.{one.name} is {here!r} where a llama has {there!r}"
            break
    return f"llama.cpp has no model of this shape ({told}): train `firth train llama` for one that it has"
