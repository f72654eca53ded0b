"""torchvision's classification models, cut into blocks along their execution order.

A block ends where exactly one tensor is alive, so no cut falls beside a skip connection. Of resnet18:

    conv1 | bn1 relu maxpool | conv bn relu conv bn add relu | ... | avgpool flatten | fc
    conv1   maxpool          | layer1_0            |
                             +---------------------+    two are alive: no cut
"""

import operator
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import fx, nn
from torchvision import models

from splitlearn.models.layers import check_num_classes, in_order


def torchvision(num_classes: int, name: str, weights: str | None = None, **kwargs: Any) -> nn.Sequential:
    """The model `name` of torchvision as named blocks, as fine as its graph allows.

    (N, C, H, W) in, (N, num_classes) logits out; nearly all take C = 3. A block is called after the last module in it,
    dots as underscores: `layer1_0`, `features_3`. What has no parameters (ReLU, pooling, flattening, dropout) belongs
    to the block before it. `weights` (such as `DEFAULT`) are loaded but for the layers that another number of classes
    changes. Weights are drawn by the global generator, the same wherever the network is cut.

    ValueError for an unknown name, a model that cannot be traced, and one that cannot be cut.
    """
    check_num_classes(num_classes)
    return cut_up(_make(num_classes, name, weights, kwargs), name)


def cut_up(model: nn.Module, name: str) -> nn.Sequential:
    """The model as a sequence of traced blocks that share its weights; in-place operations are made out of place.

    ValueError where it cannot be traced, returns several tensors, or has no place for a cut.
    """
    graph = _trace(model, name)
    _make_out_of_place(model, graph)
    pieces = _merge(model, _pieces(model, graph))
    if len(pieces) < 2:
        raise ValueError(
            f"`model.name` (={name}) has no cut: nowhere between two of its layers is just one tensor alive; take "
            "another model"
        )
    blocks: dict[str, nn.Module] = {}
    source = next(iter(graph.nodes))
    for piece, title in zip(pieces, _titles(pieces), strict=True):
        unique = title if title not in blocks else f"{title}_{len(blocks)}"  # of a.b and a_b
        blocks[unique] = _block(model, piece, source)
        source = piece[-1]
    return in_order(blocks)


class _Tracer(fx.Tracer):
    """Goes into modules, but not into those whose forward asks whether they train: a trace would fix the answer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        asks = "training" in type(m).forward.__code__.co_names
        return childless or asks or super().is_leaf_module(m, module_qualified_name)


def _make(num_classes: int, name: str, weights: str | None, kwargs: Mapping[str, Any]) -> nn.Module:
    names = models.list_models(module=models)
    if name not in names:
        close = get_close_matches(str(name), names, n=5) or ["resnet18", "mobilenet_v3_small", "vit_b_16"]
        raise ValueError(
            f"`model.name` (={name}) is no classification model of torchvision; near it: {', '.join(close)}"
        )
    model = models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    return model if weights is None else _pretrained(model, name, weights, kwargs)


def _pretrained(fresh: nn.Module, name: str, weights: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """With the weights that torchvision itself gives the model, but for the layers that do not fit the classes."""
    offered = models.get_model_weights(name)
    if weights != "DEFAULT" and weights not in offered.__members__:
        choice = ", ".join(["DEFAULT", *offered.__members__])
        raise ValueError(f"`model.weights` (={weights}) of {name} must be one of {choice}, or null for none")
    # What its maker knows of old names in a published file, and of what such weights ask of the input.
    whole = models.get_model(name, weights=offered[weights], **{k: v for k, v in kwargs.items() if k != "aux_logits"})
    own = fresh.state_dict()
    fits = {key: v for key, v in whole.state_dict().items() if key in own and v.shape == own[key].shape}
    fresh.load_state_dict(fits, strict=False)
    if hasattr(whole, "transform_input"):
        fresh.transform_input = whole.transform_input
    return fresh


def _trace(model: nn.Module, name: str) -> fx.Graph:
    """The graph, the same in training and evaluation."""
    try:
        graph, evaluated = (_Tracer().trace(model.train(mode)) for mode in (False, True))
    except Exception as error:  # a trace runs the model's own code, which may raise anything
        raise ValueError(
            f"`model.name` (={name}) cannot be traced by torch.fx ({error}): take another model, or cut it by hand "
            "and give it as model=custom"
        ) from error
    one, other = (re.sub(r"_tensor_constant\d+", "constant", str(traced)) for traced in (graph, evaluated))
    if one != other:
        raise ValueError(
            f"`model.name` (={name}) does something else in training than in evaluation: if it has auxiliary heads, "
            "turn them off with +model.aux_logits=false"
        )
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise ValueError(f"`model.name` (={name}) must return one tensor: take another model")
    return graph


def _make_out_of_place(model: nn.Module, graph: fx.Graph) -> None:
    """A write into what was received would fail right behind a cut. Later readers get the result instead.

    `x += y` needs nothing: a trace holds it as a sum.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _unwrite(model, node):
            read = node.all_input_nodes[0]
            read.replace_all_uses_with(node, lambda user, node=node: place[user] > place[node])
    for module in model.modules():  # those too that a trace did not go into
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


def _unwrite(model: nn.Module, node: fx.Node) -> bool:
    """Whether the node wrote into its input, as it does no more, but for modules."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method" and re.fullmatch(r"[a-z]\w*[a-z0-9]_", str(node.target)):
        node.target = str(node.target)[:-1]
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    return False


def _pieces(model: nn.Module, graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes in order, in pieces as short as can be: behind each one nothing is alive but its last node's tensor.

    Weights that are used twice are alive from the first time to the last: they must have one owner.
    """
    last: dict[Any, fx.Node] = {used: node for node in graph.nodes for used in _uses(model, node)}
    order = {node: i for i, node in enumerate(graph.nodes)}
    alive: set[Any] = set()
    pieces: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        alive |= {node, *_held(model, node)}
        alive = {used for used in alive if used in last and order[last[used]] > order[node]}
        if node.op not in ("placeholder", "get_attr", "output"):
            pieces[-1].append(node)
        if pieces[-1] and alive == {node} and not _is_several(node):
            pieces.append([])
    return [piece for piece in pieces if piece]


def _uses(model: nn.Module, node: fx.Node) -> list[Any]:
    """What a node reads: the results of others, and weights, which may be tied under several names, as objects."""
    return [*(read for read in node.all_input_nodes if read.op != "get_attr"), *_held(model, node)]


def _held(model: nn.Module, node: fx.Node) -> list[int]:
    """The identities of the tensors that a node reads, or that its module has."""
    read = [operator.attrgetter(str(read.target))(model) for read in node.all_input_nodes if read.op == "get_attr"]
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else nn.Module()
    return [id(tensor) for tensor in (*read, *module.parameters(), *module.buffers())]


def _is_several(node: fx.Node) -> bool:
    """Whether the value is a tuple, which others take apart by number."""
    return any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)


def _merge(model: nn.Module, pieces: Sequence[list[fx.Node]]) -> list[list[fx.Node]]:
    """Put what has no weights to the piece before it; at the very start, to the one behind."""
    merged: list[list[fx.Node]] = []
    for piece in pieces:
        if merged and not (_have_weights(model, piece) and _have_weights(model, merged[-1])):
            merged[-1] = merged[-1] + piece
        else:
            merged.append(piece)
    return merged


def _have_weights(model: nn.Module, piece: Sequence[fx.Node]) -> bool:
    modules = [model.get_submodule(str(node.target)) for node in piece if node.op == "call_module"]
    read = any(read.op == "get_attr" for node in piece for read in node.all_input_nodes)
    return read or any(True for module in modules for _ in module.parameters())


def _titles(pieces: Sequence[Sequence[fx.Node]]) -> list[str]:
    """A name for each piece: the last module that ends in it, which ends in no other."""
    inside = [[_modules(node) for node in piece] for piece in pieces]
    end = {path: i for i, piece in enumerate(inside) for paths in piece for path in paths}
    ending = [[path for paths in reversed(piece) for path in paths if end[path] == i] for i, piece in enumerate(inside)]
    return [
        (paths[0] if paths else piece[-1].name).replace(".", "_") for paths, piece in zip(ending, pieces, strict=True)
    ]


def _modules(node: fx.Node) -> list[str]:
    """The modules that the node stands in, outermost first. A plain Sequential, such as layer1, only holds others."""
    return [path for path, kind in node.meta.get("nn_module_stack", {}).values() if kind is not nn.Sequential]


def _block(model: nn.Module, piece: Sequence[fx.Node], source: fx.Node) -> fx.GraphModule:
    """The nodes of a piece as a module of their own, whose input is the result of `source`."""
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in piece:
        copied(node)
    graph.output(copies[piece[-1]])
    return fx.GraphModule(model, graph)
