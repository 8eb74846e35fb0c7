"""What the site makes of the repository: pages of the README, and of the sources that pages name.

MkDocs knows only what lies in docs/. The README is its first pages, cut at headings, and a link
from a page to a file of the repository leads to a page that shows that file. A link to a file that
is not there stays as it is, and the build fails.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = {"index.md": None, "models.md": "Models", "how_it_is_built.md": "How it is built"}
LINK = re.compile(r"(\]\(|src=\")([^)#\"\s]+)(?=[)#\"])")
LANGUAGES = {".py": "python", ".json": "json", ".md": "markdown", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the README, and one for each file of the repository that a page names."""
    for name, text in _parts_of_readme().items():
        files.append(File.generated(config, name, content=text))
    named = set()
    for file in files.documentation_pages():
        folder = PurePosixPath("docs", file.src_uri).parent
        targets = (str(folder / target) for _, target in LINK.findall(file.content_string))
        named |= {os.path.normpath(target) for target in targets if "://" not in target}
    for path in sorted(path for path in named if _is_source(path)):
        source = (REPOSITORY / path).read_text(encoding="utf-8")
        fence, language = "`" * 5, LANGUAGES.get(Path(path).suffix, "text")
        text = f"# {path}\n\n{fence}{language}\n{source}\n{fence}\n"
        page = File.generated(config, f"source/{path}.md", content=text)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to the pages that show them."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    folder = PurePosixPath("docs", page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        path = os.path.normpath(folder / match[2])
        if "://" in match[2] or not _is_source(path):
            return match[0]
        return match[1] + os.path.relpath(f"docs/source/{path}.md", folder)

    return LINK.sub(moved, markdown)


def _is_source(path: str) -> bool:
    """Whether it is a file of the repository, no page of its own."""
    return not path.startswith("docs/") and (REPOSITORY / path).is_file()


def _parts_of_readme() -> dict[str, str]:
    """Returns the pages that the README is cut into, with links as a page in docs/ has them."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    sections = re.split(r"^(?=## )", text, flags=re.M)
    titles = [section.partition("\n")[0].removeprefix("## ") for section in sections]
    pages = {}
    for page, title in PARTS.items():
        chosen = [s for s, t in zip(sections, titles, strict=True) if t == title]
        if title is None:
            chosen = [s for s, t in zip(sections, titles, strict=True) if t not in PARTS.values()]
        body = "".join(chosen)
        if title:
            body = body.replace("## ", "# ", 1)
        pages[page] = LINK.sub(_from_docs, body)
    return pages


def _from_docs(match: re.Match[str]) -> str:
    if "://" in match[2]:
        return match[0]
    return match[1] + os.path.relpath(match[2], "docs")
