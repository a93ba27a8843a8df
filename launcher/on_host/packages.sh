# Programs of the system that the other scripts and the trainer's session take. KEEPER: systemd's name
# of what stops this host, empty: nothing does.
keeper=$1
date +%s >set-up.tmp
mv set-up.tmp set-up
# Until cloud-init has finished, it may be at work with apt-get itself, and has not started the keeper.
if command -v cloud-init >/dev/null; then
    timeout 300 cloud-init status --wait >>setup.log 2>&1 || true
fi
if [ -n "$keeper" ] && ! { [ -e booted ] && systemctl is-active --quiet "$keeper"; }; then
    fail "$keeper is not at work, which stops this host: see /var/log/cloud-init-output.log"
fi

lacking() {
    for name in curl tmux; do
        command -v "$name" >/dev/null || echo "$name"
    done
    python=$(newest_python) && "$python" -m ensurepip --version >/dev/null 2>&1 ||
        echo python3-venv
}

packages=$(lacking)
[ -n "$packages" ] || exit 0
command -v apt-get >/dev/null || fail "lacks $(echo $packages): install that there"
apt update || true # an older list may do
apt install --no-install-recommends $packages ||
    fail "apt-get cannot install $(echo $packages): see ~/txl/setup.log"
newest_python >/dev/null || fail "has no Python 3.11 or later: take a newer image"
packages=$(lacking)
[ -z "$packages" ] || fail "still lacks $(echo $packages): see ~/txl/setup.log"
