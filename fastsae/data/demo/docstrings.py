"""Take a docstring apart: sentences, code examples and the usual sections (Google, numpy and Sphinx styles)."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

_GOOGLE = re.compile(
    r"^(args|arguments|parameters|params|keyword args|keyword arguments|kwargs|inputs|attributes|returns?|yields?"
    r"|raises|examples?|usage|notes?|warnings?|shape|see also|references|todo)\s*::?\s*$",
    re.IGNORECASE,
)
_RULE = re.compile(r"^\s*[-=~^*]{3,}\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. *([\w:+-]+?)::(.*)$")
_DROPPED = {"math", "image", "figure", "plot", "seealso", "code-block", "code", "testcode", "testoutput", "testsetup"}
_DROPPED |= {"autosummary", "automodule", "autoclass", "autofunction", "currentmodule", "index", "table", "toctree"}
_DROPPED |= {"versionadded", "versionchanged", "list-table", "sourcecode", "ipython", "parsed-literal", "function"}
_ITEM = re.compile(
    r"^(\*{0,2}`{0,2}[A-Za-z_][\w.\-*`]*(?:, ?\*{0,2}`{0,2}[\w.*`]+)*)\s*(?:\(([^)]*)\))?\s*:(?:\s+(.*))?$"
)
_FIELD = re.compile(r"^[:@](param|parameter|arg|argument|keyword|returns?|raises?|raise)\s*([^:]*):\s*(.*)$")
_BULLET = re.compile(r"^(?:[-*+•]|\d+[.)])\s+(.*)$")
_SENTENCE = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)\s+(?=[A-Z`\"'(\[])")

_CODE = re.compile(r"\bdef \w+\(|(?:^|\s)# |>>>|``|\bself\.\w+ = |\bimport \w+ as |^return \w+[.(]")
_ROLE = re.compile(r":[a-zA-Z:+-]+:`[~!.]?([^`<]+?)\s*(?:<[^>`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>`]*>`_{1,2}")


@dataclass
class Docstring:
    """The parts of one docstring; `sentences` is the running text, the rest comes from its sections."""

    sentences: list[str] = field(default_factory=list)
    arguments: list[tuple[str, str, str]] = field(default_factory=list)  # name, type (or ""), description
    returns: str = ""
    errors: list[tuple[str, str]] = field(default_factory=list)  # exception, when
    examples: list[str] = field(default_factory=list)


def clean(text: str) -> str:
    """One line of plain text: reStructuredText roles, links and emphasis removed, whitespace normalised."""
    text = _ROLE.sub(r"`\1`", text)
    text = _LINK.sub(r"\1", text)
    text = re.sub(r"`([^`]+)`_\b", r"\1", text).replace("``", "`").replace("**", "").replace("\\ ", " ")
    text = re.sub(r"\s*\[\d+\]_", "", text)
    text = re.sub(r"::(?=\s|$)", ":", text)
    return " ".join(text.split())


def sentences_of(text: str) -> list[str]:
    """Split cleaned text at sentence ends."""
    return [s for s in _SENTENCE.split(text) if s]


def is_prose(text: str, share: float = 0.7) -> bool:
    """Whether at least `share` of a line are letters and spaces: a sentence, not a table, a formula or a banner."""
    if _CODE.search(text):
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) > 2 and letters >= share * len(text) and "....." not in text and "-----" not in text


def parse_docstring(doc: str) -> Docstring:
    """Parse a raw docstring; never raises, what it does not recognise stays running text."""
    out = Docstring()
    for title, lines, style in _sections(inspect.cleandoc(doc).expandtabs().splitlines()):
        if title in {
            "args",
            "arguments",
            "parameters",
            "params",
            "keyword args",
            "keyword arguments",
            "kwargs",
            "inputs",
        }:
            out.arguments += [(n, t, d) for n, t, d in _items(lines, style) if d]
        elif title in {"other parameters", "attributes"}:
            out.arguments += [(n, t, d) for n, t, d in _items(lines, style) if d and title != "attributes"]
        elif title in {"returns", "return", "yields", "yield"}:
            out.returns = out.returns or _returns(lines, style)
        elif title in {"raises", "raise"}:
            out.errors += [(n, d) for n, _, d in _items(lines, style) if re.fullmatch(r"[\w.]+", n)]
        elif title in {"", "note", "notes", "warning", "warnings", "example", "examples", "usage", "shape"}:
            _running_text(lines, out)
    return out


def _sections(lines: list[str]) -> list[tuple[str, list[str], str]]:
    """Cut into (lower-case title, dedented lines, style); title "" is running text, style "google" or "numpy"."""
    found: list[tuple[str, list[str], str]] = [("", [], "google")]
    indent = -1  # of the Google header whose indented block is being read; -1: none
    i = 0
    while i < len(lines):
        line = lines[i]
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if bare and i + 1 < len(lines) and _RULE.match(lines[i + 1]) and not _RULE.match(line) and len(bare) < 40:
            found.append((bare.lower().rstrip(":"), [], "numpy"))
            indent, i = -1, i + 2
            continue
        header = _GOOGLE.match(bare)
        if header and depth <= 4 and (indent < 0 or depth <= indent):
            found.append((header.group(1).lower(), [], "google"))
            indent = depth
        elif indent >= 0 and bare and depth <= indent:
            found.append(("", [line], "google"))
            indent = -1
        else:
            found[-1][1].append(line)
        i += 1
    return [(title, inspect.cleandoc("\n" + "\n".join(body)).splitlines(), style) for title, body, style in found]


def _items(lines: list[str], style: str) -> list[tuple[str, str, str]]:
    """The (name, type, description) items of an argument, return or error section."""
    items: list[tuple[str, str, list[str]]] = []
    for line in lines:
        bare = line.strip()
        if line[:1].strip():
            match = _ITEM.match(bare)
            if style == "numpy":
                name, _, kind = bare.partition(" : ")
                items.append((name, kind, []))
            elif match:
                items.append((match.group(1), match.group(2) or "", [match.group(3) or ""]))
            elif items:
                items[-1][2].append(bare)
        elif items and not _DIRECTIVE.match(line):
            items[-1][2].append(bare)
    result = []
    for name, kind, text in items:
        description = " ".join(s for s in sentences_of(clean(" ".join(text))) if is_prose(s, 0.5))
        result.append((clean(name).strip("`* "), clean(kind).removeprefix("of "), description))
    return result


def _returns(lines: list[str], style: str) -> str:
    if style == "numpy":
        parts = [f"`{n}` ({t}): {d}" if t else f"`{n}`: {d}" for n, t, d in _items(lines, style) if d]
        return " ".join(parts)
    text = clean(" ".join(line for line in lines if not _DIRECTIVE.match(line)))
    return " ".join(s for s in sentences_of(text) if is_prose(s, 0.5))


def _paragraphs(lines: list[str]) -> list[list[str]]:
    """Blank-line separated paragraphs, without comment directives and without the bodies of dropped ones."""
    result: list[list[str]] = [[]]
    skip = -1  # indent of a dropped directive whose body is being skipped
    for line in lines:
        bare = line.strip()
        depth = len(line) - len(line.lstrip())
        if skip >= 0 and (not bare or depth > skip):
            continue
        skip = -1
        directive = _DIRECTIVE.match(line)
        if bare.startswith(".. ") or directive:
            name = directive.group(1).lower() if directive else ""
            if not directive or name in _DROPPED:
                skip = depth
                continue
            result.append([" " * depth + directive.group(2).strip()] if directive.group(2).strip() else [])
        elif not bare:
            result.append([])
        else:
            result[-1].append(line)
    return [p for p in result if p]


def _running_text(lines: list[str], out: Docstring) -> None:
    """Add the paragraphs of running text to `out`: prose to sentences, doctests and literal blocks to examples."""
    literal = -1  # indent of the paragraph that ended in "::"; deeper ones are code
    for paragraph in _paragraphs(lines):
        depth = len(paragraph[0]) - len(paragraph[0].lstrip())
        first = paragraph[0].strip()
        if first.startswith(">>>") or (literal >= 0 and depth > literal):
            code = inspect.cleandoc("\n" + "\n".join(paragraph))
            if first.startswith(">>>") and out.examples and len(out.examples[-1]) + len(code) < 240:
                out.examples[-1] += "\n" + code
            else:
                out.examples.append(code)
            continue
        literal = depth if paragraph[-1].rstrip().endswith("::") else -1
        field_match = _FIELD.match(first)
        if field_match:
            _sphinx_fields(paragraph, out)
            continue
        units: list[list[str]] = [[]]
        for line in paragraph:
            bullet = _BULLET.match(line.strip())
            if bullet:
                units.append(["- " + bullet.group(1)])
            elif line.strip().startswith(">>>"):
                break
            else:
                units[-1].append(line)
        for unit in units:
            sentences = [s for s in sentences_of(clean(" ".join(unit))) if is_prose(s)]
            if unit and unit[0].startswith("- ") and sentences and sentences[0].startswith("- "):
                sentences = [" ".join(sentences)]  # an item of a list stays whole
            out.sentences += sentences


def _sphinx_fields(paragraph: list[str], out: Docstring) -> None:
    fields: list[list[str]] = []
    for line in paragraph:
        if _FIELD.match(line.strip()):
            fields.append([line.strip()])
        elif fields:
            fields[-1].append(line.strip())
    for lines in fields:
        match = _FIELD.match(clean_field := " ".join(lines))
        if not match or not clean_field:
            continue
        kind, name, text = match.group(1), match.group(2).strip(), clean(match.group(3))
        if kind.startswith("return"):
            out.returns = out.returns or text
        elif kind.startswith("raise") and name:
            out.errors.append((name, text))
        elif name and text:
            out.arguments.append((name.split()[-1], "", text))
