"""Import and export: models of other libraries are read completely, and trained models are exported with a model card."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from firth.io.safetensors import DTYPES, Storage, read_tensors
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import PositionConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import llama
from firth.pretrained.load_save import load_model, save_model
from firth.runs.import_export import export_model, import_model
from firth.runs.inference import fill_text
from firth.runs.loaded_model import encode_prompt
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

TINY = [
    "tokenizer.vocab_size=500",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=1",
    "examples.max_length=32",
    "batch.size=4",
    "max_steps=3",
    "evaluation.every=0",
    "evaluation.max_examples=8",
    "sample_prompts=[]",
]
AUTO = {"decoder": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM", "both": "AutoModelForSeq2SeqLM"}


def random_model(kind: str) -> tuple[LM, Tokenizer]:
    """Return a model with random weights and firth's defaults, and a tokenizer for it."""
    coder = tokenizer()
    make = {"decoder": decoder_config, "encoder": encoder_config, "both": encoder_decoder_config}[kind]
    torch.manual_seed(0)
    config = make(coder.vocab.size, 32, 2, num_heads=4, max_positions=64)
    model = LM(config, {"lm": LMHead(config)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval(), coder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"Letter {i}. " + "The quick brown fox jumps over the lazy dog again. " * 40)
    rows = [{"text": f"the {word} fox {i}", "label": word} for i in range(20) for word in ("good", "bad")]
    (folder / "labeled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of three steps."""
    paths = ",".join(str(folder / f"{i}.txt") for i in range(12))
    plan = load(
        "gpt", ["data.corpus=", f"data.path=[{paths}]", *TINY, "model.max_positions=64", 'sample_prompts=["The quick"]']
    )
    run(plan, folder.parent / "run-card", log=lambda _: None)
    return folder.parent / "run-card"


@torch.no_grad()
def logits(kind: str, model: LM, theirs: torch.nn.Module) -> float:
    """Return the logits of one row."""
    row = torch.randint(5, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    steps = torch.arange(20)[None]
    order = {} if kind == "encoder" else {"query_time": steps, "key_time": steps}
    if kind == "both":
        ours = model.heads["lm"](model({"source_tokens": row, "tokens": row} | order))
        return (theirs(input_ids=row, decoder_input_ids=row).logits - ours).abs().max().item()
    return (theirs(input_ids=row).logits - model.heads["lm"](model({"tokens": row} | order))).abs().max().item()


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("dtype", DTYPES)
def test_export_loads_in_every_dtype_and_in_shards(kind: str, dtype: str, tmp_path: Path) -> None:
    model, tokenizer = random_model(kind)
    save_model(model, tokenizer, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out", form="hf", dtype=dtype, shard="60KB", log=lambda _: None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    total = 0
    for name in files:
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == 0o644
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"][key] for key in file.keys()} == {name}  # noqa: SIM118 - no mapping
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(DTYPES[dtype]).removeprefix("torch.")
    theirs, info = getattr(transformers, AUTO[kind]).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = load_model(tmp_path / "out")
    assert logits(kind, again, theirs.eval()) < 1e-4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.to(DTYPES[dtype]).float(), again.state_dict()[name]), name


@pytest.mark.parametrize("kind", AUTO)
def test_exported_tokenizer_adds_the_special_tokens(kind: str, tmp_path: Path) -> None:
    model, tokenizer = random_model(kind)
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "What is a module?"
    framed = (
        tokenizer.vocab.add_special_tokens(tokenizer.encode(text))
        if kind == "encoder"
        else encode_prompt(tokenizer, text, model)
    )
    assert theirs(text)["input_ids"] == framed.tolist()
    assert set(theirs(text)) == {"input_ids", "attention_mask"}
    if kind == "encoder":
        cls, sep, pair = (
            tokenizer.vocab.cls,
            tokenizer.vocab.sep,
            [tokenizer.encode(x).tolist() for x in ("one", "two")],
        )
        assert theirs("one", "two")["input_ids"] == [cls, *pair[0], sep, *pair[1], sep]
    again = Tokenizer.load(tmp_path)
    assert again.digest == tokenizer.digest
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.with_post_processor("bidirectional").definition == again.definition


def test_fp16_overflow_is_rejected_and_leaves_no_files(tmp_path: Path) -> None:
    model, tokenizer = random_model("decoder")
    with torch.no_grad():
        model.tokens.weight[0, 0] = 1e5
    save_model(model, tokenizer, tmp_path / "run")
    with pytest.raises(UserError, match="too large for fp16"):
        export_model(tmp_path / "run", tmp_path / "out", form="hf", dtype="fp16", shard="")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_minilm_round_trip_is_bit_identical(minilm: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    import_model(minilm, tmp_path / "in", log=lines.append)
    text = "\n".join(lines)
    assert "bert (BertModel), an encoder" in text and "22,565,376 parameters in float32; context 512" in text
    assert "30,522 ids; pad [PAD]" in text and "pooler.dense.weight" in text and "chat template: no" in text
    export_model(tmp_path / "in", tmp_path / "out", form="hf", dtype="", shard="", log=lines.append)
    given, out = read_tensors(minilm), read_tensors(tmp_path / "out")
    names = [name for name in given if not name.startswith(("pooler", "embeddings.position_ids"))]
    assert {name.removeprefix("bert.") for name in out} == set(names)
    assert all(torch.equal(out[f"bert.{name}"], given[name]) for name in names)
    ours, theirs = Tokenizer.load(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(minilm)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in ("A tést, isn't it?", "two  blanks 日本"):
        assert (
            ours.vocab.add_special_tokens(ours.encode(line)).tolist()
            == theirs(line)["input_ids"]
            == again(line)["input_ids"]
        )
    assert dict(again("one", "two")) == dict(theirs("one", "two"))
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert (front["license"], front["language"]) == ("apache-2.0", "en")


def test_bf16_directory_stays_bf16(tmp_path: Path) -> None:
    model, tokenizer = random_model("decoder")
    save_model(model, tokenizer, tmp_path / "given", storage=Storage(torch.bfloat16))
    (tmp_path / "given" / "firth.json").unlink()
    lines: list[str] = []
    import_model(tmp_path / "given", tmp_path / "in", log=lines.append)
    assert "parameters in bfloat16" in lines[1]
    given, held = read_tensors(tmp_path / "given"), read_tensors(tmp_path / "in")
    assert given.keys() == held.keys() and all(torch.equal(given[k], held[k]) for k in given)
    assert load_model(tmp_path / "in").tokens.weight.dtype == torch.float32


@pytest.mark.slow
def test_init_from_a_transformers_directory(folder: Path, minilm: Path, tmp_path: Path) -> None:
    """The run takes its model config and tokenizer; another tokenizer is rejected."""
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    )
    theirs.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_bytes((minilm / "vocab.txt").read_bytes())
    few = [f"init_from={tmp_path / 'bert'}", f"data.path={folder / 'labeled.jsonl'}", "max_steps=2", "batch.size=4"]
    done = run(load("classification", few), tmp_path / "run", log=lambda _: None)
    config = load_model(done.model).config
    assert (config.vocab_size, config.hidden_size, config.embedding.type_vocab_size) == (30522, 16, 2)
    assert Tokenizer.load(done.model).digest == Tokenizer.load(tmp_path / "bert").digest
    card = (done.model / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "bert"
    other = [*few, f"tokenizer.path={folder}"]
    tokenizer().save(folder)
    with pytest.raises(UserError, match=r"has another tokenizer than this run.*leave out tokenizer\.path"):
        run(load("classification", other), tmp_path / "other", log=lambda _: None)
    mine = Tokenizer.load(tmp_path / "bert").vocab.mask
    import_model(tmp_path / "bert", tmp_path / "in", log=lambda _: None)
    assert mine == 103 and len(fill_text(tmp_path / "in", "a <mask> text", 2).split("   ")) == 2


def test_tokenizer_larger_or_smaller_than_the_model(tmp_path: Path) -> None:
    small = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=600, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    for name, size in (("fits", 612), ("short", 590)):
        small.resize_token_embeddings(size)
        small.save_pretrained(tmp_path / name)
        tokenizer().save(tmp_path / name)
    assert tokenizer().vocab.size == 600
    lines: list[str] = []
    import_model(tmp_path / "fits", tmp_path / "in", log=lines.append)
    assert "600 ids for 612 vectors: 12 of those are padding" in "\n".join(lines)
    with pytest.raises(UserError, match="600 ids and the model 590 embeddings"):
        import_model(tmp_path / "short", tmp_path / "no", log=lines.append)
    with pytest.raises(UserError, match="600 ids and the model 590 embeddings"):
        run(
            load("gpt", [f"init_from={tmp_path / 'short'}", "model=null", "data.corpus=pydoc"]),
            tmp_path / "run",
            lambda _: None,
        )
    assert not (tmp_path / "no").exists()


def test_foreign_directories_are_not_overwritten(tmp_path: Path) -> None:
    model, tokenizer = random_model("decoder")
    save_model(model, tokenizer, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")

    def out(name: str) -> None:
        export_model(tmp_path / "run", tmp_path / name, form="hf", dtype="", shard="", log=lambda _: None)

    for name, says in (
        ("mine", "holds other files"),
        ("file", "holds other files"),
        ("run", "holds the model to read"),
    ):
        with pytest.raises(UserError, match=says):
            out(name)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    out("empty")
    out("empty")  # its own, so it is written again
    assert (tmp_path / "empty" / "README.md").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"run", "mine", "file", "empty"}


def test_model_card_of_a_run(trained: Path, folder: Path, tmp_path: Path) -> None:
    export_model(trained, tmp_path / "out", form="hf", dtype="bf16", shard="", log=lambda _: None)
    for text in ((trained / "model" / "README.md").read_text(), (tmp_path / "out" / "README.md").read_text()):
        front = yaml.safe_load(text.split("---")[1])
        assert front["tags"] == ["firth", "causal_lm"] and front["pipeline_tag"] == "text-generation"
        assert front["license"] == "other" and "base_model" not in front
        assert str(folder) not in text and os.sep + "tmp" not in text
        assert "3 steps" in text and "| bits per byte |" in text and "**The quick**" in text and "`0.txt`" in text
        assert "license of these files is not known" in text and "NanoChatForCausalLM.from_pretrained" in text
        listing = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
        assert listing["budget"]["max_steps"] == 3 and listing["data"]["path"][0] == "0.txt"
        # Not the speed of a machine: held-out measures alone.
        assert "per second" not in text


def test_model_card_names_the_license_of_a_corpus(tmp_path: Path) -> None:
    plan = load("roberta", ["data.corpus=pydoc", *TINY])
    done = run(plan, tmp_path / "run", log=lambda _: None)
    text = (done.model / "README.md").read_text()
    assert "license: PSF" in text and yaml.safe_load(text.split("---")[1])["language"] == "en"
    export_model(tmp_path / "run", tmp_path / "out", form="hf", dtype="", shard="", log=lambda _: None)
    listed = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [m["path"] for m in listed] == ["", "1_Pooling"]
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32 and pooling["pooling_mode_mean_tokens"] is True


def test_stop_ids_of_generation_config_end_an_answer(tmp_path: Path) -> None:
    model, tokenizer = random_model("decoder")
    save_model(model, tokenizer, tmp_path / "given")
    (tmp_path / "given" / "firth.json").unlink()
    a, b = tokenizer.id("</s>"), int(tokenizer.encode("?")[0])
    (tmp_path / "given" / "generation_config.json").write_text(json.dumps({"eos_token_id": [a, b]}))
    assert {a, b} <= set(chat.stops(Tokenizer.load(tmp_path / "given")))
    import_model(tmp_path / "given", tmp_path / "in", log=lambda _: None)
    assert {a, b} <= set(chat.stops(Tokenizer.load(tmp_path / "in")))
    assert {a, b} <= set(json.loads((tmp_path / "in" / "generation_config.json").read_text())["eos_token_id"])


@pytest.mark.parametrize(
    ("add_bos", "framing", "begins"), [(None, False, False), (None, True, True), (False, True, False)]
)
def test_tokenizer_config_decides_on_bos(add_bos: bool | None, framing: bool, begins: bool, tmp_path: Path) -> None:
    """A decoder of another library gets bos if tokenizer_config.json, or else tokenizer.json, says so."""
    model, tokenizer = random_model("decoder")
    save_model(model, tokenizer, tmp_path)
    (tmp_path / "firth.json").unlink()
    (tokenizer.with_post_processor("causal") if framing else tokenizer).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | ({} if add_bos is None else {"add_bos_token": add_bos}))
    )
    loaded = Tokenizer.load(tmp_path)
    assert (encode_prompt(loaded, "hello", model)[0] == tokenizer.vocab.bos) == begins
    save_model(model, loaded, tmp_path / "again")
    assert (encode_prompt(Tokenizer.load(tmp_path / "again"), "hello", model)[0] == tokenizer.vocab.bos) == begins
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    if add_bos is None:
        assert (theirs("hello")["input_ids"][0] == tokenizer.vocab.bos) == begins


def gpt2(folder: Path) -> Engine:
    """Return a tokenizer from GPT-2's files."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: i
        for i, token in enumerate([*letters, "he", "ll", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>"])
    }
    merges = [("h", "e"), ("l", "l")]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return Engine(models.BPE(vocab, merges))


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "RobertaTokenizer"])
def test_older_tokenizers_use_the_template_of_their_class(kind: str, tmp_path: Path) -> None:
    gpt2(tmp_path)
    marks = {
        "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    }
    config = {"tokenizer_class": kind, **marks.get(kind, {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(tmp_path)
    theirs = getattr(transformers, kind)(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ids = ours.engine.encode("hello hell", add_special_tokens=True).ids
    assert ids == theirs("hello hell")["input_ids"]
    assert ours.engine.encode("he", "ll", add_special_tokens=True).ids == theirs("he", "ll")["input_ids"]
    assert (ours.vocab.roles.get("mask") is not None) == (kind == "RobertaTokenizer") or kind == "GPT2Tokenizer"


def test_vocab_txt_follows_its_configuration(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "hello", "Hello", "[X]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    assert Tokenizer.load(tmp_path).pieces("Hello") == ["hello"]
    added = {"9": {"content": "[NEW]", "special": True}}
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    cased = Tokenizer.load(tmp_path)
    assert cased.pieces("Hello") == ["Hello"] and cased.id("[NEW]") == 9 and cased.vocab.special[9]
    assert cased.engine.encode("a", "hello", add_special_tokens=True).type_ids == [0, 0, 0, 1, 1]
    config["added_tokens_decoder"] = {"12": {"content": "[NEW]", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the id 12, which is not free"):
        Tokenizer.load(tmp_path)


def test_roles_from_special_tokens_map(tmp_path: Path) -> None:
    words = ["<p>", "[UNK]", "<c>", "<e>", "<m>", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    named = {"pad_token": "<p>", "cls_token": {"content": "<c>"}, "sep_token": "<e>", "mask_token": "<m>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    roles = Tokenizer.load(tmp_path).vocab.roles
    assert {r: roles[r] for r in ("pad", "cls", "bos", "sep", "eos", "mask")} == {
        "pad": 0, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4,
    }  # fmt: skip


@pytest.mark.slow
def test_sentence_transformers_config_is_copied(minilm: Path, tmp_path: Path) -> None:
    import_model(minilm, tmp_path / "in", log=lambda _: None)
    export_model(tmp_path / "in", tmp_path / "out", form="hf", dtype="", shard="", log=lambda _: None)
    listed = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["type"].split(".")[-1] for module in listed] == ["Transformer", "Pooling", "Normalize"]
    limits = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    assert limits["max_seq_length"] == 256 and limits["model_args"] == {"add_pooling_layer": False}
    (tmp_path / "in" / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../elsewhere"}]))
    with pytest.raises(UserError, match="a path outside of its directory"):
        export_model(tmp_path / "in", tmp_path / "out", form="hf", dtype="", shard="", log=lambda _: None)
    (tmp_path / "in" / "modules.json").write_text(json.dumps([{"type": "x.Dense", "path": "2_Dense"}]))
    export_model(tmp_path / "in", tmp_path / "out", form="hf", dtype="", shard="", log=lambda _: None)
    assert (
        len(json.loads((tmp_path / "out" / "modules.json").read_text())) == 2
    )  # the mean, not a map that is not there


def test_import_and_export_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from firth.cli import app

    model, tokenizer = random_model("encoder")
    save_model(model, tokenizer, tmp_path / "run")
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), out, "--dtype", "bf16", "--shard-size", "50KB"])
    assert done.exit_code == 0 and "transformers loads it as ModernBertForMaskedLM" in done.output
    done = CliRunner().invoke(app, ["import", out, back])
    assert done.exit_code == 0 and "in bfloat16" in done.output and f"firth fill {back}" in done.output
    done = CliRunner().invoke(app, ["fill", back, "a <mask> text", "--top", "2"])
    assert done.exit_code == 0 and len(done.output.split("   ")) == 2


def test_sentencepiece_files_follow_their_class(sentencepiece_models: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_models / "botchan_en_unigram_1000.model", tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 10}')
    t5 = Tokenizer.load(tmp_path)
    assert (t5.vocab.size, t5.id("<extra_id_0>"), t5.id("<extra_id_9>")) == (1010, 1009, 1000)
    assert t5.vocab.sentinels.tolist() == list(range(1009, 999, -1))
    plain = t5.encode("the text").tolist()
    assert t5.engine.encode("the text", add_special_tokens=True).ids == [*plain, t5.vocab.eos]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    llama = Tokenizer.load(tmp_path)
    assert llama.engine.encode("the text", add_special_tokens=True).ids == [llama.vocab.bos, *plain]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')
    assert Tokenizer.load(tmp_path).engine.encode("the text", add_special_tokens=True).ids == plain
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(UserError, match="the ids of a XLMRobertaTokenizer are not those of this file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Albert", {}), ("Albert", {"do_lower_case": False}), ("Albert", {"keep_accents": True}), ("XLNet", {})],
)
def test_albert_and_xlnet_normalize_like_transformers(
    kind: str, more: dict[str, bool], sentencepiece_models: Path, tmp_path: Path
) -> None:
    shutil.copy(sentencepiece_models / "botchan_en_unigram_1000.model", tmp_path / "spiece.model")
    names = dict.fromkeys(("cls_token", "sep_token", "pad_token", "mask_token"), "</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{kind}Tokenizer"} | names | more))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello there, it's ``fine'' and dandy", "The Résumé of a Café", "a  b"):
        found = theirs(text, add_special_tokens=False)["input_ids"]
        known = [
            0 if kind == "Albert" and id == 1 else id for id in found
        ]  # theirs says 1 for unk whatever the file says
        assert ours.encode(text).tolist() == known, text


def test_models_without_a_family_round_trip(tmp_path: Path) -> None:
    coder = tokenizer()
    config = ModelConfig(
        vocab_size=coder.vocab.size,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_positions=32,
        position=PositionConfig("sinusoidal"),
        activation="relu2",
    )
    model = LM(config, {"lm": LMHead(config)}).eval()
    save_model(model, coder, tmp_path / "run")
    lines: list[str] = []
    export_model(tmp_path / "run", tmp_path / "out", form="hf", dtype="bf16", shard="20KB", log=lines.append)
    assert "only firth loads it" in lines[0]
    assert load_model(tmp_path / "out").config == config
    for wrong, says in (
        ({"form": "onnx"}, "no format 'onnx'"),
        ({"dtype": "int8"}, "no dtype"),
        ({"shard": "big"}, "is not a size"),
    ):
        options = {"form": "hf", "dtype": "", "shard": ""} | wrong
        with pytest.raises(UserError, match=says):
            export_model(tmp_path / "run", tmp_path / "out", **options)


def test_suggested_command_after_export_fits_the_training(trained: Path, tmp_path: Path) -> None:
    """A run on plain text generates and does not chat, although its tokenizer has chat tokens; a GGUF export is a directory too."""
    lines: list[str] = []
    export_model(trained, tmp_path / "out", form="hf", dtype="", shard="", log=lines.append)
    assert lines[-1].startswith("Let it write:  firth generate ")
    with pytest.raises(UserError, match=f"name it {tmp_path}/mine$"):
        export_model(trained, tmp_path / "mine.gguf", form="gguf", dtype="", shard="", log=lines.append)
    assert not (tmp_path / "mine.gguf").exists()


def test_q4_round_trip(tmp_path: Path) -> None:
    coder = tokenizer()
    torch.manual_seed(0)
    config = llama(coder.vocab.size, 32, 1, 2, 64, max_positions=32)
    save_model(LM(config, {"lm": LMHead(config)}).eval(), coder, tmp_path / "run")
    lines: list[str] = []
    export_model(tmp_path / "run", tmp_path / "out", form="gguf", dtype="q4_0", shard="", log=lines.append)
    assert lines[0].endswith("llama.cpp loads it as llama, Q4_0; output.weight in Q8_0")
    assert lines[-1].endswith(f"llama-cli -m {tmp_path / 'out' / 'model.gguf'}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Q4_0; output.weight in Q8_0" in card and "| dtype | Q4_0 |" in card
    import_model(tmp_path / "out", tmp_path / "back", lines.append)
    mine, theirs = load_model(tmp_path / "out").state_dict(), load_model(tmp_path / "back").state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    first = load_model(tmp_path / "run").state_dict()
    assert all(torch.allclose(first[name], mine[name], atol=0.13 * float(first[name].abs().max())) for name in first)
    for form, dtype, says in (("gguf", "q4_1", "'q4_1'; there is .* q8_0, q4_0$"), ("hf", "q4_0", "'q4_0'; there is")):
        with pytest.raises(UserError, match=f"no dtype {says}"):
            export_model(tmp_path / "run", tmp_path / "no", form=form, dtype=dtype, shard="", log=lines.append)
