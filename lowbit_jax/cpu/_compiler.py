"""From a `Module` to the addresses of its functions, for the processor here.

Compilation takes some tenths of a second, so that nothing is kept on disk:
what runs is always what this version of the library wrote.
"""

import functools
import threading
from typing import NamedTuple

import llvmlite.binding as llvm

from lowbit_jax.cpu._code import ENTRY, Module

_lock = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # code lives as long as the process


class Target(NamedTuple):
  """A processor: what kernels may use of it.

  Attributes:
    triple: as LLVM names the kind of machine.
    name: of the processor.
    features: of LLVM, such as 'avx2'.
  """

  triple: str
  name: str
  features: frozenset[str]

  @property
  def has_permutations(self) -> bool:
    """Whether lanes can be chosen by the lanes of another vector."""
    return 'avx2' in self.features

  @property
  def has_halves(self) -> bool:
    """Whether float16 is converted by an instruction."""
    return 'f16c' in self.features or self.triple.startswith('aarch64')


@functools.cache
def host() -> Target:
  """The processor here."""
  features = llvm.get_host_cpu_features()
  return Target(
    llvm.get_process_triple(),
    llvm.get_host_cpu_name(),
    frozenset(name for name, has in features.items() if has),
  )


def generic() -> Target:
  """A processor of this kind without anything that not all of them have."""
  return Target(llvm.get_process_triple(), 'generic', frozenset())


@functools.cache
def _start() -> None:
  llvm.initialize_native_target()
  llvm.initialize_native_asmprinter()


def compiled(module: Module, target: Target) -> int:
  """The address of the function ENTRY of a module."""
  with _lock:
    _start()
    features = ','.join(f'+{name}' for name in sorted(target.features))
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
      cpu='' if target.name == 'generic' else target.name,
      features=features,
      opt=2,
      jit=True,
    )
    parsed = llvm.parse_assembly(str(module.llvm))
    parsed.triple = target.triple
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(ENTRY)
