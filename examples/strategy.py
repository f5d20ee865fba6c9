"""A strategy of your own: the paper's, but forget tokens also teach a tenth of their gradient to retain's MLP output.

    python examples/strategy.py

A strategy is a set of small tables (docs/method.md). `masking.overrides` sets single entries; a strategy with a name is
a function in sgtm/masking/strategy.py.
"""

import sgtm

overrides = {"update.forget:es.retain.mlp_out": 0.1}
tables = sgtm.load_config("debug", [f"--masking.overrides={overrides}"]).tables
for part, table in tables.update.items():
    for label, row in zip(tables.labels, table, strict=True):
        print(f"{part:8} {label:10}", *(f"{group} {entry:g}" for group, entry in zip(tables.groups, row, strict=True)))
