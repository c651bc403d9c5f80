"""A plain install has all that limbeck imports, every dependency is pinned, and the command exists."""

import ast
import importlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distribution(requirement: str) -> str:
    """The normalised name at the head of a requirement or of a pin."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def imported_at_once(file: Path) -> set[str]:
    """Packages that importing this file always imports; an import inside a function may be of an extra."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"limbeck"}


def test_a_plain_install_has_every_package_that_limbeck_imports() -> None:
    declared = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    providers = packages_distributions()
    missing = {
        (str(file.relative_to(ROOT)), name)
        for file in (ROOT / "limbeck").rglob("*.py")
        if not file.name.endswith("_test.py")  # `limbeck new` copies these; nothing imports them
        for name in imported_at_once(file)
        if not declared & {distribution(provider) for provider in providers.get(name, [name])}
    }
    assert not missing


def test_who_develops_has_what_the_tests_of_extras_need() -> None:
    """They are collected only where their packages are, so `make check` must install all of these."""
    groups = PROJECT["optional-dependencies"]
    (ours,) = (requirement for requirement in groups["dev"] if requirement.startswith("limbeck["))
    extras = ours.removeprefix("limbeck[").removesuffix("]").split(",")
    installed = {distribution(r) for group in ("dev", *extras) for r in groups[group]}
    tree = ast.parse((ROOT / "tests/extras/conftest.py").read_text())
    (needs,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NEEDS"
    )
    assert set(needs) == {file.name for file in (ROOT / "tests/extras").glob("test_*.py")}
    assert {distribution(package) for packages in needs.values() for package in packages} <= installed


def test_every_direct_dependency_is_pinned() -> None:
    wanted = {
        distribution(requirement)
        for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for requirement in group
    } - {"limbeck"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {distribution(line) for line in lines if "==" in line and not line.startswith("#")}
    assert wanted == pinned


def test_the_command_has_a_function_to_call() -> None:
    module, _, function = PROJECT["scripts"]["limbeck"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
