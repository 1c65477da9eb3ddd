"""Minifloats by their widths are those of the formats."""

from absl.testing import absltest, parameterized

from lowbit_jax import formats
from lowbit_jax.numerics._codec import spec
from lowbit_pallas.arith import codec


class MinifloatTest(parameterized.TestCase):
  @parameterized.parameters(
    ('e4m3fn', 4, 3, 'fn'), ('e2m1fn', 2, 1, 'fn'), ('e5m2', 5, 2, 'ieee'),
    ('e3m4', 3, 4, 'ieee'), ('e6m0ieee', 6, 0, 'ieee'), ('e2m3', 2, 3, 'none'),
    ('e1m1', 1, 1, 'none'),
  )  # fmt: skip
  def test_is_the_format(self, name, e, m, special):
    self.assertEqual(codec.minifloat(e, m, special), spec(formats.get(name)))

  def test_is_what_the_standard_says(self):
    self.assertEqual(
      codec.minifloat(4, 3, 'fn'),
      codec.Float(4, 3, -6, 0x7E, None, 0x7F, True, True, True),
    )
    self.assertEqual(
      codec.minifloat(5, 2, 'ieee'),
      codec.Float(5, 2, -14, 0x7B, 0x7C, 0x7E, True, True, True),
    )
    self.assertEqual(
      codec.minifloat(8, 23, 'ieee'),
      codec.Float(
        8, 23, -126, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, True, True, True
      ),
    )


if __name__ == '__main__':
  absltest.main()
