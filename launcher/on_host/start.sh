# Starts train.sh in the tmux session txl, unless a trainer is at work there.
training && exit 0
tmux kill-session -t =txl 2>/dev/null || true
rm -f pid status
# What it printed can be looked at after its end.
tmux new-session -d -s txl -x 200 -y 50 'exec bash ~/txl/train.sh' \; \
    set-option -t txl remain-on-exit on </dev/null >>setup.log 2>&1
while [ "$(dead)" = 0 ]; do
    [ ! -e pid ] || exit 0
    sleep 0.1
done
[ ! -e pid ] || exit 0
said=$(tmux capture-pane -p -S - -t =txl: 2>/dev/null | grep -v '^Pane is dead' | grep . || true)
fail "the trainer did not start: $(tail -n 1 <<<"$said")"
