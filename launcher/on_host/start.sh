# Starts train.sh in the tmux session txl, unless a trainer is at work there. SECONDS_TO_LIVE: for
# which it is looked at, unless it makes a step before.
seconds_to_live=$1
training && exit 0
touch set-up
tmux kill-session -t =txl 2>/dev/null || true
rm -f pane pid status

# What it printed can be looked at after its end.
session() {
    tmux new-session -d -P -F '#{pane_id}' -s txl -x 200 -y 50 'exec bash ~/txl/train.sh' \; \
        set-option -t txl remain-on-exit on </dev/null >pane 2>>setup.log 9>&-
}

# A server of tmux that has lost its last session may take the next one in its own last moments.
session || { sleep 1 && session; } ||
    fail "tmux does not start the trainer: $(tail -n 1 setup.log)"

steps() {
    for beat in heartbeats/*.json; do
        [ ! "$beat" -nt pid ] || return 0
    done
    return 1
}

# It is not over while the trainer is gone and its status is not there yet.
looked_at() {
    [ $SECONDS -ge $end ] && kill -0 "$(cat pid)" 2>/dev/null
}

until [ -e pid ] || [ "$(dead)" != 0 ]; do sleep 0.1; done
end=$((SECONDS + seconds_to_live))
until [ "$(dead)" != 0 ] || [ -e status ] || looked_at || steps; do sleep 0.1; done
# With status 0 nothing was left to be trained.
{ training || [ "$(cat status 2>/dev/null)" = 0 ]; } && exit 0
if [ -e pid ]; then
    fail "the trainer has ended, with status $(cat status): $(grep . output.txt | tail -n 1)"
fi
said=$(tmux capture-pane -p -S - -t "$(cat pane)" 2>/dev/null | grep -v '^Pane is dead' | grep . ||
    true)
fail "the trainer did not start: $(tail -n 1 <<<"$said")"
