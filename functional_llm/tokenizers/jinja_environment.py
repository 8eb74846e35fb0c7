"""What chat templates may use beyond plain Jinja, and the marks of what a model generates."""

import json
import re
import secrets
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Templates write these around what stands in `{% generation %}`; they are taken out again. The
# number is another one in each process, so that no text can hold them.
_NUMBER = secrets.token_hex(8)
_START, _END = f"\ufdd0{_NUMBER}\ufdd1", f"\ufdd2{_NUMBER}\ufdd3"


def make_environment() -> jinja2.Environment:
    """Returns a sandbox with the functions, filters and tags that Transformers offers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def has_marks(tree: jinja2.nodes.Template) -> bool:
    """Whether a parsed template marks what the model generates."""
    return any(node.data == _START for node in tree.find_all(jinja2.nodes.TemplateData))


def take_marks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text without marks, and start and end of each place between two of them."""
    spans, text, start = [], "", None
    for part in re.split(f"({_START}|{_END})", rendered):
        if part == _START:
            start = len(text)
        elif part == _END and start is not None:
            spans.append((start, len(text)))
            start = None
        elif part != _END:
            text += part
    return text, spans


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's text for training; renders as its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = [_output(_START), *body, _output(_END)]
        return jinja2.nodes.Scope(marked, lineno=line)


def _output(text: str) -> jinja2.nodes.Output:
    return jinja2.nodes.Output([jinja2.nodes.TemplateData(text)])


# Jinja's own tojson escapes HTML and sorts keys; models were trained on plain JSON.
def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
