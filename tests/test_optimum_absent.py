"""Where EdgeOmni is installed and optimum is not, Python finds an empty package `optimum`: what that does to others.

optimum reads its subcommands from a folder of its namespace and from nowhere else, so that the wheel has to bring one,
and an empty namespace can be imported. transformers and peft take whatever can be imported under that name for optimum.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def without_optimum(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An import path of all packages here but optimum, and with the file that a wheel puts into its namespace."""
    site = tmp_path_factory.mktemp("site")
    for folder in (Path(p) for p in sys.path if p.endswith("site-packages")):
        for entry in folder.iterdir():
            left_out = entry.name.startswith(("optimum", "__editable__")) or entry.suffix == ".pth"
            if not left_out and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    register = site / "optimum" / "commands" / "register"
    register.mkdir(parents=True)
    shutil.copy(ROOT / "optimum_register" / "edgeomni.py", register)
    return os.pathsep.join([str(site), str(ROOT)])


def python(code: str, path: str) -> subprocess.CompletedProcess[str]:
    """Runs code with these packages alone."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_namespace_is_there_and_optimum_is_not(without_optimum: str) -> None:
    code = (
        "from importlib import metadata, util\n"
        "import optimum\n"
        "assert getattr(optimum, '__file__', None) is None and util.find_spec('optimum.version') is None\n"
        "try:\n"
        "    metadata.version('optimum')\n"
        "except metadata.PackageNotFoundError:\n"
        "    print('absent')\n"
    )
    done = python(code, without_optimum)
    assert done.stdout == "absent\n", done.stderr


def test_transformers_and_peft_miss_nothing_but_what_needs_optimum(without_optimum: str) -> None:
    """The parts of optimum that they look for are not found; what needs it fails as an import that fails."""
    pytest.importorskip("peft", reason="needs peft: the extra [train]")
    code = (
        "from transformers import GPTQConfig, Qwen2Config, Qwen2ForCausalLM\n"
        "from transformers.quantizers.auto import AutoHfQuantizer\n"
        "from transformers.utils import import_utils as found\n"
        "assert not found.is_optimum_quanto_available() and not found.is_optimum_neuron_available()\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from peft.import_utils import is_gptqmodel_available\n"
        "assert not is_gptqmodel_available()\n"
        "sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)\n"
        "model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))\n"
        "get_peft_model(model, LoraConfig(target_modules=['q_proj']))\n"
        "try:\n"
        "    AutoHfQuantizer.from_config(GPTQConfig(bits=4))\n"
        "except ImportError as exc:\n"
        "    print('ImportError', exc)\n"
    )
    done = python(code, without_optimum)
    assert done.stdout.startswith("ImportError") and "optimum" in done.stdout, done.stderr


def test_edgeomni_says_what_the_command_needs(without_optimum: str) -> None:
    """Whoever imports what optimum would import gets an ImportError, and EdgeOmni itself never does."""
    done = python("import optimum.commands.register.edgeomni", without_optimum)
    assert done.returncode == 1 and "No module named 'optimum.commands.export'" in done.stderr
    code = "from edgeomni.cli import main; main(['doctor', '--json'])"
    done = python(code, without_optimum)
    assert done.returncode == 0 and '"engines"' in done.stdout, done.stderr
