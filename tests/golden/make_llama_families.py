"""Makes llama_families.npz beside this file: logits of transformers.

  python tests/golden/make_llama_families.py    # needs torch and transformers

Run from the root of the repository, which PYTHONPATH names too. The logits
committed here, (1, tokens, vocabulary) in float32 for each of the cases of
tests/examples/families.py, come from torch 2.13.0 (CPU) and transformers
5.24.0. Each model is read from a folder as transformers reads published ones,
and must use all of its tensors.
"""

import pathlib
import tempfile

import numpy as np
import torch
import transformers

from tests.examples import families

OUT = pathlib.Path(__file__).parent / 'llama_families.npz'


def logits(config: dict) -> np.ndarray:
  with tempfile.TemporaryDirectory() as folder:
    families.write(pathlib.Path(folder), config)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
      folder,
      dtype=torch.float32,
      attn_implementation='eager',
      output_loading_info=True,
    )
  if any(report.values()):
    raise ValueError(f'{config["model_type"]}: {report}')
  with torch.no_grad():
    tokens = torch.tensor(families.tokens().astype(np.int64))
    return model(tokens, use_cache=False).logits.numpy()


if __name__ == '__main__':
  np.savez_compressed(OUT, **{k: logits(c) for k, c in families.CASES.items()})
