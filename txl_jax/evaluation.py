"""How well a trained model predicts a whole text, found out as `evaluate.py` was told."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txl_jax import compilation_cache, host_memory, presets, sharding, sweep, token_files
from txl_jax.config import ModelConfig
from txl_jax.errors import UserError
from txl_jax.evaluate_arguments import Arguments
from txl_jax.evaluator import Evaluator, Score
from txl_jax.measure import BITS_PER_BYTE, PERPLEXITY, Measure
from txl_jax.trained import Trained, load_trained
from txl_jax.vocab import Vocab

SETTINGS = ("tgt_len", "mem_len", "clamp_len", "same_length")


def settings(args: Arguments, trained: ModelConfig) -> ModelConfig:
    """The training's config with what the preset changes, and then with what is given."""
    if args.preset:
        preset = dataclasses.asdict(presets.find(args.preset))
        trained = dataclasses.replace(trained, **preset)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return dataclasses.replace(trained, **given)


def read_text(path: Path, vocab: Vocab) -> NDArray[np.integer]:
    """Tokens of a file as it is; UserError where it cannot be read or has none to predict."""
    try:
        tokens = vocab.encode(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(tokens) < 2:
        raise UserError(f"{path} has {len(tokens)} of the 2 tokens or more that it takes")
    return tokens


def chosen_text(args: Arguments, trained: Trained) -> tuple[str, NDArray[np.integer]]:
    """What the text is called, and its tokens."""
    if args.text:
        return args.text, read_text(Path(args.text), trained.vocab)
    tokens = token_files.prepare(trained.cfg.data)
    trained.check_corpus(tokens)
    split = args.split or "test"
    return split, tokens.splits[split]


def bits_per_character(score: Score, vocab: Vocab, tokens: NDArray[np.integer]) -> float:
    """Bits for each character of what was predicted; for each byte where tokens are bytes."""
    if vocab.measure is BITS_PER_BYTE:
        return score.bits
    characters = 0
    for start in range(1, len(tokens), 1_000_000):
        # A part may begin inside a character, so those bytes are counted that begin one.
        text = np.frombuffer(vocab.decode(tokens[start : start + 1_000_000]), np.uint8)
        characters += np.count_nonzero(text & 0xC0 != 0x80)
    return score.bits * score.tokens / characters


def numbers(score: Score, character_bits: float) -> dict[str, Any]:
    """A score as it stands in JSON."""
    shown: dict[str, Any] = {"tokens": score.tokens, "context": score.context}
    shown |= {"loss": score.loss, "perplexity": score.perplexity}
    shown |= {"bits": score.bits, "bits_per_character": character_bits}
    return shown | (dataclasses.asdict(score.ranking) if score.ranking else {})


def columns(score: Score, character_bits: float, measure: Measure) -> dict[str, str]:
    """A score as people read it, by name; what losses are shown in elsewhere comes first."""
    shown = {measure.name: measure.text(score.loss), "loss": f"{score.loss:.4f}"}
    if measure is BITS_PER_BYTE:
        shown["perplexity"] = PERPLEXITY.text(score.loss)
    else:
        shown["bits per character"] = f"{character_bits:.4f}"
    if ranking := score.ranking:
        shown["accuracy@1"] = f"{ranking.accuracy_1:.4f}"
        shown["accuracy@5"] = f"{ranking.accuracy_5:.4f}"
        shown["MRR@5"] = f"{ranking.mrr_5:.4f}"
    return shown


def described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def run(args: Arguments) -> None:
    """Prints the scores; UserError where there is no model or no text."""
    compilation_cache.keep_programs()
    mesh = sharding.make_mesh()
    host_memory.keep_freed(mesh)
    trained = load_trained(args.logdir, args.checkpoint, mesh)
    cfg, measure = settings(args, trained.cfg.model), trained.vocab.measure
    batch = args.batch if args.batch is not None else trained.cfg.train.eval_batch
    evaluators = {
        mem_len: Evaluator(
            dataclasses.replace(cfg, mem_len=mem_len),
            mesh,
            batch,
            ranks=args.accuracy,
            reset_every=args.reset_every,
        )
        for mem_len in sorted(set(args.sweep)) or [cfg.mem_len]
    }
    text, tokens = chosen_text(args, trained)
    common = {"step": trained.step, "batch": batch, "reset_every": args.reset_every}
    common |= {name: getattr(cfg, name) for name in SETTINGS if name != "mem_len"}
    perplexities: dict[int, float] = {}
    for mem_len, evaluator in evaluators.items():
        score = evaluator.exact(trained.params, tokens, f"{text}, mem_len {mem_len}")
        character_bits = bits_per_character(score, trained.vocab, tokens)
        shown = columns(score, character_bits, measure)
        own = common | {"mem_len": mem_len}
        if args.json:
            which = {"text" if args.text else "split": text}
            print(json.dumps(which | own | numbers(score, character_bits)), flush=True)
        elif args.sweep:
            row = {"mem_len": f"{mem_len}"} | shown | {"read again": f"{score.context}"}
            if not perplexities:
                print(f"{text}: {score.tokens} tokens, each predicted once ({described(common)})")
                print("  ".join(name.rjust(7) for name in row))
            print(
                "  ".join(cell.rjust(max(7, len(name))) for name, cell in row.items()), flush=True
            )
        else:
            print(f"{text}: {described(shown)}")
            print(
                f"{score.tokens} tokens, each predicted once; {score.context} of them were read "
                f"again as context ({described(own)})"
            )
        perplexities[mem_len] = score.perplexity
    if args.sweep:
        out = Path(args.out or trained.logdir / f"sweep-{Path(text).stem}.png")
        sweep.draw(out, f"{text} ({trained.logdir}, step {trained.step})", perplexities)
        if not args.json:
            print(f"Perplexity against mem_len: {out}")
