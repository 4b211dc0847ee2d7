"""Hash functions for your own text: fitted in a minute or two, or trained for some more, on two CPU cores.

    python examples/train_own_text.py runs/mine notes/ letters.txt     folders, files, globs, hf:NAME, or `embedded`

Then: spotlight generate --selector runs/mine --prompt-file book.txt
"""

import dataclasses
import sys

from spotlight_jax import train
from train.config import PRESETS

SETTINGS = dataclasses.replace(PRESETS["demo"], steps=32)  # model, window, ...: see LayerwiseConfig


def main(text, out, cfg=SETTINGS):
    """Train, and say how much of the attention mass is captured on text that was held out."""
    selector = train(text, out, cfg)
    found = selector.info["metrics"]
    read = f"{100 * found['share_read']:.1f} % of {found['window']} tokens hold"
    print(f"{read} {found['mass']:.3f} of the attention mass (LSH {found['mass_lsh']:.3f}, at best")
    print(f"{found['mass_oracle']:.3f}); the selector for {selector.base_model} is in {out}/selector")
    return selector


if __name__ == "__main__":
    main(sys.argv[2:], sys.argv[1])
