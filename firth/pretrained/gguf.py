"""Read and write models in GGUF files, llama.cpp's format.

A GGUF file has the contents of a `config.json` and a `model.safetensors` under other names. A `GGUFArchitecture` maps those
names to a family of `firth.pretrained.families`, which does the rest. Quantized tensors are read as float32
(`firth.pretrained.gguf_quantize`). The rotary embedding of llama.cpp rotates adjacent pairs of a head, that of transformers
and firth its two halves: for `llama` the rows of q and k are permuted, as in llama.cpp's convert_hf_to_gguf.py.

    model = load_model(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))        # firth.pretrained.load_save reads it like a directory
    print(write(model, tokenizer, Path("mine.gguf"), "Q8_0"))          # llama.cpp loads it as llama

>>> ARCHITECTURES["llama"].gguf_name("model.layers.3.self_attn.q_proj.weight")
'blk.3.attn_q.weight'
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """One of llama.cpp's architectures, mapped to a family.

    Args:
        name: `general.architecture`.
        family: Name of the family in `firth.pretrained.families`.
        fields: Field of config.json -> metadata key without the prefix `NAME.`.
        names: Module in transformers -> in GGUF, outside of the layers.
        layer_prefix: Prefix of the layers' modules in transformers.
        layer_names: Module in transformers -> in GGUF, inside a layer.
        fixed: Fields of config.json that have no metadata key.
        row_counts: Field of config.json -> tensor whose number of rows it is.
        optional: Fields that a file may omit.
        required_metadata: Metadata keys with the only value that firth supports.
        ignored: Metadata keys without further information.
        interleaved: Modules whose rows are in the order of adjacent pairs.
        transposed: Modules whose weights the family stores transposed.
    """

    name: str
    family: str
    fields: Mapping[str, str]
    names: Mapping[str, str]
    layer_prefix: str
    layer_names: Mapping[str, str]
    fixed: Mapping[str, Any]
    row_counts: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    required_metadata: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset({"vocab_size", "tensor_data_layout"})
    interleaved: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    def gguf_name(self, name: str) -> str:
        """Return the GGUF name of a tensor of the family."""
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(re.escape(self.layer_prefix) + r"(\d+)\.(.+)", module)
        if inside:
            return f"blk.{inside[1]}.{self.layer_names[inside[2]]}.{kind}"
        return f"{self.names[module]}.{kind}"

    def family_name(self, name: str) -> str | None:
        """Return the family's name of a GGUF tensor, or None if it has no such tensor."""
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
        names = {theirs: ours for ours, theirs in (self.layer_names if inside else self.names).items()}
        found = names.get(inside[2] if inside else module)
        return None if found is None else (f"{self.layer_prefix}{inside[1]}.{found}" if inside else found) + f".{kind}"


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
    required_metadata={"expert_count": 0, "expert_used_count": 0},
    interleaved=frozenset({"self_attn.q_proj", "self_attn.k_proj"}),
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
    required_metadata={"attention.causal": False}, ignored=frozenset({"vocab_size", "pooling_type"}),
)  # fmt: skip

ARCHITECTURES = {
    "llama": LLAMA, "gpt2": GPT2, "bert": BERT,
    "qwen2": replace(
        LLAMA, name="qwen2", family="qwen2", interleaved=frozenset(),
        fixed={"hidden_act": "silu", "architectures": ["Qwen2ForCausalLM"]},
    ),
    "qwen3": replace(
        LLAMA, name="qwen3", family="qwen3", interleaved=frozenset(),
        fixed={"hidden_act": "silu", "architectures": ["Qwen3ForCausalLM"]},
        layer_names=BLOCK | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    ),
}  # fmt: skip
"""`general.architecture` -> architecture."""


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json that corresponds to a GGUF file.

    Raises:
        UserError: If the architecture or a setting in the metadata is not supported.
    """
    file = gguf.read(path)
    return to_hf_config(file, architecture(file))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a GGUF file by the family's names, as float32.

    Raises:
        UserError: As `read_config`, and for an unknown tensor.
    """
    file = gguf.read(path)
    arch = architecture(file)
    config, state = to_hf_config(file, arch), {}
    for name, stored in file.tensors.items():
        ours = arch.family_name(name)
        if ours is None:
            raise UserError(f"{path} has the tensor {name!r}, which firth's {arch.family} models do not have")
        numbers = torch.from_numpy(unpack(stored.kind, stored.data).reshape(stored.shape))
        state[ours] = _reorder(arch, config, ours, numbers, back=True)
    return state


def dtypes(path: Path) -> list[torch.dtype]:
    """Return the dtypes of a file's matrices, most frequent first; float32 for quantized ones."""
    counts: Counter[torch.dtype] = Counter()
    for stored in gguf.read(path).tensors.values():
        if len(stored.shape) > 1:
            counts[{"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.kind, torch.float32)] += math.prod(
                stored.shape
            )
    return [dtype for dtype, _ in counts.most_common()]


def architecture(file: GGUFFile) -> GGUFArchitecture:
    """Return a file's architecture; raise a UserError if it is not supported."""
    name = file.text("general.architecture")
    known = [a for a in ARCHITECTURES.values() if a.family in FAMILIES]
    found = next((a for a in known if a.name == name), None)
    if found is None:
        raise UserError(f"{file.path} has the architecture {name!r}; firth reads {', '.join(a.name for a in known)}")
    return found


def to_hf_config(file: GGUFFile, arch: GGUFArchitecture) -> dict[str, Any]:
    """Return the config.json for a file's metadata; raise a UserError if a key is missing, invalid, or not supported."""
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{file.path} is one of several files of a model: join them with llama-gguf-split --merge")
    prefix = f"{arch.name}."
    settings = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    config: dict[str, Any] = {"model_type": arch.family, **arch.fixed}
    for name, key in arch.fields.items():
        if key not in settings and name not in arch.optional:
            raise UserError(f"{file.path}: its metadata lacks {prefix + key!r}")
        if key in settings:
            value = config[name] = settings.pop(key)
            if type(value) not in (int, float) or not 0 < value < 2**31:
                raise UserError(f"{file.path}: {prefix + key!r} is {value!r:.40}, not a number above 0")
    for name, tensor in arch.row_counts.items():
        if tensor not in file.tensors:
            raise UserError(f"{file.path} lacks the tensor {tensor!r}")
        config[name] = file.tensors[tensor].shape[0]
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    depth = config.get("num_hidden_layers", config.get("n_layer"))
    if len(blocks) != depth:
        raise UserError(f"{file.path}: its metadata has {depth} layers, and it has the tensors of {len(blocks)}")
    head_sizes = settings.pop("rope.dimension_count", None), settings.pop("attention.value_length", None)
    head_dim = config.get("head_dim", config.get("hidden_size", 0) // config.get("num_attention_heads", 1))
    if any(size not in (None, head_dim) for size in head_sizes):
        raise UserError(
            f"{file.path}: its head_dim is {head_dim}, but its rotary and value dimensions are {head_sizes}"
        )
    config |= _rope_scaling(file, prefix, settings)
    for key, value in settings.items():
        if key not in arch.ignored and (key not in arch.required_metadata or value != arch.required_metadata[key]):
            raise UserError(f"{file.path} has {prefix}{key} = {value!r:.40}, which firth does not support")
    return config | {
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }  # fmt: skip


def _rope_scaling(file: GGUFFile, prefix: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Remove the RoPE scaling from the settings and return its config.json field; only linear scaling is supported."""
    scaling, factor = settings.pop("rope.scaling.type", "none"), settings.pop("rope.scaling.factor", None)
    original = settings.pop("rope.scaling.original_context_length", None)
    if scaling == "none" and factor is None and original is None:
        return {}
    if scaling != "linear" or type(factor) is not float:
        raise UserError(
            f"{file.path} has {prefix}rope.scaling.type = {scaling!r:.40}, which firth does not support in GGUF files"
        )
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _reorder(arch: GGUFArchitecture, config: Mapping[str, Any], name: str, tensor: Tensor, back: bool) -> Tensor:
    """Convert a tensor from the family's layout to the file's, or back: interleaved rows and transposed matrices."""
    module = name.removeprefix(arch.layer_prefix).partition(".")[2].rpartition(".")[0]
    if module in arch.transposed and tensor.ndim == 2:
        return tensor.t().contiguous()
    if module in arch.interleaved:
        heads = config["num_attention_heads"]
        if module.endswith("k_proj"):
            heads = config.get("num_key_value_heads", heads)
        if tensor.shape[0] % (2 * heads):
            raise UserError(
                f"the tensor {name!r} has {tensor.shape[0]} rows, which is no multiple of 2 x {heads} heads"
            )
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
    """Write a model and its tokenizer to one GGUF file.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        path: File to write.
        kind: Format of the matrices: F32, F16, BF16, Q8_0 or Q4_0. Vectors stay float32, as in llama.cpp, and some
            matrices have another format (`stored_kind`).
        dialogue: Whether the model was trained on dialogues; its chat template is then written, and bos is not added.
        facts: Further metadata, such as general.name and general.license.

    Returns:
        One sentence with llama.cpp's name for the model and the matrices in another format.

    Raises:
        UserError: If llama.cpp does not support the model config or the tokenizer, or if no matrix has rows of whole
            blocks.
    """
    if kind not in PACK:
        raise UserError(f"firth does not write {kind!r} to GGUF files: use {', '.join(PACK)}")
    arch = next((a for a in ARCHITECTURES.values() if supports(a, model.config)), None)
    if arch is None:
        raise UserError(_unsupported_message(model.config))
    if tokenizer.vocab.size > model.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab.size} ids and the model {model.config.vocab_size}")
    family = FAMILIES[arch.family]
    config = family.to_hf_config(model.config)
    metadata: dict[str, Any] = {"general.architecture": arch.name, "general.type": "model", **(facts or {})}
    metadata |= to_metadata(arch, config)
    metadata |= {"general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    metadata |= gguf_write.metadata(tokenizer, model.config.vocab_size, dialogue)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    entries = family.weight_mappings(model.config, "lm" in model.heads and "lm_head" in arch.names)
    left_out = [
        name for name in state if name not in model.shared_parameters() and not any(name in e.names for e in entries)
    ]
    theirs = to_hf(state, entries)
    untied = any(arch.gguf_name(name) == "output.weight" for name in theirs)
    written = []
    for name, tensor in theirs.items():
        shape = tuple(_reorder(arch, config, name, tensor.to("meta"), back=False).shape)
        stored = stored_kind(arch.gguf_name(name), shape, kind, untied)
        make = partial(_packed, arch, config, name, tensor, stored)
        written.append(GGUFTensorSpec(arch.gguf_name(name), stored, shape, make))
    if not any(one.kind == kind for one in written):
        raise UserError(
            f"{kind} stores the numbers of a row in blocks of {KINDS[kind].block}, and no matrix of this model has rows of a "
            "multiple of that: use F16"
        )
    gguf.write(path, metadata, written)
    dropped = f", without {', '.join(sorted({n.split('.')[1] for n in left_out}))}" if left_out else ""
    return f"llama.cpp loads it as {arch.name}, {kind}{_exceptions(written, kind)}{dropped}"


FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""Format of most matrices -> `general.file_type`, ggml's number of it."""
HEAD_KINDS = {"Q4_0": "Q8_0"}
"""Format of a file -> format of the matrix that computes the logits, if different. llama.cpp's own quantizer uses Q6_K, a
k-quant; Q8_0 takes 2 bits more per number."""


def stored_kind(name: str, shape: tuple[int, ...], kind: str, untied: bool) -> str:
    """Return the format in which a tensor is stored.

    Args:
        name: llama.cpp's name of the tensor.
        shape: Its shape, rows first.
        kind: Format of the file's matrices, one of `PACK`.
        untied: Whether the model has an `output.weight`; otherwise the token table computes the logits.

    Returns:
        F32 for tensors that llama.cpp reads as float32, the format in `HEAD_KINDS` for the matrix that computes the
        logits, and F16 for rows that are not whole blocks, as in llama.cpp's convert_hf_to_gguf.py.
    """
    # token_types and position_embd are read row by row as float32 by llama.cpp.
    if len(shape) == 1 or name in ("token_types.weight", "position_embd.weight"):
        return "F32"
    if name == ("output.weight" if untied else "token_embd.weight"):
        kind = HEAD_KINDS.get(kind, kind)
    return "F16" if shape[-1] % KINDS[kind].block else kind


def _exceptions(written: Sequence[GGUFTensorSpec], kind: str) -> str:
    """Return the matrices in another format, for a message; those of all layers once, as `blk.*.ffn_down.weight`."""
    names: dict[tuple[str, int], dict[str, None]] = {}
    for spec in written:
        if spec.kind not in (kind, "F32"):
            width = spec.shape[-1] if spec.shape[-1] % KINDS[kind].block else 0
            names.setdefault((spec.kind, width), {})[re.sub(r"^blk\.\d+", "blk.*", spec.name)] = None
    found = [
        f"{', '.join(of)} in {other}" + f" (rows of {width}, no multiple of {KINDS[kind].block})" * (width > 0)
        for (other, width), of in names.items()
    ]
    return f"; {'; '.join(found)}" if found else ""


def _packed(arch: GGUFArchitecture, config: Mapping[str, Any], name: str, tensor: Tensor, kind: str) -> np.ndarray:
    return pack(kind, _reorder(arch, config, name, tensor.float().cpu(), back=False).numpy())


def to_metadata(arch: GGUFArchitecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata for a config.json."""
    metadata = {f"{arch.name}.{key}": config[name] for name, key in arch.fields.items()}
    if "head_dim" in arch.fields:
        metadata |= {
            f"{arch.name}.{key}": config["head_dim"] for key in ("attention.value_length", "rope.dimension_count")
        }
    metadata |= {f"{arch.name}.{key}": value for key, value in arch.required_metadata.items() if value is False}
    return metadata | {f"{arch.name}.vocab_size": config["vocab_size"]}


def supports(arch: GGUFArchitecture, config: ModelConfig) -> bool:
    """Return whether a config survives the round trip through a file's metadata, ignoring dropout and initialization."""
    return arch.family in FAMILIES and _round_trip(arch, FAMILIES[arch.family], config) == _comparable(config)


def _comparable(config: ModelConfig) -> ModelConfig:
    return config.with_fields({"dropout": 0.0, "init.std": 0.02, "init.zero_output": False})


def _round_trip(arch: GGUFArchitecture, family: Family, model_config: ModelConfig) -> ModelConfig | None:
    """Return the config that is read after a config is written, or None if the family does not support it."""
    config = family.to_hf_config(model_config)
    kept = {name: value for name, value in config.items() if name in arch.fields or name in arch.row_counts}
    kept |= {name: config.get(name, False) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    try:
        return _comparable(family.to_config(kept | dict(arch.fixed)))
    except (UserError, KeyError):
        return None


def _unsupported_message(config: ModelConfig) -> str:
    """Return why llama.cpp does not support a config and what to do, by comparison with a Llama."""
    back = _round_trip(LLAMA, FAMILIES["llama"], config)
    mine = _comparable(config)
    reason = "it is no such decoder"
    of_llama, of_mine = {} if back is None else back.flat_fields(), mine.flat_fields()
    for name, expected in of_llama.items():
        found = of_mine[name]
        if found != expected:
            reason = f"its model.{name} is {found!r} where a llama has {expected!r}"
            break
    return (
        f"llama.cpp does not support this model config ({reason}): `firth train llama` trains a model that it supports"
    )
