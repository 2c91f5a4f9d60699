"""The package as a stranger meets it: installed, and with Python started in the repository's root."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stagedspec

ROOT = Path(__file__).resolve().parent.parent


def run_in_root(code: str) -> str:
    """Runs `code` in a fresh interpreter with the root as working directory and first on the path; gives its output."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if result.returncode:
        pytest.fail(f"exit status {result.returncode}:\n{result.stderr}")
    return result.stdout.strip()


@pytest.mark.slow
def test_transformers_imports_from_the_root():
    # The folder kernels/ is then importable under the name of a distribution that transformers looks for.
    code = "import sys; from transformers import GPT2LMHeadModel; print(GPT2LMHeadModel.__name__, sys.path[0] == '')"
    assert run_in_root(code) == "GPT2LMHeadModel True"


def test_kernels_is_stagedspec_kernels():
    code = "import stagedspec.kernels as k; print(k.__name__, k.__file__)"
    name, file = run_in_root(code).split(" ", 1)
    assert name == "stagedspec.kernels"
    assert Path(file).resolve() == ROOT / "kernels" / "__init__.py"


def test_plain_kernels_imports_nothing_heavy():
    code = "import sys, kernels; print(sorted({'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules)))"
    assert run_in_root(code) == "[]"


def test_every_package_is_shipped():
    """An editable install would hide that one is missing."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([\w.]+)",', text.split("\npackages = [")[1].split("]")[0])
    found = set()
    for name, folder in (("stagedspec", ROOT / "stagedspec"), ("stagedspec.kernels", ROOT / "kernels")):
        for path in folder.rglob("__init__.py"):
            found.add(".".join((name, *path.parent.relative_to(folder).parts)))
    assert found == set(listed)


def test_one_version():
    assert importlib.metadata.version("stagedspec") == stagedspec.__version__


def test_help_needs_no_torch():
    code = "import sys, stagedspec.cli; print(sorted({'torch', 'triton', 'transformers'} & set(sys.modules)))"
    assert run_in_root(code) == "[]"


def test_licence_is_the_unmodified_apache_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:6] == ["Apache", "License", "Version", "2.0,", "January", "2004"]
    assert len(text.split()) == 1581
