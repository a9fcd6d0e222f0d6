"""The token store and its windows: exact, complete or absent, and small in memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.corpora import readers
from firth.corpora.input_files import ReadStats
from firth.corpora.readers import Document
from firth.data import stored_arrays, token_store
from firth.data.collate import Batches
from firth.data.source import MixtureSource, Source
from firth.data.split import min_share, place, split
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents, SegmentPairsConfig, WindowsConfig
from firth.objectives.causal_lm import CausalLM
from firth.tokenizer.train import train
from firth.types import IGNORE, Example, UserError
from tests.support.tiny_corpus import TEXTS, Counting, documents, store, tokenizer


def body(made: TokenStore, i: int) -> np.ndarray:
    return made.tokens[made.offsets[i] + 1 : made.offsets[i + 1] - 1]


def same(one: TokenStore, other: TokenStore) -> bool:
    return one.manifest["content"] == other.manifest["content"]


def test_a_store_holds_every_document_exactly(tmp_path: Path) -> None:
    made, t = store(tmp_path), tokenizer()
    assert len(made) == 30
    for i, document in enumerate(documents()):
        assert t.decode(body(made, i)) == document.text
        assert made.tokens[made.offsets[i]] == t.vocab.bos
        assert made.tokens[made.offsets[i + 1] - 1] == t.vocab.eos
        assert made.bytes[i] == len(document.text.encode())
    assert made.tokens.dtype == np.uint16
    assert not made.tokens[:].flags.writeable and not made.offsets[:].flags.writeable


def test_a_long_document_is_encoded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store(tmp_path)
    monkeypatch.setattr(token_store, "PART_CHARACTERS", 400)
    monkeypatch.setattr(token_store, "CHUNK_CHARACTERS", 700)
    (tmp_path / "parts").mkdir()
    assert same(store(tmp_path / "parts"), whole)


def _read_all(made: TokenStore) -> None:
    for stored in (made.tokens, made.offsets, made.bytes):
        np.asarray(stored)


class Stop(Exception):  # noqa: N818 - not an error
    """Simulates a power failure."""


def interrupted_documents(n: int) -> Iterator[Document]:
    for i, document in enumerate(documents()):
        if i == n:
            raise Stop
        yield document


@pytest.mark.parametrize("after", [0, 1, 17, 29])
def test_an_interrupted_build_resumes(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    whole = store(tmp_path / "whole")
    monkeypatch.setattr(token_store, "CHUNK_CHARACTERS", 500)
    with pytest.raises(Stop):
        TokenStore.build(interrupted_documents(after), tokenizer(), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    kept = (tmp_path / "store.partial" / "bytes.bin").stat().st_size // 8
    assert kept <= after
    encoded: list[str] = []
    engine = tokenizer()
    encode = engine.encode_batch
    monkeypatch.setattr(engine, "encode_batch", lambda texts: encoded.extend(texts) or encode(texts))
    assert same(store(tmp_path), whole)
    assert len("".join(encoded)) == sum(len(d.text) for d in documents()[kept:])  # the kept ones were not encoded again
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == sorted([*token_store.FILES, "manifest.json"])


@pytest.mark.parametrize("name", [*token_store.FILES, "stamps.bin"])
@pytest.mark.parametrize("damage", ["cut", "flip", "more"])
def test_a_build_resumes_from_damaged_files(
    tmp_path: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that lost power may have kept any part of any file."""
    (tmp_path / "whole").mkdir()
    whole = store(tmp_path / "whole")
    monkeypatch.setattr(token_store, "CHUNK_CHARACTERS", 500)
    with pytest.raises(Stop):
        TokenStore.build(interrupted_documents(25), tokenizer(), tmp_path / "store")
    path = tmp_path / "store.partial" / name
    raw = bytearray(path.read_bytes())
    assert len(raw) > 40
    if damage == "cut":
        raw = raw[: len(raw) // 2 + 3]
    elif damage == "flip":
        raw[len(raw) // 2] ^= 1
    else:
        raw += b"\x01" * 13
    path.write_bytes(raw)
    assert same(store(tmp_path), whole)


def test_a_build_of_other_documents_keeps_only_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        TokenStore.build(interrupted_documents(25), tokenizer(), tmp_path / "store")
    other = documents()
    other[3] = Document("changed", "other words")
    made = TokenStore.build(other, tokenizer(), tmp_path / "store")
    (tmp_path / "fresh").mkdir()
    assert same(made, TokenStore.build(other, tokenizer(), tmp_path / "fresh" / "store"))

    with pytest.raises(Stop):
        TokenStore.build(interrupted_documents(25), tokenizer(), tmp_path / "again")
    another = train(TEXTS[:5], "byte-bpe", vocab_size=400, seed=0, num_sentinels=2)
    made = TokenStore.build(documents(), another, tmp_path / "again")
    assert another.decode(body(made, 7)) == documents()[7].text


def test_a_full_disk_is_reported_and_the_build_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    whole = store(tmp_path / "whole")
    monkeypatch.setattr(token_store, "CHUNK_CHARACTERS", 500)
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.tokens.nbytes * 2 // 3, was[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written .*free disk space and start again"):
            store(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert not (tmp_path / "store").exists()
    assert same(store(tmp_path), whole)


def test_one_builder_at_a_time(tmp_path: Path) -> None:
    def twice() -> Iterator[Document]:
        yield Document("a", "text")
        TokenStore.build(documents(), tokenizer(), tmp_path / "store")

    with pytest.raises(UserError, match="another process is building"):
        TokenStore.build(twice(), tokenizer(), tmp_path / "store")


def test_invalid_stores_are_rejected(tmp_path: Path) -> None:
    made = store(tmp_path)
    another = train(TEXTS[:5], "byte-bpe", vocab_size=400, seed=0)
    with pytest.raises(UserError, match="another tokenizer"):
        TokenStore.open(tmp_path / "store", another)
    with pytest.raises(UserError, match="exists already"):
        store(tmp_path)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        TokenStore.open(tmp_path)
    with pytest.raises(UserError, match="no documents"):
        TokenStore.build([], tokenizer(), tmp_path / "none")
    (tmp_path / "store" / "tokens.bin").write_bytes(made.tokens[:-1].tobytes())
    with pytest.raises(UserError, match=r"bytes that were written: delete .*store, and the next run builds it again"):
        TokenStore.open(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(dict(made.manifest, format=99)))
    with pytest.raises(UserError, match="does not have store format 2"):
        TokenStore.open(tmp_path / "store")


def test_a_damaged_block_is_found_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit is flipped in a fifth of the blocks: windows of these are rejected, and those of intact blocks are returned."""
    monkeypatch.setattr(stored_arrays, "BLOCK_BYTES", 256)
    made = store(tmp_path)
    path = tmp_path / "store" / "tokens.bin"
    intact = Documents(WindowsConfig(max_length=16), made, tokenizer().vocab)
    known = [intact[i] for i in range(len(intact))]
    damaged = np.array(made.tokens)
    for at in range(5, len(damaged), 5 * 128):
        damaged[at : at + 128] ^= 1
    path.write_bytes(damaged.tobytes())
    windows = Documents(WindowsConfig(max_length=16), TokenStore.open(tmp_path / "store"), tokenizer().vocab)
    served = 0
    for i, right in enumerate(known):
        try:
            tokens = windows[i]["tokens"]
        except UserError:
            continue
        assert np.array_equal(tokens, right["tokens"])
        served += 1
    assert 0 < served < len(windows)
    with pytest.raises(UserError, match=r"tokens\.bin: block 0 of \d+ is damaged .*: delete "):
        np.bincount(TokenStore.open(tmp_path / "store").tokens)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "bytes.bin", "manifest.json"])
def test_every_flipped_bit_of_a_store_is_found(name: str, tmp_path: Path) -> None:
    store(tmp_path)
    path = tmp_path / "store" / name
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"delete .*store, and the next run builds it again") as error:
            _read_all(TokenStore.open(tmp_path / "store"))
        assert "\n" not in str(error.value)
    for cut in (b"", b"{", b"[]", b"3", b"\xff", whole[: len(whole) // 2]):
        path.write_bytes(cut)
        with pytest.raises(UserError, match=r"delete .*store"):
            _read_all(TokenStore.open(tmp_path / "store"))


def test_windows_label_every_token_once(tmp_path: Path) -> None:
    """Over all windows with their tail, each token but the first of each document is a label exactly once, so the store's bytes
    over that count are exact.
    """
    made = store(tmp_path)
    for length in (7, 64, 10_000):
        windows = Documents(WindowsConfig(max_length=length), made, tokenizer().vocab, held_out=True)
        rng = np.random.default_rng(0)
        labels_of = [
            CausalLM().build_example(windows[i], tokenizer().vocab, rng)["labels"] for i in range(len(windows))
        ]
        labels = np.concatenate(labels_of)
        expected = np.concatenate([made.tokens[a + 1 : b] for a, b in pairwise(made.offsets[:])])
        assert np.array_equal(labels[labels != IGNORE], expected)
        assert all(len(a) == length for a in labels_of[:-1])
    assert len(Documents(WindowsConfig(max_length=64), made, tokenizer().vocab)) == (len(made.tokens) - 1) // 64
    plain = Documents(JoinedWindows(max_length=64), made, tokenizer().vocab)
    assert np.array_equal(
        np.concatenate([plain[i]["tokens"] for i in range(len(plain))]), made.tokens[: 64 * len(plain)]
    )
    assert set(plain[0]) == {"tokens"}


class LabelsInside(WindowsConfig):
    """Windows without the token after them."""

    ahead = 0


class JoinedWindows(LabelsInside):
    """Windows whose documents attend to each other."""

    isolate = False


def test_windows_number_their_documents(tmp_path: Path) -> None:
    made = store(tmp_path)
    windows = Documents(WindowsConfig(max_length=100), made, tokenizer().vocab)
    number = np.repeat(np.arange(len(made)), np.diff(made.offsets))
    several = 0
    for i in range(len(windows)):
        own = number[i * 100 : i * 100 + 101]
        shown = windows[i].get("document_ids", np.zeros(101))
        assert np.array_equal(shown, own - own[0])
        assert ("document_ids" in windows[i]) == (own[0] != own[-1])
        several += own[0] != own[-1]
    assert several
    with pytest.raises(UserError, match="too few for one window"):
        Documents(WindowsConfig(max_length=1 << 20), made, tokenizer().vocab)


@pytest.mark.parametrize("ahead", [0, 1])
def test_windows_shift_in_later_epochs(ahead: int, tmp_path: Path) -> None:
    """The first epoch reads unshifted windows. Later ones read as many adjacent windows from an offset that depends on seed and
    epoch alone; only the last may overlap the one before it.
    """
    made = store(tmp_path)
    kind = (WindowsConfig if ahead else LabelsInside)(max_length=50)
    windows = Documents(kind, made, tokenizer().vocab)
    every = np.arange(len(windows))
    usable = len(made.tokens) - ahead
    number = np.repeat(np.arange(len(made)), np.diff(made.offsets))

    def read(seed: int, epoch: int, of: Documents = windows) -> list[Example]:
        return of.in_epochs(seed, np.full_like(every, epoch), every)

    def offset(seed: int, epoch: int) -> int:
        """Found in the tokens, and checked in every window."""
        examples = read(seed, epoch)
        for first in range(50):
            starts = [min(first + k * 50, usable - 50) for k in every]
            if all(
                np.array_equal(x["tokens"], made.tokens[a : a + 50 + ahead])
                for x, a in zip(examples, starts, strict=True)
            ):
                break
        else:
            raise AssertionError(f"the windows of epoch {epoch} are not adjacent")
        for x, a in zip(examples, starts, strict=True):
            own = number[a : a + 50 + ahead]
            assert np.array_equal(x.get("document_ids", np.zeros(len(own))), own - own[0])
        return first

    assert offset(0, 0) == offset(1, 0) == 0
    offsets = [offset(0, epoch) for epoch in range(1, 20)]
    assert len(set(offsets)) > 10
    assert offsets == [offset(0, epoch) for epoch in range(1, 20)] != [offset(1, epoch) for epoch in range(1, 20)]
    mixed = windows.in_epochs(0, np.array([3, 0, 3]), np.array([4, 4, 1]))
    for got, known in zip(mixed, (read(0, 3)[4], windows[4], read(0, 3)[1]), strict=True):
        assert np.array_equal(got["tokens"], known["tokens"])
    tailed = Documents(kind, made, tokenizer().vocab, held_out=True)
    assert all(np.array_equal(x["tokens"], tailed[i]["tokens"]) for i, x in enumerate(read(0, 3, tailed)))


def test_batches_read_shifted_windows(tmp_path: Path) -> None:
    """Batches of any step are the same from a new `Batches`, so a run resumes exactly. Evaluation reads unshifted windows, and a
    mixture shifts those of each source by that source's epochs.
    """
    made, vocab = store(tmp_path), tokenizer().vocab
    windows = Documents(WindowsConfig(max_length=50), made, tokenizer().vocab)

    def batches(source: Source) -> Batches:
        return Batches(source, CausalLM(), vocab, batch_size=4, seed=5)

    steps = 3 * len(windows) // 4
    run = [batches(windows).batches(step)[0]["tokens"] for step in range(steps)]
    whole = batches(windows)
    assert all(torch.equal(whole.batches(step)[0]["tokens"], run[step]) for step in reversed(range(steps)))
    known = {tuple(windows[i]["tokens"][:-1].tolist()) for i in range(len(windows))}
    first = torch.cat(run[: len(windows) // 4])
    assert {tuple(row) for row in first.tolist()} <= known
    assert not {tuple(row) for row in run[-1].tolist()} & known
    measured = torch.cat([batch["tokens"] for batch in batches(windows).all_batches()])
    assert {tuple(row) for row in measured.tolist()} == known
    twins = MixtureSource([Counting(7), windows], [1, 2])
    epochs, indices = twins.order(5, np.arange(300))
    own = windows.in_epochs(6, epochs[indices >= 7], indices[indices >= 7] - 7)
    mixed = [x for x, i in zip(twins.in_epochs(5, epochs, indices), indices, strict=True) if i >= 7]
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(mixed, own, strict=True))


@pytest.mark.parametrize("with_special_tokens", [False, True])
def test_chunks_cover_every_document(tmp_path: Path, with_special_tokens: bool) -> None:
    made, vocab = store(tmp_path), tokenizer().vocab
    chunks = Documents(ChunksConfig(max_length=50, add_special_tokens=with_special_tokens), made, vocab)
    at = 0
    for i in range(len(made)):
        whole, got = body(made, i), []
        while sum(map(len, got)) < len(whole):
            tokens = chunks[at]["tokens"]
            assert 0 < len(tokens) <= 50
            if with_special_tokens:
                assert (tokens[0], tokens[-1]) == (vocab.cls, vocab.sep)
                tokens = tokens[1:-1]
            got.append(tokens)
            at += 1
        if got:
            assert np.array_equal(np.concatenate(got), whole)
            assert max(map(len, got)) - min(map(len, got)) <= 1
            assert len(got) == -(-len(whole) // (48 if with_special_tokens else 50))
    assert at == len(chunks)


def test_pairs_are_adjacent_plus_a_random_segment(tmp_path: Path) -> None:
    made = store(tmp_path)
    pairs = Documents(SegmentPairsConfig(max_length=64, whole_sentences=False), made, tokenizer().vocab)
    bodies = [body(made, i).tolist() for i in range(len(made))]
    joined = [" ".join(map(str, b)) for b in bodies]

    def holders(tokens: np.ndarray) -> set[int]:
        text = " ".join(map(str, tokens.tolist()))
        return {i for i, b in enumerate(joined) if f" {text} " in f" {b} "}

    cuts = []
    for i in range(len(pairs)):
        example = pairs[i]
        first, second, other = (example[k] for k in ("first", "second", "other"))
        assert min(map(len, (first, second, other))) >= 1
        assert len(second) == len(other)
        assert len(first) + len(second) + 3 <= 64
        assert holders(np.concatenate((first, second)))
        if len(other) > 8:  # short ones are found in many documents
            assert holders(other) - holders(np.concatenate((first, second)))
        assert all(np.array_equal(example[k], pairs[i][k]) for k in example)
        cuts.append(len(first))
    assert len(set(cuts)) > 40
    with pytest.raises(UserError, match="two documents"):
        Documents(
            SegmentPairsConfig(max_length=64, whole_sentences=False),
            TokenStore.build(documents()[5:6], tokenizer(), tmp_path / "one"),
            tokenizer().vocab,
        )


def test_a_store_without_bos(tmp_path: Path) -> None:
    """T5 has no bos: documents are text and eos, and chunks are still the bare text."""
    t = train(TEXTS[:5], "byte-bpe", vocab_size=400, seed=0)
    vocab = t.vocab
    roles = {role: i for role, i in vocab.roles.items() if role != "bos"}
    t.__dict__["vocab"] = type(vocab)(vocab.size, roles, vocab.special, vocab.sentinels, vocab.spelling)
    made = TokenStore.build(documents(), t, tmp_path / "store")
    assert not made.opened
    assert (
        t.decode(
            Documents(ChunksConfig(max_length=10_000, add_special_tokens=False), made, tokenizer().vocab)[3]["tokens"]
        )
        == [d.text for d in documents() if d.text][3]
    )


def test_held_out_documents_are_a_function_of_their_names() -> None:
    some = [Document(f"{i}.txt", "text") for i in range(5000)]
    held = {d.name for d in split(some, 0.05, held_out=True)}
    rest = {d.name for d in split(some, 0.05, held_out=False)}
    assert held | rest == {d.name for d in some}
    assert not held & rest
    assert abs(len(held) - 250) < 4 * (5000 * 0.05 * 0.95) ** 0.5
    assert {d.name for d in split(reversed(some[:100]), 0.05, held_out=True)} == {d.name for d in some[:100]} & held
    with pytest.raises(UserError, match="held-out share"):
        split(some, 1.5, held_out=True)


def test_min_share_holds_out_at_least_one_document() -> None:
    for names in (["a", "b"], [f"play {i}" for i in range(38)], [str(i) for i in range(3000)]):
        share = min_share(0.01, names)
        held = [n for n in names if place(n) < share]
        assert 1 <= len(held) < len(names)
        if sum(place(n) < 0.01 for n in names):
            assert share == 0.01


@pytest.mark.slow
def test_a_document_of_6_mb_needs_little_memory(tmp_path: Path) -> None:
    """Peak memory of the whole process, including torch and the tokenizer.

    A document costs its own text, and the tokenizer's memory is bounded: measured by hand, 50 MB on one line peak at 540 MB from
    a file and at 610 MB as one document, of which 425 MB are torch and the libraries.
    """
    text = " ".join(TEXTS)
    line = (text.replace("\n", " ") * (6_000_000 // len(text) + 1))[:6_000_000]
    (tmp_path / "long.txt").write_text(line)
    tokenizer().save(tmp_path / "tokenizer")
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    ).stdout.split()  # fmt: skip
    peak, tokens, size = map(int, output)
    assert size == len(line.encode())
    assert tokens > 1_000_000
    assert peak < 700_000_000


MEASURE = """
import sys
from pathlib import Path
from firth.data.collate import Batches
from firth.data.windows import Documents, WindowsConfig
from firth.data.token_store import TokenStore
from firth.objectives.causal_lm import CausalLM
from firth.corpora.readers import Document
from firth.tokenizer.tokenizer import Tokenizer
folder = Path(sys.argv[1])
t = Tokenizer.load(folder / "tokenizer")
one = Document("one", (folder / "long.txt").read_text())
s = TokenStore.build([one], t, folder / "store")
Batches(Documents(WindowsConfig(max_length=256), s, t.vocab), CausalLM(), t.vocab, batch_size=16, seed=0).batches(5)
# Not ru_maxrss, which starts at the parent's peak in a child.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, len(s.tokens), s.num_bytes)
"""


def test_bad_input_is_cleaned_by_the_reader(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfgood \xff\xfe day\x00 all")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "a lone \\ud800 surrogate"}\n{"text": ""}\n')
    counts = ReadStats()
    some = list(readers.documents([str(tmp_path)], counts=counts))
    made = TokenStore.build(some, tokenizer(), tmp_path / "store", stats=counts.rows)
    assert len(made) == 2
    assert made.manifest["counts"]["nul"] == 1
    assert made.manifest["counts"]["empty"] == 2
    assert "good" in tokenizer().decode(body(made, 0))
    batch = Batches(
        Documents(ChunksConfig(max_length=16, add_special_tokens=False), made, tokenizer().vocab),
        CausalLM(),
        tokenizer().vocab,
        batch_size=2,
        seed=0,
    ).batches(0)[0]
    assert batch["tokens"].shape[0] == 2


def test_a_tokenizer_without_bos_leaves_it_out_of_the_store(tmp_path: Path) -> None:
    """As in the configs of GPT-2 and SmolLM2 (add_bos_token: false): a run that starts from them reads what they read."""
    from firth.tokenizer.tokenizer import Tokenizer

    engine = tokenizer().engine
    quiet = Tokenizer(engine, bos=False)
    made = TokenStore.build([Document("1", "a b"), Document("2", "c")], quiet, tmp_path / "store")
    assert not made.opened
    assert quiet.vocab.roles["bos"] not in made.tokens[:]
    assert made.tokens[made.offsets[0] : made.offsets[1]].tolist() == [*quiet.encode("a b"), quiet.vocab.eos]
