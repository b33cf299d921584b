"""What a product of a few rows with all layers of a large target takes, by layout of the weights: compiled, oneDNN's, `linear`.

    python benchmarks/product.py --rows 1 5

Weights of the shapes of a target of 0.2 billion parameters, far more than any cache holds, in turns; medians and bandwidth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from torch.nn.functional import linear

from adaptd.actors.threads import set_threads
from adaptd.models.compiled import kernels, stored_product
from adaptd.models.packed import _packed_product, _reordered, can_pack

LAYERS, SHAPES = 18, ((5760, 960), (960, 2880), (1600, 960), (960, 960))


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    set_threads(args.threads)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(shape).to(dtype) for _ in range(LAYERS) for shape in SHAPES]
        size = sum(weight.nbytes for weight in weights)
        ways = {"linear": (linear, weights)}
        if kernels() is not None:
            ways["compiled"] = stored_product, weights
        for rows in args.rows:
            if can_pack(dtype):
                ways["onednn"] = _packed_product, [_reordered(weight, rows) for weight in weights]
            inputs = {wide: torch.randn(rows, wide).to(dtype) for wide in {shape[1] for shape in SHAPES}}
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, (product, layout) in ways.items():
                    started = time.perf_counter()
                    for weight, form in zip(weights, layout, strict=True):
                        product(inputs[weight.shape[1]], form, None)
                    found[name].append(time.perf_counter() - started)
            for name, seconds in found.items():
                middle = statistics.median(seconds)
                print(f"{dtype}, {rows} rows, {name:8}: {1e3 * middle:6.1f} ms, {size / middle / 1e9:5.1f} GB/s")


if __name__ == "__main__":
    main()
