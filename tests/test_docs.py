"""What README and docs show is what works: their code runs, their recipe trains, their diff applies."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from limbeck import recipe
from limbeck.run import Run

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_python_runs() -> None:
    (code,) = blocks("README.md", "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].item() > 0  # type: ignore[attr-defined]
    assert all(p.grad is None for p in names["teacher"].parameters())  # type: ignore[attr-defined]
    assert all(p.grad is not None for p in names["student"].parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "docs/first_run.md"])
def test_the_recipes_train(page: str, tmp_path: Path) -> None:
    (text,) = blocks(page, "toml")
    changes = ["stages.0.epochs=1", "stages.1.epochs=1"]
    run = Run(recipe.parse(recipe.apply(tomllib.loads(text), changes), page), tmp_path / "run")
    for _ in run.moments():
        pass
    assert run.result is not None and (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda file: file.stem)
def test_every_recipe_in_the_folder_is_read(file: Path) -> None:
    from limbeck import board

    whole, arms, seeds, _ = board.read(file)
    assert whole.stages and arms and seeds


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
