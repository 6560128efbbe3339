"""English prose and Python source from freely licensed Debian packages, as documents with a fixed split.

`python -m tersor.integration.zoo.training.corpus FOLDER` fetches the packages with apt and dpkg (no root needed) and writes
one JSON line per document: {"source", "name", "split", "text"}. Debian systems only: elsewhere, unpack the packages
named in SOURCES into FOLDER/<package> first.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A package, its licence, and the function that reads (document name, text) from its unpacked files.

    Args:
        weight: share of the training tokens.
    """

    package: str
    licence: str
    weight: float
    read: Callable[[Path], Iterator[tuple[str, str]]]


def austen(folder: Path) -> Iterator[tuple[str, str]]:
    """Chapters of Jane Austen's six novels, their lines joined to paragraphs."""
    database = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for lines in _string_vectors(database):
        title = lines[0].strip().title()
        chapters = re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME) [IVXL\d]+)", "\n".join(lines))
        for number, chapter in enumerate(chapters):
            paragraphs = [" ".join(p.split()) for p in chapter.split("\n\n")]
            yield f"{title}/{number:02}", "\n\n".join(p for p in paragraphs if p)


def handbook(folder: Path) -> Iterator[tuple[str, str]]:
    """Sections of the Debian Administrator's Handbook: the running text of its pages."""
    for path in sorted((folder / "usr/share/doc/debian-handbook/html/en-US").glob("sect.*.html")):
        page = _Paragraphs()
        page.feed(path.read_text())
        yield path.stem, "\n\n".join(page.paragraphs)


def developers_reference(folder: Path) -> Iterator[tuple[str, str]]:
    """Chapters of the Debian Developer's Reference, from their sources."""
    for path in sorted((folder / "usr/share/developers-reference/_sources").glob("*.rst.txt")):
        yield path.name, path.read_text()


def python_documentation(folder: Path) -> Iterator[tuple[str, str]]:
    """Pages of the Python documentation, from their sources."""
    root = folder / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        yield str(path.relative_to(root)), path.read_text()


def python_library(folder: Path) -> Iterator[tuple[str, str]]:
    """Modules of the Python standard library; tables (encodings, idlelib, generated grammars) are left out."""
    root = folder / "usr/lib/python3.11"
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        if name.startswith(("encodings", "idlelib", "pydoc_data", "_sysconfigdata")) or path.stat().st_size > 120_000:
            continue
        yield name, path.read_text(errors="replace")


SOURCES = [
    Source("r-cran-janeaustenr", "public domain", 0.40, austen),
    Source("debian-handbook", "GPL-2.0+ or CC-BY-SA-3.0", 0.12, handbook),
    Source("developers-reference", "GPL-2.0+", 0.03, developers_reference),
    Source("python3.11-doc", "PSF-2.0", 0.20, python_documentation),
    Source("libpython3.11-stdlib", "PSF-2.0", 0.25, python_library),
]


def split_of(name: str) -> str:
    """ "test", "validation" or "train" (4, 4 and 92 of 100 documents), from the document's name alone."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 25
    return {0: "test", 1: "validation"}.get(bucket, "train")


def fetch(folder: Path) -> None:
    """Unpack every package of SOURCES into `folder`/<package>."""
    for source in SOURCES:
        target = folder / source.package
        if target.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", source.package], cwd=folder, check=True)
        archive = next(folder.glob(f"{source.package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)


def documents(folder: Path) -> Iterator[dict[str, str]]:
    """All documents of all unpacked packages."""
    for source in SOURCES:
        for name, text in source.read(folder / source.package):
            full = f"{source.package}/{name}"
            if len(text) > 200:
                yield {"source": source.package, "name": full, "split": split_of(full), "text": text.strip() + "\n"}


def _string_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors in an R lazy-load database: records of (length, zlib stream of R's XDR serialisation)."""
    position = 0
    while position < len(database):
        stream = zlib.decompressobj()
        record = stream.decompress(database[position + 4 :])
        if not stream.eof:
            raise zlib.error("the database ends within a record")
        position = len(database) - len(stream.unused_data)
        if (strings := _strings(record)) is not None:
            yield strings


def _strings(record: bytes) -> list[str] | None:
    """The strings of one serialised character vector; None if the record is something else."""

    def integer(at: int) -> int:
        return int.from_bytes(record[at : at + 4], "big", signed=True)

    at = 14  # "X\n", then three integers: format version, writer, minimal reader
    if integer(2) == 3:  # version 3 names the encoding
        at += 4 + integer(at)
    if integer(at) & 0xFF != 16:  # the type of a character vector
        return None
    count, at = integer(at + 4), at + 8
    strings = []
    for _ in range(count):
        length = integer(at + 4)
        strings.append(record[at + 8 : at + 8 + max(length, 0)].decode())
        at += 8 + max(length, 0)
    return strings


class _Paragraphs(HTMLParser):
    """Collects the text of the <p> elements (Publican writes <div class="para">)."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._depth = 0
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        is_paragraph = tag == "p" or (tag == "div" and ("class", "para") in attrs)
        if self._depth:
            self._depth += tag in ("p", "div")
        elif is_paragraph:
            self._depth = 1

    def handle_endtag(self, tag: str) -> None:
        if self._depth and tag in ("p", "div"):
            self._depth -= 1
            if not self._depth:
                self.paragraphs.append(" ".join("".join(self._text).split()))
                self._text = []

    def handle_data(self, data: str) -> None:
        if self._depth:
            self._text.append(data)


def held_out_text(found: list[dict[str, str]]) -> str:
    """The prose of the test split: what `zoo/held_out.txt` holds."""
    prose = ("r-cran-janeaustenr", "debian-handbook")
    return "\n".join(d["text"] for d in found if d["split"] == "test" and d["source"] in prose)


def calibration_text(found: list[dict[str, str]], length: int = 120_000) -> str:
    """The same mixture from the training split, in a fixed order: what `zoo/calibration.txt` holds.

    Without the one source that may only be passed on under the GPL.
    """
    parts = []
    for source in SOURCES:
        if source.licence == "GPL-2.0+":
            continue
        mine = [d for d in found if d["split"] == "train" and d["source"] == source.package]
        mine.sort(key=lambda d: hashlib.sha256(d["name"].encode()).digest())
        # pieces of several documents, so that no single one fills a source's share
        parts += [d["text"][:6000] for d in mine[: round(source.weight * length / 6000)]]
    return "\n".join(parts)


def main() -> None:
    folder = Path(sys.argv[1])
    fetch(folder)
    found = list(documents(folder))
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        for document in found:
            file.write(json.dumps(document) + "\n")
    (folder / "held_out.txt").write_text(held_out_text(found))
    (folder / "calibration.txt").write_text(calibration_text(found))


if __name__ == "__main__":
    main()
