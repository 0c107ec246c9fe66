#!/usr/bin/env bash
# Encodes what is new in a corpus, loads it into a database, and drops the folder of the night before. Files of shards
# that did not change are linked, so a night costs what is new. current.m3 is what the database holds; the first night
# makes it. Where a load fails, the next night begins with it, or the rows that it left could stay for ever.
#
#   30 22 * * *  cd /srv/corpus && M3_MODEL=/srv/bge-m3 ./nightly.sh corpus.jsonl qdrant:http://localhost:6333 [NAME]
set -euo pipefail
corpus=$1 target=${2:-} name=${3:-corpus}

run() { # 3: done, but rows were skipped or left out; they are listed
  code=0
  "$@" || code=$?
  [ "$code" = 0 ] || [ "$code" = 3 ]
}

load_ready() {
  [ -e current.m3 ] || [ ! -e previous.m3 ] || mv previous.m3 current.m3 # ended between the two lines below
  [ -e ready.m3 ] || return 0
  if [ -n "$target" ]; then
    load=(m3 load ready.m3 --to "$target" --name "$name")
    [ ! -e current.m3 ] || load+=(--since current.m3)
    run "${load[@]}" || exit "$code"
  fi
  rm -rf previous.m3
  [ ! -e current.m3 ] || mv current.m3 previous.m3
  mv ready.m3 current.m3
  rm -rf previous.m3
}

load_ready
encode=(m3 encode "$corpus" --out next.m3 --progress none)
[ ! -e current.m3 ] || encode+=(--since-run current.m3)
if ! run "${encode[@]}"; then
  [ "$code" = 10 ] || exit "$code"
  rm -r next.m3 # begun on a night that did not end; the corpus has changed since then
  run "${encode[@]}" || exit "$code"
fi
mv next.m3 ready.m3
load_ready
