"""What the experiments of cybertronai/transformer-xl have in common (its launch.py).

Batches there are those of one GPU; here they are of the whole run. Its vocabulary is rounded up to
a multiple of 8, 267,736 for WikiText-103; here there is no word that never occurs, and so 513
parameters less in SMALL and 17 less in LARGE.

Whatever the model, the learning rate is base_lr x batch / 32 and falls along a cosine to a tenth.
The fork validates on twice the training batch of every GPU; few long streams, as here, give the
memory more to remember.
"""

from dataclasses import replace

from txl_jax.config import ClusterConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

SMALL = ModelConfig(
    n_layer=16,
    d_model=512,
    n_head=8,
    d_head=48,
    d_inner=2048,
    tgt_len=128,
    mem_len=128,
    dropout=0.1,
    cutoffs=(20_000, 40_000, 200_000),
)
"""SMALL_ARGS: 186,707,162 parameters, near the original's wt103_base, sizes multiples of 8."""

LARGE = ModelConfig(
    n_layer=18,
    d_model=1024,
    n_head=16,
    d_head=64,
    d_inner=4096,
    tgt_len=384,
    mem_len=384,
    dropout=0.2,
    dropatt=0.2,
    init_std=0.005,
    cutoffs=(20_000, 40_000, 200_000),
    div_val=4,
    dtype="float16",
)
"""LARGE_ARGS: 285,170,506 parameters, the shape of the original's wt103_large, in float16."""


def experiment(
    model: ModelConfig,
    base_lr: float,
    batch: int,
    machines: int = 1,
    gpus: int = 8,
    instance_type: str = "p3dn.24xlarge",
    warmup_tokens: int = 0,
) -> Config:
    """An experiment on `machines` machines of `gpus` GPUs, with `batch` sequences on each GPU."""
    devices = machines * gpus
    return Config(
        model=model,
        data=DataConfig(dataset="wikitext-103", vocab="words"),
        optim=OptimConfig(
            optim="lamb",
            lr=base_lr,
            lr_batch=32,
            scheduler="cosine",
            warmup_tokens=warmup_tokens,
            final_lr=0.1,
        ),
        train=TrainConfig(
            batch=batch * devices,
            max_tokens=1_500_000_000,
            seed=1111,
            log_every=100,
            eval_every=500,
            eval_batch=max(16, devices),
        ),
        cluster=ClusterConfig(machines=machines, gpus=gpus, instance_type=instance_type),
    )


def throughput(base_lr: float, machines: int) -> Config:
    """LARGE with 16 sequences on each GPU for 300 steps of `--throughput`, on synthetic tokens.

    They have the vocabulary of WikiText-103, and about as many of them are rare as in its text
    (`throughput.zipf`): nothing but GPUs is needed. `--dataset wikitext-103` takes the text itself.
    With another `--batch`, `--max-tokens` has to change too if it is still to be 300 steps.

    The fork's README gives 446, 860, 1736, 3031 and 5904 examples a second on 1, 2, 4, 8 and 16
    machines. The steps in its logs took 1720, 1785, 1769, 2028 and 2082 ms
    (generate_throughput_numbers.py): with the 16 sequences a GPU of these configs that is a sixth
    of those rates; they come from counting 96 sequences a GPU, as in the experiments with SMALL.
    """
    cfg = experiment(LARGE, base_lr, batch=16, machines=machines)
    steps = 300
    max_tokens = steps * cfg.train.batch * LARGE.tgt_len
    return replace(
        cfg,
        model=replace(LARGE, n_token=267_735),
        data=replace(cfg.data, dataset="synthetic"),
        train=replace(cfg.train, max_tokens=max_tokens, throughput=True),
    )
