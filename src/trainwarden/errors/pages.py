"""Read a condition's docstring as the page it is: a summary and the sections that every page has."""

from __future__ import annotations

SECTIONS = ("Why this happens", "What to do", "Example")


def dedent(docstring: str) -> str:
    """`docstring` without its common indentation (`inspect.cleandoc` without importing inspect)."""
    first, _, rest = docstring.expandtabs().partition("\n")
    lines = rest.split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join([first.strip(), *(line[margin:].rstrip() for line in lines)]).strip()


def summary_of(docstring: str) -> str:
    """The first paragraph, on one line."""
    return " ".join(dedent(docstring).partition("\n\n")[0].split())


def sections_of(docstring: str) -> dict[str, str]:
    """The text under each ``## Title`` heading, in order; headings inside code fences do not count."""
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    fenced = False
    for line in dedent(docstring).split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            current = sections.setdefault(line[3:].strip(), [])
        else:
            current.append(line)
    return {title: "\n".join(lines).strip() for title, lines in sections.items()}
