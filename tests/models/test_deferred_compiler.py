"""torchvision's import leaves the compiler alone, which is there for whoever asks for it."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def printed_by(script: str) -> list[str]:
    """What a fresh interpreter prints that runs the script."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.split()


DEFERRED = """
from models.deferred_compiler import compiler_deferred
with compiler_deferred():
    import torchvision
"""
IS_LOADED = "print('torch._dynamo.convert_frame' in sys.modules)"


def test_torchvision_is_there_without_the_compiler_and_its_question_loads_that() -> None:
    script = f"""{DEFERRED}
{IS_LOADED}
print('torch._dynamo.utils' in sys.modules)
found = torchvision.ops.roi_align.__globals__['is_compile_supported']('cpu')
{IS_LOADED}
from torch._dynamo.utils import is_compile_supported
print(found == is_compile_supported('cpu'))
import torch
print(torch._dynamo.utils.is_compile_supported is is_compile_supported)
"""
    assert printed_by(script) == ["False", "False", "True", "True", "True"]


def test_another_name_of_the_compiler_is_the_real_one() -> None:
    script = """
from models.deferred_compiler import compiler_deferred
with compiler_deferred():
    from torch._dynamo.utils import counters, is_compile_supported
    import torchvision
import torch._dynamo.utils
print(torch._dynamo.utils.counters is counters, is_compile_supported('cpu') in (True, False))
"""
    assert printed_by(script) == ["True", "True"]


def test_a_compiler_that_is_loaded_stays_what_it_is() -> None:
    script = f"""
import torch._dynamo.utils
before = sys.modules['torch._dynamo.utils']
{DEFERRED}
print(sys.modules['torch._dynamo.utils'] is before)
"""
    assert printed_by(script) == ["True"]


def test_an_error_within_leaves_no_stand_in() -> None:
    script = """
from models.deferred_compiler import compiler_deferred
try:
    with compiler_deferred():
        raise KeyError
except KeyError:
    print('torch._dynamo.utils' in sys.modules)
"""
    assert printed_by(script) == ["False"]
