"""What comes from a message, a name or a broker reaches the screen as text only: the other ways to a page are banned from the source."""

import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "broker_nb"
BANNED = re.compile(
    r"\b(?:HTML|Markdown|Latex|Math|SVG|Javascript|IFrame|HTMLMath|display_html|display_markdown|display_javascript)\("
    r"|\b(?:inner|outer)HTML\b|insertAdjacentHTML|document\.write|_repr_(?:html|markdown|svg|latex|javascript)_|text/(?:html|markdown)"
    r"|\btqdm\b"  # its notebook bar renders the description as HTML
)


def banned(text: str) -> list[str]:
    return BANNED.findall(text)


@pytest.mark.parametrize(
    "line",
    [
        "display(HTML(body))",
        "widgets.HTML(value=x)",
        "IPython.display.Markdown(topic)",
        "el.innerHTML = row",
        "def _repr_html_(self):",
        '{"text/html": page}',
        "from tqdm.auto import tqdm",
    ],
)
def test_the_ban_sees_what_it_bans(line: str) -> None:
    assert banned(line)


def test_nothing_in_the_package_renders() -> None:
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".js", ".ts") and "__pycache__" not in path.parts]
    assert len(sources) > 20
    found = [
        f"{path.name}:{n}: {line}" for path in sources for n, line in enumerate(path.read_text().splitlines(), 1) if banned(line)
    ]
    assert found == []
