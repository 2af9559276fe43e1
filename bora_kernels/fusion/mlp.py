"""Gated MLPs as one function: y = down(act(gate(x))⊙up(x)), with nothing kept that can be made anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..blocks import Projection, gated_mlp
from ..contract import given
from . import normed, search
from .install import fused_forward, is_any_waited_for, must_be_plain, plain
from .members import can_run_on, halves, is_plain, project, single_only


class Plan(NamedTuple):
    """What was found, and what has to be as it was then."""

    found: search.GatedMLP
    forward: Callable  # of the module's class
    others: tuple[tuple[str, object], ...]  # attributes and the children that are not linear layers, by name


def plan(module: nn.Module) -> Plan | str | None:
    """How to run a module as a gated MLP; or why not, though its layers have the sizes of one; or None."""
    found = search.gated_mlp(module)
    if not isinstance(found, search.GatedMLP):
        return found
    children = {name: child for name, child in module._modules.items() if name not in found}
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    for name in ("training", "forward"):
        attributes.pop(name, None)
    return Plan(found, type(module).forward, (*children.items(), *attributes.items()))


def _members(module: nn.Module, plan: Plan) -> tuple[Projection, Projection, Projection] | str:
    """What the three layers compute now, or why the module has to call them."""
    if type(module).forward is not plan.forward:
        return "its class has another forward"
    if plan.found.drops and module.training:
        return "its dropout is active"
    children = module._modules
    for name, value in plan.others:
        if name in children:
            child = children[name]
            if child is not value:
                return f"{name} was replaced"
            if child is not None and is_any_waited_for(child):
                return f"a hook or another forward waits for the call of {name}"
            if isinstance(child, nn.Dropout) and child.training and child.p > 0.0:
                return f"{name} is active"
        else:
            now = vars(module).get(name)
            if now is not value and not (type(now) in _NUMBERS and now == value):  # copies have numbers of their own
                return f"{name} was changed"
    members: dict[str, Projection] = {}
    for name in dict.fromkeys(plan.found[:3]):  # gate and up may be one
        projection = project(given(children[name]))
        if isinstance(projection, str):
            return f"{name}: {projection}"
        if problem := single_only(projection):
            return f"{name}: {problem}"
        members[name] = projection
    if all(projection.adapter is None for projection in members.values()):
        return "none of its layers has an adapter"
    gate, up, down = (members[name] for name in plan.found[:3])
    if plan.found.gate == plan.found.up:
        both = halves(gate)
        if isinstance(both, str):
            return f"{plan.found.gate}: {both}"
        gate, up = both if plan.found.gate_first else both[::-1]
    return gate, up, down


_NUMBERS = (int, float, bool, str)


def _problem(module: nn.Module, plan: Plan) -> str | None:
    members = _members(module, plan)
    return members if isinstance(members, str) else None


@fused_forward("gated MLP", _problem)
def fused_mlp(module: nn.Module, plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """The module's forward with one input as one function; every other call by its own forward."""
    if len(args) == 1 and not kwargs and not must_be_plain():
        x, members = args[0], _members(module, plan)
        if not isinstance(members, str) and is_plain(x, members[0]) and all(can_run_on(x, p) is None for p in members):
            return gated_mlp(x, *members, plan.found.activation, normed.origin(x))
    return plain(module, *args, **kwargs)
