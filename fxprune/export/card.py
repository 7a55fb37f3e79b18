"""The card of a saved model: what it is, its numbers, and how it is loaded, as Markdown."""

import json
from typing import Any

from tabulate import tabulate
from torch import fx

from fxprune.planning.plan import amount

_HEAD = """\
---
library_name: fxprune
tags:
- pruning
- fxprune
---

# {name}
"""
_LOAD = """
## How to load it

```python
import fxprune as fp

model = fp.load("this/folder"{trust})  # the original class is not needed
```

`graph.json` holds the graph, `model.safetensors` the weights, `model.py` the same graph as Python
for reading{plan}. Nothing of it is run by `fp.load`.
"""


def card(module: fx.GraphModule, result: Any, trust: list[str]) -> str:
    """The text of ``README.md``.

    Args:
        module: the model.
        result: the ``PruneResult`` that it is of, or None.
        trust: modules beyond the allowlist that loading has to trust.
    """
    parameters = sum(p.numel() for p in module.parameters())
    text = _HEAD.format(name=type(module).__name__)
    text += f"\n{parameters:,} parameters.\n" if result is None else _numbers(result)
    trusted = f", trust={tuple(trust)!r}" if trust else ""
    plan = ", and `plan.json` what was kept of the original" if result is not None else ""
    return text + _LOAD.format(trust=trusted, plan=plan)


def config(module: fx.GraphModule, inputs: Any) -> str:
    """The text of ``config.json``: what model hubs look for in a repository."""
    data = {
        "library_name": "fxprune",
        "architectures": [type(module).__name__],
        "parameters": sum(p.numel() for p in module.parameters()),
        "inputs": inputs,
    }
    return json.dumps(data, indent=1) + "\n"


def _numbers(result: Any) -> str:
    plan = result.plan
    costs = [
        (key, amount(key, before), amount(key, after), f"{after / before:.1%}" if before else "")
        for key, after in plan.reached.items()
        if (before := plan.reached.get(f"{key}_before")) is not None
    ]
    groups = [
        (g.name, g.width, len(g.kept), f"{len(g.kept) / g.width:.0%}", g.note) for g in plan.groups
    ]
    frozen = sum(width for _, width, _ in plan.frozen)
    parts = [
        "\nPruned by fxprune: channels were removed, and everything that made or read them.\n\n",
        _table(costs, ("cost", "original", "this model", "kept")),
        f"\nAsked: {', '.join(f'`{k}={v}`' for k, v in plan.requested.items()) or 'nothing'}.\n",
        f"\nVerified: {result.verdict or 'not'}.\n",
    ]
    if result.reconstruction is not None:
        parts.append("\nThen the kept weights were fitted to samples without labels.\n")
    if plan.approximate:
        names = ", ".join(f"`{name}`" for name in plan.approximate)
        parts.append(f"\nA statistic over channels changed at {names}.\n")
    parts += ["\n## Channels\n\n", _table(groups, ("group", "before", "after", "kept", "note"))]
    if frozen:
        parts.append(f"\n{frozen:,} more channels could not be removed.\n")
    return "".join(parts)


def _table(rows: list[Any], headers: tuple[str, ...]) -> str:
    return f"{tabulate(rows, headers=headers, tablefmt='github', disable_numparse=True)}\n"
