# Prints `training`, `ended STATUS` or `nothing`.
if training; then
    echo training
elif [ -e status ]; then
    echo "ended $(cat status)"
else
    echo nothing
fi
