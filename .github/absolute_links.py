"""
README.md and pyproject.toml as PyPI needs them, which has no other file of the repository: links lead to its address.

    python .github/absolute_links.py https://github.com/OWNER/NAME v1.0.0
"""

import re
import sys
from pathlib import Path


def absolute_links(markdown: str, repository: str, tag: str) -> str:
    """A page at the top of the repository, whose links and pictures are those of a tag there."""

    def absolute(match: re.Match) -> str:
        kind = "raw" if match[1] == "!" else "blob"
        return f"{match[1]}[{match[2]}]({repository}/{kind}/{tag}/{match[3]})"

    return re.sub(r"(!?)\[([^][]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, markdown)


def main() -> None:
    repository, tag = sys.argv[1:]
    readme, project = Path("README.md"), Path("pyproject.toml")
    readme.write_text(absolute_links(readme.read_text(), repository, tag))
    urls = "[project.urls]\n"
    project.write_text(project.read_text().replace(urls, f'{urls}Repository = "{repository}"\n'))


if __name__ == "__main__":
    main()
