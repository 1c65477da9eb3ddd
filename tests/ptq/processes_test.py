"""Calibration over two processes, each of which has half of the tokens."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest

from lowbit_jax import formats, nn, ptq
from tests.ptq import problems

_WIDTH, _ROWS, _BATCHES = 64, 256, 3
_TOKENS = _ROWS * _BATCHES
_EPS = 2.0**-24  # unit roundoff of float32

# Calibrates and quantizes in one of two processes of two devices each, and
# writes what comes out. Half of each batch, then half of each weight is in
# either process, halves of the other on either device of a process.
_PROCESS = """
import sys
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.ptq import processes_test as test

devices = np.array(jax.devices()).reshape(2, 2)
assert [d.process_index for d in devices[:, 0]] == [0, 1]

def split_batches():
  sharding = NamedSharding(Mesh(devices, ('data', 'model')), P('data'))

  def own_rows(x):
    first, last = (len(x) * (i + jax.process_index()) // 2 for i in (0, 1))
    return jax.make_array_from_process_local_data(sharding, x[first:last])

  return test.params(), map(own_rows, test.batches())

def split_weights():
  mesh = Mesh(devices, ('model', 'data'))

  def spread(x, *axes):
    sharding = NamedSharding(mesh, P(*axes))
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  params, places = test.params(), {'up': (None, 'model'), 'down': ('model',)}
  for name, axes in places.items():
    params[name]['kernel'] = spread(params[name]['kernel'], *axes)
  return params, (spread(x, 'data') for x in test.batches())

for split in (split_batches, split_weights):
  observed, packed = test.calibrated(*split())
  leaves = test.numbers(observed) | test.codes(packed)
  np.savez(f'{sys.argv[3]}/{split.__name__}_{sys.argv[2]}.npz', **leaves)
"""


def model(params, x):
  h = jax.nn.relu(x @ params['up']['kernel'])
  return h @ params['down']['kernel']


def params():
  return {
    'up': {'kernel': np.asarray(problems.weights(_WIDTH, _WIDTH, 1)) / 8},
    'down': {'kernel': np.asarray(problems.weights(_WIDTH, _WIDTH, 2)) / 8},
  }


def batches():
  return [
    np.asarray(problems.activations(_WIDTH, _ROWS, seed))
    for seed in range(_BATCHES)
  ]


def calibrated(params, batches):
  """What was observed, and parameters in low bits."""
  observed = ptq.calibrate(model, params, batches)
  method = ptq.method(ptq.gptq(), observed)
  packed = nn.quantize_params(params, None, formats.int4_g32, method=method)
  return observed, packed


def numbers(observed):
  """What layers met, by name; the whole of it, as steps see it."""
  return {
    f'{path}.{name}': np.asarray(leaf)
    for path in observed
    for name, leaf in ptq._statistics.of_leaf(observed, path)._asdict().items()
  }


def codes(packed):
  """Codes and scales by name, whole."""
  return {
    f'{path}.{name}': np.asarray(ptq._statistics._whole(leaf))
    for path, layer in packed.items()
    for name, leaf in (
      ('codes', layer['kernel'].codes),
      ('scale', layer['kernel'].scale),
    )
  }


def bounds():
  """How far statistics of the same tokens may lie apart, by name.

  A sum of n rounded products in any order differs from the exact one by at most
  gamma(n) times the sum of their magnitudes (Higham, 2002, section 3.1), twice
  that from another. What `down` meets is itself a sum of _WIDTH products, whose
  magnitudes are |x| |w|; to be followed by a relu does not add to its error.
  Behind sums come a division by the number of tokens, and for means of batches
  at most 8 operations that merge each.
  """

  def gamma(n):
    return n * _EPS / (1 - n * _EPS)

  out, x = {}, abs(np.concatenate(batches()).astype(np.float64))
  up = abs(params()['up']['kernel'].astype(np.float64))
  for path, met, depth in (('up', x, 0), ('down', x @ up, _WIDTH)):
    products, largest = met.T @ met / _TOKENS, met.max(0)
    errors = {
      'seen': 0,
      'moments': gamma(_TOKENS + 2 * depth + 1) * products,
      'mean': gamma(_TOKENS + depth + 8 * _BATCHES) * largest,
      'amax': gamma(depth) * largest,
    }
    out |= {f'{path}/kernel.{name}': 2 * e for name, e in errors.items()}
  return out


class ProcessesTest(absltest.TestCase):
  @pytest.mark.long('two processes compile for themselves')
  def test_two_processes(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    run_processes(folder)
    observed, packed = calibrated(params(), batches())
    alone, codes_alone, apart = numbers(observed), codes(packed), bounds()
    for split in ('split_batches', 'split_weights'):
      one, two = (dict(np.load(folder / f'{split}_{i}.npz')) for i in range(2))
      self.assertEqual(one.keys(), alone.keys() | codes_alone.keys())
      for name, leaf in one.items():
        with self.subTest(split=split, name=name):
          self.assertEqual(leaf.tobytes(), two[name].tobytes())
          if name in alone:
            error = abs(leaf.astype(np.float64) - alone[name])
            self.assertTrue((error <= apart[name]).all())
          else:
            # Next to a tie the last bit decides, and for what follows too.
            agree = (leaf == codes_alone[name]).mean()
            self.assertGreater(agree, 0.98)


def run_processes(folder):
  """Runs both processes, which write into a folder."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join(sys.path),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, address, str(i), str(folder)],
      env=environment,
    )
    for i in range(2)
  ]
  try:
    for process in processes:
      if process.wait(timeout=120):
        raise RuntimeError(f'a process ended with {process.returncode}')
  finally:
    for process in processes:
      process.kill()
      process.wait()


if __name__ == '__main__':
  absltest.main()
