# NVIDIA's driver: GPUS, that nvidia-smi has to list within SECONDS_TO_WAIT; BRANCH to install, empty:
# none.
gpus=$1 seconds_to_wait=$2 branch=$3
touch set-up

seen() {
    { nvidia-smi -L 2>>setup.log || true; } | grep -c '^GPU ' || true
}

install() {
    packages=("$@")
    apt install --no-install-recommends "$@"
}

if [ "$(seen)" != "$gpus" ] && [ -n "$branch" ]; then
    kernel=$(uname -r)
    apt update || true
    # Modules that Ubuntu has built for this kernel; if it has none, they are built here.
    install "linux-modules-nvidia-$branch-$kernel" "nvidia-headless-no-dkms-$branch" \
        "nvidia-utils-$branch" ||
        install "linux-headers-$kernel" "nvidia-headless-$branch" "nvidia-utils-$branch" ||
        fail "apt-get cannot install NVIDIA's driver $branch: see ~/txl/setup.log"
    # An upgrade under way of a trainer would take the driver from it.
    as_root apt-mark hold "${packages[@]}" >>setup.log 2>&1 || true
    as_root modprobe nvidia >>setup.log 2>&1 || true
    as_root modprobe nvidia-uvm >>setup.log 2>&1 || true
    # Otherwise the driver forgets the GPUs whenever no program uses them.
    as_root nvidia-smi -pm 1 >>setup.log 2>&1 || true
fi
end=$((SECONDS + seconds_to_wait))
until [ "$(seen)" = "$gpus" ]; do
    [ $SECONDS -lt $end ] || fail "nvidia-smi lists $(seen) GPUs and should list $gpus"
    sleep 1
done
