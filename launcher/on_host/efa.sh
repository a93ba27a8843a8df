# AWS' software for Elastic Fabric Adapters, with the plugin by which NCCL uses them. URL is its
# installer's.
url=$1

plugin() {
    compgen -G '/opt/amazon/ofi-nccl/lib*/*libnccl-net*.so' ||
        compgen -G '/opt/amazon/ofi-nccl/lib*/*/libnccl-net*.so' ||
        compgen -G '/opt/aws-ofi-nccl/lib*/libnccl-net*.so'
}

if [ ! -e /opt/amazon/efa ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    curl -fsSL --retry 3 --connect-timeout 10 "$url" | tar -xz -C "$folder" ||
        fail "the installer of EFA cannot be fetched"
    cd "$folder/aws-efa-installer"
    as_root ./efa_installer.sh -y >>~/txl/setup.log 2>&1 </dev/null ||
        fail "the installer of EFA failed: see ~/txl/setup.log"
fi
plugin >/dev/null || fail "NCCL's plugin for EFA is not in /opt/amazon"
