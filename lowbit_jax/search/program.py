"""Straight-line programs of one variable, as values.

A program is a list of rows (op, a, b, c) over registers: 0 is x, 1 ... K are
the constants, K + 1 + i is the result of row i. The last row is the output; a
program without rows is x itself. Rows are shared by number, so a value that is
used twice is computed once.

`canonical` gives programs that differ in notation only the same rows: what is
not used is dropped, constants are folded and collected, equal rows merged,
operands of commutative operations sorted by structure, and everything is
numbered in the order of first use.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax._typing import ArrayLike


class Op(NamedTuple):
  """An operation.

  Attributes:
    name: of the operation.
    arity: number of operands.
    value: from an array module and operands to the result.
    partials: from operands and the result to the derivative by each operand.
    weight: time of an element on a CPU, in additions; see `weighted_cost`.
  """

  name: str
  arity: int
  value: Callable[..., Any]
  partials: Callable[..., tuple[Any, ...]]
  weight: float = 1.0


def _sign(np_, v):
  return np_.where(v < 0, -1.0, 1.0)


# The position is the code of the operation in rows. Weights are throughputs of
# float32 vectors on x86-64 with AVX2 and AVX-512.
OPS = (
  Op('add', 2, lambda m, a, b: a + b, lambda m, y, a, b: (1.0, 1.0)),
  Op('sub', 2, lambda m, a, b: a - b, lambda m, y, a, b: (1.0, -1.0)),
  Op('mul', 2, lambda m, a, b: a * b, lambda m, y, a, b: (b, a)),
  Op('div', 2, lambda m, a, b: a / b, lambda m, y, a, b: (1 / b, -y / b), 4.5),
  Op('fma', 3, lambda m, a, b, c: a * b + c, lambda m, y, a, b, c: (b, a, 1.0)),
  Op('sqrt', 1, lambda m, a: m.sqrt(a), lambda m, y, a: (0.5 / y,), 8.0),
  Op('abs', 1, lambda m, a: abs(a), lambda m, y, a: (_sign(m, a),)),
  Op(
    'min',
    2,
    lambda m, a, b: m.minimum(a, b),
    lambda m, y, a, b: (m.where(a <= b, 1.0, 0.0), m.where(a <= b, 0.0, 1.0)),
  ),
  Op(
    'max',
    2,
    lambda m, a, b: m.maximum(a, b),
    lambda m, y, a, b: (m.where(a >= b, 1.0, 0.0), m.where(a >= b, 0.0, 1.0)),
  ),
)
ADD, SUB, MUL, DIV, FMA, SQRT, ABS, MIN, MAX = range(len(OPS))
_COMMUTATIVE = frozenset((ADD, MUL, FMA, MIN, MAX))  # in a and b


def op_codes(names: Iterable[str]) -> tuple[int, ...]:
  """Codes of operations by name, in increasing order.

  Raises:
    ValueError: for a name that is not an operation, or no name.
  """
  known = {op.name: code for code, op in enumerate(OPS)}
  names = tuple(names)
  for name in names:
    if name not in known:
      raise ValueError(f'ops has {name!r}; choose from {", ".join(known)}')
  if not names:
    raise ValueError(f'ops is empty; choose from {", ".join(known)}')
  return tuple(sorted({known[name] for name in names}))


@dataclasses.dataclass(frozen=True)
class Program:
  """Rows and constants; see the module for the notation.

  Attributes:
    rows: (op, a, b, c) each; operands beyond the arity are 0.
    constants: numbers, float or wider.

  Raises:
    ValueError: for a row with an unknown operation, or an operand that is not
      x, a constant or the result of an earlier row.

  Examples:
    >>> square = Program(((MUL, 0, 0, 0), (ADD, 2, 1, 0)), (3.0,))
    >>> square(2.0)
    7.0
    >>> str(square)
    'x * x + c1'
  """

  rows: tuple[tuple[int, int, int, int], ...]
  constants: tuple[float, ...] = ()

  def __post_init__(self) -> None:
    for i, (op, *operands) in enumerate(self.rows):
      if not 0 <= op < len(OPS):
        raise ValueError(f'rows[{i}] has operation {op}; codes index OPS')
      limit = 1 + len(self.constants) + i
      for operand in operands[: OPS[op].arity]:
        if not 0 <= operand < limit:
          raise ValueError(
            f'rows[{i}] has operand {operand}; only registers 0 to {limit - 1}'
            ' exist before it'
          )

  def __call__(self, x: ArrayLike) -> Any:
    """Evaluates the program in the arithmetic of x.

    Args:
      x: a number or an array of NumPy, JAX or a Pallas kernel; constants take
        its dtype (longdouble included).
    """
    traced = isinstance(x, jax.Array)
    wide = getattr(x, 'dtype', None) == np.longdouble
    cast = np.longdouble if wide else float if traced else lambda c: c
    return evaluate(self.rows, [cast(c) for c in self.constants], x)

  def value_and_jacobian(
    self, x: np.ndarray, constants: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Values and their derivatives by the constants, forward mode in NumPy.

    Args:
      x: (N,) float64 or longdouble.
      constants: (K,) to use instead of those of the program.

    Returns:
      y of shape (N,) and J of shape (N, K).
    """
    constants = np.asarray(constants)
    k = len(self.constants)
    if constants.shape != (k,):
      raise ValueError(f'constants has shape {constants.shape}; give ({k},)')
    dtype = np.result_type(x, constants)
    unit = np.eye(k, dtype=dtype)
    zero = np.zeros((len(x), k), dtype)
    registers: list[tuple[Any, Any]] = [(np.asarray(x, dtype), zero)]
    registers += [
      (np.full(len(x), constants[i], dtype), zero + unit[i]) for i in range(k)
    ]
    with np.errstate(all='ignore'):
      for op, *operands in self.rows:
        entry = OPS[op]
        values, tangents = zip(
          *(registers[i] for i in operands[: entry.arity]), strict=True
        )
        y = entry.value(np, *values)
        partials = entry.partials(np, y, *values)
        tangent = sum(
          np.broadcast_to(p, y.shape)[:, None] * t
          for p, t in zip(partials, tangents, strict=True)
        )
        registers.append((y, tangent))
    return registers[-1] if self.rows else registers[0]

  def replace_constants(self, constants: Iterable[float]) -> 'Program':
    return Program(self.rows, tuple(constants))

  def __str__(self) -> str:
    """One infix expression; values that are used twice are named u1, u2, ..."""
    return '; '.join(_infix(self))


_SYMBOLS = {ADD: ' + ', SUB: ' - ', MUL: ' * ', DIV: ' / '}


def _infix(program: Program) -> list[str]:
  first = 1 + len(program.constants)
  uses = [0] * (first + len(program.rows))
  for op, *operands in program.rows:
    for operand in operands[: OPS[op].arity]:
      uses[operand] += 1
  names = ['x', *(f'c{i}' for i in range(1, first))]
  lines = []
  for i, (op, *operands) in enumerate(program.rows):
    arguments = [names[j] for j in operands[: OPS[op].arity]]
    if op in _SYMBOLS:
      a, b = arguments
      if op in (MUL, DIV):
        a = f'({a})' if ' + ' in a or ' - ' in a else a
      b = f'({b})' if ' ' in b else b
      text = a + _SYMBOLS[op] + b
    else:
      text = f'{OPS[op].name}({", ".join(arguments)})'
    if uses[first + i] > 1:
      lines.append(f'u{len(lines) + 1} = {text}')
      text = f'u{len(lines)}'
    names.append(text)
  return [*lines, names[-1] if program.rows else 'x']


def evaluate(
  rows: Iterable[tuple[int, int, int, int]],
  constants: Iterable[Any],
  x: ArrayLike,
) -> Any:
  """The last of the rows, in the arithmetic of x and the constants.

  Args:
    rows: of a program.
    constants: one number or array for each constant.
    x: a number or array.
  """
  module = jnp if isinstance(x, jax.Array) else np
  registers = [x, *constants]
  with np.errstate(all='ignore'):
    for op, *operands in rows:
      entry = OPS[op]
      arguments = (registers[i] for i in operands[: entry.arity])
      registers.append(entry.value(module, *arguments))
  return registers[-1] if rows else x


def operations(program: Program) -> int:
  """The number of rows; those of a canonical program all depend on x."""
  return len(program.rows)


def weighted_cost(
  program: Program, weights: Mapping[str, float] | None = None
) -> float:
  """Sum of the weights of the rows, a product that an addition absorbs free.

  Args:
    program: a canonical program.
    weights: by name, of additions; those of `OPS` by default.
  """
  table = [(weights or {}).get(op.name, op.weight) for op in OPS]
  first = 1 + len(program.constants)
  uses = [0] * (first + len(program.rows))
  for op, *operands in program.rows:
    for operand in operands[: OPS[op].arity]:
      uses[operand] += 1
  total = 0.0
  for op, a, b, _ in program.rows:
    total += table[op]
    if op in (ADD, SUB):
      fused = [
        i
        for i in {a, b}
        if i >= first and uses[i] == 1 and program.rows[i - first][0] == MUL
      ]
      total -= table[MUL] if fused else 0.0
  return total


class Degenerate(ValueError):
  """The program is a constant, or folding divides by zero."""


class Node:
  """A vertex of the graph that variation edits: x, a constant or a row.

  Attributes:
    op: code; X or CONSTANT for leaves.
    args: operands, nodes.
    value: of a constant.
  """

  __slots__ = ('args', 'op', 'value')

  def __init__(
    self, op: int, args: Iterable['Node'] = (), value: Any = None
  ) -> None:
    self.op = op
    self.args = list(args)
    self.value = value


X, CONSTANT = -1, -2


def to_graph(program: Program) -> list[Node]:
  """Nodes in the order of registers; the last is the output."""
  nodes = [Node(X), *(Node(CONSTANT, (), c) for c in program.constants)]
  for op, *operands in program.rows:
    nodes.append(Node(op, [nodes[i] for i in operands[: OPS[op].arity]]))
  return nodes if program.rows else nodes[:1]


def canonical(program: Program) -> Program:
  """The canonical form: same function, one notation.

  Besides what the module says, x - c becomes x + c', x / c becomes x * c', and
  a constant that follows another, as in (x + c) + c' or c / (x * c'), is merged
  into it.

  Raises:
    Degenerate: if the program is a constant or a folded constant not finite.
  """
  return from_graph(to_graph(program)[-1])


def from_graph(output: Node) -> Program:
  """The canonical program of a graph; raises as `canonical`."""
  order = topological(output)
  with np.errstate(all='ignore'):
    while True:
      output, simpler = _simplify(order)
      program = _number(output)
      size = len(program.rows) + len(program.constants)
      if not simpler and size == sum(node.op != X for node in order):
        return program
      order = to_graph(program)


def topological(output: Node) -> list[Node]:
  """Nodes that an output depends on, operands before what uses them."""
  order: list[Node] = []
  seen = {output}

  def visit(node):
    for arg in node.args:
      if arg not in seen:
        seen.add(arg)
        visit(arg)
    order.append(node)

  visit(output)
  return order


def _simplify(order: list[Node]) -> tuple[Node, bool]:
  """The last node with folded constants, and whether a row has a new form.

  Operands of commutative rows are sorted by structure, constants first, where
  `_chain` looks for them. Structures are hashes of integers and their tuples,
  which do not depend on PYTHONHASHSEED.
  """
  simpler = False
  uses: dict[Node, int] = {}
  for node in order:
    for arg in node.args:
      uses[arg] = uses.get(arg, 0) + 1
  known: dict[tuple, Node] = {}
  new: dict[Node, Node] = {}
  x = Node(X)
  structure = {x: hash((X,))}
  leaf = -sys.maxsize - 1  # of constants
  for node in order:
    if node.op < 0:
      new[node] = x if node.op == X else node
      continue
    args = [new[a] for a in node.args]
    single = [uses[arg] == 1 for arg in node.args]
    result = _rewrite(node.op, args, single)
    simpler |= result.op != node.op
    if result.op >= 0:
      args = result.args
      parts = [structure.get(arg, leaf) for arg in args]
      key = args
      if result.op in _COMMUTATIVE:
        if parts[1] < parts[0]:
          args[0], args[1] = args[1], args[0]
          parts[0], parts[1] = parts[1], parts[0]
        elif parts[1] == parts[0]:  # in either order
          key = [*sorted(args[:2], key=id), *args[2:]]
      result = known.setdefault((result.op, *key), result)
      structure[result] = hash((result.op, *parts))
    new[node] = result
  return new[order[-1]], simpler


def _constant(value) -> Node:
  if not np.isfinite(value):
    raise Degenerate(f'a folded constant is {value}')
  return Node(CONSTANT, (), value)


def _reciprocal(value):
  if value == 0:
    raise Degenerate('a folded constant divides by zero')
  return 1 / value


def _rewrite(op: int, args: list[Node], single: list[bool]) -> Node:
  """One row with canonical operands, as a simpler node where there is one."""
  if args[0] is not args[-1] and not any(a.op == CONSTANT for a in args):
    return Node(op, args)
  constant = [arg.op == CONSTANT for arg in args]
  if all(constant):
    values = [arg.value for arg in args]
    if op == DIV:
      _reciprocal(values[1])
    return _constant(OPS[op].value(np, *values))
  if op == FMA and constant[0] and constant[1]:
    product = _constant(args[0].value * args[1].value)
    return _rewrite(ADD, [product, args[2]], [True, single[2]])
  if len(args) == 2 and args[0] is args[1]:
    if op in (SUB, DIV):
      return _constant(0.0 if op == SUB else 1.0)
    if op in (MIN, MAX):
      return args[0]
  if op == SUB and constant[1]:
    op, args = ADD, [_constant(-args[1].value), args[0]]
    single = [True, single[0]]
  elif op == DIV and constant[1]:
    op, args = MUL, [_constant(_reciprocal(args[1].value)), args[0]]
    single = [True, single[0]]
  elif op in (ADD, MUL) and constant[1]:
    args, single = args[::-1], single[::-1]
  if args[0].op == CONSTANT and op in (ADD, SUB, MUL, DIV):
    return _chain(op, args[0].value, args[1], single[1])
  return Node(op, args)


def _chain(op: int, c, inner: Node, single: bool) -> Node:
  """c op inner, where inner may begin with a constant of the same kind."""
  plain = Node(op, [_constant(c), inner])
  if not single or len(inner.args) != 2 or inner.args[0].op != CONSTANT:
    return plain
  d, rest = inner.args[0].value, inner.args[1]
  table = {
    (ADD, ADD): lambda: (ADD, c + d),  # c + (d + r)
    (ADD, SUB): lambda: (SUB, c + d),  # c + (d - r)
    (SUB, ADD): lambda: (SUB, c - d),  # c - (d + r)
    (SUB, SUB): lambda: (ADD, c - d),  # c - (d - r)
    (MUL, MUL): lambda: (MUL, c * d),
    (MUL, DIV): lambda: (DIV, c * d),
    (DIV, MUL): lambda: (DIV, c * _reciprocal(d)),
    (DIV, DIV): lambda: (MUL, c * _reciprocal(d)),
  }
  if (op, inner.op) not in table:
    return plain
  merged, value = table[op, inner.op]()
  return Node(merged, [_constant(value), rest])


def _number(output: Node) -> Program:
  """Rows and constants in the order of first use."""
  if output.op == CONSTANT:
    raise Degenerate('the program does not depend on x')
  order = topological(output)
  constants = [node for node in order if node.op == CONSTANT]
  rows = [node for node in order if node.op >= 0]
  number = {node: 1 + i for i, node in enumerate([*constants, *rows])}

  def row(node: Node) -> tuple[int, int, int, int]:
    a, b, c = ([number.get(a, 0) for a in node.args] + [0, 0, 0])[:3]
    return node.op, a, b, c

  return Program(
    tuple(row(node) for node in rows),
    tuple(node.value for node in constants),
  )


@functools.lru_cache(maxsize=1 << 16)
def structure_hash(rows: tuple[tuple[int, int, int, int], ...]) -> int:
  """63 bits that depend on the rows alone."""
  return hash(rows) & (2**63 - 1)
