"""Write the records of catalog corpora: pretraining text, and tasks with labels.

Prepare each corpus in the format that firth reads: one .txt per document, or one JSON record per line.

Each function takes the files of a corpus, as `firth.corpora.download.members` yields them, and an empty directory; it returns one
line that summarizes what it wrote and what it left out. The names of the files are made here, never taken as paths.

Prepare more labeled corpora (`firth.corpora.prepare` has the rest): multiple choice, similarity, and translations.

quartz, logiqa      {"text", "options": [...], "label": index of the right option}
lee                 {"text", "other", "label": human rating of similarity, 0 to 1}
multiemo            {"en", "es", "fr", "pl": one sentence in each language, "label": sentiment toward its subject}
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from firth.types import UserError

Members = Iterable[tuple[str, BinaryIO]]


def plays(members: Members, out: Path) -> str:
    """Write Shakespeare's plays: PLAY.txt without Markdown, and speeches.jsonl in order.

    A speech is {"play", "kind" (directory in the edition: comedies, histories, ...), "speaker", "text"}; its text has the edition's line
    breaks (verse, or prose as it was set), without stage directions.
    """
    kinds: dict[str, str] = {}
    with (out / "speeches.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        count = 0
        for name, member in members:
            path = PurePosixPath(name)
            kinds[path.stem] = path.parent.name
            markdown = member.read().decode("utf-8")
            write_text(out / f"{path.stem}.txt", play_text(markdown))
            for speaker, text in speeches(markdown):
                count += 1
                file.write(line({"play": path.stem, "kind": path.parent.name, "speaker": speaker, "text": text}))
    return f"{len(kinds)} plays as .txt, {count} speeches in speeches.jsonl"


FALSE_SPEAKERS = re.compile(r"^\*\*(As long as you or I|Here stand I)\*\* *$", re.M)
"""Two lines that the edition sets in bold like speakers; they continue the previous speech."""

DIRECTION = re.compile(
    r"[_*]*\\?\[[^\]_*]*(?:\\?\][_*]*|_$)"  # _\[Aside]_, *[Reads.]*, [To ROBIN]_ (without its beginning)
    r"|(?<!\w)_(?:[^_\n]|\n(?!\n))*_"  # _Enter GHOST_, over lines but not over paragraphs
    r"|(?<!\*)\*(?!\*)(?:[^*\n]|\n(?!\n))*\*(?!\*)",  # *Enter GHOST*
    re.M,
)
"""A stage direction in any of the edition's notations."""


def play_text(markdown: str) -> str:
    """Return a play without its Markdown: speakers and directions on separate lines, no trailing blanks.

    >>> play_text("# Hamlet\\n\\n## ACT I\\n\\n_Exit_\\n\\n\\n**HAMLET**  \\n_\\\\[Aside\\\\]_  \\nTo be\\\\--  \\n")
    'Hamlet\\n\\nACT I\\n\\nExit\\n\\nHAMLET\\n[Aside]\\nTo be--\\n'
    """
    text = FALSE_SPEAKERS.sub(r"\1", markdown.replace("\r", ""))
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    lines = [part.strip() for part in plain(text).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def speeches(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield (speaker, text) in order. Text after a direction belongs to the previous speaker until another is named.

    >>> list(speeches("**GHOST**  \\nMark me.\\n\\n_Exit_\\n\\n**HAMLET**  \\n_\\\\[Aside\\\\]_  \\nI will.\\n"))
    [('GHOST', 'Mark me.'), ('HAMLET', 'I will.')]
    """
    text = FALSE_SPEAKERS.sub(r"\1", markdown.replace("\r", ""))
    for scene in re.split(r"^#+ .*$", text, flags=re.M):
        parts = re.split(r"^\*\*([^*\n]+)\*\*", scene, flags=re.M)
        for speaker, body in zip(parts[1::2], parts[2::2], strict=True):
            lines = [part.strip() for part in plain(DIRECTION.sub("", body)).split("\n")]
            spoken = "\n".join(part for part in lines if part)
            if spoken:  # some have only stage directions
                yield plain(speaker).strip(), spoken


def plain(markdown: str) -> str:
    """Return Markdown without emphasis and escapes. No play has an asterisk or an underscore of its own."""
    return re.sub(r"[*_]", "", re.sub(r"\\(.)", r"\1", markdown))


def addresses(members: Members, out: Path) -> str:
    """Write the State of the Union addresses: one .txt each, named as in the source (1790_george_washington_n)."""
    count = 0
    for name, member in members:
        write_text(out / PurePosixPath(name).name, lines_of(member.read().decode("utf-8")))
        count += 1
    return f"{count} addresses as .txt"


def chapters(members: Members, out: Path) -> str:
    """Write Moby-Dick: one .txt per chapter, so that whole chapters can be held out."""
    count = 0
    for _, member in members:
        text = member.read().decode("utf-8").replace("\r", "")
        starts = [m.start() for m in re.finditer(r"^(?:CHAPTER \d+\.|Epilogue\b)", text, re.M)]
        if text[: starts[0]].strip():
            starts.insert(0, 0)
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            write_text(out / f"chapter-{count + 1:03d}.txt", lines_of(text[start:end]))
            count += 1
    return f"{count} chapters as .txt"


def brown(members: Members, out: Path) -> str:
    """Write the Brown corpus: DOCUMENT.txt with the detokenized text, and tagged.jsonl with the tags.

    A record of tagged.jsonl is one sentence: {"document", "tokens", "tags"}, with the corpus's own tags.
    """
    documents = sentences = tokens = 0
    with (out / "tagged.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for name, member in members:
            document = PurePosixPath(name).name
            paragraphs: list[str] = []
            for paragraph in re.split(r"\n\s*\n", member.read().decode("ascii")):
                texts = []
                for row in paragraph.split("\n"):
                    pairs = [word.rpartition("/") for word in row.split()]
                    if not pairs:
                        continue
                    words, tags = [w for w, _, _ in pairs], [t for _, _, t in pairs]
                    file.write(line({"document": document, "tokens": words, "tags": tags}))
                    texts.append(sentence(words))
                    sentences += 1
                    tokens += len(words)
                if texts:
                    paragraphs.append(" ".join(texts))
            write_text(out / f"{document}.txt", "\n\n".join(paragraphs) + "\n")
            documents += 1
    return f"{documents} documents as .txt, {sentences} sentences ({tokens} tokens) in tagged.jsonl"


def sentence(words: list[str]) -> str:
    """Join tokens of the Brown corpus to a line of text. It doubles the marks ! ? ; : at the end of a sentence; one is kept.

    >>> sentence(["``", "Who's", "'", "there", "'", "?", "?", "''", "replied", "Ivan", "Jr.", "(", "softly", ")", "."])
    '"Who\\'s \\'there\\'?" replied Ivan Jr. (softly).'
    """
    out, joined, quoted = "", True, False
    for before, word in zip(["", *words], words, strict=False):
        if (word in "!?;:" and before == word) or (word == "." and before.endswith(".")):
            continue
        closes = word in CLOSING or (word == "'" and quoted)
        out += ("" if joined or closes else " ") + {"``": '"', "''": '"'}.get(word, word)
        joined = word in OPENING or (word == "'" and not quoted)
        quoted ^= word == "'"
    return out


OPENING = ("``", "(", "[")
CLOSING = ("''", ")", "]", ".", ",", ";", ":", "!", "?")


def glosses(members: Members, out: Path) -> str:
    """Write WordNet: wordnet.jsonl with one {"text": "able: having the necessary means ..."} per sense."""
    count = 0
    with (out / "wordnet.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _, member in members:
            for row in member.read().decode("utf-8").split("\n"):
                data, bar, gloss = row.partition(" | ")
                if not bar or row.startswith(" "):  # the license is indented
                    continue
                fields = data.split(" ")
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                names = ", ".join(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in words)
                file.write(line({"text": f"{names}: {gloss.strip()}"}))
                count += 1
    return f"{count} glosses in wordnet.jsonl"


def sentiment(members: Members, out: Path) -> str:
    """Write movie reviews: sentiment.jsonl {"text", "label": positive or negative, "score"}.

    The score is the mean of some 20 ratings from -4 to 4, the label its sign; reviews with a score of 0 are left out.
    """
    counts: Counter[str] = Counter()
    with (out / "sentiment.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _, member in members:  # one archive within the archive
            with tarfile.open(fileobj=member, mode="r:gz") as inner:
                found = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                assert found is not None  # the archive is pinned by its hash, and the file is in it
                text = found.read().decode("utf-8")
            for row in text.splitlines():
                _, mean, snippet = row.split("\t")
                score = float(mean)
                label = "positive" if score > 0 else "negative" if score < 0 else "tie"
                counts[label] += 1
                if score:
                    file.write(line({"text": snippet.strip(), "label": label, "score": score}))
    kept = counts["positive"] + counts["negative"]
    return (
        f"{kept} records in sentiment.jsonl ({counts['positive']} positive, {counts['negative']} negative; "
        f"{counts['tie']} ties left out)"
    )


def vader_lexicon(members: Members, out: Path) -> str:
    """Write the words and emoticons of VADER: lexicon.jsonl {"text", "score"}, the mean of ten ratings from -4 to 4."""
    count = 0
    with (out / "lexicon.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _, member in members:
            for row in member.read().decode("utf-8").splitlines():
                if row.strip():
                    word, mean, _ = row.split("\t", 2)
                    file.write(line({"text": word, "score": float(mean)}))
                    count += 1
    return f"{count} words in lexicon.jsonl"


def sarcasm(members: Members, out: Path) -> str:
    """Write headlines: sarcasm.jsonl {"text", "label": sarcastic or serious}."""
    counts: Counter[str] = Counter()
    with (out / "sarcasm.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for record in records(members):
            label = {"1": "sarcastic", "0": "serious"}[record["ideal"]]
            counts[label] += 1
            file.write(line({"text": record["input"][-1]["content"], "label": label}))
    return f"{counts.total()} headlines in sarcasm.jsonl ({counts['sarcastic']} sarcastic)"


def vitaminc(members: Members, out: Path) -> str:
    """Write fact verification: vitaminc.jsonl {"evidence", "claim", "label": True, False or Neither, "page"}.

    Claims come in pairs with almost the same evidence: hold out whole pages, not records.
    """
    counts: Counter[str] = Counter()
    pages = set()
    with (out / "vitaminc.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _, member in members:
            for example in json.load(member)["examples"]:
                evidence, _, claim = example["input"].rpartition("\nClaim: ")
                label = max(example["target_scores"], key=example["target_scores"].__getitem__)
                page = evidence.partition(": ")[0]
                counts[label] += 1
                pages.add(page)
                file.write(line({"evidence": evidence, "claim": claim, "label": label, "page": page}))
    summary = ", ".join(f"{n} {label}" for label, n in counts.most_common())
    return f"{counts.total()} records of {len(pages)} pages in vitaminc.jsonl ({summary})"


def squad(members: Members, out: Path) -> str:
    """Write extractive question answering: train.jsonl (four new domains) and test.jsonl (the development set of SQuAD 1.1).

    A record is {"context", "question", "answers": [{"text", "start"}], "id", "domain"}; start counts characters. Answers that the
    context does not have at the stated position are left out, and questions without any other.
    """
    counts: Counter[str] = Counter()
    with (
        (out / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train,
        (out / "test.jsonl").open("w", encoding="utf-8", newline="\n") as test,
    ):
        for name, member in members:
            domain = PurePosixPath(name).name.partition("_v1")[0]
            split, file = ("test", test) if domain == "squaddev" else ("train", train)
            paragraphs = [p for article in json.load(member)["data"] for p in article["paragraphs"]]
            for paragraph, question in ((p, q) for p in paragraphs for q in p["qas"]):
                context = paragraph["context"]
                given = [{"text": a["text"], "start": a["answer_start"]} for a in question["answers"]]
                answers = [a for a in given if a["text"] and context.startswith(a["text"], a["start"])]
                counts["answers"] += len(given) - len(answers)
                if not answers:
                    counts["questions"] += 1
                    continue
                counts[split] += 1
                record = {
                    "context": context,
                    "question": question["question"],
                    "answers": answers,
                    "id": question["id"],
                }
                file.write(line(record | {"domain": domain}))
    return (
        f"{counts['train']} questions in train.jsonl, {counts['test']} in test.jsonl ({counts['answers']} answers not "
        f"where the source puts them left out, and {counts['questions']} questions that had no other)"
    )


ENTITY = re.compile(r"\s*(.+?) - (PERSON|ORGANIZATION|LOCATION)\s*(?:,|$)")


def entities(members: Members, out: Path) -> str:
    """Write named entities in financial contracts: ner_finance.jsonl {"tokens", "tags"}, tags in BIO (B-PERSON, I-PERSON, ..., O).

    The source lists the names of a sentence in order; they are searched for one after another. Sentences with a missing name are left
    out.
    """
    kept = lost = names = 0
    with (out / "ner_finance.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for record in records(members):
            tokens = words(record["input"][-1]["content"])
            ideal = record["ideal"].strip()
            listed = ENTITY.findall(ideal[1:-1]) if ideal.startswith("[") else []
            tags = bio(tokens, [(words(name), kind) for name, kind in listed])
            if tags is None or (ideal.startswith("[") and not listed):
                lost += 1
                continue
            kept += 1
            names += len(listed)
            file.write(line({"tokens": tokens, "tags": tags}))
    return f"{kept} sentences with {names} names in ner_finance.jsonl ({lost} that do not align left out)"


def words(text: str) -> list[str]:
    """Split a text into runs of letters and digits and single other characters."""
    return re.findall(r"\w+|[^\w\s]", text)


def bio(tokens: list[str], found: list[tuple[list[str], str]]) -> list[str] | None:
    """Return the tags of names that are listed in order; None if one is missing.

    >>> bio(["Bank", "of", "Ohio", "lends"], [(["Bank", "of", "Ohio"], "ORGANIZATION")])
    ['B-ORGANIZATION', 'I-ORGANIZATION', 'I-ORGANIZATION', 'O']
    """
    tags, at = ["O"] * len(tokens), 0
    for name, kind in found:
        while at < len(tokens) and tokens[at : at + len(name)] != name:
            at += 1
        if at == len(tokens):
            return None
        tags[at : at + len(name)] = [f"B-{kind}"] + [f"I-{kind}"] * (len(name) - 1)
        at += len(name)
    return tags


def instructions(members: Members, out: Path) -> str:
    """Write 61 tasks with definitions: TASK.jsonl {"task", "definition", "input", "outputs": all correct ones}."""
    count = tasks = 0
    for _, member in members:
        task = json.load(member)
        name = re.sub(r"[^\w-]", "-", task["name"])
        with (out / f"{name}.jsonl").open("x", encoding="utf-8", newline="\n") as file:
            for example in task["examples"]:
                record = {"task": name, "definition": task["task_prefix"].strip(), "input": example["input"]}
                file.write(line(record | {"outputs": example["target"]}))
                count += 1
        tasks += 1
    return f"{count} records of {tasks} tasks, one .jsonl each"


LARGEST_TASK = 10_000_000
"""Bytes of the largest task.json that is unpacked: larger ones are images in letters, or data of many thousand examples."""


def bigbench(members: Members, out: Path) -> str:
    """Write NAME/task.json of each task, without the large ones and those that have corpora of their own."""
    kept = lost = 0
    for name, member in members:
        path = PurePosixPath(name.partition("/benchmark_tasks/")[2])
        text = member.read(LARGEST_TASK + 1)
        if len(text) > LARGEST_TASK or path.parts[0] in ("natural_instructions", "multiemo"):
            lost += 1
            continue
        place = out / path
        if not place.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{name}: this path is outside of the cache, so the package is not unpacked")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)
        kept += 1
    return f"{kept} tasks, NAME/task.json each ({lost} large ones, and those of other corpora, left out)"


MMLU = re.compile(
    r"(.*)\n\(A\) (.*?)\s+\(B\) (.*?)\s+\(C\) (.*?)\s+\(D\) (.*?)\s*\nA: Let's think step by step\. "
    r"(.*?)(?:The answer is \(([A-D])\)\.?)\s*",
    re.S,
)


def mmlu(members: Members, out: Path) -> str:
    """Write mmlu.jsonl: {"question", "choices": four, "answer": index, "subject", "rationale"}; questions of another form are left out."""
    kept = lost = 0
    with (out / "mmlu.jsonl").open("x", encoding="utf-8", newline="\n") as file:
        for _, member in members:
            for subject, prompt in json.load(member).items():
                for block in re.split(r"\n\nQ: |^Q: ", prompt)[1:]:
                    found = MMLU.fullmatch(block)
                    if not found or re.search(r"\(E\) ", found[5]):
                        lost += 1
                        continue
                    question, *choices, rationale, answer = found.groups()
                    record = {"question": question.strip(), "choices": choices, "answer": "ABCD".index(answer)}
                    file.write(line(record | {"subject": subject, "rationale": rationale.strip()}))
                    kept += 1
    return f"{kept} questions in mmlu.jsonl ({lost} with five choices left out)"


def model(members: Members, out: Path) -> str:
    """Write the files of a model, without the directory of the package."""
    kept = []
    for name, member in members:
        path = PurePosixPath(*PurePosixPath(name).parts[1:]) if "/model/" not in name else name.partition("/model/")[2]
        place = out / path
        if not place.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{name}: this path is outside of the cache, so the package is not unpacked")
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        kept.append(str(path))
    return f"a model in {len(kept)} files ({', '.join(sorted(kept)[:6])}, ...)" if len(kept) > 6 else ", ".join(kept)


def topics(members: Members, out: Path) -> str:
    """Write the topics of Python's own help, one .txt each: available without a network."""
    from pydoc_data.topics import topics as found

    for _ in members:  # there are none: nothing is fetched
        raise ValueError("pydoc has no archive")
    for name, text in sorted(found.items()):
        write_text(out / f"{re.sub(r'[^A-Za-z0-9-]+', '-', name)}.txt", text.strip() + "\n")
    return f"{len(found)} topics as .txt"


def records(members: Members) -> Iterator[dict[str, Any]]:
    """Yield the records of JSONL files, in order."""
    for _, member in members:
        for row in member.read().decode("utf-8").split("\n"):
            if row.strip():
                yield json.loads(row)


def lines_of(text: str) -> str:
    """Return the text without trailing blanks on any line, and with one newline at the end."""
    return "\n".join(part.rstrip() for part in text.replace("\r", "").split("\n")).strip() + "\n"


def line(record: dict[str, Any]) -> str:
    """Return a record as one line of JSONL."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with plain newlines on every system, so that a corpus has the same bytes everywhere."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)


LETTERS = "ABCD"
QUARTZ = re.compile(r"(.*?)\s*\n+ *A: (.*?)\n+ *B: (.*?)\s*", re.S)
LOGIQA = re.compile(
    r"\s*Passage:(.*?)Question:(.*?)\nA\.(.*?)\nB\.(.*?)\nC\.(.*?)\nD\.(.*?)\nAnswer:\s*", re.S
)  # each option has its letter twice


def quartz(members: Members, out: Path) -> str:
    """Write quartz.jsonl: two effects of a cause, one of them right (Tafjord 2019)."""

    def read(prompt: str) -> tuple[str, list[str]] | None:
        found = QUARTZ.fullmatch(prompt)
        return (found[1], [found[2], found[3]]) if found else None

    return _choices(members, out / "quartz.jsonl", read)


def logiqa(members: Members, out: Path) -> str:
    """Write logiqa.jsonl: a passage and four conclusions, one of which follows (Liu 2020)."""

    def read(prompt: str) -> tuple[str, list[str]] | None:
        found = LOGIQA.fullmatch(prompt)
        if not found:
            return None
        options = [re.sub(r"^[A-D]\.", "", option.strip()).strip() for option in found.groups()[2:]]
        return f"{found[1].strip()} {found[2].strip()}", options

    return _choices(members, out / "logiqa.jsonl", read)


def _choices(members: Members, path: Path, read: Any) -> str:
    kept = lost = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records(members):
            found = read(record["input"][-1]["content"])
            if found is None or record["ideal"] not in LETTERS[: len(found[1])]:
                lost += 1
                continue
            kept += 1
            file.write(line({"text": found[0], "options": found[1], "label": LETTERS.index(record["ideal"])}))
    return f"{kept} questions in {path.name} ({lost} of another form left out)"


def lee(members: Members, out: Path) -> str:
    """Write lee.jsonl: all pairs of fifty news texts with human similarity ratings (Lee, Pincombe & Welsh 2005)."""
    texts: list[str] = []
    similarity: list[list[float]] = []
    for name, member in members:
        rows = member.read().decode("cp1252").strip().split("\n")
        if name.endswith(".cor"):
            texts = rows
        else:
            similarity = [[float(cell) for cell in row.split("\t")] for row in rows]
    with (out / "lee.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for i, text in enumerate(texts):
            for j in range(i):
                file.write(line({"text": text, "other": texts[j], "label": similarity[j][i]}))
    return f"{len(texts) * (len(texts) - 1) // 2} pairs of {len(texts)} texts in lee.jsonl"


def multiemo(members: Members, out: Path) -> str:
    """Write multiemo.jsonl: sentences of Polish reviews and their machine translations, one field per language (Kocon 2021).

    A sentence may occur twice, in any of the languages; a split must group such duplicates.
    """
    by_language: dict[str, list[tuple[str, str]]] = {}
    for name, member in members:
        examples = json.load(member)["examples"]
        scores = [example["target_scores"] for example in examples]
        labels = [max(score, key=score.__getitem__) for score in scores]
        language = PurePosixPath(name).parent.name.rpartition("_")[2]
        by_language[language] = [
            (example["input"].strip(), label) for example, label in zip(examples, labels, strict=True)
        ]
    kept = lost = 0
    languages = sorted(by_language)
    with (out / "multiemo.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(zip(*(by_language[language] for language in languages), strict=True)):
            texts, row_labels = [text for text, _ in row], {label for _, label in row}
            if len(row_labels) > 1:
                raise UserError(
                    f"sentence {number} of multiemo has different labels in its languages: {', '.join(sorted(row_labels))}"
                )
            if not all(texts):
                lost += 1
                continue
            kept += 1
            file.write(line(dict(zip(languages, texts, strict=True)) | {"label": row_labels.pop()}))
    return f"{kept} sentences in {', '.join(languages)} in multiemo.jsonl ({lost} with an empty one left out)"
