# AWS' software for Elastic Fabric Adapters, with the plugin by which NCCL uses them. URL and SHA256 of
# its installer.
url=$1 sha256=$2
touch set-up
fi_info=/opt/amazon/efa/bin/fi_info

plugin() {
    compgen -G '/opt/amazon/ofi-nccl/lib*/*libnccl-net*.so' ||
        compgen -G '/opt/amazon/ofi-nccl/lib*/*/libnccl-net*.so' ||
        compgen -G '/opt/aws-ofi-nccl/lib*/libnccl-net*.so'
}

if [ ! -x $fi_info ] || ! plugin >/dev/null; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    cd "$folder"
    curl -fsSL --retry 3 --connect-timeout 10 -o aws-efa-installer.tar.gz "$url" ||
        fail "the installer of EFA cannot be fetched"
    echo "$sha256  aws-efa-installer.tar.gz" | sha256sum --check --status ||
        fail "the installer of EFA is not the one that AWS has published"
    tar -xzf aws-efa-installer.tar.gz
    cd aws-efa-installer
    as_root ./efa_installer.sh -y >>~/txl/setup.log 2>&1 </dev/null ||
        fail "the installer of EFA failed: see ~/txl/setup.log"
    cd ~/txl
    # It raises limits, which a server of tmux from before does not have.
    training || tmux kill-server 2>/dev/null || true
fi
plugin >/dev/null || fail "NCCL's plugin for EFA is not in /opt/amazon"
$fi_info -p efa >>setup.log 2>&1 || fail "fi_info finds no EFA: see ~/txl/setup.log"
