"""Which cases `gpu.py` runs, the most important first.

A case is (name, arguments of the function of its operation in `_gpu_cases`).
Families of a stage run in processes of their own; a family is named after its
operation, with a number where one operation has several.
"""

WEIGHTS = (
  'int4_g128', 'mxfp4', 'int8_channel', 'nvfp4', 'mxfp8_e4m3', 'int4_g32',
  'uint4_g128', 'nf4_g64', 'int3_g32',
)  # fmt: skip
BLOCKS = {
  'fp8': ('fp8_1x128', 'fp8_128x128'),
  'int8': ('int8_channel', 'int8_channel'),
  'mxfp8': ('mxfp8_e4m3', 'mxfp8_e4m3'),
  'mxfp4': ('mxfp4', 'mxfp4'),
  'nvfp4': ('nvfp4', 'nvfp4'),
}
BIG = 8192


def families(stage: str, small: bool = False) -> dict[str, list]:
  """{family: cases} of a stage: 'env', 'check', 'time' or 'tune'.

  Args:
    stage: its name.
    small: miniatures for a CPU.
  """
  if stage == 'env':
    return {'env': [('device', {})]}
  if stage == 'check':
    return _small_checks() if small else _checks()
  if small:
    return _small_times() if stage == 'time' else _small_tunings()
  return _times() if stage == 'time' else _tunings()


def _softmax(kind, rows, columns, dtype='float32', sizes=None, **more):
  words = [kind, f'{rows}x{columns}', dtype, *more, sizes_name(sizes)]
  arguments = dict(kind=kind, shape=[rows, columns], dtype=dtype, **more)
  return _case(words, arguments, sizes)


def _weights(fmt, rows, n, k, sizes=None, dtype='bfloat16', **more):
  """`rows` of x, one number or several that are timed together."""
  shown = '/'.join(map(str, rows)) if isinstance(rows, list) else rows
  words = [fmt, f'm={shown} n={n} k={k}', *more, sizes_name(sizes)]
  words += [dtype] * (dtype != 'bfloat16')
  arguments = dict(fmt=fmt, rows=rows, n=n, k=k, dtype=dtype, **more)
  return _case(words, arguments, sizes)


def _blocks(pair, m, n, k, sizes=None):
  words = [pair, f'm={m} n={n} k={k}', sizes_name(sizes)]
  return _case(words, dict(formats=BLOCKS[pair], m=m, n=n, k=k), sizes)


def _quantize(fmt, rows, columns, dtype='bfloat16', sizes=None, **more):
  words = [fmt, f'{rows}x{columns}', dtype, sizes_name(sizes)]
  words += [f'{name}={value}' for name, value in more.items()]
  arguments = dict(fmt=fmt, shape=[rows, columns], dtype=dtype, **more)
  return _case(words, arguments, sizes)


def sizes_name(sizes) -> str:
  """Tile sizes in the name of a case."""
  if sizes is None:
    return ''
  if not sizes:
    return 'heuristic'
  return ' '.join(f'{name}={value}' for name, value in sizes.items())


def _case(words, arguments, sizes):
  if sizes is not None:
    arguments = dict(arguments, sizes=sizes)
  return ' '.join(filter(None, words)), arguments


def _checks() -> dict[str, list]:
  out = {
    'softmax': [
      _softmax('softmax', 5, 1024),
      _softmax('softmax', 5, 4096, 'bfloat16'),
      _softmax('softmax', 3, 20000),
      _softmax('softmax', 7, 1000, masked=True),
      _softmax('log_softmax', 4, 1024, 'bfloat16'),
      _softmax('logsumexp', 4, 20000, masked=True),
      _softmax('log_softmax', 4, 20000),
      _softmax('softmax', 64, 131072),
      _softmax('softmax', 70000, 32768, 'bfloat16'),
    ],
    'blocks': [
      _blocks(pair, m, n, k)
      for pair in ('fp8', 'int8')
      for m, n, k in (
        (20, 130, 384),
        (20, 130, 2048),
        (300, 520, 4096),
        (128, 128, 128),
      )
    ],
    'blocks.1': [
      _blocks(pair, 20, 130, k)
      for pair in ('mxfp8', 'mxfp4', 'nvfp4')
      for k in (384, 2048)
    ],
    'quantize': [
      _quantize('mxfp4', 128, 1024),
      _quantize('mxfp8_e4m3', 70, 300),
      _quantize('nvfp4', 128, 512, 'float16'),
      _quantize('fp8_1x128', 64, 512, 'float32'),
      _quantize('int3_g32', 64, 512, 'float32', rounding='stochastic'),
      _quantize('mxfp4', 256, 1024, rotation=32),
      _quantize('nvfp4', 128, 1024, rotation=128),
    ],
  }
  # The two main formats alone, the others in pairs and threes.
  for i, formats in enumerate(
    (WEIGHTS[:1], WEIGHTS[1:2], WEIGHTS[2:5], WEIGHTS[5:])
  ):
    cases = []
    for fmt in formats:
      cases += [
        _weights(fmt, 512, 192, 512, probe=True),
        _weights(fmt, 5, 100, 1056 if '128' not in fmt else 1152),
        _weights(fmt, 16, 256, 4096),
      ]
      if fmt in WEIGHTS[:2]:
        cases += [
          _weights(fmt, 100, 320, 2048),
          _weights(fmt, 300, 128, 2048),
        ]
    out[f'weights.{i}'] = cases
  out['weights.0'].append(
    _weights('int8_channel', 16, 256, 1024, dtype='float32')
  )
  return out


def _times() -> dict[str, list]:
  weights = [_weights(fmt, 16, BIG, BIG) for fmt in WEIGHTS[:5]]
  weights += [
    _weights(fmt, rows, BIG, BIG) for rows in (1, 256) for fmt in WEIGHTS[:2]
  ]
  return {
    'weights': weights,
    'blocks': [
      _blocks('fp8', BIG, BIG, BIG),
      _blocks('fp8', 4096, 4096, 4096),
      _blocks('int8', BIG, BIG, BIG),
      _blocks('mxfp8', 4096, 4096, 4096),
    ],
    'softmax': [
      _softmax('softmax', rows, columns, dtype)
      for rows, columns, dtype in (
        (4096, 4096, 'float32'),
        (4096, 4096, 'bfloat16'),
        (4096, 32768, 'float32'),
        (4096, 32768, 'bfloat16'),
        (8192, 1024, 'float32'),
        (64, 131072, 'float32'),
      )
    ],
    'quantize': [
      _quantize('mxfp4', BIG, BIG),
      _quantize('mxfp8_e4m3', BIG, BIG),
      _quantize('mxfp4', BIG, BIG, rotation=32),
    ],
  }


def _tunings() -> dict[str, list]:
  """The heuristic first, in every group of cases that share an entry."""
  weights = [{}]
  weights += [
    dict(bm=bm, stages=stages, split_k=split)
    for bm, stages, split in (
      (128, 4, 4), (128, 6, 2), (128, 6, 4), (128, 4, 8), (128, 8, 2),
      (64, 6, 4),
    )
  ]  # fmt: skip
  return {
    'weights': [
      _weights(fmt, [16, 256], BIG, BIG, sizes)
      for fmt in WEIGHTS[:2]
      for sizes in weights
    ],
    'blocks': [
      _blocks('fp8', 4096, 4096, 4096, sizes)
      for sizes in (
        {},
        *(
          dict(bm=bm, bn=128, stages=stages)
          for bm in (128, 64)
          for stages in (3, 5)
        ),
      )
    ],
    'softmax': [
      _softmax('softmax', 4096, columns, dtype, sizes)
      for columns, dtype, cuts in (
        (4096, 'float32', ((8, 2), (4, 4))),
        (32768, 'bfloat16', ((128, 1), (64, 2), (16, 8))),
      )
      for sizes in ({}, *(dict(slices=s, splits=p) for s, p in cuts))
    ],
    'quantize': [
      _quantize('mxfp4', BIG, BIG, sizes=sizes)
      for sizes in ({}, dict(columns=128), dict(columns=512))
    ],
  }


def _small_checks() -> dict[str, list]:
  return {
    'softmax': [
      _softmax('softmax', 5, 512, 'bfloat16'),
      _softmax('log_softmax', 5, 512, masked=True),
      _softmax('logsumexp', 70, 300),
    ],
    'weights.0': [
      _weights('int4_g128', 256, 64, 256, probe=True),
      _weights('uint4_g128', 5, 40, 256, dtype='float32'),
    ],
    'weights.1': [_weights('nvfp4', 256, 64, 256, probe=True)],
    'blocks': [_blocks(pair, 5, 130, 256) for pair in ('fp8', 'int8', 'nvfp4')],
    'quantize': [
      _quantize('nvfp4', 64, 128, 'float16'),
      _quantize('int3_g32', 64, 128, 'float32', rounding='stochastic'),
      _quantize('mxfp4', 64, 128, rotation=32),
    ],
    'planted': [
      (kind, {'kind': kind}) for kind in ('right', 'wrong', 'hang', 'crash')
    ],
  }


def _small_times() -> dict[str, list]:
  return {
    'weights': [_weights('int4_g128', 16, 256, 256)],
    'blocks': [_blocks('fp8', 256, 256, 256)],
    'softmax': [_softmax('softmax', 64, 512)],
    'quantize': [_quantize('mxfp4', 64, 512, rotation=32)],
  }


def _small_tunings() -> dict[str, list]:
  return {
    'weights': [
      _weights('int4_g128', [16, 64], 256, 256, sizes)
      for sizes in ({}, dict(bm=8, stages=2, split_k=2))
    ],
    'blocks': [
      _blocks('fp8', 256, 256, 256, sizes)
      for sizes in ({}, dict(bm=64, bn=128, stages=2))
    ],
    'softmax': [
      _softmax('softmax', 64, 512, 'float32', sizes)
      for sizes in ({}, dict(slices=1, splits=2))
    ],
    'quantize': [
      _quantize('mxfp4', 64, 512, sizes=sizes)
      for sizes in ({}, dict(columns=128))
    ],
  }
