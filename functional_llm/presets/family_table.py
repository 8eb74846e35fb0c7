"""The families of models as a table, which the README shows, too."""

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family
from functional_llm.graph.types import JSON
from functional_llm.presets.table import Table, preset_names, read_preset


class FamilyTable(Table):
    """Families, one a row; prints as a table.

    Args:
        rows: Dicts with the keys `family` (its `model_type`), `models`, `reads` and `writes` (the
            formats), `checked_with` (the weights that its numbers were compared with others' on),
            `presets` (how many there are) and `module`.
    """

    columns = ("family", "models", "reads", "writes", "checked_with", "presets")
    numbers = ("presets",)

    def to_markdown(self) -> str:
        """Returns the table for a page of the repository's root, with links to the files."""
        lines = ["| family | models | reads | checked with |", "|---|---|---|---|"]
        for row in self.rows:
            path = f"{row['module'].replace('.', '/')}.py"
            cells = (f"[{row['family']}]({path})", row["models"], row["reads"], row["checked_with"])
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def list_families() -> FamilyTable:
    """Returns the families there are: their models, their formats, what they were checked with.

    ```python
    flm.list_families()  # prints as a table
    [row["family"] for row in flm.list_families() if "GGUF" in row["reads"]]
    ```
    """
    names = [read_preset(name)["family"] for name in preset_names()]
    return FamilyTable(_row(family, names.count(name)) for name, family in FAMILIES.items())


def _row(family: Family, presets: int) -> JSON:
    reads = ["Hugging Face"]
    if family.wrappers:
        wrappers = ", ".join(f"`{wrapper.model_type}`" for wrapper in family.wrappers)
        reads[0] += f" (also in {wrappers})"
    if family.gguf_architecture is not None:
        names = (family.gguf_architecture, *family.other_gguf_architectures)
        reads.append(f"GGUF ({', '.join(f'`{name}`' for name in names)})")
    writes = ["Hugging Face"]
    if family.keras_hub is not None:
        reads.append("KerasHub")
        writes += [] if family.keras_hub.always_wrong else ["KerasHub"]
    return {
        "family": family.model_type,
        "models": family.models,
        "reads": ", ".join(reads),
        "writes": ", ".join(writes),
        "checked_with": family.real_weights or "tiny random weights",
        "presets": presets,
        "module": family.build.__module__,
    }
