"""Files: trees of arrays and QArrays, saved and loaded with their formats.

- `DamagedFileError`: A file does not hold what was written to it.
- `gguf`: GGUF: the files of llama.cpp, read into packed QArrays and written.
- `load`: Reads a tree that `save` wrote.
- `safetensors`: Safetensors files and folders, and the quantized layouts that
  they hold.
- `save`: Writes a tree to a file, atomically.
"""

from lowbit_jax._files import DamagedFileError as DamagedFileError
from lowbit_jax.io import _exported as _exported
from lowbit_jax.io._native import load as load, save as save
