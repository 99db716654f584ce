"""torchvision without torch's compiler, which it loads upon import and hardly ever uses.

torch loads its compiler, `torch._dynamo`, when something is compiled, and torchvision means to do
so too, but `torchvision.ops.roi_align` imports one function of it on top (0.29.2). That costs every
process that builds a network two seconds and 140 MB. This file can go when torchvision's import no
longer puts `torch._dynamo` into `sys.modules`.
"""

import importlib
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo.utils"


@contextmanager
def compiler_deferred() -> Generator[None]:
    """Import torchvision within: its function of the compiler loads that when it is called.

    Whatever else is asked of the compiler loads it at once. Without effect where it is loaded.
    """
    if _NAME in sys.modules:
        yield
        return
    sys.modules[_NAME] = _StandIn(_NAME)
    try:
        yield
    finally:
        _withdraw()


class _StandIn(ModuleType):
    """In the place of a module that is not loaded yet."""

    @staticmethod
    def is_compile_supported(device_type: Any) -> Any:
        """Ask torch's function of this name."""
        return _load().is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked for by every import, `__path__` for one
            raise AttributeError(name)
        return getattr(_load(), name)


def _load() -> Any:
    _withdraw()
    return importlib.import_module(_NAME)


def _withdraw() -> None:
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
