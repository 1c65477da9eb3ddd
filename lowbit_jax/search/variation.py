"""New programs from old ones: edits of the graph of values.

Every function returns the canonical form of a new program, with the constants
of the old one where they survive, and raises `Degenerate` or `TooLarge` where
there is no valid one.

The edit that makes the search work is `insert_pair`: it adds two rows that
change almost nothing, r -> r + c r2 with a small c, so that a child keeps the
fit of its parent and can improve on it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lowbit_jax.search import program as programs
from lowbit_jax.search.program import ADD, DIV, FMA, MUL, OPS, SUB, Program

_PAIR = 0.3  # of the children, an inserted pair
_GRAFT = 0.1  # another program in place of a leaf
_SINGLE = 0.6  # of the rest: one edit; otherwise two or three
_ALL_USES = 0.3  # of pairs replace all later uses of the value
_SQUARE = 0.12  # of insertions at the output: times itself
_EDITS = (0.35, 0.60, 0.85)  # cumulative: insert, delete, rewire; else change
_ATTEMPTS = 16

Source = Callable[[np.random.Generator], Program]


class TooLarge(ValueError):
  """The program has more rows or constants than are allowed."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of a program.

  Attributes:
    ops: codes of operations.
    rows: the most rows.
    constants: the most constants.
  """

  ops: tuple[int, ...]
  rows: int
  constants: int

  def check(self, program: Program) -> Program:
    """The program itself, or TooLarge."""
    if len(program.rows) > self.rows:
      raise TooLarge(f'{len(program.rows)} rows of {self.rows}')
    if len(program.constants) > self.constants:
      raise TooLarge(f'{len(program.constants)} constants of {self.constants}')
    return program


def vary(
  parent: Program,
  rng: np.random.Generator,
  limits: Limits,
  *,
  other: Source,
  pairs: bool = True,
) -> Program:
  """A child: a pair, a graft or one to three edits of the parent.

  Args:
    parent: a canonical program.
    rng: source of every choice.
    limits: of the child.
    other: a program to graft.
    pairs: whether pairs may be inserted.

  Returns:
    The child; the parent itself if no attempt was within the limits.
  """
  for _ in range(_ATTEMPTS):
    try:
      u = rng.random()
      if u < _PAIR and pairs:
        child = insert_pair(parent, rng, limits.ops)
      elif u < _PAIR + _GRAFT:
        child = graft(parent, other(rng), rng)
      else:
        count = 1 if rng.random() < _SINGLE else int(rng.integers(2, 4))
        child = edit(parent, rng, limits.ops, count)
      return limits.check(child)
    except (programs.Degenerate, TooLarge):
      continue
  return parent


def random_program(rng: np.random.Generator, limits: Limits) -> Program:
  """Random rows on random operands, with random constants."""
  while True:
    length = rng.integers(1, limits.rows + 1)
    nodes = [programs.Node(programs.X)]
    for _ in range(length):
      op = limits.ops[rng.integers(len(limits.ops))]
      operands = [_leaf_or_value(rng, nodes) for _ in range(OPS[op].arity)]
      nodes.append(programs.Node(op, operands))
    try:
      return limits.check(programs.from_graph(nodes[-1]))
    except (programs.Degenerate, TooLarge):
      continue


def redraw_constants(program: Program, rng: np.random.Generator) -> Program:
  """The same rows with new random constants."""
  return program.replace_constants(
    float(_random_constant(rng)) for _ in program.constants
  )


def jitter_constants(program: Program, rng: np.random.Generator) -> Program:
  """The same rows with constants changed by a relative 10^U(-6, 0) N(0, 1)."""
  c = np.array(program.constants, np.float64)
  spread = 10 ** rng.uniform(-6, 0)
  factors = 1 + spread * rng.standard_normal(c.shape)
  return program.replace_constants((c * factors).tolist())


def insert_pair(
  program: Program, rng: np.random.Generator, ops: Sequence[int]
) -> Program:
  """r -> r +- (c op r2) at one use of a value r, or at all of its later uses.

  c is about 1e-3, op multiplies or divides, and r2 is r itself or an earlier
  value. With fma, it is r -> fma(c, r2, r).
  """
  nodes = programs.to_graph(program)
  edges = _edges(nodes)
  consumer, slot = edges[rng.integers(len(edges))]
  end = len(nodes) if consumer is None else nodes.index(consumer)
  r = nodes[-1] if consumer is None else consumer.args[slot]
  earlier = [n for n in nodes[:end] if n.op != programs.CONSTANT]
  r2 = r if rng.random() < 0.5 else earlier[rng.integers(len(earlier))]
  if r2.op == programs.CONSTANT:
    r2 = nodes[0]
  c = programs.Node(programs.CONSTANT, (), 1e-3 * rng.standard_normal())
  new = _pair(r, c, r2, rng, ops)
  if consumer is None:
    return programs.from_graph(new)
  if rng.random() < _ALL_USES:
    for node in nodes[end:]:
      node.args = [new if arg is r else arg for arg in node.args]
  else:
    consumer.args[slot] = new
  return programs.from_graph(nodes[-1])


def _pair(r, c, r2, rng, ops):
  inner = [op for op in (MUL, DIV) if op in ops]
  outer = [op for op in (ADD, SUB) if op in ops]
  if FMA in ops and (not (inner and outer) or rng.random() < 0.5):
    return programs.Node(FMA, [c, r2, r])
  if not (inner and outer):
    raise programs.Degenerate('no operations for a pair')
  small = programs.Node(inner[rng.integers(len(inner))], [c, r2])
  return programs.Node(outer[rng.integers(len(outer))], [r, small])


def graft(
  program: Program, other: Program, rng: np.random.Generator
) -> Program:
  """Another program in place of one use of x or of a constant."""
  nodes = programs.to_graph(program)
  leaves = [
    (node, slot)
    for node in nodes
    for slot, arg in enumerate(node.args)
    if arg.op < 0
  ]
  scion = programs.to_graph(other)
  for node in scion:  # one x for both
    node.args = [nodes[0] if a.op == programs.X else a for a in node.args]
  if not leaves or scion[-1].op == programs.X:
    raise programs.Degenerate('nothing to graft')
  node, slot = leaves[rng.integers(len(leaves))]
  node.args[slot] = scion[-1]
  return programs.from_graph(nodes[-1])


def edit(
  program: Program,
  rng: np.random.Generator,
  ops: Sequence[int],
  count: int = 1,
) -> Program:
  """Edits: insert a row, delete a row, rewire an operand or change a row."""
  nodes = programs.to_graph(program)
  for _ in range(count):
    if nodes[-1].op < 0:
      output = _insert(nodes, rng, ops)
    else:
      kind = int(np.searchsorted(_EDITS, rng.random(), 'right'))
      output = (_insert, _delete, _rewire, _change)[kind](nodes, rng, ops)
    nodes = programs.topological(output)
  return programs.from_graph(nodes[-1])


def square(program: Program) -> Program:
  """The product of the program with itself."""
  output = programs.to_graph(program)[-1]
  return programs.from_graph(programs.Node(MUL, [output, output]))


def bypass(program: Program, row: int, operand: int) -> Program:
  """The program in which one operand of a row stands in place of the row."""
  nodes = programs.to_graph(program)
  node = nodes[1 + len(program.constants) + row]
  return programs.from_graph(_replace(nodes, node, node.args[operand]))


def _insert(nodes, rng, ops):
  edges = _edges(nodes)
  consumer, slot = edges[rng.integers(len(edges))]
  end = len(nodes) if consumer is None else nodes.index(consumer)
  source = nodes[-1] if consumer is None else consumer.args[slot]
  if consumer is None and MUL in ops and rng.random() < _SQUARE:
    return programs.Node(MUL, [source, source])
  op = ops[rng.integers(len(ops))]
  args = [_leaf_or_value(rng, nodes[:end]) for _ in range(OPS[op].arity)]
  args[rng.integers(len(args))] = source
  new = programs.Node(op, args)
  if consumer is None:
    return new
  consumer.args[slot] = new
  return nodes[-1]


def _delete(nodes, rng, ops):
  del ops
  rows = [node for node in nodes if node.op >= 0]
  node = rows[rng.integers(len(rows))]
  return _replace(nodes, node, node.args[rng.integers(len(node.args))])


def _rewire(nodes, rng, ops):
  del ops
  consumer, slot = _inner_edge(nodes, rng)
  consumer.args[slot] = _leaf_or_value(rng, nodes[: nodes.index(consumer)])
  return nodes[-1]


def _change(nodes, rng, ops):
  node, _ = _inner_edge(nodes, rng)
  alternatives = [
    op for op in ops if OPS[op].arity == len(node.args) and op != node.op
  ]
  if not alternatives or rng.random() < 0.25:
    node.args.reverse()
  else:
    node.op = alternatives[rng.integers(len(alternatives))]
  return nodes[-1]


def _replace(nodes, old, new):
  """The output of the graph with one node in place of another."""
  for node in nodes:
    node.args = [new if arg is old else arg for arg in node.args]
  return new if nodes[-1] is old else nodes[-1]


def _edges(nodes):
  """Uses of values as (consumer, slot), and (None, 0) for the output."""
  uses = [(node, slot) for node in nodes for slot in range(len(node.args))]
  return [*uses, (None, 0)]


def _inner_edge(nodes, rng):
  edges = _edges(nodes)[:-1]
  return edges[rng.integers(len(edges))]


def _leaf_or_value(rng, nodes):
  """x, a new constant or an earlier value."""
  if rng.random() < 0.3:
    return programs.Node(programs.CONSTANT, (), _random_constant(rng))
  values = [node for node in nodes if node.op != programs.CONSTANT]
  if not values:
    return programs.Node(programs.X)
  return values[rng.integers(len(values))]


def _random_constant(rng):
  return rng.standard_normal() * 10 ** rng.uniform(-1, 1.5)
