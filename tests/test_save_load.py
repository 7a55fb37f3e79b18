"""Saved models come back bit for bit, and folders appear complete or not at all."""

import copy
import json
import math
import operator
import shutil
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import fx, nn

from fxprune import files
from fxprune.errors import ArtifactError
from fxprune.export.folder import FILES
from fxprune.export.save import check_target, is_artifact, load, read_inputs, save
from fxprune.vision import import_torchvision
from tests.artifact_nets import (
    NETS,
    assert_equal,
    flags,
    graph_of,
    leaves,
    net,
    output,
    round_trip,
    traced,
)

each_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    return save(net("conv")[0], tmp_path / "slim")


# What comes back


@pytest.mark.parametrize("training", [False, True])
@each_net
def test_a_loaded_model_computes_the_same_bits_and_the_same_gradients(name, training, tmp_path):
    module, x = net(name, training=training)
    loaded = round_trip(module, tmp_path)
    for seed in range(2):
        ours, theirs = output(loaded, x, seed), output(module, x, seed)
        assert_equal(ours, theirs)
        for result in (ours, theirs):
            sum(t.sum() for t in leaves(result) if isinstance(t, torch.Tensor)).backward()
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (loaded, module)]
    assert_equal(*gradients)
    assert_equal(dict(loaded.named_buffers()), dict(module.named_buffers()))


@each_net
def test_names_order_dtypes_memory_order_flags_and_modes_come_back(name, tmp_path):
    module, _ = net(name)
    next(iter(module.children())).train()
    assert flags(round_trip(module, tmp_path)) == flags(module)


def test_train_and_eval_reach_every_layer_of_a_loaded_model(tmp_path):
    module, x = net("conv")
    loaded = round_trip(module, tmp_path)
    before = loaded.get_buffer("stem.1.running_mean").clone()
    assert_equal(output(loaded.train(), x), output(module.train(), x))
    assert not torch.equal(loaded.get_buffer("stem.1.running_mean"), before)
    assert_equal(output(loaded.eval(), x), output(module.eval(), x))


def test_buffers_that_state_dict_leaves_out_come_back_and_stay_left_out(tmp_path):
    module, _ = net("conv")
    module.register_buffer("hidden", torch.tensor([3.0]), persistent=False)
    loaded = round_trip(module, tmp_path)
    assert "hidden" not in loaded.state_dict()
    assert torch.equal(loaded.hidden, module.hidden)


def test_weights_that_are_not_finite_come_back(tmp_path):
    module = traced(nn.Sequential(nn.Linear(2, 1)))
    weight = module.get_parameter("0.weight")
    weight.data.copy_(torch.tensor([[math.nan, -math.inf]]))
    loaded = round_trip(module, tmp_path).get_parameter("0.weight")
    assert torch.equal(loaded.view(torch.int32), weight.view(torch.int32))


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path):
    module, x = net("tied")
    loaded = round_trip(module, tmp_path)
    assert loaded.a.weight is loaded.b.weight
    assert loaded.c.weight is not loaded.a.weight
    with torch.no_grad():
        loaded.a.weight.add_(1)
        module.a.weight.add_(1)
    assert torch.equal(loaded.c.weight, loaded.a.weight)
    assert_equal(loaded(x), module(x))
    with safe_open(tmp_path / "slim" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a.bias", "a.weight", "b.bias", "c.bias"]


def test_a_module_registered_twice_is_one_module_after_loading(tmp_path):
    root = nn.Module()
    root.a = root.b = nn.Linear(3, 3)
    module = graph_of(lambda g, x: g.call_module("a", (g.call_module("b", (x,)),)), root)
    loaded = round_trip(module, tmp_path)
    assert loaded.a is loaded.b
    assert list(loaded.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_dtype_of_weights_is_kept(dtype, tmp_path):
    loaded = round_trip(traced(nn.Sequential(nn.Linear(3, 2, dtype=dtype))), tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_memory_order_is_kept(tmp_path):
    module = nn.Sequential(
        nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 1), nn.Flatten(), nn.Linear(6, 7)
    ).to(memory_format=torch.channels_last)
    module[3].weight = nn.Parameter(torch.randn(6, 7).t())
    loaded = round_trip(traced(module), tmp_path)
    strides = [p.stride() for p in loaded.parameters()]
    assert strides == [p.stride() for p in module.parameters()]
    assert strides[0] == (36, 1, 12, 4)
    assert strides[-2] == (1, 7)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(loaded(x), module(x))


def test_a_window_into_larger_memory_is_stored_without_the_rest(tmp_path):
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(torch.randn(1000, 3)[10:12])
    loaded = round_trip(traced(nn.Sequential(module)), tmp_path)
    assert torch.equal(loaded.get_parameter("0.weight"), module.weight)
    assert (tmp_path / "slim" / "model.safetensors").stat().st_size < 1000


def test_an_expanded_buffer_comes_back_with_its_values(tmp_path):
    module = nn.Module()
    module.register_buffer("rows", torch.arange(3.0).expand(4, 3))
    graph = graph_of(lambda g, x: g.call_function(operator.add, (x, g.get_attr("rows"))), module)
    assert torch.equal(round_trip(graph, tmp_path).rows, module.rows)


def test_loading_twice_gives_independent_models_that_need_no_file(tmp_path):
    module, x = net("conv")
    path = save(module, tmp_path / "slim")
    one, other = load(path), load(path)
    shutil.rmtree(path)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert_equal(other(x), module(x))


def test_a_loaded_model_saves_to_the_same_bytes(tmp_path):
    first = save(net("conv")[0], tmp_path / "first")
    second = save(load(first), tmp_path / "second")
    for file in ("graph.json", "model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_loaded_model_can_be_copied_traced_again_and_changed(tmp_path):
    module, x = net("conv")
    loaded = round_trip(module, tmp_path)
    assert_equal(copy.deepcopy(loaded)(x), module(x))
    assert_equal(fx.symbolic_trace(loaded)(x), module(x))
    loaded.graph.eliminate_dead_code()
    loaded.recompile()
    assert_equal(loaded(x), module(x))


def test_saving_and_loading_use_no_pickle(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in [(torch, "load"), (torch, "save"), (sys.modules["pickle"], "loads")]:
        monkeypatch.setattr(module, name, refuse)
    round_trip(net("conv")[0], tmp_path)


def test_saving_changes_nothing_in_the_model(tmp_path):
    module, x = net("conv", training=True)
    before, expected = flags(module), output(copy.deepcopy(module), x)
    save(module, tmp_path / "slim")
    assert flags(module) == before
    assert_equal(output(module, x), expected)


def test_a_graph_inside_a_graph_comes_back(tmp_path):
    inner, x = net("tied")
    root = nn.Module()
    root.inner = inner
    outer = graph_of(lambda graph, y: graph.call_module("inner", (y,)), root)
    loaded = round_trip(outer, tmp_path)
    assert isinstance(loaded.inner, fx.GraphModule)
    assert_equal(loaded(x), inner(x))


def test_attributes_that_a_graph_module_carries_come_back(tmp_path):
    module, _ = net("tied")
    module.labels = ["cat", "dog"]
    module.prior = torch.tensor([0.25, 0.75])
    loaded = round_trip(module, tmp_path)
    assert loaded.labels == ["cat", "dog"]
    assert torch.equal(loaded.prior, module.prior)
    assert "prior" not in loaded.state_dict()


TORCHVISION = [
    "resnet18",
    "resnet50",
    "densenet121",
    "densenet201",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "squeezenet1_1",
    "mnasnet0_5",
    "resnext50_32x4d",
    "vgg11_bn",
]


@pytest.mark.zoo
@pytest.mark.parametrize("name", [*TORCHVISION, "swin_v2_t", "fcn_resnet50"])
def test_published_networks_come_back_bit_for_bit(name, tmp_path):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"weights_backbone": None} if name.startswith("fcn") else {}
    model = import_torchvision().models.get_model(name, weights=None, **options).eval()
    module = fx.symbolic_trace(model)
    loaded = round_trip(module, tmp_path)
    assert list(loaded.state_dict()) == list(module.state_dict())
    x = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equal(loaded(x), module(x))


@pytest.mark.zoo
def test_a_network_whose_training_output_is_a_named_tuple_comes_back(tmp_path):
    model = import_torchvision().models.googlenet(weights=None, init_weights=False).train()
    loaded = round_trip(fx.symbolic_trace(model), tmp_path)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert_equal(output(loaded, x), output(fx.symbolic_trace(model), x))


# Folders


@dataclass
class Plan:
    text: str
    requested: dict = field(default_factory=dict)
    reached: dict = field(default_factory=dict)
    groups = frozen = approximate = ()

    def to_json(self):
        return self.text


def result_of(module, *inputs, plan="{}"):
    return SimpleNamespace(
        model=module,
        plan=Plan(plan),
        traced=SimpleNamespace(example_inputs=inputs),
        verdict=None,
        reconstruction=None,
    )


def test_the_plan_of_a_result_is_written_beside_its_model(tmp_path):
    module, x = net("conv")
    path = save(result_of(module, x, plan='{"kept": [1]}'), tmp_path / "slim")
    assert {file.name for file in path.iterdir()} == FILES
    assert json.loads((path / "plan.json").read_text()) == {"kept": [1]}
    assert_equal(load(path)(x), module(x))


def test_a_plan_that_is_missing_or_not_the_models_own_is_refused(tmp_path):
    path = save(result_of(*net("tied"), plan='{"kept": [1]}'), tmp_path / "slim")
    (path / "plan.json").write_text('{"kept": [2]}')
    with pytest.raises(ArtifactError, match=r"plan\.json is damaged or was edited"):
        load(path)
    (path / "plan.json").unlink()
    with pytest.raises(ArtifactError, match=r"plan\.json.* incomplete"):
        load(path)


def test_shapes_and_dtypes_of_the_example_inputs_are_recorded_and_passed_on(tmp_path):
    module, _ = net("conv")
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    first = save(result_of(module, torch.randn(2, 3), tokens, 4, None), tmp_path / "first")
    second = save(load(first), tmp_path / "second")
    for path in (first, second):
        image, ids, number, nothing = read_inputs(path)
        assert (image.shape, image.dtype) == ((2, 3), torch.float32)
        assert (ids.shape, ids.dtype) == ((1, 7), torch.int64)
        assert (number, nothing) == (4, None)
    assert read_inputs(save(module, tmp_path / "third")) is None


def test_parent_folders_are_made_and_the_path_is_returned(tmp_path):
    path = save(net("tied")[0], tmp_path / "a" / "b")
    assert path == (tmp_path / "a" / "b").resolve()
    assert is_artifact(path)
    assert [file.name for file in path.parent.iterdir()] == ["b"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "slim").mkdir()
    save(net("tied")[0], tmp_path / "slim")
    load(tmp_path / "slim")


def test_a_saved_folder_can_be_read_by_whoever_may_read_its_neighbours(tmp_path):
    (tmp_path / "neighbour").mkdir()
    (tmp_path / "neighbour" / "file").touch()
    path = save(net("tied")[0], tmp_path / "slim")
    assert path.stat().st_mode == (tmp_path / "neighbour").stat().st_mode
    modes = {file.stat().st_mode for file in path.iterdir()}
    assert modes == {(tmp_path / "neighbour" / "file").stat().st_mode}


def test_a_saved_model_is_replaced_only_when_asked(tmp_path):
    path = save(net("tied")[0], tmp_path / "slim")
    with pytest.raises(ArtifactError, match="overwrite=True"):
        save(net("conv")[0], path)
    assert list(load(path).state_dict()) == list(net("tied")[0].state_dict())
    save(net("conv")[0], path, overwrite=True)
    assert list(load(path).state_dict()) == list(net("conv")[0].state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["slim"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    for name in ("graph.json", "notes.txt"):
        path = tmp_path / name.partition(".")[0]
        path.mkdir()
        (path / name).write_text("{}")
        with pytest.raises(ArtifactError, match=f"not a saved model .*{name}"):
            save(net("tied")[0], path, overwrite=True)
        assert (path / name).read_text() == "{}"


def test_files_that_someone_put_beside_a_saved_model_are_not_deleted(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        save(net("tied")[0], folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "slim").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        check_target(tmp_path / "slim")


@pytest.mark.parametrize("step", ["_own_copy", "write_sums", "_check_reads_back"])
def test_a_save_that_fails_half_way_leaves_nothing_and_keeps_what_was_there(
    step, tmp_path, monkeypatch
):
    def fail(*args):
        raise OSError("No space left on device")

    old = save(net("tied")[0], tmp_path / "old")
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    # The package's own name `save` is the function.
    monkeypatch.setattr(sys.modules["fxprune.export.save"], step, fail)
    for target in ("new", "old", "deep/new"):
        with pytest.raises(ArtifactError, match="No space left"):
            save(net("conv")[0], tmp_path / target, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before


def test_what_was_there_is_put_back_when_the_last_step_fails(tmp_path, monkeypatch):
    old = save(net("tied")[0], tmp_path / "old")
    rename = type(old).rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(type(old), "rename", fail_for_new)
    with pytest.raises(ArtifactError):
        save(net("conv")[0], old, overwrite=True)
    assert list(load(old).state_dict()) == list(net("tied")[0].state_dict())


def test_weights_that_were_not_written_as_they_are_stop_the_save(tmp_path, monkeypatch):
    original = safetensors.torch.save_file

    def corrupt(data, *rest):
        original({key: value + 1 for key, value in data.items()}, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", corrupt)
    with pytest.raises(ArtifactError, match=r"differs in a\.bias"):
        save(net("tied")[0], tmp_path / "slim")
