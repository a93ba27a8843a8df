"""The parent of a trainer, with real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.members import Members
from txl_jax import checkpoint_reader, supervise
from txl_jax.trained import CHECKPOINTS

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["tests.tiny_runs"]

pytestmark = pytest.mark.processes

# A trainer without JAX: it counts its starts in a file and does what its words say, one a start.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from txl_jax import supervise

assert supervise.is_child() and not supervise.is_child()
starts = Path(sys.argv[1])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
received = []
what = sys.argv[2 + number]
if what in ("75 when asked", "deaf"):
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, _: received.append(number))
print("process", os.getpid(), flush=True)
while what == "wait" or what == "deaf" or what == "75 when asked" and not received:
    time.sleep(0.01)
if what == "75 when asked":
    time.sleep(0.3)
    print("received", *received, flush=True)
    sys.exit(75)
if what == "aborts":
    os.abort()
sys.exit(int(what))
"""


# A parent that has less patience.
PARENT = """
import sys
from txl_jax import supervise

supervise.GRACE_SECONDS = float(sys.argv[1])
sys.exit(supervise.supervise(sys.argv[3:], int(sys.argv[2])))
"""


class Parent:
    """A parent and its trainer, which does `does` at its starts."""

    def __init__(
        self, folder: Path, restarts: int, *does: str, grace: float | None = None, **environ: str
    ):
        words = [sys.executable, "-c", CHILD, str(folder / "starts"), *does]
        parent = ["-m", "txl_jax.supervise"] if grace is None else ["-c", PARENT, str(grace)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *parent, str(restarts), *words],
            cwd=ROOT,
            env=os.environ | {"AWS_EC2_METADATA_DISABLED": "true"} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def child(self) -> int:
        """Process id of the next trainer."""
        assert self.process.stdout
        word, pid = self.process.stdout.readline().split()
        assert word == "process"
        return int(pid)

    def end(self) -> tuple[int, str, str]:
        """Exit status, and what the two of them said after what was read already."""
        output, errors = self.process.communicate(timeout=100)
        return self.process.returncode, output, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    started: list[Parent] = []
    # Tests in the background, or under nohup, ignore these, and what they start would inherit that.
    ends = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ends.items()}

    def start(*words: Any, **environ: Any) -> Parent:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Parent(folder, *words, **environ))
        return started[-1]

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)
    for parent in started:
        parent.process.kill()
        parent.process.communicate()


def gone(pid: int) -> bool:
    """Waits until there is no such process."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # nobody has asked how it ended
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("status", [0, 1, 2, 130, 143])
def test_other_statuses_end_it(start, status):
    parent = start(5, str(status))
    parent.child()
    assert parent.end() == (status, "", "")


def test_it_starts_again_as_often_as_allowed_and_says_why(start):
    parent = start(2, "75", "wait", "75")
    parent.child()
    os.kill(parent.child(), signal.SIGKILL)
    parent.child()
    status, output, errors = parent.end()
    assert (status, output) == (75, "")
    pattern = r"(.*): restart (\d) of 2 in (\d\.\d) s, after \d+ s\n" * 2
    found = re.fullmatch(pattern, errors)
    assert found, errors
    assert found.group(1, 2) == ("the trainer asks for it", "1")
    assert found.group(4, 5) == ("the trainer was ended by SIGKILL", "2")
    assert 2 <= float(found.group(3)) <= 5


def test_without_restarts_the_end_by_a_signal_is_said_and_is_75(start):
    parent = start(0, "aborts")
    parent.child()
    assert parent.end() == (75, "", "the trainer was ended by SIGABRT\n")


def test_an_abort_is_the_loss_of_the_coordinator_if_that_is_gone(start):
    closed = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_PROCESS_ID": "1"}
    parent = start(0, "aborts", **closed)
    parent.child()
    assert parent.end() == (75, "", "lost: process 0, the coordinator at 127.0.0.1:9\n")


@pytest.mark.slow
def test_a_trainer_that_stands_still_is_killed_but_not_one_that_goes_on(start):
    still, going = start(0, "wait"), start(0, "wait")
    children = still.child(), going.child()
    for child in children:
        os.kill(child, signal.SIGSTOP)
    time.sleep(5)
    os.kill(children[1], signal.SIGCONT)
    assert still.end() == (75, "", "the trainer was stopped for 10 s, and killed\n")
    assert gone(children[0])
    time.sleep(2)
    assert going.process.poll() is None


@pytest.mark.parametrize(
    "sent, received",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_signals_go_on_to_the_trainer_which_is_not_started_again(start, sent, received):
    parent = start(5, "75 when asked")
    parent.child()
    parent.process.send_signal(sent)
    assert parent.end() == (75, f"received {received:d}\n", "")


def test_ctrl_c_reaches_the_trainer_once(start):
    """A terminal sends it to the whole group of the parent."""
    parent = start(5, "75 when asked")
    child = parent.child()
    assert os.getpgid(child) == child != os.getpgid(parent.process.pid)


def test_a_signal_in_the_pause_ends_it(start):
    parent = start(5, "75", "wait")
    parent.child()
    assert "restart 1 of 5" in parent.process.stderr.readline()
    parent.process.send_signal(signal.SIGTERM)
    assert parent.end() == (75, "", "")


def test_a_trainer_that_does_not_end_is_killed_also_if_it_was_stopped_meanwhile(start):
    parents = [start(5, "deaf", grace=4), start(5, "deaf", grace=4)]
    children = [parent.child() for parent in parents]
    for parent in parents:
        parent.process.send_signal(signal.SIGTERM)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        time.sleep(1)
        os.kill(children[1], number)
    for parent, child in zip(parents, children, strict=True):
        assert parent.end() == (75, "", "the trainer did not end in 4 s, and was killed\n")
        assert gone(child)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_parent_leaves_no_trainer(start, stopped):
    parent = start(5, "deaf")
    child = parent.child()
    if stopped:
        os.kill(child, signal.SIGSTOP)
    parent.process.kill()
    assert gone(child)


def test_a_trainer_whose_parent_has_died_already_does_not_begin():
    script = "from txl_jax import supervise; supervise.is_child(); print('begun')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {supervise.PARENT: "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (75, "")


def test_the_parent_needs_no_jax():
    script = "import sys, txl_jax.supervise; print(sorted({'jax', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_all_meet_anew_when_the_coordinator_or_another_was_killed(tmp_path):
    with Members(tmp_path / "run", 2, "300", restarts=2) as run:
        run.wait_for("step 50\n")
        run.kill(0, signal.SIGKILL)
        run.wait_for("begins after", times=2)
        run.wait_for("step 100\n")
        run.kill(1, signal.SIGKILL)
        assert run.statuses() == [0, 0]
        assert "lost: process 0, the coordinator at 127.0.0.1:" in run.log(1)
        assert re.search(
            r"lost: process 1 \(host .*\): it ended and was started again\n", run.log(0)
        )
        for member in range(2):
            assert "ends after 300\n" in run.log(member)
            goes_on = [int(n) for n in re.findall(r"begins after (\d+)", run.log(member))]
            assert len(goes_on) == 3
            assert 0 < goes_on[1] < goes_on[2]


@pytest.mark.slow
def test_training_goes_on_after_its_process_was_killed(shell, tmp_path):
    tiny.write_text(tmp_path / "text")
    words = (*tiny.WORDS, "--checkpoint-minutes", "0.01", "--supervise", "--max-restarts", "1")
    process = shell.start("train", *words, cwd=tmp_path)
    end = time.monotonic() + 100
    while not checkpoint_reader.exists(tmp_path / tiny.LOGDIR / CHECKPOINTS):
        assert time.monotonic() < end
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "the trainer was ended by SIGKILL: restart 1 of 1 in " in errors
    assert re.search(rf"goes on after step \d+ of {tiny.STEPS} steps", output)
