"""Kernels by the names that XLA calls them by."""

import ctypes
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import jax

from lowbit_jax.cpu._compiler import Target, host

_lock = threading.Lock()
_registered: set[str] = set()


def target_name(
  op: str, kernel: Callable[[Any, Target], int], task: Any
) -> str:
  """The name of a kernel, which is compiled if it must be.

  It follows from the task: a program that another process compiled finds the
  same kernel, or none.

  Args:
    op: name of the operation.
    kernel: from a task and a processor to the address of a handler.
    task: what the kernel computes, whose `repr` tells all of it.
  """
  digest = hashlib.sha256(repr(task).encode()).hexdigest()[:16]
  name = f'lowbit_jax.{op}.{digest}'
  with _lock:
    if name not in _registered:
      register(name, kernel(task, host()))
      _registered.add(name)
  return name


def register(name: str, handler: int) -> None:
  """Makes the function at an address a custom call of XLA."""
  capsule = ctypes.pythonapi.PyCapsule_New
  capsule.restype = ctypes.py_object
  capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
  target = capsule(handler, b'xla._CUSTOM_CALL_TARGET', None)
  jax.ffi.register_ffi_target(name, target, platform='cpu')
