import re

from conftest import ROOT, run_script

from benchmarks.write_tables import PAGES as WRITTEN_PAGES
from benchmarks.write_tables import TABLES


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]


def test_tables_are_those_of_the_results_files():
    outcome = run_script(ROOT / "benchmarks" / "write_tables.py", "--check")
    assert outcome.returncode == 0, outcome.stderr


def test_every_table_stands_on_one_page_that_is_written():
    where = {page: re.findall(r"<!-- table (\w+) -->", page.read_text()) for page in PAGES}
    assert sorted(name for names in where.values() for name in names) == sorted(TABLES)
    assert {page.relative_to(ROOT).as_posix() for page, names in where.items() if names} == set(WRITTEN_PAGES)


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if not path.startswith("http"):
                linked = page.parent / path if path else page
                assert linked.exists(), f"{page.name}: {target}"
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else []
                assert not anchor or anchor in map(heading_anchor, headings), f"{page.name}: {target}"


def heading_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
