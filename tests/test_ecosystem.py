"""Formats of others: timm's shapes, the layout of model hubs, node data for viewers of graphs."""

import json

import pytest
import torch
from torch import nn

import fxprune as fp
from fxprune.runtimes import onnx
from tests.test_slim_folder import call
from tests.zoo.case import conv_bn
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize


def pruned(model, inputs):
    return fp.prune(model, inputs, ratios=0.6)


# timm


class Mobile(nn.Module):
    """What timm's pruned models are made of."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = conv_bn(3, 8), conv_bn(8, 24, 1)
        self.depthwise, self.project = conv_bn(24, 24, groups=24), conv_bn(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean((2, 3)))


def read_by_timm(model, text):
    """What timm's reader makes of a model, after its source: new layers of the shapes given."""
    shapes = {}
    for entry in text.split("***"):
        key, shape = entry.split(":")
        sizes = shape[1:-1].split(",")
        if sizes[0] != "":
            shapes[key] = [int(size) for size in sizes]
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Conv2d):
            outputs, inputs = shapes[f"{name}.weight"][:2]
            groups = outputs if old.groups > 1 else 1
            options = {"padding": old.padding, "dilation": old.dilation, "stride": old.stride}
            new = nn.Conv2d(
                outputs if old.groups > 1 else inputs,
                outputs,
                old.kernel_size,
                groups=groups,
                bias=old.bias is not None,
                **options,
            )
        elif isinstance(old, nn.BatchNorm2d):
            new = nn.BatchNorm2d(shapes[f"{name}.weight"][0], eps=old.eps)
        elif isinstance(old, nn.Linear):
            inputs = shapes[f"{name}.weight"][1]
            new = nn.Linear(inputs, old.out_features, bias=old.bias is not None)
        else:
            continue
        model.set_submodule(name, new)
    return model.eval()


def test_timm_makes_the_slim_model_of_the_text_and_a_fresh_one():
    model, x = randomize(Mobile()).eval(), torch.randn(2, 3, 8, 8)
    result = pruned(model, x)
    text = fp.timm_shapes(Mobile(), result.plan)
    assert text.startswith(
        f"stem.0.weight:{list(result.model.get_parameter('stem.0.weight').shape)}***"
    )
    assert "stem.1.num_batches_tracked:[]" in text
    again = read_by_timm(Mobile(), text)
    again.load_state_dict(fp.apply_plan(model.state_dict(), result.plan))
    assert torch.equal(call(again, x), call(result.model, x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grouped_conv", "its groups become as many as its channels"),
        ("circular_padding", "it becomes a plain convolution"),
        ("prelu", r"act1\.weight \(PReLU\): it is not resized|PReLU"),
        ("mlp", "a linear layer keeps its outputs"),
        ("transposed_conv", "ConvTranspose2d"),
    ],
)
def test_what_timm_would_make_something_else_of_is_refused(name, message):
    model = build(name)
    result = pruned(model, ZOO[name].inputs())
    with pytest.raises(fp.ExportError, match=message):
        fp.timm_shapes(model, result.plan)


# Model hubs


@pytest.fixture
def folder(tmp_path):
    return fp.save(
        pruned(build("residual").float(), ZOO["residual"].inputs().float()), tmp_path / "slim"
    )


def test_the_card_is_one_that_model_hubs_read(folder):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(folder / "README.md").data
    assert data.library_name == "fxprune"
    assert "pruning" in data.tags


def test_a_folder_is_a_repository_that_the_hub_mixin_of_a_class_reads(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width=32):
            super().__init__()
            self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

        def forward(self, x):
            return self.b(self.a(x).relu())

    model, x = Net(), torch.randn(4, 6)
    result = pruned(model, x)
    width = result.model.get_parameter("a.weight").shape[0]
    path = fp.save(result, tmp_path / "slim")
    again = Net.from_pretrained(path, width=width, strict=True)
    assert torch.equal(call(again, x), call(result.model, x))
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Net"]
    assert config["parameters"] == sum(p.numel() for p in again.parameters())


def test_a_folder_of_links_as_hubs_keep_it_in_their_cache_loads(folder, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert fp.load(snapshot)


# Viewers of graphs


def kept_by_shape(result):
    """Share of the outputs that every parameter keeps, from nothing but shapes."""
    before = result.traced.graph_module.state_dict()
    return {
        name: tensor.shape[0] / before[name].shape[0]
        for name, tensor in result.model.named_parameters()
    }


@pytest.mark.parametrize(
    "name", ["residual", "dense_block", "depthwise_separable", "encoder_layer"]
)
def test_node_data_says_what_the_nodes_of_the_program_keep(name, tmp_path):
    result = pruned(build(name), ZOO[name].inputs())
    fp.export(result, tmp_path / "m.pt2")
    found = fp.export(result, tmp_path / "m.kept.json")
    assert (found.format, found.error) == ("node-data", None)
    data = json.loads(found.file.read_text())
    program = torch.export.load(tmp_path / "m.pt2")
    nodes = {node.name: node for node in program.graph.nodes}
    assert set(data["results"]) <= set(nodes)
    expected = kept_by_shape(result)
    inputs = {s.arg.name: s.target for s in program.graph_signature.input_specs}
    checked = 0
    for node in nodes.values():
        read = [inputs[n.name] for n in node.all_input_nodes if inputs.get(n.name) in expected]
        if read:
            value = data["results"][node.name]["value"]
            assert value == pytest.approx(min(expected[n] for n in read), abs=1e-4)
            checked += 1
    assert checked >= 4
    assert min(v["value"] for v in data["results"].values()) < 0.7


def test_an_onnx_file_says_what_its_nodes_keep(tmp_path):
    onnx.check_onnx()
    package = pytest.importorskip("onnx")
    result = pruned(build("residual").float(), ZOO["residual"].inputs().float())
    graph = package.load(fp.export(result, tmp_path / "m.onnx").file)
    props = {p.key: p.value for p in graph.metadata_props}
    assert props["fxprune.fingerprint"] == result.plan.fingerprint
    kept = [
        float(p.value)
        for node in graph.graph.node
        if node.op_type == "Conv"
        for p in node.metadata_props
        if p.key == "fxprune.kept"
    ]
    weights = [p for n, p in kept_by_shape(result).items() if n.endswith("weight")]
    convolutions = [share for share in weights if share != 1]
    assert len(kept) == 5
    assert set(kept) == {round(share, 4) for share in convolutions}


def test_node_data_without_a_plan_is_refused(tmp_path):
    with pytest.raises(fp.ExportError, match="nothing says what was kept"):
        fp.export(nn.Linear(2, 2), tmp_path / "m.kept.json", inputs=torch.randn(2, 2))
