"""The JSON schema says what recipe.py and the folders say. In tests/extras a validator judges it, too."""

import json
import re
from typing import Any

import pytest

from limbeck import recipe, registry, schema
from limbeck.board import Arms

RECIPE, BOARD = json.loads(schema.of_recipe()), json.loads(schema.of_board())
PARTS = RECIPE["$defs"]


def nodes(part: Any) -> list[dict[str, Any]]:
    """Every object within a schema, itself included."""
    inside = part if isinstance(part, list) else part.values() if isinstance(part, dict) else ()
    return [*([part] if isinstance(part, dict) else []), *(node for one in inside for node in nodes(one))]


def tables(part: str, key: str) -> dict[str, dict[str, Any]]:
    """name → the table of its knobs."""
    return {
        one["properties"][key]["const"]: one
        for one in PARTS[part]["anyOf"]
        if "const" in one.get("properties", {}).get(key, {})
    }


@pytest.mark.parametrize("whole", [RECIPE, BOARD], ids=["recipe", "board"])
def test_every_reference_leads_somewhere_and_no_part_is_idle(whole: dict[str, Any]) -> None:
    refs = {node["$ref"] for node in nodes(whole) if isinstance(node.get("$ref"), str)}
    for ref in refs:
        place: Any = whole
        for step in ref.removeprefix("#/").split("/"):
            place = place[step]
    assert {ref.split("/")[2] for ref in refs} == set(whole["$defs"])


@pytest.mark.parametrize(
    ("made", "part"),
    [
        (recipe.Stage, "Stage"),
        (recipe.Use, "Use"),
        (recipe.Net, "Net"),
        (recipe.Mean, "Mean"),
        (recipe.Group, "Group"),
        (recipe.Optim, "Optim"),
        (recipe.Made, "Made"),
        (recipe.Growth, "Growth"),
        (recipe.Source, "Source"),
    ],
)
def test_every_key_of_a_table_is_there(made: Any, part: str) -> None:
    keys = {field.alias or name for name, field in made.model_fields.items()}
    required = {field.alias or name for name, field in made.model_fields.items() if field.is_required()}
    assert set(PARTS[part]["properties"]) == keys
    assert set(PARTS[part].get("required", ())) == required


def test_the_roots_have_their_keys() -> None:
    assert set(RECIPE["properties"]) == set(recipe.Recipe.model_fields)
    assert set(BOARD["properties"]) == set(Arms.model_fields)
    assert RECIPE["additionalProperties"] is BOARD["additionalProperties"] is False
    assert set(BOARD["$defs"]["Arm"]["properties"]) == {*recipe.Stage.model_fields, "skip"}
    assert "required" not in BOARD["$defs"]["Arm"], "an arm says only what differs"


@pytest.mark.parametrize(
    ("kind", "part", "key"),
    [
        ("method", "term", "method"),
        ("model", "model", "name"),
        ("scheme", "scheme", "name"),
        ("data", "data", "name"),
        ("view", "view", "name"),
        ("task", "task", "name"),
        ("lens", "lens", "name"),
    ],
)
def test_every_name_of_a_kind_has_a_table_with_its_knobs(kind: str, part: str, key: str) -> None:
    found = tables(part, key)
    assert list(found) == list(registry.names(kind))
    for name, table in found.items():
        thing = registry.find(kind, name)
        knobs = set(registry.knobs(thing.staged if kind == "scheme" else thing)) - {"cast", "batch", "s", "t"}
        assert knobs <= set(table["properties"]), name
        assert table["additionalProperties"] is False
    if kind != "method":
        (names,) = [one["enum"] for one in PARTS[part]["anyOf"] if "enum" in one]
        assert names == list(found)
    patterns = [node["pattern"] for node in nodes(PARTS[part]) if "pattern" in node]
    assert patterns and all(re.search(p, "my.package:thing") and not re.search(p, "thing") for p in patterns)


def test_a_knob_has_its_type_its_default_and_its_words() -> None:
    kd = tables("term", "method")["kd"]["properties"]
    assert kd["temperature"] == {"type": "number", "default": 4.0}
    assert kd["weight"] == {"$ref": "#/$defs/Use/properties/weight"}
    ofd = tables("term", "method")["ofd"]["properties"]
    assert ofd["scale"]["description"].startswith("The sum over layers")
    assert ofd["taps"]["anyOf"][0]["type"] == "array" and ofd["taps"]["anyOf"][1] == {"const": "cluster"}
    assert kd["taps"]["anyOf"] == [False, {"const": "cluster"}], "any method's may be chosen by clustering"
    assert tables("model", "name")["cnn"]["required"] == ["name"], "the data fills in the classes"


def test_a_table_has_the_words_of_its_file() -> None:
    assert "arXiv:1503.02531" in tables("term", "method")["kd"]["description"]
    assert tables("model", "name")["resnet20"]["description"].startswith("ResNets for small images")


def test_a_key_has_the_words_of_its_docstring() -> None:
    stage = PARTS["Stage"]
    assert stage["description"] == "Somebody learns for some epochs. Without terms it is ordinary training."
    assert stage["properties"]["clip"]["description"] == "Largest norm of a player's gradient."
    assert stage["properties"]["augment"]["description"].startswith("Views of the whole batch")


def test_what_toml_has_not_and_what_only_repeats_is_left_out() -> None:
    assert not any(node.get("type") == "null" or node.get("default", "") is None for node in nodes(RECIPE))
    assert "title" not in PARTS["Stage"]["properties"]["epochs"]


@pytest.mark.parametrize(
    ("doc", "told"),
    [
        ("A thing.\n\na: one\n    two. b: three; c: four.", {"a": "One two.", "b": "Three.", "c": "Four."}),
        ("Args: a: one (or two). c: three", {"a": "One (or two).", "c": "Three."}),
        ("It says a: never mind", {}),
        ("d: is no key. a: is one.", {"a": "Is one."}),
        ("", {}),
    ],
)
def test_words_are_read_as_docstrings_give_them(doc: str, told: dict[str, str]) -> None:
    assert schema.words(doc, dict.fromkeys("abc")) == told


def test_a_thing_without_knobs_needs_no_words() -> None:
    assert schema.words("anything: at all.", {}) == {}
