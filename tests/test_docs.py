"""What README and docs show is what works: their code runs, their recipe trains, their diff applies."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from limbeck import recipe
from limbeck.cli import app
from limbeck.run import Run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_python_runs() -> None:
    distiller, function, *_ = blocks("README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(distiller, "README.md", "exec"), names)
    assert names["loss"].item() > 0
    assert all(p.grad is None for p in names["teacher"].parameters())
    assert all(p.grad is not None for p in names["student"].parameters())
    exec(compile(function, "README.md", "exec"), names)
    assert names["loss"].item() > 0 and names["s"].grad.any()


@pytest.mark.parametrize(("number", "example"), [(2, "hf_trainer"), (3, "lightning_loop")])
def test_what_the_readme_shows_of_an_example_is_in_it(number: int, example: str) -> None:
    """And the example is run by tests/extras."""
    code = blocks("README.md", "python")[number]
    assert code.startswith("class ") and code in (ROOT / f"examples/{example}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_written_as_they_are_understood(page: Path) -> None:
    """Names, options and values; nothing is run."""
    group = typer.main.get_command(app)
    fenced = "".join(page.read_text(encoding="utf-8").split("```")[1::2])
    for line in re.findall(r"^limbeck .*", fenced, re.MULTILINE):
        _, command, *arguments = shlex.split(line, comments=True)
        assert command in group.commands, line  # type: ignore[attr-defined]
        group.commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
        for file in re.findall(r"recipes/\S+\.toml", line):
            assert (ROOT / file).is_file(), line


@pytest.mark.parametrize("page", ["README.md", "docs/first_run.md"])
def test_the_recipes_train(page: str, tmp_path: Path) -> None:
    (text,) = blocks(page, "toml")
    changes = ["stages.0.epochs=1", "stages.1.epochs=1"]
    run = Run(recipe.parse(recipe.apply(tomllib.loads(text), changes), page), tmp_path / "run")
    for _ in run.moments():
        pass
    assert run.result is not None and (tmp_path / "run" / "student.safetensors").exists()


# Not the files of arms alone, which boards take theirs from.
RECIPES = [
    file
    for file in sorted((ROOT / "recipes").rglob("*.toml"))
    if set(tomllib.loads(file.read_text(encoding="utf-8"))) != {"arms"}
]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_in_the_folder_is_read(file: Path) -> None:
    from limbeck import board

    plan, arms, seeds, _ = board.read(file)
    teaches = any(stage.terms for stage in plan.stages)
    assert plan.stages and seeds and (arms or teaches)


def test_links_between_pages_lead_somewhere() -> None:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs/hooks/pages.py")
    assert spec and spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    generated = {ROOT / "docs" / path for path in hook.pages()}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists() or place in generated, f"{page.name} links to {target}"


@pytest.mark.slow
def test_the_diff_of_your_method_applies_and_passes_the_contract(tmp_path: Path) -> None:
    (diff,) = blocks("docs/your_method.md", "diff")
    for part in ("limbeck", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cosine"]
    folders = ["tests/contract", "tests/knowledge", "tests/laws"]
    done = subprocess.run([*pytest_, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 8, done.stdout[-500:]  # type: ignore[index]
