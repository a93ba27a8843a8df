"""The trainer's command on each host."""

PORT = 8476
"""Where host 0 listens for the others."""


def command(
    words: tuple[str, ...], logdir: str, machines: int, coordinator: str, number: str
) -> tuple[str, ...]:
    """The words after `python` on host `number`; `coordinator` is the address of host 0."""
    placed = ("--local",)
    if machines > 1:
        placed = (
            *("--coordinator", f"{coordinator}:{PORT}"),
            *("--num-processes", f"{machines}"),
            *("--process-id", number),
        )
    logs = ("--logdir", logdir) if logdir else ()
    return ("-m", "txl_jax.train", *words, "--supervise", *placed, *logs)
