#!/usr/bin/env bash
# Encodes what is new in a corpus, loads it into a database, and drops the folder of the night before. Files of shards
# that did not change are linked, so a night costs what is new. The folder is in current.m3; the first night makes it.
#
#   30 22 * * *  cd /srv/corpus && M3_MODEL=/srv/bge-m3 ./nightly.sh corpus.jsonl qdrant:http://localhost:6333
set -euo pipefail
corpus=$1 target=${2:-}
old=() since=()
if [ -e current.m3 ]; then old=(--since-run current.m3) since=(--since current.m3); fi
for attempt in 1 2; do
  code=0
  m3 encode "$corpus" --out next.m3 "${old[@]}" --progress none || code=$?
  [ "$code-$attempt" = 10-1 ] || break
  rm -r next.m3  # begun on a night that did not end; the corpus has changed since then
done
[ "$code" = 0 ] || [ "$code" = 3 ] || exit "$code" # 3: rows were skipped
[ -z "$target" ] || m3 load next.m3 --to "$target" "${since[@]}"
rm -rf previous.m3
[ ! -e current.m3 ] || mv current.m3 previous.m3
mv next.m3 current.m3
rm -rf previous.m3
