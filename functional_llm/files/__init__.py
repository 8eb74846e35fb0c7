"""Files: written so that nothing is lost or half-written, and JSON objects read from them.

May import: no other room.

Offers: `replaced` (a folder), `replaced_file`, `share`, `read_json`, `write_json`.
"""
