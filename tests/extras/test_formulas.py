"""Every formula of the generated pages becomes MathML, and nothing in it is taken for Markdown."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "docs/hooks/pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(hook: ModuleType, text: str) -> str:
    """The page as it is shown, Markdown aside."""
    file = SimpleNamespace(src_uri="methods/x.md", generated_by="limbeck")
    marked = hook.on_page_markdown(text, SimpleNamespace(file=file), None, None)
    assert "$$" not in marked
    return str(hook.on_page_content(marked, None, None, None))


def test_every_formula_of_every_page_is_drawn(hook: ModuleType) -> None:
    for path, text in hook.pages().items():
        page = shown(hook, text)
        assert page.count("<math") >= text.count("$$") // 2, path
        assert not re.search(r"⟦\d+⟧", page) and "$" not in re.sub(r"`[^`]*`", "", page), path


def test_formulas_are_drawn_in_line_and_displayed_and_code_is_left_alone(hook: ModuleType) -> None:
    page = shown(hook, "a $x_1 * y_2$ b `$x$` and\n\n$$\\arg\\max z$$")
    assert page.count('display="inline"') == page.count('display="block"') == 1
    assert "`$x$`" in page and "<mo>arg</mo>" in page


def test_a_command_that_is_not_known_is_said(hook: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"\\nonsense in \$x \\nonsense y\$ is not known"):
        hook.mathml(r"x \nonsense y", display=False)
