"""Saved slim models: bit-exact round trips, files that were changed, and code that is not run."""

import random
import shutil
import subprocess

import pytest
import torch

import fxprune as fp
from fxprune.export.folder import FILES, SUMS_FILE
from fxprune.export.save import save
from tests.artifact_nets import assert_equal, edit, net, relist
from tests.zoo.models import ZOO, build

WIRINGS = {
    "residual": "auto",
    "dense_block": "auto",
    "depthwise_separable": "auto",
    "fused_attention": "auto",
    "encoder_layer": "export",
    "unet": "export",
}
SUMMED = sorted(FILES - {SUMS_FILE})


def pruned(name, frontend="auto", **options):
    return fp.prune(build(name), ZOO[name].inputs(), ratios=0.6, frontend=frontend, **options)


def call(model, inputs):
    with torch.no_grad():
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@pytest.fixture
def folder(tmp_path):
    return fp.save(pruned("residual"), tmp_path / "slim")


# Round trips


@pytest.mark.parametrize("reconstructed", [False, True], ids=["cut", "reconstructed"])
@pytest.mark.parametrize("name", WIRINGS)
def test_a_slim_model_comes_back_bit_for_bit_from_data_and_from_code(name, reconstructed, tmp_path):
    options = {"calibration": [ZOO[name].inputs(seed=7)]} if reconstructed else {}
    result = pruned(name, WIRINGS[name], **options)
    assert result.traced.frontend == ("export" if WIRINGS[name] == "export" else "symbolic")
    path = fp.save(result, tmp_path / "slim")
    for loaded in (fp.load(path), fp.load(path, trust_code=True)):
        assert list(loaded.state_dict()) == list(result.model.state_dict())
        assert_equal(dict(loaded.state_dict()), dict(result.model.state_dict()))
        for inputs in (ZOO[name].inputs(), ZOO[name].other_inputs()):
            assert_equal(call(loaded, inputs), call(result.model, inputs))


def test_a_model_from_code_trains_like_the_one_from_data(folder):
    x = ZOO["residual"].inputs()
    gradients = []
    for model in (fp.load(folder), fp.load(folder, trust_code=True)):
        model.train()(x).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_equal(*gradients)


# What people read


def test_the_card_has_the_numbers_and_says_how_to_load(folder):
    text = (folder / "README.md").read_text()
    plan = fp.PruningPlan.load(folder / "plan.json")
    for number in (plan.reached["macs"], plan.reached["params_before"]):
        assert f"{number:,.0f}" in text
    assert "Verified: equal to" in text
    assert all(group.name in text for group in plan.groups)
    assert "fp.load(" in text


def test_the_code_is_readable(folder):
    text = (folder / "model.py").read_text()
    assert "class Residual(nn.Module):" in text
    assert 'stem_0 = self.get_submodule("stem.0")(x)\n' in text
    assert "# a2         Conv2d(6, 7, kernel_size=(3, 3)" in text


# Files that were changed


def test_the_sums_are_those_of_sha256sum(folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run(
        ["sha256sum", "-c", SUMS_FILE], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{name}: OK" for name in SUMMED]


@pytest.mark.parametrize("name", SUMMED)
def test_a_file_that_was_cut_edited_or_removed_is_refused_by_name(name, folder):
    file, chooser = folder / name, random.Random(0)
    whole = file.read_bytes()
    for _ in range(40):
        at = chooser.randrange(len(whole))
        cut, flipped = whole[:at], bytearray(whole)
        flipped[at] ^= 1 << chooser.randrange(8)
        for content in (cut, bytes(flipped)):
            file.write_bytes(content)
            with pytest.raises(fp.ArtifactError, match=name):
                fp.load(folder)
    file.unlink()
    with pytest.raises(fp.ArtifactError, match=name):
        fp.load(folder)


def test_sums_that_were_cut_edited_or_removed_are_refused(folder):
    file, chooser = folder / SUMS_FILE, random.Random(0)
    whole = file.read_bytes()
    for _ in range(60):
        at = chooser.randrange(len(whole) - 1)
        cut, flipped = whole[:at], bytearray(whole)
        flipped[at] ^= 1 << chooser.randrange(8)
        for content in (cut, bytes(flipped)):
            file.write_bytes(content)
            with pytest.raises(fp.ArtifactError):
                fp.load(folder)
    file.unlink()
    with pytest.raises(fp.ArtifactError, match=SUMS_FILE):
        fp.load(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "sub/model.py", "..", "model.py/../../secret", "other"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused_unread(name, folder):
    (folder.parent / "secret").write_text("secret")
    with (folder / SUMS_FILE).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(fp.ArtifactError, match="no file of a saved model"):
        fp.load(folder)


def test_weights_changed_on_purpose_load_when_the_caller_says_so(folder):
    other = fp.load(folder)
    with torch.no_grad():
        other.get_parameter("a2.weight").add_(1)
    trained = fp.save(other, folder.parent / "trained")
    shutil.copy(trained / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(fp.ArtifactError, match=r"load\(path, edited='model.safetensors'\)"):
        fp.load(folder)
    loaded = fp.load(folder, edited="model.safetensors")
    assert_equal(dict(loaded.state_dict()), dict(other.state_dict()))
    with pytest.raises(fp.ArgumentError, match="has to name some of"):
        fp.load(folder, edited=["weights.bin"])


# Code of the folder


def write_code(folder, text):
    (folder / "model.py").write_text(text)
    relist(folder / "model.py")


def test_code_of_a_folder_is_run_only_if_it_is_trusted(folder):
    mark = folder.parent / "was-run"
    code = (folder / "model.py").read_text()
    write_code(folder, f"open({str(mark)!r}, 'w').close()\n{code}")
    fp.load(folder)
    fp.load(folder, trust=("torch",))
    assert not mark.exists()
    fp.load(folder, trust_code=True)
    assert mark.exists()


def test_a_forward_that_was_edited_is_what_runs(folder):
    code = (folder / "model.py").read_text()
    write_code(folder, code.replace("return head_fc", "return head_fc * 2, add_1"))
    x = ZOO["residual"].inputs()
    doubled, added = call(fp.load(folder, trust_code=True), x)
    assert torch.equal(doubled, 2 * call(fp.load(folder), x))
    assert added.shape[1] == 7


@pytest.mark.parametrize(
    "text", ["class", "1 / 0", "x = 1", "Residual = 3", "class Residual: x = 1"]
)
def test_code_that_gives_no_model_is_refused_by_name(text, folder):
    write_code(folder, text)
    with pytest.raises(fp.ArtifactError, match=r"model\.py cannot be run"):
        fp.load(folder, trust_code=True)


def test_trusted_code_leaves_nothing_in_the_folder(folder):
    before = sorted(folder.iterdir())
    fp.load(folder, trust_code=True)
    assert sorted(folder.iterdir()) == before


def test_a_description_that_names_a_class_with_code_is_refused(folder):
    edit(folder, lambda d: d["modules"][""].update(graph_class="__builtins__"))
    with pytest.raises(fp.ArtifactError, match=r"model\.py cannot be run"):
        fp.load(folder, trust_code=True)


@pytest.mark.parametrize("name", ["conv", "recurrent", "tied", "frozen"])
def test_code_of_every_kind_of_node_computes_the_same(name, tmp_path):
    module, x = net(name)
    loaded = fp.load(save(module, tmp_path / "slim"), trust_code=True)
    assert_equal(loaded(x), module(x))
