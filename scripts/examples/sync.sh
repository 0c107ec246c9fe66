#!/usr/bin/env bash
# Copies an output folder to a bucket, at any moment of a run: what the run is, the data, the entries of what is done,
# the manifest. Interrupted, it leaves a folder that `m3 check` accepts as unfinished; started again, it goes on.
#
#   scripts/examples/sync.sh corpus.m3 s3://bucket/corpus.m3
set -euo pipefail
from=$1 to=$2

# What is done now: a shard that is committed later belongs to the next call. With the manifest, all entries exist.
now=$(mktemp -d)
trap 'rm -rf "$now"' EXIT
cp -p "$from/_m3/manifest.json" "$now" 2>/dev/null || true
cp -Rp "$from/_m3/done" "$now/done"

aws s3 cp "$from/_m3/run.json" "$to/_m3/run.json" --only-show-errors
aws s3 sync "$from" "$to" --only-show-errors --exclude '_m3/done/*' --exclude '_m3/manifest.json' \
  --exclude '_m3/tmp/*' --exclude '_m3/lock*' --exclude '_m3/metrics*'
aws s3 sync "$now/done" "$to/_m3/done" --only-show-errors
if [ -e "$now/manifest.json" ]; then
  aws s3 cp "$now/manifest.json" "$to/_m3/manifest.json" --only-show-errors
fi
