"""What the site adds to docs/: a start page, decisions, API, links to clauses, and the files that pages link to.

Pages link to files of the repository as they lie there, so that they read the same in a checkout. On the site each such
file is a page of its own.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
CLAUSE = re.compile(r"^\*\*([TRGECDQM]\d)\.\*\*", re.MULTILINE)  # where it stands in spec.md
NAMED = re.compile(r"\((?:[TRGECDQM]\d(?:, | and |; )?)+\)")  # (R3), (C1, D2)
NO_TEXT = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<a .*?</a>|<h\d.*?</h\d>|<[^>]+>)", re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)]*)?\))")
STYLE = "tables.css"
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".json": "json", ".toml": "toml", ".yml": "yaml", ".sh": "bash"}
API = {
    "executors": ["executors"],
    "executors.nf4 and mxfp4": ["executors.nf4", "executors.mxfp4"],
    "executors.nn": ["executors.nn"],
    "executors.hf": ["executors.hf"],
    "executors.parallel": ["executors.parallel"],
    "moe_ref": ["moe_ref"],
    "moe_ref.conformance": ["moe_ref.conformance", "moe_ref.conformance.adapters"],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds decisions and API to the navigation, and the style."""
    config.extra_css.append(STYLE)
    decisions = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    config.nav += [  # type: ignore[operator]
        {"Decisions": [{_title(path): f"adr/{path.name}"} for path in decisions]},
        {"API": [{name: f"api/{_slug(name)}.md"} for name in API]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the start page, API, the style, and a page for each file that a page links to."""
    style = (ROOT / "docs" / "site" / STYLE).read_text()
    files.append(File.generated(config, STYLE, content=style))
    _add(files, config, "index.md", (ROOT / "README.md").read_text())
    for name, modules in API.items():
        blocks = "\n\n".join(f"::: {module}" for module in modules)
        _add(files, config, f"api/{_slug(name)}.md", f"# {name}\n\n{blocks}\n")
    waiting = [file for file in files.documentation_pages() if not file.src_uri.startswith("source/")]
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            if files.get_file_from_path(_page_of(target)) is None:
                waiting.append(_add(files, config, _page_of(target), _shown(target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_given: Any) -> str:
    """Links to files of the repository lead to their pages, and each clause of the specification can be linked to."""
    if page.file.src_uri == "spec.md":
        markdown = CLAUSE.sub(r"**\1.**{ #\1 }", markdown)
    return LINK.sub(lambda match: _link(match, page.file), markdown)


def on_page_content(html: str, *, page: Any, **_given: Any) -> str:
    """Clauses that are named in brackets are links to them."""
    known = set(CLAUSE.findall((ROOT / "docs" / "spec.md").read_text()))
    spec = "" if page.file.src_uri == "spec.md" else posixpath.relpath("spec/", page.url or ".") + "/"

    def linked(match: re.Match[str]) -> str:
        return re.sub(
            r"\w\d", lambda own: f'<a href="{spec}#{own[0]}">{own[0]}</a>' if own[0] in known else own[0], match[0]
        )

    parts = NO_TEXT.split(html)
    return "".join(part if place % 2 else NAMED.sub(linked, part) for place, part in enumerate(parts))


def _link(match: re.Match[str], page: File) -> str:
    before, link, after = match.groups()
    path = _path(page, link)
    if path is None:
        return match.group()
    inside = path.relative_to(ROOT / "docs") if path.is_relative_to(ROOT / "docs") and path.is_file() else None
    target = inside.as_posix() if inside is not None else _page_of(path)
    return f"{before}{posixpath.relpath(target, posixpath.dirname(page.src_uri) or '.')}{after}"


def _targets(page: File) -> Iterator[Path]:
    """Files and folders outside of the site's pages to which a page links."""
    if not page.src_uri.endswith(".md"):
        return
    for _, link, _ in LINK.findall(page.content_string):
        path = _path(page, link)
        if path is not None and not (path.is_relative_to(ROOT / "docs") and path.is_file()):
            yield path


def _path(page: File, link: str) -> Path | None:
    """What a link in a page leads to, in the repository; None if it does not."""
    if re.match(r"[a-z]+:", link) or link.startswith("#"):
        return None
    path = (_folder(page) / link).resolve()
    return path if path.is_relative_to(ROOT) and path.exists() else None


def _folder(page: File) -> Path:
    """Where a page's text lies in the repository."""
    if page.src_uri == "index.md":
        return ROOT
    if page.src_uri.startswith("source/"):
        path = ROOT / page.src_uri.removeprefix("source/").removesuffix(".md")
        return path if path.is_dir() else path.parent
    return (ROOT / "docs" / page.src_uri).parent


def _page_of(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _shown(path: Path) -> str:
    """A page that shows a file, or what is in a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        inside = sorted(child for child in path.iterdir() if child.name[0] not in "._" and child.suffix != ".pyc")
        lines = (f"- [`{child.name}`]({child.name}{'/' * child.is_dir()})" for child in inside if child.is_file())
        return f"# `{name}/`\n\n" + "\n".join(lines) + "\n"
    if path.suffix == ".md":
        return path.read_text()
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return f"# `{name}`\n\n{path.stat().st_size} bytes.\n"
    fence = "~" * 8
    return f"# `{name}`\n\n{fence} {LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def _add(files: Files, config: MkDocsConfig, uri: str, text: str) -> File:
    found = File.generated(config, uri, content=text)
    files.append(found)
    return found


def _title(path: Path) -> str:
    return path.read_text().splitlines()[0].removeprefix("# ").replace("`", "")


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)
