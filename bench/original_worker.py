"""The original PyTorch model at work, for `bench.compare_torch`: needs PyTorch, nothing of ours.

    python original_worker.py PATH SHAPE

PATH is a checkout of the original, SHAPE a JSON object with its arguments and `batch`, `lr`,
`clip`, `threads`, `device`, `dtype` and `compiled`. For every line `train N`, `evaluate N` or
`generate N` on standard input it makes N steps, segments or tokens, and prints the seconds of each
as a JSON list.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def steps(path: Path, shape: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """What can be asked for, each a function that does it once."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    sys.path[:0] = [str(path), str(path / "utils")]
    # Its adaptive softmax looks for the version of CUDA, which builds for CPUs have not.
    torch.version.cuda = torch.version.cuda or "13.0"
    # Today's PyTorch wants masks of bools where the original makes bytes.
    torch.Tensor.byte = torch.Tensor.bool
    # In 16 bits it writes products into rows of float32.
    copy = torch.Tensor.index_copy_
    torch.Tensor.index_copy_ = lambda self, dim, index, source: copy(
        self, dim, index, source.to(self.dtype)
    )
    from mem_transformer import MemTransformerLM  # pyright: ignore[reportMissingImports]

    batch, tgt_len = shape["batch"], shape["model"]["tgt_len"]
    model = MemTransformerLM(**shape["model"], ext_len=0, tie_weight=True).to(shape["device"])
    n_token = shape["model"]["n_token"]
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=shape["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
    tokens = torch.randint(n_token, (64, tgt_len + 1, batch), device=shape["device"])

    def segments() -> Iterator[Any]:
        while True:
            yield from tokens

    source = segments()
    memory: dict[str, Any] = {"train": (), "evaluate": (), "generate": ()}
    called = torch.compile(model) if shape["compiled"] else model
    sixteen = shape["dtype"] != "float32"
    dtype = getattr(torch, shape["dtype"])

    def loss_of(segment: Any, what: str) -> Any:
        with torch.autocast(shape["device"], dtype, enabled=sixteen):
            loss, *memory[what] = called(segment[:-1], segment[1:], *memory[what])
            return loss.mean()

    def begin(what: str, length: int) -> None:
        model.train(what == "train")
        model.reset_length(length, 0, shape["model"]["mem_len"])

    def train() -> None:
        begin("train", tgt_len)
        segment = next(source)
        model.zero_grad()
        loss_of(segment, "train").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shape["clip"])
        optimizer.step()
        schedule.step()

    def evaluate() -> None:
        begin("evaluate", tgt_len)
        segment = next(source)
        with torch.no_grad():
            loss_of(segment, "evaluate").item()

    last = torch.zeros((1, 1), dtype=torch.long, device=shape["device"])

    def generate() -> None:
        begin("generate", 1)
        with torch.no_grad():
            mems = memory["generate"] or model.init_mems()
            hidden, memory["generate"] = model._forward(last, mems=mems)
            (output,) = model.crit.out_layers
            logits = torch.nn.functional.linear(hidden[-1], output.weight, output.bias)
            last.copy_(torch.multinomial(torch.softmax(logits, -1), 1))

    def waited(once: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            once()
            if shape["device"] == "cuda":
                torch.cuda.synchronize()

        return run

    return {once.__name__: waited(once) for once in (train, evaluate, generate)}


def main(path: str, shape: str) -> None:
    known = steps(Path(path), json.loads(shape))
    print("ready", flush=True)
    for line in sys.stdin:
        what, number = line.split()
        seconds = []
        for _ in range(int(number)):
            began = time.perf_counter()
            known[what]()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
