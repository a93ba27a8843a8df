# Has the trainer save and end. SECONDS_TO_WAIT for that.
seconds_to_wait=$1
training || exit 0
kill -TERM "$(cat pid)"
for _ in $(seq $((10 * seconds_to_wait))); do
    [ ! -e status ] || exit 0
    sleep 0.1
done
fail "the trainer did not end in $seconds_to_wait s"
