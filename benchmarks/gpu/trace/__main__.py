"""Predict the training step of a 7B Llama on an H200 from a trace without a GPU: kernels, bytes, saved activations.

    python -m benchmarks.gpu.trace [--tokens 16384]

One decoder layer runs forward and backward on tensors without values, with the attention that a GPU takes; documents of
512 tokens. Every operation, or every kernel of the compiler's schedule, then gets the time that its arithmetic or its
bytes take, whichever is longer, on a model of the device. Nothing here is measured: launches, and kernels that reach
less than the model's rates, are not seen.
"""

from __future__ import annotations

import argparse

from benchmarks.gpu.trace.layer import VARIANTS, trace

HEAD = (
    "layer", "kernels", "products", "in float32", "saved MB/token", "moved MB/token/layer", "predicted tokens/s",
)  # fmt: skip


def main() -> None:
    """Print the table of all variants as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="Tokens of a micro-step.")
    args = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for name, variant in VARIANTS.items():
        found = trace(variant, tokens=args.tokens)
        print(
            f"| {name} | {found.kernels} | {found.products} | {found.float32_matmuls} | {found.saved_mb:.2f} | "
            f"{found.moved_mb:.3f} | {found.tokens_per_second:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
