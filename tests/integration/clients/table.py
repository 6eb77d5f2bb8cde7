"""Makes the table of docs/CLIENTS.md from drivers.py: prints it, or with --write puts it into the page."""
import pathlib
import sys

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from clients.drivers import ALWAYS_NONE, BUGS, CLIENTS, FEATURES
from harness import ROOT

PAGE = ROOT / "docs/CLIENTS.md"
BEGIN, END = "<!-- made by tests/integration/clients/table.py -->\n", "<!-- end -->\n"


def text() -> str:
    notes: dict[str, int] = {}

    def note(why: str) -> str:
        return str(notes.setdefault(why, len(notes) + 1))
    lines = ["| | " + " | ".join(c.name for c in CLIENTS.values()) + " |", "|---" * (len(CLIENTS) + 1) + "|"]
    for feature, what in FEATURES.items():
        cells = []
        for c in CLIENTS.values():
            if c.cannot.get(feature) == ALWAYS_NONE:
                cells.append("in by `none`")
            elif feature in c.cannot:
                cells.append(f"no ({note(c.cannot[feature])})")
            elif (c.name, feature) in BUGS:
                cells.append(f"not yet ({note(BUGS[c.name, feature])})")
            elif feature in c.remarks:
                cells.append(f"yes ({note(c.remarks[feature])})")
            else:
                cells.append("yes")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{number}. {why}" for why, number in notes.items()]
    lines += ["", "The clients: " + "; ".join(f"**{c.name}** is {c.title}" for c in CLIENTS.values()) + ".", ""]
    return "\n".join(lines)


def page_is_current() -> bool:
    page = PAGE.read_text()
    return page[page.index(BEGIN) + len(BEGIN):page.index(END)] == text()


if __name__ == "__main__":
    if "--write" in sys.argv:
        page = PAGE.read_text()
        PAGE.write_text(page[:page.index(BEGIN) + len(BEGIN)] + text() + page[page.index(END):])
    else:
        print(text())
