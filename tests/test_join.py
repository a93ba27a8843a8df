"""How a process finds its cluster, and where the processes of one listen."""

import os
import socket
import subprocess
import sys

import pytest

from tests.members import ROOT, Members, free_port, listening
from txl_jax import distributed
from txl_jax.distributed import Cluster, find
from txl_jax.errors import UserError

ENVIRON = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.4:4321",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
HERE = "10.0.0.9:99"


def slurm(job: int = 5, rank: int = 1, local: int = 0) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost,node2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_STEP_NUM_NODES": "2",
    }


OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "82313216.0;tcp://10.91.0.4,192.0.2.4:33619;tcp6://[fd91::4]:48141",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
"""What mpirun 4.1.4 says on a host with three addresses."""


@pytest.fixture
def under_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm().items():
        monkeypatch.setenv(name, value)


def test_the_command_line_goes_before_the_environment():
    assert find(False, environ=ENVIRON) == Cluster("10.0.0.4:4321", 4, 2)
    assert find(False, process=0, environ=ENVIRON) == Cluster("10.0.0.4:4321", 4, 0)
    assert find(False, HERE, 3, 1, environ=ENVIRON) == Cluster(HERE, 3, 1)
    assert find(True, environ=ENVIRON) is None


def test_a_cluster_of_one_is_no_cluster():
    assert find(False, HERE, 1, 0, environ={}) is None


def test_the_scheduler_says_what_is_left_open(under_slurm):
    assert find(False, environ={}) == Cluster("localhost:61445", 2, 1)
    assert find(False, HERE, environ={}) == Cluster(HERE, 2, 1)
    assert find(False, process_per_gpu=True, environ={}) == Cluster("localhost:61445", 2, 1, "0")


def test_mpirun_says_what_is_left_open(monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    assert find(False, environ={}) == Cluster("10.91.0.4:65152", 2, 1)
    assert find(False, HERE, environ={}) == Cluster(HERE, 2, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 1 on its machine"):
        find(False, environ={})
    assert find(False, process_per_gpu=True, environ={}) == Cluster("10.91.0.4:65152", 2, 1, "1")


@pytest.mark.parametrize(
    "environ, complaint",
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "or Kubernetes .*install the package kubernetes"),
        (slurm() | {"SLURM_NTASKS": "two"}, "from the scheduler .*'two'.*; pass --coordinator, "),
        (
            {"OMPI_MCA_orte_hnp_uri": OPEN_MPI["OMPI_MCA_orte_hnp_uri"]},
            "from the scheduler .KeyError: 'OMPI_COMM_WORLD_SIZE'",
        ),
    ],
    ids=["Kubernetes", "Slurm", "Open MPI"],
)
def test_a_scheduler_that_cannot_be_read_is_one_line(environ, complaint, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint) as error:
        find(False, environ={})
    assert "\n" not in str(error.value)


def test_a_process_takes_the_gpus_that_it_is_given():
    devices = {"JAX_LOCAL_DEVICE_IDS": "2,3"}
    assert find(False, HERE, 2, 0, environ=devices) == Cluster(HERE, 2, 0, "2,3")
    assert find(False, HERE, 2, 0, True, environ=devices) == Cluster(HERE, 2, 0, "2,3")


def test_two_processes_do_not_take_the_same_gpus(under_slurm, monkeypatch):
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(UserError, match=r"process 1 on its machine.*pass --process-per-gpu"):
        find(False, environ={})
    assert find(False, process_per_gpu=True, environ={}) == Cluster("localhost:61445", 2, 1, "1")


@pytest.mark.parametrize("cluster", [None, Cluster(HERE, 2, 1), Cluster(HERE, 2, 1, "0,1")])
def test_the_trainer_finds_the_cluster_of_its_parent(cluster, monkeypatch):
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    environ = distributed.environ(cluster)
    assert environ["PATH"] == os.environ["PATH"]
    if cluster:
        assert find(False, environ=environ) == cluster
    else:
        assert not ENVIRON.keys() & environ.keys()


@pytest.mark.parametrize(
    "given, environ, complaint",
    [
        ({}, {}, "no cluster was found to join; .* or pass --local to train on this machine"),
        ({"process": 1}, {}, "--coordinator and --num-processes are missing: .* go together"),
        ({"coordinator": HERE}, {"JAX_PROCESS_ID": "1"}, "^--num-processes is missing"),
        ({}, ENVIRON | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID is 'x'; it has to be a whole"),
        ({"coordinator": "10.0.0.4"}, ENVIRON, "--coordinator is '10.0.0.4'; .* HOST:PORT"),
        ({"coordinator": "h:70000"}, ENVIRON, "it has to be HOST:PORT"),
        ({"process": 4}, ENVIRON, "--process-id is 4 of --num-processes 4; it has to be from 0"),
        ({"process": -1}, ENVIRON, "--process-id is -1"),
        ({"process_per_gpu": True}, ENVIRON, "put the number .* into JAX_LOCAL_DEVICE_IDS"),
        ({}, ENVIRON | {"JAX_LOCAL_DEVICE_IDS": "a"}, "JAX_LOCAL_DEVICE_IDS is 'a'"),
    ],
)
def test_half_a_cluster_is_refused(given, environ, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        find(False, environ=environ, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"coordinator": HERE}, {"process": 0}, {"processes": 2}])
def test_local_and_a_cluster_exclude_each_other(given):
    with pytest.raises(UserError, match="--local trains without others"):
        find(True, **given)


@pytest.mark.parametrize(
    "words", ["--process-id 1", "--local --num-processes 2", "--local --max-restarts -1"]
)
def test_the_trainer_refuses_before_anything_is_started(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "txl_jax.train", *words.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


JOIN = "import sys; from txl_jax import distributed; from txl_jax.errors import run_command;"
JOIN += "run_command(lambda words: distributed.join(distributed.Cluster({!r}, 2, {}), {}))"


def join(address: str, process: int, seconds: float) -> tuple[int, str]:
    """Exit status and last line of a process that has nobody to meet."""
    command = [sys.executable, "-c", JOIN.format(address, process, seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("process", [0, 1])
def test_who_does_not_meet_the_others_asks_to_be_started_again(process):
    address = f"127.0.0.1:{free_port()}"
    assert join(address, process, 3) == (75, f"lost: not all 2 processes came to {address} in time")


def test_process_0_says_why_it_cannot_listen():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        complaint = f"error: process 0 cannot listen at {address}: Address already in use"
        status, line = join(address, 0, 60)
        assert status == 2 and line.startswith(complaint)
    status, line = join("192.0.2.1:4321", 0, 60)
    assert status == 2 and "192.0.2.1:4321: Cannot assign requested address" in line
    status, line = join("no-such-host.invalid:4321", 1, 60)
    assert status == 2 and line.startswith("error: --coordinator: no-such-host.invalid is unknown")


def test_under_slurm_processes_meet_and_none_listens_on_all_addresses(tmp_path, monkeypatch):
    job = 4096 * 3 + next(port for port in range(61440, 65536) if is_free(port)) - 61440
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with Members(tmp_path / "run", 2, "1000000", environs=[slurm(job, i) for i in range(2)]) as run:
        run.wait_for("step 20\n")
        ports = [listening(run.pid(member)) for member in range(2)]
    port = 61440 + job % 4096
    assert [address for address, at in ports[0].items() if port in at] in (["127.0.0.1"], ["::1"])
    assert [list(found) for found in ports] in ([["127.0.0.1"]] * 2, [["::1"]] * 2)
    assert "NCCL =lo None\n" in run.log(1)


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0
