"""What the integrations say where the libraries that they are for are absent."""

import subprocess
import sys


def test_the_integration_with_peft_names_what_it_needs():
    code = "import sys; sys.modules['peft'] = None; import bora_kernels; import bora_kernels.integrations.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    message = "ModuleNotFoundError: bora_kernels.integrations.peft needs PEFT, transformers and accelerate: pip install"
    assert message in done.stderr
