"""Says what a file of tensors holds, before anything in it is trusted.

python -m lowbit_jax.io model.gguf
python -m lowbit_jax.io folder_of_a_model
"""

import argparse
import os
import sys

from lowbit_jax.io import gguf, safetensors
from lowbit_jax.io._checkpoint import Checkpoint


def _opened(path: str) -> Checkpoint:
  """A checkpoint of the kind that its first bytes, or its folder, tell."""
  if not os.path.isdir(path):
    with open(path, 'rb') as file:
      if file.read(4) == b'GGUF':
        return gguf.open(path)
  return safetensors.open(path)


def main(arguments: list[str] | None = None) -> int:
  """Prints a table for each file; 1 if one of them cannot be read."""
  parser = argparse.ArgumentParser(
    'python -m lowbit_jax.io',
    description='Says what files of tensors hold: layouts, bits, bytes.',
  )
  parser.add_argument(
    'path', nargs='+', help='a GGUF or safetensors file, or a folder of them'
  )
  failed = False
  for path in parser.parse_args(arguments).path:
    try:
      with _opened(path) as checkpoint:
        print(f'{checkpoint.describe()}\n')
    except (OSError, ValueError) as error:
      failed = True
      print(error, file=sys.stderr)
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
