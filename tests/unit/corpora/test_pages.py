"""Documentation pages are read without markup, navigation and listings."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest

from firth.corpora.reference_works import html_pages, html_text, manual_pages, manual_text

PAGE = """<html><head><title>Aide</title><style>p {}</style></head><body>
<header><p>LibreOffice</p></header><ul class="docnav"><li>Suivant</li></ul>
<h2 id="a">M&eacute;triques</h2><p>Définit l'unité de mesure <span class="emph">dans</span> les feuilles de calcul.</p>
<p>Choisissez <span><span class="MAC">Préférences</span><span>Options</span></span>.<br>Puis OK.</p>
<ul><li>un<li>deux</ul><pre>ls -l</pre><h3>Vide</h3></body></html>"""


def test_html_text() -> None:
    assert html_text(PAGE) == [
        "Métriques", "Définit l'unité de mesure dans les feuilles de calcul.", "Choisissez Options.", "Puis OK.", "un", "deux", "Vide",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        ('.\\" note\n.TH nss 5 "5 février"\n.SH NOM\nnss \\- Service\n', ["NOM", "nss - Service"]),
        ("Le fichier \\fI/etc/nss\\fP est\nlu.\n.PP\nD\\(aqautres.\n", ["Le fichier /etc/nss est lu.", "D'autres."]),
        (".TP\n.BR init (1)\nPremier processus.\n\nFin.\n", ["init(1) Premier processus.", "Fin."]),
        ("Avant.\n.EX\nint main;\n.EE\nAprès «\\ eux\\ ».\n", ["Avant. Après « eux »."]),
        ('.SS "Les options"\n.B \\-a texte\n', ["Les options", "-a texte"]),
    ],
)
def test_manual_text(source: str, blocks: list[str]) -> None:
    assert manual_text(source) == blocks


def test_text_after_a_heading_is_its_paragraph(tmp_path: Path) -> None:
    page = "<h1>Titre</h1>Un texte sans balise, assez long pour être une réponse.<p>Autre.</p>"
    html_pages([("a.html", io.BytesIO(page.encode()))], tmp_path)
    assert json.loads((tmp_path / "headings.jsonl").read_text("utf-8")) == {
        "prompt": "Titre", "completion": "Un texte sans balise, assez long pour être une réponse.",
    }  # fmt: skip


def test_pages_are_files_and_repeated_paragraphs_are_left_out(tmp_path: Path) -> None:
    second = "<p>Puis OK.</p><p>Nouveau.</p>"
    given = [("help/b.html", io.BytesIO(second.encode())), ("help/a.html", io.BytesIO(PAGE.encode()))]
    assert html_pages(given, tmp_path).startswith(
        "2 pages as .txt (0.0 MB), 1 repeated paragraphs left out, 1 headings"
    )
    assert (tmp_path / "0002-b.txt").read_text("utf-8") == "Nouveau.\n"
    assert json.loads((tmp_path / "headings.jsonl").read_text("utf-8")) == {
        "prompt": "Métriques", "completion": "Définit l'unité de mesure dans les feuilles de calcul.",
    }  # fmt: skip
    manual = tmp_path / "manual"
    manual.mkdir()
    assert manual_pages([("man5/nss.5.gz", io.BytesIO(gzip.compress(b".SH NOM\nnss\n")))], manual).startswith("1 pages")
    assert [file.name for file in manual.iterdir()] == ["0001-nss.txt"]
