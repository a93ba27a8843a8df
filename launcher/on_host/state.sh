# Prints `training`, `ended STATUS` or `nothing`; on further lines for how many seconds the trainer has
# been there and since when no phase of a set-up has begun (-1: never), and whether one is under way.
age() {
    if [ -e "$1" ]; then echo $(($(date +%s) - $(stat -c %Y "$1"))); else echo -1; fi
}

if training; then
    echo training
elif [ -e status ]; then
    echo "ended $(cat status)"
else
    echo nothing
fi
age pid
age set-up
if flock -n lock true; then echo idle; else echo busy; fi
