"""The files that travel with a checkpoint must work wherever torch and transformers are installed."""

import ast
import re
import sys
from pathlib import Path

import pytest

import tnt_hf
from tnt_hf.publishing import CODE_FILES


PACKAGE = Path(tnt_hf.__file__).parent
HUB_FILES = sorted(CODE_FILES)


@pytest.mark.parametrize("name", HUB_FILES)
def test_hub_file_imports_only_torch_transformers_and_the_standard_library(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            roots = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 and f"{node.module}.py" in HUB_FILES
                continue
            roots = [node.module.split(".")[0]]
        else:
            continue
        assert set(roots) <= {"torch", "transformers"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", HUB_FILES)
def test_security_page_lists_what_a_hub_file_imports(name):
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(f"{node.module}.py" if node.level else node.module.split(".")[0])
    page = (PACKAGE.parent / "SECURITY.md").read_text()
    (listed,) = re.findall(rf"^\| `{name}` \| (.*) \|$", page, re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", listed)) == imported


def test_hub_files_are_flat_siblings():
    assert HUB_FILES == [
        "attention_tnt.py",
        "configuration_tnt.py",
        "modeling_tnt.py",
        "schedules_tnt.py",
        "token_reduction_tnt.py",
    ]
    assert {path.parent for path in CODE_FILES.values()} == {PACKAGE}
