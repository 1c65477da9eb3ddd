"""Makes llama_families.npz and .json beside this file, by transformers.

  python tests/golden/make_llama_families.py    # needs torch and transformers

Run from the root of the repository, which PYTHONPATH names too. What is
committed here comes from torch 2.13.0 (CPU) and transformers 5.24.0, for each
of the cases of tests/examples/families.py: logits (1, tokens, vocabulary) in
float32, and the config.json and the names of tensors that transformers writes
when it saves the model. Each model is read from a folder as transformers reads
published ones, and must use all of its tensors.
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

from tests.examples import families

OUT = pathlib.Path(__file__).parent / 'llama_families.npz'


def golden(config: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
  """Logits, and what is saved."""
  folder = pathlib.Path(tempfile.mkdtemp())
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    families.write(folder / 'in', config),
    dtype=torch.float32,
    attn_implementation='eager',
    output_loading_info=True,
  )
  if any(report.values()):
    raise ValueError(f'{config["model_type"]}: {report}')
  with torch.no_grad():
    tokens = torch.tensor(families.tokens().astype(np.int64))
    logits = model(tokens, use_cache=False).logits.numpy()
  model.save_pretrained(folder / 'out')
  file = folder / 'out' / 'model.safetensors'
  with safetensors.safe_open(file, 'numpy') as tensors:
    names = sorted(tensors.keys())
  saved = json.loads((folder / 'out' / 'config.json').read_text())
  return logits, {'config': saved, 'tensors': names}


if __name__ == '__main__':
  goldens = {name: golden(config) for name, config in families.CASES.items()}
  np.savez_compressed(OUT, **{name: x for name, (x, _) in goldens.items()})
  saved = {name: x for name, (_, x) in goldens.items()}
  OUT.with_suffix('.json').write_text(json.dumps(saved, indent=1) + '\n')
