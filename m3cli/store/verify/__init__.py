"""Reads an output folder back and lists all that is wrong with it; takes away what is to be done again.

    ledger.py    run.json, done entries, manifest: do they agree with their checksums and with each other
    listing.py   what lies in the folder that no entry names
    files.py     every file that an entry names: there, of its length, of its hash
    shard.py     what the files of a shard say, read with no code of the writers': rows.py, vectors.py, arrays.py
    repair.py    manifest, entries and data of damaged shards taken away, in that order

Files are hashed before anything in them is believed: a damaged one is never parsed. Nothing here needs the model, the
input, or more memory than a row group, a block of vectors, and the shard's lexical weights.
"""
