"""Training, from the command line's words to the exit status; `train.py` is the command.

A batch is one segment of every stream of the token files. It goes to the devices, through the train
step (`step.py`), and is gone; the state stays on the devices until it is logged or saved.
"""

import dataclasses
import math
import signal
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from txl_jax import (
    checkpoint_reader,
    compilation_cache,
    distributed,
    findings,
    host_memory,
    metrics,
    preflight,
    refill,
    results,
    run_folder,
    sharding,
    supervise,
    throughput,
    token_files,
    warm_start,
)
from txl_jax.checkpoint import Checkpoints
from txl_jax.config import Config, TrainCommand
from txl_jax.course import Course
from txl_jax.decoding import Sampling
from txl_jax.distributed import Cluster
from txl_jax.divergence import finite_totals
from txl_jax.errors import RESTART_STATUS, UserError
from txl_jax.evaluator import Evaluator
from txl_jax.generator import Generator
from txl_jax.heartbeat import Heartbeat
from txl_jax.home import Home
from txl_jax.journal import Journal, say
from txl_jax.own_speed import OwnSpeed
from txl_jax.pace import Pace
from txl_jax.peers import Peers, facts, local_devices
from txl_jax.prefetch import Prefetch
from txl_jax.signals import Stopped, caught_signals, given_up
from txl_jax.step import (
    Totals,
    abstract_batch,
    abstract_state,
    after_validation,
    init_state,
    make_train_step,
    place_batch,
)
from txl_jax.streams import check_length, training_streams
from txl_jax.token_files import TokenFiles
from txl_jax.trained import CHECKPOINTS, VOCAB, best_of, check_corpus


def train(
    cfg: Config, mesh: Mesh, tokens: TokenFiles, peers: Peers, home: Home, command: list[str]
) -> int:
    """Trains to the end or to a signal; goes on from the newest checkpoint of the run.

    Returns:
      The exit status: 0, or, when a signal has stopped it and everything is saved, 128 + the signal
      or, of several processes, RESTART_STATUS.

    Raises:
      UserError: the folder holds another run, the loss is not finite, a disk is full …
    """
    batch, primary, measure = cfg.train.batch, jax.process_index() == 0, tokens.vocab.measure
    streams = training_streams(cfg, tokens)
    valid = tokens.splits["valid"][: cfg.train.eval_max_tokens or None]
    rows = sharding.local_rows(mesh, batch)
    course, batch_before = Course(batch * cfg.model.tgt_len), batch
    devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
    layout = sharding.Layout.of(cfg, mesh)
    # A run that has a checkpoint goes on from there, also when what it started from is gone.
    begun = checkpoint_reader.exists(home.folder / CHECKPOINTS, home.store)
    begun = peers.gather("begun", "yes" * begun)[0] == "yes"
    start = None if begun else warm_start.load(cfg, mesh, tokens)
    attempt = checkpoint_reader.next_attempt(home.folder / CHECKPOINTS, home.store)
    if primary:
        starts = run_folder.open_run(home.folder, cfg, command=command, devices=devices)
        attempt = max(attempt, starts)
    attempt = max(map(int, peers.gather("attempt", str(attempt))))

    with (
        caught_signals(peers.several) as stopped_by,
        home.mirrored(jax.process_index(), stopped_by) as mirror,
        Checkpoints(
            home.folder / CHECKPOINTS,
            attempt=attempt,
            store=home.store,
            mirror=mirror,
            gather=peers.gather,
        ) as checkpoints,
        # Between two steps it is the last checkpoint that counts: a step is saved when all that was
        # to be done after it has been done.
        given_up(stopped_by),
    ):
        if mirror:
            peers.before_end(mirror.leave)
        n, best = 0, math.inf
        if restored := checkpoints.restore(abstract_state(cfg, mesh), may_differ="memory/"):
            state, saved_info = restored
            check_corpus(home.folder, saved_info["fingerprint"], tokens)
            n, best, batch_before = (saved_info[name] for name in ("step", "best", "batch"))
            course = Course.after(course.step_tokens, n, saved_info["tokens"])
        else:
            state = init_state(cfg, mesh)
            if start:
                state = state._replace(params=start.params(state.params))
                say(start.report())
        del start  # and the parameters that it has read
        if primary:
            with run_folder.writable(home.folder):
                tokens.vocab.save(home.folder / VOCAB)
        if n >= (steps := course.steps(cfg.train.max_tokens)):
            say(f"{home.logdir} is finished: all {n} steps are done")
            return 0
        if tokens.new:
            say(findings.table(tokens))
        say(
            f"{home.logdir}: {f'goes on after step {n} of ' if n else ''}{steps} steps of {batch} "
            f"x {cfg.model.tgt_len} tokens, {metrics.count(state.params):,} parameters, {devices}"
        )
        if batch_before != batch:
            state, line = refill.refilled(
                cfg, mesh, state, streams, course, batch_before, peers.check_stop
            )
            say(line)

        def due(every: int) -> bool:
            return n % every == 0 or n == steps

        def info() -> dict[str, Any]:
            seen = {"step": n, "tokens": course.tokens(n), "batch": batch}
            return seen | {"best": best, "fingerprint": tokens.fingerprint}

        def work_on() -> None:
            journal.work_on()
            peers.check_stop()

        def save() -> None:
            finite_totals(state, checkpoints)
            journal.flush()
            checkpoints.save(n, state, info())

        def save_due() -> bool:
            late = time.monotonic() - saved_at > 60 * cfg.train.checkpoint_minutes
            if not peers.several:
                return late
            # Clocks differ, and all have to save the same step: the first process decides.
            return due(cfg.train.log_every) and peers.gather("save", "yes" * late)[0] == "yes"

        def batch_of(step: int) -> tuple[jax.Array, jax.Array]:
            return place_batch(cfg, mesh, streams.at(course.segment(step), rows))

        tokens_of_step = abstract_batch(cfg, mesh)
        train_step = peers.compiled(
            make_train_step(cfg, mesh, len(streams), course=course),
            *(abstract_state(cfg, mesh), tokens_of_step, tokens_of_step),
        )
        generator = Generator(cfg.model, mesh, Sampling(temperature=0.8))
        context = results.context_of(cfg.model, tokens.splits["valid"])
        pace, own_speed, done = Pace(cfg, mesh), OwnSpeed(peers.several), None
        first, saved, saved_at = n, n, time.monotonic()
        earlier = home.events() if primary else []
        with (
            Journal(home.folder, n, steps, course, earlier) as journal,
            Prefetch(batch_of, range(n, steps)) as batches,
        ):
            evaluator = Evaluator(
                cfg.model, mesh, cfg.train.eval_batch, "eval_batch", on_segment=work_on
            )
            if n == 0:
                journal.scalars(0, metrics.sizes(state.params))
            while n < steps and not stopped_by:
                with pace.input():
                    inputs, targets = batches.take()
                state, dispatched = train_step(state, inputs, targets)
                # At most two steps are under way: no device waits, and a signal is soon noticed.
                jax.block_until_ready(done)
                done = dispatched
                n += 1
                if peers.stop_agreed(n):
                    stopped_by.append(signal.SIGTERM)
                pace.step()
                journal.advance()
                if n == first + 1:
                    jax.block_until_ready(done)
                    pace.restart()  # loading the program onto the devices was part of this step

                if due(cfg.train.log_every):
                    totals = finite_totals(state, checkpoints)
                    speed = pace.lap()
                    shown = metrics.learning(totals, measure) | metrics.times(speed)
                    shown |= metrics.scaling(state.loss_scale)
                    with pace.paused():
                        shown |= own_speed.times()
                    line = metrics.log_line(n, steps, course.tokens(n), shown, speed, measure)
                    journal.scalars(n, shown, line)
                    zero = jax.device_put(Totals.zero(), sharding.repeated(mesh))
                    state = state._replace(totals=zero)

                if due(cfg.train.eval_every):
                    with pace.paused():
                        finite_totals(state, checkpoints)
                        work_on()
                        params = layout.whole(state.params)
                        score = evaluator(params, valid, "validating")
                        line = metrics.validation_line(n, score.loss, measure)
                        journal.scalars(n, metrics.validation(score.loss, measure), line)
                        if cfg.train.sample_tokens:
                            length = cfg.train.sample_tokens
                            text = results.sample_text(
                                generator, params, tokens.vocab, context, length, work_on
                            )
                            journal.text(n, "sample", text)
                        del params
                        state = after_validation(cfg, mesh, state, course.tokens(n), score.loss)
                        if score.loss < best:
                            best = score.loss
                            checkpoints.save_best(n, state, info())

                if save_due():
                    with pace.paused():
                        save()
                    saved, saved_at = n, time.monotonic()
            if saved != n:
                save()
    if not stopped_by:
        return 0
    how = f"stopped by {stopped_by[0].name} after step {n}"
    say(f"{how}: the same command goes on from the last checkpoint")
    return RESTART_STATUS if peers.several else 128 + stopped_by[0]


def run(command: TrainCommand, words: list[str]) -> int:
    """Trains as `command` says, which was read from `words`; the exit status.

    Raises UserError as `train` does, and for what cannot be trained here.
    """
    start = [sys.executable, "-m", "txl_jax.train", *words]
    cluster = _cluster(command)
    if not supervise.is_child() and (command.supervise or cluster):
        restarts = command.max_restarts if command.supervise else 0
        supervise.become_parent(restarts, start, distributed.environ(cluster))
    with Peers.join(cluster) as peers:
        return _run(command, start, peers)


def _cluster(command: TrainCommand) -> Cluster | None:
    if command.max_restarts < 0:
        raise UserError(f"max_restarts is {command.max_restarts}; it has to be 0 or more")
    return distributed.find(
        command.local,
        command.coordinator,
        command.num_processes,
        command.process_id,
        command.process_per_gpu,
    )


def _run(command: TrainCommand, start: list[str], peers: Peers) -> int:
    cfg = command.experiment
    logdir = cfg.train.logdir or f"runs/{command.config}"
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, logdir=logdir))
    peers.check_same(facts(cfg))
    peers.check_same(local_devices())
    mesh = sharding.make_mesh()
    preflight.check(cfg, mesh)
    host_memory.keep_freed(mesh)
    peers.connect(mesh)
    if cfg.train.throughput:
        return throughput.run(command.config, cfg, mesh, peers)
    if not peers.several:
        compilation_cache.keep_programs()
    home, primary = Home(logdir), jax.process_index() == 0
    if primary:
        home.bring()
        run_folder.check(home.folder, cfg)
    if peers.several:
        home.check_shared(peers.gather, primary)
    tokens = token_files.prepare(cfg.data)
    cfg = preflight.with_vocabulary(cfg, tokens.vocab)
    check_length(len(tokens.splits["train"]), cfg.train.batch, cfg.model.tgt_len)
    peers.check_same({"token files": tokens.fingerprint})
    status = train(cfg, mesh, tokens, peers, home, start)
    if status:
        return status
    found = results.load(home.folder) if primary else None
    if not peers.everyone(found is not None or not primary):
        trained = best_of(home.folder, home.store, cfg, tokens, mesh, peers.gather)
        heartbeat = Heartbeat(home.folder, jax.process_index())

        def work_on() -> None:
            heartbeat.work_on()
            peers.check_stop()

        try:
            with home.mirrored(jax.process_index()):
                found = results.evaluate_run(trained, tokens, mesh, work_on)
                if primary:
                    results.save(home.folder, found)
        except Stopped:
            say("stopped by SIGTERM in the final evaluation: the same command does it anew")
            return RESTART_STATUS
    if primary and found:
        print(results.show(home.logdir, found, tokens.vocab.measure))
    return 0
