"""Continue a text, reading 2 % of the cached tokens at each step.

python examples/generate.py book.txt                 reads every token
python examples/generate.py book.txt runs/demo       with the selector of `make demo`, or hf:OWNER/NAME
"""

import sys
from pathlib import Path

from spotlight_jax import GenerateConfig, SelectionConfig, generate, load_model, load_selector, make_engine


def main(model, prompt, selector=None, max_new_tokens=64):
    """Continue the prompt twice: the second time nothing is compiled."""
    # min_context=0: read less from the first token on, also where reading everything is faster
    cfg = GenerateConfig(max_new_tokens=max_new_tokens, selection=SelectionConfig(keep=0.02, min_context=0))
    engine = make_engine(model, cfg, selector)
    generate(model, [prompt], cfg, selector, engine)
    (result,) = generate(model, [prompt], cfg, selector, engine)
    print(f"{result.prompt_tokens} tokens of prompt, {len(result.tokens)} new ones, ended by {result.ended_by}:")
    print(result.text)
    return result


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")[:12_000]
    selector = load_selector(sys.argv[2]) if len(sys.argv) > 2 else None
    main(load_model("smollm2-135m" if selector is None else selector.base_model), text, selector)
