"""Read the docstrings of Python sources with `ast`: one `Entry` per documented module, class, function or method.

Nothing is imported or executed. Also read are the docstrings that torch and numpy attach to their C functions with
`add_docstr` and `add_newdoc` calls.
"""

from __future__ import annotations

import ast
import gc
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastsae.data.demo.docstrings import clean, parse_docstring

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "_test", "testing", "site-packages", "dist-packages", "lib2to3"}
_SKIPPED_FOLDERS |= {"__pycache__", "_vendor", "_vendored_packaging", "pydoc_data", "ensurepip", "turtledemo"}
_MAX_FILE_BYTES = 2_000_000
_ATTACHERS = ("torch", "numpy")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """One documented module, class, function, method or property."""

    module: str  # "torch.nn.functional"
    name: str  # qualified inside the module, "Linear.forward"; "" for the module itself
    kind: str  # module, class, function, method, property
    signature: str = ""  # "(input, dim=None)", without self
    sentences: list[str] = field(default_factory=list)  # running text; items of lists start with "- "
    arguments: list[list[str]] = field(default_factory=list)  # [name, type or "", description]
    returns: str = ""
    errors: list[list[str]] = field(default_factory=list)  # [exception, when], as documented
    raised: list[list[str]] = field(default_factory=list)  # [exception, message or ""], as the code raises them
    examples: list[str] = field(default_factory=list)  # code blocks
    members: list[str] = field(default_factory=list)  # public names that a class or module defines
    bases: list[str] = field(default_factory=list)  # of a class

    @property
    def full_name(self) -> str:
        """The dotted name, module included."""
        return f"{self.module}.{self.name}" if self.name else self.module


def read_sources(root: Path, prefix: str) -> Iterator[Entry]:
    """Entries of every readable `*.py` below `root`, whose modules are named `prefix` + path; sorted by path."""
    for path in sorted(_source_files(root)):
        parts = [*([prefix] if prefix else []), *path.relative_to(root).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        yield from read_file(path, ".".join(parts))


def read_file(path: Path, module: str) -> list[Entry]:
    """Entries of one source file; a file that cannot be read or parsed has none."""
    try:
        source = path.read_bytes()
        if len(source) > _MAX_FILE_BYTES or (b'"""' not in source and b"'''" not in source):
            return []
        enabled = gc.isenabled()
        gc.disable()  # the collector walks every new syntax node again and again: a third of the time
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
            return list(_module_entries(tree, module))
        finally:
            if enabled:
                gc.enable()
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and "." not in f]
        for name in files:
            if name.endswith(".py") and not name.startswith("test_"):
                yield Path(folder) / name


def _module_entries(tree: ast.Module, module: str) -> Iterator[Entry]:
    doc = ast.get_docstring(tree, clean=False)
    if doc:
        yield _entry(doc, module, "", "module", members=_public_names(tree.body))
    yield from _body_entries(tree.body, module, "")
    yield from _attached_docs(tree, module)


def _body_entries(body: list[ast.stmt], module: str, outer: str) -> Iterator[Entry]:
    """Entries of the classes and functions of a module or class body; functions inside functions are left out."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = outer + node.name
            doc = ast.get_docstring(node, clean=False)
            if doc:
                bases = [ast.unparse(base) for base in node.bases]
                yield _entry(doc, module, name, "class", _init_signature(node), _public_names(node.body), bases=bases)
            yield from _body_entries(node.body, module, name + ".")
        elif isinstance(node, FunctionNode):
            doc = ast.get_docstring(node, clean=False)
            decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
            if doc and "overload" not in decorators and "setter" not in decorators:
                is_property = bool(decorators & {"property", "cached_property"})
                kind = "property" if is_property else "method" if outer else "function"
                signature = "" if is_property else _signature(node, drop_first=bool(outer))
                yield _entry(doc, module, outer + node.name, kind, signature, raised=_raised(node))
        elif isinstance(node, ast.If | ast.Try):
            yield from _body_entries(node.body, module, outer)


def _entry(
    doc: str,
    module: str,
    name: str,
    kind: str,
    signature: str = "",
    members: list[str] | None = None,
    bases: list[str] | None = None,
    raised: list[list[str]] | None = None,
) -> Entry:
    parsed = parse_docstring(doc)
    own = name.rpartition(".")[2] or module.rpartition(".")[2]
    while parsed.sentences and (match := _leading_signature(own, parsed.sentences[0])):
        # the docstring of a function written in C starts with its signature, once or twice
        signature = signature or match.group(1)
        rest = parsed.sentences[0][match.end() :].lstrip(" -.:>`")
        parsed.sentences[:1] = [rest] if len(rest) > 2 else []
    return Entry(
        module=module,
        name=name,
        kind=kind,
        signature=signature if len(signature) <= 300 else "",
        sentences=parsed.sentences,
        arguments=[list(a) for a in parsed.arguments],
        returns=parsed.returns,
        errors=[list(e) for e in parsed.errors],
        raised=raised or [],
        examples=[e for e in parsed.examples if 20 < len(e) < 1200],
        members=members or [],
        bases=bases or [],
    )


def _leading_signature(name: str, sentence: str) -> re.Match[str] | None:
    """`name(...)` or `module.name(...) -> type` at the start of a sentence; group 1 is the parenthesis."""
    if f"{name}(" not in sentence:  # almost always, and compiling a pattern per entry took a third of the time
        return None
    pattern = rf"`?(?:[\w.]+\.)?{re.escape(name)}(\([^()]*(?:\([^()]*\)[^()]*)*\))(?:\s*->\s*[\w.]+(?:\[[^\]]*\])?)?`?"
    return re.match(pattern, sentence)


def _public_names(body: list[ast.stmt]) -> list[str]:
    nodes = [n for n in body if isinstance(n, ast.ClassDef | FunctionNode)]
    return list(dict.fromkeys(n.name for n in nodes if not n.name.startswith("_")))


def _signature(node: FunctionNode, drop_first: bool) -> str:
    text = ast.unparse(node.args)
    first = (node.args.posonlyargs + node.args.args)[:1]
    if drop_first and first and first[0].arg in {"self", "cls", "mcs", "mcls"}:
        text = text.partition(", ")[2]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({text}){returns}"


def _init_signature(node: ast.ClassDef) -> str:
    for item in node.body:
        if isinstance(item, FunctionNode) and item.name == "__init__":
            return _signature(item, drop_first=True).partition(" -> ")[0]
    return ""


def _raised(node: FunctionNode) -> list[list[str]]:
    """[exception, message] of the `raise` statements of a function, messages only where they are literal text."""
    found: dict[str, list[str]] = {}
    for item in _statements(node):
        if not isinstance(item, ast.Raise) or item.exc is None:
            continue
        call = item.exc if isinstance(item.exc, ast.Call) else None
        name = ast.unparse(call.func if call else item.exc)
        if re.fullmatch(r"[\w.]*[A-Z]\w+", name):
            message = clean(_literal_text(call.args[0])) if call and call.args else ""
            found.setdefault(message or name, [name, message])
    return list(found.values())[:4]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements below a node, breadth first: `ast.walk` without the expressions, which are most of a tree."""
    waiting = deque([node])
    while waiting:
        item = waiting.popleft()
        yield item
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(item, name, ()))


def _literal_text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal_text(v) if isinstance(v, ast.Constant) else "..." for v in node.values)
    if isinstance(node, ast.BinOp):  # "text %s" % value, "a" + "b"
        return re.sub(r"%[-\d.]*[a-zA-Z]", "...", _literal_text(node.left))
    return ""


def _attached_docs(tree: ast.Module, module: str) -> Iterator[Entry]:
    """Docstrings that torch and numpy attach to C functions: add_docstr(torch.abs, "..."), add_newdoc(m, n, "...")."""
    if not module.startswith(_ATTACHERS):
        return
    shared: dict[str, str] | None = None
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        function = ast.unparse(call.func).rpartition(".")[2] if call else ""
        if call is None or function not in {"add_docstr", "add_docstr_all", "add_newdoc"} or len(call.args) < 2:
            continue
        doc = call.args[-1]
        if isinstance(doc, ast.Tuple) and doc.elts:  # ('method', "doc")
            attribute, doc = _literal_text(doc.elts[0]), doc.elts[-1]
        else:
            attribute = ""
        placeholders = isinstance(doc, ast.Call)
        if isinstance(doc, ast.Call) and isinstance(doc.func, ast.Attribute):  # "doc".format(**common_args)
            doc = doc.func.value
        text = _literal_text(doc)
        if placeholders:
            shared = _placeholders(tree) if shared is None else shared
            text = _fill(text, shared)
        names = [_literal_text(a) or ast.unparse(a) for a in call.args[:-1]] + ([attribute] if attribute else [])
        if function == "add_docstr_all":
            names = ["torch.Tensor", *names]
        where, _, name = ".".join(names).replace("numpy._core.multiarray", "numpy").rpartition(".")
        if text and where:
            is_method = where.rpartition(".")[2][:1].isupper() or where.endswith("ndarray")
            if is_method:
                where, _, owner = where.rpartition(".")
                name = f"{owner}.{name}"
            yield _entry(text, where or module, name, "method" if is_method else "function")


def _fill(text: str, values: dict[str, str]) -> str:
    """`text.format(**values)` that leaves out what it does not know."""
    text = re.sub(r"\{(\w+)\}", lambda match: values.get(match.group(1), ""), text)
    return text.replace("{{", "{").replace("}}", "}")


def _placeholders(tree: ast.Module) -> dict[str, str]:
    """Texts that `parse_kwargs("name: text ...")` calls and literal dicts of a module define for `.format`."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_kwargs" and node.args:
            for item in re.split(r"\n {4}(?=\w)", _literal_text(node.args[0])):
                name = re.match(r"\s*(\w+)", item)
                if name:
                    found.setdefault(name.group(1), item.strip())
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and _literal_text(key) and _literal_text(value):
                    found.setdefault(_literal_text(key), _literal_text(value).strip())
    return found
