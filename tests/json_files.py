"""JSON files of tests."""

import json


def read_json(path):
    """Read a file."""
    return json.loads(path.read_text())


def write_json(path, content):
    """Write a file."""
    path.write_text(json.dumps(content))


def write_rows(path, rows):
    """Write a file with one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path, fields):
    """Replace fields of a file, or add them."""
    write_json(path, read_json(path) | fields)
