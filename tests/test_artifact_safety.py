"""What cannot be saved is refused when it is saved; files that are not right are refused unread."""

import copy
import json
import random
import shutil

import pytest
import torch
from torch import fx, nn

from fxprune.errors import ArtifactError
from fxprune.export.save import load, read_inputs, save
from tests.artifact_nets import edit, graph_of, net, relist, traced


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    return save(net("conv")[0], tmp_path / "slim")


# What cannot be saved


def with_hook(register):
    def build():
        module = nn.Sequential(nn.Linear(2, 2))
        getattr(module[0], register)(lambda *_: None)
        return traced(module)

    return build


def with_layer(change):
    def build():
        module = nn.Sequential(nn.Linear(2, 2))
        change(module[0])
        return traced(module)

    return build


def leaf_graph(leaf):
    root = nn.Module()
    root.leaf = leaf
    return graph_of(lambda graph, x: graph.call_module("leaf", (x,)), root)


def local_class():
    class Local(nn.Module):
        def forward(self, x):
            return x

    return leaf_graph(Local())


def parametrized():
    return leaf_graph(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)))


def shared_in_part(layer):
    base = torch.randn(4, 2)
    layer.weight = nn.Parameter(base[:2])
    layer.register_buffer("other", base[1:3])


def with_parameter_subclass(layer):
    class Special(nn.Parameter):
        pass

    layer.weight = Special(layer.weight.detach())


def to_complex(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.complex128))


def with_gradient_hook(layer):
    layer.weight.register_hook(lambda grad: grad * 2)


def traced_with_concrete_arguments():
    return fx.symbolic_trace(nn.Sequential(nn.ReLU()), concrete_args={"input": (fx.PH,)})


def with_custom_method():
    return graph_of(lambda graph, x: graph.call_method("unknown_method", (x,)))


UNSAVABLE = {
    "forward hook": (with_hook("register_forward_hook"), r"module 0 \(.*Linear\).*forward hooks"),
    "pre hook": (with_hook("register_forward_pre_hook"), "forward pre hooks"),
    "backward hook": (with_hook("register_full_backward_hook"), "backward hooks"),
    "gradient hook": (with_layer(with_gradient_hook), r"tensor 0\.weight has gradient hooks"),
    "attribute": (
        with_layer(lambda layer: setattr(layer, "thing", object())),
        r"module 0 \(torch\.nn\.modules\.linear\.Linear\), attribute thing: .*builtins\.object",
    ),
    "patched method": (
        with_layer(lambda layer: setattr(layer, "forward", lambda x: x)),
        "attribute forward",
    ),
    "local class": (local_class, r"module leaf .*cannot be found by name"),
    "parametrization": (parametrized, "parametrize"),
    "lazy": (lambda: traced(nn.Sequential(nn.LazyLinear(2))), "LazyLinear.*forward pre hooks"),
    "meta": (with_layer(lambda layer: layer.to("meta")), "meta device"),
    "sparse": (
        with_layer(lambda layer: setattr(layer, "mask", torch.eye(2).to_sparse())),
        r"tensor 0\.mask is stored as torch\.sparse_coo",
    ),
    "computed": (
        with_layer(lambda layer: setattr(layer, "twice", layer.weight * 2)),
        r"tensor 0\.twice .*gradients flow",
    ),
    "subclass": (with_layer(with_parameter_subclass), "not a plain tensor"),
    "shared in part": (with_layer(shared_in_part), r"0\.weight and 0\.other share a part"),
    "dtype": (with_layer(to_complex), "complex128"),
    "lambda": (
        lambda: graph_of(lambda graph, x: graph.call_function(lambda y: y, (x,))),
        r"node \S+ \(call_function .*lambda.*\): the function cannot be found by name",
    ),
    "argument": (
        lambda: graph_of(lambda g, x: g.call_function(torch.relu, (x,), {"a": b"b"})),
        r"node relu \(call_function torch\.relu\): a value of type builtins\.bytes",
    ),
    "code generator": (traced_with_concrete_arguments, "concrete_args"),
    "method": (with_custom_method, "node unknown_method: 'unknown_method' is not a method"),
    "module": (lambda: nn.Linear(2, 2), "a Linear cannot be saved; pass the result of prune"),
    "nothing": (lambda: None, "a NoneType cannot be saved"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_could_not_be_loaded_again_is_refused_when_saved(case, tmp_path):
    build, message = UNSAVABLE[case]
    with pytest.raises(ArtifactError, match=message):
        save(build(), tmp_path / "deep" / "slim")
    assert list(tmp_path.iterdir()) == []


# Files that are not right


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])
    relist(file)


def other_weights(folder):
    source = save(net("tied")[0], folder.parent / "other")
    relist(shutil.copy(source / "model.safetensors", folder / "model.safetensors"))


def other_shapes(folder):
    edit(folder, lambda d: d["tensors"]["head.weight"].update(shape=[20, 6]))


def strides_beyond_memory(folder):
    edit(folder, lambda d: d["tensors"]["head.weight"].update(strides=[10**12, 1]))


def module_that_holds_itself(folder):
    edit(folder, lambda d: d["modules"]["stem"].update(children={"0": "stem"}))


def hooks(folder):
    attributes = {"_forward_hooks": {"$dict": [[0, {"$name": "torch:relu"}]]}}
    edit(folder, lambda d: d["modules"]["head"].update(attributes=attributes))


def without(key):
    return lambda folder: edit(folder, lambda d: {k: v for k, v in d.items() if k != key})


def layer_class(name):
    return lambda folder: edit(folder, lambda d: d["modules"]["head"].update({"class": name}))


DAMAGE = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no graph": (lambda f: (f / "graph.json").unlink(), r"has no graph\.json .*model\.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "cut graph": (lambda f: truncate(f / "graph.json", 500), "not readable JSON"),
    "binary graph": (lambda f: (f / "graph.json").write_bytes(b"\xff\xfe\x00"), "not readable"),
    "deep graph": (lambda f: (f / "graph.json").write_text("[" * 10**5), "not readable JSON"),
    "list": (lambda f: (f / "graph.json").write_text("[]"), "not a description of a model"),
    "foreign": (lambda f: (f / "graph.json").write_text('{"a": 1}'), "not a description"),
    "version": (lambda f: edit(f, lambda d: d.update(version=99)), "format version 99; .* reads"),
    "cut weights": (lambda f: truncate(f / "model.safetensors", 900), "not a readable safetensors"),
    "empty weights": (lambda f: truncate(f / "model.safetensors", 0), "not a readable safetensors"),
    "other weights": (other_weights, r"do not belong to the graph: missing \[.*'gain'"),
    "other shapes": (other_shapes, r"head\.weight is float32 \[6, 20\] in the weights .*\[20, 6\]"),
    "strides": (strides_beyond_memory, "impossible strides"),
    "cycle": (module_that_holds_itself, "module 'stem' holds itself"),
    "hooks": (hooks, "every module keeps for itself"),
    "no modules": (without("modules"), "is damaged: KeyError"),
    "no tensors": (without("tensors"), "is damaged: KeyError"),
    "function as layer": (layer_class("torch:relu"), "'torch:relu' is not a class of modules"),
    "unknown layer": (layer_class("torch.nn:Linear7"), r"module head: .*does not exist"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_with_what_was_found(case, folder):
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match="is a file, not a folder"):
        load(tmp_path / "model.pt")


def places(document, path=()):
    """Every position inside a JSON document."""
    if path:
        yield path
    if isinstance(document, list):
        document = dict(enumerate(document))
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from places(value, (*path, key))


def damaged(document, path, value):
    document = copy.deepcopy(document)
    inside = document
    for key in path[:-1]:
        inside = inside[key]
    if value is places:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return document


def test_any_single_change_to_the_description_loads_or_is_refused(folder):
    """Deleting or replacing any value never ends in another kind of exception."""
    file = folder / "graph.json"
    document = json.loads(file.read_text())
    chooser = random.Random(0)
    junk = [places, None, -1, "x", [], {}, {"$tuple": [1]}, 1e9, "torch:relu"]
    refused = 0
    for path in chooser.sample(list(places(document)), 250):
        file.write_text(json.dumps(damaged(document, path, chooser.choice(junk))))
        try:
            load(folder, edited="graph.json")
        except ArtifactError:
            refused += 1
    assert refused > 100


def test_reading_the_inputs_of_a_damaged_folder_is_refused(folder):
    edit(folder, lambda d: d.update(inputs=[{"shape": [1], "dtype": "load"}]))
    with pytest.raises(ArtifactError, match="inputs"):
        read_inputs(folder)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_inputs(folder / "gone")
