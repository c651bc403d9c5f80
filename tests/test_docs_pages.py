"""The pages that docs/hooks/pages.py makes from the code, and the table of systems from its files."""

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from limbeck import registry

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "docs/systems").glob("*.toml"))
KEYS = {"name", "title", "venue", "paper", "fidelity", "recipe", "files", "measured", "departures", "lacks"}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs/hooks/pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = load()
PAGES = HOOK.pages()


@pytest.mark.parametrize("name", registry.names("method"))
def test_a_method_has_a_page_with_its_card_knobs_and_functions(name: str) -> None:
    page, found = PAGES[f"methods/{name}.md"], registry.find("method", name)
    assert page.startswith(f"# {name}\n")
    assert f"| paper | {found.card.paper} ({found.card.year}) |" in page
    assert "$$" in page and "epart" in page, "the docstring, with equation and departures"
    for knob, parameter in registry.knobs(found).items():
        assert f"| `{knob}` | `{parameter.default!r}` |" in page
    assert re.search(r"```python\ndef \w+\(", page) and "Tensor, " in page
    source = re.search(r"Source: `(.+)`", page)
    assert source and (ROOT / source[1]).stem == name


def test_every_page_is_in_the_navigation_and_in_an_index() -> None:
    nav = [{"Methods": "methods/index.md"}, {"Schemes": "schemes/index.md"}, "models.md"]
    text = str(HOOK.on_config({"nav": nav}))
    for path in PAGES:
        assert f"'{path}'" in text, path
    for kind, folder in (("method", "methods"), ("lens", "methods"), ("scheme", "schemes")):
        for name in registry.names(kind):
            assert PAGES[f"{folder}/index.md"].count(f"]({name}.md)") == 1


def test_a_scheme_has_its_knobs_and_every_model_is_listed() -> None:
    assert "| `in_turn` | `False` | `bool` |" in PAGES["schemes/online.md"]
    assert "`cast`" not in "".join(PAGES.values())
    for name in registry.names("model"):
        assert f"`{name}`" in PAGES["models.md"]


def test_methods_stand_under_what_they_teach() -> None:
    groups = re.split(r"\n## (\w+)", PAGES["methods/index.md"])
    under = dict(zip(groups[1::2], groups[2::2], strict=True))
    assert "](kd.md)" in under["Response"] and "](fitnet.md)" in under["Feature"]
    assert "](rkd.md)" in under["Relation"] and "](logit_standard.md)" in under["Lenses"]


def test_a_list_that_follows_its_line_at_once_is_a_list() -> None:
    assert HOOK._text("Departures:\n- one\n  more\n- two") == "Departures:\n\n- one\n  more\n- two"


# --- systems ---


def test_without_systems_the_table_says_so(tmp_path: Path) -> None:
    assert HOOK.systems(tmp_path) == "None is finished yet."


def test_a_system_without_recipe_or_departures_reads_well(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        'name = "X"\ntitle = "A|B"\nvenue = "V 1"\npaper = "p"\nfidelity = "code"\nfiles = ["f", "g"]\n'
    )
    row, _, heading, _, section = HOOK.systems(tmp_path).splitlines()[2:]
    assert row == r"| **X**: A\|B (V 1) | p | code | nothing yet |"
    assert (heading, section) == ("### X", "Recipe: none yet. Files: `f`, `g`.")


def test_a_systems_departures_and_lacks_stand_in_its_section(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        'name = "X"\ntitle = "A"\nvenue = "V 1"\npaper = "p"\nfidelity = "paper"\nrecipe = "r"\n'
        'files = ["f"]\nmeasured = "It holds."\ndepartures = ["One.", "Two."]\nlacks = ["Three."]\n'
    )
    text = HOOK.systems(tmp_path)
    assert "| paper | It holds. |" in text and "Recipe: `r`. Files: `f`." in text
    assert text.endswith("Departures:\n\n- One.\n- Two.\n\nNot here:\n\n- Three.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_systems_file_names_what_there_is(file: Path) -> None:
    told = tomllib.loads(file.read_text(encoding="utf-8"))
    assert told.keys() <= KEYS and KEYS - told.keys() <= {"recipe", "measured", "departures", "lacks"}
    assert ("recipe" in told) == ("measured" in told) == (ROOT / f"docs/claims/{file.stem}.md").exists()
    own = {home.replace(".", "/") + ".py": name for name, home in registry.names("method").items()}
    if told["files"][0] in own:
        assert registry.find("method", own[told["files"][0]]).card.fidelity == told["fidelity"]
    assert told["fidelity"] in ("paper", "code", "reconstruction")
    assert re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|10\.\d{4,9}/\S+", told["paper"])
    for path in [*told["files"], *([told["recipe"]] if "recipe" in told else [])]:
        assert (ROOT / path).is_file(), path
    for key in ("departures", "lacks"):
        assert all(sentence.endswith(".") for sentence in told.get(key, ["."])), key
    assert f"**{told['name']}**" in HOOK.systems(ROOT / "docs/systems")


def test_the_example_in_the_readme_is_a_systems_file() -> None:
    readme = (ROOT / "docs/systems/README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- the table -->") == 1
    (example,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert tomllib.loads(example).keys() == KEYS
