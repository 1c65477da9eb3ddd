"""What `gpu.py` found: a summary, and tables of tile sizes to commit."""

import json
import math
import os
import pathlib
import re
from typing import Any

_PALLAS = pathlib.Path(__file__).resolve().parents[1] / 'pallas/lowbit_pallas'
_GAIN = 0.98  # what an entry must cost at most, relative to the heuristic
Facts = list[dict[str, Any]]


def write(facts: Facts, out: pathlib.Path) -> str:
  """Writes `summary.md` and `<kernel>/tuned/<device>.json`.

  Returns:
    The summary.
  """
  text = summary(facts)
  _replace(out / 'summary.md', text)
  device = _device(facts)
  if device:
    for op, entries in best_sizes(facts).items():
      path = f'{op}/tuned/{table_name(device["device"])}.json'
      old = _PALLAS / path
      table = json.loads(old.read_text()) if old.exists() else {}
      _replace(out / path, json.dumps(merged(table, entries), indent=1) + '\n')
  return text


def table_name(device_kind: str) -> str:
  """File name of a device, as `lowbit_pallas._tuned` has it."""
  return re.sub('[^a-z0-9]+', '_', device_kind.lower()).strip('_')


def merged(table: dict, entries: dict) -> dict:
  """A table with new entries; None removes one."""
  found = {**table, **entries}
  return {key: found[key] for key in sorted(found) if found[key] is not None}


def best_sizes(facts: Facts) -> dict[str, dict[str, dict[str, int] | None]]:
  """{kernel: {key: sizes, or None for the heuristic}} where both were timed.

  Sizes are compared by the geometric mean of their times and kept if they save
  2 % at least, so that a table holds what pays only.
  """
  times: dict[tuple[str, str], list] = {}
  for x in _ended(facts, 'tune'):
    if x['ok']:
      mean = math.exp(sum(map(math.log, x['us'])) / len(x['us']))
      times.setdefault((x['op'], x['key']), []).append((mean, x['sizes']))
  out: dict[str, dict] = {}
  for (op, key), trials in times.items():
    plain = [time for time, sizes in trials if not sizes]
    if plain:
      time, sizes = min(trials, key=lambda trial: trial[0])
      keeps = sizes if time < _GAIN * plain[0] else None
      out.setdefault(op, {})[key] = keeps
  return out


def summary(facts: Facts) -> str:
  """Markdown: the device, checks, times, sizes, what was not reached."""
  device = _device(facts) or {}
  lines = [f'# {device.get("device", "no device")}', '']
  if device:
    lines += [
      f'JAX {device["jax"]}, {device["nvidia_smi"] or "no nvidia-smi"},'
      f' {device["date"]}. Copy {device["copy_bytes"] / 1e12:.3g} TB/s,'
      f' bfloat16 product {device["bf16_flops"] / 1e12:.3g} TFLOP/s, timed by'
      f' {device["timer"]}.',
      '',
    ]
  checks = _ended(facts, 'check')
  if checks:
    right = sum(x['ok'] for x in checks)
    lines += [
      f'## Checks: {right} of {len(checks)} right',
      '',
      '| kernel | case | result | error | allowed | notes |',
      '|---|---|---|---|---|---|',
      *map(_check_row, checks),
      '',
    ]
  times = _ended(facts, 'time')
  if times:
    lines += [
      '## Times',
      '',
      '| kernel | case | us | of the roofline | faster than XLA | which |',
      '|---|---|---|---|---|---|',
      *(_time_row(x, device) for x in times),
      '',
    ]
  tunings = _ended(facts, 'tune')
  if tunings:
    plain = {
      (x['op'], x['key']): x['us']
      for x in tunings
      if x['ok'] and not x['sizes']
    }
    lines += [
      '## Sizes',
      '',
      '| kernel | case | us | of the heuristic |',
      '|---|---|---|---|',
      *(_tune_row(x, plain) for x in tunings),
      '',
    ]
  skipped = [x for x in facts if x['event'] == 'skipped']
  if skipped:
    names = ', '.join(
      f'{x["stage"]} {x["family"]} {x["case"]}' for x in skipped
    )
    lines += [f'Not reached: {names}.', '']
  return '\n'.join(lines)


def _ended(facts: Facts, stage: str) -> Facts:
  return [x for x in facts if x['event'] == 'end' and x['stage'] == stage]


def _device(facts: Facts) -> dict[str, Any] | None:
  return next((x for x in _ended(facts, 'env') if x['ok']), None)


def _check_row(x) -> str:
  words = [] if x.get('repeats', True) else ['other bits when repeated']
  words += [] if x.get('row_alone', True) else ['other bits for a row alone']
  words += [] if x.get('special_entries', True) else ['NaN or inf misplaced']
  words += [_one_line(str(x[k])) for k in ('error', 'wrong') if k in x]
  mark = 'right' if x['ok'] else '**WRONG**'
  error, allowed = (_number(x.get(k)) for k in ('worst', 'tolerance'))
  return (
    f'| {x["family"]} | {x["case"]} | {mark} | {error} | {allowed} |'
    f' {"; ".join(words)} |'
  )


def _time_row(x, device) -> str:
  head = f'| {x["family"]} | {x["case"]} |'
  if not x['ok']:
    why = x.get('error') or f'wrong: error {_number(x.get("worst"))}'
    return f'{head} - | - | - | {_one_line(why)} |'
  share = '-'
  if device:
    floor = x['bytes'] / device['copy_bytes']
    floor = max(floor, x['flops'] / device['bf16_flops'])
    share = f'{floor * 1e6 / x["us"]:.0%}'
  ratio, which = '-', '-'
  if x.get('others'):
    which = min(x['others'], key=x['others'].get)
    ratio = f'{x["others"][which] * 1e6 / x["us"]:.2f}x'
  return f'{head} {x["us"]:.1f} | {share} | {ratio} | {which} |'


def _tune_row(x, plain) -> str:
  head = f'| {x["family"]} | {x["case"]} |'
  if not x['ok']:
    why = x.get('error') or f'wrong: error {_number(x.get("worst"))}'
    return f'{head} - | {_one_line(why)} |'
  base = plain.get((x['op'], x['key']))
  us = ', '.join(f'{t:.1f}' for t in x['us'])
  if base is None:
    return f'{head} {us} | - |'
  shares = ', '.join(f'{t / b:.0%}' for t, b in zip(x['us'], base, strict=True))
  return f'{head} {us} | {shares} |'


def _number(x) -> str:
  return '-' if x is None else f'{x:.3g}'


def _one_line(text: str) -> str:
  return ' '.join(text.split()).replace('|', '/')[:300]


def _replace(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_text(text, 'utf-8')
  os.replace(temporary, path)
