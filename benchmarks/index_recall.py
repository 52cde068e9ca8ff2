"""Recall and time of approximate search beside the exact search, on made-up vectors with clusters.

    python benchmarks/index_recall.py --images 500000 --width 512

The vectors are centers with noise, about as near to each other as a CLIP's embeddings of photographs of one
thing are; queries are such vectors too. One thread.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rounds import processor, versions

from clip_base.search.approximate import Approximate, build, cells_of, recall
from clip_base.search.index import Hit, Index


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--centers", type=int, default=20_000)
    parser.add_argument(
        "--noise", type=float, default=0.7, help="length of the noise, of centers of length 1"
    )
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    return parser.parse_args()


def vectors(centers: torch.Tensor, count: int, noise: float) -> torch.Tensor:
    """Returns [count, D] vectors around centers drawn at random."""
    width = centers.shape[1]
    deviation = float(noise / width**0.5)
    return centers[torch.randint(len(centers), (count,))] + deviation * torch.randn(count, width)


def timed(
    search: Callable[[torch.Tensor], list[Hit]], queries: torch.Tensor
) -> tuple[list[list[Hit]], float]:
    """Returns what each query found, and the median of milliseconds."""
    found, seconds = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query))
        seconds.append(time.perf_counter() - start)
    return found, 1000 * statistics.median(seconds)


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(options.centers, options.width), dim=1)
    index = Index(options.width)
    for first in range(0, options.images, 50_000):
        count = min(50_000, options.images - first)
        keys = [str(number) for number in range(first, first + count)]
        index.add(keys, vectors(centers, count, options.noise))
    queries = vectors(centers, options.queries, options.noise)
    with tempfile.TemporaryDirectory() as folder:
        index.save(folder)
        start = time.perf_counter()
        build(index, Path(folder))
        seconds = time.perf_counter() - start
        near = Approximate(index, Path(folder))
        exact, milliseconds = timed(functools.partial(index.search, k=10), queries)
        print(f"{processor()}; {versions('faiss-cpu', 'torch')}; one thread")
        print(
            f"{options.images:,} vectors of {options.width}, {cells_of(options.images):,} cells, "
            f"built in {seconds:.0f} s"
        )
        print("| probes | recall of the 10 nearest | ms per query |\n|---|---|---|")
        print(f"| exact | 1 | {milliseconds:.1f} |")
        for probes in options.probes:
            found, milliseconds = timed(functools.partial(near.search, k=10, probes=probes), queries)
            print(f"| {probes} | {recall(exact, found):.3f} | {milliseconds:.2f} |")


if __name__ == "__main__":
    main()
