"""The JSON schema of recipes and boards, for editors: what keys there are, what they mean, what they may be.

It is made from the models in recipe.py, their docstrings, and what the folders hold. What depends on another
key (that a teacher is a model of this recipe) it cannot say; `limbeck show` does.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from limbeck import recipe, registry
from limbeck.board import Arms
from limbeck.equation import FILLED_IN

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
OUTSIDE = {"type": "string", "pattern": "^[^:]+:.+$", "description": "Your own: package.module:name"}


def of_recipe() -> str:
    return _text("Recipe", "A recipe of limbeck")


def of_board() -> str:
    return _text("Arms", "A board of limbeck")


def _text(root: str, title: str) -> str:
    parts = _parts()
    whole = {"$schema": DIALECT, **parts[root], "title": title}
    needed = {name: parts[name] for name in _needed(whole, parts)}
    return json.dumps({**whole, "$defs": dict(sorted(needed.items()))}, indent=2, ensure_ascii=False)


def _parts() -> dict[str, Schema]:
    """Every table of a recipe or a board by name, and what may stand in each place."""
    roots: list[tuple[Any, Any]] = [(recipe.Recipe, "validation"), (Arms, "validation")]
    parts: dict[str, Schema] = models_json_schema(roots, schema_generator=_Plain)[1]["$defs"]
    for name, part in parts.items():
        _describe(part, inspect.getdoc(vars(recipe).get(name, Arms)) or "")

    stage, use = parts["Stage"]["properties"], parts["Use"]["properties"]
    parts["Recipe"]["properties"] |= {
        "data": _ref("data"),
        "task": _ref("task") | {"default": "classify"},
        "models": {"type": "object", "additionalProperties": _ref("model")},
    }
    stage["scheme"] = _ref("scheme") | {"default": "offline"}
    stage["task"] = _ref("task")
    stage["terms"] |= {"items": _ref("term")}
    use["teacher"] = {"anyOf": [{"type": "string"}, use["teacher"]], "default": "teacher"}
    for place in (stage, use, parts["Net"]["properties"], parts["Mean"]["properties"]):
        for key, kind in (("view", "view"), ("augment", "view"), ("through", "lens")):
            if key in place:
                said = {word: place[key][word] for word in ("description",) if word in place[key]}
                place[key] = said | _in_order(kind)
    parts["Recipe"]["properties"]["tests"] |= {"additionalProperties": _in_order("view")}

    parts |= {
        "data": _one_of("data", "Source", parts),
        "model": _one_of("model", "Net", parts, "Mean", "Group", "Kept"),
        "scheme": _one_of("scheme", "Named", parts),
        "view": _one_of("view", "Named", parts),
        "task": _one_of("task", "Named", parts),
        "lens": _one_of("lens", "Named", parts),
        "term": {"anyOf": [*_name("method")["anyOf"], *_tables("method", "Use", parts)]},
    }
    last = {name: value for name, value in parts["Stage"].items() if name != "required"}
    last["properties"] = {**last["properties"], "skip": {"const": True}}
    about = "What this arm's stage does differently; { skip = true } leaves it out."
    parts["Arm"] = last | {"description": about}
    parts["Arms"]["properties"] |= {
        "recipe": _file_or("A recipe's file.", _ref("Recipe")),
        "arms": _file_or(
            "A file whose arms are taken.", {"type": "object", "additionalProperties": _ref("Arm")}
        ),
    }
    return parts


# --- things by name, with their knobs ---


def _in_order(kind: str) -> Schema:
    """One, or several one after the other."""
    return {"anyOf": [_ref(kind), {"type": "array", "items": _ref(kind)}]}


def _name(kind: str) -> Schema:
    return {"anyOf": [{"enum": list(registry.names(kind))}, OUTSIDE]}


def _one_of(kind: str, table: str, parts: Mapping[str, Schema], *others: str) -> Schema:
    """A name, or a table with its knobs; or one of the other tables."""
    return {"anyOf": [*_name(kind)["anyOf"], *_tables(kind, table, parts), *map(_ref, others)]}


def _tables(kind: str, table: str, parts: Mapping[str, Schema]) -> list[Schema]:
    """`table` once for each thing of a kind, with that one's knobs, and once for what is outside."""
    shape = parts[table]
    key = "method" if kind == "method" else "name"
    shared = {name: _ref(f"{table}/properties/{name}") for name in shape["properties"] if name != key}
    each = []
    for name in registry.names(kind):
        knobs, required = _knobs(kind, registry.find(kind, name))
        if kind == "method":
            knobs["taps"] = {"anyOf": [knobs.get("taps", False), {"const": "cluster"}]}
        each.append(
            {
                "title": name,
                "description": _about(kind, name),
                "type": "object",
                "properties": {key: {"const": name}, **knobs, **shared},
                "required": [key, *required],
                "additionalProperties": False,
            }
        )
    outside = {"title": f"{kind} of your own", "type": "object", "properties": {key: OUTSIDE, **shared}}
    return [*each, {**outside, "required": [key]}]


def _about(kind: str, name: str) -> str:
    """The first paragraph of the file's docstring: a method's paper."""
    return " ".join((sys.modules[registry.names(kind)[name]].__doc__ or "").partition("\n\n")[0].split())


def _knobs(kind: str, found: Any) -> tuple[dict[str, Schema], list[str]]:
    """A schema for each knob, and the knobs that must be given."""
    factory = found.staged if kind == "scheme" else found
    named = factory.func if isinstance(factory, partial) else factory
    told = words(inspect.getdoc(named) or "", registry.knobs(factory))
    knobs, required = {}, []
    for name, parameter in registry.knobs(factory).items():
        filled = name in FILLED_IN.get(kind, ())
        if filled and kind != "model":
            continue
        knobs[name] = _of_annotation(parameter) | ({"description": told[name]} if name in told else {})
        if parameter.default not in (parameter.empty, None):
            knobs[name]["default"] = parameter.default
        elif parameter.default is parameter.empty and not filled:
            required.append(name)
    return knobs, required


def _of_annotation(parameter: inspect.Parameter) -> Schema:
    """Of any value, where the type cannot be said in JSON."""
    if parameter.annotation is parameter.empty:
        return {}
    try:
        return TypeAdapter(parameter.annotation).json_schema(schema_generator=_Plain)
    except (PydanticSchemaGenerationError, ValueError, NameError):
        return {}


# --- what docstrings say ---


def _describe(part: Schema, doc: str) -> None:
    """A table's own words, and each key's, which its docstring gives as `key: words.`"""
    told = words(doc, part["properties"])
    part["description"] = " ".join(doc.partition("\n\n")[0].split())
    for key, said in told.items():
        part["properties"][key]["description"] = said


def words(doc: str, names: Mapping[str, Any]) -> dict[str, str]:
    """What a docstring says of each of the names, where it says `name: words.`"""
    text = " ".join(doc.split())
    starts = re.compile(rf"(?:^|(?<=[.;)] )|(?<=Args: ))({'|'.join(map(re.escape, names)) or '(?!)'}): ")
    _, *parts = starts.split(text)
    return {name: _sentence(said) for name, said in zip(parts[::2], parts[1::2], strict=True)}


def _sentence(said: str) -> str:
    said = said.strip(" ;.")
    return said[:1].upper() + said[1:] + "."


# --- JSON schema as such ---


class _Plain(GenerateJsonSchema):
    """As pydantic makes it, without titles that only repeat a key, and without null, which TOML has not."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().default_schema(schema)
        return {key: value for key, value in made.items() if key != "default" or value is not None}


def _ref(path: str) -> Schema:
    return {"$ref": f"#/$defs/{path}"}


def _file_or(said: str, schema: Schema) -> Schema:
    return {"anyOf": [{"type": "string", "description": said}, schema]}


def _needed(schema: Any, parts: Mapping[str, Schema]) -> set[str]:
    """The parts that a schema refers to, at any depth."""
    found, new = set[str](), set(_refs(schema))
    while new:
        found |= new
        new = {ref for name in new for ref in _refs(parts[name])} - found
    return found


def _refs(schema: Any) -> Iterator[str]:
    for part in schema if isinstance(schema, list) else schema.values() if isinstance(schema, dict) else ():
        yield from _refs(part)
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"].split("/")[2]
