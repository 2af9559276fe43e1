"""Children of a module that its forward calls with the same x, found in its source.

    q = self.q_proj(x) ; k = self.k_proj(x) ; v = self.v_proj(x)        one after the other, whatever else happens

Calls that stand in one block of statements, with a name that nothing between them binds anew, all happen once the first
has, and with one object. What is found is a promise of the source only: each call still looks whether its x is that of
the others.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)


def shared_inputs(module: nn.Module) -> list[tuple[str, ...]]:
    """Groups of names of children, two or more each, that the module's forward calls with one input."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source, as in a notebook or a compiled file
        return []
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return []
    own_name = function.args.args[0].arg
    return [group for block in _blocks(function.body) for group in _groups(block, own_name)]


def _blocks(statements: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """A block of statements and those inside it, but not those of other functions."""
    yield statements
    for statement in statements:
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for _, value in ast.iter_fields(statement):
                if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                    yield from _blocks(value)
                elif isinstance(value, list) and value and isinstance(value[0], (ast.ExceptHandler, ast.match_case)):
                    for case in value:
                        yield from _blocks(case.body)


def _groups(block: list[ast.stmt], own_name: str) -> Iterator[tuple[str, ...]]:
    """What one block calls with one name, before that is bound again or the block may have been left."""
    open_groups: dict[str, list[str]] = {}
    closed: list[list[str]] = []
    for statement in block:
        if isinstance(statement, _SIMPLE):
            for child, argument in _calls(statement, own_name):
                group = open_groups.setdefault(argument, [])
                if child in group:  # a second call, which starts a group of its own
                    closed.append(open_groups.pop(argument))
                    open_groups[argument] = [child]
                else:
                    group.append(child)
        if any(isinstance(node, (ast.Return, ast.Raise, ast.Break, ast.Continue)) for node in ast.walk(statement)):
            break
        for name in _bound(statement):
            if name in open_groups:
                closed.append(open_groups.pop(name))
    for group in (*closed, *open_groups.values()):
        if len(group) > 1:
            yield tuple(group)


def _calls(node: ast.AST, own_name: str) -> Iterator[tuple[str, str]]:
    """(child, name) for each ``self.child(name)`` that is made whenever this node runs."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        (argument,), function = node.args, node.func
        if isinstance(argument, ast.Name) and isinstance(function, ast.Attribute):
            if isinstance(function.value, ast.Name) and function.value.id == own_name:
                yield function.attr, argument.id
    if not isinstance(node, _CONDITIONAL):
        for child in ast.iter_child_nodes(node):
            yield from _calls(child, own_name)


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement, or one inside it, binds or deletes, or whose object it changes in place."""
    names = set()
    for node in ast.walk(statement):
        inner: ast.AST = node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            inner = node.func.value  # x.add_(1)
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
            inner = node.value  # x[0] = 1
        elif not isinstance(node, ast.Name) or isinstance(node.ctx, ast.Load):
            continue
        while isinstance(inner, (ast.Subscript, ast.Attribute)):
            inner = inner.value
        if isinstance(inner, ast.Name):
            names.add(inner.id)
    return names
