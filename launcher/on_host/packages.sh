# Programs of the system that the other scripts and the trainer's session take.
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
# Until cloud-init has finished, it may be at work with apt-get itself.
if command -v cloud-init >/dev/null; then
    cloud-init status --wait >>setup.log 2>&1 || true
fi
apt update || true # an older list may do
apt install --no-install-recommends $packages ||
    fail "apt-get cannot install $(echo $packages): see ~/txl/setup.log"
newest_python >/dev/null || fail "has no Python 3.11 or later: take a newer image"
packages=$(lacking)
[ -z "$packages" ] || fail "still lacks $(echo $packages): see ~/txl/setup.log"
