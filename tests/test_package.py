"""The package as a whole: importing it is free, its names are there, and it names no machine it was made on."""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import toprovar_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("toprovar_jax", "pallas_kernels", "convert")


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


def test_importing_the_package_imports_neither_jax_nor_numpy():
    code = "import sys, toprovar_jax; print([n for n in ('jax', 'numpy', 'flax', 'PIL') if n in sys.modules])"
    assert in_fresh_python(code).strip() == "[]"


def test_no_module_touches_a_device_when_imported():
    code = f"""
import json, pkgutil, importlib
from jax._src import xla_bridge
touched, count = [], 0
for package in {PACKAGES!r}:
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.endswith("__main__"):
            try:
                importlib.import_module(info.name)
            except ModuleNotFoundError as error:
                # A kernel's language is an extra; the module that wraps the kernel imports without it.
                if (info.name, error.name) != ("pallas_kernels.attention.triton_gpu_kernel", "triton"):
                    raise
            count += 1
            if xla_bridge.backends_are_initialized():
                touched.append(info.name)
print(json.dumps([touched, count]))
"""
    touched, count = json.loads(in_fresh_python(code).splitlines()[-1])
    assert touched == []
    assert count > 30


def test_every_public_name_is_there_and_comes_from_the_module_it_is_said_to():
    assert sorted(toprovar_jax.__all__) == sorted(toprovar_jax._WHERE)
    for name in toprovar_jax.__all__:
        module = importlib.import_module(f"toprovar_jax.{toprovar_jax._WHERE[name]}")
        assert getattr(toprovar_jax, name) is getattr(module, name)
    assert set(toprovar_jax.__all__) <= set(dir(toprovar_jax))


def test_public_names_explain_themselves():
    for name in toprovar_jax.__all__:
        assert getattr(toprovar_jax, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'toprovar_jax' has no attribute 'generat'"):
        toprovar_jax.generat  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError):
        exec("from toprovar_jax import generat")


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert toprovar_jax.__version__ == project["version"]


def test_types_are_shipped():
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []


def shipped() -> list[str]:
    """Top-level names of the source distribution, which are those of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [*project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"], "pyproject.toml"]


def text_files():
    """Name and text of every shipped file that is text; what else lies in the checkout is nobody's business."""
    for top in map(ROOT.joinpath, shipped()):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                with contextlib.suppress(UnicodeDecodeError):
                    yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_everything_the_checks_need_is_in_the_source_distribution():
    assert [name for name in shipped() if not (ROOT / name).exists()] == []
    assert {".ci", ".pre-commit-config.yaml", "Makefile", "tests", *PACKAGES} <= set(shipped())


def test_no_file_names_a_machine():
    # Written in pieces, so that this file is not the first to be found.
    absolute = re.compile(r"(?<![\w.~}])/" + r"(?:home|root|Users|tmp|work|mnt|scratch)/" + r"\w")
    found = [(name, match[0]) for name, text in text_files() for match in absolute.finditer(text)]
    assert found == []


def test_layers_depend_one_way():
    """The kernels know nothing of the library; conversion knows nothing of the pipeline."""
    imports = {
        name: set(re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE))
        for name, text in text_files()
        if name.endswith(".py")
    }
    for name, modules in imports.items():
        if name.startswith("pallas_kernels/"):
            assert [module for module in modules if module.startswith(("toprovar_jax", "convert"))] == [], name
        if name.startswith("convert/") and name != "convert/__main__.py":  # a command: it stands above everything
            above = tuple(f"toprovar_jax.{part}" for part in ("pipeline", "generation", "drivers", "loading", "cli"))
            assert [module for module in modules if module.startswith(above)] == [], name
