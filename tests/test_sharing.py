"""Weights shared by k-means: codebooks, indices, their gradients, and what is kept exactly."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import fx, nn
from torch.nn import functional as F

import fxprune as fp
from fxprune.runtimes import onnx
from fxprune.sharing.layers import LAYERS, Shared, packed, unpacked
from tests.test_model_is_preserved import assert_unchanged, snapshot
from tests.zoo.models import ZOO, build
from tests.zoo.randomize import randomize


class Net(nn.Module):
    """A layer of every kind, a weight that a function reads, and tied ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.again = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.again.weight = self.depthwise.weight
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.raw = nn.Parameter(torch.zeros(12, 8, 1, 1))
        self.head = nn.Linear(12, 32)
        self.last = nn.Linear(32, 5)
        self.small = nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.again(self.depthwise(x)).relu()
        x = F.conv2d(self.up(x), self.raw).relu()
        return self.small(self.last(self.head(x.mean((2, 3))).relu()))


def net(seed=0):
    return fx.symbolic_trace(randomize(Net(), seed)).eval()


def images(n=2, seed=0):
    return torch.randn(n, 3, 8, 10, generator=torch.Generator().manual_seed(seed))


LARGE = {"first", "depthwise", "again", "up", "raw", "head", "last"}


def codebooks(shared):
    return {name: m for name, m in shared.named_modules() if isinstance(m, Shared)}


def weight_of(model, name):
    found = getattr(model, name)
    return found if isinstance(found, nn.Parameter) else found.weight


def restored(model, shared):
    """The model with the weights of the codebooks as plain ones."""
    with torch.no_grad():
        for name, layer in codebooks(shared).items():
            weight_of(model, name).copy_(layer.weight)
    return model


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 33])
def test_packed_indices_come_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(0))
    bytes_ = packed(codes, bits)
    assert (bytes_.dtype, len(bytes_)) == (torch.uint8, -(-count * bits // 8))
    assert torch.equal(unpacked(bytes_, bits, count), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_shared_model_is_the_model_with_the_weights_of_its_codebooks(bits):
    model = net()
    shared = fp.share_weights(model, bits)
    layers = codebooks(shared)
    # With 256 places a codebook can be larger than the weight: such layers stay.
    assert set(layers) >= LARGE or bits == 8
    assert layers
    for layer in layers.values():
        assert layer.weight.unique().numel() <= 2**bits
    assert torch.equal(shared(images()), restored(net(), shared)(images()))


def test_the_gradient_of_a_number_is_the_sum_of_those_of_its_weights():
    shared = fp.share_weights(net(), 2)
    plain = restored(net(), shared)
    for model in (shared, plain):
        model(images()).square().sum().backward()
    for name, layer in codebooks(shared).items():
        gradient = weight_of(plain, name).grad
        codes = unpacked(layer.indices, 2, gradient.numel())
        sums = torch.stack([gradient.flatten()[codes == k].sum() for k in range(4)])
        torch.testing.assert_close(layer.codebook.grad, sums, rtol=1e-4, atol=1e-6)
    assert torch.equal(shared.norm.weight.grad, plain.norm.weight.grad)


def test_every_weight_is_the_number_nearest_to_it_and_no_worse_than_k_means():
    model = net()
    shared = fp.share_weights(model, 4)
    for name in ("first", "head"):
        layer, weight = shared.get_submodule(name), weight_of(model, name).detach()
        codebook = layer.codebook.detach()
        distances = (weight.flatten()[:, None] - codebook).abs()
        assert torch.equal(layer.weight.flatten(), codebook[distances.argmin(1)])
        values = weight.flatten()[:, None].double().numpy()
        start = np.linspace(values.min(), values.max(), 16)[:, None]
        best = KMeans(16, init=start, n_init=1).fit(values).inertia_
        assert float((weight - layer.weight.detach()).square().sum()) < 1.1 * best


def test_a_layer_with_few_different_weights_keeps_them_exactly():
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round() / 3)
    shared = fp.share_weights(model, 8)
    assert isinstance(shared.head, Shared)
    assert len(shared.head.codebook) == model.head.weight.unique().numel()
    assert torch.equal(shared.head.weight, model.head.weight)
    assert torch.equal(shared(images()), model(images()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_of_weights_stays(dtype):
    shared = fp.share_weights(nn.Sequential(nn.Linear(64, 64)).to(dtype), 4)
    assert shared[0].weight.dtype == shared[0].codebook.dtype == dtype
    assert shared(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_tied_weights_share_one_codebook():
    shared = fp.share_weights(net(), 2)
    assert shared.depthwise.codebook is shared.again.codebook
    assert shared.depthwise.indices is shared.again.indices
    names = [name for name, _ in shared.named_parameters()]
    assert "depthwise.codebook" in names
    assert "again.codebook" not in names


def test_the_model_is_not_changed_and_the_same_seed_gives_the_same_model():
    model = net().train()
    before, state = snapshot(model), torch.get_rng_state()
    one, other = fp.share_weights(model, 4), fp.share_weights(model, 4)
    assert_unchanged(before, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.training
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "frontend"), [("residual", "symbolic"), ("unet", "export")])
def test_a_slim_model_with_codebooks_is_saved_small_and_comes_back(name, frontend, tmp_path):
    result = fp.prune(
        build(name).float(), ZOO[name].inputs().float(), ratios=0.6, frontend=frontend
    )
    shared = fp.share_weights(result.model, 4)
    assert any(isinstance(m, Shared) for m in shared.modules())
    loaded = fp.load(fp.save(shared, tmp_path / "slim"))
    x = ZOO[name].inputs(batch=3).float()
    assert torch.equal(loaded(x), shared(x))
    assert list(loaded.state_dict()) == list(shared.state_dict())
    stored = {key: value.nbytes for key, value in shared.state_dict().items()}
    weights = sum(p.nbytes for n, p in result.model.named_parameters() if p.ndim > 1)
    kept = sum(n for key, n in stored.items() if key.endswith(("codebook", "indices")))
    assert kept < 0.6 * weights
    assert not any(key.endswith("conv.weight") for key in stored)


def test_four_bits_take_an_eighth_of_the_weights(tmp_path):
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
    plain = fp.save(model, tmp_path / "plain") / "model.safetensors"
    small = fp.save(fp.share_weights(model, 4), tmp_path / "small") / "model.safetensors"
    assert small.stat().st_size < plain.stat().st_size / 7.5


def test_codebooks_are_trained_by_finetune_and_stay_codebooks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 10, generator=generator)
    teacher = net()
    loader = [(x[k : k + 16], torch.zeros(16)) for k in range(0, 64, 16)]
    shared = fp.share_weights(teacher, 2)

    def loss(output, _):
        return output.square().mean()

    tuned = fp.finetune(
        shared, loader, loss=loss, epochs=3, lr=0.01, weight_decay=0, progress=False
    )
    assert tuned.losses[-1] < tuned.losses[0]
    for name, before in codebooks(shared).items():
        after = tuned.model.get_submodule(name)
        assert torch.equal(before.indices, after.indices)
        assert not torch.equal(before.codebook, after.codebook)
        assert after.weight.unique().numel() <= 4


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_model_with_codebooks_is_exported(format, tmp_path):
    onnx.check_onnx()
    found = fp.export(fp.share_weights(net(), 4), tmp_path / "m", format=format, inputs=images())
    assert found.batch is None
    assert found.error < 1e-5


def test_any_module_can_share_weights_without_a_graph():
    model = nn.Sequential(nn.Conv1d(4, 32, 3), nn.ReLU(), nn.Conv3d(1, 64, 3), nn.LSTM(8, 8))
    shared = fp.share_weights(model, 4)
    assert [type(m) in LAYERS.values() for m in shared] == [True, False, True, False]


def test_layers_to_ignore_are_left_alone():
    shared = fp.share_weights(net(), 4, ignore=["first", "la*"])
    kinds = {name: type(m) for name, m in shared.named_modules()}
    assert (kinds["first"], kinds["last"]) == (nn.Conv2d, nn.Linear)
    assert isinstance(shared.head, Shared)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"bits": 3}, fp.ArgumentError, "1, 2, 4 or 8"),
        ({"ignore": "nowhere"}, fp.ArgumentError, "no layer is called so"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        fp.share_weights(net(), **options)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Linear(8, 8)])
def test_a_model_without_layers_inside_is_refused(model):
    with pytest.raises(fp.ArgumentError, match="holds no convolution or linear layer"):
        fp.share_weights(model)


def test_weights_that_are_not_finite_are_refused():
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("inf")
    with pytest.raises(fp.NonFiniteError, match=r"head \[32, 12\]"):
        fp.share_weights(model)
