"""Notebooks and pictures as parts of the site, links out of `docs`, and no private names."""

import posixpath
import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SHOWN = ("notebooks/*.ipynb", "benchmarks/results/*.png")
"""Files outside `docs` that are pages or pictures of the site."""


@event_priority(100)
def on_files(files, config):
    """Add the notebooks and the pictures, under the paths that they have in the repository."""
    for path in (path for pattern in SHOWN for path in sorted(ROOT.glob(pattern))):
        name = str(path.relative_to(ROOT))
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links out of `docs` to the site's copy of the file, or else to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match):
        path, anchor = match.groups()
        target = posixpath.normpath(posixpath.join("docs", folder, path))
        if target.startswith("docs/"):
            return match[0]
        if files.get_file_from_path(target) is None:
            return f"]({config.repo_url}/blob/main/{target}{anchor})"
        return f"]({posixpath.relpath(target, folder or '.')}{anchor})"

    return re.sub(r"\]\(((?:\.\./)+[^)#]+)(#?[^)]*)\)", link, markdown)


def on_post_page(output, page, config):
    """Leave out the private modules of types, which the pointer would show; keep numbers with their ±."""
    output = output.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return re.sub(r' title="[^"]*optimorph\._[^"]*"', "", output)
