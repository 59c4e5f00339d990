"""`/docs`: the API's description for people, made from the OpenAPI document itself.

One page without scripts and without anything from elsewhere, so that it works where there is no
network, and cannot tell anything but what `/openapi.json` tells.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }
h1, h2 { font-weight: 600; }
h2 { margin-top: 2.5rem; text-transform: capitalize; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
details { padding: .4rem .8rem; }
summary { cursor: pointer; }
code, .verb { font-family: ui-monospace, monospace; font-size: .92em; }
.verb { display: inline-block; min-width: 3.2rem; font-weight: 700; }
.quiet { color: var(--quiet); }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; }
td { border-top: 1px solid var(--line); padding: .25rem .8rem .25rem 0; vertical-align: top; }
a { color: inherit; }
"""


def reference_page(described: dict[str, Any]) -> str:
    """The page for an OpenAPI document, as HTML."""
    info, schemas = described["info"], described["components"]["schemas"]
    groups: dict[str, list[str]] = {}
    for path, operations in described["paths"].items():
        for verb, operation in operations.items():
            group = (operation.get("tags") or ["more"])[0]
            groups.setdefault(group, []).append(_operation(path, verb, operation))
    body = [f"<h1>{escape(info['title'])} <span class=quiet>{escape(info['version'])}</span></h1>"]
    body.append(f"<p>{escape(info['description'])}</p>")
    body.append('<p class=quiet>For programs: <a href="openapi.json">openapi.json</a></p>')
    for group, operations in groups.items():
        body += [f"<h2>{escape(group)}</h2>", *operations]
    body.append("<h2>shapes</h2>")
    body += [_shape(name, schema) for name, schema in sorted(schemas.items())]
    title = f"<title>{escape(info['title'])}: the API</title>"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{title}'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}{view}<style>{STYLE}</style>" + "\n".join(body)


def _operation(path: str, verb: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"<code>{escape(parameter['name'])}</code>", _type(parameter["schema"]))
        for parameter in operation.get("parameters", ())
    ]
    content = operation.get("requestBody", {}).get("content", {})
    rows += [(f"body, {escape(kind)}", _type(one.get("schema"))) for kind, one in content.items()]
    for status, response in operation["responses"].items():
        kinds = " or ".join(
            _type(one.get("schema")) for one in response.get("content", {}).values()
        )
        rows.append((status, f"{escape(response['description'])} {kinds}"))
    head = f"<span class=verb>{verb.upper()}</span> <code>{escape(path)}</code>"
    return _details(f"{head} {_quiet(operation.get('description', ''))}", rows)


def _shape(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        (
            f"<code>{escape(field)}</code> {'' if field in required else _quiet('optional')}",
            f"{_type(value)} {escape(value.get('description', ''))} {_default(value)}",
        )
        for field, value in schema.get("properties", {}).items()
    ]
    head = f"<code>{escape(name)}</code> {_quiet(schema.get('description', ''))}"
    return _details(head, rows, f' id="{escape(name)}"')


def _details(head: str, rows: Sequence[tuple[str, str]], attributes: str = "") -> str:
    table = "".join(f"<tr><td>{left}<td>{right}" for left, right in rows)
    return f"<details{attributes}><summary>{head}</summary><table>{table}</table></details>"


def _quiet(text: str) -> str:
    return f"<span class=quiet>{escape(text)}</span>"


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    return "" if default is None else _quiet(f"by default {default}")


def _type(schema: Any) -> str:
    """A schema in a few words; shapes of their own are links."""
    return " | ".join(dict.fromkeys(_types(schema))) or "anything"


def _types(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        yield f'<a href="#{name}">{name}</a>'
    for branch in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _types(branch)
    if "const" in schema:
        yield f"<code>{escape(repr(schema['const']))}</code>"
    elif "enum" in schema:
        yield from (f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    elif schema.get("type") == "array":
        yield f"list of {_type(schema.get('items', {}))}"
    elif "type" in schema:
        yield escape(f"{schema['type']}{_bounds(schema)}")


def _bounds(schema: dict[str, Any]) -> str:
    words = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[name]:g}" for name, sign in words.items() if name in schema]
    return f" {', '.join(found)}" if found else ""
