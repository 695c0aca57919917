"""What is installed, what an import costs, and what the repository must not contain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# What only some commands need, and the slowest to import.
HEAVY = set("transformers triton matplotlib gradio uvicorn pyarrow huggingface_hub jsonargparse jinja2".split())


def run(*command: str, cwd: Path = ROOT) -> str:
    """Runs a command and returns what it printed; a failure carries what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(statement: str) -> set[str]:
    """The modules a fresh interpreter holds after a statement, started where `import phi2` finds this checkout."""
    code = f"import json, sys; sys.path.insert(0, 'kernels'); {statement}; print(json.dumps(sorted(sys.modules)))"
    return set(json.loads(run(sys.executable, "-c", code)))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Canonical distribution name -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy so that the build leaves nothing behind here."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "phi2_command.py"):
        shutil.copy(ROOT / name, source)
    for name in ("phi2", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


def test_kernels_folder_is_no_package():
    # With an __init__.py it would answer to `import kernels`, the name of a package that transformers imports.
    assert (ROOT / "kernels" / "phi2_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_tests_folders_are_no_packages():
    # tests/kernels/__init__.py would put tests/ on sys.path and answer to `import kernels` as well.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_transformers_phi_imports_from_the_repository_root():
    assert run(sys.executable, "-c", "import transformers; print(transformers.PhiForCausalLM.__name__)") == (
        "PhiForCausalLM\n"
    )


def test_import_phi2_loads_nothing_heavy_beyond_torch():
    loaded = modules_after("import phi2")
    assert "phi2" in loaded
    assert HEAVY & (loaded - modules_after("import torch")) == set()


def test_wheel_holds_every_file_of_the_two_packages_the_command_and_nothing_else(wheel: Path):
    packages = {ROOT: ROOT / "phi2", ROOT / "kernels": ROOT / "kernels" / "phi2_kernels"}
    expected = {
        path.relative_to(base).as_posix()
        for base, package in packages.items()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert shipped == expected | {"phi2_command.py"}


def test_wheel_is_of_the_version_that_the_package_tells(wheel: Path):
    told = run(sys.executable, "-c", "import sys; sys.path.insert(0, 'kernels'); import phi2; print(phi2.__version__)")
    assert wheel.name.split("-")[1] == told.strip()


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []


def test_constraints_pin_torch_without_a_build_suffix(pins: dict[str, str]):
    assert pins["torch"] == "2.13.0"


def test_constraints_pin_every_dependency_of_the_tests(pins: dict[str, str]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    unmet = [str(need) for need in wanted if pins.get(canonicalize_name(need.name), "") not in need.specifier]
    assert unmet == []


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    folder = "/wo" + "rk/"
    found = subprocess.run(["git", "grep", "--untracked", "-l", "-F", folder], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, ""), found.stderr  # 1: searched, and found nothing


def test_the_readme_lists_every_file_of_the_library():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2]
    kernels = [path for path in (ROOT / "kernels" / "phi2_kernels").glob("*.py") if not path.stem.endswith("_triton")]
    library = [path for path in (ROOT / "phi2").rglob("*.py") if not path.name.startswith("__")]
    named = set(re.findall(r"[\w]+\.py\b", tree))
    assert {path.name for path in (*library, *kernels)} - {"__init__.py"} <= named
