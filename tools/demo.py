"""Run the quickstart notebook without a browser, print what its cells show, and render it as a page: `make demo`."""

from __future__ import annotations

import pathlib
import textwrap

import nbclient
import nbconvert
import nbformat

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "notebooks" / "00-quickstart.ipynb"
PAGE = ROOT / "build" / "demo" / "00-quickstart.html"


def text_of(output: nbformat.NotebookNode) -> str:
    """What `output` would look like on a terminal."""
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return str(output.data.get("text/plain", ""))


def show(cell: nbformat.NotebookNode) -> None:
    """Print one executed code cell as a session at a prompt."""
    prompt = f"[{cell.execution_count}]: "
    print(prompt + textwrap.indent(cell.source, " " * len(prompt)).lstrip())
    for output in cell.outputs:
        print(textwrap.indent(text_of(output).rstrip(), "  "))
    print()


def main() -> None:
    """Run it; a cell that fails shows its error and the exit status is 1."""
    notebook = nbformat.read(SOURCE, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(SOURCE.parent)}}, on_cell_executed=lambda cell, **_: show(cell)
    )
    try:
        client.execute()
    finally:
        page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page, "utf-8")
    print(f"The rendered page: {PAGE}")


if __name__ == "__main__":
    main()
