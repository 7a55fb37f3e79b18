"""Small networks with every kind of node, layer and tensor that can be saved, and comparisons."""

import json
import math
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxprune.export.folder import write_sums
from fxprune.export.save import load, save
from tests.zoo.randomize import randomize


class Conv(nn.Module):
    """Layers, functional calls, sizes, slices, constants and buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 7, 3, padding="same", bias=False), nn.BatchNorm2d(7), nn.ReLU(inplace=True)
        )
        self.side = nn.Conv2d(7, 7, 3, groups=7, padding=1, padding_mode="reflect")
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5 * 4, 6)
        self.gain = nn.Parameter(torch.ones(7, 1, 1))
        self.register_buffer("shift", torch.arange(7.0).reshape(7, 1, 1))
        self.register_buffer("hidden", torch.tensor([2.0]), persistent=False)
        self.offset = torch.tensor([0.5])
        self.register_buffer("none", None)

    def forward(self, x, scale: float = 1.5):
        x = self.stem(x) * self.gain
        x = x + F.relu6(self.side(x)) * scale + self.shift
        x = F.interpolate(x[:, 1:6], scale_factor=0.5, mode="nearest") * self.hidden
        x = F.max_pool2d(x + self.offset, 2).clamp(max=math.inf).to(torch.float32)
        x = torch.nn.functional.adaptive_avg_pool2d(x, (2, 2))
        x = x.view(x.size(0), -1)
        return self.head(self.drop(x)), {"shape": x.shape[0], "pair": (x.mean(), [x])}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)

    def forward(self, x):
        x = self.lstm(x)[0]
        return self.encoder(self.attention(x, x, x)[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c.weight.data = self.a.weight.data
        self.again = self.a

    def forward(self, x):
        return F.linear(self.c(self.b(self.a(x))), self.a.weight)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1).requires_grad_(False)
        self.norm = nn.GroupNorm(3, 3).double()

    def forward(self, x):
        return self.norm(self.conv(x).double())


NETS = {
    "conv": (Conv, (2, 3, 11, 9)),
    "recurrent": (Recurrent, (2, 3, 5)),
    "tied": (Tied, (3, 4)),
    "frozen": (Frozen, (2, 2, 5)),
}


def net(name, *, training=False):
    kind, shape = NETS[name]
    module = fx.symbolic_trace(randomize(kind()).train(training))
    return module, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def traced(module):
    return fx.symbolic_trace(module)


def graph_of(build, root=None):
    """A graph module whose nodes ``build(graph, x)`` adds; it returns the output."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(root or nn.Module(), graph)


def output(module, x, seed=0):
    torch.manual_seed(seed)
    return module(x)


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def assert_equal(ours, theirs):
    assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(theirs)
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert type(one) is type(other)
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def round_trip(module, tmp_path, **options):
    return load(save(module, tmp_path / "slim"), **options)


def flags(module):
    return {
        "state": [(key, value.dtype, value.stride()) for key, value in module.state_dict().items()],
        "parameters": [(key, p.requires_grad) for key, p in module.named_parameters()],
        "buffers": [(key, b.dtype) for key, b in module.named_buffers()],
        "modes": [(key, type(m).__name__, m.training) for key, m in module.named_modules()],
        "texts": [repr(m) for m in module.children()],
    }


def edit(folder, change):
    """Apply ``change`` to the parsed description in a saved folder, as somebody who means it."""
    file = folder / "graph.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(change(document) or document))
    relist(file)


def relist(file):
    """Have a changed file of a saved folder looked at, rather than refused as changed."""
    write_sums(Path(file).parent)


def first_node(document, op):
    return next(node for node in document["modules"][""]["nodes"] if node["op"] == op)
