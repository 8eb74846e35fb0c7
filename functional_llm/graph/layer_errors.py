"""In which layer an exception was raised: a note on it, with the path.

Nothing is done, and nothing costs time, while nothing fails.
"""

import re

from functional_llm.graph.keras_private import failed_operation

_NOTE = "In the layer '{}'."
_PATTERN = re.compile(r"In the layer '(.*)'\.")


def note_layer(error: BaseException, name: str) -> None:
    """Notes on an exception that it comes from inside a layer; to call where it passes by.

    The layers inside have noted their names already: these come behind.

    Args:
        error: The exception, just caught.
        name: The name of the layer with the graph in which it was raised.
    """
    path = noted_path(error)
    operation = failed_operation(error)
    if operation is not None and path.partition("/")[0] != operation.name:
        path = f"{operation.name}/{path}".rstrip("/")
    _set_note(error, f"{name}/{path}".rstrip("/"))


def note_path(error: BaseException, path: str) -> None:
    """Notes on an exception that it comes from the layer with this path, or from inside it."""
    name, _, inside = noted_path(error).partition("/")
    if name and name != path.rpartition("/")[2]:
        inside = f"{name}/{inside}".rstrip("/")
    _set_note(error, f"{path}/{inside}".rstrip("/"))


def keep_note(error: BaseException) -> None:
    """Puts the note on an exception that Keras has raised in the place of the one that has it."""
    path = noted_path(error)
    if path:
        _set_note(error, path)


def noted_path(error: BaseException) -> str:
    """Returns the path that was noted on an exception, `""` if there is none."""
    origin: BaseException | None = error
    while origin is not None:
        for note in getattr(origin, "__notes__", ()):
            found = _PATTERN.fullmatch(note)
            if found is not None:
                return found[1]
        # Keras raises another one of the same meaning "from None".
        origin = origin.__context__ if origin.__suppress_context__ else None
    return ""


def _set_note(error: BaseException, path: str) -> None:
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if not _PATTERN.fullmatch(note)]
    error.add_note(_NOTE.format(path))
