"""Models written for other runtimes give the outputs of the model there, at any batch size."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxprune as fp
from fxprune.export import formats
from fxprune.export.formats import FORMATS
from fxprune.runtimes import onnx
from tests.test_model_is_preserved import assert_unchanged, model_with_a_past, snapshot
from tests.zoo.models import ZOO, build

NETS = [
    ("residual", "auto"),
    ("dense_block", "auto"),
    ("depthwise_separable", "auto"),
    ("fused_attention", "auto"),
    ("encoder_layer", "export"),
    ("two_positional", "auto"),
    ("many_outputs", "auto"),
]
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def single(tree):
    """The same in single precision, which every runtime knows."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.float, tree)


def pruned(name, frontend="auto"):
    model, inputs = build(name).float(), single(ZOO[name].inputs())
    return fp.prune(model, inputs, ratios=0.6, frontend=frontend)


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def run_pt2(file, inputs):
    return torch.export.load(file).module()(*inputs)


def run_onnx(file, inputs):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {n: t.numpy() for n, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(a) for a in session.run(None, feed)]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def run_torchscript(file, inputs):
    return torch.jit.load(file)(*inputs)


def run_aoti(file, inputs):
    return torch._inductor.aoti_load_package(str(file))(*inputs)


RUN = {"pt2": run_pt2, "onnx": run_onnx, "torchscript": run_torchscript, "aoti": run_aoti}


def check_file(file, result, name, format):
    """Run the file as its users would, without fxprune, on a batch that nobody exported."""
    inputs = single(ZOO[name].inputs(seed=5, batch=5))
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        expected = tensors(result.model(*inputs))
        actual = tensors(RUN[format](file, inputs))
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("format", ["pt2", "torchscript"])
@pytest.mark.parametrize(("name", "frontend"), NETS)
def test_a_file_gives_the_outputs_of_the_model_at_any_batch_size(name, frontend, format, tmp_path):
    result = pruned(name, frontend)
    found = fp.export(result, tmp_path / "model", format=format)
    assert (found.format, found.batch, found.why) == (format, None, "")
    assert found.error == 0
    check_file(found.file, result, name, format)


@pytest.mark.parametrize(
    ("name", "frontend"), [NETS[0], NETS[3], NETS[4], NETS[5], NETS[6]], ids=lambda x: x
)
def test_onnx_runtime_gives_the_outputs_of_the_model_at_any_batch_size(name, frontend, tmp_path):
    onnx.check_onnx()
    result = pruned(name, frontend)
    found = fp.export(result, tmp_path / "model.onnx")
    assert (found.format, found.batch) == ("onnx", None)
    assert 0 < found.error < 1e-5
    check_file(found.file, result, name, "onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's remarks on its own parts
@COMPILER
@pytest.mark.parametrize("format", ["compile", "aoti"])
def test_compiled_models_give_the_outputs_of_the_model(format, tmp_path):
    result = pruned("residual")
    path = tmp_path / "model.aoti.pt2" if format == "aoti" else None
    found = fp.export(result, path, format=format)
    assert (found.batch, found.file) == (None, path)
    assert found.error < 1e-5
    if path:
        check_file(path, result, "residual", "aoti")


class Named(nn.Module):
    """Inputs by name, a number among them, and outputs in containers, a number among them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids, *, scale: float = 2.0, mask=None):
        x = self.b(self.a(ids).relu()) * scale
        x = x if mask is None else x * mask
        return {"logits": x, "rows": x.shape[0], "pair": (x.sum(1), [x.max()])}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("format", ["pt2", "onnx", "torchscript"])
def test_inputs_by_name_and_outputs_in_containers_are_exported(format, tmp_path):
    inputs = {"ids": torch.randn(4, 6), "scale": 3.0, "mask": torch.ones(4, 1)}
    found = fp.export(Named(), tmp_path / "model", format=format, inputs=inputs)
    assert found.batch is None
    assert found.error < 1e-5


def test_outputs_of_an_onnx_file_are_called_what_they_are_called_in_the_model(tmp_path):
    onnx_package = pytest.importorskip("onnx")
    found = fp.export(Named(), tmp_path / "m.onnx", inputs={"ids": torch.randn(4, 6)})
    graph = onnx_package.load(found.file).graph
    names = [output.name for output in graph.output]
    assert [n for n in names if n != "rows"] == ["logits", "pair.0", "pair.1.0"]
    assert [i.name for i in graph.input] == ["ids"]


# What stays as it was


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("format", ["pt2", "torchscript"])
def test_exporting_leaves_the_model_the_random_numbers_and_the_folder_as_they_were(
    format, tmp_path
):
    model, inputs = model_with_a_past("residual").float(), single(ZOO["residual"].inputs())
    before, state = snapshot(model), torch.get_rng_state()
    fp.export(model, tmp_path / "model", format=format, inputs=inputs)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_only_when_asked(tmp_path):
    result, file = pruned("mlp"), tmp_path / "model.pt2"
    file.write_text("mine")
    with pytest.raises(fp.ArtifactError, match="exists already"):
        fp.export(result, file)
    assert file.read_text() == "mine"
    fp.export(result, file, overwrite=True)
    assert torch.export.load(file)


def test_a_saved_model_is_exported_with_inputs_like_those_recorded(tmp_path):
    result = pruned("two_positional")
    loaded = fp.load(fp.save(result, tmp_path / "slim"))
    found = fp.export(loaded, tmp_path / "model.pt2")
    assert found.batch is None
    check_file(found.file, result, "two_positional", "pt2")


# What is refused


def with_outputs(monkeypatch, change):
    """Have pt2 files compute something else."""
    read = FORMATS["pt2"].read

    def wrong(source, file):
        call = read(source, file)
        return lambda args, kwargs: change(call(args, kwargs))

    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], read=wrong))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.001, "other outputs than the model's on a batch of 2"),
        (lambda y: y[:, :-1], "has shape"),
        (lambda y: y if len(y) == 2 else y.flip(0), "on a batch of 3"),
        (lambda y: y[:2], "on a batch of 3"),
        (lambda y: (y, y), "returns"),
        (lambda y: y * float("nan"), "off by inf"),
    ],
)
def test_a_runtime_with_other_outputs_is_refused_and_leaves_no_file(
    change, message, tmp_path, monkeypatch
):
    result = pruned("residual")
    with_outputs(monkeypatch, change)
    with pytest.raises(fp.ExportError, match=message):
        fp.export(result, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
    assert fp.export(result, tmp_path / "model.pt2", check=False).error is None


def test_a_model_that_amplifies_rounding_may_differ_by_its_own_rounding(tmp_path, monkeypatch):
    class Amplifies(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1e4 - 1e4

    model, x = Amplifies(4, 4), torch.randn(2, 4)
    with_outputs(monkeypatch, lambda y: y + 1e-3)
    assert fp.export(model, tmp_path / "m.pt2", inputs=x).error > 1e-4
    with_outputs(monkeypatch, lambda y: y + 0.1)
    with pytest.raises(fp.ExportError, match="other outputs"):
        fp.export(model, tmp_path / "m.pt2", inputs=x, overwrite=True)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    onnx.check_onnx()
    result = pruned("unknown_operation")
    with pytest.raises(fp.ExportError, match=r"ONNX has no word for fxprune_zoo\.rotate_pairs"):
        fp.export(result, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_what_one_onnx_file_holds_are_refused(tmp_path, monkeypatch):
    onnx.check_onnx()
    monkeypatch.setattr(formats, "_ONNX_LIMIT", 50)
    with pytest.raises(fp.ExportError, match="one ONNX file holds 2; use pt2"):
        fp.export(nn.Linear(4, 3), tmp_path / "m.onnx", inputs=torch.randn(2, 4))


class Largest(nn.Module):
    def forward(self, x):
        return x.amax()


def test_an_operator_that_the_onnx_exporter_stumbles_over_is_named(tmp_path):
    onnx.check_onnx()
    with pytest.raises(fp.ExportError, match=r"the exporter fails at aten\.amax\.default: "):
        fp.export(Largest(), tmp_path / "m.onnx", inputs=torch.randn(2, 3), free_batch=False)


class ForTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.a(x).relu().view(1, 16))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("format", ["pt2", "torchscript"])
def test_a_fixed_batch_size_is_reported_or_refused(format, tmp_path):
    model, x = ForTwo(), torch.randn(2, 6)
    found = fp.export(model, tmp_path / "model", format=format, inputs=x)
    assert found.batch == 2
    assert found.why
    with pytest.raises(fp.ExportError, match="only the batch size of the example works"):
        fp.export(model, tmp_path / "other", format=format, inputs=x, free_batch=True)
    free = fp.export(ForTwo().a, tmp_path / "f", format=format, inputs=x, free_batch=False)
    assert (free.batch, free.why) == (2, "it was asked for")


class TwoRows(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


def test_a_program_that_guards_against_the_batch_size_of_the_example_is_written_for_that(tmp_path):
    x = torch.randn(2, 3, 4)
    found = fp.export(TwoRows(), tmp_path / "model.pt2", inputs=x)
    assert (found.batch, found.error) == (2, 0)
    assert "fails on a batch of 2" in found.why
    assert torch.equal(torch.export.load(found.file).module()(x), x.view(2, -1))


def test_an_operator_that_onnx_knows_for_one_batch_size_only_fixes_it(tmp_path):
    onnx.check_onnx()
    found = fp.export(pruned("dynamic_conv"), tmp_path / "model.onnx")
    assert found.batch == 2
    assert "onnx: the exporter fails" in found.why


class ByValue(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"path": "m.tflite"},
            fp.ArgumentError,
            "one of pt2, onnx, torchscript, aoti, node-data, compile",
        ),
        ({"path": None, "format": "pt2"}, fp.ArgumentError, "needs a path"),
        ({"path": "m", "format": "compile"}, fp.ArgumentError, "writes no file"),
        ({"path": "no/such/m.pt2"}, fp.ArtifactError, "not a folder"),
        ({"path": ".", "format": "pt2"}, fp.ArtifactError, "is a folder"),
        ({"path": "m.pt2", "inputs": torch.randn(2, 5)}, fp.ExampleInputError, "does not run"),
        ({"path": "m.pt2", "inputs": None}, fp.ExampleInputError, "give example inputs"),
        ({"path": "m.pt2", "model": 3}, fp.ArgumentError, "an? int cannot be exported"),
        ({"path": "m.pt2", "model": ByValue()}, fp.ExportError, "control flow|Control flow"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_what_would_work(
    arguments, kind, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": nn.Linear(4, 3), "inputs": torch.randn(2, 4), **arguments}
    model, path = arguments.pop("model"), arguments.pop("path")
    with pytest.raises(kind, match=message):
        fp.export(model, path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_installed", lambda name: name != "onnxscript")
    with pytest.raises(fp.ArgumentError, match=r"onnxscript not installed.*fxprune\[runtimes\]"):
        fp.export(nn.Linear(4, 3), tmp_path / "m.onnx", inputs=torch.randn(2, 4))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(fp.ArgumentError, match=r"C\+\+ compiler"):
        fp.export(nn.Linear(4, 3), format="compile", inputs=torch.randn(2, 4))
