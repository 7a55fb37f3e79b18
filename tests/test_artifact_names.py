"""Values come back through JSON; names resolve only from the allowlist, and code never runs."""

import collections
import json
import math
import operator
import sys

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxprune.errors import ArtifactError
from fxprune.export.names import Names, name_of
from fxprune.export.save import load, save
from fxprune.export.values import Decoder, Encoder
from tests.artifact_nets import edit, first_node, net


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    return save(net("conv")[0], tmp_path / "slim")


# Values

VALUES = [
    (None, True, 3, -(2**70), 0.1, -0.0, math.inf, -math.inf, "näme\n", 1 + 2j, complex("inf+1j")),
    [1, (2, [3, ()])],
    torch.Size([1, 2]),
    slice(None, -1, 2),
    (Ellipsis, slice(None), None),
    range(1, 7, 2),
    {"a": 1, 2: (3,), None: [4]},
    collections.OrderedDict([("b", 1), ("a", 2)]),
    ({1, 2}, frozenset({"x"})),
    (torch.bfloat16, torch.strided, torch.channels_last, torch.device("cpu")),
    torch.device("cuda", 3),
    (torch.relu, F.relu, F.max_pool2d, F.gelu, operator.getitem, math.sqrt, getattr, float),
    (torch.ops.aten.add.Tensor, torch.ops.aten.add, torch.Tensor.add, torch.linalg.norm, nn.Conv2d),
]


def encoded(value):
    return json.loads(json.dumps(Encoder(lambda *_: "t").encode(value, "here"), allow_nan=False))


def same_types(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        one, other = list(one.items()), list(other.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_types, one, other))
    return True


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_equal_and_of_the_same_type(value):
    decoded = Decoder(Names(), {}, {}).decode(encoded(value))
    assert decoded == value
    assert same_types(decoded, value)


def test_nan_and_the_sign_of_zero_come_back():
    nan, zero = Decoder(Names(), {}, {}).decode(encoded((math.nan, -0.0)))
    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1


def test_a_number_of_numpys_becomes_the_python_number():
    assert encoded([np.float64(0.25), np.int32(3), np.bool_(True)]) == [0.25, 3, True]


@pytest.mark.parametrize("value", [object(), b"bytes", lambda: 0, nn.ReLU(), [1, {2: object()}]])
def test_a_value_without_a_json_form_is_refused_with_its_place_and_type(value):
    with pytest.raises(ArtifactError, match=r"^here: a value of type \S+ cannot be saved"):
        encoded(value)


@pytest.mark.parametrize(
    "document",
    [
        {"$eval": "1"},
        {"$tuple": [], "$list": []},
        {},
        {"$dtype": "load"},
        {"$dtype": "nn.x"},
        {"$node": "gone"},
        {"$tensor": "gone"},
        {"$enum": ["torch:relu", "A"]},
    ],
    ids=str,
)
def test_an_encoded_value_that_means_nothing_is_refused(document):
    with pytest.raises(ArtifactError):
        Decoder(Names(), {}, {}).decode(document)


# The allowlist

UNSAFE_NAMES = [
    "os:system",
    "builtins:eval",
    "builtins:exec",
    "builtins:__import__",
    "builtins:setattr",
    "operator:call",
    "operator:methodcaller",
    "operator:attrgetter",
    "torch:os.system",
    "torch:load",
    "torch:save",
    "torch:from_file",
    "torch:hub.load",
    "torch:ops.load_library",
    "torch:Tensor.numpy",
    "torch:Tensor.__reduce_ex__",
    "torch.hub:load",
    "torch.serialization:load",
    "torch.ops:load_library",
    "torch.ops:aten.save",
    "torch.ops:aten.from_file",
    "torch.ops:aten.from_file.default",
    "torch.ops:aten.add.Tensor.__call__",
    "torch.nn:Module.load_state_dict",
    "torch.nn.functional:importlib.import_module",
    "torch.nn.functional:boolean_dispatch",
    "torch.nn.modules.module:functools.partial",
    "torch.utils.cpp_extension:load_inline",
    "torchvision.models:resnet18",
    "torchvision.models._api:get_model",
    "torchvision.io:write_file",
    "fxprune.export.save:save",
    "math:__loader__",
    "torch",
    "torch:",
    ":relu",
    "torch:relu:relu",
    "torch.nn..functional:relu",
    "",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_a_name_off_the_allowlist_is_refused(name):
    with pytest.raises(ArtifactError):
        Names().resolve(name)


def test_a_name_off_the_allowlist_says_how_to_allow_it():
    with pytest.raises(ArtifactError, match=r"trust=\('mypackage\.layers',\)"):
        Names().resolve("mypackage.layers:Block")


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(ArtifactError, match="does not exist in this installation"):
        Names().resolve("torch:relu7")


def test_every_function_with_a_name_is_found_by_it_again():
    for function in (F.relu, torch.cat, F.adaptive_avg_pool2d, torch.Tensor.add_, torch.fft.rfft):
        assert Names().resolve(name_of(function)) is function


@pytest.mark.parametrize(
    "member",
    [
        "__class__",
        "__reduce__",
        "_backward_hooks",
        "numpy",
        "untyped_storage",
        "tofile",
        "format",
        "relu(); import os; x",
        "relu.x",
        "",
        None,
    ],
)
def test_a_method_or_attribute_that_leaves_the_world_of_tensors_is_refused(member):
    with pytest.raises(ArtifactError):
        Names().check_member(member)


@pytest.mark.parametrize("member", ["relu", "size", "shape", "device", "items", "__add__", "T"])
def test_methods_and_attributes_of_tensors_and_containers_are_allowed(member):
    Names().check_member(member)


def test_unsafe_methods_and_attributes_in_a_graph_are_refused(folder):
    first_getattr = {"name": "g", "op": "call_function", "target": "builtins:getattr", "kwargs": {}}

    def change_method(document):
        first_node(document, "call_method")["target"] = "__class__"

    def change_getattr(document):
        nodes = document["modules"][""]["nodes"]
        nodes.insert(1, first_getattr | {"args": [{"$node": "x"}, "__class__"]})

    def change_getattr_by_node(document):
        nodes = document["modules"][""]["nodes"]
        nodes.insert(1, first_getattr | {"args": [{"$node": "x"}, {"$node": "x"}]})

    original = (folder / "graph.json").read_text()
    for change in (change_method, change_getattr, change_getattr_by_node):
        (folder / "graph.json").write_text(original)
        edit(folder, change)
        with pytest.raises(ArtifactError, match="method or attribute"):
            load(folder)


INJECTIONS = {
    "node name": lambda d: first_node(d, "call_module").update(name="a=1;b"),
    "input name": lambda d: first_node(d, "placeholder").update(target="x=print()"),
    "keyword": lambda d: first_node(d, "call_function").update(kwargs={"a=print(),b": 1}),
    "method": lambda d: first_node(d, "call_method").update(target="x();print"),
    "path": lambda d: first_node(d, "call_module").update(target='stem.0"),print("'),
    "class name": lambda d: d["modules"][""].update(graph_class="A(print())"),
}


@pytest.mark.parametrize("place", INJECTIONS)
def test_code_smuggled_into_a_graph_is_refused_and_does_not_run(place, folder, capsys):
    edit(folder, INJECTIONS[place])
    with pytest.raises(ArtifactError):
        load(folder)
    assert capsys.readouterr().out == ""


def test_code_in_the_name_of_a_submodule_is_refused(folder, capsys):
    name = 'a"), print("ran'

    def change(document):
        root = document["modules"][""]
        root["children"][name] = "head"
        first_node(document, "call_module").update(target=name)

    edit(folder, change)
    with pytest.raises(ArtifactError, match="neither a submodule nor a tensor"):
        load(folder)


PACKAGE = """
import torch
from torch import fx, nn

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = 3.0
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return Answer(x * self.by * self.weight)

class Answer:
    def __init__(self, value):
        self.value = value

    def unwrap(self):
        return self.value

def halve(x):
    return x / 2

fx.wrap("halve")

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, x):
        return halve(self.scale(x).unwrap())

class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Scale)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable module with a leaf class, a wrapped function and a custom method."""
    (tmp_path / "made_up_layers.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("made_up_layers")
    sys.modules.pop("made_up_layers")


@pytest.fixture
def custom(package):
    """A graph over the classes and functions of ``package``."""
    model = package.Model()
    return fx.GraphModule(model, package.Tracer().trace(model))


def test_a_model_of_another_package_loads_only_if_the_package_is_trusted(custom, tmp_path):
    path = save(custom, tmp_path / "slim")
    with pytest.raises(ArtifactError, match=r"trust=\('made_up_layers',\)"):
        load(path)
    with pytest.raises(ArtifactError, match="not on the allowlist"):
        load(path, trust="made_up")
    x = torch.randn(3, 2)
    for trust in ("made_up_layers", ["other", "made_up_layers"]):
        assert torch.equal(load(path, trust=trust)(x), custom(x))


def test_a_file_cannot_name_what_it_trusts(custom, tmp_path):
    path = save(custom, tmp_path / "slim")
    assert json.loads((path / "graph.json").read_text())["trust"] == ["made_up_layers"]
    with pytest.raises(ArtifactError):
        load(path)


def test_a_trusted_package_that_is_not_installed_is_named(custom, tmp_path, monkeypatch):
    path = save(custom, tmp_path / "slim")
    monkeypatch.setitem(sys.modules, "made_up_layers", None)
    with pytest.raises(ArtifactError, match="made_up_layers"):
        load(path, trust="made_up_layers")
