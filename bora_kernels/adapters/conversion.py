"""``convert``: linear layers of a model, chosen by name, become adapted ones in place."""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch
from torch import nn

from ..contract import NormOrder
from ..fusion.fuse import LEFT_OUT
from ..fusion.install import installed, uninstall
from ..modules import FusedBoraLinear, FusedColumnLinear, FusedDoraLinear
from ..ops import elsewhere
from . import coverage

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)
Method = Literal["bora", "dora", "columns"]

METHODS: dict[str, type[FusedBoraLinear]] = {
    "bora": FusedBoraLinear,
    "dora": FusedDoraLinear,
    "columns": FusedColumnLinear,
}
_ALL_LINEAR = "all-linear"
_HEADS = ("lm_head", "embed_out", "score", "classifier", "head")  # children of a model that are its output head
_ADAPTER = ("lora_A", "lora_B", "magnitude_row", "magnitude_col")


class LayerOptions(TypedDict, total=False):
    """Keyword arguments of ``FusedBoraLinear.from_linear`` that ``convert`` hands on."""

    dropout: float
    norm_order: NormOrder
    detach_norm: bool
    rslora: bool
    adapter_dtype: torch.dtype


def convert(
    model: Model,
    r: int = 16,
    alpha: float = 32,
    *,
    target_modules: str | Iterable[str] = _ALL_LINEAR,
    exclude: str | Iterable[str] = (),
    method: Method = "bora",
    **options: Unpack[LayerOptions],
) -> Model:
    """Replace linear layers of a model in place by ``FusedBoraLinear`` or its kin and freeze the rest.

        V = W0 + (alpha / r)·B·A        W' = diag(m_r / ‖·‖_row)·V·diag(m_c / ‖·‖_col)        W' = W0 at the start

    Weights are shared, not copied. A layer that is used in several places stays one layer with one adapter. Layers
    that were converted before stay as they are, so that several calls can give layers ranks of their own. To train
    another part as well, such as a new head, call ``requires_grad_()`` on it afterwards: ``save_adapter`` saves it too.

    Args:
        model: any module that contains ``torch.nn.Linear`` layers.
        r, alpha: rank of the updates and numerator of their scaling.
        target_modules: ends of layer names (``["q_proj", "mlp.up_proj"]``) or a regular expression for whole names, as
            in PEFT, or "all-linear": all but the output head (``get_output_embeddings()``, else a child of the model
            called lm_head, embed_out, score, classifier or head) and ``MultiheadAttention.out_proj``.
        exclude: layers to leave out, named in the same two ways; what means none is warned of.
        method: "bora", "dora", or "columns" (``FusedColumnLinear``).
        options: the other keyword arguments of ``FusedBoraLinear.from_linear``.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: naming the argument or the layer, before the model changes.

    Source: BoRA, arXiv 2412.06441, section 3; DoRA, arXiv 2402.09353, section 4.1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if unknown := options.keys() - LayerOptions.__annotations__.keys():
        expected = ", ".join(("r", "alpha", "target_modules", "exclude", "method", *LayerOptions.__annotations__))
        raise TypeError(f"keywords must be among {expected}, got {', '.join(sorted(unknown))}")
    check_unwrapped(model)
    chosen = _choose(model, _names("target_modules", target_modules), _names("exclude", exclude))
    adapt(model, dict.fromkeys(chosen, partial(METHODS[method].from_linear, r=r, alpha=alpha, **options)))
    return model


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError for a model that is adapted by PEFT, or whose wrapper would not know new parameters."""
    tuners = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model must be adapted before it is wrapped, got DistributedDataParallel, which sends the gradients of "
                "the parameters that it has known from its start"
            )
        if isinstance(module, tuners):
            raise ValueError(
                f"model must have no adapters of PEFT, got a {type(module).__name__} as {name}: merge_and_unload() "
                "them first, or adapt it with BoraConfig of bora_kernels.integrations.peft"
            )


def adapted_layers(model: nn.Module) -> dict[str, FusedBoraLinear]:
    """The adapted layers of a model by name, each once."""
    return {name: layer for name, layer in named_modules(model) if isinstance(layer, FusedBoraLinear)}


def adapter_parameters(layer: FusedBoraLinear) -> dict[str, nn.Parameter]:
    """The trained parameters that the layer has."""
    return {name: getattr(layer, name) for name in _ADAPTER if getattr(layer, name) is not None}


def named_modules(model: nn.Module, *, every_place: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names that they have before ``torch.compile`` wraps any, each once or in every place."""
    for name, module in model.named_modules(remove_duplicate=not every_place):
        yield plain_name(name), module


def plain_name(name: str) -> str:
    """A module's or tensor's name without what ``torch.compile`` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def matches(names: str | Iterable[str], name: str) -> bool:
    """Whether ``names``, a regular expression or ends of names, mean this one."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names)


def adapt(model: nn.Module, layers: Mapping[nn.Linear, Callable[[nn.Linear], FusedBoraLinear]]) -> None:
    """Replace each linear layer by what its function makes of it, and freeze what is not an adapter.

    All layers are built before the first is replaced: an error leaves the model as it was.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        built: dict[nn.Module, nn.Module] = {linear: make(linear) for linear, make in layers.items()}
    except Exception:
        for parameter in trainable:  # from_linear freezes
            parameter.requires_grad_()
        raise
    for linear, layer in built.items():
        elsewhere.hand_over_hooks(linear, layer)
    replace(model, built)
    if callable(getattr(model, "save_pretrained", None)) and "save_pretrained" not in model.__dict__:
        model.__dict__["save_pretrained"] = _SavePretrained(model)
    for name, layer in adapted_layers(model).items():
        layer.place = name
    coverage.leave_inference_path(model, FusedBoraLinear)
    coverage.remember_statistics(model)
    kept = {id(p) for layer in adapted_layers(model).values() for p in adapter_parameters(layer).values()}
    for parameter in trainable:
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


class _SavePretrained:
    """transformers' method of a model, with a warning where it does not do what its name says.

    It holds the model weakly: a model that held itself would keep its memory after ``del model``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __reduce__(self) -> tuple:
        return type(self), (self.model(),)  # of a copy's own model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model()
        if adapted_layers(model):
            warnings.warn(
                "save_pretrained of a converted model writes tensors that from_pretrained does not know, and gives "
                "the base model back. bora_kernels.save_adapter(model, folder) writes what was trained; for a plain "
                "model call bora_kernels.merge_adapter(model) first",
                stacklevel=2,
            )
        return type(model).save_pretrained(model, *args, **kwargs)


def leave_no_trace(model: nn.Module) -> None:
    """Take out of a model whose adapters were merged what needs this package: it can be pickled without."""
    if any(installed(module) is not None for module in model.modules()):
        model.__dict__.setdefault(LEFT_OUT, {})  # ``unfuse`` is for whoever called ``fuse``
    for module in model.modules():
        uninstall(module)
        if type(module.__dict__.get("save_pretrained")) is _SavePretrained:
            del module.__dict__["save_pretrained"]


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in every place where the old ones are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])


def _names(argument: str, names: str | Iterable[str]) -> str | tuple[str, ...]:
    if isinstance(names, str):
        return _ALL_LINEAR if names.lower() == _ALL_LINEAR else names
    names = tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a string or several, got {names}")
    return names


def _choose(model: nn.Module, targets: str | tuple[str, ...], exclude: str | tuple[str, ...]) -> list[nn.Linear]:
    """The linear layers that the arguments mean, each once."""
    places = [(name, m) for name, m in named_modules(model, every_place=True) if isinstance(m, nn.Linear) and name]
    left_out: set[nn.Module] = {module for name, module in places if matches(exclude, name)}
    _check_excluded(model, exclude)
    uncalled, experts = coverage.never_called(model), coverage.expert_weights(model)
    if targets == _ALL_LINEAR:
        left_out |= _output_head(model)
        coverage.warn_of_left_out({name: uncalled[m] for name, m in places if m in uncalled.keys() - left_out})
        chosen = {m: name for name, m in places if m not in left_out and m not in uncalled}
    else:
        for target in [targets] if isinstance(targets, str) else targets:
            names = target if isinstance(targets, str) else (target,)
            if not any(matches(names, name) for name, _ in places):
                ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in places)) or "it has none"
                unreached = [name for name in experts if matches(names, name)]
                tensors = f": {unreached[0]} is a tensor of 3 axes, and experts are not adapted" if unreached else ""
                message = f"target_modules must name torch.nn.Linear layers ({ends}), got {target!r}{tensors}"
                raise ValueError(message)
        chosen = {m: name for name, m in places if m not in left_out and matches(targets, name)}
    others = coverage.other_weights(model)
    if not chosen:
        why = ": its layers are adapted already" if adapted_layers(model) else ""
        if "Conv1D" in others.values():
            why = ": its layers are Conv1D of transformers, which BoraConfig of bora_kernels.integrations.peft adapts"
        raise ValueError(f"target_modules must leave a layer to convert, got {targets!r} with exclude={exclude!r}{why}")
    for module, name in chosen.items():
        if module in uncalled:
            raise ValueError(f"target_modules must not name {name}: {uncalled[module]}")
        if "weight" not in module._parameters:
            raise ValueError(f"target_modules must not name {name}: its weight is computed (a parametrization)")
        if problem := coverage.own_forward(module):
            raise ValueError(f"target_modules must not name {name}: {problem}")
    if targets == _ALL_LINEAR or any(matches(targets, name) for name in experts):
        coverage.warn_of_experts(experts, model)
    if targets == _ALL_LINEAR:
        coverage.warn_of_other_weights(others)
    return list(chosen)


def _check_excluded(model: nn.Module, exclude: str | tuple[str, ...]) -> None:
    """Warn of what means no layer that could be left out."""
    kinds = (nn.Linear, FusedBoraLinear)
    layers = [name for name, module in named_modules(model, every_place=True) if isinstance(module, kinds)]
    for each in [exclude] if isinstance(exclude, str) else [(end,) for end in exclude]:
        if not any(matches(each, name) for name in layers):
            warnings.warn(
                f"exclude leaves out no linear layer by {each if isinstance(each, str) else each[0]!r}: it takes ends "
                "of their names or, as a string, a regular expression for whole names",
                stacklevel=4,
            )


def _output_head(model: nn.Module) -> set[nn.Module]:
    """The modules that turn the last hidden state into the model's output."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    heads = [child for name, child in model.named_children() if name in _HEADS] if head is None else [head]
    return {module for head in heads for module in head.modules()}
