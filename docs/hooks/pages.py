"""Pages made from the code when MkDocs builds: methods, lenses, schemes, models, the table of systems.

None of them is committed. Formulas become MathML, which browsers draw by themselves: no script, no network.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck import registry, schema

ROOT = Path(__file__).parents[2]
SYSTEMS = ROOT / "docs/systems"
GROUPS = {
    "response": "Response: what the teacher answers",
    "feature": "Feature: what it shows inside",
    "relation": "Relation: how rows lie to one another",
}

# What latex2mathml does not know, in words that it does.
SPELT = {r"\arg\max": r"\operatorname{arg}\max", r"\Big\lVert": r"\lVert", r"\Big\rVert": r"\rVert"}


# --- what MkDocs calls ---

_formulas: list[str] = []


def on_config(config: Any) -> Any:
    """The generated pages take their place in the navigation."""
    for entry in config["nav"]:
        if entry == {"Methods": "methods/index.md"}:
            by_group = {group.title(): _listed("methods", methods(group)) for group in GROUPS}
            lenses = {"Lenses": _listed("methods", registry.names("lens"))}
            entry["Methods"] = [
                "methods/index.md",
                *({title: pages} for title, pages in by_group.items()),
                lenses,
            ]
        if entry == {"Schemes": "schemes/index.md"}:
            entry["Schemes"] = ["schemes/index.md", *_listed("schemes", registry.names("scheme"))]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Formulas of generated pages leave a mark, so that nothing in them is taken for Markdown."""
    if page.file.src_uri == "systems/README.md":
        return markdown.replace("<!-- the table -->", systems(SYSTEMS))
    if page.file.generated_by is None:
        return markdown

    def mark(formula: re.Match[str]) -> str:
        _formulas.append(mathml(formula[1] or formula[2], display=formula[1] is not None))
        return f"⟦{len(_formulas) - 1}⟧"

    return re.sub(r"\$\$(.+?)\$\$|(?<![`$])\$([^$`]+?)\$", mark, markdown, flags=re.DOTALL)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return re.sub(r"⟦(\d+)⟧", lambda mark: _formulas[int(mark[1])], html)


def _listed(folder: str, names: Any) -> list[dict[str, str]]:
    return [{name: f"{folder}/{name}.md"} for name in names]


# --- the pages ---


def pages() -> dict[str, str]:
    """path → Markdown."""
    made = {"methods/index.md": methods_index(), "schemes/index.md": schemes_index(), "models.md": models()}
    for kind, folder in (("method", "methods"), ("lens", "methods"), ("scheme", "schemes")):
        made |= {f"{folder}/{name}.md": page(kind, name) for name in registry.names(kind)}
    return made


def methods(group: str) -> list[str]:
    return [
        name for name in registry.names("method") if registry.find("method", name).card.knowledge[0] == group
    ]


def page(kind: str, name: str) -> str:
    """A method's, a lens' or a scheme's page: its docstring, its card, its knobs, its functions."""
    found, module = registry.find(kind, name), registry.names(kind)[name]
    parts = [f"# {name}", _text(sys.modules[module].__doc__ or "")]
    if kind == "method":
        parts.append(_card(found.card))
    if kind == "lens":
        parts += [
            "## In a recipe",
            f'`through = ["{name}"]` on a term: what its method is shown, this changes.',
        ]
    else:
        factory = found.staged if kind == "scheme" else found
        parts += ["## Knobs", _knobs(factory, f"{found.__doc__ or ''}\n{factory.__doc__ or ''}")]
        key = "method" if kind == "method" else "name"
        use = f'{{ {key} = "{name}"{"".join(f", {knob}" for knob in _example(factory))} }}'
        parts += [f"In a recipe, with the defaults: `{'scheme = ' if kind == 'scheme' else ''}{use}`"]
    functions = list(_functions(_source(module)))
    if functions:
        parts += ["## Functions", f"From `{module}`:", *functions]
    return "\n\n".join([*parts, f"Source: `{_file(module)}`", ""])


def methods_index() -> str:
    parts = [
        "# Methods",
        "Each is one file: paper, equation, departures, function, class. `limbeck list` prints this table.",
    ]
    for group, title in GROUPS.items():
        rows = [("method", "year", "paper", "taps", "needs", "in a line")]
        for name in methods(group):
            found = registry.find("method", name)
            card, line = found.card, _first_line(found.__doc__)
            needs = ", ".join(sorted(card.needs))
            taps = ", ".join(card.taps)
            rows.append((f"[{name}]({name}.md)", str(card.year), card.paper, taps, needs, line))
        parts += [f"## {title}", _table(rows)]
    lenses = [(f"[{n}]({n}.md)", _citation(module)) for n, module in _found("lens")]
    return "\n\n".join([*parts, "## Lenses", _table([("lens", "what it changes"), *lenses]), ""])


def schemes_index() -> str:
    rows = [(f"[{name}]({name}.md)", _citation(module)) for name, module in _found("scheme")]
    intro = 'Who learns, whose turn it is, and what ships: `scheme = "NAME"` on a recipe\'s stage.'
    return "\n\n".join(["# Schemes", intro, _table([("scheme", "what it is"), *rows]), ""])


def models() -> str:
    parts = ["# Models", "A recipe names a model, or gives the path of yours: `package.module:factory`."]
    by_file: dict[str, list[str]] = {}
    for name, module in _found("model"):
        by_file.setdefault(module, []).append(name)
    for module, names in by_file.items():
        names_shown = ", ".join(f"`{name}`" for name in names)
        doc = _text(sys.modules[module].__doc__ or "")
        parts += [f"## {module.rpartition('.')[2]}", names_shown, doc, f"Source: `{_file(module)}`"]
    return "\n\n".join([*parts, ""])


def systems(folder: Path) -> str:
    """Published systems, from a toml file each: a table of what came out, and a section on each below it."""
    files = sorted(folder.glob("*.toml"))
    told = {file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in files}
    if not told:
        return "None is finished yet."
    rows, sections = [("system", "paper", "fidelity", "what we measured")], []
    for stem, one in told.items():
        name = f"**{one['name']}**: {one['title']} ({one['venue']})"
        page = f" [More](../claims/{stem}.md)" if (folder.parent / f"claims/{stem}.md").exists() else ""
        rows.append((name, one["paper"], one["fidelity"], one.get("measured", "nothing yet") + page))
        recipe = f"`{one['recipe']}`" if "recipe" in one else "none yet"
        made_of = ", ".join(f"`{file}`" for file in one["files"])
        sections += [f"### {one['name']}", f"Recipe: {recipe}. Files: {made_of}."]
        for key, title in (("departures", "Departures"), ("lacks", "Not here")):
            if key in one:
                sections.append("\n".join([f"{title}:", "", *(f"- {sentence}" for sentence in one[key])]))
    return "\n\n".join([_table(rows), *sections])


# --- their parts ---


def mathml(latex: str, display: bool) -> str:
    """What a browser draws. Raises ValueError for a command that would be shown as it is written."""
    from latex2mathml.converter import convert

    for word, spelt in SPELT.items():
        latex = latex.replace(word, spelt)
    made: str = convert(latex, display="block" if display else "inline")
    if unknown := re.search(r"\\[A-Za-z]+", made):
        raise ValueError(f"{unknown[0]} in ${latex}$ is not known; add it to SPELT in docs/hooks/pages.py")
    return made


def _text(doc: str) -> str:
    """A docstring as Markdown, where a list wants an empty line before it."""
    return re.sub(r"(?m)^(?![ -])(.+)\n(?=- )", r"\1\n\n", doc.strip())


def _card(card: Any) -> str:
    rows = [
        ("paper", f"{card.paper} ({card.year})"),
        ("teaches", ", ".join(card.knowledge)),
        ("fidelity", card.fidelity),
        ("taps", ", ".join(f"`{tap}`" for tap in card.taps) or "none"),
        ("needs", ", ".join(sorted(card.needs)) or "nothing special"),
        ("a batch may be cut", "yes" if card.per_sample else "no: it compares rows"),
        ("order of rows", "does not matter" if card.order_free else "matters"),
        ("0 at a perfect match", "yes" if card.zero_at_match else "not promised"),
    ]
    return _table([("card", ""), *rows])


def _knobs(factory: Any, doc: str) -> str:
    known = {name: knob for name, knob in registry.knobs(factory).items() if name != "cast"}
    if not known:
        return "None."
    told = schema.words(doc, known)
    rows = [
        (f"`{n}`", f"`{k.default!r}`", f"`{_type(k.annotation)}`", told.get(n, "")) for n, k in known.items()
    ]
    return _table([("knob", "default", "type", "what it is"), *rows])


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _example(factory: Any) -> Iterator[str]:
    for name, knob in registry.knobs(factory).items():
        if isinstance(knob.default, bool):
            yield f"{name} = {str(knob.default).lower()}"
        elif isinstance(knob.default, int | float):
            yield f"{name} = {knob.default:g}"


def _functions(source: str) -> Iterator[str]:
    """Public functions: their signatures, with shapes, and their docstrings."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
            yield f"```python\n{signature}\n```\n\n{ast.get_docstring(node) or ''}"


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _found(kind: str) -> Iterator[tuple[str, str]]:
    """(name, module), the module imported."""
    for name, module in registry.names(kind).items():
        registry.find(kind, name)
        yield name, module


def _citation(module: str) -> str:
    return " ".join((sys.modules[module].__doc__ or "").strip().partition("\n\n")[0].split())


def _first_line(doc: str | None) -> str:
    return " ".join((doc or "").strip().partition("\n\n")[0].split())


def _source(module: str) -> str:
    return (ROOT / _file(module)).read_text(encoding="utf-8")


def _file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"
