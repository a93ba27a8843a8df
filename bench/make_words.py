"""A large text of words, as WikiText-103 has it, out of any text: to time its preparation with.

`python -m bench.make_words FOLDER OUT` reads the .txt files of FOLDER and writes
OUT/wikitext-103/wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens. Punctuation stands
apart, words that occur less than eight times are `<unk>`, and the lines are in an order drawn
anew for each pass over the text, until there are 100 million words.
"""

import random
import re
import sys
from collections import Counter
from itertools import chain, repeat
from pathlib import Path

WORDS = 100_000_000
OTHERS = 250_000
"""Words of valid and of test."""
LEAST = 8
_WORD = re.compile(r"\w+|[^\w\s]")


def main(folder: Path, out: Path) -> None:
    lines = []
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.txt")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                if words := _WORD.findall(line):
                    counts.update(words)
                    lines.append(" ".join(words))
    rare = {word for word, count in counts.items() if count < LEAST}
    generator = random.Random(0)
    shuffled = chain.from_iterable(generator.sample(each, len(each)) for each in repeat(lines))
    target = out / "wikitext-103"
    target.mkdir(parents=True, exist_ok=True)
    for split, wanted in (("valid", OTHERS), ("test", OTHERS), ("train", WORDS)):
        with (target / f"wiki.{split}.tokens").open("w", encoding="utf-8") as file:
            while wanted > 0:
                words = [word if word not in rare else "<unk>" for word in next(shuffled).split()]
                file.write(f" {' '.join(words)} \n")
                wanted -= len(words) + 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
