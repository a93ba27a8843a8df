# Unpacks FOLDER/NAME.tar.gz into FOLDER/NAME, once. SHA256: of the archive, empty: not known.
# FETCH: `fetch` if standard input tells curl where the archive is, else it is there.
folder=$1 name=$2 sha256=$3 fetch=$4
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
mv -T "$name.new" "$name"
rm "$archive"
