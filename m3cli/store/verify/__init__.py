"""Check an output folder and repair it: list all faults, remove the files of damaged shards.

    ledger.py      run.json, done entries and manifest: checksums and agreement; length and hash of every file;
                   files that no done entry names; repair
    contents.py    contents of a shard's files, read without the code that writes them
    rows.py        columns of the rows; duplicate ids

Files are hashed first: a damaged file is never parsed. No model or input is needed. Memory is bounded by a row group,
a block of vectors and the lexical weights of a shard.
"""
