# The virtual environment of the source that `source` links to.
touch set-up
python=$(newest_python) || fail "has no Python 3.11 or later"
wanted=$({
    cat source/requirements.txt source/requirements.lock source/install.py
    "$python" --version
    nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true
} | sha256sum)
[ "$(cat venv/installed 2>/dev/null || true)" != "$wanted" ] || exit 0
rm -f venv/installed
before=$(wc -l <setup.log)
"$python" source/install.py venv >>setup.log 2>&1 </dev/null || {
    problem=$(tail -n "+$before" setup.log | grep -i '^ *error' | tail -n 1 || true)
    fail "${problem:-the packages cannot be installed}: see ~/txl/setup.log"
}
echo "$wanted" >venv/installed
