"""Mutants of the package: one node of a syntax tree replaced, and all modules executed anew in memory."""

import ast
import collections
import contextlib
import dataclasses
import fnmatch
import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import optimorph

ROOT = Path(optimorph.__file__).parent
PATHS = {
    ".".join(("optimorph", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if "_racing" not in path.parts
}
OPPOSITES = {ast.Eq: ast.NotEq, ast.Lt: ast.GtE, ast.LtE: ast.Gt}
OPPOSITES |= {opposite: own for own, opposite in OPPOSITES.items()}
ALIKE = {  # function → positions of arguments of the kind that it returns
    **dict.fromkeys(("abs", "everywhere", "increment", "sqrt", "square", "normalize"), (0,)),
    **dict.fromkeys(("max", "maximum", "min", "minimum", "multiply", "power"), (0, 1)),
    **dict.fromkeys(("mix", "select", "where"), (1, 2)),
    **dict.fromkeys(("apply", "map"), (1,)),
}
"""A mutant has one of these arguments in the call's place."""

NUMBERS = {"Numeric", "ScalarOrSchedule"}
"""What a parameter is annotated with that 0.5 would fit."""

PLAIN = NUMBERS | {"bool", "int", "str", "None"}
"""What a parameter is annotated with that its default would fit, and that is no technicality."""

SENTENCES = ("add", "chain", "divide", "in_float32", "mix")
IDENTITY = ast.parse('__import__("optax").identity()', mode="eval").body
NO_WORDS = ("dtype", "mask", "state", "shardings", "by", "strict", "key", "default")
"""Endings of the arguments that change no number, or cannot be left out."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One node replaced: in `place`, a node's field and an index if that is a list.

    `operation` is what is done and to which of its kind in the function, from 0 on: "Mult 1 left".
    """

    module: str
    function: str
    operation: str
    place: tuple[ast.AST, str, int | None]
    new: ast.AST

    def __str__(self):
        return f"{self.module}: {self.function}: {self.operation}"

    def code(self):
        """Of the module with the new node; the tree is left as it was."""
        node, field, index = self.place
        old = getattr(node, field)
        setattr(node, field, self.new if index is None else [*old[:index], self.new, *old[index + 1 :]])
        try:
            return compile(ast.fix_missing_locations(tree(self.module)), self.module, "exec")
        finally:
            setattr(node, field, old)

    def difference(self):
        node, field, index = self.place
        old = getattr(node, field) if index is None else getattr(node, field)[index]
        return " → ".join(ast.unparse(ast.fix_missing_locations(x)) for x in (old, self.new))


@functools.cache
def tree(module):
    return ast.parse(PATHS[f"optimorph.{module}"].read_text())


@functools.cache
def code(name):
    return compile(PATHS[name].read_text(), PATHS[name], "exec")


class Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Executes the package's modules, one of them in another form, and knows no type checker."""

    def __init__(self, mutant):
        self.changed = {} if mutant is None else {f"optimorph.{mutant.module}": mutant.code()}

    def find_spec(self, name, path=None, target=None):
        if name not in PATHS:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=PATHS[name].name == "__init__.py")

    def exec_module(self, module):
        exec(self.changed.get(module.__name__) or code(module.__name__), vars(module))


@contextlib.contextmanager
def package(mutant=None):
    """The package with a mutant in it, imported in the place of the real one."""
    real = {name: sys.modules.pop(name) for name in _imported()}
    importer = Importer(mutant)
    sys.meta_path.insert(0, importer)
    try:
        yield importlib.import_module("optimorph")
    finally:
        sys.meta_path.remove(importer)
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(real)


def _imported():
    return [name for name in sys.modules if name.split(".")[0] == "optimorph"]


def modules(pattern):
    """Those modules of the package, without its name, that have this pattern."""
    names = [name.removeprefix("optimorph.") for name in PATHS]
    return fnmatch.filter(names, pattern)


def mutants(module) -> Iterator[Mutant]:
    """Every operation of every function of a module, changed in every way there is."""
    counts = collections.Counter()
    for function, parameters, place, node in _nodes(tree(module), "module", {}):
        found = [each for change in CHANGES for each in change(node, parameters)]
        for kind, what, new in found:
            yield Mutant(module, function, f"{kind} {counts[function, kind]} {what}", place, new)
        counts.update({(function, kind) for kind, _, _ in found})


def _nodes(node, function, parameters):
    """The nodes that compute, each with its function, that one's plain parameters, and its place."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "targets"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _refuses(child):
                continue
            inside, known = function, parameters
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = child.name if function == "module" else f"{function}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                own = {arg.arg for arg in ast.walk(child.args) if isinstance(arg, ast.arg)}
                known = {name: x for name, x in known.items() if name not in own} | _plain_parameters(child)
            yield inside, known, (node, field, index), child
            yield from _nodes(child, inside, known)


def _refuses(node):
    """Whether a node says or forbids something and computes nothing."""
    match node:
        case ast.If() | ast.For():
            return _refuses(node.body[-1])
        case ast.FunctionDef():
            return not any(isinstance(each, ast.Return) and each.value for each in ast.walk(node))
        case ast.Call():
            return _name(node.func) in ("isinstance", "type", "holds")
        case ast.Compare(ops=[ast.Is() | ast.IsNot(), *_]):
            return True
        case ast.Expr(ast.Call(function)):
            return _name(function) != "append"
    return isinstance(node, ast.Expr | ast.Raise | ast.Assert | ast.JoinedStr)


def _plain_parameters(function):
    """What each plain parameter would be if the argument were ignored: its default, or some number."""
    named = [*function.args.posonlyargs, *function.args.args]
    missing = [None] * (len(named) - len(function.args.defaults))
    defaults = [*missing, *function.args.defaults, *function.args.kw_defaults]
    found = {}
    for arg, default in zip([*named, *function.args.kwonlyargs], defaults, strict=True):
        types = set(ast.unparse(arg.annotation).split(" | ")) if arg.annotation else set()
        if default is None and types and types <= NUMBERS:
            found[arg.arg] = ast.Constant(0.5)
        elif default is not None and types and types <= PLAIN and ast.unparse(default) != "None":
            found[arg.arg] = default
    return found


def _name(function):
    return getattr(function, "id", None) or getattr(function, "attr", "")


# From a node and the parameters known there, what else it could be: (kind, what is done, new node).


def drop_operand(node, _):
    match node:
        case ast.BinOp(left, op, right):
            yield type(op).__name__, "left", left
            yield type(op).__name__, "right", right
        case ast.UnaryOp(ast.USub() | ast.Invert() as op, operand):
            yield type(op).__name__, "gone", operand


def turn_comparison(node, _):
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPPOSITES:
            yield type(op).__name__, "opposite", _with(node, ops=[OPPOSITES[type(op)]()])


def decide(node, _):
    """A condition always or never; of `x is None`, as if it were None, for without it nothing runs."""
    match node:
        case ast.IfExp(test, body, orelse):
            yield "if", "always", body
            if not (isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is)):
                yield "if", "never", orelse
        case ast.If():
            yield "if", "always", _with(node, test=ast.Constant(True))
            yield "if", "never", _with(node, test=ast.Constant(False))


def drop_function(node, _):
    match node:
        case ast.Call(ast.Attribute(value, "conj"), []):
            yield "conj", "gone", value
        case ast.Call(function, args):
            for k in ALIKE.get(_name(function), ()):
                if len(args) > max(ALIKE[_name(function)]) and not isinstance(args[k], ast.Constant):
                    yield _name(function), f"only {k}", args[k]


def drop_term(node, _):
    """One of several pairs in a call or a list, or a part of what is several on a condition."""
    match node:
        case ast.IfExp(body=ast.Tuple(elts=[_, _, *_] as parts) as body):
            for k in range(len(parts)):
                less = _with(body, elts=parts[:k] + parts[k + 1 :])
                yield "parts", f"without {k}", _with(node, body=less)
        case ast.Call(args=parts) | ast.List(elts=parts):
            field = "args" if isinstance(node, ast.Call) else "elts"
            pairs = [k for k, part in enumerate(parts) if isinstance(part, ast.Tuple)]
            for k in pairs if len(pairs) > 1 else ():
                yield "terms", f"without {k}", _with(node, **{field: parts[:k] + parts[k + 1 :]})


def drop_word(node, _):
    """Of a sentence a word, an argument that is itself a call; of any call by name what is said by name."""
    match node:
        case ast.Call(ast.Name(name), args, keywords):
            for k, arg in enumerate(args if name in SENTENCES else ()):
                if isinstance(arg, ast.Call | ast.Starred):
                    rest = [] if isinstance(arg, ast.Starred) else [IDENTITY]
                    yield name, f"without {k}", _with(node, args=[*args[:k], *rest, *args[k + 1 :]])
            for k, keyword in enumerate(keywords):
                if keyword.arg and not keyword.arg.endswith(NO_WORDS):
                    rest = keywords[:k] + keywords[k + 1 :]
                    yield name, f"without {keyword.arg}", _with(node, keywords=rest)


def change_loop(node, _):
    """Over a literal, whose order was chosen, in the other order; over anything else, without the first."""
    match node:
        case ast.For(iter=over) | ast.comprehension(iter=over):
            what, cut = ("backwards", "[::-1]") if isinstance(over, ast.Constant) else ("late", "[1:]")
            new = ast.parse(f"[*x]{cut}", mode="eval").body
            new.value.elts[0].value = over
            yield "for", what, _with(node, iter=new)


def ignore_argument(node, parameters):
    match node:
        case ast.Name(name, ast.Load()) if name in parameters:
            yield name, "ignored", parameters[name]


CHANGES = [
    drop_operand,
    turn_comparison,
    decide,
    drop_function,
    drop_term,
    drop_word,
    change_loop,
    ignore_argument,
]


def _with(node, **fields):
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})
