# Begins every script here. They run in ~/txl, take arguments, and say in one line what is wrong.
# `limit`: seconds that the script may take.
set -euo pipefail
umask 077
mkdir -p ~/txl
cd ~/txl

fail() {
    echo "$*" >&2
    exit 1
}

# What a launch leaves behind that was cut off works on for a while: one at a time changes the host.
case $0 in
state | stop) ;;
*)
    exec 9>lock
    flock -w "$limit" 9 || fail "another set-up is at work here"
    ;;
esac

as_root() {
    local before=() left=$((limit - SECONDS))
    [ "$(id -u)" = 0 ] || before=(sudo -n)
    # Who started this script cannot end what runs as root.
    "${before[@]}" timeout -k 10 $((left > 1 ? left : 1)) "$@"
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

# Of the trainer's pane in the session txl, which may have others: 1 when what runs in it has ended,
# 0 when not, nothing without it.
dead() {
    tmux list-panes -s -t =txl -F '#{pane_id} #{pane_dead}' 2>/dev/null |
        sed -n "s/^$(cat pane 2>/dev/null) //p"
}

training() {
    [ ! -e status ] && [ "$(dead)" = 0 ]
}

