"""
Hook of MkDocs: README.md and its neighbours are pages of the site too, and links lead where they do in the repository:
to a page, to a picture in any folder, or to the address of the repository, `repo_url` of mkdocs.yml. Badges are left
out: they are of the repository.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
# Pages whose source is not in docs/.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"\[([^][]*(?:\[[^]]*\])?[^][]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


BADGES = re.compile(r"^\[!\[.*\n", re.MULTILINE)


def on_files(files: Files, config: dict) -> None:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))


def on_page_markdown(markdown: str, page: Page, config: dict, files: Files) -> str:
    folder = Path(page.file.abs_src_path).parent.relative_to(ROOT)

    def link_on_the_site(match: re.Match) -> str:
        label, target, anchor = match[1], normpath((folder / match[2]).as_posix()), match[3] or ""
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target.endswith(".png") and (ROOT / target).exists():
            if target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
        elif (ROOT / target).exists():
            return f"[{label}]({config['repo_url']}/blob/HEAD/{target}{anchor})" if config["repo_url"] else label
        return f"[{label}]({relpath(target, PurePosixPath(page.file.src_uri).parent)}{anchor})"

    return LINK.sub(link_on_the_site, BADGES.sub("", markdown))
