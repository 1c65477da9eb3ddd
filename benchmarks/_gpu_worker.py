"""A process of `gpu.py`: runs the cases of one family, one after the other.

Every fact is on disk before the next one begins, so that a crash loses nothing.
"""

import json
import os
import sys
import time
import traceback
from typing import Any

# What may have cost the process its CUDA context.
_FATAL = (
  'CUDA_ERROR',
  'ILLEGAL',
  'illegal',
  'INTERNAL',
  'LAUNCH',
  'misaligned',
)


def planted(kind: str) -> dict[str, Any]:
  """A case that does what its name says."""
  if kind == 'crash':
    os.abort()
  if kind == 'hang':
    time.sleep(10000)
  return {'ok': kind == 'right'}


def main(task: dict[str, Any]) -> None:
  part = open(task['part'], 'a', encoding='utf-8')
  operation = task['family'].split('.')[0]

  def say(event: str, case: str, **fact) -> None:
    fact = dict(
      event=event, stage=task['stage'], family=task['family'], case=case, **fact
    )
    part.write(json.dumps(fact) + '\n')
    part.flush()
    os.fsync(part.fileno())

  for name, arguments in task['cases']:
    say('start', name)
    begin = time.perf_counter()
    try:
      if operation == 'planted':
        fact = planted(**arguments)
      else:
        import _gpu_cases

        fact = _gpu_cases.run(
          task['stage'], operation, arguments, cpu=task['cpu']
        )
    except Exception as error:
      traceback.print_exc()
      fact = {'ok': False, 'error': f'{type(error).__name__}: {error}'[:1500]}
    say('end', name, seconds=round(time.perf_counter() - begin, 2), **fact)
    if any(word in fact.get('error', '') for word in _FATAL):
      return  # a new process takes the rest


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
