"""Reading bad input: each documented handling, on files with that defect."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from firth.corpora import input_files, readers
from firth.corpora.input_files import ReadStats
from firth.corpora.readers import Document, documents, files, records
from firth.evaluate import prediction_inputs as inputs
from firth.types import UserError


def write(path: Path, data: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def texts(path: str | Path, **options: str) -> tuple[list[str], dict[str, int]]:
    counts = ReadStats()
    found = [d.text for d in documents([str(path)], counts=counts, **options)]
    rows = counts.rows()
    assert rows.get("documents", 0) == len(found)
    assert rows.get("bytes", 0) == sum(len(t.encode()) for t in found)
    return found, {k: n for k, n in rows.items() if k not in ("files", "documents", "bytes")}


# --- the content of a text file ---------------------------------------------------------------------------------------

GOOD = ["a", " ", "\n", "\n\n", "é", "€", "🙂", "\ufffd"]
BAD = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x99", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88", b"\x00"]
PARTS = st.sampled_from([g.encode() for g in GOOD] + BAD)


@given(
    st.lists(PARTS, max_size=30).map(b"".join), st.sampled_from([1, 2, 3, 5, 8]), st.sampled_from(list(readers.SPLITS))
)
def test_block_boundaries_change_nothing(tmp_path_factory, data, block, split):
    """Read in blocks of 1 to 8 bytes, a file gives the text and counts of Python's whole-file decoder."""
    path = write(tmp_path_factory.mktemp("x") / "a.txt", data)
    counts = ReadStats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "MAX_RECORD_BYTES", block)
        pieces = list(readers._chunks(Path(path), split, counts))
    wanted = data.decode("utf-8", "replace")
    assert "".join(pieces) == wanted.replace("\0", "")
    assert counts.bad_utf8 == wanted.count("\ufffd") - data.count("\ufffd".encode())
    assert counts.nul == data.count(b"\0")
    assert max(map(len, pieces)) <= block + 1  # one more where "\n\n" begins on the border


def test_bom_and_windows_line_breaks_across_boundaries(tmp_path, monkeypatch):
    data = b"\xef\xbb\xbfone\r\ntwo\rthree\r\n" * 3
    path = write(tmp_path / "a.txt", data)
    wanted = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    for block in (1, 2, 3, 4, 7, 1000):
        monkeypatch.setattr(readers, "MAX_RECORD_BYTES", block)
        assert "".join(readers._chunks(Path(path), "file", ReadStats())) == wanted


def test_repairs_are_counted(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"good\0 \xff day\n")) == (["good \ufffd day\n"], {"bad_utf8": 1, "nul": 1})
    assert texts(write(tmp_path / "b.txt", b"")) == ([], {"empty": 1})
    assert texts(write(tmp_path / "c.txt", b"\xef\xbb\xbf \n\t\n")) == ([], {"empty": 1})
    assert texts(write(tmp_path / "d.txt.gz", b"")) == ([], {"empty": 1})
    assert texts(write(tmp_path / "e.jsonl", b"")) == ([], {"empty": 1})
    rows = b'{"text": "a\\u0000b"}\n{"text": "x\\ud800y"}\n\n{"text": " "}\n{"text": null}\n{"text": "\xff"}\n'
    assert texts(write(tmp_path / "f.jsonl", rows)) == (
        ["ab", "x\ufffdy", "\ufffd"], {"bad_utf8": 2, "nul": 1, "empty": 2},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf16_is_rejected(tmp_path, name):
    path = write(tmp_path / name, '{"text": "hello"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match=rf"{name}: this is UTF-16"):
        list(documents([path]))


# --- splits and cuts --------------------------------------------------------------------------------------------------


def test_splits(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\n \nthree\n\n\nfour\n")
    assert texts(path)[0] == ["one\ntwo\n \nthree\n\n\nfour\n"]
    assert texts(path, split="blank")[0] == ["one\ntwo", "three", "four\n"]
    assert texts(path, split="line")[0] == ["one", "two", "three", "four"]
    with pytest.raises(UserError, match="use one of file, blank, line"):
        list(documents([path], split="lines"))


@pytest.mark.parametrize(("split", "end"), [("line", "\n"), ("blank", "\n\n")])
def test_a_document_is_not_cut_at_a_block_boundary(tmp_path, monkeypatch, split, end):
    """The boundary of a block is within a line, and the line must come out whole."""
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 64)
    wanted = [f"line number {i} with blanks in it" for i in range(100)]
    path = write(tmp_path / "a.txt", end.join(wanted) + end)
    found, notes = texts(path, split=split)
    assert [t.rstrip("\n") for t in found] == wanted
    assert notes == {}


def test_a_long_text_is_split_at_paragraphs_first(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 64)
    paragraph = "some words that go on\nand on"
    path = write(tmp_path / "a.txt", "\n\n".join([paragraph] * 20))
    found, notes = texts(path)
    assert all(t.strip("\n").endswith("and on") and len(t) <= 65 for t in found)
    assert notes == {"cut": len(found) - 1}
    assert "".join(found) == "\n\n".join([paragraph] * 20)
    names = [d.name for d in documents([path])]
    assert names[:3] == ["a.txt", "a.txt:2", "a.txt:3"] and len(set(names)) == len(names)


# --- records ----------------------------------------------------------------------------------------------------------


def test_too_long_records_are_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 100)
    lines = [json.dumps({"text": "x" * n}) for n in (5, 300, 7, 88, 89, 1000, 3)]  # 88: a line of exactly 100 bytes
    for end in ("\n", ""):
        found, notes = texts(write(tmp_path / "a.jsonl", "\n".join(lines) + end))
        assert [len(t) for t in found] == [5, 7, 88, 3]
        assert notes == {"too_long": 3}
    found, notes = texts(write(tmp_path / "b.jsonl", lines[0] + "\n" + lines[1]))  # the last line, without an end
    assert ([len(t) for t in found], notes) == ([5], {"too_long": 1})
    table = pyarrow.table({"text": ["x" * n for n in (5, 300, 7)], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    found, notes = texts(tmp_path / "c.parquet")
    assert ([len(t) for t in found], notes) == ([5, 7], {"too_long": 1})
    assert [place for place, _ in records([str(tmp_path / "c.parquet")])] == [
        f"{tmp_path / 'c.parquet'}:{n}" for n in (1, 3)
    ]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"text": "a"', "is not JSON"),
        ("[1, 2]", r"a record is a JSON object with named fields, and this is '\[1, 2\]'"),
        ('"text"', "a record is a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"txet": "a"}', "there is no field 'text'; did you mean 'txet'?"),
        ('{"id": 1, "body": "a"}', "there is no field 'text'; it has id, body"),
        ("{}", "it has none"),
        ('{"text": 5}', "the field 'text' holds int, and text is wanted"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path, line, wrong):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=f"^{re.escape(path)}:3: .*{wrong}"):
        list(documents([path]))


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", "", None, "two\0"], "name": ["n1", None, None, None], "x": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, path)
    assert texts(path) == (["one", "two"], {"empty": 2, "nul": 1})
    assert [d.name for d in documents([str(path)])] == ["n1", "a.parquet:4"]
    assert next(r for _, r in records([str(path)])) == {"text": "one", "name": "n1", "x": 1}
    with pytest.raises(UserError, match=r"a.parquet:1: there is no field 'txt'; did you mean 'text'"):
        list(documents([str(path)], field="txt"))
    write(tmp_path / "b.parquet", path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"b\.parquet: this is not a Parquet file"):
        list(documents([str(tmp_path / "b.parquet")]))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert texts(path) == ([], {"empty": 1})


def test_plain_text_where_records_are_wanted(tmp_path):
    with pytest.raises(UserError, match="records are wanted here"):
        list(records([write(tmp_path / "a.txt", "hello")]))


# --- archives ---------------------------------------------------------------------------------------------------------

PACK = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.JSONL"])
def test_compressed_files_are_read_and_damage_is_named(tmp_path, kind, name):
    noise = random.Random(0).randbytes(300_000).hex()
    plain = f"{noise}\n" if name.endswith("txt") else json.dumps({"text": noise}) + "\n"
    packed = PACK[kind](plain.encode())
    found, _ = texts(write(tmp_path / (name + kind), packed))
    assert found == [plain if name.endswith("txt") else noise]
    # Two frames one behind the other are one file.
    twice, _ = texts(write(tmp_path / (name + kind.upper()), packed + PACK[kind](plain.encode())))
    assert "".join(twice) == "".join(found) * 2
    for damaged in (packed[:-1], packed[: len(packed) // 2], packed[:3], packed[:9000] + b"\0" * 64 + packed[9064:]):
        path = write(tmp_path / (name + kind), damaged)
        with pytest.raises(UserError, match=f"^{re.escape(path)}: the archive is damaged or cut off: "):
            list(documents([path]))
    path = write(tmp_path / (name + kind), plain)
    with pytest.raises(UserError, match="damaged or cut off"):
        list(documents([path]))


# --- what is named ----------------------------------------------------------------------------------------------------


PACKED_BYTES = {
    "gzip's bytes: unpack it, or let its name end in {}.gz": gzip.compress(b'{"text": "a"}'),
    "Zstandard's bytes: unpack it, or let its name end in {}.zst": zstandard.compress(b'{"text": "a"}'),
    "xz's bytes: unpack it": lzma.compress(b'{"text": "a"}'),
    "bzip2's bytes: unpack it": bz2.compress(b'{"text": "a"}'),
    "a zip archive (.zip, .xlsx, .docx, .epub): unpack it, or save it as plain text": b"PK\x03\x04" + bytes(40),
    "a Parquet file: let its name end in .parquet": b"PAR1" + bytes(40),
}


@pytest.mark.parametrize("end", [".txt", ".csv", ".tsv", ".jsonl", ".json", ".conll"])
@pytest.mark.parametrize("what", list(PACKED_BYTES), ids=lambda what: what.partition(":")[0])
def test_compressed_bytes_under_another_name_are_rejected(tmp_path, what, end):
    path = tmp_path / f"a{end}"
    path.write_bytes(PACKED_BYTES[what])
    with pytest.raises(UserError) as caught:
        list(documents([str(path)]) if end == ".txt" else records([str(path)]))
    assert str(caught.value) == f"{path}: this file holds {what.format(end)}"
    with pytest.raises(UserError) as caught:  # as `predict` reads them, which guesses what standard input holds
        inputs.read_inputs("-" if end == ".txt" else str(path), path.open("rb"), "auto", LINES_OR_RECORDS, tmp_path)
    suffix, name = ("", "standard input") if end == ".txt" else (end, str(path))
    assert str(caught.value) == f"{name}: this file holds {what.format(suffix)}"


LINES_OR_RECORDS = inputs.InputSchema("text", lambda line: {"text": line}, lambda record: [record.get("text")])


def test_bytes_compressed_twice_are_rejected(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(gzip.compress(b"text,label\na,b\n")))
    with pytest.raises(UserError) as caught:
        list(records([str(path)]))
    assert str(caught.value) == f"{path}: the content of this archive is compressed again, as gzip's bytes: unpack it"


def test_names_are_unique_and_independent_of_location(tmp_path):
    for place in ("here", "far/away"):
        for name in ("one/a.txt", "one/sub/a.txt", "two/a.txt", "two/a.txt~2"):
            write(tmp_path / place / name, name)
    seen = []
    for place in ("here", "far/away"):
        root = tmp_path / place
        seen.append(list(files([str(root / "one"), str(root / "two"), str(root / "one/sub/a.txt")]).values()))
    assert seen[0] == seen[1] == ["a.txt", "sub/a.txt", "a.txt~2"]
    assert list(files([str(tmp_path / "here/*/a.txt")]).values()) == ["one/a.txt", "two/a.txt"]
    assert list(files([str(tmp_path / "here/t*")]).values()) == ["two/a.txt"]
    assert next(iter(files([str(tmp_path / "**/a.txt")]).values())) == "far/away/one/a.txt"


def test_a_file_found_twice_is_read_once(tmp_path, monkeypatch):
    path = Path(write(tmp_path / "a.txt", "hello"))
    (tmp_path / "b.txt").symlink_to(path)
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = ["a.txt", "./a.txt", str(path), "b.txt", "*.txt", ".", str(tmp_path / "down" / ".." / "a.txt")]
    assert [d.text for d in documents(given)] == ["hello"]


def test_hidden_files_are_skipped_and_files_are_sorted(tmp_path):
    for name in ("b.txt", "a/z.md", ".hidden.txt", ".git/x.txt", "c.png", "README", "a.jsonl"):
        write(tmp_path / "d" / name, '{"text": "x"}' if name.endswith("l") else "x")
    names = ["README", "a/z.md", "a.jsonl", "b.txt"]
    assert sorted(files([str(tmp_path / "d")]).values()) == sorted(names)
    assert [d.name for d in documents([str(tmp_path / "d")])] == ["README", "a/z.md", "a.jsonl:1", "b.txt"]


def test_a_record_may_name_its_document(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x", "name": "hamlet"}\n{"text": "y"}\n{"text": "z", "name": 7}\n')
    assert [*documents([path])] == [
        Document("hamlet", "x", True), Document("a.jsonl:2", "y"), Document("7", "z", True),
    ]  # fmt: skip


def test_unreadable_paths_are_named(tmp_path):
    write(tmp_path / "d" / "a.png", b"x")
    os.mkfifo(tmp_path / "pipe")
    for given_, wrong in (
        ("d", "there is no text in this directory; firth reads"),
        ("d/a.png", "files of this kind are not read; firth reads"),
        ("d/*", "what matches this pattern is not read"),
        ("nowhere", "there is no such file or directory, and it matches none as a pattern"),
        ("x*", "there is no such file"),
        ("pipe", "this is neither a file nor a directory"),
    ):
        with pytest.raises(UserError, match=wrong) as error:
            files([str(tmp_path / given_)])
        assert str(error.value).startswith(str(tmp_path / given_)) and "\n" not in str(error.value)


def test_missing_permissions_are_named(tmp_path, monkeypatch):
    """Root may read everything, so the error is simulated."""
    path = write(tmp_path / "a.txt", "x")

    def refuse(path: Path) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(input_files, "open_bytes", refuse)
    with pytest.raises(UserError, match=r"a\.txt: this file cannot be read: Permission denied"):
        list(documents([path]))
    monkeypatch.undo()
    monkeypatch.setattr(os, "scandir", lambda top: (_ for _ in ()).throw(PermissionError(13, "Permission denied", top)))
    with pytest.raises(UserError, match="this directory cannot be read: Permission denied"):
        list(documents([str(tmp_path)]))


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from Linux's /proc"
)
def test_fifty_megabytes_in_one_line_take_little_memory(tmp_path):
    """Measured in a separate process: far under 1 GB, most of which is Python and its libraries."""
    row = b'{"text": "' + b"word " * 10_000_000 + b'"}\n'
    write(tmp_path / "a.txt", b"word " * 10_000_000)
    write(tmp_path / "b.jsonl", row + b'{"text": "short"}\n')
    write(tmp_path / "c.jsonl.zst", zstandard.ZstdCompressor().compress(b" " * 500_000_000))
    table = pyarrow.table({"text": ["word " * 10_000_000, "short"]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    code = (
        "import re, sys\n"
        "from firth.corpora.input_files import ReadStats\n"
        "from firth.corpora.readers import documents\n"
        "counts = ReadStats()\n"
        "lengths = [len(d.text) for d in documents([sys.argv[1]], counts=counts)]\n"
        # Not getrusage: its peak is at least that of the process which started this one.
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "print(sum(lengths), max(lengths), counts.too_long, peak)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    total, longest, too_long, peak = map(int, done.stdout.split())
    assert (total, too_long) == (50_000_000 + 5 + 5, 3)
    assert longest <= readers.MAX_RECORD_BYTES + 1
    assert peak < 500, f"{peak} MB"
