"""Let pages link to files beside ``docs/``, in the site as on a forge.

``](../benchmarks/NOTES.md)`` leads out of ``docs/``, where MkDocs sees nothing. The linked files
become pages of the site under ``repository/``, and the links lead there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")
INSIDE = re.compile(r"\]\((?!\w+:|#|/)([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add every file beside ``docs/`` that a page links to."""
    texts = [file.content_string for file in files.documentation_pages()]
    for name in sorted({name for text in texts for name in LINK.findall(text)}):
        if not (path := ROOT / name).is_file():
            continue  # left as it is, so that the strict build names the page and the link
        target = f"repository/{name}"
        if path.suffix == ".md":
            # Links of these pages lead further into the repository; only their text is shown.
            text = INSIDE.sub(r"](#)", path.read_text())
            files.append(File.generated(config, target, content=text))
        else:
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links out of ``docs/`` to the copies."""
    return LINK.sub(
        lambda match: f"](repository/{match[1]}" if (ROOT / match[1]).is_file() else match[0],
        markdown,
    )
