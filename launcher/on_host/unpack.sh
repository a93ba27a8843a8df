# Unpacks FOLDER/NAME.tar.gz into FOLDER/NAME, once. SHA256: of the archive, empty: NAME is the hash of
# what is in it. FETCH: `fetch` if standard input tells curl where the archive is, else it is there.
folder=$1 name=$2 sha256=$3 fetch=$4
touch set-up
mkdir -p "$folder"
cd "$folder"
archive=$name.tar.gz
if [ -d "$name" ]; then
    rm -f "$archive"
    exit 0
fi
if [ "$fetch" = fetch ]; then
    curl -fsSL --retry 5 --retry-all-errors --connect-timeout 10 --config - -o "$archive"
fi
if [ -n "$sha256" ]; then
    echo "$sha256  $archive" | sha256sum --check --status || fail "$folder/$archive is damaged"
fi
rm -rf "$name.new"
mkdir "$name.new"
tar -xzf "$archive" -C "$name.new" --no-same-owner
if [ -z "$sha256" ]; then
    PYTHONPATH=~/txl/source ~/txl/venv/bin/python -m launcher.on_host.contents "$name.new" "$name" ||
        fail "$folder/$archive has not what its name says"
fi
mv -T "$name.new" "$name"
rm "$archive"
