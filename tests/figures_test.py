"""The data of the figures are the numbers of the tables that they come from."""

import csv
import pathlib

from absl.testing import absltest

_DOCS = pathlib.Path(__file__).parents[1] / 'docs'


def data(name: str) -> list[dict[str, str]]:
  text = (_DOCS / 'figures' / 'data' / f'{name}.csv').read_text('utf-8')
  lines = [line for line in text.splitlines() if not line.startswith('#')]
  return list(csv.DictReader(lines))


def tables(page: str) -> list[list[str]]:
  """The cells of all table rows of a page."""
  lines = (_DOCS / f'{page}.md').read_text('utf-8').splitlines()
  rows = [line.split('|')[1:-1] for line in lines if line.startswith('| ')]
  return [[cell.strip() for cell in row] for row in rows]


class FiguresTest(absltest.TestCase):
  def test_recipes(self):
    rows = tables('training')
    for row in data('recipes'):
      cells = [row[k] for k in ('recipe', 'seed_0', 'seed_1', 'seed_2', 'mean')]
      found = [r for r in rows if r[:5] == cells]
      self.assertLen(found, 1, cells)
      self.assertEqual(found[0][6], row['goal'])

  def test_real_model(self):
    """A row of the table has weights alone, and then activations as well."""
    rows = {row[0]: row for row in tables('models')}
    for row in data('evaluate')[1:]:
      cells = rows[row['weights']]
      size = f'{int(row["bytes"]) / 1e6:.1f}'
      self.assertEqual(cells[1:3], [f'{float(row["bits"]):.2f}', size])
      at = 3 if row['activations'] == 'none' else 6
      delta = f'{float(row["delta"]):+.4f} ± {float(row["stderr"]):.4f}'
      kl, top1 = f'{float(row["kl"]):.4f}', f'{float(row["top1"]):.1%}'
      self.assertEqual(cells[at : at + 3], [delta, kl, top1])

  def test_post_training(self):
    """Losses stand in the table; what rtn lost with two windows as well."""
    rows, last = [], ''
    for row in tables('ptq'):
      last = row[0] or last
      if len(row) == 9:
        rows.append((last.strip('`'), row[2].strip('`'), row[3], row[6]))
    for row in data('ptq'):
      delta = f'{float(row["delta"]):+.4f} ± {float(row["stderr"]):.4f}'
      at = 2 if row['activations'] == 'none' else 3
      own = [r[at] for r in rows if r[:2] == (row['format'], row['method'])]
      self.assertLen(own, 1, row)
      self.assertEqual(own[0].removesuffix(' ¹'), delta)
    cells = [[c.strip('`') for c in row] for row in tables('ptq')]
    for row in data('ptq_methods'):
      self.assertIn(list(row.values()), cells)

  def test_curves(self):
    text = (_DOCS / 'training.md').read_text('utf-8')
    rows = data('curves')
    self.assertEqual([int(row['step']) for row in rows], list(range(240)))
    for name in ('mxfp8', 'nvfp4', 'mxfp4_rtn'):
      gaps = [float(row[name]) - float(row['float32']) for row in rows[-20:]]
      self.assertRegex(text, rf'\+{sum(gaps) / 20:.4f} for {name}\b')

  def test_front_of_exp2(self):
    rows = tables('discovery')
    start = rows.index(['operations', 'found', 'classical', 'formula'])
    (operon,) = [r for r in rows if r[0] == 'Operon, seed 0']
    for row in data('exp2_front'):
      if row['method'] == 'operon':
        self.assertIn(row['error'], operon)
      else:
        (cells,) = [
          r for r in rows[start : start + 9] if r[0] == row['operations']
        ]
        error = cells[1 if row['method'] == 'found' else 2]
        self.assertEqual(error, row['error'])

  def test_scaling_laws(self):
    rows = tables('scaling_laws')
    (head,) = [r for r in rows if r[:3] == ['N', 'D', 'float32 loss']]
    for row in data('scaling_laws'):
      key = [row['weights'], row['data']]
      (cells,) = [
        r for r in rows if [c.replace('&nbsp;', '') for c in r[:2]] == key
      ]
      loss = float(cells[2])
      if row['block']:
        loss += float(cells[head.index(f'{row["element"]}, B={row["block"]}')])
      self.assertAlmostEqual(loss, float(row['loss']), 6)


if __name__ == '__main__':
  absltest.main()
