"""What the JSON of a request may be: one description that is checked and published.

A schema is a subset of JSON Schema: `type`, `items`, `minItems`, `properties`, `required`, `anyOf`,
`enum`, `minimum`, `minLength`, `description`. The server checks bodies by it, and `openapi.py`
shows it, so that the two cannot differ.
"""

import json
from collections.abc import Mapping
from typing import Any

from rmjax.errors import shortened

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
TEXTS: Schema = {"type": "array", "items": TEXT}
SAID: Schema = {"type": "string", "minLength": 1}
ALL_SAID: Schema = {"type": "array", "items": SAID}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": SAID},
    "description": "as the model's chat template takes it: role, content, tool_calls and others",
}
TOOLS: Schema = {"type": "array", "items": {"type": "object"}}
MESSAGES: Schema = {"type": "array", "items": MESSAGE, "minItems": 1}
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def optional(schema: Schema, description: str = "") -> Schema:
    """A field that may be null, as clients write what they leave out."""
    found: Schema = {"anyOf": [schema, {"type": "null"}]}
    return found | {"description": description} if description else found


def one_of(*schemas: Schema, description: str = "") -> Schema:
    """A field of several forms."""
    found: Schema = {"anyOf": list(schemas)}
    return found | {"description": description} if description else found


def record(
    required: Mapping[str, Schema], others: Mapping[str, Schema] | None = None, title: str = ""
) -> Schema:
    """An object with these fields; fields that it does not name are passed over."""
    found: Schema = {"type": "object", "properties": {**required, **(others or {})}}
    if required:
        found["required"] = list(required)
    return found | {"title": title} if title else found


def problem(value: Any, schema: Schema) -> tuple[str, str] | None:
    """The first field that is not as a schema says, and what is wrong with it; None if all are.

    Args:
      value: parsed JSON.
      schema: see the top of this file.
    """
    return _problem(value, schema, "")


def _problem(value: Any, schema: Schema, where: str) -> tuple[str, str] | None:
    if "anyOf" in schema:
        found = [_problem(value, each, where) for each in schema["anyOf"]]
        if None in found:
            return None
        # Of forms that the value nearly has, what is wrong inside says more; so does "is empty".
        deeper = [e for e in found if e and (e[0] != where or not e[1].startswith("expected"))]
        return deeper[0] if deeper else (where, f"expected {_named(schema)}, found {_kind(value)}")
    kind = schema.get("type")
    if kind and not _is(value, kind):
        return where, f"expected {_named(schema)}, found {_kind(value)}"
    if "enum" in schema and not _is_one_of(value, schema["enum"]):
        return where, f"expected {_named(schema)}, found {_kind(value)}"
    if "minimum" in schema and value < schema["minimum"]:
        return where, f"expected at least {schema['minimum']}, found {value}"
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        return where, "is an empty text"
    if isinstance(value, list):
        return _of_items(value, schema, where)
    if isinstance(value, dict):
        return _of_fields(value, schema, where)
    return None


def _of_items(value: list[Any], schema: Schema, where: str) -> tuple[str, str] | None:
    if len(value) < schema.get("minItems", 0):
        return where, "is an empty list"
    items = schema.get("items")
    for number, item in enumerate(value if items else []):
        found = _problem(item, items or {}, f"{where}[{number}]")
        if found:
            return found
    return None


def _of_fields(value: dict[str, Any], schema: Schema, where: str) -> tuple[str, str] | None:
    for name in schema.get("required", ()):
        if name not in value:
            return where, f"the field {name!r} is missing"
    for name, each in schema.get("properties", {}).items():
        if name in value:
            found = _problem(value[name], each, f"{where}.{name}" if where else name)
            if found:
                return found
    return None


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # which is an integer to Python
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):  # 3.0 is one to JSON Schema
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _is_one_of(value: Any, choices: list[Any]) -> bool:
    """Whether JSON's value is one of these; 1 and true are two."""
    return any(
        value == each and isinstance(value, bool) is isinstance(each, bool) for each in choices
    )


def _named(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(_named(each) for each in schema["anyOf"])
    if schema.get("type") == "array" and "items" in schema:
        return f"a list, each {_named(schema['items'])}"
    names = {"string": "a text", "integer": "a whole number", "number": "a number"}
    names |= {"boolean": "true or false", "array": "a list", "object": "an object"}
    kind: str = schema.get("type", "anything")
    return names.get(kind, kind)


def _kind(value: Any) -> str:
    if isinstance(value, str | int | float | bool) or value is None:
        return shortened(repr(value), 40)
    return f"{type(value).__name__} of {len(value)}"
