"""The command line: reports on stdout, messages on stderr, exit statuses to rely on."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fxprune as fp
from fxprune.cli.models import build
from fxprune.vision import import_torchvision
from tests.artifact_nets import relist
from tests.zoo.randomize import randomize

TINY = """
import torch
from torch import nn

def net(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 12, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )

def wide():
    return net(16)

def double():
    return net().double()

def chatty():
    print("a chatty model")
    return net()

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, a, b):
        return self.out(torch.relu(self.left(a) + self.right(b)))

class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def broken():
    raise RuntimeError("boom")

ready = net()
number = 3
"""
SHAPE = ("--input", "2,3,10,10")
# Processes that the tests start find this fxprune wherever they run.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(fp.__file__).parents[1])}
HALF = (*SHAPE, "--flops", "50%")


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """A current directory with a file of models, which nothing of the test remembers."""
    (tmp_path / "tiny_nets.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("tiny_nets", None)


@pytest.fixture
def pruned(run, tmp_path):
    """A saved slim model of ``tiny_nets:net``."""
    status, _, err = run("prune", "tiny_nets:net", *HALF, "--out", "slim")
    assert status == 0, err
    return tmp_path / "slim"


def model_of(name="net", seed=0):
    factory = runpy.run_path("tiny_nets.py")[name]
    torch.manual_seed(seed)
    return factory().eval()


def image(batch=2):
    return torch.randn(batch, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def widths(folder):
    return {key: tuple(value.shape) for key, value in fp.load(folder).state_dict().items()}


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# inspect


def test_inspect_prints_the_report_on_stdout_and_messages_on_stderr(run):
    status, out, err = run("inspect", "tiny_nets:net", *SHAPE)
    assert status == 0
    assert out.strip() == fp.analyze(fp.trace(model_of(), image())).report().strip()
    assert "tiny_nets:net" in err


def test_inspect_as_json_says_what_the_report_says(run):
    status, out, _ = run("inspect", "tiny_nets:net", *SHAPE, "--json")
    data = json.loads(out)
    deps = fp.analyze(fp.trace(model_of(), image()))
    assert status == 0
    assert data["channels"] == deps.n_channels == 20
    assert [group["width"] for group in data["groups"]] == [8, 12]
    assert data["groups"][0]["axes"]["0.weight[0]"] == "producer"
    assert data["groups"][0]["axes"]["3.weight[1]"] == "consumer"
    assert data["params"] == sum(p.numel() for p in model_of().parameters())
    # One of 8 channels frees its filter, its batch norm scale and shift, and 12 kernels after it.
    assert data["groups"][0]["params_freed_by_one"] == 3 * 9 + 1 + 2 + 12 * 9


# prune


def test_prune_prints_the_report_and_saves_the_model_it_is_about(run, pruned):
    status, out, _ = run("prune", "tiny_nets:net", *HALF)
    result = fp.prune(model_of(), image(), flops="50%")
    assert status == 0
    assert out.strip() == result.report().strip()
    assert torch.equal(fp.load(pruned)(image()), result.model(image()))
    assert fp.PruningPlan.load(pruned / "plan.json") == result.plan


def test_json_on_stdout_stays_json_whatever_the_model_prints(run):
    status, out, err = run("prune", "tiny_nets:chatty", *HALF, "--json", "--out", "slim")
    data = json.loads(out)
    assert status == 0
    assert 0 < data["reached"]["macs"] <= data["reached"]["macs_before"] / 2
    assert data["verdict"]["ok"] is True
    assert [group["before"] for group in data["groups"]] == [8, 12]
    assert "a chatty model" in err


@pytest.mark.parametrize("share", ["0.5", "50%"])
def test_budgets_are_written_as_fractions_or_percentages(share, run, pruned):
    run("prune", "tiny_nets:net", *SHAPE, "--flops", share, "--out", "again")
    assert widths("again") == widths(pruned)


def test_a_budget_of_parameters_is_kept(run):
    _, out, _ = run("prune", "tiny_nets:net", *SHAPE, "--params", "0.4", "--json")
    reached = json.loads(out)["reached"]
    assert reached["params"] <= 0.4 * reached["params_before"]


def test_a_budget_of_memory_is_kept(run):
    _, out, _ = run("prune", "tiny_nets:net", *SHAPE, "--memory", "80%", "--json")
    reached = json.loads(out)["reached"]
    assert 0 < reached["memory"] <= 0.8 * reached["memory_before"]


def test_a_budget_of_latency_is_measured(run, tmp_path, monkeypatch):
    for attempt in range(3):  # on a busy machine a narrower layer may be measured as slower
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(attempt)))
        status, out, _ = run("prune", "tiny_nets:net", *SHAPE, "--latency", "0.999", "--json")
        if status == 0:
            break
    assert status == 0
    assert json.loads(out)["reached"]["latency_measured"] > 0


@pytest.mark.parametrize("name", ["uniform", "isomorphic", "greedy", "optimal"])
def test_the_allocation_can_be_chosen(name, run):
    status, out, _ = run("prune", "tiny_nets:net", *HALF, "--allocation", name, "--json")
    data = json.loads(out)
    assert status == 0
    assert data["requested"]["allocation"] == name
    assert data["reached"]["macs"] <= data["reached"]["macs_before"] / 2


def test_the_same_call_writes_the_same_bytes_and_another_seed_does_not(run, pruned):
    run("prune", "tiny_nets:net", *HALF, "--out", "again")
    run("prune", "tiny_nets:net", *HALF, "--out", "other", "--seed", 1)
    assert files(Path("again")) == files(pruned)
    assert files(Path("other"))["model.safetensors"] != files(pruned)["model.safetensors"]


CHOSEN = {
    "cpmc": fp.CPMC(),
    "l1": fp.L1(),
    "l2": fp.L2(),
    "lamp": fp.LAMP(),
    "fpgm": fp.FPGM(),
    "bn-scale": fp.BatchNormScale(),
    "random": fp.Random(seed=3),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_every_criterion_can_be_chosen(name, run):
    criterion = CHOSEN[name]
    run("prune", "tiny_nets:net", *HALF, "--importance", name, "--seed", 3, "--out", "slim")
    expected = fp.prune(model_of(seed=3), image(), flops="50%", importance=criterion).plan
    assert fp.PruningPlan.load("slim/plan.json").axes == expected.axes


def test_guards_reach_the_plan(run):
    run("prune", "tiny_nets:net", *HALF, "--round-to", 4, "--out", "rounded")
    assert {shape[0] % 4 for key, shape in widths("rounded").items() if key == "0.weight"} == {0}
    run("prune", "tiny_nets:net", *HALF, "--ignore", "0", "--out", "ignored")
    assert widths("ignored")["0.weight"] == (8, 3, 3, 3)
    run("prune", "tiny_nets:net", *HALF, "--min-channels", 6, "--max-ratio", 0.5, "--out", "kept")
    assert min(widths("kept")["0.weight"][0], widths("kept")["3.weight"][0]) >= 6


def test_verification_can_be_left_out(run):
    _, out, _ = run("prune", "tiny_nets:net", *HALF, "--no-verify", "--json")
    assert json.loads(out)["verdict"] is None


def test_a_slim_model_is_pruned_again_without_saying_its_input(run, pruned):
    status, _, err = run("prune", "slim", "--flops", "60%", "--out", "slimmer")
    assert status == 0, err
    assert fp.load("slimmer")(image(5)).shape == (5, 5)
    assert widths("slimmer")["0.weight"][0] < widths(pruned)["0.weight"][0]


def test_a_model_with_two_inputs_takes_two_shapes(run):
    shapes = ("--input", "7,4", "--input", "7,3")
    status, _, err = run("prune", "tiny_nets:Pair", *shapes, "--flops", "0.6", "--out", "slim")
    assert status == 0, err
    assert fp.load("slim")(torch.randn(2, 4), torch.randn(2, 3)).shape == (2, 2)
    assert run("verify", "slim", "--against", "tiny_nets:Pair")[0] == 0


@pytest.mark.parametrize(
    "model", ["tiny_nets.py:net", "./tiny_nets.py:net", "tiny_nets:ready", "tiny_nets:double"]
)
def test_other_ways_to_name_a_model(model, run):
    status, _, err = run("prune", model, *HALF)
    assert status == 0, err


def test_a_file_elsewhere_finds_the_modules_beside_it(run, tmp_path, monkeypatch):
    folder = tmp_path / "nets"
    folder.mkdir()
    (folder / "beside.py").write_text("from torch import nn\nlayer = nn.Linear(4, 6)\n")
    (folder / "entry.py").write_text(
        "from torch import nn\nfrom beside import layer\n"
        "def make():\n    return nn.Sequential(layer, nn.Linear(6, 3))\n"
    )
    before = list(sys.path)
    status, _, err = run("inspect", "nets/entry.py:make", "--input", "2,4")
    for name in ("beside", "entry"):
        sys.modules.pop(name)
    assert status == 0, err
    assert sys.path == before


# weights


@pytest.mark.parametrize(
    ("file", "write"),
    [
        ("w.safetensors", safetensors.torch.save_file),
        ("w.pt", torch.save),
        ("checkpoint.pth", lambda state, file: torch.save({"state_dict": state, "n": 3}, file)),
    ],
)
def test_weights_come_from_a_file(file, write, run):
    model = randomize(model_of(), seed=5)
    write(model.state_dict(), file)
    status, _, err = run("prune", "tiny_nets:net", *HALF, "--weights", file, "--out", "s")
    assert status == 0, err
    expected = fp.prune(model, image(), flops=0.5).model
    assert torch.equal(fp.load("s")(image()), expected(image()))


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def write_bad_weights(kind):
    if kind == "code.pt":
        torch.save({"0.weight": Payload()}, kind)
    elif kind == "other.safetensors":
        safetensors.torch.save_file({"a": torch.zeros(1)}, kind)
    elif kind == "tensor.pt":
        torch.save(torch.zeros(2), kind)
    elif kind not in ("missing.pt", "missing.safetensors"):
        Path(kind).write_bytes(b"garbage")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code.pt", "cannot be read as weights"),
        ("garbage.pth", "cannot be read as weights"),
        ("garbage.safetensors", "cannot be read as weights"),
        ("missing.pt", "cannot be read as weights"),
        ("missing.safetensors", "cannot be read as weights"),
        ("tensor.pt", "holds a Tensor, not a state_dict"),
        ("other.safetensors", "do not fit"),
        ("weights.bin", "neither a .safetensors nor"),
    ],
)
def test_weights_that_are_not_right_are_refused_and_run_no_code(kind, message, run):
    write_bad_weights(kind)
    status, out, err = run("prune", "tiny_nets:net", *HALF, "--weights", kind, "--out", "slim")
    assert (status, out) == (2, "")
    assert message in err
    assert not Path("slim").exists()
    assert not Path("ran").exists()


# verify


def test_verify_accepts_the_model_that_was_pruned(run, pruned):
    status, out, _ = run("verify", "slim", "--against", "tiny_nets:net")
    assert status == 0
    assert out.strip()
    _, out, _ = run("verify", "slim", "--against", "tiny_nets:net", "--json")
    data = json.loads(out)
    assert data["ok"] is True
    assert data["max_abs_error"] <= 1e-5 * data["scale"]


def test_verify_sees_other_weights_on_either_side(run, pruned):
    assert run("verify", "slim", "--against", "tiny_nets:net", "--seed", 1)[0] == 1
    file = pruned / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state["3.weight"][0, 0] += 1
    safetensors.torch.save_file(state, file)
    assert run("verify", "slim", "--against", "tiny_nets:net")[0] == 2  # not what was saved
    relist(file)
    status, out, _ = run("verify", "slim", "--against", "tiny_nets:net", "--json")
    assert status == 1
    assert json.loads(out)["ok"] is False


def test_verify_refuses_another_model_and_folders_without_a_plan(run, pruned):
    status, out, err = run("verify", "slim", "--against", "tiny_nets:wide")
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    fp.save(fp.load(pruned), "bare")
    assert run("verify", "bare", "--against", "tiny_nets:net")[0] == 2
    assert run("verify", "gone", "--against", "tiny_nets:net")[0] == 2


# refusals

REFUSED = {
    "no budget": (("prune", "tiny_nets:net", *SHAPE), "--flops"),
    "no share": (("prune", "tiny_nets:net", *SHAPE, "--flops", "1.7"), "1.7"),
    "no number": (("prune", "tiny_nets:net", *SHAPE, "--flops", "half"), "half"),
    "impossible": (("prune", "tiny_nets:net", *SHAPE, "--flops", "0.0001"), "0.0001"),
    "no input": (("inspect", "tiny_nets:net"), "--input 1,3,224,224"),
    "wrong input": (("inspect", "tiny_nets:net", "--input", "1,4,10,10"), "4, 10, 10"),
    "no model": (("inspect", "nothing", *SHAPE), "torchvision/NAME"),
    "no module": (("inspect", "nothing:net", *SHAPE), "No module named 'nothing'"),
    "no file": (("inspect", "nothing.py:net", *SHAPE), "nothing.py"),
    "no factory": (("inspect", "tiny_nets:nothing", *SHAPE), "nothing"),
    "not a model": (("inspect", "tiny_nets:len", *SHAPE), "tiny_nets:len gives no model"),
    "a number": (("inspect", "tiny_nets:number", *SHAPE), "'int' object is not callable"),
    "broken": (("inspect", "tiny_nets:broken", *SHAPE), "RuntimeError: boom"),
    "ignored": (("prune", "tiny_nets:net", *HALF, "--ignore", "conv9"), "conv9"),
    "folder": (("inspect", ".", *SHAPE), "graph.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_in_one_message_with_status_2(case, run, tmp_path):
    arguments, message = REFUSED[case]
    out_option = ("--out", "slim") if arguments[0] == "prune" else ()
    before = sorted(tmp_path.rglob("*.json"))
    status, out, err = run(*arguments, *out_option)
    assert (status, out) == (2, "")
    assert message in err
    assert "fxprune: error: " in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*.json")) == before
    assert not Path("slim").exists()


def test_an_unknown_torchvision_model_brings_suggestions(run):
    status, _, err = run("inspect", "torchvision/resnet19")
    assert status == 2
    assert "resnet18" in err


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_torchvision_models_are_built_without_fetching_weights(name, monkeypatch):
    api = import_torchvision().models._api
    monkeypatch.setattr(api, "load_state_dict_from_url", None)
    assert isinstance(build(f"torchvision/{name}", seed=0, weights=None, trust=()), nn.Module)


@pytest.mark.parametrize("shape", ["1,3,x", "1,0,4", "", "1;2"])
def test_a_shape_that_is_none_is_refused_by_the_parser(shape, run):
    status, _, err = run("inspect", "tiny_nets:net", "--input", shape)
    assert status == 2
    assert "is not a shape such as 1,3,224,224" in err


def test_verbose_shows_where_an_error_comes_from(run):
    status, _, err = run("inspect", "tiny_nets:broken", *SHAPE, "-v")
    assert status == 2
    assert "Traceback" in err
    assert "in broken" in err


def test_an_existing_folder_is_refused_before_any_work(run, pruned):
    before = files(pruned)
    status, _, err = run("prune", "tiny_nets:broken", *HALF, "--out", "slim")
    assert status == 2
    assert "holds a saved model already" in err
    assert files(pruned) == before
    assert run("prune", "tiny_nets:wide", *HALF, "--out", "slim", "--force")[0] == 0
    assert files(pruned) != before


def test_a_failed_check_has_a_status_of_its_own_and_saves_nothing(run, monkeypatch):
    def unequal(*args, **kwargs):
        raise fp.VerificationError("not equal")

    monkeypatch.setattr(fp, "prune", unequal)
    status, _, err = run("prune", "tiny_nets:net", *HALF, "--out", "slim")
    assert status == 1
    assert "not equal" in err
    assert not Path("slim").exists()


def test_an_error_inside_fxprune_shows_its_traceback_and_has_a_status_of_its_own(run, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(fp, "analyze", fail)
    status, out, err = run("inspect", "tiny_nets:net", *SHAPE)
    assert (status, out) == (3, "")
    assert "Traceback" in err
    assert "ZeroDivisionError: inside" in err


def test_an_interrupt_is_no_crash(run, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fp, "analyze", stop)
    status, out, err = run("inspect", "tiny_nets:net", *SHAPE)
    assert (status, out) == (130, "")
    assert "Traceback" not in err


# a saved model with code of another package


LAYERS = """
import torch
from torch import fx

def halve(x):
    return x / 2

fx.wrap("halve")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return halve(self.linear(x))
"""


def test_a_saved_model_uses_the_code_of_a_package_only_if_told_so(run, tmp_path, monkeypatch):
    (tmp_path / "tiny_layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    fp.save(torch.fx.symbolic_trace(__import__("tiny_layers").Net()), "saved")
    status, _, err = run("inspect", "saved", "--input", "2,4")
    assert status == 2
    assert "trust=('tiny_layers',)" in err
    assert run("inspect", "saved", "--input", "2,4", "--trust", "tiny_layers")[0] == 0
    sys.modules.pop("tiny_layers")


# the real thing


def test_help_names_the_models_and_every_exit_status(run):
    status, out, _ = run("--help")
    assert status == 0
    for word in ("inspect", "prune", "verify", "torchvision/NAME", "exit status", "  3  "):
        assert word in out


@pytest.mark.parametrize("command", ["inspect", "prune", "verify"])
def test_every_command_explains_its_options(command, run):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "--weights FILE" in out


def fxprune(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fxprune", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )


def test_a_torchvision_model_is_pruned_and_verified_by_separate_processes():
    model = "torchvision/squeezenet1_1"
    first = fxprune(
        "prune", model, "--input", "1,3,64,64", "--flops", "50%", "--out", "slim", "--json"
    )
    assert first.returncode == 0, first.stderr
    reached = json.loads(first.stdout)["reached"]
    assert 0.45 <= reached["macs"] / reached["macs_before"] <= 0.5
    second = fxprune("verify", "slim", "--against", model)
    assert second.returncode == 0, second.stderr


def test_a_reader_that_leaves_early_gets_no_traceback():
    command = [sys.executable, "-m", "fxprune", "inspect", "tiny_nets:net", *SHAPE]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
