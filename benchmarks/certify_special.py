"""Constants and certificates of the elementary functions of `special`.

Polishes the constants of a function from scratch, compares them with those in
`lowbit_pallas.arith.elementary`, and writes the certificate of the function.
If the constants differ, it prints them and stops: paste them and run it again.

  python benchmarks/certify_special.py --function=exp2
"""

import pathlib

from absl import app, flags

from lowbit_jax.search import adopted, certify

_FUNCTION = flags.DEFINE_enum(
  'function', None, list(adopted.FUNCTIONS), 'Which.', required=True
)
_SEED = flags.DEFINE_integer('seed', adopted.SEED, 'Of the polish.')
_TIER = flags.DEFINE_enum('tier', 'all', certify.TIERS, 'Density of inputs.')
_POLISH = flags.DEFINE_bool('polish', True, 'Whether to repeat the polish.')
_FOLDER = flags.DEFINE_string(
  'folder', 'lowbit_jax/special/certificates', 'Where certificates go.'
)


def main(argv):
  del argv
  name = _FUNCTION.value
  if _POLISH.value:
    fit = adopted.polish(name, seed=_SEED.value)
    found = tuple(float(c) for c in fit.constants)
    print(f'{name}: {fit.error:.4f} ULP after {fit.iterations} moves')
    if found != tuple(adopted.FUNCTIONS[name].constants):
      lines = '\n'.join(f"  float.fromhex('{c.hex()}')," for c in found)
      raise SystemExit(f'the code has other constants than\n{lines}')
  command = f'python benchmarks/certify_special.py --function={name}'
  certificate = adopted.certify(
    name, command, tier=_TIER.value, seed=_SEED.value
  )
  path = pathlib.Path(_FOLDER.value) / f'{name}.json'
  certificate.save(path, overwrite=True)
  print(
    f'{path}: {certificate.max_ulp:.4f} ULP at {certificate.argmax} of'
    f' {certificate.n_inputs} inputs'
  )


if __name__ == '__main__':
  app.run(main)
