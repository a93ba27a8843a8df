# NVIDIA's driver: GPUS, that nvidia-smi has to list; BRANCH to install, empty: none.
gpus=$1 branch=$2

seen() {
    { nvidia-smi -L 2>>setup.log || true; } | grep -c '^GPU ' || true
}

if [ "$(seen)" != "$gpus" ] && [ -n "$branch" ]; then
    kernel=$(uname -r)
    apt update || true
    # Modules that Ubuntu has built for this kernel; if it has none, they are built here.
    apt install --no-install-recommends \
        "linux-modules-nvidia-$branch-$kernel" "nvidia-headless-no-dkms-$branch" \
        "nvidia-utils-$branch" ||
        apt install --no-install-recommends \
            "linux-headers-$kernel" "nvidia-headless-$branch" "nvidia-utils-$branch" ||
        fail "apt-get cannot install NVIDIA's driver $branch: see ~/txl/setup.log"
    as_root modprobe nvidia >>setup.log 2>&1 || true
    as_root modprobe nvidia-uvm >>setup.log 2>&1 || true
    # Otherwise the driver forgets the GPUs whenever no program uses them.
    as_root nvidia-smi -pm 1 >>setup.log 2>&1 || true
fi
[ "$(seen)" = "$gpus" ] || fail "nvidia-smi lists $(seen) GPUs and should list $gpus"
