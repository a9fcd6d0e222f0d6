"""Make minimal pairs from a part-of-speech tagged corpus: an attested sentence, and one with a single ungrammatical word.

    firth fetch minimal_pairs
    firth evaluate RUN --task minimal_pairs --data CACHE/minimal_pairs/pairs.jsonl

BLiMP (Warstadt 2020) fills templates; here the good sentence is one of the corpus, and rules over its tags (those of the Brown
corpus) find a word whose form is determined by another one:

    subject_verb_pronoun      He goes home.                          He go home.
    subject_verb_noun         The old man is here.                   The old man are here.
    subject_verb_attractor    The keys to the cabinet are here.      The keys to the cabinet is here.
    determiner_noun           They read these books.                 They read this books.   or   these book
    determiner_noun_adj       They read these old books.             They read this old books.
    reflexive_number          They saw themselves.                   They saw himself.
    reflexive_gender          He saw himself.                        He saw herself.
    verb_form                 She had walked. She must walk.         She had walk. She must walked.

The wrong form is one of the corpus too: inflections are pairs of forms that a spelling rule relates and that the corpus has
with the right tags (`Lexicon`). Both numbers are balanced in each phenomenon, and so are pairs whose right form is the more
frequent one in the corpus with those whose wrong form is: word frequency alone decides half of the pairs (`balanced`).

>>> tags = [w.rpartition("/") for w in "They/ppss saw/vbd themselves/ppls in/in the/at mirror/nn ./.".split()]
>>> sentence = Sentence("ca01", 1, tuple(w for w, _, _ in tags), tuple(t for _, _, t in tags))
>>> [(c.phenomenon, c.good, c.bad) for c in reflexives(sentence, Lexicon([sentence]), np.random.default_rng(0))]
[('reflexive_number', 'themselves', 'himself')]
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from firth.corpora import prepare

MIN_COUNT = 2
"""Least occurrences in the corpus of a form with its tag."""
MIN_WORDS, MAX_WORDS = 4, 28
FORMULAS = frozenset({"Af", "Aj"})
"""Words that stand for a formula in the Brown corpus."""
PAIRS_PER_PHENOMENON = 200
SEED = 0

Number = Literal["singular", "plural", ""]


@dataclass(frozen=True)
class Sentence:
    """A tagged sentence.

    Args:
        document: Name of its document.
        number: Its number in the corpus, from 1.
        words: The words.
        tags: Their tags, as in the corpus.
    """

    document: str
    number: int
    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class PairCandidate:
    """A minimal pair before balancing.

    Args:
        sentence: The good sentence.
        phenomenon: Name of the phenomenon.
        at: Index of the word that is replaced.
        bad: The wrong form.
        form: Class of the right form, which is balanced: "singular", "plural", "masculine", "participle", ...
    """

    sentence: Sentence
    phenomenon: str
    at: int
    bad: str
    form: str

    @property
    def good(self) -> str:
        """The right form."""
        return self.sentence.words[self.at]


OPPOSITE = {
    "singular": "plural", "plural": "singular", "masculine": "feminine", "feminine": "masculine",
    "participle": "base", "base": "participle",
}  # fmt: skip

# --------------------------------------------------------------------------- words and their forms

AUXILIARIES = {
    "is": "are", "was": "were", "has": "have", "does": "do",
    "isn't": "aren't", "wasn't": "weren't", "hasn't": "haven't", "doesn't": "don't",
}  # fmt: skip
"""Singular form -> plural form, of the verbs whose forms no spelling rule relates."""
BE = frozenset({"is", "are", "was", "were", "isn't", "aren't", "wasn't", "weren't"})
DETERMINERS = {"this": "these", "that": "those"}
SINGULAR_VERBS = frozenset({"vbz", "bez", "bedz", "hvz", "doz", "bez*", "bedz*", "hvz*", "doz*"})
PLURAL_VERBS = frozenset({"vb", "ber", "bed", "hv", "do", "ber*", "bed*", "hv*", "do*"})
KINDS = frozenset({"kind", "kinds", "sort", "sorts", "type", "types"})
"""Nouns that many speakers use with the other number of the determiner."""


def base(tag: str) -> str:
    """Return a tag without its suffix for titles: nn-tl -> nn."""
    return tag.partition("-")[0] or tag


def s_form(word: str) -> str:
    """Return the plural of a noun or the third person of a verb, by its spelling.

    >>> [s_form(word) for word in ("book", "city", "boy", "watch", "go", "wife", "woman")]
    ['books', 'cities', 'boys', 'watches', 'goes', 'wives', 'women']
    """
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "z", "ch", "sh")) or (word.endswith("o") and word[-2:-1] not in "aeiou"):
        return word + "es"
    if word.endswith("fe"):
        return word[:-2] + "ves"
    return word[:-3] + "men" if word.endswith("man") else word + "s"


def ed_form(word: str) -> str:
    """Return the regular participle of a verb, by its spelling; short verbs that double a letter are left to the corpus.

    >>> [ed_form(word) for word in ("walk", "try", "love")]
    ['walked', 'tried', 'loved']
    """
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ied"
    return word + ("d" if word.endswith("e") else "ed")


class Lexicon:
    """Forms of a tagged corpus.

    Attributes:
        frequency: Occurrences of each lower-case word.
        plurals: Singular noun -> plural.
        singulars: Plural noun -> singular.
        plural_verbs: Third person singular -> plural verb; auxiliaries too.
        singular_verbs: The reverse.
        participles: Base form -> regular participle.
        bases: The reverse.
        collectives: Singular nouns that the corpus has as the subject of a plural verb, with or without a phrase between them.
    """

    def __init__(self, sentences: Iterable[Sentence]) -> None:
        tagged: dict[str, Counter[str]] = defaultdict(Counter)
        self.collectives: set[str] = set()
        self.frequency: Counter[str] = Counter()
        for sentence in sentences:
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                tagged[word.lower()][base(tag)] += 1
            for heads, verb in subjects(sentence):
                if base(sentence.tags[verb]) in PLURAL_VERBS and base(sentence.tags[heads[0]]) == "nn":
                    self.collectives.add(sentence.words[heads[0]].lower())
        self.frequency.update({word: counts.total() for word, counts in tagged.items()})

        def forms(tag: str, unlike: tuple[str, ...]) -> list[str]:
            """Return the words that the corpus has with a tag, and not with others that would make a form ambiguous."""
            return [
                word
                for word, counts in tagged.items()
                if counts[tag] >= MIN_COUNT and word.isalpha() and not any(counts[other] for other in unlike)
            ]

        plurals, thirds = set(forms("nns", ("nn",))), set(forms("vbz", ()))
        self.plurals = {
            word: s_form(word)
            for word in forms("nn", ("nns",))
            if s_form(word) in plurals and word not in KINDS and not word.endswith("s")
        }
        plain = forms("vb", ("vbd", "vbz"))  # "put" is its own past, and right in both numbers
        third_persons = {s_form(word): word for word in plain if s_form(word) in thirds}
        self.plural_verbs = AUXILIARIES | third_persons
        participles = set(forms("vbn", ()))
        # A participle replaced by "work" would be a noun: they have work.
        bare = forms("vb", ("vbd", "vbn", "nn", "nns", "jj", "rb", "np", "ap", "in"))
        self.participles = {word: ed_form(word) for word in bare if ed_form(word) in participles}
        self.singulars = _reverse(self.plurals)
        self.singular_verbs = _reverse(self.plural_verbs)
        self.bases = _reverse(self.participles)

    def number_of_noun(self, word: str) -> Number:
        """Return the number of a noun whose two forms are known."""
        return "singular" if word in self.plurals else "plural" if word in self.singulars else ""


def _reverse(forms: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in forms.items()}


# --------------------------------------------------------------------------- rules

BEFORE_NOUN = frozenset({"jj", "jjr", "jjt", "jjs", "ap", "od", "vbn", "vbg", "nn", "np"})
DETERMINER_TAGS = frozenset({"at", "dt", "dts", "dti", "pp$", "np$", "nn$", "ap", "abn"})


def noun_phrase(sentence: Sentence, start: int, names: bool = False) -> int:
    """Return the index of the head of a noun phrase that begins at a word; -1 if there is none.

    A determiner is required before a singular noun. The phrase ends at its last noun; a word that could continue it makes it
    none.

    Args:
        sentence: The sentence.
        start: Index of the first word.
        names: Whether a proper name is such a phrase.
    """
    tags, i = sentence.tags, start
    if i >= len(tags):
        return -1
    determined = base(tags[i]) in DETERMINER_TAGS
    if determined:
        i += 1
    while i + 1 < len(tags) and base(tags[i]) in BEFORE_NOUN and base(tags[i + 1]) in BEFORE_NOUN | {"nns", "nps"}:
        i += 1
    head = base(tags[i]) if i < len(tags) else ""
    if names and head in ("np", "nps"):
        return i
    return i if head == "nns" or (head == "nn" and determined) else -1


def subjects(sentence: Sentence) -> Iterator[tuple[list[int], int]]:
    """Yield the nouns of each subject at the start of a sentence or clause, its head first, and the finite verb after them.

    The subject is a noun phrase, or one with up to two prepositional phrases after it. An adverb may precede the verb.
    """
    for start, tag in enumerate(("", *sentence.tags[:-1])):
        if start and tag not in (",", "cs", "wrb"):
            continue
        heads = [noun_phrase(sentence, start)]
        while heads[-1] >= 0 and len(heads) < 4 and base(_tag(sentence, heads[-1] + 1)) == "in":
            heads.append(noun_phrase(sentence, heads[-1] + 2, names=True))
        verb = heads[-1] + 1
        if _tag(sentence, verb) == "rb":
            verb += 1
        if min(heads) >= 0 and _tag(sentence, verb) in SINGULAR_VERBS | PLURAL_VERBS:
            yield heads, verb


def _tag(sentence: Sentence, at: int) -> str:
    return sentence.tags[at] if at < len(sentence.tags) else ""


def noun_subjects(sentence: Sentence, lexicon: Lexicon, rng: np.random.Generator) -> Iterator[PairCandidate]:
    """Yield subject_verb_noun, and subject_verb_attractor where the noun next to the verb has the other number."""
    for heads, verb in subjects(sentence):
        head = sentence.words[heads[0]].lower()
        number = lexicon.number_of_noun(head)
        start = next((i + 1 for i in range(heads[0] - 1, -1, -1) if sentence.tags[i] in (",", "cs", "wrb")), 0)
        if head in lexicon.collectives or "cd" in sentence.tags[start : heads[0]]:
            continue  # ten years is a long time
        if sentence.words[start].lower() in ("a", "an") and sentence.words[heads[0] + 1] == "of":
            continue  # a band of robbers enter
        if start and sentence.tags[start - 1] == "cs" and sentence.words[verb] not in BE:
            continue  # they ask that the man leave
        if len(heads) == 1:
            yield from _verb(sentence, lexicon, verb, number, "subject_verb_noun")
        else:
            nearest = "plural" if base(sentence.tags[heads[-1]]) in ("nns", "nps") else "singular"
            if number and nearest != number:
                yield from _verb(sentence, lexicon, verb, number, "subject_verb_attractor")


PRONOUNS = {"he": "singular", "she": "singular", "it": "singular", "we": "plural", "they": "plural", "you": "plural"}
CONDITIONS = frozenset({"if", "though", "wish", "wished", "wishes", "unless", "lest", "whether"})
"""Words after which were is right in the singular."""


def pronoun_subjects(sentence: Sentence, lexicon: Lexicon, rng: np.random.Generator) -> Iterator[PairCandidate]:
    """Yield subject_verb_pronoun: a pronoun at the start of a sentence or clause, and its verb."""
    for at, word in enumerate(sentence.words):
        if at and sentence.tags[at - 1] not in ("cc", "wrb", ","):
            continue
        if word.lower() in PRONOUNS and sentence.tags[at] in ("pps", "ppss"):
            verb = at + 2 if _tag(sentence, at + 1) == "rb" else at + 1
            yield from _verb(sentence, lexicon, verb, PRONOUNS[word.lower()], "subject_verb_pronoun")
            return


def _verb(sentence: Sentence, lexicon: Lexicon, at: int, number: str, phenomenon: str) -> Iterator[PairCandidate]:
    """Yield the pair in which a finite verb has the wrong number, if its forms are known and it has the number given."""
    tag, word = _tag(sentence, at), sentence.words[at] if at < len(sentence.words) else ""
    if any(before.lower() in CONDITIONS for before in sentence.words[:at]):
        return
    if number == "singular" and tag in SINGULAR_VERBS and word in lexicon.plural_verbs:
        yield PairCandidate(sentence, phenomenon, at, lexicon.plural_verbs[word], number)
    elif number == "plural" and tag in PLURAL_VERBS and word in lexicon.singular_verbs:
        yield PairCandidate(sentence, phenomenon, at, lexicon.singular_verbs[word], number)


def determiners(sentence: Sentence, lexicon: Lexicon, rng: np.random.Generator) -> Iterator[PairCandidate]:
    """Yield determiner_noun and determiner_noun_adj: this, that, these or those, and the noun; either of them is replaced."""
    plural_determiners = _reverse(DETERMINERS)
    for at, word in enumerate(sentence.words):
        if sentence.tags[at] not in ("dt", "dts") or word not in DETERMINERS.keys() | plural_determiners.keys():
            continue
        noun = at + 1
        while _tag(sentence, noun) in ("jj", "jjr", "jjt", "jjs", "ap", "od", "vbn", "vbg"):
            noun += 1
        number = "singular" if word in DETERMINERS else "plural"
        head = sentence.words[noun] if noun < len(sentence.words) else ""
        ends = not _tag(sentence, noun + 1).startswith(("nn", "np", "jj", "cc", "cd", "vbg", "vbn", "rp"))
        if _tag(sentence, noun) not in ("nn", "nns") or lexicon.number_of_noun(head) != number or not ends:
            continue
        phenomenon = "determiner_noun" if noun == at + 1 else "determiner_noun_adj"
        if rng.random() < 0.5:
            bad = DETERMINERS[word] if number == "singular" else plural_determiners[word]
            yield PairCandidate(sentence, phenomenon, at, bad, number)
        else:
            bad = lexicon.plurals[head] if number == "singular" else lexicon.singulars[head]
            yield PairCandidate(sentence, phenomenon, noun, bad, number)
        return


REFLEXIVES = {"he": "himself", "she": "herself", "it": "itself", "they": "themselves"}
VERBAL = frozenset({
    "vb", "vbd", "vbz", "vbg", "vbn", "be", "bed", "bedz", "ber", "bez", "beg", "ben", "hv", "hvd", "hvz", "hvg", "hvn", "do", "dod",
    "doz", "md", "md*", "dod*", "rb", "*", "rp", "to",
})  # fmt: skip
FINITE = VERBAL - {"vbg", "be", "beg", "ben", "hvg", "hvn", "to"}
BETWEEN = VERBAL | {"in", "at", "jj", "nn", "pp$", "ap"}
"""Tags between a subject and the reflexive that it binds."""


def reflexives(sentence: Sentence, lexicon: Lexicon, rng: np.random.Generator) -> Iterator[PairCandidate]:
    """Yield reflexive_number or reflexive_gender: a subject, a verb, and the reflexive that the subject binds.

    The subject is a pronoun, or for the number also a name at the start of the sentence or a plural noun next to its verb. No
    noun that the wrong form could refer to is between them.
    """
    tags = sentence.tags
    for at, word in enumerate(sentence.words):
        if word not in REFLEXIVES.values():
            continue
        start, passed = at - 1, BETWEEN | {"nns"} if word == "themselves" else BETWEEN
        while start >= 0 and (tags[start] in passed or (tags[start] in ("cc", ",") and tags[start + 1] in VERBAL)):
            start -= 1
        if start < 0 and tags[0] == "at":
            start = noun_phrase(sentence, 0)
        between = tags[start + 1 : at]
        if start < 0 or not any(tag.startswith(("vb", "be", "hv")) for tag in between):
            continue
        pronoun = tags[start] in ("pps", "ppss")
        if pronoun and REFLEXIVES.get(sentence.words[start].lower()) != word:
            continue
        if not pronoun and word == "themselves":
            antecedent = start - (tags[start] == "wps")  # people who saw themselves
            if base(tags[antecedent]) not in ("nns", "nps") or tags[start + 1] not in FINITE:
                continue
        elif not pronoun and (tags[start] != "np" or start != noun_phrase(sentence, 0, names=True)):
            continue  # the company declared themselves
        if start and tags[start - 1] == "cc" and tags[start] != "ppss":
            continue  # she and he
        gendered = pronoun and word in ("himself", "herself")
        if gendered and (word == "herself" or rng.random() < 0.5):
            other, form = ("herself", "masculine") if word == "himself" else ("himself", "feminine")
            yield PairCandidate(sentence, "reflexive_gender", at, other, form)
        elif word == "themselves":
            yield PairCandidate(sentence, "reflexive_number", at, "himself", "plural")
        else:
            yield PairCandidate(sentence, "reflexive_number", at, "themselves", "singular")
        return


def verb_forms(sentence: Sentence, lexicon: Lexicon, rng: np.random.Generator) -> Iterator[PairCandidate]:
    """Yield verb_form: the participle after have, and the base form after a modal verb or do."""
    have, modal = ("hv", "hvd", "hvz", "hv*", "hvd*", "hvz*"), ("md", "md*", "do*", "dod*", "doz*")
    for at, (word, tag) in enumerate(zip(sentence.words, sentence.tags, strict=True)):
        before = at - 1
        while before >= 0 and sentence.tags[before] in ("rb", "*"):
            before -= 1
        auxiliary = sentence.tags[before] if before >= 0 else ""
        if tag == "vbn" and auxiliary in have and word in lexicon.bases:
            yield PairCandidate(sentence, "verb_form", at, lexicon.bases[word], "participle")
            return
        if tag == "vb" and auxiliary in modal and word in lexicon.participles:
            yield PairCandidate(sentence, "verb_form", at, lexicon.participles[word], "base")
            return


Rule = Callable[[Sentence, Lexicon, np.random.Generator], Iterator[PairCandidate]]
RULES: tuple[Rule, ...] = (noun_subjects, pronoun_subjects, determiners, reflexives, verb_forms)
TERMS = {
    "subject_verb_pronoun": "subject_verb_agreement", "subject_verb_noun": "subject_verb_agreement",
    "subject_verb_attractor": "subject_verb_agreement", "determiner_noun": "determiner_noun_agreement",
    "determiner_noun_adj": "determiner_noun_agreement", "reflexive_number": "anaphor_agreement",
    "reflexive_gender": "anaphor_agreement", "verb_form": "verb_form",
}  # fmt: skip
"""Phenomenon -> its linguistics_term."""

# --------------------------------------------------------------------------- selection


def is_plain(sentence: Sentence) -> bool:
    """Return whether a sentence is a short statement without half a quotation, brackets, headlines, foreign or cited words."""
    words = [word for word in sentence.words if word[:1].isalnum()]
    return (
        MIN_WORDS <= len(words) <= MAX_WORDS
        and sentence.words[-1] == "."
        and sentence.words[0][:1].isupper()
        and sentence.tags.count("``") == sentence.tags.count("''")
        and not any(tag in ("'", "(", ")", ":", "--", "nil") for tag in sentence.tags)
        and FORMULAS.isdisjoint(sentence.words)
        and not any(tag.endswith(("-hl", "-nc")) or tag.startswith("fw-") for tag in sentence.tags)
    )


def balanced(
    candidates: Sequence[PairCandidate], lexicon: Lexicon, limit: int, rng: np.random.Generator
) -> list[PairCandidate]:
    """Return as many candidates of one phenomenon as can be balanced, at most a limit.

    The candidates are in four cells, by the class of the right form and by whether it is the more frequent word. As many of
    "singular, more frequent" as of "plural, less frequent", and of the other two, balance both.
    """
    cells: dict[tuple[str, bool], list[PairCandidate]] = defaultdict(list)
    for candidate in candidates:
        good, bad = (lexicon.frequency[word.lower()] for word in (candidate.good, candidate.bad))
        if good != bad:
            cells[candidate.form, good > bad].append(candidate)
    couples: list[list[PairCandidate]] = []
    first = min((form for form, _ in cells), default="")
    for frequent in (True, False):
        one, other = cells[first, frequent], cells[OPPOSITE.get(first, ""), not frequent]
        count = min(len(one), len(other))
        picks = [rng.permutation(len(cell))[:count] for cell in (one, other)]
        couples += [[one[i], other[k]] for i, k in zip(*picks, strict=True)]
    order = rng.permutation(len(couples))[: limit // 2]
    return [candidate for i in order for candidate in couples[i]]


def make_pairs(
    sentences: Sequence[Sentence], limit: int = PAIRS_PER_PHENOMENON, seed: int = SEED
) -> list[PairCandidate]:
    """Return balanced minimal pairs of every phenomenon, in the order of the phenomena and of the corpus.

    Args:
        sentences: The tagged corpus.
        limit: Most pairs of a phenomenon.
        seed: Seed of the selection.
    """
    lexicon, rng = Lexicon(sentences), np.random.default_rng(seed)
    found: dict[str, list[PairCandidate]] = {name: [] for name in TERMS}
    for sentence in filter(is_plain, sentences):
        for rule in RULES:
            for candidate in rule(sentence, lexicon, rng):
                found[candidate.phenomenon].append(candidate)
    return [
        candidate
        for some in found.values()
        for candidate in sorted(balanced(some, lexicon, limit, rng), key=lambda one: one.sentence.number)
    ]


def record(candidate: PairCandidate, number: int) -> dict[str, object]:
    """Return a pair in BLiMP's format, with its source: {"sentence_good", "sentence_bad", "UID", ...}."""
    words, at = list(candidate.sentence.words), candidate.at
    bad = [*words[:at], candidate.bad, *words[at + 1 :]]
    return {
        "sentence_good": prepare.sentence(words), "sentence_bad": prepare.sentence(bad), "field": "morphology",
        "linguistics_term": TERMS[candidate.phenomenon], "UID": candidate.phenomenon, "pairID": str(number),
        "good": candidate.good, "bad": candidate.bad, "form": candidate.form, "document": candidate.sentence.document,
        "sentence": candidate.sentence.number,
    }  # fmt: skip


def write_minimal_pairs(members: prepare.Members, out: Path) -> str:
    """Write the pairs of the Brown corpus as pairs.jsonl."""
    scratch = out / "brown"
    scratch.mkdir()
    prepare.brown(members, scratch)
    rows = (json.loads(row) for row in (scratch / "tagged.jsonl").read_text("utf-8").splitlines())
    sentences = [
        Sentence(row["document"], i + 1, tuple(row["tokens"]), tuple(row["tags"])) for i, row in enumerate(rows)
    ]
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    pairs = [record(candidate, i) for i, candidate in enumerate(make_pairs(sentences))]
    prepare.write_text(out / "pairs.jsonl", "".join(map(prepare.line, pairs)))
    counts = Counter(str(pair["UID"]) for pair in pairs)
    return f"{len(pairs)} minimal pairs in pairs.jsonl ({', '.join(f'{n} {name}' for name, n in counts.items())})"
