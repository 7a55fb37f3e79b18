"""Which share of its channels every node of an exported model keeps, for viewers of graphs."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from fxprune.ops.ledger import Role
from fxprune.planning import PruningPlan

KEPT = "fxprune.kept"  # name of the property of ONNX nodes
# From what loses most to what keeps all.
_GRADIENT = ({"stop": 0, "bgColor": "#ef6548"}, {"stop": 1, "bgColor": "#fff7ec"})


def kept_by_layer(plan: PruningPlan, tensors: Mapping[str, Any]) -> dict[str, float]:
    """Per layer that has parameters: share of the channels that it makes which it keeps.

    Args:
        plan: what is kept.
        tensors: of the slim model, by name.
    """
    shares = {name.rpartition(".")[0]: 1.0 for name in tensors}
    for axis in plan.axes:
        layer = axis.name.rpartition(".")[0]
        if axis.role != Role.CONSUMER and layer in shares:
            shares[layer] = min(shares[layer], len(axis.kept) / axis.size)
    return shares


def node_data(program: ExportedProgram, plan: PruningPlan) -> str:
    """Node data for Model Explorer: JSON that colours the nodes of the program's ``.pt2`` file."""
    shares = kept_by_layer(plan, program.state_dict)
    named = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.target in program.state_dict
    }
    results = {
        node.name: {"value": round(min(found), 4)}
        for node in program.graph.nodes
        if (found := [shares[_layer(named[n.name])] for n in _own(node) if n.name in named])
    }
    return json.dumps({"results": results, "gradient": _GRADIENT}, indent=1) + "\n"


def _own(node: Any) -> list[Any]:
    """The node itself if it holds a tensor, or what it reads."""
    return [node] if node.op == "placeholder" else list(node.all_input_nodes)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def mark_onnx(model: Any, plan: PruningPlan, tensors: Mapping[str, Any]) -> None:
    """Write the shares into the nodes of an ``onnx_ir`` model, where Netron shows them."""
    shares = kept_by_layer(plan, tensors)
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        layers = [scope for scope in scopes if scope in shares and scope]
        if layers:
            node.metadata_props[KEPT] = f"{shares[layers[-1]]:.4f}"
    model.metadata_props["fxprune.fingerprint"] = plan.fingerprint
    model.metadata_props["fxprune.requested"] = json.dumps(plan.requested, default=str)
