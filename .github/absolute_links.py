"""
README.md and pyproject.toml as PyPI needs them, which has no other file of the repository: links lead to its address.

    python .github/absolute_links.py https://github.com/OWNER/NAME v1.0.0
"""

import re
import sys
from pathlib import Path
from posixpath import normpath


def absolute_links(markdown: str, repository: str, tag: str) -> str:
    """A page at the top of the repository, whose links and pictures are those of a tag there."""

    def address(kind: str, target: str) -> str:
        return f"{repository}/{normpath(f'{kind}/{tag}/{target}')}"

    relative = r"\]\((?!https?:|#)([^)\s]+)\)"
    markdown = re.sub(rf"(!\[[^][]*){relative}", lambda match: f"{match[1]}]({address('raw', match[2])})", markdown)
    return re.sub(relative, lambda match: f"]({address('blob', match[1])})", markdown)


def main() -> None:
    repository, tag = sys.argv[1:]
    readme, project = Path("README.md"), Path("pyproject.toml")
    readme.write_text(absolute_links(readme.read_text(), repository, tag))
    urls = "[project.urls]\n"
    project.write_text(project.read_text().replace(urls, f'{urls}Repository = "{repository}"\n'))


if __name__ == "__main__":
    main()
