"""The benchmark of criteria: every method runs, nothing is measured twice, the page says it all."""

import gzip
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

BENCH = Path(__file__).resolve().parents[1] / "examples" / "bench"
METHODS = ["fp.prune", "TP GroupTaylor"]


def tiny():
    """Convolutions in a chain, the second one depthwise, and a classifier."""
    first = [nn.Conv2d(1, 12, 3, 2, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    second = [nn.Conv2d(12, 12, 3, 2, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    third = [nn.Conv2d(12, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10)]
    return nn.Sequential(*first, *second, *third, *head)


def write_images(folder):
    """Four files like those of Fashion-MNIST: the class is where the bright square is."""
    rng = np.random.default_rng(0)
    for name, n in (("train", 512), ("t10k", 200)):
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[8 * row : 8 * row + 8, 7 * column : 7 * column + 7] += 150
        for kind, head, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(head) + data.tobytes())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """``criteria.main`` on a tiny network and a tiny data set; ``bench(action, *arguments)``."""
    pytest.importorskip("torch_pruning")
    monkeypatch.syspath_prepend(str(BENCH))
    fashion, criteria = map(importlib.import_module, ("fashion", "criteria"))
    monkeypatch.setitem(fashion.NETS, "Tiny", fashion.Net(tiny, 2))
    for name in [n for n in fashion.NETS if n != "Tiny"]:
        monkeypatch.delitem(fashion.NETS, name)
    write_images(tmp_path)
    threads = torch.get_num_threads()

    def run(action, *arguments):
        places = ["--data", tmp_path, "--cache", tmp_path, "--results", tmp_path / "rows.jsonl"]
        common = [*places, "--out", tmp_path / "page.md", "--samples", 64, "--threads", 1]
        criteria.main(list(map(str, [action, *common, *arguments])))
        return criteria.read(tmp_path / "rows.jsonl")

    yield run
    torch.set_num_threads(threads)


def test_every_method_meets_the_budget_and_is_measured_once(bench, tmp_path):
    rows = bench("run", "--seeds", "0", "--methods", "*")
    assert len(rows) == 1 + len(importlib.import_module("contenders").CONTENDERS)
    pruned = [row for row in rows if row["method"] != "original"]
    assert all(0.2 < row["macs"] <= 0.5 for row in pruned), pruned
    assert all(row["params"] < 1 for row in pruned)
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert bench("run", "--seeds", "0", "--methods", "*") == rows
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_half_a_line_of_an_interrupted_run_is_measured_again(bench, tmp_path):
    rows = bench("run", "--seeds", "0", "--methods", "fp.prune")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = bench("run", "--seeds", "0", "--methods", "fp.prune")
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    whole = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [row["method"] for row in whole] == ["original", "fp.prune"]


def test_the_page_holds_every_measurement_between_its_markers(bench, tmp_path):
    some = ["--seeds", "0", "--methods", *METHODS, "--keep", "0.6", "0.4"]
    for action in ("run", "reconstruct", "epoch"):
        bench(action, *some)
    rows = bench("latency", *some)
    page, report = tmp_path / "page.md", importlib.import_module("criteria_report")
    page.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    bench("report")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| TP GroupTaylor") == 2
    trained = [row["one_epoch"] for row in rows if row["measured"] == "epoch"]
    assert len(trained) == 2 * len(METHODS)
    fitted = [row["method"] for row in rows if "reconstructed" in row]
    assert fitted == ["fp.prune", "fp.prune"]
    assert "## 60% of the MACs" in text
    for name in ("macs", "latency"):
        assert (tmp_path / "images" / f"criteria-{name}.png").read_bytes()[1:4] == b"PNG"
    bench("report")
    assert page.read_text() == text


def test_a_page_without_markers_is_left_alone(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("mine\n")
    with pytest.raises(SystemExit, match="lacks the line"):
        bench("report")
    assert page.read_text() == "mine\n"
