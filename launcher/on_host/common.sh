# Begins every script here. They run in ~/txl, take arguments, and say in one line what is wrong.
set -euo pipefail
umask 077
mkdir -p ~/txl
cd ~/txl

fail() {
    echo "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get -y -q \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >>setup.log 2>&1 </dev/null
}

newest_python() {
    for name in python3 python3.13 python3.12 python3.11; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>>setup.log || continue
        echo "$name"
        return
    done
    return 1
}

# 1 when all in the session txl has ended, 0 when not, nothing without a session.
dead() {
    tmux list-panes -t =txl -F '#{pane_dead}' 2>/dev/null
}

training() {
    [ ! -e status ] && [ "$(dead)" = 0 ]
}

