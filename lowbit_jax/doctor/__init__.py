"""Measures of quantized tensors, and an audit of casts of gradients.

`report` measures every tensor of a tree and says what to change.
`audit_gradients` reads the gradient of a function without running it and finds
cotangents that are rounded to a few bits without a scale. `energy` counts the
arithmetic of a function and estimates what it costs.

`RULES` are the thresholds of `report` with the advice that each gives.

- `Audit`: The result of `audit_gradients`.
- `Energy`: Counts of arithmetic and their price; `print` shows it as a table.
- `Finding`: One cast that damages a gradient.
- `GradientAuditError`: Raised by `Audit.raise_if_bad`.
- `Report`: Measures and advice for quantized tensors; `print` shows a table.
- `Row`: One tensor of a report.
- `Rule`: One piece of advice.
- `audit_gradients`: Finds casts that round a cotangent to a few bits without a
  scale.
- `energy`: Counts the arithmetic of a function and estimates its energy.
- `report`: Measures the error of tensors in a format, and advises what to
  change.
"""

from lowbit_jax.doctor._advice import RULES as RULES, Rule as Rule
from lowbit_jax.doctor._audit import (
  Audit as Audit,
  Finding as Finding,
  GradientAuditError as GradientAuditError,
  audit_gradients as audit_gradients,
)
from lowbit_jax.doctor._energy import Energy as Energy, energy as energy
from lowbit_jax.doctor._report import report as report
from lowbit_jax.doctor._table import Report as Report, Row as Row
