#!/usr/bin/env python3
"""Makes tests/golden/: what Hugging Face transformers computes from folders that this library writes or ships.

Needs torch and transformers, which the tests do not: run it by hand, and commit what it gives.
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
STRIDE = 7


def main() -> None:
    text = (ROOT / "scripts" / "data" / "passage.txt").read_bytes()[:600]
    model = AutoModelForCausalLM.from_pretrained(ROOT / "helix_jax" / "demo", dtype=torch.float32)
    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        logits = model(tokens).logits[0, ::STRIDE].numpy()
        greedy = model.generate(tokens, max_new_tokens=64, do_sample=False)[0, tokens.shape[1] :].numpy()
    file = ROOT / "tests" / "golden" / "demo.npz"
    np.savez_compressed(file, tokens=tokens[0].numpy(), stride=STRIDE, logits=logits, greedy=greedy)
    print(f"wrote {file.relative_to(ROOT)}: {logits.shape} logits; goes on with {bytes(greedy.tolist())!r}")


if __name__ == "__main__":
    main()
