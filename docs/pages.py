"""Hooks of `mkdocs build`: which files are pages, and what becomes of links to others."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "docs/site.css", "benchmarks/README.md",
    "benchmarks/results/*.png", "csrc/README.md", "examples/README.md", "peft_kernels/**/README.md",
)  # fmt: skip
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)\)")
#: Of Sphinx, which docstrings use; the site shows the name alone.
ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>)")


def on_files(files: Files, config) -> Files:
    """The pages by their paths in the repository, beside the theme's files."""
    paths = [path.relative_to(ROOT).as_posix() for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    pages = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    return Files([file for file in files if file.src_dir != config.docs_dir] + pages)


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """A link to a file or folder of the repository that is no page keeps its text alone. A link to nothing stays, and
    fails the build."""

    def text_alone(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        is_source = (ROOT / target).exists() and files.get_file_from_path(target) is None
        return match[1] if is_source else match[0]

    return LINK.sub(text_alone, markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    return ROLE.sub("", html)
