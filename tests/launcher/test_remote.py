"""SSH to several hosts at once, with real sshds."""

import os
import pickle
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher import remote
from launcher.bootstrap import HostKey
from launcher.remote import LOST, TIMED_OUT, Hosts
from tests.launcher.refused import PROGRAMS
from txl_jax.errors import UserError

pytest_plugins = ["tests.launcher.sshd"]

pytestmark = [pytest.mark.processes, pytest.mark.cloud]

ROOT = Path(__file__).resolve().parents[2]
NASTY = [
    "$(touch pwned)",
    "`touch pwned`",
    "a'b\"c",
    "two\nlines",
    "; touch pwned",
    "-n",
    "ü \\x",
    "",
]


def test_hosts_of_tests_cannot_change_this_machine(machines):
    some = machines(1)
    with some.hosts() as hosts:
        (found,) = hosts.run(shlex.join(["which", *PROGRAMS]), timeout=300)
    assert found.out.split() == [f"{some.servers[0].tools}/{name}" for name in PROGRAMS]


def test_the_end_of_a_host_leaves_other_servers_of_tmux_alone(machines, monkeypatch, tmp_path):
    """As where the tests run in tmux."""
    socket = str(tmp_path / "own")
    tmux = ["tmux", "-f", "/dev/null", "-S", socket]
    subprocess.run([*tmux, "new-session", "-d", "sleep 600"], check=True)
    try:
        monkeypatch.setenv("TMUX", f"{socket},1,0")
        some = machines(1)
        with some.hosts() as hosts:
            hosts.run("tmux new-session -d 'echo $$ >~/pid; exec sleep 600'", timeout=300)
            hosts.run("until [ -s ~/pid ]; do sleep 0.05; done", timeout=300)
        pid = int((some.servers[0].home / "pid").read_text())
        some.servers.pop().remove()
        subprocess.run([*tmux, "has-session"], check=True)
        end = time.monotonic() + 300
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        subprocess.run([*tmux, "kill-server"])


def test_a_command_runs_on_all_hosts_and_in_their_order(machines):
    some = machines(3)
    with some.hosts() as hosts:
        hosts.wait(300)
        assert hosts.names == ("night-0", "night-1", "night-2")
        outputs = hosts.run('echo "$HOME"; echo err >&2; cat', timeout=300, input="from here")
        assert [output.out for output in outputs] == [
            f"{server.home}\nfrom here" for server in some.servers
        ]
        assert {(output.status, output.err) for output in outputs} == {(0, "err\n")}
        each = hosts.run([f"echo {number}" for number in range(3)], timeout=300)
        assert [output.out for output in each] == ["0\n", "1\n", "2\n"]


def test_input_is_sent_at_once_and_need_not_be_read(machines):
    text = "ü secret\n" * 20_000
    with machines(2).hosts() as hosts:
        whole, rest = hosts.run(["cat", "head -n 1; exit 0"], timeout=300, input=text)
    assert whole.out == text
    assert rest.out == "ü secret\n"


def test_they_run_at_the_same_time(machines, tmp_path):
    """Each waits for the other to have begun."""
    with machines(2).hosts() as hosts:
        begun = [tmp_path / f"begun-{number}" for number in range(2)]
        wait = "touch {}; until [ -e {} ]; do sleep 0.05; done"
        hosts.run([wait.format(begun[0], begun[1]), wait.format(begun[1], begun[0])], timeout=300)


def test_all_finish_before_the_hosts_that_failed_are_named(machines, tmp_path):
    done = tmp_path / "done"
    commands = [
        "echo some output; echo 'no \x1b[31mspace left' >&2; exit 3",
        f"sleep 1; touch {done}",
        "kill -9 $$",
    ]
    with machines(3).hosts() as hosts, pytest.raises(UserError) as caught:
        hosts.run(commands, timeout=300)
    assert done.exists()
    message = str(caught.value)
    assert message.startswith("failed on 2 of 3 hosts: night-0: no \\x1b[31mspace left; night-2: ")
    assert message.isprintable()


def test_failures_can_be_looked_at(machines):
    with machines(1).hosts() as hosts:
        (output,) = hosts.run("exit 7", timeout=300, check=False)
        assert (output.status, output.last_line()) == (7, "status 7")


def test_a_command_that_takes_too_long_is_given_up(machines):
    with machines(2).hosts() as hosts:
        slow, quick = hosts.run(["echo begun; sleep 600", "echo"], timeout=3, check=False)
        assert (slow.status, slow.out, quick.status) == (TIMED_OUT, "begun\n", 0)
        assert slow.last_line() == "took longer than 3 s"


def test_words_arrive_as_they_are(machines):
    some = machines(1)
    with some.hosts() as hosts:
        (output,) = hosts.run(shlex.join(["printf", "%s\\0", *NASTY]), timeout=300)
        assert output.out.split("\0")[:-1] == NASTY
        for place in (some.servers[0].home, Path.home(), ROOT):
            assert not (place / "pwned").exists()


def test_output_is_shown_line_by_line_with_the_hosts_name(machines, capsys):
    with machines(2).hosts() as hosts:
        hosts.run(["printf 'a\\nb\\n'", "printf 'c\\033]0;x\\n' >&2"], timeout=300, quiet=False)
    lines = sorted(capsys.readouterr().out.splitlines())
    assert lines == ["night-0: a", "night-0: b", "night-1: c\\x1b]0;x"]


def test_a_last_line_without_an_end_is_shown_too(machines, capsys):
    with machines(1).hosts() as hosts:
        hosts.run("printf 'a\\nb'; printf c >&2", timeout=300, quiet=False)
        assert sorted(capsys.readouterr().out.splitlines()) == [f"night-0: {x}" for x in "abc"]
        hosts.run("printf d; exec sleep 600", timeout=1, quiet=False, check=False)
        assert capsys.readouterr().out == "night-0: d\n"


def test_a_file_arrives_whole_with_its_mode(machines, tmp_path):
    some = machines(2)
    content = os.urandom(3_000_000)
    local = tmp_path / "local"
    local.write_bytes(content)
    with some.hosts() as hosts:
        hosts.put(local, "big")
        hosts.put([b"zero", b"one"], "each it's $(own)", mode=0o700)
        (some.servers[1].home / "big").write_text("old")
        hosts.put(local, "big")
        with pytest.raises(UserError, match=r"failed on 2 of 2 hosts: night-0: no/folder: no such"):
            hosts.put(b"x", "no/folder")
    for server, text in zip(some.servers, ["zero", "one"], strict=True):
        assert (server.home / "big").read_bytes() == content
        assert (server.home / "each it's $(own)").read_text() == text
        modes = [stat.S_IMODE(path.stat().st_mode) for path in sorted(server.home.iterdir())]
        assert modes == [0o600, 0o700]


def test_a_host_that_takes_no_more_of_a_file_is_named(machines, monkeypatch):
    monkeypatch.setattr(remote, "_SILENT_SECONDS", 1.0)
    some = machines(2)
    with some.hosts() as hosts:
        hosts.put(b"x", "small")
        process = some.servers[1].process
        assert process
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        sessions = [int(pid) for pid in found.stdout.split()]
        for pid in sessions:
            os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(UserError) as caught:
                hosts.put(bytes(30_000_000), "large")
        finally:
            for pid in sessions:
                os.kill(pid, signal.SIGCONT)
    assert str(caught.value).startswith("failed on 1 of 2 hosts: night-1: large: ")
    assert not (some.servers[1].home / "large").exists()


def test_connections_that_were_closed_are_opened_again(machines):
    with machines(2).hosts() as hosts:
        before = [output.out for output in hosts.run("echo $PPID", timeout=300)]
        assert [output.out for output in hosts.run("echo $PPID", timeout=300)] == before
        hosts.put(b"x", "file")
        hosts.close_connections()
        after = [output.out for output in hosts.run("echo $PPID", timeout=300)]
        assert not set(before) & set(after)
        hosts.put(b"x", "file")


def test_a_wrong_key_is_an_error_at_once(machines):
    some = machines(1)
    some.host_key = HostKey.of(b"secret of the tests", "another launch")
    some.add(1)
    some.host_key = some.servers[0].host_key
    with some.hosts() as hosts, pytest.raises(UserError) as caught:
        hosts.wait(3600)
    assert str(caught.value).startswith(
        "cannot reach 1 of 2 hosts: night-1: its key is not the one"
    )
    assert "Accepted" not in some.servers[1].log()


@pytest.mark.parametrize("key", ["", "ssh-ed25519", "ssh-ed25519 AAAA", "ssh-rsa AAAA", "\x1b[2J"])
def test_without_a_key_nothing_is_connected(machines, key):
    with pytest.raises(UserError, match="night-0 has no SSH key in its tags"):
        machines(1).hosts(host_key=key)


def test_a_host_that_never_answers_is_named(machines):
    some = machines(2)
    some.servers[1].stop()
    with some.hosts() as hosts, pytest.raises(UserError) as caught:
        hosts.wait(1)
    assert str(caught.value) == (
        "cannot reach 1 of 2 hosts: night-1: no answer in 1 s (connection refused)"
    )


def test_a_host_that_takes_connections_and_is_silent_is_named(machines):
    some = machines(1)
    with (
        socket.create_server((some.free_address, 22)),
        some.hosts(private_ip=some.free_address) as hosts,
        pytest.raises(UserError, match=r"night-0: no answer in 1 s \("),
    ):
        hosts.wait(1)


def test_hosts_are_waited_for(machines):
    some = machines(1)
    server = some.servers[0]
    server.stop()
    later = threading.Timer(1.5, server.start)
    later.start()
    with some.hosts() as hosts:
        hosts.wait(300)
    later.join()


def test_another_users_key_is_not_taken(machines):
    some = machines(1)
    other = some.folder / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    with (
        Hosts.of(some.run(), other, private=True) as hosts,
        pytest.raises(UserError, match="it does not take our key"),
    ):
        hosts.wait(1)


def test_a_lost_connection_is_said_and_opened_again(machines):
    some = machines(2)
    with some.hosts() as hosts:
        hosts.wait(300)
        hosts.put(b"x", "file")
        loses = threading.Timer(1, some.servers[1].stop)
        loses.start()
        fine, lost = hosts.run(["sleep 2", "sleep 600"], timeout=300, check=False)
        loses.join()
        assert (fine.status, lost.status) == (0, LOST)
        assert lost.last_line().startswith("the connection was lost")
        some.servers[1].start()
        hosts.run("true", timeout=300)
        hosts.put(b"x", "file")


def test_nothing_of_the_users_own_settings_is_used(machines, monkeypatch, tmp_path):
    """Not its ~/.ssh/config, which may send us elsewhere, nor keys that it knows."""
    some = machines(1)
    home = tmp_path / "laptop"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "config").write_text("Host *\n  HostName 127.0.0.9\n  Port 9\n  User nobody\n")
    monkeypatch.setenv("HOME", str(home))
    with some.hosts() as hosts:
        hosts.wait(300)


class Laptop:
    """A home with settings of SSH, for hosts that are listed."""

    def __init__(self, home: Path, some, known: str, monkeypatch: pytest.MonkeyPatch):
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "known_hosts").write_text(known)
        (home / ".ssh" / "config").write_text(f"Host far\n  HostName {some.servers[0].address}\n")
        (home / ".ssh" / "id_ed25519").write_bytes(some.key.read_bytes())
        (home / ".ssh" / "id_ed25519").chmod(0o600)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


def test_listed_hosts_are_known_by_the_users_own_files(machines, monkeypatch, tmp_path):
    some = machines(2)
    first, second = (server.address for server in some.servers)
    known = f"{first} {some.host_key.public}\n{second} {some.host_key.public}\n"
    Laptop(tmp_path / "laptop", some, known, monkeypatch)
    user = some.run().hosts[0].user
    listed = tmp_path / "hosts file"
    listed.write_text(f"# ours\n{user}@far\n\n{second}  # the other\n")
    for text in (f"{user}@far, {second}", str(listed)):
        with Hosts.listed(text) as hosts:
            hosts.wait(300)
            assert hosts.names == (f"{user}@far", second)
            assert hosts.addresses == (first, second)


def test_a_listed_host_whose_key_is_not_known_is_refused(machines, monkeypatch, tmp_path):
    some = machines(1)
    Laptop(tmp_path / "laptop", some, "", monkeypatch)
    with Hosts.listed("far") as hosts, pytest.raises(UserError) as caught:
        hosts.wait(3600)
    assert str(caught.value) == (
        "cannot reach 1 of 1 hosts: far: its key is not known: connect once with ssh, and check "
        "the key"
    )
    assert "Accepted" not in some.servers[0].log()


def test_a_gateway_whose_key_is_not_known_is_refused(machines, monkeypatch, tmp_path):
    some = machines(2)
    gateway, host = (server.address for server in some.servers)
    Laptop(tmp_path / "laptop", some, f"{host} {some.host_key.public}\n", monkeypatch)
    config = tmp_path / "laptop" / ".ssh" / "config"
    config.write_text(f"Host {host}\n  ProxyJump {gateway}\n")
    with Hosts.listed(host) as hosts, pytest.raises(UserError, match="its key is not known"):
        hosts.wait(3600)
    assert "Accepted" not in some.servers[0].log()


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no host is listed"),
        (" , ", "no host is listed"),
        ("a,me@b,a", "has a twice"),
        ("ada@gpu1,bob@gpu1", "has bob@gpu1 twice"),
        ("a,b,a,c,b,a", "has a, b twice"),
        ("ada@gpu1,bob@gpu1:22", "has bob@gpu1:22 twice"),
        ("/proc/self/mem", "/proc/self/mem: cannot read it: "),
        ("-oProxyCommand=x", "is no host"),
        ("a b", "is no host"),
        ("me@a;reboot", "is no host"),
        ("a\x1b[2J", r"a\\x1b\[2J is no host"),
    ],
)
def test_a_list_that_cannot_be_used(monkeypatch, tmp_path, text, problem):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=problem):
        Hosts.listed(text)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"ada@gpu1\xff\n")
    with pytest.raises(UserError, match=r"hosts: no text in UTF-8"):
        Hosts.listed(str(path))


def test_ctrl_c_ends_what_is_under_way(machines):
    some = machines(1)
    code = (
        "import pickle, sys\n"
        "from launcher.remote import Hosts\n"
        "run, key = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with Hosts.of(run, key, private=True) as hosts:\n"
        "    hosts.wait(300)\n"
        "    hosts.run('echo begun; sleep 600', timeout=3000, quiet=False)\n"
    )
    path = some.folder / "run"
    path.write_bytes(pickle.dumps((some.run(), some.key)))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, handler)
    try:
        assert process.stdout and process.stdout.readline() == "night-0: begun\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        assert errors.rstrip().endswith("KeyboardInterrupt") and process.returncode != 0
    finally:
        process.kill()
