"""Files: written so that nothing is lost or half-written, and JSON objects read from them.

May import: no other room.

Offers: `replaced_file`, `replaced_folder`, `check_writable`, `share`, `read_json`, `write_json`,
`parse_json_object`, `is_first`, `place_among_processes`.
"""
