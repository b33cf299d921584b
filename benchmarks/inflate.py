"""Write an inflated target: the distribution of a small Llama at the cost of a large one.

    python benchmarks/inflate.py --parameters 0.2e9 --out inflated-0.2b
    python benchmarks/inflate.py --parameters 8e9 --dtype bfloat16 --out inflated-8b

The folder is that of any Hugging Face model: adaptd, transformers and vLLM load it. How it is done, and why the output is
the same to rounding, stands in `adaptd/models/inflate.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adaptd.models.inflate import inflate, shape_for
from adaptd.models.load import load_causal_lm, load_tokenizer, resolve


def main() -> None:
    """Inflate and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="pocket", help="model to inflate: a Llama")
    parser.add_argument("--parameters", type=float, default=0.2e9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0, help="of the added weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    folder = resolve(args.target, "target")
    model = load_causal_lm(folder, dtype=args.dtype, device="cpu")
    shape = shape_for(model.config, round(args.parameters))
    inflate(model, shape, seed=args.seed).save_pretrained(args.out)
    load_tokenizer(folder).save_pretrained(args.out)
    print(f"{args.out}: {shape.parameters(model.config) / 1e9:.3f} billion parameters, {shape}")


if __name__ == "__main__":
    main()
