"""Write an inflated target: the distribution of a small Llama at the cost of a large one.

    python benchmarks/inflate.py --parameters 0.2e9 --out inflated-0.2b
    python benchmarks/inflate.py --parameters 8e9 --dtype bfloat16 --out inflated-8b

The folder is that of any Hugging Face model: adaptd, transformers and vLLM load it. How it is done, and why the output is
the same to rounding, stands in `adaptd/models/inflate.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig

from adaptd.models.inflate import save_inflated
from adaptd.models.load import resolve


def main() -> None:
    """Inflate and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="pocket", help="model to inflate: a Llama")
    parser.add_argument("--parameters", type=float, default=0.2e9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0, help="of the added weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    shape = save_inflated(
        resolve(args.target, "target"), args.out, round(args.parameters), dtype=args.dtype, seed=args.seed
    )
    made = shape.parameters(AutoConfig.from_pretrained(args.out))
    print(f"{args.out}: {made / 1e9:.3f} billion parameters, {shape}")


if __name__ == "__main__":
    main()
