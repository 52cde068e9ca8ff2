"""How many captions per second and core `clip-base curate` looks through, with many queries.

    python benchmarks/curate.py captions.txt more.tsv --queries 100000

The queries are the words and the bigrams of the captions themselves, the most frequent ones first, so that a
caption contains many of them; where those are too few, made-up words fill the automaton. One thread does it
all. Timed are the search alone (`find`), and what a process does for a unit of 10,000 pairs: reading lines,
finding queries, ranking the pairs (`unit`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path

from rounds import alternate, processor, versions

from clip_base.curation.lines import LineUnits
from clip_base.curation.sampling import match_records
from clip_base.curation.texts import Matcher, token_text

PAIRS = 10_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "captions", type=Path, nargs="+", help="texts, one per line; of .tsv the first column"
    )
    parser.add_argument("--queries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def queries_of(captions: list[str], count: int) -> list[str]:
    """Returns the most frequent words and bigrams, and made-up words where they are too few."""
    words, bigrams = Counter[str](), Counter[str]()
    for caption in captions:
        tokens = token_text(caption).split()
        words.update(tokens)
        bigrams.update(" ".join(two) for two in itertools.pairwise(tokens))
    found = [*words, *(text for text, _ in bigrams.most_common())][:count]
    return [*found, *(f"made up {number}" for number in range(count - len(found)))]


def main() -> None:
    options = arguments()
    captions = [
        line.partition("\t")[0].strip()
        for path in options.captions
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    queries = queries_of(captions, options.queries)
    matcher = Matcher(queries)
    unit = list(itertools.islice(itertools.cycle(captions), PAIRS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines-000000.jsonl"
        lines = (
            {"key": str(n), "captions": [text], "fault": "", "record": {}} for n, text in enumerate(unit)
        )
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        units = LineUnits(Path(folder))
        found = match_records(units.read(units.units()[0]), matcher, 0)
        seconds = alternate(
            {
                "find": lambda: [matcher.find(text) for text in unit],
                "unit": lambda: match_records(units.read(units.units()[0]), matcher, 0),
            },
            options.rounds,
        )
    print(f"{processor()}; {versions('pyahocorasick', 'numpy')}; one thread")
    per_caption = len(found.pairs) / PAIRS
    size = f"{per_caption:.1f} distinct ones per caption of {_length(unit):.0f} letters"
    print(f"{len(queries):,} queries, {size}")
    for name, times in seconds.items():
        rates = sorted(PAIRS / time for time in times)
        print(f"{name}: {statistics.median(rates):,.0f} captions/s ({rates[0]:,.0f} to {rates[-1]:,.0f})")


def _length(texts: list[str]) -> float:
    return statistics.fmean(map(len, texts))


if __name__ == "__main__":
    main()
