"""What the sizes of both kernels share.

Nothing may depend on the number of rows in a way that changes the order of
additions within a row: a row's bits must not depend on its neighbours.
"""


def key(columns: int, bytes_per_entry: int) -> str:
  """What a tuned entry is for."""
  return f'columns={columns} bytes={bytes_per_entry}'
